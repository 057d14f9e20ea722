"""Which number format a machine trains and predicts in, and what tells a wrong result from rounding."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch
from packaging.version import Version

from labeltune.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: How far a row's logits may move in fp32 with the tokens of another row, as a part of the largest: experts are computed in shapes that
#: follow the tokens.
FELT = 1e-5
#: Number formats by our names for them.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Precision:
    """The device, and the format of weights and computation.

    Attributes:
        name: `bf16`, `fp16` (with a loss scaler in training) or `fp32`.
        weights: torch dtype of the frozen base model.
        device: `cuda`, `mps` or `cpu`.
    """

    name: Literal["bf16", "fp16", "fp32"]
    weights: Any
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The format of computation, in which checkpoints are loaded too."""
        return DTYPES[self.name]

    def mixed(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, as a training step is computed in; nothing in fp32."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


def pick_precision(
    wanted: Literal["auto", "bf16", "fp16", "fp32"] = "auto", *, full: bool = False, device: str | None = None
) -> Precision:
    """bf16 on GPUs that compute in it, else fp16 on a GPU, fp32 elsewhere; `wanted` overrides.

    Args:
        full: all weights are trained; they are then kept in fp32, as bf16 would lose updates of less than half of one of its steps.
        device: the best there is when None.
    """
    if device is None:
        found = (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        device = next((name for name, there in found if there), "cpu")
    name = wanted
    if name == "auto":
        cuda = torch.device(device).type == "cuda"
        native = cuda and has_bf16(device)
        name = "bf16" if native else "fp16" if cuda else "fp32"
    return Precision(name, torch.float32 if full else DTYPES[name], device)


def has_bf16(gpu: int | str | None = None) -> bool:
    """Whether a CUDA GPU, the current one when None, computes in bf16."""
    return torch.cuda.get_device_capability(gpu)[0] >= 8


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on the CPU within the limit of the control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or no limit ("max")
    return max(free, 0)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most a GPU held so far, or what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """What PyTorch draws next: on the CPU, and on a GPU, where dropout draws."""
    there = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return torch.get_rng_state(), *there


def set_random_state(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    """Draw the same again."""
    torch.set_rng_state(state[0])
    for there in state[1:]:
        torch.cuda.set_rng_state(there, device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; on CUDA without waiting until it is there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fp32_product(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`states @ weight.T` in fp32, for operands in bf16 or fp16 without rounding to that: on CUDA, since PyTorch 2.8; else rounded.

    bf16 has steps of 0.06 at logits of 8 and more. No gradients.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    if half and states.device.type == "cuda" and _MIXED_PRODUCTS:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        return (states @ weight.t()).float()


_MIXED_PRODUCTS = Version(torch.__version__).release >= (2, 8)


@contextlib.contextmanager
def replaced_forward(
    module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Give a module another `forward`; hooks around it run as before."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def fp32_logits(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Inside the `with` a model's linear output layer in bf16 or fp16 gives logits in fp32 on CUDA. No gradients."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or "forward" in vars(head) or head.weight.device.type != "cuda":
        return contextlib.nullcontext()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits = fp32_product(hidden.flatten(0, -2).to(head.weight.dtype), head.weight)
        logits = logits if head.bias is None else logits + head.bias
        return logits.view(*hidden.shape[:-1], -1)

    return replaced_forward(head, forward)


@contextlib.contextmanager
def weights_in(
    model: PreTrainedModel, dtype: torch.dtype, everywhere: Callable[[bool], bool] = bool
) -> Iterator[bool]:
    """Inside the `with` a model's weights and buffers are in another number format, if it says True.

    A narrower one is that of a checkpoint loaded in it: buffers, and layers that the model keeps in fp32, stay as they are.

    It says False, and changes nothing, where weights are quantized, spread over processes, or would not fit into memory.

    Args:
        everywhere: makes one verdict of those of several processes.
    """
    parameters = list(model.parameters())
    needed = dtype.itemsize * sum(p.numel() for p in parameters if p.dtype != dtype)
    quantized = any(not p.is_floating_point() for p in parameters)
    possible = everywhere(
        not quantized and not is_sharded(model) and needed < 0.8 * free_memory(parameters[0].device)
    )
    tensors = [t for t in [*parameters, *model.buffers()] if t.is_floating_point()]
    if dtype.itemsize < 4:
        names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        tensors = [
            p for name, p in model.named_parameters() if not any(re.search(each, name) for each in names)
        ]
    if not possible:
        tensors = []
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        yield possible
    finally:
        for tensor, data in kept:
            tensor.data = data


def has_experts(model: PreTrainedModel) -> bool:
    """Whether some weights are stacked matrices, of which tokens choose: the shapes of the products then follow the tokens."""
    kept = (m for m in model.modules() if not isinstance(m, torch.nn.modules.conv._ConvNd))
    return any(p.dim() == 3 for module in kept for p in module.parameters(recurse=False))


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of some items, evenly spread: the first, the last and some between them."""
    count = min(count, len(items))
    return [items[at * (len(items) - 1) // max(1, count - 1)] for at in range(count)]


def passes(items: Sequence[Item], fits: Callable[[Sequence[Item]], bool]) -> Iterator[list[Item]]:
    """The items in their order, cut into parts that fit; one that does not fit by itself is a part too."""
    part: list[Item] = []
    for item in items:
        if part and not fits([*part, item]):
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def other_tokens(tokens: Sequence[int]) -> list[int]:
    """As many tokens, each another one than before: what is put into one row to see whether another row changes."""
    return [tokens[at - 1] if tokens[at - 1] != token else int(token == 0) for at, token in enumerate(tokens)]


def moved_by(
    what: str, before: torch.Tensor, again: torch.Tensor, after: torch.Tensor, slack: float = 0.0
) -> str | None:
    """In words, how far other tokens in `what` moved these logits; None where it is no more than computing `before` again did.

    Args:
        slack: movement that is allowed besides, as a part of the largest logit.
    """
    moved = (after - before).abs().max()
    # NaN counts as moved.
    if moved <= (again - before).abs().max() + slack * before.abs().max():
        return None
    return f"logits change by {float(moved):.1e} with the tokens of another {what}"
