"""What a run keeps of its validation rows: the rows to verify an export with, and the figures for its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labeltune.commands.evaluation import describe_run, labelled_rows
from labeltune.errors import DataError
from labeltune.io.run_folder import RunInfo
from labeltune.types import Example


def _validation(checkpoint: Path) -> Path:
    return checkpoint.parent / "validation"


def rows_to_verify(
    checkpoint: Path, info: RunInfo, data: str | None, max_rows: int | None, say: Callable[[str], None]
) -> list[Example]:
    """Rows of a file, else the run's validation rows, else none, which is said."""
    if data is not None:
        found = labelled_rows(describe_run(checkpoint), data, "stop", max_rows)
        return [found.example(i) for i in range(len(found.dataset))]
    file = _validation(checkpoint) / "predictions.jsonl"
    if not file.is_file():
        say(
            "warning: nothing is verified: a run keeps its validation rows when it ends, and this one has none; name some with --verify FILE"
        )
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return [_example(json.loads(line), info) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}); verify with --verify FILE"
        ) from error


def _example(row: dict[str, Any], info: RunInfo) -> Example:
    """A row of `predictions.jsonl`. Its candidates stand there by probability: they come back in the run's order."""
    found = [entry["label"] for entry in row.get("ranking", ())]
    order = {label: number for number, label in enumerate(info.labels)}
    candidates = sorted(found, key=lambda label: (order.get(label, len(order)), label))
    return Example(str(row["id"]), row["text"], tuple(candidates), source=str(row.get("source", "")))


def validation_metrics(checkpoint: Path) -> dict[str, Any] | None:
    """The run's figures on its validation rows, if this is the checkpoint they were measured with."""
    best = checkpoint.parent / "best"
    file = _validation(checkpoint) / "metrics.json"
    if not file.is_file() or best.resolve() != checkpoint.resolve():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
