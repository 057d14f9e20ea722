"""Sweeps: what is kept after a kill, which folders are refused, and real trials, also side by side."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import swanlab
import torch

import labeltune
from helpers import forks
from helpers.rows import classification_rows, write_jsonl
from helpers.sweeps import config_for
from labeltune.config import RunConfig, load_config
from labeltune.errors import (
    ConfigError,
    DataError,
    Interrupted,
    MissingExtraError,
    ModelError,
    OutputError,
    SweepError,
)
from labeltune.io.lock import alone_with
from labeltune.sweep.report import Trial, conclude, print_table
from labeltune.sweep.run import run_sweep, validation_metric
from labeltune.sweep.space import Sweep
from labeltune.sweep.study import Study
from labeltune.training.record import TrainResult

MEASURED_ON = "validation (used for selection)"


def result_of(loss: float | None) -> TrainResult:
    return TrainResult(Path("a"), Path("b"), 2, 0.5, "loss", loss, loss, 1.0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configs that were trained; nothing is, and the loss is least at a rate of 1e-4 and a rank of 8."""
    seen: list[RunConfig] = []

    def train(config: RunConfig, **_: Any) -> TrainResult:
        seen.append(config)
        return result_of(abs(math.log10(config.training.learning_rate) + 4) + abs(config.lora.r - 8))

    monkeypatch.setattr("labeltune.train", train)
    return seen


RATES = "training.learning_rate=1e-6..1e-2:log"


def said_nothing(_: str) -> None:
    pass


def opened(sweep: Sweep, said: list[str] | None = None) -> Study:
    sweep.folder.mkdir(exist_ok=True)
    study = Study(sweep, said_nothing if said is None else said.append)
    study.prepare()
    return study


def asked(study: Study) -> Trial:
    trial = study.ask()
    assert trial is not None
    return trial


def failed(trial: Trial) -> Trial:
    return replace(trial, state="failed", seconds=1.0, reason="out of memory")


def finished(trial: Trial, metric: str, value: float) -> Trial:
    score = -value if metric == "loss" else value
    return replace(trial, state="finished", metric=metric, value=value, score=score, seconds=1.0)


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_run_without_a_finite_metric_is_none(loss: float | None) -> None:
    with pytest.raises(SweepError):
        validation_metric(result_of(loss))
    assert validation_metric(result_of(0.25)) == ("loss", 0.25, -0.25)
    better = TrainResult(Path("a"), Path("b"), 2, 0.5, "macro_f1", 0.75, 0.25, 1.0)
    assert validation_metric(better) == ("macro_f1", 0.75, 0.75)


# What is kept


