"""transformers' Trainer, set up from our config."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.errors import ConfigError, Interrupted
from labeltune.modeling.precision import Precision
from labeltune.run_folder import RunInfo
from labeltune.training.dataset import PaddingCollator
from labeltune.training.loss import answer_loss

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TrainResult:
    """Where the run ended.

    Attributes:
        last: the last checkpoint.
        best: `output_dir/best`, the checkpoint with the lowest validation loss (the last one without validation rows).
        seconds: time spent in the training loop.
    """

    last: Path
    best: Path
    steps: int
    train_loss: float
    validation_loss: float | None
    seconds: float


def training_arguments(config: RunConfig, precision: Precision, has_validation: bool) -> Any:
    """The TrainingArguments of a config.

    Raises:
        ConfigError: `batch_size` cannot be cut evenly over the processes, or a value is refused by transformers.
    """
    from transformers import TrainingArguments

    options = config.training
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(options.micro_batch_size, options.batch_size)
    if options.batch_size % (micro * processes):
        raise ConfigError(
            f"training.batch_size={options.batch_size} is no multiple of micro_batch_size={micro} x {processes} processes; "
            "change one of them, so that a step has the same examples on any machine"
        )
    try:
        return TrainingArguments(
            output_dir=config.output_dir,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=options.batch_size // (micro * processes),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.scheduler,
            warmup_steps=options.warmup_steps,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            logging_steps=options.logging_steps,
            logging_first_step=True,
            save_strategy="steps",
            save_steps=options.save_steps,
            save_total_limit=options.save_total_limit,
            eval_strategy="steps" if has_validation else "no",
            eval_steps=options.save_steps,
            prediction_loss_only=True,
            metric_for_best_model="eval_loss" if has_validation else None,
            greater_is_better=False if has_validation else None,
            bf16=precision.name == "bf16",
            fp16=precision.name == "fp16",
            use_cpu=precision.device == "cpu",
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False}
            if options.gradient_checkpointing
            else None,
            train_sampling_strategy="group_by_length" if options.group_by_length else "random",
            length_column_name="length",
            dataloader_pin_memory=precision.device == "cuda",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False if processes > 1 else None,
            seed=options.seed,
            data_seed=options.seed,
            report_to=["tensorboard"]
            if config.tracking == "tensorboard"
            else ["wandb"]
            if config.tracking == "wandb"
            else [],
            run_name=config.swanlab.experiment,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error


def run_training(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    precision: Precision,
    info: RunInfo,
    train: Dataset,
    validation: Dataset | None,
    callbacks: list[Any],
    resume_from: Path | None,
) -> TrainResult:
    """Train, saving checkpoints as PEFT folders with tokenizer and `labeltune.json`.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    from labeltune.training.callbacks import Progress, SaveRunInfo, StopOnInterrupt

    stopper, progress = StopOnInterrupt(), Progress(config.training.batch_size)
    trainer = Trainer(
        model=model,
        args=training_arguments(config, precision, validation is not None),
        data_collator=PaddingCollator(tokenizer.pad_token_id),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_loss_func=answer_loss,
        callbacks=[progress, SaveRunInfo(info), stopper, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stopper.restore()
        progress.close()
    last = Path(config.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if stopper.interrupted:
        raise Interrupted(f"stopped; {last} is saved, --resume continues it")
    best = last
    if trainer.state.best_model_checkpoint:
        best = Path(trainer.state.best_model_checkpoint)
    if trainer.is_world_process_zero():
        point_best(Path(config.output_dir), best)
    return TrainResult(
        last=last,
        best=Path(config.output_dir) / "best",
        steps=trainer.state.global_step,
        train_loss=float(output.training_loss),
        validation_loss=trainer.state.best_metric,
        seconds=float(output.metrics["train_runtime"]),
    )


def point_best(output_dir: Path, checkpoint: Path) -> None:
    """Make `output_dir/best` a relative link to a checkpoint, or a copy where links are not allowed; atomically."""
    best = output_dir / "best"
    temporary = output_dir / f".best-{os.getpid()}"
    try:
        temporary.symlink_to(checkpoint.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(checkpoint, temporary)
    if best.is_dir() and not best.is_symlink():
        shutil.rmtree(best)
    temporary.replace(best)
