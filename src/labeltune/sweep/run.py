"""Runs the trials of a sweep, one after the other or side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from labeltune.errors import ConfigError, Interrupted, MissingExtraError, SweepError
from labeltune.folder_lock import alone_with
from labeltune.messages import localize
from labeltune.progress import tell
from labeltune.sweep.report import Trial, best_trial, print_table, train_command, write_results
from labeltune.sweep.search import Choices, SweepPlan

if TYPE_CHECKING:
    from labeltune.sweep.ledger import Ledger

Say = Callable[[str], None]


def run_sweep(plan: SweepPlan, say: Say = tell) -> list[Trial]:
    """Train until as many trials as the plan says are finished; those of an earlier call count.

    Returns:
        all trials; `trials.csv` and `best.yaml` in the plan's folder say the same.

    Raises:
        MissingExtraError: Optuna is not installed, or Ray with more than one worker.
        DataError: the rows have faults.
        ModelError: there is no such model.
        ConfigError: there are no validation rows.
        OutputError: the folder holds another sweep, is in use by another process, or cannot be written.
        SweepError: the workers ended too early.
        Interrupted: Ctrl-C; finished trials are kept.
    """
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("labeltune sweep", "sweep")
    if plan.workers > 1 and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--workers", "ray")
    _check_inputs(plan)
    running = f"another sweep is running in {plan.folder}"
    with alone_with(plan.folder / ".lock", running, "wait for it, or give --output"):
        from labeltune.sweep.ledger import Ledger

        ledger = Ledger(plan, say)
        done = sum(trial.counts for trial in ledger.trials())
        say(f"sweep: {plan.trials} trials in {plan.folder}, {done} of them are there already")
        try:
            if plan.workers == 1:
                _one_by_one(ledger, say)
            elif done < plan.trials:
                from labeltune.sweep.parallel import run_parallel

                run_parallel(ledger, plan.workers)
        except (Interrupted, KeyboardInterrupt):
            ledger.release()
            trials = ledger.trials()
            write_results(plan, trials)
            done = sum(trial.counts for trial in trials)
            raise Interrupted(
                f"stopped; {done} of {plan.trials} trials are finished and kept in {plan.folder}, "
                "the same command goes on"
            ) from None
        trials = ledger.trials()
        if sum(trial.counts for trial in trials) < plan.trials:
            raise SweepError(
                f"the workers ended before all trials were finished; the same command goes on in {plan.folder}"
            )
        return trials


def _one_by_one(ledger: Ledger, say: Say) -> None:
    from labeltune.sweep.trial import run_trial

    plan = ledger.plan
    while (trial := ledger.ask()) is not None:
        say(f"trial {trial.number}: " + ", ".join(f"{key}={text}" for key, text in trial.values.items()))
        ledger.tell(trial.number, run_trial(plan.config, plan.folder, trial.number, trial.values, say))


def conclude(plan: SweepPlan, trials: list[Trial]) -> None:
    """Print the table and what to do next.

    Raises:
        SweepError: no trial has finished.
    """
    print_table(plan, [trial for trial in trials if trial.counts])
    best = best_trial(trials)
    if best is None:
        failed = next(trial for trial in trials if trial.state == "failed")
        raise SweepError(
            f"all trials failed; trial {failed.number}: {failed.reason} (to start over, delete {plan.folder})"
        )
    print(localize(f"The best is trial {best.number}. Train its config: {train_command(plan)}"))
    print(
        localize(
            "Its figure picked it, so measure the result on rows that no trial has seen: labeltune evaluate"
        )
    )


def _check_inputs(plan: SweepPlan) -> None:
    """Faults of the data and a missing model would fail every trial in the same way; they are said once, before the first."""
    from labeltune.data.loading import load_splits
    from labeltune.modeling.hub import resolve_model

    config = plan.config
    if load_splits(config.task, config.data, config.hub, config.training.seed).validation is None:
        raise ConfigError(
            "no row is left for validation, and a sweep compares trials on validation rows; "
            "set data.validation or raise data.validation_fraction"
        )
    tried = [d.texts for d in plan.space if isinstance(d, Choices) and d.key == "model"]
    for model in tried[0] if tried else (config.model,):
        resolve_model(model, config.hub)
