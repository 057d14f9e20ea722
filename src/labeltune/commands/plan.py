"""`labeltune plan`, which is `labeltune train --dry-run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from labeltune.commands.planning import CostEstimate
    from labeltune.config import RunConfig


def plan(
    config: Annotated[Path, typer.Argument(help="YAML config of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: key=value ..., e.g. training.epochs=3", metavar="[KEY=VALUE]..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Say what training will cost: tokens, memory, hours.

    The same as `labeltune train CONFIG --dry-run`: everything up to the first step is done, three real steps are timed, and
    nothing is saved.
    """
    from labeltune.config import load_config

    print_costs(load_config(config, overrides or []), as_json)


def print_costs(config: RunConfig, as_json: bool) -> None:
    """Do a dry run, and print what it found."""
    from labeltune.commands.quiet import quiet_libraries

    quiet_libraries()
    import labeltune
    from labeltune.distributed import rank
    from labeltune.messages import localize

    found = labeltune.plan(config)
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
    timed = ", ".join(f"{seconds:.3g}" for seconds in found.step_seconds)
    return [
        f"rows: {found.rows:,} for training, {found.validation_rows:,} for validation; {found.steps:,} steps",
        f"tokens: {tokens.tokens / tokens.rows:.1f} a row; {prefix} common beginning, {text} text, {other} rest of the prompt, "
        f"{answers} answer",
        f"budget: {tokens.shortened_share:.1%} of the texts are shortened; prompt.max_length={tokens.needed['p99']} keeps 99 % of the "
        f"rows whole, {tokens.needed['max']} all",
        f"computed: {found.computed_per_row:.1f} tokens a row with packing={found.packing}, {unshared:.1f} without sharing; "
        f"{found.computed_tokens:,} in all",
        f"memory: {found.memory / 1e9:.2f} GB on {found.device}; {found.free_memory / 1e9:.2f} GB were free",
        f"time: {_duration(found.seconds)} for all steps (timed: {timed} s); validation and saving come on top",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"
