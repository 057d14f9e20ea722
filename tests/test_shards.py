"""Shards: each is predicted by itself, and their outputs, one behind the other, are that of the whole file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers.commands import refused
from helpers.rows import joined, parts, write_jsonl
from helpers.runs import predictor_for, run_without_weights
from labeltune.config import DataConfig
from labeltune.data.blocks import block_records
from labeltune.errors import ConfigError, DataError, Interrupted, OutputError
from labeltune.inference import files, shards
from labeltune.inference.files import PredictOptions, parse_shard, predict_file, shard_output
from labeltune.inference.predictor import Predictor
from labeltune.inference.shards import (
    MANIFEST,
    Source,
    Work,
    begin_folder,
    cut_sources,
    list_sources,
    predict_shard,
    shard_block,
)
from labeltune.io.uris import Place

ROWS: list[Any] = [{"id": f"r{i}", "text": f"{i % 97} rocket" if i != 11 else ""} for i in range(30)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four rows."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 4)
    monkeypatch.setattr(shards, "CHUNK_ROWS", 4)


def written(folder: Path, kind: str) -> Path:
    """The rows as a file of this kind."""
    path = folder / f"rows.{'jsonl' if kind == 'gb18030' else kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "csv":
        path.write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS))
    else:
        lines = [json.dumps({**row, "note": "火箭"}, ensure_ascii=False) + "\n" for row in ROWS]
        path.write_bytes("\n".join(["", *lines]).encode("gb18030" if kind == "gb18030" else "utf-8"))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "gb18030", "csv", "json", "parquet"])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_shards_one_behind_the_other_are_the_whole(
    in_folder: Path, small_chunks: None, kind: str, count: int
) -> None:
    path, predictor = written(in_folder, kind), predictor_for()
    options = PredictOptions(top_k=2, encoding="gb18030" if kind == "gb18030" else "utf-8")
    assert predict_file(predictor, path, in_folder / "whole.jsonl", options) == 1
    bad, joined = 0, b""
    for number in range(1, count + 1):
        block = shard_block(path, number, count, options.encoding or "")
        output = shard_output(in_folder / "out.jsonl", number, count)
        assert output.name == f"out-{number:05d}-of-{count:05d}.jsonl"
        bad += predict_file(predictor, path, output, options, block=block)
        lines = output.read_bytes().count(b"\n")
        assert lines == block.rows and abs(lines - 30 / count) < 8
        joined += output.read_bytes()
    assert joined == (in_folder / "whole.jsonl").read_bytes() and bad == 1
    assert not list(in_folder.glob(".out*")), "nothing is left beside them"


def test_a_killed_shard_goes_on_and_no_other_in_its_place(in_folder: Path, small_chunks: None) -> None:
    path, predictor = written(in_folder, "jsonl"), predictor_for()
    first, second = (shard_block(path, number, 2, "utf-8") for number in (1, 2))
    output = in_folder / "out.jsonl"
    predict_file(predictor, path, output, block=second)
    whole = output.read_bytes()
    output.unlink()
    asked: list[list[str]] = []

    def stopped(rows: Any) -> Any:
        asked.append([row.id for row in rows])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Predictor.stream(predictor, rows)

    predictor.stream = stopped  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="8 rows of the output are kept"):
        predict_file(predictor, path, output, block=second)
    assert not output.exists() and asked[0] == ["r16", "r17", "r18", "r19"]
    for block in (first, None):
        with pytest.raises(OutputError, match="made with another shard;"):
            predict_file(predictor, path, output, block=block, resume=True)
    predict_file(predictor, path, output, block=second, resume=True)
    assert output.read_bytes() == whole and asked[2] == asked[3] == ["r24", "r25", "r26", "r27"]


def test_the_command_predicts_a_shard(
    labeltune: Any,
    in_folder: Path,
    loaded: None,
    small_chunks: None,
) -> None:
    run_without_weights(in_folder / "run")
    write_jsonl(in_folder / "rows.jsonl", [{"text": f"row {i}"} for i in range(10)])
    command = ("predict", "run", "rows.jsonl", "-o", "out.jsonl")
    assert labeltune(*command).code == 0
    for number in (1, 2, 3):
        assert labeltune(*command, "--shard", f"{number}/3").code == 0
    parts = sorted(in_folder.glob("out-*-of-00003.jsonl"))
    assert [part.read_bytes().count(b"\n") for part in parts] == [4, 4, 2]
    assert b"".join(part.read_bytes() for part in parts) == (in_folder / "out.jsonl").read_bytes()
    for arguments, message in (
        (("rows.jsonl", "-o", "out.jsonl", "--shard", "4/3"), "--shard=4/3 must be NUMBER/COUNT"),
        (("rows.jsonl", "-o", "out.jsonl", "--shard", "0/3"), "--shard=0/3 must be NUMBER/COUNT"),
        (("rows.jsonl", "-o", "out.jsonl", "--shard", "3"), "as in 3/16"),
        (("rows.jsonl", "-o", "out.csv", "--shard", "1/3"), "--shard needs an input file, and a jsonl file"),
        (("rows.jsonl", "--shard", "1/3"), "--shard needs an input file, and a jsonl file"),
        (("-o", "out.jsonl", "--shard", "1/3"), "--shard needs an input file, and a jsonl file"),
    ):
        refused(labeltune("predict", "run", *arguments), message)


def test_a_file_that_cannot_be_cut_is_one_error(in_folder: Path) -> None:
    (in_folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read"):
        shard_block(in_folder / "bad.parquet", 1, 2, "utf-8")
    with pytest.raises(ConfigError, match="must be NUMBER/COUNT"):
        parse_shard("3/16/2")


# --- folders of parts ---


def in_process(load: Any) -> Work:
    """What Ray's workers do, one item after the other in this process."""

    def work(function: Any, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            yield item, function(load, item)

    return work


def predicted(
    source: str,
    output: str = "parts",
    options: PredictOptions | None = None,
    load: Any = predictor_for,
    *,
    resume: bool = False,
    rows: int = 256,
) -> tuple[int, int]:
    """(rows, bad rows) of a file or folder that is predicted into a folder, as `predict_on_ray` does it."""
    options = options or PredictOptions(encoding="utf-8")
    place, work = Place.of(output), in_process(load)
    sources = list_sources(
        Place.of(source), "classification", DataConfig(encoding=options.encoding or "utf-8")
    )
    begin_folder(place, sources, options, "run", rows, resume)
    cut = cut_sources(sources, rows, options.encoding or "utf-8", work)
    found = [result for _, result in work(partial(predict_shard, place, options), cut)]
    return sum(rows for rows, _ in found), sum(bad for _, bad in found)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_of_shards_are_the_local_output(in_folder: Path, kind: str) -> None:
    rows = [{"text": f"{i % 97} rocket"} for i in range(600)]
    rows[300] = {"text": ""}
    source = in_folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(source, rows)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=250)
    assert predicted(str(source)) == (600, 1)
    assert predict_file(predictor_for(), source, in_folder / "local.jsonl") == 1
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes()
    assert [part.name for part in parts(in_folder / "parts")] == [f"part-00000{n}.jsonl" for n in range(3)]


