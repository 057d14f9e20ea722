"""Rows for benchmarks/train_speed.py: read, prompted and tokenized by labeltune, so that every variant gets the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labeltune.config import RunConfig, build_config
from labeltune.data.loading import load_splits
from labeltune.models.hub import load_tokenizer, resolve_model
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Example


def read_tokenizer(folder: str | None) -> Any:
    """The tokenizer of a folder; that of the pocket model when none is given."""
    return load_tokenizer(Path(folder) if folder else resolve_model("pocket", build_config({}).hub).folder)


def run_config(data: str, layout: str, max_length: int, labels: str | None) -> RunConfig:
    """The task is read off the first row: `entities` or `category`."""
    with Path(data).open(encoding="utf-8") as file:
        task = "ner" if "entities" in json.loads(file.readline()) else "classification"
    options: dict[str, Any] = {"train": data, "validation_fraction": 0, "on_error": "skip"}
    if labels:
        options["labels"] = labels.split(",")
    prompt = {"layout": layout, "max_length": max_length}
    return build_config({"task": task, "data": options, "prompt": prompt, "tracking": "none"})


def tokenized_rows(
    config: RunConfig, tokenizer: Any, count: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The first `count` usable rows as `input_ids`, `answer_start`, `answer_end`; and their mean lengths."""
    splits = load_splits(config.task, config.data, config.hub, 0)
    builder = PromptBuilder(make_task(config.task, splits.labels, config.prompt), ChatTemplate(tokenizer))
    rows = []
    for i in range(min(count, len(splits.train))):
        encoded = builder.training(Example.from_row(splits.train[i]))
        start, end = encoded.answer_span
        # What the template puts behind the end of turn is neither predicted nor needed; no variant gets it.
        rows.append(
            {
                "input_ids": encoded.ids[:end],
                "answer_start": start,
                "answer_end": end,
                "weight": 1.0,
                "others": [],
            }
        )
    if len(rows) < count:
        raise SystemExit(f"{config.data.train} has {len(rows)} usable rows, {count} are needed")
    tokens = sum(len(row["input_ids"]) for row in rows) / count
    answers = sum(row["answer_end"] - row["answer_start"] for row in rows) / count
    return rows, {"tokens": tokens, "answer_tokens": answers}
