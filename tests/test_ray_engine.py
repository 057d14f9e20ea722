"""Prediction on Ray: every row once, in its place, equal to the local engine's, whoever dies meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from conftest import LABELS, classification_rows, write_jsonl
from labeltune import recipes, run_files
from labeltune.cli.predict import predict as predict_command
from labeltune.config import DataConfig, build_config
from labeltune.data.blocks import cut_lines
from labeltune.data.records import bounded_lines
from labeltune.data.uris import Place
from labeltune.errors import DataError, LabeltuneError, ModelError, OutputError
from labeltune.inference.load import load_predictor
from labeltune.inference.predictor import Predictor
from labeltune.inference.ray_engine import (
    MANIFEST,
    MOST_ATTEMPTS,
    PartWriter,
    Settings,
    _cut,
    _resumed,
)
from labeltune.inference.stream import predict_file
from labeltune.ray_session import local_cores, ray_session
from labeltune.recipes import spreading
from labeltune.recipes.spreading import columns_of_inputs, predict_spread
from labeltune.run_folder import RunInfo
from test_predictor import predictor_for
from test_training import config_for


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes under a command that run our actors."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def joined(folder: Path) -> bytes:
    return b"".join(part.read_bytes() for part in parts(folder))


@pytest.fixture
def run(in_folder: Path, model_folder: Path) -> Path:
    return recipes.train(config_for(in_folder, model_folder, max_steps=1)).best


def killed_run(in_folder: Path, run: Path, count: int, block_rows: int) -> None:
    """Two workers, one of them killed while it works; then everything is compared with the local engine."""
    rows: list[Any] = [{"text": f"{i % 97} rocket", "category": LABELS[: 2 + i % 2]} for i in range(count)]
    rows[4] = {"text": ""}
    source = write_jsonl(in_folder / "rows.jsonl", rows)
    with source.open("a", encoding="utf-8") as file:
        file.write('\n\nno json\n{"id": "last", "text": "x"}\n')
    command = [
        sys.executable,
        "-m",
        "labeltune",
        "predict",
        str(run),
        "rows.jsonl",
        "-o",
        "parts",
        "--top-k",
        "2",
    ]
    spread = ["--engine", "ray", "--workers", "2", "--block-rows", str(block_rows)]
    process = subprocess.Popen([*command, *spread], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not parts(in_folder / "parts") and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    victims = workers_of(process)
    assert len(victims) == 2
    victims[0].kill()
    blocks = -(-(count + 2) // block_rows)
    assert 1 <= len(parts(in_folder / "parts")) < blocks, "killed too late to say anything"
    _, said = process.communicate(timeout=1800)
    assert process.returncode == 1, said
    assert "2 rows could not be predicted" in said and "Traceback" not in said
    threads = torch.get_num_threads()
    # As each of the two workers: with other threads, sums differ in their last bit.
    torch.set_num_threads(max(1, local_cores() // 2))
    try:
        with load_predictor(run, merge=True) as predictor:
            assert predict_file(predictor, Path("rows.jsonl"), in_folder / "local.jsonl", top_k=2) == 2
    finally:
        torch.set_num_threads(threads)
    assert len(parts(in_folder / "parts")) == blocks
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes()
    ids = [json.loads(line)["id"] for line in joined(in_folder / "parts").splitlines()]
    assert ids == [*map(str, range(count)), str(count), "last"]
    assert not [name for name in Place.of("parts").files(hidden=True) if name.startswith((".", "_attempt"))]


def test_a_killed_worker_loses_and_doubles_no_row(in_folder: Path, run: Path) -> None:
    killed_run(in_folder, run, 3_000, 256)


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_none_of_20_000_rows(in_folder: Path, run: Path) -> None:
    killed_run(in_folder, run, 20_000, 1_024)


def test_folders_and_addresses_are_read_and_only_missing_parts_are_made_again(
    in_folder: Path, run: Path
) -> None:
    """Also: evaluation. One Ray for all of it, as starting one takes longer than the rest."""
    rows = classification_rows(1300)
    (in_folder / "in").mkdir()
    one = write_jsonl(in_folder / "in" / "a.jsonl", rows[:700])
    pyarrow.parquet.write_table(
        pa.Table.from_pylist(rows[700:]), in_folder / "in" / "b.parquet", row_group_size=250
    )
    labelled = str(write_jsonl(in_folder / "labelled.jsonl", rows[:90]))
    source, output = f"file://{in_folder}/in", f"local://{in_folder}/parts"

    def predict(resume: bool, top_k: int | None = None) -> int:
        return predict_spread(str(run), source, output, top_k=top_k, resume=resume, block_rows=512, workers=1)

    with load_predictor(run, merge=True) as predictor, ray_session(cpus=1):
        assert predict(resume=False) == 0
        for file in (one, in_folder / "in" / "b.parquet"):
            predict_file(predictor, file, in_folder / f"{file.stem}.out")
        wanted = (in_folder / "a.out").read_bytes() + (in_folder / "b.out").read_bytes()
        assert joined(in_folder / "parts") == wanted and len(parts(in_folder / "parts")) == 4
        parts(in_folder / "parts")[2].unlink()
        before = [part.stat().st_mtime_ns for part in parts(in_folder / "parts")]
        assert predict(resume=True) == 0
        after = [part.stat().st_mtime_ns for part in parts(in_folder / "parts")]
        assert joined(in_folder / "parts") == wanted and [after[i] for i in (0, 1, 3)] == before
        with pytest.raises(OutputError, match="another top_k"):
            predict(resume=True, top_k=1)
        (in_folder / "parts" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=r"holds notes.txt, which is not ours"):
            predict(resume=False)
        local = recipes.evaluate(run, labelled, progress=False, output="local")
        spread = recipes.evaluate(run, labelled, progress=False, engine="ray", workers=1, output="spread")
    assert spread.keys() == local.keys() and spread["rows"] == 90
    for key, value in local.items():
        assert spread[key] == pytest.approx(value, abs=1e-5) if isinstance(value, float) else True, key
    assert spread["accuracy"] == local["accuracy"] and spread["macro_f1"] == local["macro_f1"]
    answers = [
        [
            json.loads(line)["answer"]
            for line in (in_folder / name / "predictions.jsonl").open(encoding="utf-8")
        ]
        for name in ("local", "spread")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 90


def writer(in_folder: Path, session: str) -> PartWriter:
    return PartWriter(
        predictor_for, torch.get_num_threads(), Settings(), Place.of(str(in_folder / "parts")), session
    )


def asked(source: Path) -> dict[str, list[Any]]:
    with source.open("rb") as file:
        (block,) = cut_lines(str(source), bounded_lines(file), 256)
    return {"part": [7], "block": [json.dumps({"block": asdict(block), "where": str(source)})]}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_parts_of_blocks_are_the_local_output(in_folder: Path, kind: str) -> None:
    """What actors do, one block after the other in this process."""
    rows = [{"text": f"{i % 97} rocket"} for i in range(600)]
    rows[300] = {"text": ""}
    source = in_folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(source, rows)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=250)
    blocks = _cut(Place.of(str(source)), 256)
    worker = writer(in_folder, "s")
    for number, block in enumerate(blocks):
        values = json.dumps({"block": asdict(block), "where": str(source)})
        worker({"part": [number], "block": [values]})
    assert predict_file(predictor_for(), source, in_folder / "local.jsonl") == 1
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes() and len(blocks) == 3


def test_a_block_that_ends_its_workers_is_given_up(in_folder: Path) -> None:
    batch = asked(write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": ""}]))
    for number in range(MOST_ATTEMPTS):
        (in_folder / "parts").mkdir(exist_ok=True)
        (in_folder / "parts" / f"_attempt-now-000007-{number}").touch()
    with pytest.raises(ModelError, match=r"rows 0 to 1 of .*rows.jsonl ended 5 workers.*--resume"):
        writer(in_folder, "now")(batch)
    assert writer(in_folder, "later")(batch) == {"rows": [2], "bad": [1]}
    assert [part.name for part in parts(in_folder / "parts")] == ["part-000007.jsonl"]


def test_a_finished_part_is_counted_and_needs_no_model(in_folder: Path) -> None:
    batch = asked(write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": ""}]))
    writer(in_folder, "s")(batch)

    def no_model() -> Predictor:
        raise AssertionError("loaded")

    again = PartWriter(no_model, 1, Settings(), Place.of(str(in_folder / "parts")), "t")
    assert again(batch) == {"rows": [2], "bad": [1]}


def test_an_input_that_changes_meanwhile_is_noticed(in_folder: Path) -> None:
    source = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    batch = asked(source)
    write_jsonl(source, [{"text": "a, and much more of it"}])
    with pytest.raises(DataError, match="has changed"):
        writer(in_folder, "s")(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine must be local or ray"),
        ({"engine": "local", "workers": 2}, "--workers and --address need --engine ray"),
        ({}, "--engine ray needs an input file or folder, and --output"),
        ({"output": "out.jsonl", "block_rows": 300}, "must be a multiple of 256"),
        ({"output": "rows.csv"}, r"rows\.csv is a file"),
        ({"output": "parts", "resume": True}, "nothing to resume"),
        ({"output": "parts", "file": "rows.csv"}, "csv goes through the local engine"),
        ({"output": "parts", "file": "none.jsonl"}, r"none\.jsonl does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_before_ray_starts(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(spreading, "run_fingerprint_of", lambda run, changes: "fingerprint")
    monkeypatch.setattr(run_files, "files_read", lambda run: [])
    config = build_config({})
    monkeypatch.setattr(spreading, "run_info_of", lambda run: RunInfo.of(config, ("a",), ""))
    (in_folder / "rows.csv").write_text("text\na\n")
    (in_folder / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(LabeltuneError, match=message):
        predict_command(**{"run": "out", "file": "rows.jsonl", "engine": "ray", **options})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "gb18030"])
def test_columns_and_encodings_are_the_local_engines(in_folder: Path, kind: str) -> None:
    encoding = "gb18030" if kind == "gb18030" else "utf-8"
    rows = [{"key": i, "sentence": f"{i} 火箭", "other": "x"} for i in range(300)]
    (in_folder / "in").mkdir()
    source = in_folder / "in" / f"a.{kind.replace('gb18030', 'jsonl')}"
    plain = write_jsonl(
        in_folder / "in" / "b.jsonl", [{"text": "b"}] if kind != "gb18030" else [{"text": "ok"}]
    )
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), source)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        source.write_bytes(text.encode(encoding))
    folder, data = Place.of(str(in_folder / "in")), DataConfig(encoding=encoding)
    columns = columns_of_inputs(folder, "classification", data)
    assert {name: names["text"] for name, names in columns.items()} == {str(source): "sentence"}
    settings = Settings(with_text=True, encoding=encoding, columns=columns)
    worker = PartWriter(
        predictor_for, torch.get_num_threads(), settings, Place.of(str(in_folder / "parts")), "s"
    )
    number = 0
    for file in (source, plain):
        for block in _cut(Place.of(str(file)), 256, encoding):
            values = json.dumps({"block": asdict(block), "where": str(file)})
            assert worker({"part": [number], "block": [values]})["bad"] == [0]
            number += 1
        predict_file(predictor_for(), file, in_folder / f"{file.stem}.out", with_text=True, encoding=encoding)
    assert (
        joined(in_folder / "parts") == (in_folder / "a.out").read_bytes() + (in_folder / "b.out").read_bytes()
    )
    assert json.loads(joined(in_folder / "parts").splitlines()[299])["text"] == "299 火箭"


def test_ray_refuses_inputs_as_the_local_engine_does(in_folder: Path) -> None:
    """And a manifest of another reading."""
    data = DataConfig()
    source = write_jsonl(in_folder / "rows.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'text'; the file has 'body'"):
        columns_of_inputs(Place.of(str(source)), "classification", data)
    (in_folder / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read"):
        columns_of_inputs(Place.of(str(in_folder / "bad.parquet")), "classification", data)
    output = Place.of(str(in_folder / "parts"))
    mine = {"with_text": False, "encoding": "utf-8", "columns": {}}
    output.inside(MANIFEST).write(json.dumps({"blocks": []}).encode())
    assert _resumed(output, mine) == []
    for change in ({"encoding": "gb18030"}, {"columns": {"rows.jsonl": {"text": "body"}}}):
        with pytest.raises(OutputError, match=f"another {next(iter(change))};"):
            _resumed(output, {**mine, **change})
