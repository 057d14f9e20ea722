"""The figure that picks the checkpoint: computed in training as `evaluate` does, and never taken for a test figure."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import labeltune
from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.training import config_for, logged
from labeltune.commands import train as train_page
from labeltune.commands.preparing import validation_rows, warn_of_rows
from labeltune.commands.train import where_time_went
from labeltune.config import RunConfig, load_config
from labeltune.data.loading import load_splits
from labeltune.errors import ConfigError, DataError, ModelError
from labeltune.evaluation.summary import rows_line
from labeltune.io import progress
from labeltune.training.checkpoints import write_manifest

SELECTION = "validation (used for selection)"


def with_validation(folder: Path, model: Path, task: str = "classification", **training: Any) -> RunConfig:
    """A run with a validation file of its own, which `evaluate` can be given too."""
    config = config_for(folder, model, task, **training)
    rows = classification_rows(40)[24:] if task == "classification" else ner_rows(30)[18:]
    for i, row in enumerate(rows):
        row["text"] += f" held out {i}"
    path = write_jsonl(folder / "validation.jsonl", rows)
    return config.model_copy(update={"data": config.data.model_copy(update={"validation": str(path)})})


def history(run: Path) -> list[dict[str, Any]]:
    """What Trainer logged at every validation."""
    return logged(run, "eval_loss")


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_figure_in_training_is_that_of_evaluate_and_picks_the_best(
    task: str, in_folder: Path, model_folder: Path
) -> None:
    metric = "macro_f1" if task == "classification" else "span_f1"
    config = with_validation(
        in_folder, model_folder, task, max_steps=6, save_steps=2, save_total_limit=9, learning_rate=0.01
    )
    result = labeltune.train(config)
    logged = {entry["step"]: entry[f"eval_{metric}"] for entry in history(result.last)}
    assert sorted(logged) == [2, 4, 6]
    assert config.data.validation is not None
    for step, value in logged.items():
        checkpoint = result.last.parent / f"checkpoint-{step}"
        found = labeltune.evaluate(checkpoint, config.data.validation, progress=False)
        assert found[metric]["value"] == value
    losses = {entry["step"]: entry["eval_loss"] for entry in history(result.last)}
    best = min(
        (step for step, value in logged.items() if value == max(logged.values())), key=losses.__getitem__
    )
    assert result.best.resolve().name == f"checkpoint-{best}"
    assert (result.metric_name, result.metric) == (metric, logged[best])
    assert result.validation_loss == losses[best]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_bf16_a_run_predicts_as_a_fresh_predictor_does(
    method: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all weights are trained, which are kept in fp32: bf16 would lose small updates."""
    seen: list[Any] = []
    plain = train_page.Validate.__call__

    def watched(self: train_page.Validate) -> dict[str, float]:
        seen.append(self.predictor.scores([row.text for row in self.rows[:8]]))
        return plain(self)

    monkeypatch.setattr(train_page.Validate, "__call__", watched)
    config = with_validation(
        in_folder,
        model_folder,
        max_steps=3,
        save_steps=3,
        learning_rate=1e-3,
        precision="bf16",
        method=method,
    )
    result = labeltune.train(config)
    texts = [
        json.loads(line)["text"] for line in (in_folder / "validation.jsonl").read_text("utf-8").splitlines()
    ]
    with labeltune.load_predictor(result.last, precision="bf16", device="cpu") as predictor:
        assert predictor.model.dtype == torch.bfloat16
        assert (predictor.scores(texts[:8]) == seen[-1]).all()
    if method == "full":
        assert {t.dtype for t in load_file(result.last / "model.safetensors").values()} == {torch.float32}


