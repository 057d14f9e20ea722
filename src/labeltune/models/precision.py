"""Which number format a machine trains and predicts in, and what tells a wrong result from rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch

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


def pick_precision(
    wanted: Literal["auto", "bf16", "fp16", "fp32"] = "auto", *, full: bool = False
) -> Precision:
    """bf16 on GPUs that compute in it, else fp16 on a GPU, fp32 on the CPU; `wanted` overrides.

    Args:
        full: all weights are trained; they are then kept in fp32 under fp16 computation.
    """
    if torch.cuda.is_available():
        device = "cuda"
        name = ("bf16" if has_bf16() else "fp16") if wanted == "auto" else wanted
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "fp32" if wanted == "auto" else wanted
    weights = torch.float32 if full and name == "fp16" else DTYPES[name]
    return Precision(name, weights, device)


def has_bf16(gpu: int | None = None) -> bool:
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


@contextlib.contextmanager
def weights_in(
    model: PreTrainedModel, dtype: torch.dtype, everywhere: Callable[[bool], bool] = bool
) -> Iterator[bool]:
    """Inside the `with` a model's weights and buffers are in a wider number format, if it says True.

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
    tensors = [t for t in [*parameters, *model.buffers()] if t.is_floating_point()] if possible else []
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
