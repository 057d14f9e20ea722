"""Before the first step: what cannot go well is said before any weight is loaded, and how steps are computed is decided on real rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from labeltune.config import RunConfig
from labeltune.distributed import all_reduce, world_size
from labeltune.errors import ConfigError, first_line
from labeltune.io.progress import begin
from labeltune.models.lora import attach_adapter
from labeltune.models.precision import Precision
from labeltune.training.collate import to_rows
from labeltune.training.loss import chunkable_head
from labeltune.training.memory import (
    MemoryBudget,
    activation_bytes,
    budget_memory,
    enable_checkpointing,
    pairs_per_token,
    random_state_kept,
)
from labeltune.training.planner import Row, pack_step, step_order, steps_in_all
from labeltune.training.self_check import choose_packing, sample_rows
from labeltune.training.trainer import StepSettings

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]

#: Steps looked at to choose the size of packs.
SAMPLED_STEPS = 4
#: Schedules that watch a figure; Trainer hands it to them.
WATCHING = ("reduce_lr_on_plateau", "greedy")


def training_arguments(config: RunConfig, precision: Precision, has_validation: bool) -> TrainingArguments:
    """The TrainingArguments of a config. Trainer's own choice of the best checkpoint and its removal of old ones are off.

    Raises:
        ConfigError: a value is refused by transformers.
    """
    options = config.training
    strategy = "epoch" if options.save_steps == "epoch" else "steps"
    watched = has_validation and options.scheduler in WATCHING
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
            eval_strategy=strategy if has_validation else "no",
            eval_steps=every,
            prediction_loss_only=True,
            metric_for_best_model=f"eval_{config.metric}" if watched else None,
            greater_is_better=config.metric != "loss" if watched else None,
            bf16=precision.name == "bf16",
            fp16=precision.name == "fp16",
            use_cpu=precision.device == "cpu",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False if world_size() > 1 else None,
            ddp_timeout=options.collective_timeout,
            seed=options.seed,
            data_seed=options.seed,
            report_to=[],
            run_name=config.swanlab.experiment,
            disable_tqdm=True,
        )
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error
    # Several visible GPUs in one process would be wrapped in DataParallel, which cuts batches; one process uses one GPU.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def check_feasible(
    config: RunConfig, precision: Precision, model: Path, rows: int, has_validation: bool
) -> None:
    """Find what the libraries would refuse only after the weights are loaded, and what would train nothing.

    Args:
        model: the base model's folder, of which only `config.json` is read.
        rows: number of training rows.

    Raises:
        ConfigError: the schedule is unknown, or needs what has no key here; warm-up takes the whole run.
        ModelError: `lora.target_modules` names no layer of this model.
    """
    training_arguments(config, precision, has_validation)
    options = config.training
    steps = steps_in_all(rows, options)
    if options.warmup_steps >= steps:
        raise ConfigError(
            f"training.warmup_steps={options.warmup_steps} is no less than the {steps} steps of this run "
            f"({rows} rows, {options.batch_size} a step, {options.epochs:g} epochs): the learning rate would never be "
            "reached. Lower it"
        )
    _check_scheduler(options.scheduler, options.warmup_steps, steps)
    if options.method != "full" and config.lora.target_modules != "all-linear":
        attach_adapter(_without_weights(model, config.hub.trust_remote_code), config.lora)


def _check_scheduler(name: str, warmup: int, steps: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, warmup, steps)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training.scheduler={name} cannot be used: {first_line(error)}") from error


def _without_weights(folder: Path, trust_remote_code: bool) -> Any:
    """The model's layers on torch's meta device, where they take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)


def prepare_steps(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    precision: Precision,
    train: Dataset,
    *,
    device: Any,
    say: Say,
) -> StepSettings:
    """Decide how steps are computed: check the fast way on real rows, measure memory, compile.

    Leaves the random state as it was.
    """
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
        return int(all_reduce([value], "min")[0])

    begin("checking packing on your rows", say)
    with random_state_kept():
        head = chunkable_head(model, torch_ids(sample[0], device))
        choice = choose_packing(model, sample, options.packing, precision, pad_id, head, say)
        memory = budget_memory(
            None if options.max_tokens_per_pack == "auto" else options.max_tokens_per_pack,
            None if options.gradient_checkpointing == "auto" else options.gradient_checkpointing,
            steps,
            choice.packing,
            world_size(),
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
    plan = StepSettings(choice.packing, tokens, pad_id, head, pairs_per_token(model))
    say(describe(plan, memory, steps))
    return plan


def describe(plan: StepSettings, memory: MemoryBudget, steps: list[list[Row]]) -> str:
    """One line on how steps are computed."""
    examples = sum(map(len, steps))
    given = sum(len(row.ids) for step in steps for row in step)
    computed = sum(
        pack.tokens(step, plan.packing)
        for step in steps
        for pack in pack_step(step, plan.max_tokens, plan.packing)[0]
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
