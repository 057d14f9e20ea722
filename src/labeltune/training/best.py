"""Which checkpoint is the best so far, and whether a run still improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from labeltune.training.record import best_loss, unimproved_in


class TrackBest(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the best figure and its step in Trainer's state, and ends a run that no longer improves.

    Of checkpoints with the same figure the one with the least loss is the best: macro-F1 on few rows often stands still.

    Args:
        metric: name of the figure (`macro_f1`, `span_f1`, `accuracy` or `loss`).
        patience: validations in a row without improvement that end the run; never when None.
        min_delta: what counts as an improvement is larger than this.

    Attributes:
        unimproved: validations in a row without improvement, counted while there is a patience; kept in checkpoints.
    """

    def __init__(self, metric: str, patience: int | None, min_delta: float) -> None:
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.unimproved = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"unimproved": self.unimproved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the count of the checkpoint that is resumed."""
        self.unimproved = unimproved_in(state.stateful_callbacks)
        # Trainer saves the state of callbacks that the checkpoint knows, and fails at a new one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """Compares a validation with the best one before it."""
        assert metrics is not None
        value, loss, best = metrics[f"eval_{self.metric}"], metrics["eval_loss"], state.best_metric
        sign = -1 if self.metric == "loss" else 1
        better = best is None or sign * value > sign * best
        if self.patience is not None:
            enough = best is None or (better and abs(value - best) > self.min_delta)
            self.unimproved = 0 if enough else self.unimproved + 1
            if self.unimproved >= self.patience:
                control.should_training_stop = True
        if better or (value == best and loss < best_loss(state.log_history, state.best_global_step)):
            state.best_metric, state.best_global_step = value, state.global_step
