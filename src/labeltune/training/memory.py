"""How many tokens fit into one pack: measured on the model at hand, not looked up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labeltune.models.precision import free_memory
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import CHUNK, answer_loss
from labeltune.training.packing import ENOUGH, PAIRS_PER_TOKEN, Packing, Row, pack_step, useful_tokens

#: Share of the free memory that activations may take as they are counted. On the CPU the allocator was seen to take 2.3 times as
#: much (docs/benchmarks.md: Fudan news at 24 layers), and running out is not an error there but the end.
SHARE = {"cuda": 0.5, "mps": 0.5, "cpu": 0.3}
#: Part of a layer's activations that checkpointing keeps (its input), seen from above.
KEPT_BY_CHECKPOINTING = 0.15


@dataclass(frozen=True)
class MemoryBudget:
    """How much goes through the model at once.

    Attributes:
        max_tokens: tokens of a pack.
        checkpointing: recompute activations in the backward pass.
        bytes_per_token: activations of one token, measured without checkpointing.
        free: bytes that were free.
    """

    max_tokens: int
    checkpointing: bool
    bytes_per_token: int
    free: int


class Weights:
    """Where the weights lie in memory while a model runs; shared-out ones are put together layer by layer."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()

    def _note(self, module: Any, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            self.addresses.add(local.untyped_storage().data_ptr())

    @contextlib.contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Inside, `addresses` grows with every module that is called."""
        hooks = [module.register_forward_pre_hook(self._note) for module in model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def activation_bytes(model: Any, rows: Sequence[Row], packing: Packing, pad_id: int, head: Any) -> int:
    """Bytes that the backward pass of one token keeps, from one forward pass over `rows` in training mode.

    Weights are not counted, shared storages once. The random state moves; call it where that is put back.
    """
    import torch

    device = next(model.parameters()).device
    weights = Weights()
    sizes: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights.addresses:
            # The storage is held on to, so that its address is not given to another one meanwhile.
            sizes[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    pack = pack_step(rows, sum(len(row.ids) for row in rows), packing)[0][0]
    batch = make_batch(rows, pack, packing, pad_id).to(device)
    with (
        attention_for(model, packing),
        weights.watched(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        answer_loss(model, head, batch.inputs, batch.index, batch.targets)
    return max(1, sum(size for _, size in sizes.values()) // batch.tokens)


def budget_memory(
    wanted_tokens: int | None,
    wanted_checkpointing: bool | None,
    steps: Sequence[Sequence[Row]],
    packing: Packing,
    processes: int,
    bytes_per_token: int,
    vocabulary: int,
    device: Any,
    agree: Callable[[int], int],
) -> MemoryBudget:
    """Tokens a pack and checkpointing, where the config leaves them open (None).

    The longest example must fit; beyond that a pack is no larger than what keeps the device busy and shares nearly all
    that can be shared.

    Args:
        steps: the first steps of the run, to see what sharing brings.
        vocabulary: columns of the output layer, for the logits of one chunk.
        agree: makes processes agree on the smallest of their numbers.
    """
    free = agree(free_memory(device))
    # Logits of a chunk, their softmax and the copy in the compute type.
    room = max(0, int(SHARE[device.type] * free) - 3 * 4 * CHUNK * vocabulary)
    longest = max(len(row.ids) for step in steps for row in step)
    useful = wanted_tokens or max(longest, useful_tokens(steps, packing, processes, ENOUGH[device.type]))
    checkpointing = bool(wanted_checkpointing)
    if wanted_checkpointing is None:
        # Worth it only when even a modest pack does not fit: it costs a second forward pass.
        modest = max(longest, wanted_tokens or min(useful, ENOUGH[device.type] // 4))
        checkpointing = room < modest * bytes_per_token
    each = int(bytes_per_token * (KEPT_BY_CHECKPOINTING if checkpointing else 1.0)) or 1
    tokens = wanted_tokens or min(useful, max(longest, room // each))
    return MemoryBudget(tokens, checkpointing, bytes_per_token, free)


def pairs_per_token(model: Any) -> int:
    """How many pairs of a query and a key cost as much as one token's matrix products, by the model's shape.

    A forward pass takes 2 operations a weight and token, and 4 a pair, layer and dimension of the heads.
    """
    shape = model.config.get_text_config()
    heads, size = getattr(shape, "num_attention_heads", None), getattr(shape, "head_dim", None)
    layers = getattr(shape, "num_hidden_layers", None)
    if not heads or not layers:
        return PAIRS_PER_TOKEN
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    return max(1, int(weights // (2 * layers * heads * (size or shape.hidden_size // heads))))


def enable_checkpointing(model: Any) -> None:
    """Recompute the layers' activations in the backward pass; frozen input embeddings still get no gradient.

    transformers makes the embeddings' output require a gradient, which reentrant checkpointing needs; ours is the other
    kind, and everything below the lowest adapter stays out of the backward pass.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()


def memory_in_use(device: Any) -> int:
    """Bytes: the most a GPU held so far, or what this process holds now."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put torch's random state back, so that what is measured before a run does not change the run."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
