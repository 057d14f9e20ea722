"""What a run costs, before it is started: tokens exactly, memory and time estimated; no weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.data.loading import load_splits
from labeltune.processes import worker_count
from labeltune.progress import row_progress
from labeltune.ranks import world
from labeltune.recipes.data import without_too_long
from labeltune.tasks import make_task
from labeltune.tasks.builder import PromptBuilder

if TYPE_CHECKING:
    from labeltune.modeling.precision import Precision
    from labeltune.training.costs import ModelShape, SmallModel
    from labeltune.training.memory import MemoryPlan
    from labeltune.training.planner import Row
    from labeltune.training.token_plan import TokenPlan

#: Fewer rows are planned before other processes would have started.
_ENOUGH_ROWS = 4_000


@dataclass(frozen=True)
class RunPlan:
    """The costs of a run with a config on this machine.

    Attributes:
        rows: training rows; an epoch reads each once.
        validation_rows: rows held out.
        steps: optimizer steps of the run.
        tokens_per_row: tokens of a row that the model reads.
        computed_per_row: tokens that it computes for a row, as rows share what they have in common.
        computed_tokens: of the whole run, exactly what training computes with these packs.
        answer_tokens: positions that the output layer runs on, of the whole run.
        packing: how examples go through the model, if the model allows it: training checks that first.
        max_tokens_per_pack: what the config says, else what training would choose with this memory.
        largest_pack: tokens of the largest pack there is.
        checkpointing: whether activations are recomputed.
        flops: operations by part: layers, attention, output.
        memory: bytes by part; `free` is what this machine has, no part.
        gflops: operations a second, in thousand millions; None when not given and not measured.
        hours: of training alone; validation and saving come on top. None without a rate.
        device: that memory and rate are for.
    """

    model: str
    parameters: int
    trained: int
    rows: int
    validation_rows: int
    steps: int
    tokens_per_row: float
    computed_per_row: float
    computed_tokens: int
    answer_tokens: int
    packing: str
    max_tokens_per_pack: int
    largest_pack: int
    checkpointing: bool
    flops: dict[str, float]
    memory: dict[str, int]
    free_memory: int
    gflops: float | None
    hours: float | None
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan(
    config: RunConfig, *, gflops: float | None = None, measure: bool = False, progress: bool = True
) -> RunPlan:
    """Plan a run.

    Args:
        gflops: a rate to count hours with, in thousand million operations a second.
        measure: measure the rate on this machine, on a few of the model's layers with random weights.

    Raises:
        LabeltuneError: config, data or model are refused, as training would.
    """
    import torch

    from labeltune.modeling.hub import load_tokenizer, resolve_model
    from labeltune.modeling.precision import free_memory, pick_precision
    from labeltune.prompts.template import ChatTemplate
    from labeltune.training.costs import (
        ALLOCATOR,
        SmallModel,
        count_flops,
        extrapolated,
        model_shape,
        output_layer_bytes,
    )
    from labeltune.training.dataset import tokenize_rows
    from labeltune.training.memory import plan_memory
    from labeltune.training.preflight import SAMPLED_STEPS
    from labeltune.training.self_check import sample_rows
    from labeltune.training.token_plan import largest_pack, plan_tokens, run_order, steps_in_all, to_rows

    options, processes = config.training, world()
    splits = load_splits(config.task, config.data, config.hub, options.seed)
    local = resolve_model(config.model, config.hub, weights=False)
    template = ChatTemplate(load_tokenizer(local.folder, config.hub.trust_remote_code))
    builder = PromptBuilder(make_task(config.task, splits.labels, config.prompt), template)
    splits = without_too_long(splits, builder, config)
    tokens, _ = tokenize_rows(splits.train, builder, config.data.workers)
    precision = pick_precision(options.precision, full=options.method == "full")
    shape = model_shape(local.folder, config, precision)
    device = torch.device(precision.device)

    first = islice(run_order(len(tokens), options), SAMPLED_STEPS)
    steps = [to_rows([tokens[i] for i in numbers]) for numbers in first]
    packing = options.packing
    small = [SmallModel(local.folder, config, precision, layers) for layers in (1, 2)]
    sample = sample_rows(steps[0])
    kept = [model.per_token(sample, packing) for model in small]
    per_token = int(extrapolated(kept[0], kept[1], shape.layers))
    memory = plan_memory(
        None if options.max_tokens_per_pack == "auto" else options.max_tokens_per_pack,
        None if options.gradient_checkpointing == "auto" else options.gradient_checkpointing,
        steps,
        packing,
        processes,
        per_token,
        shape.vocabulary,
        device,
        lambda value: value,
    )
    workers = worker_count(config.data.workers, len(tokens) >= _ENOUGH_ROWS)
    in_all = min(steps_in_all(len(tokens), options) * options.batch_size, round(len(tokens) * options.epochs))
    shown = progress and in_all >= _ENOUGH_ROWS
    with row_progress(in_all, "plan", shown, last_line=False) as advance:
        found = plan_tokens(tokens, options, memory.max_tokens, packing, processes, workers, advance)

    rows, pack = largest_pack(found, tokens, memory.max_tokens, packing, processes)
    peaks = [model.peak(rows, pack, packing, memory.checkpointing) for model in small]
    peak = int(extrapolated(peaks[0], peaks[1], shape.layers))
    flops = count_flops(shape, found, memory.checkpointing)
    seconds = None if gflops is None else flops.total / (gflops * 1e9)
    if measure:
        seconds = _measured_seconds(
            config, precision, shape, found, steps, memory, processes, small[0], local.folder
        )
        gflops = flops.total / seconds / 1e9
    gradients = shape.gradient_bytes
    return RunPlan(
        model=config.model,
        parameters=shape.parameters,
        trained=shape.trained,
        rows=len(tokens),
        validation_rows=0 if splits.validation is None else len(splits.validation),
        steps=found.steps,
        tokens_per_row=round(found.given / found.rows, 2),
        computed_per_row=round(found.computed / found.rows, 2),
        computed_tokens=found.computed,
        answer_tokens=found.answers,
        packing=packing,
        max_tokens_per_pack=memory.max_tokens,
        largest_pack=found.largest,
        checkpointing=memory.checkpointing,
        flops={"layers": flops.layers, "attention": flops.attention, "output": flops.output},
        memory={
            "weights": shape.weight_bytes,
            "adapter": shape.trained_bytes,
            "gradients": gradients,
            "optimizer": 2 * gradients,
            "activations": int(ALLOCATOR.get(device.type, 1.0) * max(0, peak - gradients)),
            "output_layer": output_layer_bytes(shape),
        },
        free_memory=free_memory(device),
        gflops=None if gflops is None else round(gflops, 3),
        hours=None if seconds is None else seconds / 3600,
        device=precision.device,
    )


def _measured_seconds(
    config: RunConfig,
    precision: Precision,
    shape: ModelShape,
    plan: TokenPlan,
    steps: list[list[Row]],
    memory: MemoryPlan,
    processes: int,
    few: SmallModel,
    folder: Path,
) -> float:
    """Seconds of the run's optimizer steps in one process on this machine, from some of its first steps.

    Args:
        few: a model of one layer, without gradients.
        folder: the model's, for one of more layers.
    """
    import torch

    from labeltune.training import timing
    from labeltune.training.costs import SmallModel, count_flops
    from labeltune.training.planner import plan_step
    from labeltune.training.token_plan import TokenPlan, sums

    packing, checkpointing = config.training.packing, memory.checkpointing
    cut = []
    for rows in steps:
        shares = plan_step(rows, memory.max_tokens, packing, processes)
        cut.append((rows, [pack for share in shares for pack in share]))
    sampled = reduce(TokenPlan.plus, (sums(rows, packs, packing) for rows, packs in cut))
    many = SmallModel(folder, config, precision, timing.MANY)
    return timing.run_seconds(
        shape,
        count_flops(shape, sampled, checkpointing),
        count_flops(shape, plan, checkpointing),
        plan.steps,
        len(steps),
        timing.layer_seconds(few, many, cut, packing, checkpointing),
        timing.output_seconds(shape, sampled.answers, precision.weights, torch.device(precision.device)),
        timing.optimizer_seconds(few, shape.trained),
    )
