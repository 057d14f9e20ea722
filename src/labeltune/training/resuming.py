"""What a resumed run needs beside Trainer's own state: the sums that log lines are made of, the optimizer of sharded weights, and
the learning rate of the schedule as it is now."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from labeltune.io.outputs import write_json
from labeltune.training import sharded

SUMS_FILE = "log_sums.json"


@dataclass
class LogSums:
    """What was added up since the last log line and since the start; Trainer keeps none of it in checkpoints.

    Attributes:
        loss: sum of the losses of the steps since the last log line (of all processes).
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

    def next_line(self, step: int) -> None:
        """A line was logged at this step."""
        self.total += self.loss
        self.logged_step = step
        self.loss, self.given, self.computed = 0.0, 0, 0

    def mean(self, step: int) -> float:
        """The mean loss of all steps of the run, also those before it was resumed."""
        return (self.total + self.loss) / max(step, 1)

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint; JSON keeps every bit of a float."""
        write_json(folder / SUMS_FILE, asdict(self))

    def load(self, folder: Path, step: int) -> None:
        """Go on with those of a checkpoint; with none at its step when it has no such file."""
        file = folder / SUMS_FILE
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"logged_step": step}
        for name, value in found.items():
            setattr(self, name, value)


class ContinueRun(TrainerCallback):  # type: ignore[misc]
    """When a resumed training begins: sets the sums of its checkpoint, brings the optimizer's state into the shape of sharded
    weights, and the learning rate to that of the schedule as it is now: with more steps than before, the checkpoint's would make
    the first step with a rate of zero."""

    def __init__(self, checkpoint: Path, sums: LogSums) -> None:
        self.checkpoint, self.sums = checkpoint, sums

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """See the class."""
        self.sums.load(self.checkpoint, state.global_step)
        sharded.load_optimizer(self.checkpoint, optimizer, lr_scheduler)
        if isinstance(lr_scheduler, LambdaLR):
            rates = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            for group, (base, share) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * share(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
