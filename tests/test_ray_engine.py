"""Prediction on Ray: every row once, in its place, equal to the local engine's, whoever dies meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import LABELS, write_jsonl
from labeltune import recipes
from labeltune.inference.load import load_predictor
from labeltune.inference.stream import predict_file
from test_training import config_for

ROWS = 6_000


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


def predict(run: Path, source: str, output: str, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "labeltune",
        "predict",
        str(run),
        source,
        "-o",
        output,
        "--engine",
        "ray",
    ]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_worker_loses_and_doubles_no_row(in_folder: Path, run: Path) -> None:
    rows: list[Any] = [{"text": f"{i % 97} rocket", "category": LABELS[: 2 + i % 2]} for i in range(ROWS)]
    rows[4] = {"text": ""}
    source = write_jsonl(in_folder / "rows.jsonl", rows)
    with source.open("a", encoding="utf-8") as file:
        file.write('\n\nno json\n{"id": "last", "text": "x"}\n')
    process = predict(run, "rows.jsonl", "parts", "--workers", "2", "--block-rows", "1024", "--top-k", "2")
    deadline = time.monotonic() + 120
    while not parts(in_folder / "parts") and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    victims = workers_of(process)
    assert len(victims) == 2
    victims[0].kill()
    assert len(parts(in_folder / "parts")) < 6, "the worker was killed too late to say anything"
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "2 rows could not be predicted" in said and "Traceback" not in said
    with load_predictor(run) as predictor:
        assert predict_file(predictor, source, in_folder / "local.jsonl", top_k=2) == 2
    assert joined(in_folder / "parts") == (in_folder / "local.jsonl").read_bytes()
    assert len(joined(in_folder / "parts").splitlines()) == ROWS + 2
