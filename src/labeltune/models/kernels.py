"""Packages with GPU kernels that transformers takes for layers of hybrid models where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Package as it is imported -> as it is installed.
PACKAGES = {
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
    "mamba_ssm": "mamba-ssm",
}
#: A function beside the layers, in transformers' modelling file, that stands in where a package is missing -> the package.
_STAND_INS = {
    "causal_conv1d_fn": "causal_conv1d",
    "torch_chunk_gated_delta_rule": "fla",
    "chunk_kimi_delta_attention": "fla",
    "mamba2_chunk_scan": "mamba_ssm",
    "mamba_selective_scan": "mamba_ssm",
}


def not_installed(wanted: set[str]) -> list[str]:
    """Of these packages (as they are imported), those that are missing, as they are installed."""
    return sorted(PACKAGES[package] for package in wanted if importlib.util.find_spec(package) is None)


def missing_kernels(model: torch.nn.Module) -> list[str]:
    """Missing packages whose kernels would compute layers of this model; without them PyTorch computes the same, much slower."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    return not_installed(
        {package for file in files for name, package in _STAND_INS.items() if hasattr(file, name)}
    )
