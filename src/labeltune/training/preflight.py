"""Before the first step: what cannot go well is said before any weight is loaded, and how steps are computed is decided on real rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from labeltune.config import RunConfig, higher_is_better
from labeltune.distributed import all_reduce, connect, world_size
from labeltune.errors import ConfigError, ModelError, first_line
from labeltune.io.progress import Say, begin
from labeltune.models.hub import model_shape
from labeltune.models.lora import ALL_LINEAR, attach_adapter, language_model
from labeltune.models.precision import Precision, free_memory
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import answer_loss, chunkable_head, positions_at_once
from labeltune.training.packing import (
    CALL_TOKENS,
    ENOUGH,
    PAIRS_PER_TOKEN,
    SAMPLED_STEPS,
    Packing,
    Row,
    chosen,
    pack_step,
    rows_of_steps,
    step_order,
    steps_in_all,
    useful_tokens,
)
from labeltune.training.self_check import Choice, choose_packing, random_state_kept, sample_rows
from labeltune.training.trainer import StepSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


#: Share of the free memory that activations may take as they are counted. On the CPU the allocator was seen to take 2.3 times as
#: much (docs/benchmarks.md: Fudan news at 24 layers), and running out is not an error there but the end.
SHARE = {"cuda": 0.5, "mps": 0.5, "cpu": 0.3}
#: Part of a layer's activations that checkpointing keeps (its input), seen from above.
KEPT_BY_CHECKPOINTING = 0.15
#: Weights of a layer times tokens that are computed in the time that a call of the layer costs besides: 20 ms on a busy core (measured
#: for LFM2 and Qwen3.5 with adapters, forward and backward), 5 ms on a GPU, which computes about a thousand times as fast.
CALL_WORK = {"cuda": 300_000_000_000, "mps": 30_000_000_000, "cpu": 600_000_000}
#: No more than these, as a token costs something however few weights it passes.
MOST_CALL_TOKENS = {"cuda": 1 << 15, "mps": 1 << 12, "cpu": 256}
#: Passes that `training.epochs: auto` stands for: so many of a single row, falling with the root of their number, within bounds
#: (docs/accuracy.md).
EPOCHS_OF_A_ROW, FEWEST_EPOCHS, MOST_EPOCHS, USUAL_LABELS = 72, 2, 8, 10
#: Schedules that watch a figure; Trainer hands it to them.
WATCHING = ("reduce_lr_on_plateau", "greedy")


def settled(config: RunConfig, rows: int, labels: int, model: Path, say: Say) -> RunConfig:
    """The config with numbers in place of `auto`, which are said.

    Passes were measured with ten labels (docs/accuracy.md); more labels have fewer rows each, and count as fewer rows in all.

    The learning rate follows Thinking Machines' fit over models and data sets (LoRA Without Regret, 2025, and the Tinker cookbook's
    get_lr): 5e-5 times 10 for an adapter, times (2000 / hidden size) ** 0.781.

    Args:
        rows: number of training rows.
        labels: number of labels that a row has one of.
        model: the base model's folder.
    """
    options = config.training
    found: dict[str, float] = {}
    if options.epochs == "auto":
        many = config.task == "classification" and labels > USUAL_LABELS
        passes = EPOCHS_OF_A_ROW / (rows * USUAL_LABELS / labels if many else rows) ** 0.5
        found["epochs"] = float(round(min(max(passes, FEWEST_EPOCHS), MOST_EPOCHS)))
        if options.max_steps is None:
            of = f" of {labels} labels" if many else ""
            say(f"training.epochs: {found['epochs']:g}, for {rows} rows{of}")
    if options.learning_rate == "auto":
        width = model_shape(model, config.hub.trust_remote_code)[0].get_text_config().hidden_size
        rate = 5e-5 * (1 if options.method == "full" else 10) * (2000 / width) ** 0.781
        found["learning_rate"] = float(f"{rate:.1e}")
        say(f"training.learning_rate: {found['learning_rate']:.1e}, for a model of width {width}")
    return config.model_copy(update={"training": options.model_copy(update=found)})


def training_arguments(config: RunConfig, precision: Precision, has_validation: bool) -> TrainingArguments:
    """The TrainingArguments of a config, which join the processes of the job. Trainer's own choice of the best checkpoint and its
    removal of old ones are off.

    Raises:
        ConfigError: a value is refused by transformers.
    """
    options = config.training
    strategy = "epoch" if options.save_steps == "epoch" else "steps"
    watched = has_validation and options.scheduler in WATCHING
    every = 1 if options.save_steps == "epoch" else options.save_steps
    if precision.device == "cpu":
        connect(options.collective_timeout)
    try:
        arguments = TrainingArguments(
            output_dir=config.output_dir,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=chosen(options.epochs),
            max_steps=options.max_steps or -1,
            learning_rate=chosen(options.learning_rate),
            lr_scheduler_type=options.scheduler,
            warmup_steps=options.warmup_steps,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            logging_steps=options.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a step with such a loss ends the run; looking for it here waits for the device
            save_strategy=strategy,
            save_steps=every,
            eval_strategy=strategy if has_validation else "no",
            eval_steps=every,
            prediction_loss_only=True,
            metric_for_best_model=f"eval_{config.metric}" if watched else None,
            greater_is_better=higher_is_better(config.metric) if watched else None,
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


def check_layers(config: RunConfig, model: Path) -> None:
    """Find what the model itself rules out, from its `config.json` alone.

    Args:
        model: the base model's folder.

    Raises:
        ModelError: it is no causal language model; `lora.target_modules` names no layer of it.
    """
    model_shape(model, config.hub.trust_remote_code)
    if config.training.method != "full" and config.lora.target_modules != ALL_LINEAR:
        attach_adapter(_without_weights(model, config.hub.trust_remote_code), config.lora)


def check_feasible(config: RunConfig, precision: Precision, rows: int, has_validation: bool) -> None:
    """Find what the libraries would refuse only after the weights are loaded, and what would train nothing.

    Args:
        rows: number of training rows.

    Raises:
        ConfigError: the schedule is unknown, or needs what has no key here; warm-up takes the whole run.
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


