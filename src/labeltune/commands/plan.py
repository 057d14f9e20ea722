"""`labeltune plan`, which is `labeltune train --dry-run`: what a run costs, by its first steps; nothing is saved."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from labeltune.commands.preparing import (
    count_parameters,
    load_for_training,
    prepare,
    read_rows,
    tell_on_main,
    tokenize_splits,
)
from labeltune.config import RunConfig
from labeltune.distributed import rank
from labeltune.io.progress import Say, begin, no_long_silence
from labeltune.messages import localize

if TYPE_CHECKING:
    from labeltune.training.token_figures import TokenFigures


def plan(config: RunConfig, *, say: Say = tell_on_main) -> CostEstimate:
    """Find out what a run costs, on the machine where it will run.

    Data are checked, rows tokenized and the self-check made as in training; then the first steps are trained and timed. The
    run folder is neither made nor touched, no tracker is started, and nothing is kept but the tokens in the cache, which
    training finds there.

    Raises:
        LabeltuneError: config, data or model are refused, as training would.
    """
    with no_long_silence(say):
        return _plan(config, say)


def _plan(config: RunConfig, say: Say) -> CostEstimate:
    prepared = prepare(config, read_rows(config, say), say)
    config = prepared.config
    import torch

    from labeltune.models.precision import free_memory
    from labeltune.training.packing import steps_an_epoch, steps_in_all
    from labeltune.training.run import peak_memory, time_steps
    from labeltune.training.token_figures import token_figures

    options, splits, builder = config.training, prepared.splits, prepared.builder
    tokens, _ = tokenize_splits(config, splits, builder, say)

    precision = prepared.precision
    device = torch.device(precision.device)
    free = free_memory(device)
    with peak_memory(device) as memory:
        model = load_for_training(prepared, say)
        trained, parameters = count_parameters(model)
        timed = time_steps(
            model,
            builder.template.tokenizer,
            config,
            precision,
            tokens,
            say=say,
            where=prepared.where,
        )
    begin("counting tokens")
    as_timed = options.model_copy(update={"max_tokens_per_pack": timed.max_tokens})
    figures = token_figures(splits.train, builder, as_timed)
    computed_per_row = figures.computed[timed.packing] / figures.planned_rows
    steps = steps_in_all(len(tokens), options)
    epochs = steps / steps_an_epoch(len(tokens), options.batch_size)
    computed = round(computed_per_row * len(tokens) * epochs)
    return CostEstimate(
        model=config.model,
        parameters=parameters,
        trained=trained,
        rows=len(tokens),
        validation_rows=splits.held_out,
        steps=steps,
        tokens=figures,
        computed_per_row=round(computed_per_row, 2),
        computed_tokens=computed,
        packing=timed.packing,
        max_tokens_per_pack=timed.max_tokens,
        checkpointing=timed.checkpointing,
        device=precision.device,
        memory=memory[0],
        free_memory=free,
        step_seconds=timed.seconds,
        seconds=sum(timed.seconds) * computed / timed.computed,
    )


@dataclass(frozen=True)
class CostEstimate:
    """The costs of a run with a config on this machine.

    Attributes:
        parameters: weights; `trained` of them are trained.
        rows: training rows; an epoch reads each once.
        validation_rows: rows held out.
        steps: optimizer steps of the run.
        tokens: where the tokens go, what the budget cuts and what sharing saves.
        computed_per_row: tokens that the model computes for a row, as rows share what they have in common.
        computed_tokens: of the whole run, by the first steps of its first epoch; exact where these are all steps.
        packing: how examples go through the model here.
        max_tokens_per_pack: what the config says, else what training chooses with this memory.
        checkpointing: whether activations are recomputed.
        memory: most bytes that model, self-check and steps took of `device` (on the CPU: of main memory).
        free_memory: bytes that were free there before.
        step_seconds: of each step that was timed.
        seconds: of all steps; validation and saving come on top.
    """

    model: str
    parameters: int
    trained: int
    rows: int
    validation_rows: int
    steps: int
    tokens: TokenFigures
    computed_per_row: float
    computed_tokens: int
    packing: str
    max_tokens_per_pack: int
    checkpointing: bool
    device: str
    memory: int
    free_memory: int
    step_seconds: tuple[float, ...]
    seconds: float

    @property
    def hours(self) -> float:
        """The same as `seconds`."""
        return self.seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "tokens": self.tokens.to_dict(), "hours": self.hours}


def print_costs(config: RunConfig, as_json: bool) -> None:
    """Do a dry run, and print what it found."""
    found = plan(config)
    if rank() != 0:
        return
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False, indent=2))
        return
    for line in _lines(found):
        print(localize(line))


def _lines(found: CostEstimate) -> list[str]:
    tokens = found.tokens
    parts = (tokens.prefix_tokens, tokens.text_tokens, tokens.other_tokens, tokens.answer_tokens)
    prefix, text, other, answers = (f"{part / tokens.tokens:.0%}" for part in parts)
    unshared = tokens.computed["packed"] / tokens.planned_rows
    all_steps = f"{found.hours:.2f} h" if found.hours >= 1 else f"{found.seconds:.1f} s"
    timed = ", ".join(f"{seconds:.3g} s" for seconds in found.step_seconds)
    shortened, most, every = f"{tokens.shortened_share:.1%}", tokens.needed["p99"], tokens.needed["max"]
    return [
        f"rows: {found.rows:,} for training, {found.validation_rows:,} for validation; {found.steps:,} steps",
        f"tokens: {tokens.tokens / tokens.rows:.1f} a row; {prefix} common beginning, {text} text, {other} rest of the prompt, "
        f"{answers} answer",
        f"budget: {shortened} of the texts are shortened; prompt.max_length={every} keeps all rows whole"
        if most == every
        else f"budget: {shortened} of the texts are shortened; prompt.max_length={most} keeps 99 % of the rows whole, {every} all",
        f"computed: {found.computed_per_row:.1f} tokens a row with packing={found.packing}, {unshared:.1f} without sharing "
        f"(a row's last token is only predicted); {found.computed_tokens:,} in all",
        f"memory: {found.memory / 1e9:.2f} GB on {found.device}; {found.free_memory / 1e9:.2f} GB were free",
        f"time: {all_steps} for all steps (timed: {timed}); validation and saving come on top",
    ]
