"""`labeltune train --folds`: every row answered by a model that has not seen it, and a last model of all rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import command
from helpers.rows import classification_rows, ner_rows, read_jsonl, write_jsonl
from labeltune import load_predictor
from labeltune.commands.row_hashes import rows_seen
from labeltune.evaluation.linear import LinearModel
from labeltune.evaluation.summary import OUT_OF_FOLD, rows_line
from labeltune.inference.calibration import Calibration


def several(count: int) -> list[dict[str, Any]]:
    rows = classification_rows(count)
    return [{"text": row["text"], "labels": [row["output"]] if n % 4 else []} for n, row in enumerate(rows)]


ROWS: dict[str, Any] = {"classification": classification_rows, "multilabel": several, "ner": ner_rows}


@pytest.mark.parametrize("task", ROWS)
def test_every_row_is_answered_by_a_model_that_has_not_seen_it(
    task: str,
    in_folder: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ROWS[task](24)
    file = write_jsonl(in_folder / "rows.jsonl", rows)
    asked = ["train", "--data", str(file), "--model", str(model_folder), "--task", task, "output_dir=run"]
    asked += ["tracking=none", "training.epochs=1", "calibrate.linear=true", "--folds", "3"]
    done = command(monkeypatch, capsys, *asked)
    assert done.code == 0, done.err
    texts = {row["text"] for row in rows}
    folds = sorted(Path("run/folds").iterdir())
    learned = [{row["text"] for row in read_jsonl(fold / "train.jsonl")} for fold in folds]
    assert len(folds) == 3 and all(len(each) == 16 for each in learned) and set.union(*learned) == texts
    assert rows_seen([Path("run/best").resolve()], texts).trained == 24
    figures = json.loads(Path("run/validation/metrics.json").read_text("utf-8"))
    assert (figures["rows"], figures["rows_are"]) == (24, "training, out of fold")
    if task != "ner":  # python-crfsuite may be missing
        assert figures["floor"]["rows"] == 16
    found = {row["text"]: row for row in read_jsonl(Path("run/validation/predictions.jsonl"))}
    assert found.keys() == texts
    calibration = Calibration.load(Path("run/best"))
    for fold, known in zip(folds, learned, strict=True):
        with load_predictor(fold / "run") as predictor:
            predictor.calibration = calibration
            if calibration.linear:
                own = [row for row in rows if row["text"] in known]
                predictor.linear = LinearModel.fit(
                    [row["text"] for row in own], [row["output"] for row in own]
                )
            for answer, text in zip(
                predictor.stream(sorted(texts - known)), sorted(texts - known), strict=True
            ):
                told = found[text]
                assert told["answer"] == answer.answer
                ranking = {each["label"]: each["probability"] for each in told.get("ranking", ())}
                assert ranking == pytest.approx(dict(answer.ranking), abs=2e-6)
    again = command(monkeypatch, capsys, *asked, "--resume")
    assert again.code == 0 and again.err.count("nothing to do: all") == 1 and "fold 1" not in again.err
    assert f"24, {OUT_OF_FOLD} (each answered by a model that was not trained on it)" == rows_line(figures)
    if task == "classification":
        # As if it had been stopped before the end: after the last step, then while the second fold was trained.
        for lost in ("finished.json", "validation", "best/calibration.json"):
            path = Path("run") / lost
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = command(monkeypatch, capsys, *asked, "--resume")
        assert again.code == 0 and again.err.count("nothing to do: all") == 3, again.err
        assert json.loads(Path("run/validation/metrics.json").read_text("utf-8")) == figures
        assert Calibration.load(Path("run/best")) == calibration
        stopped = command(monkeypatch, capsys, *asked, "--overwrite", "training.max_steps=1")
        assert stopped.code == 0 and not list(Path("run").glob("checkpoint-2"))


def test_where_folds_make_no_sense(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    asked = ["train", "--data", str(file), "--model", str(model_folder), "tracking=none"]
    for changes, problem in (
        ([f"data.validation={file}", "--folds", "3"], "--folds is for runs without validation rows"),
        (["--folds", "3", "--learning-curve"], "--learning-curve and --folds are two things"),
        (["--folds", "3", "--dry-run"], "--dry-run is about one run"),
        (["--folds", "5"], "too few texts for 5 folds"),
    ):
        # Nothing was trained to find that out.
        done = command(monkeypatch, capsys, *asked, *changes)
        assert done.code == 2 and "error: " in done.err and problem in done.err, done.err
        assert not Path("output").exists() or not list(Path("output").rglob("checkpoint-*"))
    one = [*classification_rows(1), *({"text": f"paint {n}", "output": "Art"} for n in range(6))]
    write_jsonl(file, [{"text": row["text"], "output": row["output"]} for row in one])
    done = command(monkeypatch, capsys, *asked, "--folds", "3")
    assert done.code == 2 and "too few texts for 3 folds" in done.err, done.err