def _check_scheduler(name: str, warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, warmup, steps)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training.scheduler={name} cannot be used: {first_line(error)}") from error


def _without_weights(folder: Path, trust_remote_code: bool) -> Any:
    """The model's layers on torch's meta device, where they take no memory."""
    shape, kind = model_shape(folder, trust_remote_code)
    with torch.device("meta"):
        return kind.from_config(shape, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def cannot_compute(precision: Precision) -> Iterator[None]:
    """Around the first, plain call of a model: what its own code cannot do in this format here becomes one message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        what, where = first_line(error), f"{precision.name} on {precision.device}"
        if precision.name == "fp32":
            raise ModelError(f"the model's own code does not run in {where}: {what}") from error
        raise ModelError(
            f"the model's own code does not run in {where}: {what}; training.precision=fp32 may do"
        ) from error


def prepare_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    precision: Precision,
    train: Dataset,
    *,
    device: torch.device,
    say: Say,
    resumed: bool = False,
) -> StepSettings:
    """Decide how steps are computed: check the fast way on real rows, measure memory, compile.

    Leaves the random state as it was.
    """
    options = config.training
    order = step_order(len(train), options.batch_size, options.seed, 0)
    steps = rows_of_steps(train, order, SAMPLED_STEPS)
    sample = sample_rows(steps[0])
    pad_id = tokenizer.pad_token_id

    def smallest(value: int) -> int:
        return int(all_reduce([value], "min")[0])

    begin(
        "checking again, as this machine may be another one, whether packed rows compute what single rows do"
        if resumed
        else "checking whether packed rows compute what single rows do",
        say,
    )
    with random_state_kept():
        with cannot_compute(precision):
            head = chunkable_head(model, torch.tensor([sample[0].ids], device=device))
        each_call = call_tokens(model, device)

        def choose(wanted: Packing, checkpointing: bool) -> Choice:
            given = (model, sample, wanted, precision, pad_id)
            return choose_packing(*given, head=head, say=say, checkpointing=checkpointing)

        def measured(packing: Packing) -> int:
            # Where all weights are trained, autocast's copies of them would be counted for activations.
            mixed = precision.mixed() if precision.weights == precision.dtype else contextlib.nullcontext()
            with mixed:
                return activation_bytes(model, sample, packing, pad_id, head)

        def budget(packing: Packing, checkpointing: bool | None) -> MemoryBudget:
            tokens = options.max_tokens_per_pack
            return budget_memory(
                steps,
                packing,
                wanted_tokens=None if tokens == "auto" else tokens,
                wanted_checkpointing=checkpointing,
                processes=world_size(),
                call_tokens=each_call,
                bytes_per_token=smallest(measured(packing)),
                vocabulary=model.config.get_text_config().vocab_size,
                device=device,
                agree=smallest,
            )

        asked = options.gradient_checkpointing
        choice = choose(options.packing, asked is True)
        memory = budget(choice.packing, None if asked == "auto" else asked)
        if memory.checkpointing and choice.packing == "shared_cache":
            choice = choose(choice.packing, True)
            memory = budget(choice.packing, True)
        if memory.checkpointing:
            enable_checkpointing(model)
        if options.compile:
            compile_layers(model)
            choice = choose(choice.packing, memory.checkpointing)
    most = 1 if choice.one_by_one else memory.max_tokens
    settings = StepSettings(
        choice.packing, most, pad_id, head, pairs_per_token(model), each_call, options.objective
    )
    say(describe(settings, memory, steps))
    return settings


def describe(settings: StepSettings, memory: MemoryBudget, steps: list[list[Row]]) -> str:
    """One line on how steps are computed."""
    examples = sum(len({row.record for row in step}) for step in steps)
    given = sum(len(row.ids) for step in steps for row in step)
    computed = settings.computed(steps)
    return (
        f"steps: packing={settings.packing}, at most {settings.max_tokens:,} tokens at a time; "
        f"{computed / examples:.0f} tokens computed per example of {given / examples:.0f}; "
        f"{'gradient checkpointing on' if memory.checkpointing else 'gradient checkpointing off'} "
        f"({memory.bytes_per_token / 1e3:.0f} kB of activations per token, {memory.free / 1e9:.1f} GB free)"
    )


def compile_layers(model: PreTrainedModel) -> None:
    """torch.compile the decoder layers one by one, in place, for packs of any length.

    They are what the model calls most, and compiling them alone keeps parameter names and gradient checkpointing as they are.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True)


