"""Exports that the tools themselves made (see tests/exports/README.md) are read as their users meant them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labeltune.config import DataConfig, TaskName
from labeltune.data.columns import reading_of
from labeltune.data.sources import iter_records
from labeltune.io import progress

EXPORTS = Path(__file__).parent / "exports"


@pytest.fixture(autouse=True)
def _notes_are_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_noted", set())


def rows(name: str, task: TaskName | None, **data: Any) -> list[dict[str, Any]]:
    """The rows of an export; a fault is its problem."""
    config = DataConfig(**data)
    found = iter_records(EXPORTS / name, config.encoding, reading_of(config, task))
    return [record.values or {"problem": record.problem} for record in found]


def spans(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What entities name, where they stand."""
    for each in row["entities"]:
        assert row["text"][each["start_idx"] : each["end_idx"]] == each["entity_text"], each
    return [(each["entity_text"], each["entity_label"]) for each in row["entities"]]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_categories_of_doccano(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The column "source" is what was imported with the rows; a label holds CSV's joining sign.
    found = rows(f"doccano-categories.{suffix}", "multilabel")
    assert [row["labels"] for row in found] == [
        ["sports"],
        ["money"],
        ["money", "sports"],
        ["C# and .NET"],
        [],
    ]
    assert found[3]["text"] == "A line\nbreak, and a comma"
    single = rows(f"doccano-categories.{suffix}", "classification")
    assert [row.get("output") for row in single] == ["sports", "money", None, "C# and .NET"]
    assert "2 labels (money, sports)" in single[2]["problem"]
    assert "texts without a label (1)" in capsys.readouterr().err


def test_spans_of_doccano(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows("doccano-spans.jsonl", "ner", entities="nested")
    assert [spans(row) for row in found] == [
        [("Mara", "PER"), ("Oslo", "LOC")],
        [("李雷", "PER"), ("北京", "LOC")],
        [],
        [("Bank of Oslo", "PER"), ("Oslo", "LOC")],
    ]
    assert "left out: relations (1)" in capsys.readouterr().err


def test_intents_and_slots_of_doccano() -> None:
    assert [spans(row) for row in rows("doccano-slots.jsonl", "ner")] == [[("Oslo", "PLACE")], []]
    assert [row["output"] for row in rows("doccano-slots.jsonl", "classification")] == ["ask", "tell"]


@pytest.mark.parametrize(
    "name", ["label-studio-choices.json", "label-studio-choices-min.json", "label-studio-choices.csv"]
)
def test_choices_of_label_studio(name: str) -> None:
    found = rows(name, "classification")
    assert [row["output"] for row in found] == ["Space", "Agriculture", "Economy"]
    assert (
        found[0]["text"] == "A heat shield of carbon fibre survived 2,000 degrees in the plasma wind tunnel."
    )


@pytest.mark.parametrize(
    "name", ["label-studio-entities.json", "label-studio-entities-min.json", "label-studio-entities.csv"]
)
def test_labels_of_label_studio(name: str) -> None:
    """It counts characters: two emoji, one of five code points, stand before the second name."""
    first, second, _ = rows(name, "ner", entities="nested")
    assert first["text"] == "😀 Maria Lopez opened a shop in Madrid 👩‍👩‍👧 and Peter Smith one in Lisbon."
    # What the model said twice, once with the blank behind it, the annotator has kept.
    assert spans(first) == [("Maria Lopez", "person"), ("Maria Lopez ", "person"), ("Peter Smith", "person")]
    assert spans(second) == [("Starfish Aquarium", "organization"), ("Queensland", "city or country")]


def test_conll_of_label_studio() -> None:
    first, second, _ = rows("label-studio-entities.conll", "ner")
    assert spans(first) == [("Maria Lopez", "person"), ("Peter Smith", "person")]
    assert spans(second) == [("Starfish Aquarium", "organization"), ("Queensland", "city or country")]
