"""Which number format a machine trains and predicts in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


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
    import torch

    if torch.cuda.is_available():
        device = "cuda"
        native = torch.cuda.get_device_capability()[0] >= 8
        name = ("bf16" if native else "fp16") if wanted == "auto" else wanted
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "fp32" if wanted == "auto" else wanted
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    weights = torch.float32 if full and name == "fp16" else dtypes[name]
    return Precision(name, weights, device)
