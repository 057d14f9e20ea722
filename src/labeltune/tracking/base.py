"""What a tracker is, the silent one for `tracking=none`, and the start of the one that a config names.

A tracker must never cost a training run: `Guarded` reports its first failure, and the run goes on without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from labeltune.config import RunConfig
from labeltune.data.loading import Splits
from labeltune.distributed import rank
from labeltune.evaluation.summary import SELECTION, Evaluation, validation_figures

T = TypeVar("T")


class Tracker(Protocol):
    """One run on a board."""

    def start(self) -> str:
        """Open the run; returns a line that says where to watch it."""

    def callbacks(self) -> list[TrainerCallback]:
        """What the Trainer has to call, so that the steps of training are shown."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers."""

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Show (caption, text) pairs under `Prediction`."""

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Show an evaluation in detail."""

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run, also one that has failed: `error` is what ended the training."""


class SilentTracker:
    """Shows nothing: for `tracking=none`, and for all processes of a job but the first."""

    def start(self) -> str:
        """Nothing to watch."""
        return ""

    def callbacks(self) -> list[TrainerCallback]:
        """None."""
        return []

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Ignored."""

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Ignored."""

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Ignored."""

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing to close."""


class Guarded:
    """A tracker around another one: the first failure is reported, and after it only `finish` is tried.

    Args:
        name: what messages call the tracker.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name = tracker, name
        self.started = self.failed = False

    def attempt(self, action: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """The action's result; None when it fails, or when the tracker has failed before."""
        if self.failed:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:
            self.failed = True
            print(
                f"labeltune: warning: {self.name} failed ({type(error).__name__}: {error}); training goes on without it",
                file=sys.stderr,
                flush=True,
            )
            return None

    def start(self) -> str:
        """Open the run; empty when that failed."""
        line = self.attempt(self.tracker.start)
        self.started = not self.failed
        return line or ""

    def callbacks(self) -> list[TrainerCallback]:
        """The tracker's callbacks, guarded too."""
        if not self.started:
            return []
        return [GuardedCallback(self, inner) for inner in self.attempt(self.tracker.callbacks) or []]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Passed on."""
        if self.started:
            self.attempt(self.tracker.log, values, step)

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Passed on, if there is something to show."""
        if self.started and texts:
            self.attempt(self.tracker.log_predictions, step, texts)

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Passed on."""
        if self.started:
            self.attempt(self.tracker.log_charts, evaluation, step)

    def finish(self, error: BaseException | None = None) -> None:
        """Close what was opened, also after a failure."""
        if self.started:
            self.started = self.failed = False
            self.attempt(self.tracker.finish, error)


class GuardedCallback(TrainerCallback):  # type: ignore[misc]
    """Hands the events of training to a tracker's own callback until the tracker fails once."""

    def __init__(self, tracker: Guarded, inner: TrainerCallback) -> None:
        self.tracker, self.inner = tracker, inner

    def pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call the inner callback."""
        if self.tracker.started:
            self.tracker.attempt(getattr(self.inner, event), *args, **kwargs)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passed on."""
        self.pass_on("on_train_begin", args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passed on, but for the figures of a validation: their name says what they were used for, instead of `eval/`."""
        logs = logs or {}
        if not any(name.startswith("eval_") for name in logs):
            self.pass_on("on_log", args, state, control, logs=logs, **kwargs)
        elif state.is_world_process_zero:
            self.tracker.log(
                {f"{SELECTION}/{k}": v for k, v in validation_figures(logs).items()}, state.global_step
            )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passed on."""
        self.pass_on("on_save", args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passed on."""
        self.pass_on("on_train_end", args, state, control, **kwargs)


def start_tracker(
    config: RunConfig, splits: Splits, resumed: Path | None, say: Callable[[str], None]
) -> Tracker:
    """The tracker that `config.tracking` names, started, in the main process; a silent one elsewhere.

    Args:
        splits: the rows; their labels and counts are shown with the config.
        resumed: checkpoint that training goes on from.
    """
    if config.tracking == "none" or rank() != 0:
        return SilentTracker()
    shown = {
        "labeltune": config.model_dump(mode="json"),
        "labels": list(splits.labels),
        "train_rows": len(splits.train),
        "validation_rows": splits.held_out,
    }
    if config.tracking == "swanlab":
        from labeltune.tracking.swanlab import SwanlabTracker

        tracker = Guarded(SwanlabTracker(config.swanlab, shown, Path(config.output_dir), resumed), "SwanLab")
    elif config.tracking == "wandb":
        from labeltune.tracking.wandb import WandbTracker

        tracker = Guarded(WandbTracker(config.swanlab.experiment, shown), "Weights & Biases")
    else:
        from labeltune.tracking.tensorboard import TensorboardTracker

        tracker = Guarded(TensorboardTracker(shown, Path(config.output_dir)), "TensorBoard")
    line = tracker.start()
    if line:
        say(line)
    return tracker