def test_what_chose_is_never_called_a_test_figure(in_folder: Path, model_folder: Path) -> None:
    config = with_validation(in_folder, model_folder, max_steps=2, save_steps=1)
    said: list[str] = []
    result = labeltune.train(config, say=said.append)
    assert config.data.validation is not None
    on_validation = labeltune.evaluate(result.best, config.data.validation, progress=False)
    assert (on_validation["rows_are"], on_validation["selection_rows"]) == (SELECTION, 16)
    test = write_jsonl(
        in_folder / "test.jsonl", [{**row, "text": row["text"] + " new"} for row in classification_rows(6)]
    )
    assert labeltune.evaluate(result.best, str(test), progress=False)["rows_are"] == "test"
    mixed = in_folder / "mixed.jsonl"
    mixed.write_text(test.read_text() + Path(config.data.validation).read_text().splitlines()[0] + "\n")
    assert labeltune.evaluate(result.best, str(mixed), progress=False)["selection_rows"] == 1
    folder = in_folder / "out" / "validation"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rows_are"] == SELECTION and metrics["rows"] == 16
    assert SELECTION in (folder / "report.html").read_text(encoding="utf-8")
    assert metrics["macro_f1"]["value"] == result.metric
    assert any(SELECTION in line and "report.html" in line for line in said)
    (result.best / "selection.u64").write_bytes(b"12345")
    with pytest.raises(ModelError, match=r"selection\.u64 is damaged"):
        labeltune.evaluate(result.best, str(test), progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run with a validation file of its own, `validation.jsonl` beside `out`; its rows are in `classification.jsonl`."""
    folder = tmp_path_factory.mktemp("trained")
    labeltune.train(with_validation(folder, model_folder, max_steps=2, save_steps=1))
    return folder / "out"


def test_a_run_remembers_the_rows_it_was_trained_on(trained: Path, in_folder: Path) -> None:
    lines = [
        trained.with_name(name).read_text(encoding="utf-8").splitlines()
        for name in ("classification.jsonl", "validation.jsonl")
    ]
    new = json.dumps({**classification_rows(1)[0], "text": "rows that are new"})
    kinds = {
        "40 (36 of them trained on, 4 used for selection)": [*lines[0][:36], *lines[1][:4]],
        "4 (3 of them trained on)": [*lines[0][:3], new],
        "3 (2 of them used for selection)": [*lines[1][:2], new],
        "1, test (none seen in training)": [new],
    }
    for said, rows in kinds.items():
        Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        metrics = labeltune.evaluate(trained, "rows.jsonl", output="figures", progress=False)
        assert rows_line(metrics) == said
        page = Path("figures/report.html").read_text(encoding="utf-8")
        seen = "" if said.endswith("training)") else ' class="bad"'
        assert f'<b id="seen"{seen}>' in page and f"rows: {said}" in page
        assert (
            json.loads(Path("figures/metrics.json").read_text())["training_rows"] == metrics["training_rows"]
        )
    Path("rows.jsonl").write_text("\n".join(kinds["4 (3 of them trained on)"]) + "\n", encoding="utf-8")
    compared = labeltune.compare("base", trained, "rows.jsonl", output="compared", progress=False)
    assert rows_line(compared) == "4 (3 of them trained on)"
    assert "rows: 4 (3 of them trained on)" in Path("compared/comparison.html").read_text(encoding="utf-8")
    # A run of labeltune 0.1.0 does not know.
    shutil.copytree(trained / "best", "old")
    Path("old/training.u64").unlink()
    metrics = labeltune.evaluate("old", "rows.jsonl", progress=False)
    assert metrics["training_rows"] is None
    assert rows_line(metrics) == "4, test (whether training saw them is not known)"


def test_labels_that_a_run_cannot_answer_are_faults(trained: Path, in_folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one", "output": "sports"},
        {"text": "two", "output": "Space"},
        {"text": "three", "output": "Zoo"},
    ]
    path = write_jsonl(in_folder / "test.jsonl", rows)
    said = rf"2 errors:\n  {path}:1: error: unknown_label: 'sports' is not among the labels of .*; did you mean 'Sports'\?"
    for measure in (labeltune.evaluate, lambda *a, **k: labeltune.compare("base", *a, **k)):
        with pytest.raises(DataError, match=said):
            measure(trained, str(path), progress=False)
    found = labeltune.evaluate(trained, str(path), on_error="skip", progress=False)
    assert (found["rows"], found["skipped"]) == (1, {"unknown_label": 2})
    assert rows_line(found) == "1, test (none seen in training); skipped: unknown_label 2"
    assert labeltune.compare("base", trained, str(path), on_error="skip", progress=False)["rows"] == 1
    own = write_jsonl(in_folder / "own.jsonl", [{"text": "a", "category": ["Zoo", "Sea"], "output": "Zoo"}])
    assert labeltune.evaluate(trained, str(own), progress=False)["rows"] == 1
    entities = write_jsonl(in_folder / "ner.jsonl", ner_rows(3))
    with pytest.raises(DataError, match=r"1 error:\n.*wrong_task: these are rows for task=ner"):
        labeltune.evaluate(trained, str(entities), progress=False)


def test_the_rows_are_looked_at_before_any_weight_is_loaded(
    trained: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeltune.inference.load.load_model", lambda *_, **__: pytest.fail("loaded"))
    for measure in (labeltune.evaluate, lambda *a, **k: labeltune.compare(trained, *a, **k)):
        with pytest.raises(DataError, match="does not exist"):
            measure(trained, "missing.jsonl", progress=False)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validations give these figures, one after the other."""
    left = iter(values)
    monkeypatch.setattr(train_page, "headline", lambda *_: {"macro_f1": next(left), "accuracy": 0.0})


def stopping(config: RunConfig, patience: int, min_delta: float = 0.0) -> RunConfig:
    return config.model_copy(
        update={"eval": config.eval.model_copy(update={"patience": patience, "min_delta": min_delta})}
    )


@pytest.mark.parametrize(
    ("values", "min_delta", "last", "best"),
    [
        ([0.1, 0.5, 0.4, 0.4, 0.9], 0.0, 4, 2),
        ([0.1, 0.5, 0.4, 0.6, 0.5, 0.4, 0.9], 0.0, 6, 4),
        ([0.1, 0.11, 0.12, 0.9], 0.05, 3, 3),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0.0, 6, 6),
    ],
)
def test_training_stops_when_it_no_longer_improves(
    values: list[float],
    min_delta: float,
    last: int,
    best: int,
    in_folder: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_validation(in_folder, model_folder, max_steps=6, save_steps=1, save_total_limit=9)
    scripted(monkeypatch, values)
    result = labeltune.train(stopping(config, 2, min_delta))
    assert (result.steps, result.best.resolve().name) == (last, f"checkpoint-{best}")


@pytest.mark.parametrize("kept_by", ["this version", "0.1.0"])
def test_a_resumed_run_goes_on_counting(
    kept_by: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopping(with_validation(in_folder, model_folder, max_steps=3, save_steps=1), 2)
    scripted(monkeypatch, [0.5, 0.6, 0.4])
    last = labeltune.train(config).last
    if kept_by == "0.1.0":  # transformers' own callback counted
        file = last / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        assert state["stateful_callbacks"].pop("TrackBest") == {"args": {}, "attributes": {"unimproved": 1}}
        state["stateful_callbacks"]["EarlyStoppingCallback"] = {
            "args": {"early_stopping_patience": 2, "early_stopping_threshold": 0.0},
            "attributes": {"early_stopping_patience_counter": 1},
        }
        file.write_text(json.dumps(state), encoding="utf-8")
        write_manifest(last)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 8})})
    scripted(monkeypatch, [0.4, 0.9])
    result = labeltune.train(longer, resume=True)
    assert (result.steps, result.best.resolve().name, result.metric) == (4, "checkpoint-2", 0.6)


