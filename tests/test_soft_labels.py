"""Soft labels: how they are written, what is wrong with one, and that their shares count wherever rows do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.rows import read_jsonl, write_jsonl
from labeltune import check_data
from labeltune.commands.data import convert
from labeltune.config import DataConfig, build_config
from labeltune.data.check import Audit, add_duplicates, nothing_to_learn
from labeltune.data.labels import parse_shares
from labeltune.data.loading import Rows, load_rows, load_splits
from labeltune.errors import DataError
from labeltune.types import Example

SOFT = {"Sports": 0.2, "Economy": 0.8}
SHARES = (("Economy", 0.8), ("Sports", 0.2))


def load(path: Path, rows: list[dict[str, Any]], **data: Any) -> Rows:
    return load_rows(str(write_jsonl(path, rows)), "classification", DataConfig(**data))


@pytest.mark.parametrize(
    ("value", "shares"),
    [
        (SOFT, SHARES),
        ('{"Sports": 0.2, "Economy": 0.8}', SHARES),
        ("{'Sports': 0.2, 'Economy': 0.8, 'Art': None}", SHARES),
        ({"Sports": 0.2, "Economy": 0.8, "Art": 0, "Farm": None}, SHARES),
        ({"b": 0.5, "a": 0.5}, (("a", 0.5), ("b", 0.5))),
        ({" a ": 1}, (("a", 1.0),)),
        ("Sports", ()),
        ("{Sports}", ()),
        ("{}", ()),
        ('{"a": "b"}', ()),
        ("{1: 0.5, 2: 0.5}", ()),
        ("{'\\d': 'x'}", ()),
        (None, ()),
        (3, ()),
        (["a"], ()),
    ],
)
def test_shares(value: object, shares: tuple[tuple[str, float], ...]) -> None:
    assert parse_shares(value) == shares


def test_rounded_shares_are_made_to_sum_to_one() -> None:
    found = dict(parse_shares({"a": 0.333, "b": 0.333, "c": 0.333}))
    assert sum(found.values()) == pytest.approx(1, abs=1e-15) and set(found.values()) == {found["a"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "the shares sum to 0; they must sum to 1"),
        ({"a": 0.7, "b": 0.2}, "the shares sum to 0.9; they must sum to 1"),
        ({"a": 1, "b": 0.01}, "sum to 1.01"),
        ('{"a": 0.7, "b": 0.2}', "sum to 0.9"),
        ({"a": 80, "b": 20}, "the share of 'a' is 80; shares are numbers from 0 to 1"),
        ({"a": 1.1, "b": -0.1}, "the share of 'a' is 1.1"),
        ({"a": "0.8", "b": 0.2}, "the share of 'a' is '0.8'"),
        ({"a": True}, "the share of 'a' is True"),
        ({"a": float("nan"), "b": 1.0}, "the share of 'a' is nan"),
        ({" ": 1.0}, "a label is empty"),
        ({"a": 0.5, "a ": 0.5}, "'a' has more than one share"),
    ],
)
def test_shares_that_are_no_distribution(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_shares(value)


def test_rows_keep_their_shares(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = load(
        path,
        [{"text": "a", "output": SOFT}, {"text": "b", "output": "Art"}, {"text": "c", "output": {"Art": 1}}],
    )
    expected = [
        Example("0", "a", (), "Economy", None, f"{path}:1", SHARES),
        Example("1", "b", (), "Art", None, f"{path}:2"),
        Example("2", "c", (), "Art", None, f"{path}:3"),
    ]
    assert rows.examples() == expected
    assert [Example.from_row(example.to_row()) for example in expected] == expected
    assert rows.audit.label_set() == ("Art", "Economy", "Sports"), (
        "a label that is nowhere the most probable one"
    )
    assert rows.audit.labels == {"Economy": 1, "Art": 2}


def test_a_table_holds_them_as_text_and_parquet_as_structs(tmp_path: Path) -> None:
    csv = tmp_path / "rows.csv"
    csv.write_text('text,label\na,"{""Sports"": 0.2, ""Economy"": 0.8}"\nb,Art\n', encoding="utf-8")
    assert [e.shares for e in load_rows(str(csv), "classification").examples()] == [SHARES, ()]
    table = pa.table({"text": ["a", "b"], "output": [SOFT, {"Art": 1.0}]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = load_rows(str(tmp_path / "rows.parquet"), "classification").examples()
    assert [(e.label, e.shares) for e in found] == [("Economy", SHARES), ("Art", ())]


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"output": {"A": 0.5}}, "soft_label", "output is no soft label: the shares sum to 0.5; they must sum to 1"),
        ({"output": {"A": 0.5, "C": 0.5}, "category": ["A", "B"]}, "output_not_in_candidates", "'C' is not in ['A', 'B']"),
        ({"output": {"A": 0.5, "\ud83d": 0.5}}, "wrong_type", "half a surrogate pair"),
    ],
)  # fmt: skip
def test_a_faulty_soft_label_is_found_at_its_place(
    row: dict[str, Any], kind: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"text": "fine", "output": "A"}) + "\n" + json.dumps({"text": "a", **row}) + "\n"
    )
    (fault,) = load_rows(str(path), "classification").audit.faults
    assert (fault.kind, fault.where) == (kind, f"{path}:2") and message in fault.message


def test_labels_with_a_share_must_be_in_the_label_set(tmp_path: Path) -> None:
    rows = [{"text": "a", "output": {"A": 0.9, "C": 0.1}}, {"text": "b", "output": "B"}]
    found = load(tmp_path / "rows.jsonl", rows, labels=("A", "B"))
    assert [(f.kind, f.message) for f in found.audit.faults] == [
        ("unknown_label", "'C' is not among data.labels (A, B)")
    ]
    write_jsonl(tmp_path / "train.jsonl", [{"text": "c", "output": "A"}, {"text": "d", "output": "B"}])
    config = build_config(
        {"data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "rows.jsonl")}}
    )
    train, validation = check_data(config, config.data.train)
    assert not train.audit.faults
    assert [(f.kind, f.where) for f in validation.audit.faults] == [
        ("unknown_label", f"{tmp_path / 'rows.jsonl'}:1")
    ]


def test_other_shares_are_another_answer(tmp_path: Path) -> None:
    answers = [SOFT, {"Economy": 0.8, "Sports": 0.2}, {"Economy": 0.7, "Sports": 0.3}, "Economy"]
    rows = load(tmp_path / "rows.jsonl", [{"text": "a", "output": answer} for answer in answers])
    add_duplicates(rows.audit, rows.where)
    assert [fault.kind for fault in rows.audit.faults] == [
        "exact_duplicate",
        "conflicting_duplicate",
        "conflicting_duplicate",
    ]


def fingerprint(path: Path, rows: list[dict[str, Any]]) -> str:
    data = DataConfig(train=str(write_jsonl(path, rows)), validation_fraction=0)
    return load_splits("classification", data, None, 0).fingerprints["train"]


def test_the_fingerprint_of_rows_holds_their_shares(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    hard = [{"text": "a", "output": "Economy"}, {"text": "b", "output": "Art"}]
    soft = [{**hard[0], "output": SOFT}, hard[1]]
    other = [{**hard[0], "output": {"Economy": 0.7, "Sports": 0.3}}, hard[1]]
    assert len({fingerprint(path, rows) for rows in (hard, soft, other)}) == 3
    certain = [{**hard[0], "output": {"Economy": 1.0}}, hard[1]]
    assert fingerprint(path, certain) == fingerprint(path, hard)


def test_shares_of_two_labels_are_something_to_learn() -> None:
    audit = Audit(Path("rows.jsonl"), "classification", usable=2)
    audit.labels.update({"A": 2})
    assert nothing_to_learn(audit) is not None
    audit.shared_labels.update({"A", "B"})
    assert nothing_to_learn(audit) is None


def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labeltune.data.check._BLOCK_ROWS", 3)
    monkeypatch.setattr("labeltune.data.loading.ENOUGH_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    rows = [{"text": str(number), "output": SOFT if number % 2 else "Art"} for number in range(10)]
    one, two = load(path, rows, workers=1), load(path, rows, workers=2)
    assert one.examples() == two.examples() and one.audit == two.audit
    assert one.audit.shared_labels == {"Sports", "Economy"}


def test_convert_writes_the_shares_beside_the_label(in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", [{"text": "a", "output": SOFT}, {"text": "b", "output": "Art"}])
    convert(file="rows.jsonl", output=Path("new.jsonl"))
    first, second = read_jsonl(in_folder / "new.jsonl")
    assert first["output"] == "Economy" and first["shares"] == {"Economy": 0.8, "Sports": 0.2}
    assert second["output"] == "Art" and "shares" not in second
