"""Every kind of fault is found, at its place; what the audit counts, and how little memory it takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy
import pytest

from conftest import write_jsonl
from labeltune import recipes
from labeltune.config import ColumnsConfig, DataConfig, load_config
from labeltune.data.audit import Audit, add_duplicates, add_shared, audit_file, text_hash
from labeltune.data.loading import load_rows
from labeltune.data.schemas import FAULT_KINDS, parse_candidates, parse_record
from labeltune.data.sources import Record
from labeltune.types import Entity

NER_DATA = DataConfig.model_validate({"labels": ["地点", "地理实体"]})


def row(**changes: Any) -> dict[str, Any]:
    return {"text": "a text", "category": ["A", "B"], "output": "A", **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != name}


def ner(*entities: Any, text: str = "他在南京，南京") -> dict[str, Any]:
    return {"text": text, "entities": list(entities)}


def entity(
    start: int = 2, end: int = 4, text: str = "南京", label: str = "地点", **more: Any
) -> dict[str, Any]:
    return {"start_idx": start, "end_idx": end, "entity_text": text, "entity_label": label, **more}


#: kind, a row (or raw line) with that fault, a part of the message; the task follows from the row.
FAULTY: list[tuple[str, Any, str]] = [
    ("encoding", b"\xff\n", "not valid UTF-8"),
    ("unparsable_line", b"{\n", "not valid JSON"),
    ("missing_field", without("text"), "no column 'text'"),
    ("missing_field", without("output"), "no column 'output'; the row has ['category', 'text']"),
    ("missing_field", ner({"entity_text": "南京", "entity_label": "地点", "start_idx": 2}), "end_idx"),
    ("missing_field", ner({"start_idx": 2, "end_idx": 4, "entity_label": "地点"}), "entities[0].entity_text"),
    ("empty_field", row(text=" \n"), "text is empty"),
    ("empty_field", row(text="\u200b\u200c\ufeff \x00"), "cannot be seen"),
    ("empty_field", row(text=None), "text is null"),
    ("empty_field", row(output=""), "output is empty"),
    ("empty_field", row(category=[]), "empty list"),
    ("empty_field", row(category=["A", " "]), "empty label"),
    ("empty_field", row(category="A,,B"), "empty label"),
    ("empty_field", {"text": "a", "entities": None}, "write [] for a text without entities"),
    ("empty_field", ner(entity(label=" ")), "entity_label is empty"),
    ("wrong_type", row(text=7), "must be a string, not int"),
    ("wrong_type", row(text="half \ud83d"), "half a surrogate pair at character 5"),
    ("wrong_type", row(id="\ud83d"), "id holds half a surrogate pair"),
    ("wrong_type", row(category=["A", "\ud83d"]), "half a surrogate pair"),
    ("wrong_type", row(category={"A": 1}), "list of strings"),
    ("wrong_type", row(category=["A", 1]), "list of strings"),
    ("wrong_type", row(output=["A"]), "must be a string, not list"),
    ("wrong_type", {"text": "a", "entities": "南京"}, "JSON list"),
    ("wrong_type", {"text": "a", "entities": ["南京"]}, "list of objects"),
    ("wrong_type", ner(entity(start="2")), "must be an integer, not str"),  # type: ignore[arg-type]
    ("wrong_type", ner(entity(start=True)), "must be an integer, not bool"),
    ("wrong_type", ner(entity(start=2.0)), "must be an integer, not float"),  # type: ignore[arg-type]
    ("wrong_type", ner(entity(text=5)), "must be a string, not int"),  # type: ignore[arg-type]
    ("wrong_type", ner(entity(label="\ud83d")), "half a surrogate pair"),
    ("output_not_in_candidates", row(output="C"), "'C' is not in ['A', 'B']"),
    ("duplicate_candidate", row(category=["A", "B", "A "]), "'A' more than once"),
    ("unknown_label", ner(entity(label="LOC", entity_names=["地址"])), "['地址']"),
    ("unknown_label", ner(entity(label="LOC", entity_names=7)), "neither 'LOC'"),
    ("span_mismatch", ner(entity(3, 5)), "text[3:5] is '京，', not '南京'"),
    ("span_mismatch", ner(entity(-2, 7)), "text[-2:7]"),
    ("entity_not_in_text", ner(entity(text="北京")), "'北京' does not occur in the text"),
    ("overlapping_entities", ner(entity(), entity(3, 5, "京，")), "'南京' at 2:4 and '京，' at 3:5"),
    ("duplicate_entity", ner(entity(), entity(label="地理实体")), "'南京' at 2:4 stands twice"),
]


def audited(path: Path, content: Any, labels_known: bool) -> Audit:
    """The audit of one faulty row behind a fine one."""
    if isinstance(content, dict) and "entities" in content:
        task, data, fine = "ner", NER_DATA if labels_known else None, ner(entity(), text="他在南京")
    else:
        task, data, fine = "classification", None, row(text="fine")
    raw = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
    path.write_bytes(json.dumps(fine).encode() + b"\n" + raw)
    return load_rows(str(path), task, data).audit  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "content", "part"), FAULTY)
def test_faults_are_found_at_their_place(kind: str, content: Any, part: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    audit = audited(path, content, labels_known=kind == "unknown_label")
    found = [fault for fault in audit.faults if fault.kind == kind]
    assert len(found) == 1, audit.faults
    assert part in found[0].message
    assert found[0].where == f"{path}:2"
    assert str(found[0]).startswith(f"{path}:2: {FAULT_KINDS[kind][0]}: {kind}: ")
    assert (audit.rows, audit.usable) == (2, 1)
    assert audit.errors == len(audit.faults) and audit.warnings == 0


def test_labels_outside_the_label_set(tmp_path: Path) -> None:
    rows = [{"text": "a", "output": "X"}, {"text": "b", "output": "A"}, row(text="own candidates")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    audit = audit_file(path, "classification", DataConfig.model_validate({"labels": ["A"]}))
    assert [(fault.kind, fault.where) for fault in audit.faults] == [("unknown_label", f"{path}:1")]


def test_rows_without_candidates_among_rows_with(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row(), {"text": "b", "output": "A"}])
    (fault,) = audit_file(path, "classification").faults
    assert fault.kind == "missing_field" and fault.where == f"{path}:2" and "1 of 2 rows" in fault.message


def numbered(audit: Audit) -> Any:
    return lambda number: f"{audit.path.name}:{number + 1}"


def test_duplicates_and_shared_rows(tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl", [row(text="a"), row(text="b"), row(text="a"), row(text="a", output="B")]
    )
    test = write_jsonl(tmp_path / "test.jsonl", [row(text="new"), row(text="b"), row(text="a", output="B")])
    audit, other = audit_file(train, "classification"), audit_file(test, "classification")
    assert add_duplicates(audit, numbered(audit)).tolist() == [2]
    assert [(fault.kind, fault.where) for fault in audit.faults] == [
        ("exact_duplicate", "train.jsonl:3"),
        ("conflicting_duplicate", "train.jsonl:4"),
    ]
    assert all("train.jsonl:1" in fault.message for fault in audit.faults)
    assert (audit.errors, audit.warnings) == (0, 2)
    assert add_shared(audit, other, numbered(other)) == [1, 2]
    assert [(fault.kind, fault.where) for fault in other.faults] == [
        ("shared_with_train", "test.jsonl:2"),
        ("shared_with_train", "test.jsonl:3"),
    ]
    assert other.errors == 2
    tested = {kind for kind, *_ in FAULTY} | set(audit.counts) | set(other.counts)
    assert tested == set(FAULT_KINDS)


def test_candidates_tell_no_rows_apart_and_entities_do(tmp_path: Path) -> None:
    rows = [row(), row(category=["B", "A"])]
    audit = audit_file(write_jsonl(tmp_path / "a.jsonl", rows), "classification")
    assert len(add_duplicates(audit, numbered(audit))) == 1
    rows = [ner(entity()), ner(entity(), entity(5, 7))]
    audit = audit_file(write_jsonl(tmp_path / "b.jsonl", rows), "ner")
    assert len(add_duplicates(audit, numbered(audit))) == 0 and audit.counts["conflicting_duplicate"] == 1
    assert audit.repeated_mentions == 1


def test_mentions_are_counted_over_all_readable_rows(tmp_path: Path) -> None:
    """Wrong spans make a row unusable; what it names can be read all the same."""
    repeats = [entity(), entity(5, 7)]
    rows: list[dict[str, Any]] = [
        ner(*repeats),
        ner(entity(3, 5), entity(5, 7)),  # a span that does not match
        ner(entity(), entity(5, 7, label="GPE"), entity(1, 9, label="GPE")),
        {**ner(), "id": "\ud83d"},
        ner(),
        ner(*repeats, text=" "),  # from here on unreadable: no text, no list, no pair
        {"text": "他在南京", "entities": "南京"},
        ner(*repeats, {"entity_label": "地点"}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    audit = audit_file(path, "ner")
    assert (audit.rows, audit.usable) == (9, 2)
    assert (audit.repeated_mentions, audit.without_entities) == (3, 2)
    assert audit.to_dict()["rows_with_repeated_mentions"] == 3


def test_line_numbers_skip_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", json.dumps(row()), "{", "", json.dumps(row())]))
    (checked,) = recipes.check_data(load_config(None), str(path))
    assert [(f.kind, f.where) for f in checked.audit.faults] == [
        ("unparsable_line", f"{path}:3"),
        ("exact_duplicate", f"{path}:5"),
    ]


@pytest.mark.parametrize(
    "category",
    [["军事", "航天"], "['军事', '航天']", '["军事", "航天"]', "军事,航天", "军事， 航天", "军事、航天"],
)
def test_the_shapes_of_category(category: Any) -> None:
    values = {"text": "t", "category": category, "output": " 航天 "}
    example, faults = parse_record(Record("f:1", values), 0, "classification", ColumnsConfig())
    assert not faults and example is not None
    assert example.candidates == ("军事", "航天") and example.label == "航天"
    assert example.text == "t" and example.id == "0" and example.source == "f:1"


@pytest.mark.parametrize("value", ["a]", "[a", "__import__('os')", ""])
def test_odd_categories_are_read_as_plain_text(value: str) -> None:
    assert all(isinstance(label, str) for label in parse_candidates(value))


def test_entity_names_are_mapped_to_the_configured_names() -> None:
    names = ["地缘政治实体", "政治实体", "地理实体", "社会实体"]
    values = ner(entity(5, 7, label="GPE", entity_names=names), entity(), text="他在南京，南京")
    example, faults = parse_record(Record("f:1", values), 4, "ner", ColumnsConfig(), NER_DATA.labels)
    assert not faults and example is not None
    assert example.entities == (Entity("南京", "地点", 2, 4), Entity("南京", "地理实体", 5, 7))
    example, _ = parse_record(Record("f:1", values), 4, "ner", ColumnsConfig(), None)
    assert example is not None and example.entities is not None
    assert [found.label for found in example.entities] == ["地点", "GPE"]


def test_entities_may_be_a_json_string(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cell = json.dumps([entity()], ensure_ascii=False).replace('"', '""')
    path.write_text(f'text,entities\n他在南京,"{cell}"\n没有,[]\n', encoding="utf-8")
    rows = load_rows(str(path), "ner")
    assert rows.example(0).entities == (Entity("南京", "地点", 2, 4),)
    assert rows.example(1).entities == () and rows.audit.without_entities == 1


def test_answers_may_be_missing_in_prediction_only() -> None:
    for task in ("classification", "ner"):
        record = Record("f:1", {"text": "t"})
        assert parse_record(record, 0, task, ColumnsConfig())[0] is None  # type: ignore[arg-type]
        example, _ = parse_record(record, 0, task, ColumnsConfig(), None, False)  # type: ignore[arg-type]
        assert example is not None and example.label is None and example.entities is None


def test_balance_and_lengths(tmp_path: Path) -> None:
    lengths = list(range(1, 101))
    rows = [row(text="x" * n, output="A" if n <= 75 else "B", category=["A", "B", "C"]) for n in lengths]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    audit = audit_file(path, "classification")
    assert audit.labels == {"A": 75, "B": 25} and audit.label_set() == ("A", "B", "C")
    expected = {f"p{q}": int(numpy.percentile(lengths, q)) for q in (10, 50, 90, 99)}
    assert audit.length_percentiles() == {**expected, "max": 100}
    in_tokens = audit_file(path, "classification", token_counts=lambda texts: [2 * len(t) for t in texts])
    assert in_tokens.length_percentiles()["max"] == 200 and in_tokens.length_unit == "tokens"
    assert json.loads(json.dumps(audit.to_dict()))["labels"] == {"A": 75, "B": 25}
    # No tokenizer takes an empty list: not behind a thousand rows, and not for none.
    for count in (0, 1000):
        path = write_jsonl(tmp_path / "many.jsonl", [row(text=f"row {n}") for n in range(count)])
        audit_file(path, "classification", token_counts=lambda texts: [len(texts[0])] * len(texts))
    empty = Audit(path, "ner")
    assert empty.length_percentiles() == {} and empty.label_set() == ()


def test_hashes_are_the_same_everywhere() -> None:
    assert text_hash("南京") == 0x7F7F93BBA29F2434


def test_an_audit_takes_at_most_64_bytes_a_row(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "rows.jsonl", "classification")
    held = (audit.text_hashes, audit.answer_hashes, audit.lengths)
    assert sum(column.itemsize for column in held) <= 64

    def growth(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        line = '{"text": "row %d ' + "long text " * 20 + '", "output": "%s"}\n'
        path.write_text("".join(line % (i, "ABC"[i % 3]) for i in range(count)))
        before = tracemalloc.get_traced_memory()[0]
        rows = load_rows(str(path), "classification", folder=tmp_path)
        held = tracemalloc.get_traced_memory()[0] - before
        assert rows.audit.usable == len(rows.dataset) == count
        return held

    load_rows(str(write_jsonl(tmp_path / "warm.jsonl", [row()])), "classification")
    tracemalloc.start()
    try:
        small, large = growth(2_000), growth(32_000)
    finally:
        tracemalloc.stop()
    assert large - small <= 64 * 30_000
