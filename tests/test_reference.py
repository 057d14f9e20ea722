"""Run folders of version 0.1.0 are loaded, answer as they did, and go on.

`reference/runs-0.1.0.tar.xz` was written by 0.1.0 at commit a093f11: a two-layer model with random weights, a run of each task
(best and last checkpoint), a merged export, and what `labeltune predict` answered for the first six rows of each.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.rows import read_jsonl
from labeltune.config import load_config

ARCHIVE = Path(__file__).parent / "reference" / "runs-0.1.0.tar.xz"
#: run or checkpoint -> the rows and the answers of then
RUNS = {
    "runs/classification": "classification-best",
    "runs/classification/checkpoint-180": "classification-last",
    "export": "classification-export",
    "runs/ner": "ner-best",
    "runs/ner/checkpoint-50": "ner-last",
}


@pytest.fixture
def reference(in_folder: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(in_folder, filter="data")
    return in_folder


def without_figures(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer's words and places: what must be the same to the letter."""
    kept = {k: v for k, v in answer.items() if k not in ("ranking", "confidence", "entities")}
    kept["entities"] = [{k: v for k, v in e.items() if k != "score"} for e in answer.get("entities", [])]
    return kept


def figures(answer: dict[str, Any]) -> dict[str, float]:
    """An answer's probabilities and scores, by what they belong to."""
    found = {score["label"]: score["probability"] for score in answer.get("ranking", [])}
    return found | {f"{e['start_idx']}": e["score"] for e in answer.get("entities", [])}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_0_1_0_answers_as_it_did(run: str, reference: Path) -> None:
    then = read_jsonl(reference / f"predictions/{RUNS[run]}.jsonl")
    given = [
        labeltune.Example(str(number), row["text"], tuple(row.get("category", ())))
        for number, row in enumerate(read_jsonl(reference / f"rows-{RUNS[run].partition('-')[0]}.jsonl"))
    ]
    now = [prediction.to_dict() for prediction in labeltune.load_predictor(run).predict(given)]
    assert len(now) == 6
    assert [without_figures(answer) for answer in now] == [without_figures(answer) for answer in then]
    for answer, expected in zip(now, then, strict=True):
        assert figures(answer) == pytest.approx(figures(expected), abs=5e-5)


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_a_run_of_0_1_0_goes_on(task: str, reference: Path) -> None:
    config = load_config(
        Path(f"{task}.yaml"), ["training.epochs=37" if task == "classification" else "training.epochs=11"]
    )
    last = 180 if task == "classification" else 50
    result = labeltune.train(config, resume=True)
    assert result.steps == last + 5
    steps = [row["step"] for row in read_jsonl(reference / f"runs/{task}/metrics.jsonl") if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == last + 5


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_a_finished_run_of_0_1_0_has_nothing_to_do(task: str, reference: Path) -> None:
    before = {p: p.read_bytes() for p in Path(f"runs/{task}").rglob("*") if p.is_file() and p.name != ".lock"}
    labeltune.train(load_config(Path(f"{task}.yaml"), []), resume=True)
    after = {p: p.read_bytes() for p in Path(f"runs/{task}").rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
