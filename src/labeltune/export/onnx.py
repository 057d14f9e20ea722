"""For ONNX Runtime: a merged model through optimum-onnx, which lives in an environment of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeltune.errors import ConfigError, ModelError, first_line

ONNX_FOLDER = "onnx"


def exporter() -> Any:
    """`optimum.exporters.onnx.main_export`.

    Raises:
        ConfigError: it is not installed, or does not work with the installed transformers.
    """
    try:
        return importlib.import_module("optimum.exporters.onnx").main_export
    except Exception as error:
        raise ConfigError(
            f"--onnx needs a working optimum-onnx ({first_line(error)}). Where it does not install beside this transformers, "
            "export with --merged and convert in an environment of its own: pip install optimum-onnx && "
            f"optimum-cli export onnx --model EXPORTED --task text-generation-with-past EXPORTED/{ONNX_FOLDER}"
        ) from error


def write_onnx(export: Callable[..., None], folder: Path) -> None:
    """Write `onnx/` into a folder with a merged model.

    Args:
        export: what `exporter` gave.

    Raises:
        ModelError: the architecture is not supported, or the conversion fails.
    """
    try:
        export(str(folder), output=str(folder / ONNX_FOLDER), task="text-generation-with-past", device="cpu")
    except Exception as error:
        raise ModelError(f"optimum could not write the model as ONNX ({first_line(error)})") from error
