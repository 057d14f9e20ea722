"""The config that most trainings here begin with, and the weights that they end with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from helpers.rows import classification_rows, ner_rows, write_jsonl
from labeltune.config import RunConfig, build_config


def config_for(folder: Path, model: Path, task: str = "classification", **training: Any) -> RunConfig:
    rows = classification_rows(48) if task == "classification" else ner_rows(48)
    data: dict[str, Any] = {"train": str(write_jsonl(folder / f"{task}.jsonl", rows))}
    if task == "ner":
        data["labels"] = ["地点", "人名", "地理实体", "组织"]
    options = {
        "epochs": 1,
        "batch_size": 8,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **training,
    }
    return build_config(
        {
            "task": task,
            "model": str(model),
            "output_dir": str(folder / "out"),
            "tracking": "none",
            "data": data,
            "prompt": {"max_length": 512},
            "lora": {"dropout": 0.1},
            "training": options,
            "generation": {"max_new_tokens": 48},
        }
    )


def without_dropout(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.0})})


def adapter_weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    one, two = adapter_weights(first), adapter_weights(second)
    return set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def logged(checkpoint: Path, name: str) -> list[dict[str, Any]]:
    """The lines of Trainer's log, up to a checkpoint, that hold a figure of this name."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return [line for line in state["log_history"] if name in line]