@dataclass(frozen=True)
class MemoryBudget:
    """How much goes through the model at once.

    Attributes:
        max_tokens: tokens of a pack.
        checkpointing: recompute activations in the backward pass.
        bytes_per_token: activations of one token, measured without checkpointing.
        free: bytes that were free.
    """

    max_tokens: int
    checkpointing: bool
    bytes_per_token: int
    free: int


class Weights:
    """Where the weights lie in memory while a model runs; shared-out ones are put together layer by layer."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()

    def _note(self, module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            self.addresses.add(local.untyped_storage().data_ptr())

    @contextlib.contextmanager
    def watched(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, `addresses` grows with every module that is called."""
        hooks = [module.register_forward_pre_hook(self._note) for module in model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def activation_bytes(
    model: PreTrainedModel, rows: Sequence[Row], packing: Packing, pad_id: int, head: torch.nn.Module | None
) -> int:
    """Bytes that the backward pass of one token keeps, from one forward pass over `rows` in training mode.

    Weights are not counted, shared storages once. The random state moves; call it where that is put back.
    """
    device = next(model.parameters()).device
    weights = Weights()
    sizes: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights.addresses:
            # The storage is held on to, so that its address is not given to another one meanwhile.
            sizes[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    pack = pack_step(rows, sum(len(row.ids) for row in rows), packing)[0][0]
    batch = make_batch(rows, pack, packing, pad_id).to(device)
    with (
        attention_for(model, packing),
        weights.watched(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        answer_loss(model, head, batch)
    return max(1, sum(size for _, size in sizes.values()) // batch.tokens)


def budget_memory(
    steps: Sequence[Sequence[Row]],
    packing: Packing,
    *,
    wanted_tokens: int | None,
    wanted_checkpointing: bool | None,
    processes: int,
    call_tokens: int = CALL_TOKENS,
    bytes_per_token: int,
    vocabulary: int,
    device: torch.device,
    agree: Callable[[int], int],
) -> MemoryBudget:
    """Tokens a pack and checkpointing, where the config leaves them open (None).

    The longest example must fit; beyond that a pack is no larger than what keeps the device busy and shares nearly all
    that can be shared.

    Args:
        steps: the first steps of the run, to see what sharing brings.
        call_tokens: tokens of padding that cost as much as a call of the model.
        vocabulary: columns of the output layer, for the logits of one chunk.
        agree: makes processes agree on the smallest of their numbers.
    """
    free = agree(free_memory(device))
    # Logits of a chunk, their softmax and the copy in the compute type.
    room = max(0, int(SHARE[device.type] * free) - 3 * 4 * positions_at_once(vocabulary, device) * vocabulary)
    longest = max(len(row.ids) for step in steps for row in step)
    useful = wanted_tokens or max(
        longest, useful_tokens(steps, packing, processes, ENOUGH[device.type], call_tokens)
    )
    checkpointing = bool(wanted_checkpointing)
    if wanted_checkpointing is None:
        # Worth it only when even a modest pack does not fit: it costs a second forward pass.
        modest = max(longest, wanted_tokens or min(useful, ENOUGH[device.type] // 4))
        checkpointing = room < modest * bytes_per_token
    each = int(bytes_per_token * (KEPT_BY_CHECKPOINTING if checkpointing else 1.0)) or 1
    tokens = wanted_tokens or min(useful, max(longest, room // each))
    return MemoryBudget(tokens, checkpointing, bytes_per_token, free)


def pairs_per_token(model: PreTrainedModel) -> int:
    """How many pairs of a query and a key cost as much as one token's matrix products, by the model's shape.

    A forward pass takes 2 operations a weight and token, and 4 a pair, layer and dimension of the heads.
    """
    width = attention_width(model.config.get_text_config())
    if not width:
        return PAIRS_PER_TOKEN
    return max(1, layer_weights(model) // (2 * width))


def attention_width(shape: PreTrainedConfig) -> int:
    """Dimensions of all query heads of all layers, which may differ from layer to layer (Gemma 4); 0 where the config does not say."""
    layers = range(getattr(shape, "num_hidden_layers", None) or 0)
    by_layer = shape.per_layer_config if getattr(shape, "is_heterogeneous", False) else None
    width = 0
    for number in layers:
        layer = shape if by_layer is None else by_layer[number]
        heads = getattr(layer, "num_attention_heads", None) or 0
        width += heads * (getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0))
    return width


def layer_weights(model: PreTrainedModel) -> int:
    """Weights of all layers that read text: without embeddings and output layer."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(module.weight) for module in ends if module is not None}
    return sum(p.numel() for p in language_model(model).parameters() if id(p) not in embeddings)


def call_tokens(model: PreTrainedModel, device: torch.device) -> int:
    """How many tokens of padding cost as much as one more call of the model, by the model's shape.

    A call reads the weights once more, and starts every operation of every layer, which takes the longer for the fewer weights
    a token passes.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    work = CALL_WORK[device.type] * layers // layer_weights(model)
    return 32 + min(work, MOST_CALL_TOKENS[device.type])


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass; frozen input embeddings still get no gradient.

    transformers makes the embeddings' output require a gradient, which reentrant checkpointing needs; ours is the other
    kind, and everything below the lowest adapter stays out of the backward pass.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
