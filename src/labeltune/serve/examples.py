"""Requests to show in the documentation: they work as they stand, with the runs and labels of this server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labeltune.serve.models import Models, Served

#: Shown where a run has no validation rows beside it.
DOCUMENTS = {
    "classification": (
        "The probe sent its first pictures of the far side of the moon.",
        "The striker scored twice in the final minutes.",
    ),
    "ner": ("Mara left Oslo and joined the Red Cross in Geneva.", "他在南京大学学习。"),
}
_COUNT = 8
_LONGEST = 2000
_BYTES = 2**20


def documents(served: Served) -> list[str]:
    """A few of the run's validation rows, as its training wrote them; made-up ones where there are none."""
    file = validation_file(served.folder)
    found: list[str] = []
    if file is not None:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = _text(line) if len(line) < _BYTES else ""
                if text and text not in found:
                    found.append(text[:_LONGEST])
                if len(found) == _COUNT:
                    break
    return found or list(DOCUMENTS[served.task])


def validation_file(checkpoint: Path) -> Path | None:
    """`validation/predictions.jsonl` in the run folder of a checkpoint."""
    for folder in dict.fromkeys((checkpoint.absolute().parent, checkpoint.resolve().parent)):
        file = folder / "validation" / "predictions.jsonl"
        if file.is_file():
            return file
    return None


def _text(line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    text = row.get("text") if isinstance(row, dict) else None
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) and text.strip() else ""


def examples_for(models: Models) -> dict[str, Any]:
    """OpenAPI examples by route; empty ones for a task that no run does."""
    labeller, extractor = models.first("classification"), models.first("ner")
    classify: dict[str, Any] = {}
    extract: dict[str, Any] = {}
    chat: dict[str, Any] = {}
    if labeller is not None:
        one, two = (*documents(labeller), *DOCUMENTS["classification"])[:2]
        own = list(labeller.labels)[:8] or ["Space", "Sports"]
        classify["one text"] = {"value": {"text": one, **({} if labeller.labels else {"labels": own})}}
        classify["a list, labels of its own"] = {
            "value": {"text": [one, two], "labels": own, "top_k": 3, "min_confidence": 0.5}
        }
    if extractor is not None:
        one, two = (*documents(extractor), *DOCUMENTS["ner"])[:2]
        extract["one text"] = {"value": {"text": one}}
        extract["a list, one type"] = {"value": {"text": [one, two], "labels": list(extractor.labels)[:1]}}
    for served in models.served.values():
        if served.labels:
            message = {"role": "user", "content": documents(served)[0]}
            chat[served.name] = {"value": {"model": served.name, "messages": [message]}}
    return {"classify": _or_any(classify), "extract": _or_any(extract), "chat": _or_any(chat)}


def _or_any(examples: Mapping[str, Any]) -> dict[str, Any] | None:
    return dict(examples) or None
