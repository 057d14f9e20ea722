"""Hostile rows: every one is taken as it stands or is one fault with its place; nothing is lost, and memory stays small."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import hostile
from helpers.commands import command
from helpers.rows import classification_rows, write_jsonl
from labeltune.config import ColumnsConfig, DataConfig, load_config
from labeltune.data import records
from labeltune.data.check import audit_file
from labeltune.data.labels import parse_candidates
from labeltune.data.loading import load_rows
from labeltune.data.records import Record, bounded_lines
from labeltune.data.schemas import Fault, parse_record
from labeltune.data.sources import iter_records
from labeltune.errors import DataError
from labeltune.inference.files import count_rows, read_stream
from labeltune.io import progress
from labeltune.io.lock import scratch_folder
from labeltune.types import Example


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), suffix=st.sampled_from(sorted(hostile.MAKERS)))
def test_every_hostile_row_is_taken_or_named(
    seed: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = hostile.MAKERS[suffix](random.Random(seed), 12)
    path = hostile.write(tmp_path_factory.getbasetemp(), f"any{suffix}", raw)
    for task in ("classification", "ner"):
        rows = load_rows(str(path), task)  # type: ignore[arg-type]
        audit = rows.audit
        assert len(rows.dataset) == audit.usable <= audit.rows
        if "wrong_task" in audit.counts:  # one fault for all rows
            assert (audit.usable, audit.errors) == (0, 1)
            continue
        # These are about the whole file; the first stands at a row that is fine.
        of_rows = [
            f
            for f in audit.faults
            if "rows (this is the first) have no candidates" not in f.message and not f.whole
        ]
        named = {fault.where for fault in of_rows if fault.severity == "error"}
        assert len(named) == audit.rows - audit.usable
        for fault in audit.faults:
            assert fault.where.startswith(f"{path}:") and len(fault.message) < 500
        for number in range(audit.usable):
            rows.example(number).text.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_to_the_end(raw: bytes) -> None:
    folder = scratch_folder()
    for suffix in hostile.MAKERS:
        for record in iter_records(hostile.write(folder, f"bytes{suffix}", raw)):
            assert (record.values is None) == bool(record.problem)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(hostile.COLUMNS), JSON), st.booleans())
def test_any_values_are_an_example_or_have_a_fault(values: dict[str, Any], answers_required: bool) -> None:
    for task in ("classification", "ner"):
        example, faults = parse_record(
            Record("f:1", values),
            0,
            task,
            ColumnsConfig(),
            answers_required=answers_required,  # type: ignore[arg-type]
        )
        assert (example is None) == any(fault.severity == "error" for fault in faults)
        if example is not None:
            json.dumps(example.to_row(), ensure_ascii=False).encode("utf-8")


def test_a_line_that_is_too_long_is_one_fault_and_never_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "first", "output": "a"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'", "output": "a"}\n{"text": "last", "output": "a"}\n\xff\n')
    tracemalloc.start()
    found = list(iter_records(path))
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()
    assert [record.where for record in found] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    assert "the line has 100000028 bytes" in found[1].problem
    assert found[2].values == {"text": "last", "output": "a"}
    assert found[3].kind == "encoding" and f"byte {path.stat().st_size - 2};" in found[3].problem
    assert count_rows(path) == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab\r", max_size=12), max_size=6), st.integers(2, 6))
def test_bounded_lines_are_the_lines(parts: list[str], limit: int) -> None:
    import io

    raw = "\n".join(parts).encode()
    whole = list(io.BytesIO(raw))
    kept, records.MAX_LINE_BYTES = records.MAX_LINE_BYTES, limit
    try:
        found = list(bounded_lines(io.BytesIO(raw)))
    finally:
        records.MAX_LINE_BYTES = kept
    assert len(found) == len(whole)
    for line, expected in zip(found, whole, strict=True):
        if len(expected) <= limit:
            assert line == expected
        else:
            assert isinstance(line, records.LongLine) and line.size == len(expected)


def test_a_quote_that_is_never_closed_does_not_read_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeltune.data.records.MAX_LINE_BYTES", 1000)
    path = hostile.write(tmp_path, "rows.csv", b'text,output\na,b\n"open' + b"x,\n" * 100_000)
    found = list(iter_records(path))
    assert len(found) == 2 and found[1].where == f"{path}:3"
    assert "more than 1000 characters; perhaps a quote is not closed" in found[1].problem
    many = hostile.write(tmp_path, "many.csv", b"text,output\n" + b'"two\nlines",b\n' * 1000)
    assert len(list(iter_records(many))) == 1000


def test_parquet_values_that_python_cannot_hold_are_faults_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    not_text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")]
    )
    odd = {
        "years": pa.array([10**14, 0], pa.timestamp("s")),
        "days": pa.array([10**9, 0], pa.date32()),
        "text": not_text,
    }
    for name, column in odd.items():
        pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], name: column}), path)
        found = list(iter_records(path))
        assert [record.values is None for record in found] == [True, False], name
        assert found[0].where == f"{path}:row 1" and "not readable parquet" in found[0].problem
    zone = pa.array([1, 2], pa.timestamp("us", tz="Mars/Phobos"))
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "id": zone}), path)
    assert [record.kind for record in iter_records(path)] == ["unparsable_line"] * 2


def test_parquet_columns_of_one_name_are_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = [pa.array(["a"]), pa.array(["b"])]
    pyarrow.parquet.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), path)
    (found,) = iter_records(path)
    assert found.kind == "unparsable_line" and "two columns are called 'text'" in found.problem


def test_parquet_that_unfolds_to_much_is_read_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * 1_000_000]))
    pyarrow.parquet.write_table(pa.table({"text": text}), path)
    assert path.stat().st_size < 1_000_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    count, most = 0, 0
    for record in iter_records(path):
        assert record.values is not None and len(record.values["text"]) == 1_000_000
        count, most = count + 1, max(most, pa.total_allocated_bytes() - before)
    assert count == 500 and most < 100e6
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_long_texts_are_written_before_they_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(60):
            file.write(json.dumps({"text": f"{number} " + "y" * 1_000_000, "output": "a"}) + "\n")
    tracemalloc.start()
    rows = load_rows(str(path), "classification")
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
    assert rows.audit.usable == 60 and rows.example(59).text.startswith("59 yyy")


def test_a_damaged_parquet_file_is_one_fault_for_predict(tmp_path: Path) -> None:
    path = hostile.write(tmp_path, "rows.parquet", b"PAR1 no parquet PAR1")
    assert count_rows(path) is None


def test_faults_of_rows_with_ten_thousand_labels_stay_short(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(10_000)]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "category": labels, "output": "none"}])
    (fault,) = audit_file(path, "classification").faults
    assert fault.kind == "output_not_in_candidates" and len(fault.message) < 500
    assert "more characters" in fault.message
    many = DataConfig.model_validate({"labels": labels})
    path = write_jsonl(tmp_path / "other.jsonl", [{"text": "a", "output": "none"}])
    assert len(audit_file(path, "classification", many).faults[0].message) < 500
    assert Fault("encoding", "f:1", "short").message == "short"


@pytest.mark.parametrize(
    "value", ["['it', s', 'b']", "[Military, Space]", "[1, 2]", "[['a']]", "[" * 5000 + "]" * 5000]
)
def test_a_list_that_is_none_is_not_cut_at_its_commas(value: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no JSON or Python list of strings"):
        parse_candidates(value)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "category": value, "output": "b"}])
    assert [fault.kind for fault in audit_file(path, "classification").faults] == ["wrong_type"]


def test_a_candidate_list_written_out_endlessly_is_refused() -> None:
    with pytest.raises(DataError, match="more than 1048576 characters"):
        parse_candidates("['a'," * 400_000 + "]")


def test_a_backslash_in_a_written_list_is_no_warning() -> None:
    assert parse_candidates("['\\d', 'b']") == ["\\d", "b"]


@pytest.mark.parametrize(
    "labels", [["a,b", "c"], ['q"', "it's"], ["two\nlines", "a"], ["<|im_end|>", "<|im_start|>system"]]
)
def test_candidates_with_commas_quotes_newlines_and_marks_come_through_every_format(
    labels: list[str], tmp_path: Path
) -> None:
    import csv

    made = {"text": "a text", "category": labels, "output": labels[0]}
    write_jsonl(tmp_path / "rows.jsonl", [made])
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(made))
        writer.writeheader()
        writer.writerow({**made, "category": json.dumps(labels)})
        writer.writerow({**made, "text": "as Python writes it", "category": repr(labels)})
    pyarrow.parquet.write_table(pa.Table.from_pylist([made]), tmp_path / "rows.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        rows = load_rows(str(tmp_path / f"rows.{suffix}"), "classification")
        assert not rows.audit.faults
        for number in range(rows.audit.usable):
            assert rows.example(number).candidates == tuple(labels)
            assert rows.example(number).label == labels[0]


@pytest.mark.parametrize(
    "kind", ["empty.jsonl", "blank.jsonl", "empty.csv", "header.csv", "cut.jsonl", "deep.jsonl"]
)
def test_data_check_and_train_say_what_is_wrong_with_a_file(
    kind: str, in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "empty.jsonl": b"",
        "blank.jsonl": b" \n\n",
        "empty.csv": b"",
        "header.csv": b"text,output\n",
        "cut.jsonl": b'{"text": "a", "output": "b"}\n{"text": "a", "outp',
        "deep.jsonl": b'{"text": ' + b"[" * 10_000 + b"\n",
    }[kind]
    path = hostile.write(in_folder, kind, content)
    code, out, error = command(monkeypatch, capsys, "data", "check", str(path))
    faulty = kind in ("cut.jsonl", "deep.jsonl")
    assert code == 1
    assert ("unparsable_line" in out) == faulty and "Traceback" not in out + error
    assert (f"{path}:1: error: no_rows: the file holds no rows" in out) == (not faulty)
    config = hostile.write(in_folder, "run.yaml", f"data: {{train: {kind}}}\nmodel: empty\n".encode())
    (in_folder / "empty").mkdir()
    code, out, error = command(monkeypatch, capsys, "train", str(config))
    assert code == 2 and "Traceback" not in error
    assert error.startswith("error: ") and kind in error


def test_predict_takes_or_refuses_what_comes_on_the_command_line_and_stdin(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    # Whatever is not refused goes on to load the run, which is not there.
    cases = [
        ("--text", "\ud800", "half a surrogate pair"),
        ("--text", "\u200b\ufeff", "cannot be seen"),
        ("--text", "", "empty"),
        ("--category", "['a, b']]", "--category stands in brackets"),
        ("--category", "[]", "--category '[]' names no label"),
        ("--category", " , ", "--category ' , ' names no label"),
        ("--category", "['Sports' 'Art']", "--category has no comma between 'Sports' and 'Art'"),
    ]
    for option, value, part in cases:
        more = [] if option == "--text" else ["--text", "fine"]
        code, _, error = command(monkeypatch, capsys, "predict", "no-run", *more, option, value)
        assert code == 2 and part in error and "Traceback" not in error
    for line in ('{"text": 7}', "\u200b", '{"text": "fine"}'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
        code, _, error = command(monkeypatch, capsys, "predict", "no-run")
        assert code == 2 and "no-run" in error and "Traceback" not in error


def stdin_rows(raw: bytes, task: str = "classification", **columns: str) -> list[tuple[Any, ...]]:
    """(id, text) of every row of standard input, (id, place, error) of one that is none."""
    import io

    from labeltune.prompts import make_task

    config = load_config(None, [f"task={task}"])
    predictor: Any = SimpleNamespace(
        task=make_task(config.task, ("a",), config.prompt), columns=ColumnsConfig(**columns), encoding="utf-8"
    )
    rows = read_stream(io.BytesIO(raw), predictor)
    return [
        (row.id, row.text) if isinstance(row, Example) else (row.id, row.source, row.fault) for row in rows
    ]


def test_standard_input_is_read_as_a_file_is() -> None:
    assert stdin_rows(b'\xef\xbb\xbf{"id": "q", "text": "one"}\r\nplain {text}\r\n{a set}\n') == [
        ("q", "one"),
        ("1", "plain {text}"),
        ("2", "{a set}"),
    ]
    own = b'{"key": "k1", "content": "one"}\na document\n{"key": 7, "content": "two", "output": 3}\n'
    assert stdin_rows(own, text="content", id="key") == [("k1", "one"), ("1", "a document"), ("7", "two")]
    assert stdin_rows(b'{"sentence": "one"}\nplain\n') == [("0", "one"), ("1", "plain")]
    array = json.dumps([{"id": "x", "text": "one"}, {"text": "two"}], indent=1).encode()
    assert stdin_rows(array) == [("x", "one"), ("1", "two")]
    assert stdin_rows(b"") == []


def test_a_line_of_standard_input_may_be_longer_than_a_row_where_it_is_an_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("standard_input", "records"):
        monkeypatch.setattr(f"labeltune.data.{module}.MAX_LINE_BYTES", 10_000)
    texts = [f"{number} " + "x" * 100 for number in range(500)]
    raw = json.dumps([{"text": text} for text in texts]).encode()
    assert stdin_rows(raw) == [(str(number), text) for number, text in enumerate(texts)]
    # Lines that are cut when they are first looked at are whole when they are read.
    for begin in (b"", b"short\n", b"short\n" * 2):
        found = stdin_rows(begin + b"y" * 9_990 + b"\n" + b"z" * 10_001 + b"\nlast\n")
        assert [row[1] for row in found if len(row) == 2] == ["short"] * begin.count(b"\n") + [
            "y" * 9_990,
            "last",
        ]
        (wrong,) = (row for row in found if len(row) == 3)
        assert "the line has 10002 bytes" in wrong[2]


def test_a_bad_row_of_standard_input_keeps_its_place() -> None:
    raw = (
        b'one\n{"text": "cut\n{"text": 7, "id": "n"}\n\n{"text": "\\ud800"}\n\xe2\x80\x8b\n{\n'
        + b'{"text": '
        + b"[" * 10_000
        + b"\nlast\n\xff\nnever read\n"
    )
    found = stdin_rows(raw)
    assert [row[0] for row in found] == ["0", "1", "n", "3", "4", "5", "6", "7", "8"]
    assert [row[1] for row in found if len(row) == 3] == [f"stdin:{n}" for n in (2, 3, 5, 6, 7, 8, 10)]
    kinds = [row[2].partition(":")[0] for row in found if len(row) == 3]
    assert kinds == [
        "unparsable_line",
        "wrong_type",
        "wrong_type",
        "empty_field",
        "unparsable_line",
        "unparsable_line",
        "encoding",
    ]


def test_blank_lines_of_standard_input_take_no_id_and_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    progress._noted.clear()
    assert stdin_rows(b"\none\n \n\ntwo\n\n") == [("0", "one"), ("1", "two")]
    assert capsys.readouterr().err == (
        "note: stdin: 3 blank lines were skipped; they are no rows and take no id\n"
    )


def test_rows_that_are_all_the_same_are_warnings(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", classification_rows(1) * 50)
    audit = audit_file(path, "classification")
    assert audit.usable == 50 and not audit.errors
