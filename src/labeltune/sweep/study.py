"""The study of a sweep: which trial is next, and what came of it. Optuna keeps it in its own storage (SQLite), which all
worker processes share."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy
from filelock import FileLock

from labeltune.config import KEPT_AND_SHOWN, config_keys, is_among, leaves
from labeltune.errors import MissingExtraError, OutputError, first_line
from labeltune.io.outputs import file_hash
from labeltune.io.progress import Say
from labeltune.sweep.report import State, Trial, best_trial, figure, write_results
from labeltune.sweep.space import STARTUP_TRIALS, Choices, Dimension, Sweep, Value

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise MissingExtraError("labeltune sweep", "sweep") from error


#: How often a trial is trained again after the process that trained it has died.
DEATHS_FORGIVEN = 1
_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


class Study:
    """An Optuna study that several processes work on: each opens its own `Study` of the same folder.

    `ask` and `tell` take turns by a lock in the folder, so that no two processes draw the same values or begin the last
    trial twice. Optuna's heartbeat is not needed: the parent of the workers is told at once when one dies.

    Raises:
        OutputError: the database cannot be read.
    """

    def __init__(self, sweep: Sweep, say: Say) -> None:
        self.sweep, self.say = sweep, say
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = sweep.folder / "study.db"
        try:
            # Which way is better is known when the first trial has ended; until then the study needs a direction, so it
            # keeps scores: the metric, negated where less is better.
            self._study = optuna.create_study(
                storage=f"sqlite:///{path}", study_name="sweep", direction="maximize", load_if_exists=True
            )
        except Exception as error:
            raise OutputError(f"{path} cannot be used: {first_line(error)}") from error
        self._distributions = {d.key: _distribution(d) for d in sweep.space.dimensions}
        self._turn = FileLock(sweep.folder / "turn.lock")
        self._running: dict[int, optuna.Trial] = {}

    def prepare(self) -> None:
        """Before the first trial of a call, while no other process works on the study: queue what a killed call has left
        running, and a grid's combinations.

        Raises:
            OutputError: the folder holds a sweep of other values.
        """
        self._check_same_sweep()
        self.requeue()
        if self.sweep.grid:
            present = [trial.values for trial in self.trials() if trial.state != "interrupted"]
            for values in self.sweep.space.combinations():
                if values not in present:
                    self._enqueue(values)

    def trials(self) -> list[Trial]:
        """All trials so far, those of earlier calls included."""
        found = self._study.get_trials(deepcopy=False)
        # What was interrupted has been queued anew; a sweep of version 0.1.0 kept a list.
        again = {number for kept in found for number in kept.system_attrs.get("retry_history", [])}
        again |= set(self._study.user_attrs.get("interrupted", []))
        return [self._view(kept, again) for kept in found]

    def _view(self, kept: FrozenTrial, again: set[int]) -> Trial:
        state, notes = _STATES[kept.state], kept.user_attrs
        params = kept.params or notes.get("values", {})
        if state == "failed" and (kept.number in again or len(params) < len(self._distributions)):
            state = "interrupted"
        values = {d.key: str(params[d.key]) for d in self.sweep.space.dimensions if d.key in params}
        if state not in ("finished", "failed"):
            return Trial(kept.number, state, values)
        reason = notes.get("reason", "" if state == "finished" else "its process died twice (out of memory?)")
        metric, value, seconds = notes.get("metric"), notes.get("value"), notes.get("seconds")
        return Trial(kept.number, state, values, metric, value, kept.value, seconds, reason)

    def done(self) -> int:
        """How many trials are finished or have failed."""
        return sum(trial.counts for trial in self.trials())

    def ask(self) -> Trial | None:
        """The next trial to train, or None when as many as were asked for are finished or running.

        A sample that has been tried already is not trained again: the same config gives the same run.
        """
        with self._turn:
            while True:
                trials = self.trials()
                begun = sum(trial.counts or trial.state == "running" for trial in trials)
                if begun >= self.sweep.trials:
                    return None
                finished = sum(trial.state == "finished" for trial in trials)
                # Values that wait, of an interrupted trial or a grid, go first.
                if not any(trial.state == "waiting" for trial in trials) and finished < STARTUP_TRIALS:
                    self._enqueue(self.sweep.space.covering_values(self.sweep.seed, begun))
                self._study.sampler = self._sampler(begun)
                asked = self._study.ask(self._distributions)
                asked.set_user_attr("process", os.getpid())
                self._running[asked.number] = asked
                values = {d.key: str(asked.params[d.key]) for d in self.sweep.space.dimensions}
                twin = next((trial for trial in trials if trial.counts and trial.values == values), None)
                if twin is None:
                    return Trial(asked.number, "running", values)
                reason = f"the values of trial {twin.number}, not trained again"
                self.tell(replace(twin, number=asked.number, seconds=None, reason=reason))

    def _sampler(self, begun: int) -> optuna.samplers.BaseSampler:
        """A sampler of its own for each trial: what it draws depends on the trials before it, not on when the sweep was
        killed and started again. Running trials count as bad ones, so that no two workers try the same."""
        state = numpy.random.SeedSequence([self.sweep.seed, begun]).generate_state(1)
        return optuna.samplers.TPESampler(seed=int(state[0]), n_startup_trials=STARTUP_TRIALS)

    def _enqueue(self, values: Mapping[str, Value]) -> None:
        waiting = {"state": TrialState.WAITING, "distributions": self._distributions}
        self._study.add_trial(optuna.trial.create_trial(params=dict(values), **waiting))

    def tell(self, trial: Trial) -> None:
        """Keep a trial of this process that is finished or has failed, write the results anew, and say how things stand."""
        with self._turn:
            known = next((t.metric for t in self.trials() if t.metric is not None), trial.metric)
            if trial.score is not None and trial.metric != known:
                reason = f"it was measured by {trial.metric}, the others by {known}"
                trial = Trial(trial.number, "failed", trial.values, seconds=trial.seconds, reason=reason)
            asked = self._running.pop(trial.number)
            for name in ("metric", "value", "seconds", "reason"):
                asked.set_user_attr(name, getattr(trial, name))
            state = TrialState.FAIL if trial.score is None else TrialState.COMPLETE
            self._study.tell(asked, trial.score, state)
            self._report(trial.number)

    def _report(self, number: int) -> None:
        trials = self.trials()
        write_results(self.sweep, trials)
        trial, done = trials[number], sum(other.counts for other in trials)
        line = f"trial {number} failed: {trial.reason}"
        if trial.reason.startswith("the values of"):
            line = f"trial {number} has {trial.reason}"
        elif trial.state == "finished":
            line = f"trial {number}: {figure(trial)}, {trial.seconds:.0f} s"
        line += f"; {done} of {self.sweep.trials} done"
        best = best_trial(trials)
        if best is not None:
            line += f", the best is trial {best.number} with {best.value:.4f}"
        seconds = [other.seconds for other in trials if other.counts and other.seconds is not None]
        left = self.sweep.trials - done
        if left and seconds:
            line += f", about {left * sum(seconds) / len(seconds) / min(self.sweep.workers, left):.0f} s left"
        self.say(line)

    def requeue(self, process: int | None = None, stopping: bool = False) -> bool:
        """Queue the trials again that a dead process was training, in front of what is sampled next.

        Args:
            process: a worker that has died: its trial is trained again `DEATHS_FORGIVEN` times, then it has failed. When
                None, no process works on the study any more, as the whole sweep was stopped: that can be done at will.
            stopping: the sweep ends now, so no trial is said to be run again.

        Returns:
            whether there was such a trial.
        """
        with self._turn, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            retry = RetryHeartbeatStaleTrialCallback(max_retry=None if process is None else DEATHS_FORGIVEN)
            running = self._study.get_trials(states=(TrialState.RUNNING,))
            # It has no process when the process died before it could write itself down.
            dead = [t for t in running if process is None or t.user_attrs.get("process") in (process, None)]
            for kept in dead:
                self._running.pop(kept.number, None)
                self._study.tell(kept.number, state=TrialState.FAIL)
                # Values that were being drawn are drawn anew instead.
                if len(kept.params) == len(self._distributions):
                    retry(self._study, kept)
                if self.trials()[kept.number].state == "failed":
                    self._report(kept.number)
                    continue
                shutil.rmtree(self.sweep.folder / trial_name(kept.number), ignore_errors=True)
                if not stopping:
                    self.say(f"trial {kept.number} was interrupted; it is run again from its beginning")
            return bool(dead)

    def _check_same_sweep(self) -> None:
        mine, kept = _fingerprint(self.sweep), self._study.user_attrs.get("sweep")
        if kept is None and not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr("sweep", mine)
            return
        # A key that came with a later version had its default.
        defaults = {key: json.dumps(default, default=str) for key, _, default, _ in config_keys()}
        kept = kept or {}
        names = sorted(n for n in {*mine, *kept} if mine.get(n) != kept.get(n, defaults.get(n)))
        if names:
            shown = "; ".join(
                f"{name} is {kept.get(name, 'not set')} there, {mine.get(name, 'not set')} here"
                for name in names[:3]
            )
            raise OutputError(
                f"{self.sweep.folder} holds another sweep ({shown}); give this one another --output, or delete that folder"
            )


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.texts)
    if dimension.integer:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _fingerprint(sweep: Sweep) -> dict[str, str]:
    """All that decides what the trials are, by name."""
    searched = {dimension.key: str(dimension) for dimension in sweep.space.dimensions}
    found = {f"--search {key}": text for key, text in searched.items()}
    found |= {"--grid": str(sweep.grid), "--seed": str(sweep.seed)}
    for key, value in leaves(sweep.config.model_dump(mode="json")).items():
        if key not in searched and not is_among(key, KEPT_AND_SHOWN):
            found[key] = json.dumps(value, ensure_ascii=False)
    data = sweep.config.data
    for key, name in (("data.train", data.train), ("data.validation", data.validation)):
        if name is not None and Path(name).is_file():
            found[f"the content of {key}"] = file_hash(Path(name))[:12]
    return found


def trial_name(number: int) -> str:
    """Name of a trial's folder."""
    return f"trial-{number:04d}"
