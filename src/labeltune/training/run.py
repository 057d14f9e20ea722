"""A training from its config to its result: Trainer's arguments, the trainer and its callbacks, and the link to the best checkpoint.

Below it: `time_steps`, the first steps of a run timed with the same Trainer for `--dry-run`, which saves nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from labeltune.config import RunConfig
from labeltune.distributed import peer_errors
from labeltune.io.outputs import temporary_name, writing
from labeltune.io.progress import Say, begin
from labeltune.io.run_folder import RunInfo, checkpoint_name, how_to_go_on
from labeltune.models.precision import Precision, memory_in_use
from labeltune.training.callbacks import (
    Progress,
    ShowPredictions,
    StopOnDivergence,
    StopOnInterrupt,
    TrackBest,
    WriteMetrics,
)
from labeltune.training.checkpoints import Checkpoint, ContinueRun, LogSums, remove_old
from labeltune.training.packing import Packing, rows_of_steps, run_order
from labeltune.training.preflight import prepare_steps, training_arguments
from labeltune.training.record import TrainResult, best_loss, trained_already
from labeltune.training.sharded import WhenSharded
from labeltune.training.trainer import LabelTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: Steps that are timed, after one that is not: memory is allocated and kernels are chosen in the first.
TIMED_STEPS = 3
_SECONDS_BETWEEN_LOOKS = 0.05


def run_training(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    precision: Precision,
    info: RunInfo,
    *,
    train: Dataset,
    validation: Dataset | None,
    callbacks: list[TrainerCallback],
    resume_from: Path | None,
    say: Say,
    where: Callable[[int], str],
    validate: Callable[[], dict[str, float]] | None = None,
    files: Mapping[str, bytes] | None = None,
    command: str | None = None,
    show: Callable[[int, str], None] | None = None,
) -> TrainResult:
    """Train, saving checkpoints as PEFT folders with tokenizer and `labeltune.json`.

    Args:
        where: number of a training row -> its place, for messages.
        validate: called at every validation, on all processes; gives the same figures by name on each, among them the config's metric.
        files: what else a checkpoint holds, by name.
        command: the command that trains, for the message after Ctrl-C.
        show: called with the step and its name before training, at every epoch and at the end, on all processes.

    Raises:
        DivergedError: a loss or gradient is infinite or no number; the last good checkpoint is untouched.
        Interrupted: Ctrl-C; a checkpoint has been saved.
        ModelError: one example alone does not fit into the device's memory.
    """
    validated = validation is not None
    arguments = training_arguments(config, precision, validated)
    done = resume_from is not None and trained_already(resume_from, config, len(train), validated)
    if done:  # All steps were done before the kill; Trainer would add one.
        arguments.num_train_epochs, arguments.max_steps = 0, -1
    checkpoint = Checkpoint(info, files or {}, config.training.save_total_limit, sums := LogSums())
    stopper, progress = StopOnInterrupt(), Progress(config.training.batch_size)
    best = TrackBest(config.metric, config.eval.patience, config.eval.min_delta)
    trainer = LabelTrainer(
        say=say,
        where=where,
        sums=sums,
        checkpoint=checkpoint,
        validate=validate,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[
            progress,
            WriteMetrics(),
            stopper,
            StopOnDivergence(model.config.get_text_config().vocab_size, say),
            *([best] if validated else []),
            *callbacks,
            *([ShowPredictions(show, stopper)] if show is not None else []),
        ],
    )
    first = [checkpoint, *([ContinueRun(resume_from, sums)] if resume_from is not None else [])]
    # Before the callbacks of other libraries, which may do something with what was saved.
    trainer.callback_handler.callbacks[:0] = first
    try:
        with (
            checkpoint.failures_named(),
            peer_errors(config.training.collective_timeout, lambda: how_to_go_on(Path(config.output_dir))),
        ):
            if not done:
                prepare(trainer, config, precision, resumed=resume_from is not None)
            if precision.device == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of the self-check, which holds a second copy of the weights
            ended = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stopper.restore()
        progress.close()
    stopper.tell(trainer.state, how_to_go_on(Path(config.output_dir), command))
    unimproved = best.unimproved if config.eval.patience is not None else 0
    return _result(trainer, config, float(ended.metrics["train_runtime"]), unimproved)


def _result(trainer: LabelTrainer, config: RunConfig, seconds: float, unimproved: int) -> TrainResult:
    """Point `best` at the best checkpoint, and tell how the run ended."""
    output, state = Path(config.output_dir), trainer.state
    last = output / checkpoint_name(state.global_step)
    validated = state.best_global_step is not None
    chosen = output / checkpoint_name(state.best_global_step) if validated else last
    if trainer.is_world_process_zero():
        point_best(output, chosen)
        # A finished run is never resumed, so its last checkpoint may go: with save_total_limit=1 only the best one is kept.
        remove_old(output, config.training.save_total_limit, {chosen})
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        last=last if last.is_dir() else chosen,
        best=output / "best",
        steps=state.global_step,
        train_loss=trainer.sums.mean(state.global_step),
        metric_name=config.metric if validated else None,
        metric=state.best_metric if validated else None,
        validation_loss=best_loss(state.log_history, state.best_global_step) if validated else None,
        seconds=seconds,
        unimproved=unimproved,
    )


def prepare(trainer: LabelTrainer, config: RunConfig, precision: Precision, resumed: bool = False) -> None:
    """Choose packing and pack size: at once, or with FSDP2 when training begins, as weights are sharded then."""

    def settle(model: PreTrainedModel) -> None:
        trainer.settings = prepare_steps(
            model,
            trainer.processing_class,
            config,
            precision,
            trainer.train_dataset,
            device=trainer.args.device,
            say=trainer.say,
            resumed=resumed,
        )

    if trainer.sharded:
        # Behind what makes checkpoints, before the callbacks of other libraries.
        ours = [c for c in trainer.callback_handler.callbacks if isinstance(c, (Checkpoint, ContinueRun))]
        trainer.callback_handler.callbacks.insert(len(ours), WhenSharded(settle))
    else:
        settle(trainer.model.to(trainer.args.device))


def point_best(output_dir: Path, checkpoint: Path) -> None:
    """Make `output_dir/best` a relative link to a checkpoint, or a copy where links are not allowed; atomically.

    Raises:
        OutputError: the folder cannot be written.
    """
    best = output_dir / "best"
    temporary = temporary_name(best)
    with writing(best, f"{checkpoint} is whole: make room and finish with --resume"):
        try:
            temporary.symlink_to(checkpoint.name, target_is_directory=True)
        except (OSError, NotImplementedError):
            shutil.copytree(checkpoint, temporary)
        if best.is_dir() and not best.is_symlink():
            shutil.rmtree(best)
        temporary.replace(best)


@dataclass(frozen=True)
class TimedSteps:
    """What the first steps of a run took.

    Attributes:
        seconds: of each timed step.
        computed: tokens of these steps as one process would compute them.
        packing: how examples go through the model.
        max_tokens: tokens of a pack.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    seconds: tuple[float, ...]
    computed: int
    packing: Packing
    max_tokens: int
    checkpointing: bool


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when the training loop began and when each step ended; stops the run when enough are timed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note_time(self, args: TrainingArguments) -> None:
        """Once the device has done what it was given."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(perf_counter())
        begin(f"timing step {len(self.times)}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Where the first step begins."""
        self.note_time(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Where a step ends and the next one begins."""
        self.note_time(args)
        if len(self.times) > 1 + TIMED_STEPS:
            control.should_training_stop = True

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of every step but the first; of the first where there is no other."""
        found = tuple(end - start for start, end in zip(self.times, self.times[1:], strict=False))
        return found[1:] or found


def time_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    precision: Precision,
    train: Dataset,
    *,
    say: Say,
    where: Callable[[int], str],
) -> TimedSteps:
    """Train the first steps of a run; weights change, and no file is written.

    Args:
        train: tokens of the training rows.
        where: number of a training row -> its place, for messages.

    Raises:
        DivergedError, ModelError: as in training.
    """
    clock = StepClock()
    with tempfile.TemporaryDirectory(prefix="labeltune-dry-run-") as nowhere:
        unsaved = config.model_copy(update={"output_dir": nowhere, "tracking": "none"})
        arguments = training_arguments(unsaved, precision, has_validation=False)
        arguments.save_strategy = SaveStrategy.NO

        trainer = LabelTrainer(
            say=say,
            where=where,
            model=model,
            args=arguments,
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        with peer_errors(config.training.collective_timeout, lambda: "Nothing was saved"):
            prepare(trainer, unsaved, precision)
            trainer.train()
    settings = trainer.settings
    steps = rows_of_steps(train, run_order(len(train), config.training), 1 + TIMED_STEPS)
    return TimedSteps(
        seconds=clock.seconds,
        computed=settings.computed(steps[-len(clock.seconds) :]),
        packing=settings.packing,
        max_tokens=settings.max_tokens,
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    )


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Inside, memory of a device (on the CPU: of this process) is watched; the yielded list's one number is the most bytes that
    were taken beyond those at the beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, most, ended = memory_in_use(device), [0], threading.Event()

    def look() -> None:
        most[0] = max(most[0], memory_in_use(device) - before)

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, name="labeltune-memory", daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        look()