def test_folders_and_addresses_are_read_and_only_missing_parts_are_made_again(
    in_folder: Path, small_chunks: None
) -> None:
    (in_folder / "in").mkdir()
    one = write_jsonl(in_folder / "in" / "a.jsonl", ROWS[:14])
    other = in_folder / "in" / "b.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS[14:]), other, row_group_size=5)
    source, output = f"file://{in_folder}/in", f"local://{in_folder}/parts"
    assert predicted(source, output, rows=8) == (30, 1)
    for file in (one, other):
        predict_file(predictor_for(), file, in_folder / f"{file.stem}.out")
    wanted = (in_folder / "a.out").read_bytes() + (in_folder / "b.out").read_bytes()
    # What is bad says where it stands, by the name that was given.
    assert joined(in_folder / "parts").replace(b"file://", b"") == wanted
    made = parts(in_folder / "parts")
    assert len(made) == 4
    made[2].unlink()
    before = [part.stat().st_mtime_ns for part in parts(in_folder / "parts")]
    assert predicted(source, output, rows=8, resume=True) == (30, 1)
    after = [part.stat().st_mtime_ns for part in made]
    assert joined(in_folder / "parts").replace(b"file://", b"") == wanted
    assert [after[i] for i in (0, 1, 3)] == before
    with pytest.raises(OutputError, match="another top_k"):
        predicted(source, output, PredictOptions(top_k=1, encoding="utf-8"), rows=8, resume=True)
    (in_folder / "parts" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes.txt, which is not ours"):
        predicted(source, output)


def test_a_killed_driver_loses_and_doubles_no_row(in_folder: Path, small_chunks: None) -> None:
    source = str(write_jsonl(in_folder / "rows.jsonl", ROWS))
    asked: list[int] = []

    def stopped() -> Predictor:
        predictor = predictor_for()

        def limited(rows: Any) -> Any:
            asked.append(len(rows))
            if len(asked) == 6:
                raise KeyboardInterrupt
            return Predictor.stream(predictor, rows)

        predictor.stream = limited  # type: ignore[method-assign]
        return predictor

    with pytest.raises(KeyboardInterrupt):
        predicted(source, load=stopped, rows=8)
    (in_folder / "parts" / ".part-000003.jsonl-x.tmp").write_text("half")
    assert len(parts(in_folder / "parts")) == 2, "whole or not there"
    assert predicted(source, rows=8, resume=True) == (30, 1)
    predict_file(predictor_for(), Path(source), in_folder / "local.jsonl")
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes()
    assert sorted(Place.of("parts").files(hidden=True))[0] == MANIFEST, "nothing half-written is left"


def test_a_finished_part_is_counted_and_needs_no_model(in_folder: Path) -> None:
    source = str(write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": ""}]))
    assert predicted(source) == (2, 1)

    def no_model() -> Predictor:
        raise AssertionError("loaded")

    assert predicted(source, load=no_model, resume=True) == (2, 1)


def test_an_input_that_changes_meanwhile_is_noticed(in_folder: Path) -> None:
    source = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    place = Place.of(str(source))
    sources = list_sources(place, "classification", DataConfig())
    (shard,) = cut_sources(sources, 256, "utf-8", in_process(predictor_for))
    assert str(shard) == f"rows 0 to 1 of {source}"
    write_jsonl(source, [{"text": "a, and much more of it"}])
    with pytest.raises(DataError, match="has changed: block 0 had 2 rows and has 1"):
        predict_shard(Place.of("parts"), PredictOptions(encoding="utf-8"), predictor_for, shard)


def test_a_row_group_that_is_damaged_is_named(in_folder: Path) -> None:
    path = in_folder / "rows.parquet"
    rows = [{"text": f"row {i} and {i * 7919 % 10007} more"} for i in range(3000)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
    path.write_bytes(content)
    block = shard_block(path, 1, 1, "utf-8")
    with path.open("rb") as file, pytest.raises(DataError, match=r"rows\.parquet: rows 1 to 3000 cannot be"):
        list(block_records(block, file))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "gb18030"])
def test_columns_and_encodings_are_the_local_engines(in_folder: Path, kind: str) -> None:
    encoding = "gb18030" if kind == "gb18030" else "utf-8"
    rows = [{"key": i, "sentence": f"{i} 火箭", "other": "x"} for i in range(300)]
    (in_folder / "in").mkdir()
    source = in_folder / "in" / f"a.{kind.replace('gb18030', 'jsonl')}"
    plain = write_jsonl(in_folder / "in" / "b.jsonl", [{"text": "b"}])
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), source)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        source.write_bytes(text.encode(encoding))
    options = PredictOptions(with_text=True, encoding=encoding)
    found = list_sources(Place.of(str(in_folder / "in")), "classification", DataConfig(encoding=encoding))
    assert [s.columns.text if s.columns is not None else None for s in found] == ["sentence", None]
    assert predicted(str(in_folder / "in"), options=options) == (301, 0)
    for file in (source, plain):
        predict_file(predictor_for(), file, in_folder / f"{file.stem}.out", options)
    assert (
        joined(in_folder / "parts") == (in_folder / "a.out").read_bytes() + (in_folder / "b.out").read_bytes()
    )
    assert json.loads(joined(in_folder / "parts").splitlines()[299])["text"] == "299 火箭"


