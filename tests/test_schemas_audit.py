"""Every kind of fault is found, at its place; what the audit counts, and how little memory it takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest

import labeltune
from helpers.rows import write_jsonl
from labeltune.commands.preparing import first_rows, guess_task
from labeltune.config import ColumnsConfig, DataConfig, load_config
from labeltune.data.check import Audit, add_duplicates, add_shared, audit_file, text_hash
from labeltune.data.labels import parse_candidates
from labeltune.data.loading import load_rows
from labeltune.data.records import Record
from labeltune.data.schemas import FAULT_KINDS, parse_record
from labeltune.errors import DataError
from labeltune.io import progress
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
    ("wrong_type", row(output=True), "must be a string, not bool"),
    ("wrong_type", row(output=1), "must be a string, not int; integers are read as labels where all rows"),
    ("wrong_type", row(output=["A", "B"]), "rows with several labels are those of task=multilabel"),
    ("wrong_type", row(output=[[0, 2, "A"]]), "a list of [start, end, type], as doccano writes it"),
    ("wrong_type", row(category="['A' 'B']"), "has no comma between 'A' and 'B'"),
    ("wrong_type", row(category="['A', 'C' 'B']"), "has no comma between 'C' and 'B'"),
    ("wrong_type", row(category='["A"\n"B"]'), 'has no comma between "A" and "B"'),
    ("wrong_type", row(category="array(['A', 'B'], dtype=object)"), "holds a list in brackets and more"),
    ("output_not_in_candidates", row(output="a"), "it differs from 'A' only in case, width, blanks"),
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
    ("soft_label", row(output={"A": 0.5}), "output is no soft label: the shares sum to 0.5"),
    ("duplicate_candidate", row(category=["A", "B", "A "]), "'A' more than once"),
    ("unknown_label", ner(entity(label="LOC", entity_names=["地址"])), "['地址']"),
    ("unknown_label", ner(entity(label="LOC", entity_names=7)), "neither 'LOC'"),
    ("span_mismatch", ner(entity(3, 5)), "text[3:5] is '京，', not '南京'"),
    ("span_mismatch", ner(entity(-2, 7)), "text[-2:7]"),
    ("span_mismatch", ner(entity(5, 8)), "text[5:8] is not in the text, which has 7 characters"),
    ("span_mismatch", ner(entity(5, -1)), "text[5:-1] is not in the text"),
    ("span_mismatch", ner(entity(4, 2)), "text[4:2]"),
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


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("sport", "'sport' is not among data.labels; did you mean 'Sport'?"),
        ("Sprot", "'Sprot' is not among data.labels; did you mean 'Sport'?"),
        ("Ｓport\u3164\ufe0f", "'Ｓport\\u3164\ufe0f' is not among data.labels; did you mean 'Sport'?"),
        ("Zoo", "'Zoo' is not among data.labels (Sport, Farm)"),
    ],
)
def test_the_label_that_was_probably_meant_is_named(tmp_path: Path, label: str, said: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "output": label}])
    labels = DataConfig.model_validate({"labels": ["Sport", "Farm"]})
    (fault,) = audit_file(path, "classification", labels).faults
    assert fault.message.replace("\u3164", "\\u3164") == said
    rows = [ner(entity(label=label, entity_names=["B"]))]
    path = write_jsonl(tmp_path / "entities.jsonl", rows)
    (fault,) = audit_file(path, "ner", labels).faults
    assert fault.message.endswith("is in data.labels" + said.partition("among data.labels")[2])


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
    # These are about the whole file, or a config; each has a test of its own.
    tested |= {
        "no_rows",
        "label_twins",
        "misspelt_label",
        "integer_labels",
        "entity_blanks",
        "too_long",
        "one_label",
        "wrong_task",
        "duplicate_label",
    }
    assert tested == set(FAULT_KINDS)


def test_duplicates_are_listed_in_the_order_of_the_rows(tmp_path: Path) -> None:
    texts = [*"abcdefgh", *"hgfedcba"]
    audit = audit_file(write_jsonl(tmp_path / "a.jsonl", [row(text=t) for t in texts]), "classification")
    assert add_duplicates(audit, numbered(audit)).tolist() == [*range(8, 16)]
    assert [fault.where for fault in audit.faults] == [f"a.jsonl:{n}" for n in range(9, 17)]


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
    (checked,) = labeltune.check_data(load_config(None), str(path))
    assert [(f.kind, f.where) for f in checked.audit.faults] == [
        ("unparsable_line", f"{path}:3"),
        ("exact_duplicate", f"{path}:5"),
    ]


#: text, the wrong offsets of "Oslo" (or the entity given), and what the message says.
OFFSETS: list[tuple[str, tuple[int, int], str, str]] = [
    (
        "Mara left Oslo.",
        (10, 13),
        "Oslo",
        "the end is inclusive, and must be exclusive (one more); it stands at 10:14",
    ),
    (
        "Mara left Oslo.",
        (11, 15),
        "Oslo",
        "the offsets count from 1, and must count from 0; it stands at 10:14",
    ),
    ("Mara left Oslo.", (11, 14), "Oslo", "count from 1 with an inclusive end; it stands at 10:14"),
    ("😀😀 left Oslo.", (10, 14), "Oslo", "count UTF-16 units, and must count characters; it stands at 8:12"),
    (
        "Öl, Ägypten Oslo.",
        (14, 18),
        "Oslo",
        "count UTF-8 bytes, and must count characters; it stands at 12:16",
    ),
    ("我在南京工作", (6, 12), "南京", "count UTF-8 bytes, and must count characters; it stands at 2:4"),
    ("a\r\nb\r\nOslo", (4, 8), "Oslo", "CRLF counts as one character, and is two; it stands at 6:10"),
    ("a\nb\nOslo", (6, 10), "Oslo", "counts as two characters (CRLF), and is one here; it stands at 4:8"),
    (
        "  Mara left Oslo",
        (10, 14),
        "Oslo",
        "blanks at the beginning of the text do not count, and must; it stands at 12:16",
    ),
    (
        "Mara   left  Oslo",
        (10, 14),
        "Oslo",
        "several blanks count as one, and must each count; it stands at 13:17",
    ),
    ("Zu\u0308ri Oslo", (5, 9), "Oslo", "characters of another Unicode form (NFC); it stands at 6:10"),
    ("Mara left Oslo .", (9, 14), "Oslo", "the two differ in blanks at their ends; without them it is 10:14"),
    (
        "Mara left Oslo.",
        (10, 14),
        "Oslo ",
        "the two differ in blanks at their ends; without them it is 10:14",
    ),
    ("Mara left Oslo.", (10, 14), "OSLO", "the two differ only in case"),
    ("Mara left Ｏslo.", (10, 14), "Oslo", "the two differ only in width or Unicode form (NFKC)"),
    ("Mara left Oslo.", (10, 40), "Oslo", "the end is wrong: start + 4 characters; it stands at 10:14"),
    ("Mara left Oslo.", (2, 14), "Oslo", "the start is wrong: end - 4 characters; it stands at 10:14"),
    (
        "Oslo, Mara left Oslo.",
        (13, 17),
        "Oslo",
        "both offsets are 3 too small: the nearest 'Oslo' stands at 16:20",
    ),
    ("Mara left Oslo", (10, 15), "Oslo", "the end is wrong: start + 4 characters; it stands at 10:14"),
    ("Mara left Oslo.", (3, 5), "Oslo", "the nearest 'Oslo' stands at 10:14"),
]


@pytest.mark.parametrize(("text", "offsets", "name", "part"), OFFSETS)
def test_why_offsets_are_wrong_is_said(text: str, offsets: tuple[int, int], name: str, part: str) -> None:
    values = ner(entity(*offsets, name), text=text)
    example, faults = parse_record(Record("f:1", values), 0, "ner", ColumnsConfig())
    assert example is None
    assert [fault.kind for fault in faults if fault.kind != "entity_not_in_text"] == ["span_mismatch"]
    assert part in faults[0].message, faults[0].message


def test_overlaps_are_found_where_offsets_are_wrong_too() -> None:
    found = [entity(10, -1, "Oslo"), entity(11, 14, "slo"), entity(0, 3, "Nils")]
    _, faults = parse_record(Record("f:1", ner(*found, text="Nils left Oslo.")), 0, "ner", ColumnsConfig())
    assert [fault.kind for fault in faults] == ["span_mismatch", "span_mismatch", "overlapping_entities"]
    assert faults[2].message == (
        "'Oslo' at 10:14 and 'slo' at 11:14: one lies inside the other; data.entities=nested keeps both"
    )


@pytest.mark.parametrize(
    ("spans", "flat", "nested"),
    [
        ([(0, 4, "A"), (5, 9, "A")], None, None),
        (
            [(0, 9, "A"), (0, 4, "B"), (5, 9, "A")],
            "one lies inside the other; data.entities=nested keeps both",
            None,
        ),
        (
            [(0, 4, "A"), (0, 4, "B")],
            "stands twice, as 'A' and as 'B'; data.entities=nested keeps both",
            None,
        ),
        ([(0, 4, "A"), (0, 4, "A")], "'abcd' at 0:4 stands twice", "'abcd' at 0:4 stands twice as 'A'"),
        (
            [(0, 4, "A"), (2, 6, "B")],
            "'abcd' at 0:4 and 'cdef' at 2:6",
            "'abcd' at 0:4 and 'cdef' at 2:6 cross",
        ),
        # Not neighbours by place.
        (
            [(0, 6, "A"), (1, 2, "B"), (5, 9, "A")],
            "'abcdef' at 0:6 and 'b' at 1:2: one lies inside the other",
            "'abcdef' at 0:6 and 'fghi' at 5:9 cross",
        ),
    ],
)
def test_entities_inside_entities(spans: list[Any], flat: str | None, nested: str | None) -> None:
    text = "abcdefghi"
    rows = [
        {"start_idx": a, "end_idx": b, "entity_text": text[a:b], "entity_label": label}
        for a, b, label in spans
    ]
    for wanted, kind in ((flat, False), (nested, True)):
        record = Record("f:1", ner(*rows, text=text))
        example, faults = parse_record(record, 0, "ner", ColumnsConfig(), nested=kind)
        if wanted is None:
            assert example is not None and not faults
            assert {(e.start, e.end, e.label) for e in example.entities or ()} == set(spans)
        else:
            assert example is None and wanted in faults[0].message


def test_entities_with_blanks_at_their_ends_are_warnings() -> None:
    values = ner(entity(9, 15, " Oslo."), text="Mara left Oslo.")
    example, faults = parse_record(Record("f:3", values), 0, "ner", ColumnsConfig())
    assert example is not None and example.entities == (Entity(" Oslo.", "地点", 9, 15),)
    (fault,) = faults
    assert (fault.kind, fault.severity) == ("entity_blanks", "warning")
    assert (
        fault.message == "entities[0]: ' Oslo.' begins or ends with a blank; without it, it stands at 10:15"
    )


def test_labels_that_look_the_same_are_named_with_their_counts(tmp_path: Path) -> None:
    labels = [
        "Sport",
        "sport",
        "Ｓport",
        "Sport\u200b",
        "Spo\u00adrt",
        "Sp ort",
        "Sport",
        "Art",
        "art history",
    ]
    rows = [{"text": f"t{n}", "output": label} for n, label in enumerate(labels)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    (fault,) = audit_file(path, "classification").faults
    assert (fault.kind, fault.severity) == ("label_twins", "warning")
    assert fault.where == f"{path}:6" and fault.message.endswith(
        "'Sport' (2 rows, first in line 1), 'Sp ort' (1 row, first in line 6), "
        "'Sport\\u200b' (1 row, first in line 4), 'Spo\\xadrt' (1 row, first in line 5), 'sport' (1 row, first in line 2), 'Ｓport' (1 row, first in line 3)"
    )
    assert FAULT_KINDS["label_twins"][0] == "warning"
    rows = [{"text": "a", "category": ["Ärger", "A\u0308rger", "b"], "output": "b"}]
    (fault,) = audit_file(write_jsonl(tmp_path / "c.jsonl", rows), "classification").faults
    assert fault.kind == "label_twins" and "(0 rows, first in line 1)" in fault.message
    types = [ner(entity(label=label)) for label in ("PLACE ", "PLACE", "place")]
    audit = audit_file(write_jsonl(tmp_path / "n.jsonl", types), "ner")
    assert audit.labels == {"PLACE": 2, "place": 1}
    assert [fault.kind for fault in audit.faults] == ["entity_blanks", "label_twins"]
    assert audit.faults[0].message == "entities[0]: blanks around the type 'PLACE ' are left out"
    assert "'PLACE' (2 entities, first in line 1), 'place' (1 entity," in audit.faults[1].message


@pytest.mark.parametrize(
    ("names", "labels", "kinds"),
    [(None, ("0", "1", "2"), ["integer_labels"]), (["neg", "neu", "pos"], ("neg", "neu", "pos"), [])],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_integers_holds_labels(
    names: Any, labels: tuple[str, ...], kinds: list[str], suffix: str, tmp_path: Path
) -> None:
    rows = [{"text": f"t{n}", "output": n % 3} for n in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    if suffix == "parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = DataConfig.model_validate({"labels": names})
    audit = audit_file(path, "classification", data)
    assert audit.usable == 6 and audit.label_set() == labels
    assert [fault.kind for fault in audit.faults] == kinds and not audit.errors


def test_integers_among_strings_are_faults(tmp_path: Path) -> None:
    rows = [{"text": "a", "output": 1}, {"text": "b", "output": "x"}, {"text": "c", "output": True}]
    audit = audit_file(write_jsonl(tmp_path / "rows.jsonl", rows), "classification")
    assert [fault.kind for fault in audit.faults] == ["wrong_type"] * 2 and audit.usable == 1
    many = [{"text": str(n), "output": n} for n in range(150)] + [{"text": "z", "output": "x"}]
    audit = audit_file(write_jsonl(tmp_path / "many.jsonl", many), "classification")
    assert [fault.kind for fault in audit.faults] == ["wrong_type", "integer_labels"] and audit.usable == 150
    outside = DataConfig.model_validate({"labels": ["a", "b"]})
    audit = audit_file(
        write_jsonl(tmp_path / "o.jsonl", [{"text": "a", "output": 2}]), "classification", outside
    )
    assert [fault.kind for fault in audit.faults] == ["unknown_label"]


@pytest.mark.parametrize(
    ("row", "text", "output"),
    [
        ({"text": "a", "label": "x"}, "text", "label"),
        ({"sentence": "a", "label": "x"}, "sentence", "label"),
        ({"文本": "a", "标签": "x"}, "文本", "标签"),
        ({"内容": "a", "类别": "x"}, "内容", "类别"),
        ({"content": "a", "标注": "x"}, "content", "标注"),
        ({" Text": "a", "LABEL": "x"}, " Text", "LABEL"),
        ({"instruction": "do", "input": "a", "output": "x"}, "input", "output"),
        ({"instruction": "a", "input": "", "output": "x"}, "instruction", "output"),
    ],
)
def test_columns_by_other_names_are_read_and_said(
    row: dict[str, Any], text: str, output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, text: "b"}])
    progress._noted.clear()
    rows = load_rows(str(path), "classification")
    assert [rows.example(n).text for n in (0, 1)] == ["a", "b"] and rows.example(0).label == "x"
    usual = ("text", "output", "label", "文本", "标签")  # as the README has them
    assert capsys.readouterr().err.splitlines() == [
        f"note: {path}: column {old!r} is read as {new}"
        for old, new in ((text, "text"), (output, "output"))
        if old not in usual
    ]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (
            {"body": "a", "output": "x"},
            "no column 'text'; the file has 'body', 'output'; 'text' may also be called 'sentence', 'content', '文本', '内容', '正文', 'input'; say which one "
            "holds it: add data.columns.text=COLUMN to the command, where COLUMN is its name in the file, or rename that column to 'text'",
        ),
        (
            {"sentence": "a", "content": "b", "output": "x"},
            "'sentence' and 'content' may both be meant, say which: add data.columns.text=sentence to the command, or rename "
            "that column to 'text'",
        ),
        (
            {"body": "a", "klass": "x"},
            "; 'label' may also be called 'output', '标签', '类别', '类', '标注'; say which ones hold them: add "
            "data.columns.text=COLUMN data.columns.output=COLUMN to the command, where COLUMN is its name in the file, or rename "
            "those columns",
        ),
        ({"text": "a", "category": "x"}, "data.columns.output=category"),
        ({"text": "a", "label": [[0, 1, "T"]]}, "'label' is read as output"),
    ],
)
def test_a_missing_column_is_one_fault_of_the_file(row: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "my rows.jsonl", [row] * 30)
    audit = audit_file(path, "classification")
    if "is read as" in part:
        assert {fault.kind for fault in audit.faults} == {"wrong_type"} and "doccano" in audit.faults[
            0
        ].message
        return
    (fault,) = audit.faults
    assert (fault.kind, fault.where) == ("missing_field", str(path)) and part in fault.message
    assert audit.unreadable is fault and (audit.rows, audit.errors) == (0, 1)
    columns = {"text": "absent"}
    data = DataConfig.model_validate({"columns": columns})
    (fault,) = audit_file(path, "classification", data).faults
    missing = "'absent'" if "output" in row else "'absent', 'label'"
    assert fault.message.startswith((f"no column {missing}; ", f"no columns {missing}; "))


def test_a_missing_column_of_a_table_stands_in_its_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("body,label\na,x\n", encoding="utf-8")
    (fault,) = audit_file(path, "classification").faults
    assert (fault.kind, fault.where) == ("missing_field", f"{path}:1")


def test_rows_of_doccano_are_known_by_their_spans(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "他在南京", "label": [[2, 4, "地点"]]}] * 3)
    audit = audit_file(path, "ner")
    assert (audit.usable, audit.faults) == (3, []) and audit.labels == {"地点": 3}
    as_they_stand = DataConfig(format="rows")
    (fault,) = audit_file(path, "ner", as_they_stand).faults
    assert fault.kind == "missing_field" and "'label' holds [start, end, type], as doccano" in fault.message
    config = load_config(None)
    assert guess_task(first_rows(str(path), config), config) == "ner"


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        ("('军事', '航天')", ["军事", "航天"]),
        ("'军事', '航天'", ["军事", "航天"]),
        ('"军事","航天"', ["军事", "航天"]),
        ("(a), (b)", ["(a)", "(b)"]),
        ("it's, that's", ["it's", "that's"]),
        ("['it\\'s', \"a 'b'\"]", ["it's", "a 'b'"]),
    ],
)
def test_lists_without_brackets_of_their_own(value: str, labels: list[str]) -> None:
    assert parse_candidates(value) == labels


@pytest.mark.parametrize("value", ["('a' 'b')", "'a' 'b', 'c'", "['a'\n 'b']", "[r'a' 'b']", "['a' \"b\"]"])
def test_a_forgotten_comma_is_refused(value: str) -> None:
    with pytest.raises(DataError, match="has no comma between"):
        parse_candidates(value)


@pytest.mark.parametrize("output", [0, 2.5, True, None, ["A"], "Football", {"a": 1}])
@pytest.mark.parametrize("task", ["classification", "ner"])
def test_prediction_does_not_look_at_answers(output: Any, task: Any) -> None:
    values = row(output=output, entities=output)
    example, faults = parse_record(Record("f:1", values), 0, task, ColumnsConfig(), answers_required=False)
    assert not faults and example is not None and example.label is None and example.entities is None


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
        example, _ = parse_record(record, 0, task, ColumnsConfig(), answers_required=False)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("value", "numbered", "label"),
    [
        (0, ("Neg", "Pos"), "Neg"),
        (1, ("Neg", "Pos"), "Pos"),
        (7, ("3", "7"), "7"),
        # The labels are integers themselves: 0 is not the number of 3.
        (0, ("3", "7"), "0"),
        (0, None, "0"),
    ],
)
def test_integers_are_read_by_the_labels_of_a_run(
    value: int, numbered: tuple[str, ...] | None, label: str
) -> None:
    record = Record("f:1", {"text": "x", "output": value})
    how: Any = {"integer_labels": True, "numbered": numbered}
    example, faults = parse_record(record, 0, "classification", ColumnsConfig(), **how)
    assert faults == [] and example is not None and example.label == label
    record = Record("f:1", {"text": "x", "output": 2})
    example, faults = parse_record(
        record, 0, "classification", ColumnsConfig(), integer_labels=True, numbered=("Neg", "Pos")
    )
    assert example is None and [fault.kind for fault in faults] == ["unknown_label"]


def test_a_rare_label_one_letter_from_a_usual_one_is_named(tmp_path: Path) -> None:
    labels = (
        ["sports"] * 20 + ["sport", "Sports", "class_1", "class_2"] + ["class_3"] * 20 + ["国际新闻"] * 20
    )
    rows = [{"text": f"t{n}", "output": label} for n, label in enumerate([*labels, "国内新闻"])]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = [fault for fault in audit_file(path, "classification").faults if fault.kind != "label_twins"]
    assert [str(fault) for fault in found] == [
        f"{path}:21: warning: misspelt_label: 'sport' (1 row) is nearly 'sports' (20 rows); is it the same label?"
    ]
    few = write_jsonl(tmp_path / "few.jsonl", rows[11:21])  # nine beside one may be two labels
    assert audit_file(few, "classification").faults == []
