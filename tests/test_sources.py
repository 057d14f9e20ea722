"""Reading files: the right place for every fault, and hub data sets through the hubs' own clients."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from helpers.hubs import fake_hub
from helpers.rows import write_jsonl
from labeltune.config import DataConfig, HubConfig, build_config
from labeltune.data.loading import load_rows
from labeltune.data.records import Record, without_key
from labeltune.data.sources import ORIGINALS, download_original, iter_records, resolve_data
from labeltune.errors import ConfigError, DataError, HubError, MissingExtraError, OutputError
from labeltune.io.outputs import write_json


def records(path: Path, content: str | bytes) -> list[Record]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return list(iter_records(path))


def places(found: list[Record], path: Path) -> list[str]:
    return [record.where.removeprefix(f"{path}:") for record in found]


def test_jsonl_says_where_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    found = records(path, '{"text": "一"}\n\n   \n{"text": "two"}')
    assert places(found, path) == ["1", "4"]
    assert [record.values for record in found] == [{"text": "一"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path, name: str) -> None:
    content = '{"text": "a"}\n' if name.endswith("jsonl") else "text\na\n"
    found = records(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert found[0].values == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "the key 'text' stands twice"),
        ("a.jsonl", '{"text": "a", "entities": [{"x": 1, "x": 1}]}\n', "the key 'x' stands twice"),
        ("a.csv", "text,output,text\na,b,c\n", "two columns are called 'text'"),
    ],
)
def test_nothing_is_dropped_because_a_name_stands_twice(
    name: str, content: str, problem: str, tmp_path: Path
) -> None:
    (found,) = records(tmp_path / name, content)
    assert found.values is None and found.kind == "unparsable_line" and problem in found.problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    content = '\ufeff{"text": "a"}\n' if encoding.endswith("be") else '{"text": "a"}\n'
    found = records(tmp_path / name, content.encode(encoding))
    assert [record.kind for record in found] == ["encoding"]
    assert "UTF-16" in found[0].problem and "iconv -f UTF-16" in found[0].problem


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_byte_that_is_not_utf_8_is_named(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    first = mark + '{"text": "一"}\n'.encode()
    second = b'{"text": "' + "中".encode("gb18030") + b'"}\n'
    found = records(path, first + second + b'{"text": "never read"}\n')
    assert places(found, path) == ["1", "2"]
    offset = len(first) + len(b'{"text": "')
    assert (first + second)[offset] > 0x7F
    assert found[1].kind == "encoding" and f"at byte {offset};" in found[1].problem


@pytest.mark.parametrize("quote", [b"", b'"'])
def test_csv_names_the_wrong_byte_too(tmp_path: Path, quote: bytes) -> None:
    path = tmp_path / "rows.csv"
    before = b"text,output\na,b\n" + quote + b"c\n"
    found = records(path, before + b"d" + b"\xff" + quote + b",e\n")
    assert found[0].values == {"text": "a", "output": "b"}
    assert found[-1].kind == "encoding" and f"at byte {len(before) + 1};" in found[-1].problem
    assert found[-1].where == f"{path}:4"


@pytest.mark.parametrize(
    "line",
    ["{text: 1}", "[1, 2]", '"text"', "3", '{"text": "cut', '{"a":' * 50_000, '{"n": ' + "9" * 5000 + "}"],
)
def test_a_bad_json_line_does_not_stop_the_reading(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    found = records(path, f'{line}\n{{"text": "fine"}}\n')
    assert (
        found[0].kind == "unparsable_line" and found[0].where == f"{path}:1" and len(found[0].problem) < 300
    )
    assert found[1].values == {"text": "fine"}


ROWS = [{"text": "first", "n": 1}, {"text": "two\nlines", "n": [{"a": 2}]}, {"text": "三", "n": None}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "json.gz", "jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("shape", ["array", "object", "named", "objects"])
def test_json_that_goes_over_lines_is_read(
    tmp_path: Path, suffix: str, indent: int | None, shape: str
) -> None:
    whole: Any = {
        "array": ROWS,
        "object": {"rows of mine": ROWS},
        "named": {"version": "1.0", "data": ROWS, "end": [1]},
    }
    if shape == "objects":
        content = "\n".join(json.dumps(row, indent=indent) for row in ROWS)
    else:
        content = json.dumps(whole[shape], indent=indent)
    raw = b"\xef\xbb\xbf" + content.encode()
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(raw, mtime=0) if suffix.endswith("gz") else raw)
    found = list(iter_records(path))
    assert [record.values for record in found] == ROWS
    if indent and shape in ("array", "named"):
        lines = content.split("\n")
        begins = [number for number, line in enumerate(lines, 1) if '"text"' in line]
        assert places(found, path) == [str(number - 1) for number in begins]


def test_what_is_wrong_inside_an_array_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    found = records(path, '[\n  {"text": "a"},\n  7,\n  {"text": "b"}\n  {"text": "never read"}\n]\n')
    assert places(found, path) == ["2", "3", "4", "5"]
    assert found[1].problem == "a JSON object is expected, not a int"
    assert "']' is expected, not '{'; the rest was not read" in found[3].problem
    found = records(path, '[{"text": "a"},\n{"text": "b\n"}]')
    assert places(found, path) == ["1", "2"] and "Invalid control character" in found[1].problem
    found = records(path, b'[{"text": "a"},\n{"text": "\xff"}]')
    assert found[-1].kind == "encoding" and found[-1].where.startswith(f"{path}:")
    (found,) = records(path, '{"train": [{"text": "a"}], "test": [{"text": "b"}]}')[1:]
    assert "two lists of rows, 'train' and 'test'" in found.problem
    assert records(path, '{"text": "a", "entities": [{"x": 1}]}\n')[0].values == {
        "text": "a",
        "entities": [{"x": 1}],
    }
    assert records(tmp_path / "lines.json", '{"text": "a"}\n')[0].values == {"text": "a"}


def test_a_large_array_is_read_a_row_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[" + ",".join(json.dumps({"text": "x" * 1000 + str(n)}) for n in range(50_000)) + "]")
    tracemalloc.start()
    count = sum(record.values is not None for record in iter_records(path))
    assert count == 50_000 and tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("rows.csv", "text;output\na;b\nc;d\n", "separated by ';', not by ','; save it with commas"),
        ("rows.csv", '\ufeff"text";"output"\n"a, b";"c"\n', "separated by ';'"),
        ("rows.csv", "text\toutput\na\tb\n", "separated by a tab, not by ','; rename it to rows.tsv"),
        ("rows.csv", "text|output\na|b\n", "separated by '|'"),
        ("rows.csv", "text，output\na，b\n", "separated by '，'"),
        ("rows.csv", "sep=;\ntext;output\na;1,5\n", "separated by ';'"),
        ("rows.tsv", "text,output\na,b\n", "separated by ',', not by a tab; rename it to rows.csv"),
        ("rows.csv", '{"text": "a"}\n{"text": "b"}\n', "look like JSON; rename it to rows.jsonl"),
        ("rows.jsonl", "text,output\na,b\nc,d\n", "separated by ','; rename it to rows.csv"),
        ("rows.csv", "text,output\ra,b\rc,d\r", "end in CR alone"),
        ("rows.csv", "text,output,,\na,b,,\n", "columns 3, 4 have no name in the header"),
        ("rows.csv", "text, output ,output\na,b,c\n", "two columns are called 'output'"),
        ("rows.csv", gzip.compress(b"text\na\n", mtime=0), "gzip-compressed; rename it to rows.csv.gz"),
        ("rows.jsonl.gz", '{"text": "a"}\n', "not gzip-compressed; rename it to rows.jsonl"),
        ("rows.csv", b"PK\x03\x04" + bytes(22) + b"xl/workbook.xml", "an Excel file; rename it to rows.xlsx"),
        ("rows.jsonl", b"PK\x03\x04" + bytes(40), "a zip archive; unpack it"),
        ("rows.json", b"PAR1....", "a parquet file; rename it to rows.parquet"),
        ("rows.xlsx", "text,output\na,b\n", "no Excel file"),
        ("rows.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Excel or Office file; save it as .xlsx"),
        ("rows.jsonl", "<!DOCTYPE html><html>", "a web page"),
        ("rows.parquet", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("rows.csv", "text,output\na,b\n".encode("utf-16-le"), "set data.encoding=utf-16-le"),
    ],
)
def test_one_cause_is_one_fault_of_the_file(
    name: str, content: str | bytes, part: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    (found,) = records(path, content)
    assert part in found.problem and found.whole and found.where == f"{path}:1"
    rows = load_rows(str(path), "classification")
    assert [(fault.kind, fault.where) for fault in rows.audit.faults] == [("unparsable_line", f"{path}:1")]
    assert rows.audit.usable == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", "sep=,\n text ,\ufeffoutput\na,b,,\n"),
        ("rows.csv", "text,output\r\na,b\r\n"),
        ("rows.tsv", "text\toutput\na\tb\n"),
        ("rows.tsv.gz", gzip.compress(b"text\toutput\na\tb\n", mtime=0)),
        ("rows.CSV", '"text","output"\n"a","b"\n'),
    ],
)
def test_tables_are_read(name: str, content: str | bytes, tmp_path: Path) -> None:
    (found,) = records(tmp_path / name, content)
    assert found.values == {"text": "a", "output": "b"}


def test_a_value_with_a_separator_belongs_into_quotes(tmp_path: Path) -> None:
    found = records(tmp_path / "rows.csv", "text,price\na,1,5\n")
    assert "names 2 columns, this row has 3; put a value that holds the separator into double quotes" in (
        found[0].problem
    )


def test_gzip_data_that_is_cut_is_one_fault_behind_the_rows(tmp_path: Path) -> None:
    raw = "".join(json.dumps({"text": f"row {n} {n * 7919 % 1000}"}) + "\n" for n in range(5000)).encode()
    path = tmp_path / "rows.jsonl.gz"
    found = records(path, gzip.compress(raw, mtime=0)[:-2000])
    assert len(found) > 100 and all(record.values for record in found[:-1])
    assert "the gzip data is damaged" in found[-1].problem and found[-1].where == f"{path}:{len(found)}"


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "big5", "shift_jis"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_other_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    content = {
        "rows.jsonl": '{"text": "中文", "output": "一"}\n',
        "rows.csv": "text,output\n中文,一\n",
        "rows.json": '[\n{"text": "中文",\n "output": "一"}]',
    }[name]
    path.write_bytes(content.encode(encoding))
    (found,) = iter_records(path, encoding)
    assert found.values == {"text": "中文", "output": "一"}
    data = DataConfig.model_validate({"encoding": encoding, "workers": 3})
    assert load_rows(str(path), "classification", data).audit.usable == 1
    wrong = list(iter_records(path))[-1]
    if encoding != "utf-16-le":
        assert wrong.kind == "encoding" and "data.encoding=" in wrong.problem


def test_what_is_not_in_the_given_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,output\na,b\n\x81\xff,c\n")
    found = list(iter_records(path, "gb18030"))
    assert [record.kind for record in found] == ["", "encoding"] and found[1].where == f"{path}:3"
    assert "not valid gb18030" in found[1].problem
    for wrong in ("gb-none", "base64", "rot13", "idna", "punycode", "undefined"):
        with pytest.raises(ConfigError, match="is no encoding"):
            build_config({"data": {"encoding": wrong}})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json.gz"])
def test_a_byte_order_mark_that_is_missing_is_one_fault_of_the_file(
    tmp_path: Path, name: str, encoding: str
) -> None:
    path = tmp_path / name
    raw = '{"text": "中文"}\n'.encode(f"{encoding}-be")
    path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith("gz") else raw)
    (found,) = iter_records(path, encoding)
    assert (found.where, found.kind, found.whole) == (f"{path}:1", "unparsable_line", True)
    assert found.problem == (
        f"it has no byte order mark, as {encoding} needs; set data.encoding={encoding}-le or {encoding}-be, "
        "or the encoding that the file has"
    )


def test_half_a_surrogate_pair_of_utf_7_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "+Ti1lhw-"}\n{"text": "+2AA-"}\n')
    found = list(iter_records(path, "utf-7"))
    assert found[0].values == {"text": "中文"}
    assert (found[1].kind, found[1].where) == ("encoding", f"{path}:2")


#: A row with columns that could be lists of rows.
LISTED: list[dict[str, Any]] = [
    {"text": "a b", "output": "x", "items": [{"sku": 1}]},
    {"items": [{"sku": 1}, {"sku": 2}], "text": "a b", "output": "x"},
    {"data": [{"n": 1}], "train": [{"n": 2}], "文本": "a b", "output": "x"},
    {"data": [], "title": "a b", "output": "x"},
    {"items": [{"sku": 1}, 2], "title": "a b"},
    {"rows": ["a", "b"], "title": "a b"},
    {"items": []},
]


@pytest.mark.parametrize("row", LISTED, ids=str)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("joint", ["\n", ",\n", "\n\n"])
def test_a_row_may_have_a_list(
    tmp_path: Path, row: dict[str, Any], indent: int | None, count: int, joint: str
) -> None:
    path = tmp_path / "rows.jsonl"
    each = json.dumps(row, indent=indent)
    found = records(path, joint.join([each] * count) + "\n")
    assert [record.values for record in found] == [row] * count
    step = each.count("\n") + joint.count("\n")
    assert places(found, path) == [str(1 + number * step) for number in range(count)]


def test_only_a_file_of_one_object_holds_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    holder = {"version": "1", "items": [{"sku": 1}]}
    assert [r.values for r in records(path, json.dumps(holder))] == [{"sku": 1}]
    line = json.dumps(holder) + "\n"
    assert [r.values for r in records(path, line * 2)] == [holder, holder]


def test_what_is_wrong_behind_rows_that_an_object_holds_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"text": f"{number} " + "x" * 50} for number in range(4000)]
    raw = json.dumps({"data": rows}, indent=0).encode()
    found = records(path, raw[:-30] + b"\xff" + raw[-30:])
    assert 2000 < len(found) - 1 < 4000 and found[-1].kind == "encoding"
    assert [record.values for record in found[:-1]] == rows[: len(found) - 1]
    found = records(path, raw[:-1])
    assert [record.values for record in found[:-1]] == rows and "not valid JSON" in found[-1].problem
    path = tmp_path / "rows.json.gz"
    found = records(path, gzip.compress(raw, mtime=0)[:-1000])
    assert [record.values for record in found[:-1]] == rows[: len(found) - 1] and len(found) > 100
    assert "the gzip data is damaged" in found[-1].problem and not found[-1].whole


def test_an_object_that_is_longer_than_a_row_holds_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeltune.data.records.MAX_LINE_BYTES", 100_000)
    rows = [{"text": f"{number} " + "x" * 50} for number in range(4000)]
    path = tmp_path / "rows.json"
    found = records(path, json.dumps({"data": rows}, indent=1))
    assert [record.values for record in found] == rows and found[1].where == f"{path}:6"


def test_lines_that_end_in_commas_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    found = records(path, '{"text": "a"},\n{"text": "b"}\n{"text": "c"} ,\n')
    assert [record.values for record in found] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert places(found, path) == ["1", "2", "3"]
    found = records(path, '{"text": "a"},\n{"text": "b"},,\n{"text": "c"}\n')
    assert places(found, path) == ["1", "2", "2"] and "the rest was not read" in found[2].problem


def test_excel_files_are_read_as_csv_is(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for cells in (
        [],
        ["text", " output ", None, "n"],
        ["a text", 1, None, 2.5],
        [],
        ["星", True, None, None],
    ):
        sheet.append(cells)
    book.create_sheet("empty")
    path = tmp_path / "rows.xlsx"
    book.save(path)
    found = list(iter_records(path))
    assert [record.values for record in found] == [
        {"text": "a text", "output": "1", "": "", "n": "2.5"},
        {"text": "星", "output": "TRUE", "": "", "n": ""},
    ]
    assert places(found, path) == ["3", "5"]
    book["empty"].append(["text"])
    book.save(path)
    (record,) = iter_records(path)
    assert record.whole and "2 sheets hold rows: 'Sheet', 'empty'" in record.problem
    (record,) = records(path, path.read_bytes()[:200])
    assert record.whole and "not a readable Excel file" in record.problem


def test_reading_excel_files_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openpyxl" else find(name, *rest)
    )
    with pytest.raises(MissingExtraError, match=r"\.\[xlsx\]"):
        records(tmp_path / "rows.xlsx", b"PK\x03\x04")


def test_folders_pipes_and_devices_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "null.csv").symlink_to("/dev/null")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name, part in (
        ("folder.jsonl", "is a folder; name a file in it"),
        ("pipe.jsonl", "is a pipe; write its rows to a file"),
        ("null.csv", "is a device"),
        ("loop.csv", "cannot be read"),
        ("x" * 300 + ".jsonl", "cannot be read"),
    ):
        with pytest.raises(DataError, match=part):
            resolve_data(str(tmp_path / name))


def test_a_file_name_that_is_not_utf_8_is_shown_with_escapes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd1\xc1\x1b[2J.jsonl"))
    path.write_text('{"text": "a", "output": "b"}\n{\n')
    audit = load_rows(str(path), "classification").audit
    assert audit.usable == 1 and audit.faults[0].where == f"{tmp_path}/\\xd1\\xc1\\x1b[2J.jsonl:2"
    write_json(tmp_path / "about.json", {"data": str(path), "text": "一"})
    assert json.loads((tmp_path / "about.json").read_text("utf-8")) == {"data": str(path), "text": "一"}


def test_csv_rows_stand_where_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    content = 'text,output\r\n"two\nlines",a\r\n\r\nshort\r\n"say ""hi"", now",b\r\none,two,three\r\n,\r\n'
    found = records(path, content)
    assert places(found, path) == ["2", "5", "6", "7", "8"]
    assert found[0].values == {"text": "two\nlines", "output": "a"}
    assert [record.kind for record in found] == ["", "unparsable_line", "", "unparsable_line", ""]
    assert "names 2 columns, this row has 1" in found[1].problem
    assert found[2].values == {"text": 'say "hi", now', "output": "b"}
    assert found[4].values == {"text": "", "output": ""}


def test_a_quote_that_never_closes_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    found = records(path, 'text,output\na,b\n"open,c\nd,e\n')
    assert places(found, path) == ["2", "3"]
    assert found[1].kind == "unparsable_line"


def test_empty_files_hold_no_records(tmp_path: Path) -> None:
    assert [records(tmp_path / f"rows.{suffix}", "") for suffix in ("jsonl", "json", "csv")] == [[], [], []]


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [{"text": f"t{i}", "category": ["a", "b"], "output": "a"} for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(iter_records(path))
    assert [record.values for record in found] == rows
    assert found[-1].where == f"{path}:row 2500"
    bad = tmp_path / "bad.parquet"
    assert [record.kind for record in records(bad, b"PAR1 no parquet")] == ["unparsable_line"]


def test_local_specs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.JSONL", [{"text": "a"}])
    assert resolve_data(str(path)) == path
    with pytest.raises(DataError, match="does not exist") as raised:
        resolve_data(str(tmp_path / "row.jsonl"))
    assert str(raised.value).endswith(f"Give another path; near it are: {path}")
    (tmp_path / "rows.pdf").write_text("a")
    (tmp_path / "folder.csv").mkdir()
    for name in ("rows.pdf", "folder.csv"):
        with pytest.raises(DataError, match=r"\.jsonl"):
            resolve_data(str(tmp_path / name))


def test_a_torn_line_names_its_column(tmp_path: Path) -> None:
    found = records(tmp_path / "rows.jsonl", '{"text": "a",\n{"text": "fine"}\n{"text": "a"} {}\n')
    assert [record.values is None for record in found] == [True, False, True]
    assert found[2].problem == "not valid JSON: Extra data (column 15)"


def hub_cache(folder: Path, files: dict[str, str]) -> Path:
    """A snapshot as huggingface_hub keeps it: links into a folder of blobs."""
    snapshot = folder / "snapshots" / "main"
    for index, (name, content) in enumerate(files.items()):
        blob = folder / "blobs" / str(index)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("hub", ["ms", "hf"])
def test_hub_data_sets(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "data/train.jsonl": '{"text": "a"}\n',
        "data/test.jsonl": "",
        "README.md": "",
        "secret.jsonl": "",
    }
    snapshot = hub_cache(tmp_path, files)
    (snapshot.parent / "outside.jsonl").write_text("")
    calls = fake_hub(monkeypatch, hub, lambda _: str(snapshot))
    config = HubConfig.model_validate({"cache_dir": "somewhere"})
    path = resolve_data(f"{hub}:org/name/data/train.jsonl", config)
    assert [record.values for record in iter_records(path)] == [{"text": "a"}]
    (call,) = calls
    assert call.pop("model_id" if hub == "ms" else "repo_id") == "org/name"
    assert call == {
        "repo_type": "dataset",
        "revision": None,
        "cache_dir": "somewhere",
        "local_dir": None,
        "allow_patterns": None,
        "ignore_patterns": None,
    }
    assert resolve_data(f"{hub}:org/name") == path  # the only file named train
    for name in (
        "../outside.jsonl",
        "data/../../outside.jsonl",
        "data",
        "none.jsonl",
        f"/{tmp_path}/blobs/0",
    ):
        with pytest.raises(DataError, match="no file"):
            resolve_data(f"{hub}:org/name/{name}")


def test_a_hub_data_set_of_several_files_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, "ms", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="it holds: none"):
        resolve_data("ms:org/name")
    for name in ("b.csv", "a.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"ms:org/name/FILE; it holds: a\.parquet, b\.csv"):
        resolve_data("ms:org/name")
    with pytest.raises(DataError, match="must look like ms:org/name"):
        resolve_data("ms:name")


@pytest.mark.parametrize(("hub", "shown"), [("ms", "ModelScope"), ("hf", "Hugging Face")])
def test_an_unreachable_hub_is_one_clear_message(
    hub: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: dict[str, Any]) -> str:
        raise ConnectionError("Failed to resolve host\nand a page more")

    fake_hub(monkeypatch, hub, unreachable)
    with pytest.raises(HubError) as raised:
        resolve_data(f"{hub}:org/name")
    message = str(raised.value)
    assert "\n" not in message and shown in message and "Failed to resolve host" in message
    assert "org/name" in message and "by hand" in message and "in place of the data set" in message


@pytest.mark.parametrize("name", list(ORIGINALS))
def test_the_original_data_lands_under_its_old_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, repo, files = ORIGINALS[name]

    def answer(call: dict[str, Any]) -> str:
        for file in files:
            target = Path(call["local_dir"]) / "deep" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps({"text": file}) + "\n")
        return str(call["local_dir"])

    calls = fake_hub(monkeypatch, hub, answer)
    folder = tmp_path / "here"
    written = download_original(name, folder)
    assert (
        sorted(p.name for p in folder.iterdir()) == sorted(files.values()) == sorted(p.name for p in written)
    )
    assert calls[0]["model_id" if hub == "ms" else "repo_id"] == repo
    written[0].write_text("mine")
    download_original(name, folder)
    assert len(calls) == 1 and written[0].read_text() == "mine"


def test_download_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="fudan, ccfbdci"):
        download_original("imdb", tmp_path)
    fake_hub(monkeypatch, "ms", lambda call: str(call["local_dir"]))
    with pytest.raises(HubError, match=r"no train\.jsonl any more"):
        download_original("fudan", tmp_path)

    def answer(call: dict[str, Any]) -> str:
        for name in ("train.jsonl", "test.jsonl"):
            (Path(call["local_dir"]) / name).touch()
        return str(call["local_dir"])

    fake_hub(monkeypatch, "ms", answer)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        download_original("fudan", tmp_path / "file")


def test_a_message_about_an_encoding_names_what_a_command_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "今天"}'.encode("gb18030"))
    (utf8,) = iter_records(path)
    assert utf8.problem == (
        "not valid UTF-8 at byte 10; set data.encoding=gb18030, or convert it with: "
        f"iconv -f GB18030 -t UTF-8 {path} > {tmp_path}/rows.utf8.jsonl (or from whatever encoding it has); the rest was not read"
    )
    path.write_bytes(b'{"text": "\x81\xff"}')
    (other,) = iter_records(path, "gb18030")
    assert other.problem == (
        "not valid gb18030; set data.encoding=utf-8, or convert it with: "
        f"iconv -f UTF-8 -t GB18030 {path} > {tmp_path}/rows.gb18030.jsonl (or from whatever encoding it has); the rest was not read"
    )
    path.write_bytes('{"text": "a b c"}'.encode("utf-16-le"))
    (wide,) = iter_records(path)
    assert wide.problem.endswith(f"iconv -f UTF-16-LE -t UTF-8 {path} > {tmp_path}/rows.utf8.jsonl")
    for found, encoding in ((utf8, "gb18030"), (other, "utf-8"), (wide, "utf-16-le")):
        assert f"; give --encoding {encoding}, or convert it with: iconv" in without_key(
            found.problem, "--encoding"
        )
        told = without_key(found.problem)
        assert "; convert it with: iconv" in told and "data.encoding" not in told


def test_rows_of_the_other_task_are_named_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "今天", "output": "天气"}\n'.encode("gb18030"))
    (fault,) = load_rows(str(path), "ner", DataConfig(encoding="gb18030")).audit.faults
    assert (fault.kind, fault.message) == (
        "wrong_task",
        "these are rows for task=classification (column 'output'); task=ner reads a column 'entities'",
    )
