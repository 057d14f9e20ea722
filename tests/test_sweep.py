"""Sweeps: what is kept after a kill, which folders are refused, and real trials, also side by side."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swanlab
import torch

from conftest import classification_rows, write_jsonl
from labeltune import recipes
from labeltune.config import RunConfig, load_config
from labeltune.errors import ConfigError, DataError, Interrupted, ModelError, OutputError, SweepError
from labeltune.folder_lock import alone_with
from labeltune.sweep import run as sweep_run
from labeltune.sweep.ledger import Ledger
from labeltune.sweep.report import Trial, print_table
from labeltune.sweep.run import conclude, run_sweep
from labeltune.sweep.search import SweepPlan, combinations, plan_sweep, startup_values
from labeltune.sweep.trial import Outcome, validation_metric
from labeltune.training.run import TrainResult
from test_sweep_search import config_for

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

    monkeypatch.setattr(recipes, "train", train)
    return seen


RATES = "training.learning_rate=1e-6..1e-2:log"


def said_nothing(_: str) -> None:
    pass


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_run_without_a_finite_metric_is_none(loss: float | None) -> None:
    with pytest.raises(SweepError):
        validation_metric(result_of(loss))
    assert validation_metric(result_of(0.25)) == ("loss", 0.25, "minimize")
    better = TrainResult(Path("a"), Path("b"), 2, 0.5, "macro_f1", 0.75, 0.25, 1.0)
    assert validation_metric(better) == ("macro_f1", 0.75, "maximize")


# What is kept


def test_a_study_finds_the_better_values_and_adds_trials(
    in_folder: Path, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(in_folder)
    said: list[str] = []
    plan = plan_sweep(config, [RATES, "lora.r=4,8,16"], trials=12)
    trials = run_sweep(plan, said.append)
    assert [trial.number for trial in trials] == list(range(12)) and len(trained) == 12
    best = load_config(plan.folder / "best.yaml")
    assert best.lora.r == 8 and best.output_dir == "out-sweep/best-run"
    least = min(trial.value or 9 for trial in trials)
    assert abs(math.log10(best.training.learning_rate) + 4) == pytest.approx(least)
    lines = [line for line in said if "loss" in line]
    assert len(lines) == 12 and all(MEASURED_ON in line for line in lines)
    assert "s left" in lines[0] and "12 of 12 done" in lines[-1] and "s left" not in lines[-1]
    with (plan.folder / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["measured_on"] for row in rows} == {MEASURED_ON} and {row["state"] for row in rows} == {
        "finished"
    }
    assert min(float(row["value"]) for row in rows) == pytest.approx(least)
    conclude(plan, trials)
    out = capsys.readouterr().out
    assert out.startswith(f"loss on {MEASURED_ON}") and "labeltune train out-sweep/best.yaml" in out
    first = (plan.folder / "best.yaml").read_text("utf-8")
    assert MEASURED_ON in first.splitlines()[0]

    more = run_sweep(plan_sweep(config, [RATES, "lora.r=4,8,16"], trials=13), said.append)
    assert len(more) == 13 and len(trained) == 13 and more[:12] == trials


def test_the_first_trials_cover_the_range_also_side_by_side_and_after_failures(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    """What `startup_values` says, whoever asks: three workers, a stop among them, trials that fail."""
    searches = ["training.learning_rate=1e-5..1e-3:log", "lora.r=4,8"]
    plan = plan_sweep(config_for(in_folder), searches, trials=14)
    wanted = [startup_values(plan.space, 42, n) for n in range(14)]
    rates = [str(values["training.learning_rate"]) for values in wanted]
    plan.folder.mkdir()
    ledger = Ledger(plan, said_nothing)
    asked = [ledger.ask() for _ in range(3)]
    assert [trial.values["training.learning_rate"] for trial in asked if trial] == rates[:3]
    assert [trial.values["lora.r"] for trial in asked if trial] == [values["lora.r"] for values in wanted[:3]]
    assert sorted(int((math.log10(float(rate)) + 5) * 1.5) for rate in rates[:3]) == [0, 1, 2]
    ledger.tell(1, Outcome(1.0, failure="out of memory"))
    # Killed with two running: they are asked for again, and then the sequence goes on.
    ledger = Ledger(plan, said_nothing)
    again = [trial for trial in (ledger.ask() for _ in range(4)) if trial]
    assert [trial.values["training.learning_rate"] for trial in again] == [
        rates[0],
        rates[2],
        rates[3],
        rates[4],
    ]
    for trial in again:
        ledger.tell(trial.number, Outcome(1.0, failure="out of memory"))
    # Failed trials tell the sampler nothing, so covering goes on until ten have finished.
    found = run_sweep(plan, said_nothing)
    tried = [trial.values["training.learning_rate"] for trial in found if trial.counts]
    assert sorted(tried) == sorted(rates) and len(trained) == 9


def test_a_combination_is_not_trained_twice(in_folder: Path, trained: list[RunConfig]) -> None:
    trials = run_sweep(plan_sweep(config_for(in_folder), ["lora.r=4,8"], trials=6), said_nothing)
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
    whole = run_sweep(plan_sweep(config, searches, trials=12, output=Path("whole")), said_nothing)
    train = recipes.train
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

    monkeypatch.setattr(recipes, "train", stopping)
    plan = plan_sweep(config, searches, trials=12, output=Path("cut"))
    for done in (0, 5, 11):
        with pytest.raises(
            Interrupted, match=f"{done} of 12 trials are finished and kept in cut, the same command"
        ):
            run_sweep(plan, said_nothing)
        assert len(trained) == 12 + done
    found = run_sweep(plan, said_nothing)
    assert values_of(found) == values_of(whole)
    assert [trial.number for trial in found if trial.state == "interrupted"] == [0, 6, 13]
    assert not list(Path("cut").glob("trial-*")), "what interrupted trials left behind is gone"


def test_an_interrupted_grid_is_still_every_combination_once(
    in_folder: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sweep(config_for(in_folder), ["lora.r=4,8", "lora.alpha=8,16"], grid=True)
    plan.folder.mkdir()
    ledger = Ledger(plan, said_nothing)
    first, second = ledger.ask(), ledger.ask()
    assert first is not None and second is not None
    ledger.tell(second.number, Outcome(1.0, "loss", 2.0, "minimize"))
    # As if the process had been killed: nobody tells what came of the first one.
    trials = run_sweep(plan, said_nothing)
    assert sorted(values_of(trials), key=str) == sorted(combinations(plan.space), key=str)
    assert len(trained) == 3


def test_higher_is_better_for_f1(in_folder: Path) -> None:
    plan = plan_sweep(config_for(in_folder), ["lora.r=4,8,16"], grid=True)
    plan.folder.mkdir()
    ledger = Ledger(plan, said_nothing)
    for value in (0.5, 0.9, 0.7):
        trial = ledger.ask()
        assert trial is not None
        ledger.tell(trial.number, Outcome(1.0, "macro_f1", value, "maximize"))
    assert ledger.ask() is None
    assert load_config(plan.folder / "best.yaml").lora.r == 8


def test_failed_trials_are_kept_with_their_reason(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, **_: Any) -> TrainResult:
        if config.lora.r == 4:
            raise ModelError("the weights\nare gone")
        if config.lora.r == 16:
            raise RuntimeError("[rank] 16 is too much")
        return result_of(math.nan if config.lora.r == 32 else 1.0)

    monkeypatch.setattr(recipes, "train", train)
    config = config_for(in_folder)
    plan = plan_sweep(config, ["lora.r=4,8,16,32", "training.method=lora"], grid=True)
    trials = run_sweep(plan, said_nothing)
    assert [trial.state for trial in trials] == ["failed", "finished", "failed", "failed"]
    assert trials[0].reason == "the weights are gone"
    assert trials[2].reason == "RuntimeError: [rank] 16 is too much"
    assert "Traceback" in (plan.folder / "trial-0002" / "error.txt").read_text("utf-8")
    assert trials[3].reason == "loss is nan: the training diverged"
    print_table(plan, trials)
    assert "RuntimeError: [rank]" in capsys.readouterr().out
    assert load_config(plan.folder / "best.yaml").lora.r == 8

    plan = plan_sweep(config, ["lora.r=4,16"], grid=True, output=Path("none"))
    with pytest.raises(SweepError, match="all trials failed; trial 0: the weights are gone"):
        conclude(plan, run_sweep(plan, said_nothing))
    assert not (plan.folder / "best.yaml").exists()


def test_values_that_do_not_go_together_fail_their_trial_alone(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    plan = plan_sweep(config_for(in_folder), ["training.method=lora,full", "lora.dora=true,false"], grid=True)
    trials = run_sweep(plan, said_nothing)
    assert [trial.state for trial in trials] == ["finished", "finished", "failed", "finished"]
    assert "lora.dora and lora.rslora need training.method" in trials[2].reason and len(trained) == 3


# What is refused


def test_another_sweep_in_the_same_folder_is_refused(in_folder: Path, trained: list[RunConfig]) -> None:
    config = config_for(in_folder)
    run_sweep(plan_sweep(config, ["lora.r=4,8"], grid=True), said_nothing)
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
            run_sweep(plan_sweep(other, searches, **options), said_nothing)  # type: ignore[arg-type]
        assert part in str(caught.value) and "--output" in str(caught.value)
    write_jsonl(in_folder / "train.jsonl", classification_rows(27))
    with pytest.raises(OutputError, match=r"the content of data\.train"):
        run_sweep(plan_sweep(config, ["lora.r=4,8"], grid=True), said_nothing)
    assert len(trained) == 2


def test_a_folder_that_cannot_be_used(in_folder: Path, trained: list[RunConfig]) -> None:
    plan = plan_sweep(config_for(in_folder), ["lora.r=4,8"], grid=True)
    held = alone_with(plan.folder / ".lock", "", "")
    with held, pytest.raises(OutputError, match="another sweep is running"):
        run_sweep(plan, said_nothing)
    (plan.folder / "study.db").write_text("this is no database, this is a page of text\n" * 100)
    with pytest.raises(OutputError, match=r"study\.db cannot be used"):
        run_sweep(plan, said_nothing)
    (in_folder / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run_sweep(plan_sweep(config_for(in_folder), ["lora.r=4,8"], output=Path("file")), said_nothing)
    assert not trained


def test_faulty_rows_and_missing_models_stop_before_the_first_trial(
    in_folder: Path, trained: list[RunConfig]
) -> None:
    config = config_for(in_folder)
    write_jsonl(in_folder / "train.jsonl", [*classification_rows(6), {"text": ""}])
    with pytest.raises(DataError, match="empty_field"):
        run_sweep(plan_sweep(config, ["lora.r=4,8"]), said_nothing)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        run_sweep(plan_sweep(config_for(in_folder, "nowhere"), ["lora.r=4,8"]), said_nothing)
    with pytest.raises(ModelError, match="nowhere does not exist"):
        run_sweep(plan_sweep(config_for(in_folder), ["model=files,nowhere"]), said_nothing)
    write_jsonl(in_folder / "train.jsonl", classification_rows(2))
    with pytest.raises(ConfigError, match="no row is left for validation"):
        run_sweep(plan_sweep(config, ["lora.r=4,8"]), said_nothing)
    assert not trained and not Path("out-sweep").exists()


@pytest.mark.parametrize(("package", "workers", "extra"), [("optuna", 1, "sweep"), ("ray", 2, "ray")])
def test_a_missing_extra_is_named(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, workers: int, extra: str
) -> None:
    find: Callable[[str], Any] = sweep_run.importlib.util.find_spec
    monkeypatch.setattr(
        sweep_run.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    plan = plan_sweep(config_for(in_folder), ["lora.r=4,8"], workers=workers)
    with pytest.raises(Exception, match=rf"pip install 'labeltune\[{extra}\]'"):
        run_sweep(plan, said_nothing)


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
    plan = plan_sweep(config, ["training.learning_rate=1e-5,2e-2"], grid=True)
    trials = run_sweep(plan, said_nothing)
    assert [trial.state for trial in trials] == ["finished", "finished"]
    assert shown == [
        ("out-sweep", f"trial-000{number} training.learning_rate={rate}")
        for number, rate in enumerate(("1e-5", "2e-2"))
    ]
    assert len(list((in_folder / "swanlog").glob("run-*"))) == 2
    best = load_config(plan.folder / "best.yaml", ["tracking=none"])
    assert best.training.learning_rate == 2e-2
    assert recipes.train(best, say=said_nothing).validation_loss == pytest.approx(trials[1].value)


def command(folder: Path, model: Path, *options: str, **training: Any) -> list[str]:
    config = config_for(folder, model)
    raw = config.model_dump(mode="json")
    raw["training"].update(training)
    (folder / "run.yaml").write_text(json.dumps(raw), encoding="utf-8")
    return [sys.executable, "-m", "labeltune", "sweep", "run.yaml", *options]


def plan_here(*searches: str, **options: Any) -> SweepPlan:
    return plan_sweep(load_config("run.yaml"), searches, **options)


def test_a_killed_sweep_goes_on(in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of the second of two trials."""
    line = command(in_folder, model_folder, "--search", RATES, "--trials", "2", max_steps=12, epochs=12)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
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
    plan = plan_here(RATES, trials=2)
    trials = run_sweep(plan, said.append)
    assert "2 trials in out-sweep, 1 of them are there already" in said[1]
    assert "trial 1 was interrupted" in said[0] and not any(line.startswith("trial 0") for line in said)
    with (in_folder / "out-sweep" / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "interrupted", "finished"]
    assert ",".join(rows[0].values()) == kept
    assert rows[1]["training.learning_rate"] == rows[2]["training.learning_rate"]
    assert load_config("out-sweep/best.yaml").training.max_steps == 12
    monkeypatch.setattr(recipes, "train", lambda *_, **__: pytest.fail("nothing is left to train"))
    assert run_sweep(plan, said_nothing) == trials


