"""Checkpoints that are whole or not there: a folder counts from the moment its manifest stands in it, and that is written last.

What a resumed run needs beside Trainer's own state is in them: the sums that log lines are made of, and the optimizer of sharded weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from labeltune.distributed import all_reduce
from labeltune.errors import DivergedError, OutputError
from labeltune.io.outputs import (
    file_hash,
    obey_umask,
    temporary_name,
    why_not_written,
    write_bytes,
    write_json,
)
from labeltune.io.run_folder import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    RunInfo,
    checkpoint_name,
    checkpoints,
    how_to_go_on,
    remove_half_checkpoints,
    replaced,
    step_of,
)
from labeltune.training import sharded

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


SUMS_FILE = "log_sums.json"

#: A test sets this to kill the process between two moments of a save; nobody else does.
after: Callable[[str], None] = lambda moment: None  # noqa: E731


@dataclass
class LogSums:
    """What was added up since the last log line and since the start; Trainer keeps none of it in checkpoints.

    Attributes:
        loss: sum of the losses of the steps since the last log line (of all processes).
        total: sum of the losses up to that line.
        logged_step: step of that line.
        skipped: steps since that line that a loss scaler left out, and `all_skipped` those up to it.
        given: tokens of the rows since that line.
        computed: tokens that were computed for them.
    """

    loss: float = 0.0
    total: float = 0.0
    logged_step: int = 0
    skipped: int = 0
    all_skipped: int = 0
    given: int = 0
    computed: int = 0

    def next_line(self, step: int) -> None:
        """A line was logged at this step."""
        self.total += self.loss
        self.all_skipped += self.skipped
        self.logged_step = step
        self.loss, self.skipped, self.given, self.computed = 0.0, 0, 0, 0

    def mean(self, step: int) -> float:
        """The mean loss of all steps of the run, also those before it was resumed."""
        return (self.total + self.loss) / max(step - self.all_skipped - self.skipped, 1)

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint; JSON keeps every bit of a float."""
        write_json(folder / SUMS_FILE, asdict(self))

    def load(self, folder: Path, step: int) -> None:
        """Go on with those of a checkpoint; with none at its step when it has no such file."""
        file = folder / SUMS_FILE
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"logged_step": step}
        for name, value in found.items():
            setattr(self, name, value)


class Checkpoint(TrainerCallback):  # type: ignore[misc]
    """Makes a whole checkpoint of what Trainer saves, and removes old ones behind that.

    Args:
        info: what prediction needs beside the weights.
        files: what else a checkpoint holds, content by name.
        limit: checkpoints that are kept; the last and the best one always are.
        sums: what the next log line is made of.

    Attributes:
        folder: the one that is being written; None between saves.
    """

    def __init__(self, info: RunInfo, files: Mapping[str, bytes], limit: int, sums: LogSums) -> None:
        self.info, self.files, self.limit, self.sums = info, files, limit, sums
        self.folder: Path | None = None

    def begin(self, folder: Path, main_process: bool) -> None:
        """Before the first file is written: a folder of this name makes room, but is kept until the new one is whole."""
        self.folder = folder
        if not main_process:
            return
        if (folder / MANIFEST_FILE).exists():
            shutil.rmtree(replaced(folder), ignore_errors=True)
            folder.rename(replaced(folder))
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / UNFINISHED_FILE).touch()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        **_: Any,
    ) -> None:
        """After Trainer's last file, on all processes."""
        folder = self.folder
        if folder is None:
            return
        sharded.save_optimizer(folder, model, optimizer, lr_scheduler)
        all_reduce([0.0], "sum")  # all processes have written their files
        if args.should_save:
            self.sums.save(folder)
            complete(folder, self.info, self.files)
            best = folder.with_name(checkpoint_name(state.best_global_step or state.global_step))
            remove_old(folder.parent, self.limit, {folder, best})
        all_reduce([0.0], "sum")
        self.folder = None

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Inside, a save that fails is one clear error; what was half-written is removed.

        Raises:
            OutputError: whatever the writers raised: no space left, no permission, an I/O error.
        """
        try:
            yield
        except Exception as error:
            reason = why_not_written(error)
            if reason is None or self.folder is None:
                raise
            remove_half_checkpoints(self.folder.parent)
            then = how_to_go_on(self.folder.parent)
            raise OutputError(f"{self.folder} cannot be written: {reason}. {then}") from error


def diverged(what: str, args: TrainingArguments, step: int) -> DivergedError:
    """The error of a run that went wrong behind this step: `what` it did, what is left of it, and what to change."""
    good = [c for c in checkpoints(Path(args.output_dir)) if step_of(c) <= step]
    kept = f"{good[-1]} was saved before that" if good else "no checkpoint had been saved before that"
    return DivergedError(
        f"{what}. {kept}. Lower training.learning_rate (it is {args.learning_rate:g}) or add training.warmup_steps"
    )


class ContinueRun(TrainerCallback):  # type: ignore[misc]
    """When a resumed training begins: sets the sums of its checkpoint, brings the optimizer's state into the shape of sharded
    weights, and the learning rate to that of the schedule as it is now: with more steps than before, the checkpoint's would make
    the first step with a rate of zero."""

    def __init__(self, checkpoint: Path, sums: LogSums) -> None:
        self.checkpoint, self.sums = checkpoint, sums

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        **_: Any,
    ) -> None:
        """See the class."""
        self.sums.load(self.checkpoint, state.global_step)
        sharded.load_optimizer(self.checkpoint, optimizer, lr_scheduler)
        if isinstance(lr_scheduler, LambdaLR):
            rates = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            for group, (base, share) in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * share(lr_scheduler.last_epoch)
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged


def complete(folder: Path, info: RunInfo, files: Mapping[str, bytes] | None = None) -> None:
    """Make a checkpoint of a folder: add `labeltune.json` and `files` (content by name), bring everything to the disk, and write the
    manifest of SHA-256 sums, from which on it counts.

    Raises:
        OutputError: the folder cannot be written.
    """
    info.save(folder)
    for file, content in (files or {}).items():
        write_bytes(folder / file, content)
    # peft's empty model card; `labeltune export` writes a true one.
    (folder / "README.md").unlink(missing_ok=True)
    obey_umask(folder)
    after("files")
    for path in sorted(folder.rglob("*")):
        _to_disk(path)
    _to_disk(folder)
    after("fsync")
    write_manifest(folder)
    _to_disk(folder)
    _to_disk(folder.parent)
    after("manifest")
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced(folder), ignore_errors=True)


def remove_old(output_dir: Path, limit: int, kept: set[Path]) -> None:
    """Remove the oldest checkpoints until `limit` are left, but never those of `kept`."""
    others = [folder for folder in checkpoints(output_dir) if folder not in kept]
    for old in others[: max(0, len(others) + len(kept) - limit)]:
        # Under a name that the next run clears away when this one is killed meanwhile, or may not delete it.
        old.rename(leftover := temporary_name(old))
        shutil.rmtree(leftover, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the SHA-256 of every file of a checkpoint, by its name in the folder."""
    own = (MANIFEST_FILE, UNFINISHED_FILE)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in own)
    write_json(folder / MANIFEST_FILE, {p.relative_to(folder).as_posix(): file_hash(p) for p in files})


def _to_disk(path: Path) -> None:
    """fsync of a file or folder, where the system knows how."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # folders on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
