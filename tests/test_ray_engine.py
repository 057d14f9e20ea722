"""Prediction on Ray: every row once, in its place, equal to the local engine's, whoever dies meanwhile."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
from ray import cloudpickle

import labeltune
from helpers.rows import LABELS, classification_rows, joined, parts, write_jsonl
from helpers.training import config_for
from labeltune.commands.predict import predict_command
from labeltune.config import build_config
from labeltune.errors import DataError, LabeltuneError, ModelError
from labeltune.inference import load as loading
from labeltune.inference.files import PredictOptions, predict_file
from labeltune.inference.load import load_predictor
from labeltune.inference.ray import MOST_ATTEMPTS, Cluster, ray_session, ray_workers
from labeltune.io.run_folder import RunInfo
from labeltune.io.uris import Place


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(folder))
        return labeltune.train(config_for(folder, model_folder, max_steps=1)).best


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all tests here: starting it takes longer than most of them."""
    with ray_session(cpus=2):
        yield


def workers() -> list[psutil.Process]:
    """Ray's processes that run our actors."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::Worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def killed_run(in_folder: Path, run: Path, count: int, block_rows: int) -> None:
    """Two workers, one of them killed while it works; then everything is compared with the local engine."""
    rows: list[Any] = [{"text": f"{i % 97} rocket", "category": LABELS[: 2 + i % 2]} for i in range(count)]
    rows[4] = {"text": ""}
    source = write_jsonl(in_folder / "rows.jsonl", rows)
    with source.open("a", encoding="utf-8") as file:
        file.write('\n\nno json\n{"id": "last", "text": "x"}\n')
    seen: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 600
        while not parts(in_folder / "parts") and time.monotonic() < deadline:
            time.sleep(0.02)
        victims = workers()
        victims[0].kill()
        seen.extend([len(victims), len(parts(in_folder / "parts"))])

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(typer.Exit) as ended:
        predict_command(
            str(run),
            "rows.jsonl",
            output="parts",
            top_k=2,
            engine="ray",
            workers=2,
            block_rows=block_rows,
        )
    killer.join()
    assert ended.value.exit_code == 1
    blocks = -(-(count + 2) // block_rows)
    assert seen[0] == 2 and 1 <= seen[1] < blocks, "killed too late to say anything"
    threads = torch.get_num_threads()
    # As each of the two workers: with other threads, sums differ in their last bit.
    torch.set_num_threads(1)
    try:
        with load_predictor(run, merge=True) as predictor:
            options = PredictOptions(top_k=2)
            assert predict_file(predictor, Path("rows.jsonl"), in_folder / "local.jsonl", options) == 2
    finally:
        torch.set_num_threads(threads)
    assert len(parts(in_folder / "parts")) == blocks
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes()
    ids = [json.loads(line)["id"] for line in joined(in_folder / "parts").splitlines()]
    assert ids == [*map(str, range(count)), str(count), "last"]
    assert not [name for name in Place.of("parts").files(hidden=True) if name.startswith(".")]


def test_a_killed_worker_loses_and_doubles_no_row(
    in_folder: Path, run: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_run(in_folder, run, 1_200, 256)
    assert "2 rows could not be predicted" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_none_of_20_000_rows(
    in_folder: Path, run: Path, cluster: None
) -> None:
    killed_run(in_folder, run, 20_000, 1_024)


def test_an_evaluation_is_the_local_one(in_folder: Path, run: Path, cluster: None) -> None:
    labelled = str(write_jsonl(in_folder / "labelled.jsonl", classification_rows(90)))
    local = labeltune.evaluate(run, labelled, progress=False, output="local")
    spread = labeltune.evaluate(run, labelled, progress=False, engine="ray", workers=1, output="spread")
    assert spread.keys() == local.keys() and spread["rows"] == 90
    for key, value in local.items():
        assert spread[key] == pytest.approx(value, abs=1e-5) if isinstance(value, float) else True, key
    assert spread["accuracy"] == local["accuracy"] and spread["macro_f1"] == local["macro_f1"]
    answers = [
        [
            json.loads(line)["answer"]
            for line in (in_folder / name / "predictions.jsonl").read_text("utf-8").splitlines()
        ]
        for name in ("local", "spread")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 90


def works(folder: Path, load: Any, item: Any) -> int:
    """Some item ends its worker always, some the first time, some raises what we know."""
    with (folder / f"began-{item}").open("a") as file:
        file.write("x")
    if item == "bad" or (item == "once" and (folder / "began-once").stat().st_size == 1):
        os._exit(1)
    if item == "raises":
        raise DataError("rows.jsonl:7: no")
    return len(str(item))


def test_work_that_ends_its_workers_is_given_up_and_errors_come_through(
    in_folder: Path, cluster: None
) -> None:
    nothing: Any = dict
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers import no torch for it
    function = partial(works, in_folder)
    with ray_workers(nothing, Cluster(workers=2)) as work:
        items = ["a", "once", *map(str, range(10))]
        assert sorted(work(function, items)) == sorted((item, len(item)) for item in items)
        with pytest.raises(ModelError, match=rf"bad ended {MOST_ATTEMPTS} workers.*--resume"):
            list(work(function, ["bad"]))
        with pytest.raises(DataError, match=r"^rows.jsonl:7: no$"):
            list(work(function, ["c", "raises"]))
    begun = {path.name: path.stat().st_size for path in in_folder.glob("began-*")}
    assert begun["began-bad"] == MOST_ATTEMPTS and begun["began-once"] == 2 and begun["began-a"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "--engine must be local or ray"),
        ({"engine": "local", "workers": 2}, "--workers and --address need --engine ray"),
        ({}, "--engine ray needs an input file or folder, and --output"),
        ({"output": "parts", "shard": "1/2"}, "it takes no --text and no --shard"),
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
    monkeypatch.setattr(loading, "run_fingerprint", lambda run, changes: "fingerprint")
    monkeypatch.setattr(loading, "checkpoint_of", lambda run: run)
    monkeypatch.setattr("labeltune.commands.predict.files_read", lambda run: [])
    info = RunInfo.of(build_config({}), ("a",), "")
    monkeypatch.setattr(RunInfo, "load", lambda folder: info)
    (in_folder / "rows.csv").write_text("text\na\n")
    (in_folder / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(LabeltuneError, match=message):
        predict_command(**{"run": "out", "file": "rows.jsonl", "engine": "ray", **options})