def test_two_workers_train_what_one_would(in_folder: Path, model_folder: Path) -> None:
    """Side by side, with trials that fail, and one that a killed sweep has left behind."""
    torch.set_num_threads(1)
    options = (
        "--search",
        "training.learning_rate=1e-5,2e-2",
        "--search",
        "lora.target_modules=all-linear,none_such",
    )
    line = command(in_folder, model_folder, *options, "--grid", "--workers", "2")
    plan = plan_here(*options[1::2], grid=True)
    plan.folder.mkdir()
    dead = Ledger(plan, said_nothing).ask()
    assert dead is not None and dead.number == 0
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 4 done" in done.stderr and "Traceback" not in done.stderr
    trials = Ledger(plan, said_nothing).trials()
    assert sum(trial.state == "finished" for trial in trials) == 2
    assert sum(trial.state == "failed" and "none_such" in trial.reason for trial in trials) == 2
    assert "validation (used for selection): loss" in (plan.folder / "trial-0004" / "log.txt").read_text(
        "utf-8"
    )
    best = load_config(plan.folder / "best.yaml")
    assert best.training.learning_rate == 2e-2
    value = min(trial.value for trial in trials if trial.value is not None)
    assert recipes.train(best, say=said_nothing).validation_loss == pytest.approx(value, rel=1e-4)
    assert MEASURED_ON in done.stdout
