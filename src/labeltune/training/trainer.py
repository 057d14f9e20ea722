"""transformers' Trainer, set up from our config."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.errors import ConfigError, Interrupted
from labeltune.modeling.precision import Precision
from labeltune.progress import begin
from labeltune.ranks import connect, loss_of_others_named, reduced, world
from labeltune.run_folder import RunInfo, checkpoints, writing
from labeltune.training.planner import Row

if TYPE_CHECKING:
    from datasets import Dataset

    from labeltune.training.memory import MemoryPlan
    from labeltune.training.stepping import StepPlan

Say = Callable[[str], None]
#: Figures on validation rows by name.
Measurement = Callable[[], dict[str, float]]

#: Steps looked at to choose the size of packs.
SAMPLED_STEPS = 4


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


def training_arguments(config: RunConfig, precision: Precision, has_validation: bool) -> Any:
    """The TrainingArguments of a config.

    Raises:
        ConfigError: a value is refused by transformers.
    """
    from transformers import TrainingArguments

    options = config.training
    strategy = "epoch" if options.save_steps == "epoch" else "steps"
    every = 1 if options.save_steps == "epoch" else options.save_steps
    try:
        arguments = TrainingArguments(
            output_dir=config.output_dir,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps or -1,
            learning_rate=options.learning_rate,
            lr_scheduler_type=options.scheduler,
            warmup_steps=options.warmup_steps,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            logging_steps=options.logging_steps,
            logging_first_step=True,
            save_strategy=strategy,
            save_steps=every,
            save_total_limit=options.save_total_limit,
            eval_strategy=strategy if has_validation else "no",
            eval_steps=every,
            prediction_loss_only=True,
            metric_for_best_model=f"eval_{config.metric}" if has_validation else None,
            greater_is_better=config.metric != "loss" if has_validation else None,
            bf16=precision.name == "bf16",
            fp16=precision.name == "fp16",
            use_cpu=precision.device == "cpu",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False if world() > 1 else None,
            ddp_timeout=options.collective_timeout,
            seed=options.seed,
            data_seed=options.seed,
            report_to=["tensorboard"]
            if config.tracking == "tensorboard"
            else ["wandb"]
            if config.tracking == "wandb"
            else [],
            run_name=config.swanlab.experiment,
            restore_callback_states_from_checkpoint=config.eval.patience is not None,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error
    # Several visible GPUs in one process would be wrapped in DataParallel, which cuts batches; one process uses one GPU.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


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
    say: Say,
    where: Callable[[int], str],
    measure: Measurement | None = None,
    files: Mapping[str, bytes] | None = None,
    go_on: str | None = None,
) -> TrainResult:
    """Train, saving checkpoints as PEFT folders with tokenizer and `labeltune.json`.

    Args:
        where: number of a training row -> its place, for messages.
        measure: called at every validation, on all processes; gives the same figures by name on each, among them the config's metric.
        files: what else a checkpoint holds, by name.
        go_on: the command that resumes, for the message after Ctrl-C.

    Raises:
        DivergedError: a loss or gradient is infinite or no number; the last good checkpoint is untouched.
        Interrupted: Ctrl-C; a checkpoint has been saved.
        ModelError: one example alone does not fit into the device's memory.
    """
    from transformers.trainer_callback import PrinterCallback

    from labeltune.training.callbacks import Progress, StopOnDivergence, StopOnInterrupt, WriteMetrics
    from labeltune.training.resuming import ContinueRun, best_loss, early_stopping
    from labeltune.training.stepping import PackTrainer

    if precision.device == "cpu":
        connect(config.training.collective_timeout)
    arguments = training_arguments(config, precision, validation is not None)
    stopper, progress = StopOnInterrupt(), Progress(config.training.batch_size)
    watch = StopOnDivergence(model.config.get_text_config().vocab_size, say)
    trainer = PackTrainer(
        lambda ready: prepare_steps(ready, tokenizer, config, precision, train, arguments.device, say),
        config.training.batch_size,
        config.training.seed,
        say,
        info,
        where,
        measure,
        files,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[
            progress,
            WriteMetrics(),
            stopper,
            watch,
            *_early_stopping(config, validation),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if resume_from is not None:
        trainer.add_callback(ContinueRun(trainer, resume_from, config.eval.patience, config.eval.min_delta))
    use_fsdp_as_we_do(trainer)

    def how_to_go_on() -> str:
        saved = checkpoints(Path(config.output_dir))
        return (
            f"{saved[-1].name} is saved, --resume continues it" if saved else "No checkpoint had been saved"
        )

    try:
        with loss_of_others_named(config.training.collective_timeout, how_to_go_on):
            output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stopper.restore()
        progress.close()
    last = Path(config.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if stopper.interrupted:
        at = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
        then = f"go on with: {go_on}" if go_on is not None else "--resume continues it"
        raise Interrupted(f"{at}; {last.name} is saved, {then}")
    best = last
    if trainer.state.best_model_checkpoint:
        best = Path(trainer.state.best_model_checkpoint)
    measured = trainer.state.best_metric is not None
    if trainer.is_world_process_zero():
        point_best(Path(config.output_dir), best)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        # With save_total_limit=1 only the best one is kept.
        last=last if last.is_dir() else best,
        best=Path(config.output_dir) / "best",
        steps=trainer.state.global_step,
        train_loss=trainer.mean_loss(),
        metric_name=config.metric if measured else None,
        metric=trainer.state.best_metric if measured else None,
        validation_loss=best_loss(trainer.state) if measured else None,
        seconds=float(output.metrics["train_runtime"]),
        unimproved=sum(
            callback.early_stopping_patience_counter
            for callback in early_stopping(trainer.callback_handler.callbacks)
        ),
    )


def use_fsdp_as_we_do(trainer: Any) -> None:
    """FSDP 2 alone, and its sums in fp32, where the Trainer runs under it.

    Raises:
        ConfigError: accelerate was told to use FSDP 1.
    """
    import torch

    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError("FSDP 1 is not supported; set fsdp_version: 2 as in configs/distributed/fsdp2.yaml")
    if plugin is not None and plugin.mixed_precision_policy is not None:
        # As without FSDP: losses are not rounded to bf16, and gradients are added up over processes in fp32.
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def _early_stopping(config: RunConfig, validation: Dataset | None) -> list[Any]:
    """transformers' callback, whose count is kept in checkpoints, so that a resumed run stops where it would have."""
    from transformers import EarlyStoppingCallback

    if config.eval.patience is None or validation is None:
        return []
    return [EarlyStoppingCallback(config.eval.patience, config.eval.min_delta)]