def test_a_validation_at_every_epoch(in_folder: Path, model_folder: Path) -> None:
    config = with_validation(in_folder, model_folder, epochs=2, save_steps="epoch", batch_size=8)
    result = labeltune.train(config)
    assert [entry["step"] for entry in history(result.last)] == [6, 12]


def test_the_loss_can_pick_the_best(in_folder: Path, model_folder: Path) -> None:
    config = with_validation(in_folder, model_folder, max_steps=2, save_steps=1)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"metric": "loss"})})
    result = labeltune.train(config)
    assert (result.metric_name, result.metric) == ("loss", result.validation_loss)


def test_the_measured_rows_are_stratified_and_the_same_every_time(in_folder: Path) -> None:
    rows = [
        {"text": f"t{i}", "category": LABELS, "output": LABELS[0 if i % 10 else 1 + i % 20 // 10]}
        for i in range(200)
    ]
    train = write_jsonl(in_folder / "train.jsonl", rows)
    held_out = write_jsonl(in_folder / "v.jsonl", [{**row, "text": row["text"] + "v"} for row in rows])
    config = load_config(None, [f"data.train={train}", f"data.validation={held_out}"])
    splits = load_splits(config.task, config.data, config.hub, 0)
    found = validation_rows(splits, 40)
    assert [row.label for row in found].count(LABELS[0]) == 36
    assert {row.label for row in found} == set(LABELS)
    assert found == validation_rows(splits, 40)
    assert validation_rows(splits, 200) == validation_rows(splits, 500)
    assert len(validation_rows(splits, 500)) == 200


def test_a_metric_of_the_other_task_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="span_f1 is not measured for classification; it has macro_f1, accuracy"
    ):
        load_config(None, ["eval.metric=span_f1"])
    with pytest.raises(ConfigError, match=r"did you mean 'training\.save_steps'"):
        load_config(None, ["training.eval_steps=10"])


def test_what_will_disappoint_is_said_before_training(in_folder: Path, model_folder: Path) -> None:
    said: list[str] = []

    def told(config: RunConfig) -> list[str]:
        said.clear()
        splits = load_splits(config.task, config.data, config.hub, 0)
        warn_of_rows(config, splits, validation_rows(splits, 100), said.append)
        return said

    empty = [{"text": f"nothing here {i}", "entities": []} for i in range(4)]
    path = str(write_jsonl(in_folder / "empty.jsonl", empty))
    config = with_validation(in_folder, model_folder, "ner")
    assert told(config) == []
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": path})})
    assert told(config) == [
        "warning: none of the 4 validation rows holds an entity, and span_f1 on them picks `best`; name rows with entities as "
        "data.validation, or set eval.metric=loss"
    ]
    by_loss = config.model_copy(update={"eval": config.eval.model_copy(update={"metric": "loss"})})
    assert told(by_loss) == []
    rows = [{"text": f"今天的比赛 {i}", "output": "体育艺术"[i % 2 * 2 :][:2]} for i in range(8)]
    file = write_jsonl(in_folder / "zh.jsonl", rows)
    changes = [f"data.train={file}", "model=pocket", "training.learning_rate=1e-3"]
    chinese = load_config(None, changes)
    assert [line.split(";")[0] for line in told(chinese)] == [
        "warning: pocket reads Chinese, and most other scripts, byte by byte, and learns little of them"
    ]
    assert told(chinese.model_copy(update={"model": "pocket-zh"})) == []
    assert told(load_config(None, [changes[0], "model=pocket-zh"])) == [
        "note: pocket-zh is small and learns with training.learning_rate=auto; the default is for large models"
    ]


def test_no_phase_is_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENCE", 0.2)
    monkeypatch.setattr(progress, "SLOW", 0.2)
    said: list[str] = []

    def wait_for(line: str) -> None:
        until = time.monotonic() + 60
        while not said[-1].startswith(line) and time.monotonic() < until:
            time.sleep(0.02)
        assert said[-1].startswith(line)

    with progress.no_long_silence(said.append):
        progress.begin("loading the model", said.append)
        assert said == ["loading the model"]
        wait_for("... loading the model (")
        with progress.bar_shown():
            before = len(said)
            time.sleep(0.5)
            assert len(said) == before, "a bar says enough"
        progress.begin("in step 1 of 2")
        wait_for("... in step 1 of 2 (")


def test_a_training_says_where_its_time_went() -> None:
    assert (
        where_time_went(100.0, 90.0, 50.0, 8.0)
        == "training 42 s, loading and checks 40 s, validation 8 s, confidence and report 10 s"
    )
    assert where_time_went(100.0, 80.4, 80.0, 0.2) == "training 80 s, confidence and report 20 s"


def test_a_training_says_its_phases_and_what_comes_next(in_folder: Path, model_folder: Path) -> None:
    config = with_validation(in_folder, model_folder, max_steps=2, save_steps=2)
    said: list[str] = []
    labeltune.train(config, say=said.append, command="labeltune train c.yaml")
    phases = ["loading the model", "checking whether packed rows compute what single rows do"]
    phases += ["predicting 16 validation rows with the best checkpoint"]
    assert [line for line in said if line in phases] == phases
    assert re.match(r"done in \d+ s \(training \d+ s(, [a-z ]+ \d+ s)*\): ", said[-5])
    assert said[-4:] == [
        "go on with:",
        f"  labeltune evaluate {config.output_dir} --data FILE",
        f'  labeltune predict {config.output_dir} --text "..."',
        f"  labeltune serve {config.output_dir}",
    ]
