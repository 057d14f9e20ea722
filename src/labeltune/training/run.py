"""A training from its config to its result: Trainer's arguments, the trainer and its callbacks, and the link to the best checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_callback import PrinterCallback

from labeltune.config import RunConfig
from labeltune.distributed import connect, peer_errors
from labeltune.errors import ConfigError, Interrupted
from labeltune.io.run_folder import RunInfo, checkpoints, writing
from labeltune.models.precision import Precision
from labeltune.training.callbacks import (
    Progress,
    ShowPredictions,
    StopOnDivergence,
    StopOnInterrupt,
    TrackBest,
    WriteMetrics,
)
from labeltune.training.checkpoints import Checkpoint, ContinueRun, LogSums, remove_old
from labeltune.training.preflight import prepare_steps, training_arguments
from labeltune.training.record import best_loss, trained_already
from labeltune.training.sharded import WhenSharded
from labeltune.training.trainer import LabelTrainer

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainResult:
    """Where the run ended.

    Attributes:
        last: the last checkpoint.
        best: `output_dir/best`, the checkpoint with the best `metric` on validation rows (the last one without such rows).
        metric_name: what picked it (`macro_f1`, `span_f1`, `accuracy` or `loss`), None without validation rows.
        metric: its value there.
        validation_loss: the loss there.
        seconds: time spent in the training loop.
        unimproved: checkpoints in a row without improvement at the end, where `eval.patience` counts them.
    """

    last: Path
    best: Path
    steps: int
    train_loss: float
    metric_name: str | None
    metric: float | None
    validation_loss: float | None
    seconds: float
    unimproved: int = 0


def run_training(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    precision: Precision,
    info: RunInfo,
    *,
    train: Dataset,
    validation: Dataset | None,
    callbacks: list[Any],
    resume_from: Path | None,
    say: Say,
    where: Callable[[int], str],
    validate: Callable[[], dict[str, float]] | None = None,
    files: Mapping[str, bytes] | None = None,
    go_on: str | None = None,
    show: Callable[[int, str], None] | None = None,
) -> TrainResult:
    """Train, saving checkpoints as PEFT folders with tokenizer and `labeltune.json`.

    Args:
        where: number of a training row -> its place, for messages.
        validate: called at every validation, on all processes; gives the same figures by name on each, among them the config's metric.
        files: what else a checkpoint holds, by name.
        go_on: the command that resumes, for the message after Ctrl-C.
        show: called with the step and its name before training, at every epoch and at the end, on all processes.

    Raises:
        DivergedError: a loss or gradient is infinite or no number; the last good checkpoint is untouched.
        Interrupted: Ctrl-C; a checkpoint has been saved.
        ModelError: one example alone does not fit into the device's memory.
    """
    output = Path(config.output_dir)
    if precision.device == "cpu":
        connect(config.training.collective_timeout)
    arguments = training_arguments(config, precision, validation is not None)
    # A run that was killed behind its last checkpoint: Trainer would do one more step.
    done = resume_from is not None and trained_already(
        resume_from, config, len(train), validation is not None
    )
    if done:
        arguments.num_train_epochs, arguments.max_steps = 0, -1
    sums = LogSums()
    checkpoint = Checkpoint(info, files or {}, config.training.save_total_limit, sums)
    stopper, progress = StopOnInterrupt(), Progress(config.training.batch_size)
    best = TrackBest(config.metric, config.eval.patience, config.eval.min_delta)

    def plan_steps(ready: Any) -> None:
        trainer.plan = prepare_steps(
            ready, tokenizer, config, precision, train, device=arguments.device, say=say
        )

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
            *([best] if validation is not None else []),
            *callbacks,
            *([ShowPredictions(show, stopper)] if show is not None else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    first: list[Any] = [checkpoint]
    if resume_from is not None:
        first.append(ContinueRun(resume_from, sums))
    if trainer.sharded and not done:
        first.append(WhenSharded(plan_steps))
    # Before the callbacks of other libraries, which may do something with what was saved.
    trainer.callback_handler.callbacks[:0] = first
    check_fsdp(trainer.accelerator.state)
    try:
        with (
            checkpoint.failures_named(),
            peer_errors(config.training.collective_timeout, lambda: how_to_go_on(output)),
        ):
            if not trainer.sharded and not done:
                plan_steps(model.to(arguments.device))
            ended = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stopper.restore()
        progress.close()
    state = trainer.state
    last = output / f"checkpoint-{state.global_step}"
    if stopper.interrupted:
        at = f"stopped at step {state.global_step} of {state.max_steps}"
        then = f"go on with: {go_on}" if go_on is not None else "--resume continues it"
        raise Interrupted(f"{at}; {last.name} is saved, {then}")
    measured = state.best_global_step is not None
    chosen = output / f"checkpoint-{state.best_global_step}" if measured else last
    if trainer.is_world_process_zero():
        point_best(output, chosen)
        # The end of a run is not gone on from: with save_total_limit=1 only the best checkpoint is kept.
        remove_old(output, config.training.save_total_limit, {chosen})
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        last=last if last.is_dir() else chosen,
        best=output / "best",
        steps=state.global_step,
        train_loss=sums.mean(state.global_step),
        metric_name=config.metric if measured else None,
        metric=state.best_metric if measured else None,
        validation_loss=best_loss(state.log_history, state.best_global_step) if measured else None,
        seconds=float(ended.metrics["train_runtime"]),
        unimproved=best.unimproved if config.eval.patience is not None else 0,
    )


def check_fsdp(accelerator_state: Any) -> None:
    """Have FSDP2 round as a run without it does.

    Raises:
        ConfigError: it is FSDP 1.
    """
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError("FSDP 1 is not supported; set fsdp_version: 2 as in configs/distributed/fsdp2.yaml")
    if plugin.mixed_precision_policy is not None:
        # Losses are not rounded to bf16, and gradients are added up over processes in fp32.
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def how_to_go_on(output_dir: Path) -> str:
    """What to tell when another process was lost."""
    saved = checkpoints(output_dir)
    return f"{saved[-1].name} is saved, --resume continues it" if saved else "No checkpoint had been saved"


def point_best(output_dir: Path, checkpoint: Path) -> None:
    """Make `output_dir/best` a relative link to a checkpoint, or a copy where links are not allowed; atomically.

    Raises:
        OutputError: the folder cannot be written.
    """
    best = output_dir / "best"
    temporary = output_dir / f".best-{os.getpid()}.tmp"
    with writing(best, f"{checkpoint} is whole: make room and finish with --resume"):
        try:
            temporary.symlink_to(checkpoint.name, target_is_directory=True)
        except (OSError, NotImplementedError):
            shutil.copytree(checkpoint, temporary)
        if best.is_dir() and not best.is_symlink():
            shutil.rmtree(best)
        temporary.replace(best)