def test_inputs_are_refused_as_by_the_local_engine_and_a_manifest_of_another_reading(in_folder: Path) -> None:
    data = DataConfig()
    source = write_jsonl(in_folder / "rows.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl: no column 'text'; the file has 'body'"):
        list_sources(Place.of(str(source)), "classification", data)
    (in_folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read"):
        list_sources(Place.of(str(in_folder / "bad.parquet")), "classification", data)
    write_jsonl(source, [{"sentence": "a"}])
    sources = list_sources(Place.of(str(source)), "classification", data)
    output, options = Place.of(str(in_folder / "parts")), PredictOptions(encoding="utf-8")
    begin_folder(output, sources, options, "run", 256, False)
    begin_folder(output, sources, options, "run", 256, True)
    # One of an earlier version holds its blocks too.
    manifest = json.loads(output.inside(MANIFEST).read())
    output.inside(MANIFEST).write(json.dumps({**manifest, "blocks": []}).encode())
    begin_folder(output, sources, options, "run", 256, True)
    for change, what in (
        (PredictOptions(encoding="gb18030"), "encoding"),
        (PredictOptions(("a", "b"), encoding="utf-8"), "labels"),
    ):
        with pytest.raises(OutputError, match=f"another {what};"):
            begin_folder(output, sources, change, "run", 256, True)
    renamed = [Source(s.place, s.about) for s in sources]
    with pytest.raises(OutputError, match="another columns;"):
        begin_folder(output, renamed, options, "run", 256, True)
