"""What a resumed run needs beside Trainer's own state: the sums that log lines are made of, and whether there is anything left to do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, TrainerCallback

from labeltune.run_folder import write_json

if TYPE_CHECKING:
    from labeltune.training.stepping import PackTrainer

SUMS_FILE = "log_sums.json"


@dataclass(frozen=True)
class LogSums:
    """What was added up since the last log line and since the start; Trainer keeps none of it in checkpoints.

    Attributes:
        loss: sum of the losses of the steps since the last log line (mean over processes).
        total: sum of the losses up to that line.
        logged_step: step of that line.
        given: tokens of the rows since that line.
        computed: tokens that were computed for them.
    """

    loss: float = 0.0
    total: float = 0.0
    logged_step: int = 0
    given: int = 0
    computed: int = 0

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint; JSON keeps every bit of a float."""
        write_json(folder / SUMS_FILE, asdict(self))

    @staticmethod
    def load(folder: Path) -> LogSums | None:
        """Those of a checkpoint; None when it has none."""
        file = folder / SUMS_FILE
        return LogSums(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


class ContinueRun(TrainerCallback):  # type: ignore[misc]
    """When a resumed training begins: sets the sums of its checkpoint, where Trainer has just set them to zero, and the patience
    that is asked for now, where Trainer has just brought back the checkpoint's. The learning rate is that of the schedule as it is
    now: with more steps than before, the checkpoint's would make the first step with a rate of zero."""

    def __init__(
        self, trainer: PackTrainer, checkpoint: Path, patience: int | None, min_delta: float
    ) -> None:
        self.trainer, self.sums = trainer, LogSums.load(checkpoint)
        self.patience, self.min_delta = patience, min_delta

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """See the class."""
        if isinstance(lr_scheduler, LambdaLR) and optimizer is not None:
            rates = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            for group, (base, share) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * share(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
        if self.sums is not None:
            self.trainer.continue_sums(self.sums)
        for callback in early_stopping(self.trainer.callback_handler.callbacks):
            callback.early_stopping_patience = self.patience
            callback.early_stopping_threshold = self.min_delta
            # Trainer saves the state of callbacks that the checkpoint knows, and fails at a new one.
            state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())


def early_stopping(callbacks: Iterable[Any]) -> list[Any]:
    """Those of the callbacks that stop a run early: none or one."""
    return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]


def is_finished(state: Any, callbacks: Iterable[Any]) -> bool:
    """Whether all steps are done, or early stopping has ended the run; Trainer would do one more step."""
    patience_used_up = any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in early_stopping(callbacks)
    )
    return bool(state.global_step >= state.max_steps or patience_used_up)


def best_loss(state: Any) -> float:
    """Validation loss at the best step so far; infinite before there is one."""
    found = [
        entry["eval_loss"]
        for entry in state.log_history
        if entry.get("step") == state.best_global_step and "eval_loss" in entry
    ]
    return float(found[-1]) if found else float("inf")
