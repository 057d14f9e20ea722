"""What a model costs, found out without its weights: counted on its shape, measured on a model of one and two of its layers."""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeltune.config import RunConfig
from labeltune.errors import ModelError, first_line
from labeltune.modeling.lora import attach_adapter
from labeltune.modeling.precision import Precision
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import CHUNK, answer_loss
from labeltune.training.memory import activation_bytes, enable_checkpointing, random_state_kept
from labeltune.training.planner import Pack, Packing, Row
from labeltune.training.token_plan import TokenPlan

#: Tokens that the small models know; an embedding of the real size would hold more than their layers.
_VOCABULARY = 512
#: What the allocator holds of the CPU's memory for a byte of tensors alive: 1.52 and 1.61 were measured, with a Qwen2 of 12 and a
#: Llama of 92 million weights (docs/benchmarks.md). Forward and backward pass run in two threads, whose freed memory is not shared.
ALLOCATOR = {"cpu": 1.55}
#: A 4-bit weight with its part of the scales.
_FOUR_BIT = 0.52


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model with its adapter.

    Attributes:
        parameters: weights in all.
        trained: weights that are trained.
        frozen_matrix: frozen weights that every token is multiplied with (layers without the output layer).
        trained_matrix: trained ones.
        weight_bytes: frozen weights in memory; of a model that is trained whole, all its weights.
        trained_bytes: the adapter's weights in memory, 0 for a model that is trained whole.
        gradient_bytes: of all trained weights, in their type; Adam keeps twice as much.
        layers: how many.
        attention_width: heads times the size of a head.
        hidden: width of what the output layer reads.
        vocabulary: rows of the output layer.
        head_trained: whether the output layer is trained.
        itemsize: bytes of a number in the output layer's computation.
    """

    parameters: int
    trained: int
    frozen_matrix: int
    trained_matrix: int
    weight_bytes: int
    trained_bytes: int
    gradient_bytes: int
    layers: int
    attention_width: int
    hidden: int
    vocabulary: int
    head_trained: bool
    itemsize: int


def model_shape(folder: Path, config: RunConfig, precision: Precision) -> ModelShape:
    """Counted on a model whose weights are nowhere (PyTorch's meta device).

    Raises:
        ModelError: the folder's `config.json` describes no causal language model.
    """
    import torch

    full = config.training.method == "full"
    text = _read_config(folder, config).get_text_config()
    model = _empty(folder, config, precision, None, "meta")
    head = model.get_output_embeddings()
    frozen = trained = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            if module.weight.requires_grad:
                trained += module.weight.numel()
            else:
                frozen += module.weight.numel()
    parameters = {id(p): p for p in model.parameters()}.values()
    sizes = {True: 0, False: 0}
    for p in parameters:
        sizes[p.requires_grad] += p.numel() * p.element_size()
    weight_bytes = sum(sizes.values()) if full else sizes[False]
    if config.training.method == "qlora":
        rest = sum(p.numel() for p in parameters if not p.requires_grad) - frozen
        weight_bytes = int(frozen * _FOUR_BIT) + rest * precision.weights.itemsize
    heads = text.num_attention_heads
    return ModelShape(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        frozen_matrix=frozen,
        trained_matrix=trained,
        weight_bytes=weight_bytes,
        trained_bytes=0 if full else sizes[True],
        gradient_bytes=sizes[True],
        layers=text.num_hidden_layers,
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        hidden=int(head.weight.shape[1]),
        vocabulary=int(head.weight.shape[0]),
        head_trained=bool(head.weight.requires_grad),
        itemsize=precision.weights.itemsize,
    )


def _read_config(folder: Path, config: RunConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=config.hub.trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be described: {first_line(error)}") from error


def _empty(folder: Path, config: RunConfig, precision: Precision, layers: int | None, device: str) -> Any:
    """A model of this kind with random weights (none on `meta`), with `layers` layers and a small vocabulary unless None."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = _read_config(folder, config)
    if layers is not None:
        shape = copy.deepcopy(shape)
        text = shape.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            # From the end: where kinds of layers differ, the first ones are often special.
            kinds = list(text.layer_types)
            text.layer_types = (kinds * layers)[-layers:]
        text.vocab_size = _VOCABULARY
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, None)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                shape, dtype=precision.weights, trust_remote_code=config.hub.trust_remote_code
            )
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be described: {first_line(error)}") from error
    return model if config.training.method == "full" else attach_adapter(model, config.lora)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (a multiplication and an addition are two)."""

    layers: float
    attention: float
    output: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.layers + self.attention + self.output


def count_flops(shape: ModelShape, plan: TokenPlan, checkpointing: bool) -> Flops:
    """Of all steps, forward and backward: matrix products, which are nearly all there is.

    A frozen matrix costs a forward pass and the gradient of its input, a trained one the gradient of itself too. Attention
    costs two products forward and five backward, as it computes its scores again. Gradient checkpointing repeats the
    forward pass.
    """
    forward_layers = 2.0 * (shape.frozen_matrix + shape.trained_matrix) * plan.computed
    forward_attention = 4.0 * shape.attention_width * shape.layers * plan.pairs
    layers = 2 * forward_layers + 2.0 * shape.trained_matrix * plan.computed
    attention = 3.5 * forward_attention
    if checkpointing:
        layers, attention = layers + forward_layers, attention + forward_attention
    products = 4 if shape.head_trained else 2
    return Flops(layers, attention, 2.0 * products * shape.hidden * shape.vocabulary * plan.answers)


def extrapolated(one: float, two: float, layers: int) -> float:
    """What a model of so many layers takes, which are all alike, from what one and two of them take."""
    return one + (two - one) * (layers - 1)


class SmallModel:
    """A few layers of a model with random weights, on which packs are measured; its vocabulary is small."""

    def __init__(self, folder: Path, config: RunConfig, precision: Precision, layers: int) -> None:
        self.layers = layers
        with random_state_kept():
            self.model = _empty(folder, config, precision, layers, precision.device)
        self.model.train()
        self._precision = precision

    def per_token(self, rows: Sequence[Row], packing: Packing) -> float:
        """Bytes that the backward pass keeps of a token."""
        with random_state_kept():
            head = self.model.get_output_embeddings()
            return activation_bytes(self.model, small_ids(rows), packing, 0, head)

    def peak(self, rows: Sequence[Row], pack: Pack, packing: Packing, checkpointing: bool) -> int:
        """Most bytes of tensors that are alive beside the weights, forward and backward, gradients included."""
        self.prepare(checkpointing)
        small = small_ids(rows)
        with random_state_kept(), peak_bytes() as peak:
            self.step(small, pack, packing)
        self.model.zero_grad(set_to_none=True)
        return peak[0]

    def prepare(self, checkpointing: bool) -> None:
        """Whether `step` recomputes activations."""
        if checkpointing:
            enable_checkpointing(self.model)

    def step(self, rows: Sequence[Row], pack: Pack, packing: Packing) -> float:
        """Seconds of a pack of rows in the small vocabulary (`small_ids`), forward and backward; gradients are summed."""
        import torch

        device = torch.device(self._precision.device)

        def work() -> None:
            batch = make_batch(rows, pack, packing, 0).to(device)
            with attention_for(self.model, packing):
                head = self.model.get_output_embeddings()
                answer_loss(self.model, head, batch.inputs, batch.index, batch.targets).backward()

        return seconds_of(work, device)


def seconds_of(work: Callable[[], object], device: Any) -> float:
    """How long it takes, to the end of what it leaves to the device (a `torch.device`)."""
    import torch

    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def small_ids(rows: Sequence[Row]) -> list[Row]:
    """The same rows in the small vocabulary."""
    return [
        Row(
            tuple(i % _VOCABULARY for i in row.ids),
            tuple(i % _VOCABULARY for i in row.answer),
            row.answer_start,
        )
        for row in rows
    ]


@contextlib.contextmanager
def peak_bytes() -> Iterator[list[int]]:
    """Counts the bytes of tensors made inside the `with` that are alive at once; yields a list whose first item is the most."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    most, live = [0], [0]
    known: weakref.WeakSet[Any] = weakref.WeakSet()

    def freed(size: int) -> None:
        live[0] -= size

    def note(tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if storage not in known:
            known.add(storage)
            live[0] += storage.nbytes()
            most[0] = max(most[0], live[0])
            weakref.finalize(storage, freed, storage.nbytes())

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    note(leaf)
            return result

    with Count():  # type: ignore[no-untyped-call]
        yield most


def output_layer_bytes(shape: ModelShape) -> int:
    """Logits of one chunk of positions, in fp32 and, for other types, in them."""
    return CHUNK * shape.vocabulary * (4 + (2 * shape.itemsize if shape.itemsize != 4 else 0))