def prepare_steps(
    model: Any, tokenizer: Any, config: RunConfig, precision: Precision, train: Dataset, device: Any, say: Say
) -> StepPlan:
    """Decide how steps are computed: check the fast way on real rows, measure memory, compile.

    Leaves the random state as it was.
    """
    from labeltune.training.batches import to_rows
    from labeltune.training.loss import chunkable_head
    from labeltune.training.memory import (
        activation_bytes,
        enable_checkpointing,
        pairs_per_token,
        plan_memory,
        random_state_kept,
    )
    from labeltune.training.planner import step_order
    from labeltune.training.self_check import choose_packing, sample_rows
    from labeltune.training.stepping import StepPlan

    options = config.training
    steps = [
        to_rows([train[i] for i in numbers])
        for _, numbers in zip(
            range(SAMPLED_STEPS), step_order(len(train), options.batch_size, options.seed, 0), strict=False
        )
    ]
    sample = sample_rows(steps[0])
    pad_id = tokenizer.pad_token_id

    def smallest(value: int) -> int:
        return int(reduced([value], "min")[0])

    begin("checking packing on your rows", say)
    with random_state_kept():
        head = chunkable_head(model, torch_ids(sample[0], device))
        choice = choose_packing(model, sample, options.packing, precision, pad_id, head, say)
        memory = plan_memory(
            None if options.max_tokens_per_pack == "auto" else options.max_tokens_per_pack,
            None if options.gradient_checkpointing == "auto" else options.gradient_checkpointing,
            steps,
            choice.packing,
            world(),
            smallest(activation_bytes(model, sample, choice.packing, pad_id, head)),
            model.config.get_text_config().vocab_size,
            device,
            smallest,
        )
        if memory.checkpointing:
            enable_checkpointing(model)
        if options.compile:
            compile_layers(model)
            choice = choose_packing(model, sample, choice.packing, precision, pad_id, head, say)
    tokens = 1 if choice.one_by_one else memory.max_tokens
    plan = StepPlan(choice.packing, tokens, pad_id, head, pairs_per_token(model))
    say(describe(plan, memory, steps))
    return plan


def describe(plan: StepPlan, memory: MemoryPlan, steps: list[list[Row]]) -> str:
    """One line on how steps are computed."""
    from labeltune.training.planner import plan_step

    examples = sum(map(len, steps))
    given = sum(len(row.ids) for step in steps for row in step)
    computed = sum(
        pack.tokens(step, plan.packing)
        for step in steps
        for pack in plan_step(step, plan.max_tokens, plan.packing)[0]
    )
    return (
        f"steps: packing={plan.packing}, at most {plan.max_tokens:,} tokens at a time; "
        f"{computed / examples:.0f} tokens computed per example of {given / examples:.0f}; checkpointing {'on' if memory.checkpointing else 'off'} "
        f"({memory.bytes_per_token / 1e3:.0f} kB of activations per token, {memory.free / 1e9:.1f} GB free)"
    )


def torch_ids(row: Row, device: Any) -> Any:
    """A row's tokens as a batch of one."""
    import torch

    return torch.tensor([row.ids], device=device)


def compile_layers(model: Any) -> None:
    """torch.compile the decoder layers one by one, in place, for packs of any length.

    They are what the model calls most, and compiling them alone keeps parameter names and gradient checkpointing as they are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


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