def test_a_study_finds_the_better_values_and_adds_trials(
    in_folder: Path, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(in_folder)
    with_test = config.data.model_copy(update={"test": "test.jsonl"})
    said: list[str] = []
    sweep = Sweep.of(config, [RATES, "lora.r=4,8,16"], trials=12)
    trials = run_sweep(sweep, said.append)
    assert [trial.number for trial in trials] == list(range(12)) and len(trained) == 12
    best = load_config(sweep.folder / "best.yaml")
    assert best.lora.r == 8 and best.output_dir == "out-sweep/best-run"
    least = min(trial.value or 9 for trial in trials)
    assert abs(math.log10(best.training.learning_rate) + 4) == pytest.approx(least)
    lines = [line for line in said if "loss" in line]
    assert len(lines) == 12 and all(MEASURED_ON in line for line in lines)
    assert "s left" in lines[0] and "12 of 12 done" in lines[-1] and "s left" not in lines[-1]
    with (sweep.folder / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["measured_on"] for row in rows} == {MEASURED_ON} and {row["state"] for row in rows} == {
        "finished"
    }
    assert min(float(row["value"]) for row in rows) == pytest.approx(least)
    conclude(sweep, trials)
    out = capsys.readouterr().out
    assert out.startswith(f"loss on {MEASURED_ON}") and "labeltune train out-sweep/best.yaml" in out
    assert "Equal to it" not in out and "best-run --data FILE" in out
    best_of = min(trials, key=lambda trial: trial.value or 9)
    conclude(
        replace(sweep, config=config.model_copy(update={"data": with_test})),
        [*trials, replace(best_of, number=40)],
    )
    out = capsys.readouterr().out
    assert "Equal to it are 40: the metric" in out and out.strip().endswith("best-run")
    first = (sweep.folder / "best.yaml").read_text("utf-8")
    assert MEASURED_ON in first.splitlines()[0]

    more = run_sweep(Sweep.of(config, [RATES, "lora.r=4,8,16"], trials=13), said.append)
    assert len(more) == 13 and len(trained) == 13 and more[:12] == trials


def test_the_first_trials_cover_the_range_also_side_by_side_and_after_failures(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    """What `startup_values` says, whoever asks: three workers, a stop among them, trials that fail."""
    searches = ["training.learning_rate=1e-5..1e-3:log", "lora.r=4,8"]
    sweep = Sweep.of(config_for(in_folder), searches, trials=14)
    wanted = [sweep.space.covering_values(42, n) for n in range(14)]
    rates = [str(values["training.learning_rate"]) for values in wanted]
    study = opened(sweep)
    first = [asked(study) for _ in range(3)]
    assert [trial.values["training.learning_rate"] for trial in first] == rates[:3]
    assert [trial.values["lora.r"] for trial in first] == [values["lora.r"] for values in wanted[:3]]
    assert sorted(int((math.log10(float(rate)) + 5) * 1.5) for rate in rates[:3]) == [0, 1, 2]
    study.tell(failed(first[1]))
    # Killed with two running: they are asked for again, and then the sequence goes on.
    study = opened(sweep)
    again = [asked(study) for _ in range(4)]
    assert [trial.values["training.learning_rate"] for trial in again] == [
        rates[0],
        rates[2],
        rates[3],
        rates[4],
    ]
    for trial in again:
        study.tell(failed(trial))
    # Failed trials tell the sampler nothing, so covering goes on until ten have finished.
    found = run_sweep(sweep, said_nothing)
    tried = [trial.values["training.learning_rate"] for trial in found if trial.counts]
    assert sorted(tried) == sorted(rates) and len(trained) == 9


def test_a_combination_is_not_trained_twice(in_folder: Path, trained: list[RunConfig]) -> None:
    trials = run_sweep(Sweep.of(config_for(in_folder), ["lora.r=4,8"], trials=6), said_nothing)
    assert len(trained) == 2 and len(trials) == 6
    assert {trial.value for trial in trials if trial.reason} <= {t.value for t in trials if not t.reason}
    assert sum("not trained again" in trial.reason for trial in trials) == 4


def values_of(trials: list[Trial]) -> list[dict[str, str]]:
    return [trial.values for trial in trials if trial.counts]


def test_an_interrupted_study_is_the_uninterrupted_one(
    in_folder: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first trial, in the sixth, and in the twelfth, when the sampler has left its random beginning."""
    config = config_for(in_folder)
    searches = [RATES, "lora.r=1..32"]
    whole = run_sweep(Sweep.of(config, searches, trials=12, output=Path("whole")), said_nothing)
    train = labeltune.train
    stops: list[tuple[int, BaseException]] = [
        (11, Interrupted("stopped")),
        (5, KeyboardInterrupt()),
        (0, Interrupted("stopped")),
    ]

    def stopping(config: RunConfig, **options: Any) -> TrainResult:
        if stops and stops[-1][0] == len(trained) - 12:
            Path(config.output_dir).mkdir(parents=True)
            raise stops.pop()[1]
        return train(config, **options)

    monkeypatch.setattr("labeltune.train", stopping)
    sweep = Sweep.of(config, searches, trials=12, output=Path("cut"))
    for done in (0, 5, 11):
        with pytest.raises(
            Interrupted, match=f"{done} of 12 trials are finished and kept in cut, the same command"
        ):
            run_sweep(sweep, said_nothing)
        assert len(trained) == 12 + done
    found = run_sweep(sweep, said_nothing)
    assert values_of(found) == values_of(whole)
    assert [trial.number for trial in found if trial.state == "interrupted"] == [0, 6, 13]
    assert not list(Path("cut").glob("trial-*")), "what interrupted trials left behind is gone"


def test_an_interrupted_grid_is_still_every_combination_once(
    in_folder: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8", "lora.alpha=8,16"], grid=True)
    study = opened(sweep)
    asked(study)
    study.tell(finished(asked(study), "loss", 2.0))
    # As if the process had been killed: nobody tells what came of the first one.
    trials = run_sweep(sweep, said_nothing)
    assert sorted(values_of(trials), key=str) == sorted(sweep.space.combinations(), key=str)
    assert len(trained) == 3


def test_a_trial_whose_process_dies_is_trained_once_more_and_then_named(in_folder: Path) -> None:
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8"], grid=True, workers=2)
    said: list[str] = []
    study = opened(sweep, said)
    first = asked(study)
    folder = sweep.folder / "trial-0000"
    folder.mkdir()
    assert not study.requeue(os.getpid() + 1), "the process of another trial"
    assert study.requeue(os.getpid()) and not folder.exists()
    assert said == ["trial 0 was interrupted; it is run again from its beginning"]
    study.tell(finished(asked(study), "loss", 2.0))
    again = asked(study)
    assert again.values == first.values and study.requeue(os.getpid())
    assert study.ask() is None and study.done() == 2
    assert [trial.state for trial in study.trials()] == ["interrupted", "finished", "failed"]
    assert said[-1].startswith("trial 2 failed: its process died twice (out of memory?); 2 of 2 done")
    assert "died twice" in (sweep.folder / "trials.csv").read_text("utf-8")


def test_a_folder_of_version_0_1_0_goes_on(in_folder: Path, trained: list[RunConfig]) -> None:
    """There, interrupted trials were a list, waiting values stood beside the trial, and some config keys did not exist."""
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8,16"], grid=True)
    opened(sweep)
    storage = f"sqlite:///{sweep.folder / 'study.db'}"
    kept = optuna.load_study(study_name="sweep", storage=storage).user_attrs["sweep"]
    optuna.delete_study(study_name="sweep", storage=storage)
    old = optuna.create_study(study_name="sweep", storage=storage, direction="maximize")
    old.set_user_attr("sweep", {key: value for key, value in kept.items() if key != "data.encoding"})
    for rank in ("4", "8", "16"):
        old.enqueue_trial({"lora.r": rank}, user_attrs={"values": {"lora.r": rank}})
    ranks = {"lora.r": optuna.distributions.CategoricalDistribution(("4", "8", "16"))}
    first, second = old.ask(ranks), old.ask(ranks)
    for name, value in (("metric", "loss"), ("value", 9.0), ("seconds", 1.0)):
        first.set_user_attr(name, value)
    old.tell(first, -9.0)
    old.set_user_attr("interrupted", [second.number])
    old.tell(second, state=optuna.trial.TrialState.FAIL)
    old.enqueue_trial(second.params, user_attrs={"values": second.params})
    trials = run_sweep(sweep, said_nothing)
    assert [trial.state for trial in trials] == ["finished", "interrupted", "finished", "finished"]
    assert [config.lora.r for config in trained] == [16, 8] and trials[0].value == 9.0


def test_higher_is_better_for_f1(in_folder: Path) -> None:
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8,16"], grid=True)
    study = opened(sweep)
    for value in (0.5, 0.9, 0.7):
        study.tell(finished(asked(study), "macro_f1", value))
    assert study.ask() is None
    assert load_config(sweep.folder / "best.yaml").lora.r == 8


def test_failed_trials_are_kept_with_their_reason(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, **_: Any) -> TrainResult:
        if config.lora.r == 4:
            raise ModelError("the weights\nare gone")
        if config.lora.r == 16:
            raise RuntimeError("[rank] 16 is too much")
        return result_of(math.nan if config.lora.r == 32 else 1.0)

    monkeypatch.setattr("labeltune.train", train)
    config = config_for(in_folder)
    sweep = Sweep.of(config, ["lora.r=4,8,16,32", "training.method=lora"], grid=True)
    trials = run_sweep(sweep, said_nothing)
    assert [trial.state for trial in trials] == ["failed", "finished", "failed", "failed"]
    assert trials[0].reason == "the weights are gone"
    assert trials[2].reason == "RuntimeError: [rank] 16 is too much"
    assert "Traceback" in (sweep.folder / "trial-0002" / "error.txt").read_text("utf-8")
    assert trials[3].reason == "loss is nan: the training diverged"
    print_table(sweep, trials)
    assert "RuntimeError: [rank]" in capsys.readouterr().out
    assert load_config(sweep.folder / "best.yaml").lora.r == 8

    sweep = Sweep.of(config, ["lora.r=4,16"], grid=True, output=Path("none"))
    with pytest.raises(SweepError, match="all trials failed; trial 0: the weights are gone"):
        conclude(sweep, run_sweep(sweep, said_nothing))
    assert not (sweep.folder / "best.yaml").exists()


def test_values_that_do_not_go_together_fail_their_trial_alone(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    sweep = Sweep.of(config_for(in_folder), ["training.method=lora,full", "lora.dora=true,false"], grid=True)
    trials = run_sweep(sweep, said_nothing)
    assert [trial.state for trial in trials] == ["finished", "finished", "failed", "finished"]
    assert "lora.dora and lora.rslora need training.method" in trials[2].reason and len(trained) == 3


# What is refused


def test_another_sweep_in_the_same_folder_is_refused(in_folder: Path, trained: list[RunConfig]) -> None:
    config = config_for(in_folder)
    run_sweep(Sweep.of(config, ["lora.r=4,8"], grid=True), said_nothing)
    for other, searches, options, part in (
        (config, ["lora.r=4,8,16"], {"grid": True}, "--search lora.r is 4,8 there, 4,8,16 here"),
        (config, ["lora.r=4,8"], {"trials": 2}, "--grid is True there, False here"),
        (config, ["lora.r=4,8"], {"grid": True, "seed": 1}, "--seed is 42 there, 1 here"),
        (
            config_for(in_folder, lora={"alpha": 8}),
            ["lora.r=4,8"],
            {"grid": True},
            "lora.alpha is 32 there, 8 here",
        ),
    ):
        with pytest.raises(OutputError) as caught:
            run_sweep(Sweep.of(other, searches, **options), said_nothing)  # type: ignore[arg-type]
        assert part in str(caught.value) and "--output" in str(caught.value)
    write_jsonl(in_folder / "train.jsonl", classification_rows(27))
    with pytest.raises(OutputError, match=r"the content of data\.train"):
        run_sweep(Sweep.of(config, ["lora.r=4,8"], grid=True), said_nothing)
    assert len(trained) == 2


def test_a_folder_that_cannot_be_used(in_folder: Path, trained: list[RunConfig]) -> None:
    sweep = Sweep.of(config_for(in_folder), ["lora.r=4,8"], grid=True)
    held = alone_with(sweep.folder / ".lock", "", "")
    with held, pytest.raises(OutputError, match="another sweep is running"):
        run_sweep(sweep, said_nothing)
    (sweep.folder / "study.db").write_text("this is no database, this is a page of text\n" * 100)
    with pytest.raises(OutputError, match=r"study\.db cannot be used"):
        run_sweep(sweep, said_nothing)
    (in_folder / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run_sweep(Sweep.of(config_for(in_folder), ["lora.r=4,8"], output=Path("file")), said_nothing)
    assert not trained


def test_faulty_rows_and_missing_models_stop_before_the_first_trial(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    config = config_for(in_folder)
    write_jsonl(in_folder / "train.jsonl", [*classification_rows(6), {"text": ""}])
    with pytest.raises(DataError, match="empty_field"):
        run_sweep(Sweep.of(config, ["lora.r=4,8"]), said_nothing)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        run_sweep(Sweep.of(config_for(in_folder, "nowhere"), ["lora.r=4,8"]), said_nothing)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        run_sweep(Sweep.of(config_for(in_folder), ["model=files,nowhere"]), said_nothing)
    write_jsonl(in_folder / "train.jsonl", classification_rows(2))
    with pytest.raises(ConfigError, match="no row is left for validation"):
        run_sweep(Sweep.of(config, ["lora.r=4,8"]), said_nothing)
    assert not trained and not Path("out-sweep").exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "labeltune.sweep.study")
    with pytest.raises(MissingExtraError, match=r"pip install -c constraints.txt '\.\[sweep\]'"):
        importlib.import_module("labeltune.sweep.study")


# Real runs


def test_a_grid_trains_shows_its_trials_in_one_group_and_its_best_config_trains(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    shown: list[tuple[str | None, str | None]] = []
    init = swanlab.init

    def record(**options: Any) -> Any:
        shown.append((options["group"], options["name"]))
        return init(**options)

    monkeypatch.setattr(swanlab, "init", record)
    config = config_for(
        in_folder, model_folder, tracking="swanlab", swanlab={"mode": "offline", "prediction_rows": 0}
    )
    sweep = Sweep.of(config, ["training.learning_rate=1e-5,2e-2"], grid=True)
    trials = run_sweep(sweep, said_nothing)
    assert [trial.state for trial in trials] == ["finished", "finished"]
    assert shown == [
        ("out-sweep", f"trial-000{number} training.learning_rate={rate}")
        for number, rate in enumerate(("1e-5", "2e-2"))
    ]
    assert len(list((in_folder / "swanlog").glob("run-*"))) == 2
    best = load_config(sweep.folder / "best.yaml", ["tracking=none"])
    assert best.training.learning_rate == 2e-2
    assert labeltune.train(best, say=said_nothing).validation_loss == pytest.approx(trials[1].value)


def command(folder: Path, model: Path, *options: str, **training: Any) -> list[str]:
    config = config_for(folder, model)
    raw = config.model_dump(mode="json")
    raw["training"].update(training)
    (folder / "run.yaml").write_text(json.dumps(raw), encoding="utf-8")
    return ["-m", "labeltune", "sweep", "run.yaml", *options]


def sweep_here(*searches: str, **options: Any) -> Sweep:
    return Sweep.of(load_config("run.yaml"), searches, **options)


def test_a_killed_sweep_goes_on(in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the second of two trials."""
    line = command(in_folder, model_folder, "--search", RATES, "--trials", "2", max_steps=12, epochs=12)
    process = forks.start(line)
    begun = False
    for text in process.stderr:
        begun = begun or text.startswith("trial 1: training.learning_rate")
        if begun and text.startswith("step 2/"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    kept = (in_folder / "out-sweep" / "trials.csv").read_text("utf-8").splitlines()[1]
    torch.set_num_threads(1)
    said: list[str] = []
    sweep = sweep_here(RATES, trials=2)
    trials = run_sweep(sweep, said.append)
    assert "2 trials in out-sweep, 1 of them are there already" in said[1]
    assert "trial 1 was interrupted" in said[0] and not any(line.startswith("trial 0") for line in said)
    with (in_folder / "out-sweep" / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "interrupted", "finished"]
    assert ",".join(rows[0].values()) == kept
    assert rows[1]["training.learning_rate"] == rows[2]["training.learning_rate"]
    assert load_config("out-sweep/best.yaml").training.max_steps == 12
    monkeypatch.setattr("labeltune.train", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert run_sweep(sweep, said_nothing) == trials


def test_two_workers_train_what_one_would(in_folder: Path, model_folder: Path) -> None:
    """Side by side, with a trial that fails, and one whose process is killed."""
    torch.set_num_threads(1)
    options = ("--search", "lora.target_modules=all-linear,none_such")
    line = command(in_folder, model_folder, *options, "--grid", "--workers", "2")
    sweep = sweep_here(*options[1::2], grid=True)
    process = forks.start(line)
    said = []
    for text in process.stderr:
        said.append(text)
        if text.startswith("trial 0: lora.target_modules=all-linear"):
            study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{sweep.folder / 'study.db'}")
            os.kill(study.trials[0].user_attrs["process"], signal.SIGKILL)
            break
    out, rest = process.communicate(timeout=300)
    error = "".join(said) + rest
    assert process.returncode == 0, error[-3000:]
    assert "trial 0 was interrupted; it is run again" in error
    assert "2 of 2 done" in error and "Traceback" not in error
    trials = Study(sweep, said_nothing).trials()
    assert [trial.state for trial in trials] == ["interrupted", "failed", "finished"]
    assert "none_such" in trials[1].reason
    log = (sweep.folder / "trial-0002" / "log.txt").read_text("utf-8")
    assert "validation (used for selection): loss" in log
    best = load_config(sweep.folder / "best.yaml")
    assert labeltune.train(best, say=said_nothing).validation_loss == pytest.approx(trials[2].value, rel=1e-4)
    assert MEASURED_ON in out
