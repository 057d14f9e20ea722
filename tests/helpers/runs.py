"""Runs and predictors that were never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from helpers.rows import LABELS, classification_rows, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from labeltune.config import GenerationConfig, build_config
from labeltune.inference.predictor import Predictor
from labeltune.io.outputs import write_json
from labeltune.io.run_folder import RunInfo
from labeltune.models.lora import attach_adapter
from labeltune.prompts import make_task
from labeltune.prompts.template import ChatTemplate

NER_LABELS = ("地点", "地理实体")


def make_run(
    folder: Path, model: Path, task: str = "classification", seed: int = 0, prior: str = "none", **keys: Any
) -> Path:
    """A checkpoint with a random adapter, so that different ones answer differently.

    Args:
        keys: other sections of its config.
    """
    config = build_config(
        {
            "task": task,
            "model": str(model),
            "prompt": {"max_length": 512, **keys.pop("prompt", {})},
            "generation": {"max_new_tokens": 40},
            "calibrate": {"prior": prior},
            **keys,
        }
    )
    torch.manual_seed(seed)
    tuned = attach_adapter(AutoModelForCausalLM.from_pretrained(model), config.lora)
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)
    best = folder / "best"
    tuned.save_pretrained(str(best))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(str(best))
    labels = tuple(LABELS) if task == "classification" else NER_LABELS
    RunInfo.of(config, labels, tokenizer.chat_template).save(best)
    if task == "classification":
        rows = [{"id": str(i), "text": row["text"]} for i, row in enumerate(classification_rows(3))]
        (folder / "validation").mkdir()
        write_jsonl(folder / "validation" / "predictions.jsonl", rows)
    return folder


def run_without_weights(folder: Path, model: str = "pocket", **config: Any) -> Path:
    """A run folder with everything but weights: enough for what is checked before they are loaded."""
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    settings = build_config({"model": model, **config})
    RunInfo.of(settings, tuple(LABELS), "", {"test": settings.data.test}).save(checkpoint)
    write_json(checkpoint / "manifest.json", {"adapter_model.safetensors": "0"})
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def predictor_for(
    task: str = "classification", max_length: int = 512, seed: int = 0, **options: Any
) -> Predictor:
    tokenizer = make_tokenizer()
    labels = LABELS if task == "classification" else NER_LABELS
    config = build_config({"task": task, "prompt": {"max_length": max_length, **options.pop("prompt", {})}})
    return Predictor(
        make_model(len(tokenizer), seed=seed).eval(),
        make_task(config.task, labels, config.prompt),
        ChatTemplate(tokenizer),
        GenerationConfig(**options),
    )
