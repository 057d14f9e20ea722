"""labeltune: labelled text -> a fine-tuned classifier or entity extractor, every step in SwanLab.

The public names below are loaded when they are first used, so that `import labeltune` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labeltune.commands.compare import compare as compare
    from labeltune.commands.data import check_data as check_data
    from labeltune.commands.evaluate import evaluate as evaluate
    from labeltune.commands.plan import plan as plan
    from labeltune.commands.predict import predict as predict
    from labeltune.commands.train import train as train
    from labeltune.config import RunConfig as RunConfig
    from labeltune.config import load_config as load_config
    from labeltune.errors import LabeltuneError as LabeltuneError
    from labeltune.inference.load import load_predictor as load_predictor
    from labeltune.inference.predictor import Predictor as Predictor
    from labeltune.types import Entity as Entity
    from labeltune.types import Example as Example
    from labeltune.types import Prediction as Prediction

__version__ = "0.1.0"

_HOMES = {
    "Entity": "types",
    "Example": "types",
    "LabeltuneError": "errors",
    "Prediction": "types",
    "Predictor": "inference.predictor",
    "RunConfig": "config",
    "check_data": "commands.data",
    "compare": "commands.compare",
    "evaluate": "commands.evaluate",
    "load_config": "config",
    "load_predictor": "inference.load",
    "plan": "commands.plan",
    "predict": "commands.predict",
    "train": "commands.train",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'labeltune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"labeltune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
