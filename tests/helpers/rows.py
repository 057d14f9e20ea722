"""Rows that a two-layer model can learn, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labeltune.types import Example, Prediction

LABELS = ["Sports", "Space", "Art"]


def classification_rows(count: int) -> list[dict[str, Any]]:
    """Rows that a two-layer model can learn: the first word tells the label."""
    words = {"Sports": "match", "Space": "rocket", "Art": "paint"}
    rows = []
    for index in range(count):
        label = LABELS[index % 3]
        rows.append(
            {"text": f"{words[label]} number {index} {words[label]}", "category": LABELS, "output": label}
        )
    return rows


def ner_rows(count: int) -> list[dict[str, Any]]:
    """Rows with one entity each, every third with none."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        if index % 3 == 2:
            rows.append({"text": f"今天下雨 {index}", "entities": []})
            continue
        text = f"他在南京 {index}"
        entity = {"start_idx": 2, "end_idx": 4, "entity_text": "南京", "entity_label": "GPE"}
        rows.append({"text": text, "entities": [{**entity, "entity_names": ["地缘政治实体", "地理实体"]}]})
    return rows


def answered_rows(
    pairs: list[tuple[str, str | None]], labels: str = "ABCD"
) -> tuple[list[Example], list[Prediction]]:
    """Examples and predictions from (right label, answer) pairs; an answer of None is off the list. Texts grow longer."""
    examples = [Example(str(i), "t" * (i + 1), tuple(labels), label) for i, (label, _) in enumerate(pairs)]
    predictions = [
        Prediction(str(i), p or "?", label=p, parsed=p is not None) for i, (_, p) in enumerate(pairs)
    ]
    return examples, predictions


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def joined(folder: Path) -> bytes:
    return b"".join(part.read_bytes() for part in parts(folder))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
