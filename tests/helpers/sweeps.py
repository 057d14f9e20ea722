"""The config that sweeps here begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.rows import classification_rows, write_jsonl
from labeltune.config import RunConfig, build_config


def config_for(folder: Path, model: str | Path = "files", **sections: Any) -> RunConfig:
    """`files` passes for the folder of a model until it is loaded."""
    (folder / "files").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / "files" / name).touch()
    data = write_jsonl(folder / "train.jsonl", classification_rows(24))
    return build_config(
        {
            "model": str(model),
            "output_dir": "out",
            "tracking": "none",
            "data": {"train": data.name, "validation_fraction": 0.25},
            "training": {"max_steps": 2, "batch_size": 8, "logging_steps": 1},
            "eval": {"metric": "loss"},  # two steps do not change macro-F1
            **sections,
        }
    )
