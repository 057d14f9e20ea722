"""The trials of a sweep, kept by Optuna in SQLite. One process writes, so a sweep can be killed at any moment and go on."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from labeltune.config import config_keys
from labeltune.errors import OutputError, first_line
from labeltune.run_folder import file_hash
from labeltune.sweep.report import State, Trial, best_trial, figure, write_results
from labeltune.sweep.search import (
    STARTUP_TRIALS,
    Choices,
    Dimension,
    SweepPlan,
    combinations,
    startup_values,
)
from labeltune.sweep.trial import Outcome, trial_name

Say = Callable[[str], None]

#: Keys that change where a run is kept and shown, not what comes of it.
_ELSEWHERE = ("output_dir", "tracking", "hub.cache_dir", "hub.accept_license", "swanlab.", "data.test")
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


class Ledger:
    """Says which trial comes next, and writes down what came of it.

    The caller sees to it that no other process uses the folder: then a trial that is running when the ledger is opened
    belongs to a process that has died.

    Raises:
        OutputError: the folder holds a sweep of other values, or its database cannot be read.
    """

    def __init__(self, plan: SweepPlan, say: Say) -> None:
        self.plan, self.say = plan, say
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = plan.folder / "study.db"
        try:
            # Which way is better is known when the first trial has ended; until then the study needs a direction, so it
            # keeps scores: the metric, negated where less is better.
            self.study = optuna.create_study(
                storage=f"sqlite:///{path}", study_name="sweep", direction="maximize", load_if_exists=True
            )
        except Exception as error:
            raise OutputError(f"{path} cannot be used: {first_line(error)}") from error
        self.space = {dimension.key: _distribution(dimension) for dimension in plan.space}
        self._running: dict[int, Any] = {}
        self._check_same_sweep()
        self.release()
        if plan.grid:
            self._enqueue_grid()

    def trials(self) -> list[Trial]:
        """All trials so far, those of earlier calls included."""
        interrupted = set(self.study.user_attrs.get("interrupted", []))
        return [self._view(kept, interrupted) for kept in self.study.get_trials(deepcopy=False)]

    def _view(self, kept: FrozenTrial, interrupted: set[int]) -> Trial:
        state, notes = _STATES[kept.state], kept.user_attrs
        if state == "failed" and kept.number in interrupted:
            state = "interrupted"
        params = kept.params or notes.get("values", {})
        values = {d.key: _text(d, params[d.key]) for d in self.plan.space if d.key in params}
        if state not in ("finished", "failed"):
            return Trial(kept.number, state, values)
        return Trial(
            kept.number,
            state,
            values,
            notes.get("metric"),
            notes.get("value"),
            kept.value,
            notes.get("seconds"),
            notes.get("reason", ""),
        )

    def ask(self) -> Trial | None:
        """The next trial to train, or None when as many as were asked for are finished or running.

        A sample that has been tried already is not trained again: the same config gives the same run.
        """
        while True:
            trials = self.trials()
            begun = sum(trial.counts or trial.state == "running" for trial in trials)
            if begun >= self.plan.trials:
                return None
            finished = sum(trial.state == "finished" for trial in trials)
            if not self.plan.grid and finished < STARTUP_TRIALS:
                # Values that wait, of an interrupted trial, go first.
                if not any(trial.state == "waiting" for trial in trials):
                    drawn = startup_values(self.plan.space, self.plan.seed, begun)
                    self.study.enqueue_trial(drawn, user_attrs={"values": drawn})
            else:
                self.study.sampler = self._sampler(begun)
            asked = self.study.ask(self.space)
            self._running[asked.number] = asked
            values = {d.key: _text(d, asked.params[d.key]) for d in self.plan.space}
            twin = next((trial for trial in trials if trial.counts and trial.values == values), None)
            if twin is None:
                return Trial(asked.number, "running", values)
            self._copy(twin, asked.number)

    def _sampler(self, begun: int) -> optuna.samplers.BaseSampler:
        """A sampler of its own for each trial: what it draws depends on the trials before it, not on when the sweep was
        killed and started again. Running trials count as bad ones, so that no two workers try the same."""
        state = numpy.random.SeedSequence([self.plan.seed, begun]).generate_state(1)
        with warnings.catch_warnings():
            # Optuna 4 calls constant_liar experimental; Optuna 5 has it on.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=int(state[0]), n_startup_trials=STARTUP_TRIALS, constant_liar=True
            )

    def _copy(self, twin: Trial, number: int) -> None:
        asked = self._running.pop(number)
        asked.set_user_attr("reason", f"the values of trial {twin.number}, not trained again")
        if twin.score is None:
            self.study.tell(asked, state=TrialState.FAIL)
        else:
            asked.set_user_attr("metric", twin.metric)
            asked.set_user_attr("value", twin.value)
            self.study.tell(asked, twin.score)
        self.say(f"trial {number} has the values of trial {twin.number} and is not trained again")
        write_results(self.plan, self.trials())

    def tell(self, number: int, outcome: Outcome) -> None:
        """Keep what came of a trial, write the results anew, and say how things stand."""
        asked = self._running.pop(number)
        reason = outcome.failure
        known = next((trial.metric for trial in self.trials() if trial.metric is not None), outcome.metric)
        if reason is None and outcome.metric != known:
            reason = f"it was measured by {outcome.metric}, the others by {known}"
        asked.set_user_attr("seconds", outcome.seconds)
        if reason is not None or outcome.value is None:
            asked.set_user_attr("reason", reason or "no metric")
            self.study.tell(asked, state=TrialState.FAIL)
        else:
            asked.set_user_attr("metric", outcome.metric)
            asked.set_user_attr("value", outcome.value)
            self.study.tell(asked, outcome.value if outcome.direction == "maximize" else -outcome.value)
        trials = self.trials()
        write_results(self.plan, trials)
        self._report(trials[number], trials)

    def _report(self, trial: Trial, trials: list[Trial]) -> None:
        done = sum(other.counts for other in trials)
        line = f"trial {trial.number} failed: {trial.reason}"
        if trial.state == "finished":
            line = f"trial {trial.number}: {figure(trial)}, {trial.seconds:.0f} s"
        line += f"; {done} of {self.plan.trials} done"
        best = best_trial(trials)
        if best is not None:
            line += f", the best is trial {best.number} with {best.value:.4f}"
        seconds = [other.seconds for other in trials if other.counts and other.seconds is not None]
        left = self.plan.trials - done
        if left:
            line += f", about {left * sum(seconds) / len(seconds) / min(self.plan.workers, left):.0f} s left"
        self.say(line)

    def release(self) -> None:
        """Mark running trials as interrupted, and put their values in front of what is sampled next."""
        stale = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not stale:
            return
        self._running.clear()
        numbers = {*self.study.user_attrs.get("interrupted", []), *(kept.number for kept in stale)}
        self.study.set_user_attr("interrupted", sorted(numbers))
        for kept in stale:
            self.study.tell(kept.number, state=TrialState.FAIL)
            shutil.rmtree(self.plan.folder / trial_name(kept.number), ignore_errors=True)
            # A process that died while it was drawing the values has left some of them out; they are drawn anew.
            if len(kept.params) == len(self.space):
                self.study.enqueue_trial(kept.params, user_attrs={"values": kept.params})
                self.say(f"trial {kept.number} was interrupted; it is run again from its beginning")

    def _enqueue_grid(self) -> None:
        """Queue the combinations that are not there yet: all of them, unless an earlier call was killed meanwhile."""
        present = [trial.values for trial in self.trials() if trial.state != "interrupted"]
        for values in combinations(self.plan.space):
            if values not in present:
                self.study.enqueue_trial(dict(values), user_attrs={"values": values})

    def _check_same_sweep(self) -> None:
        mine, kept = _fingerprint(self.plan), self.study.user_attrs.get("sweep")
        if kept is None and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("sweep", mine)
            return
        kept = kept or {}
        names = sorted(name for name in {*mine, *kept} if mine.get(name) != kept.get(name))
        if names:
            shown = "; ".join(
                f"{name} is {kept.get(name, 'not set')} there, {mine.get(name, 'not set')} here"
                for name in names[:3]
            )
            raise OutputError(
                f"{self.plan.folder} holds another sweep ({shown}); give this one another --output, or delete that folder"
            )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.texts)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _text(dimension: Dimension, value: Any) -> str:
    return str(value) if isinstance(dimension, Choices) else repr(value)


def _fingerprint(plan: SweepPlan) -> dict[str, str]:
    """All that decides what the trials are, by name."""
    searched = {dimension.key: str(dimension) for dimension in plan.space}
    found = {f"--search {key}": text for key, text in searched.items()}
    found |= {"--grid": str(plan.grid), "--seed": str(plan.seed)}
    raw = plan.config.model_dump(mode="json")
    for key, *_ in config_keys():
        if key in searched or key.startswith(_ELSEWHERE):
            continue
        value: Any = raw
        for part in key.split("."):
            value = value[part]
        found[key] = json.dumps(value, ensure_ascii=False)
    for key, name in (
        ("data.train", plan.config.data.train),
        ("data.validation", plan.config.data.validation),
    ):
        if name is not None and Path(name).is_file():
            found[f"the content of {key}"] = file_hash(Path(name))[:12]
    return found
