"""`labeltune plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from labeltune.recipes.planning import RunPlan


def plan(
    config: Annotated[Path, typer.Argument(help="YAML config of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: key=value ..., e.g. training.epochs=3", metavar="[KEY=VALUE]..."),
    ] = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            help="Rate to count hours with, in thousand million operations a second: what your GPU reaches, e.g. 150000.",
            min=0.001,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the rate on this machine, on a few layers of the model."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Say what training will cost, before anything is trained.

    Tokens exactly, memory and hours estimated. No weights are loaded.
    """
    from labeltune.config import load_config
    from labeltune.errors import ConfigError

    if measure and gflops is not None:
        raise ConfigError("give --gflops or --measure, not both")
    loaded = load_config(config, overrides or [])

    from labeltune.cli.quiet import quiet_libraries

    quiet_libraries()
    from labeltune.recipes.planning import plan as make_plan

    found = make_plan(loaded, gflops=gflops, measure=measure)
    print(json.dumps(found.to_dict(), ensure_ascii=False, indent=2) if as_json else _shown(found))


def _shown(plan: RunPlan) -> str:
    total_flops, total_memory = sum(plan.flops.values()), sum(plan.memory.values())
    lines = [
        f"model            {plan.model}: {plan.parameters:,} weights, {plan.trained:,} of them trained",
        f"rows             {plan.rows:,} for training, {plan.validation_rows:,} for validation; {plan.steps:,} steps",
        f"tokens           {plan.tokens_per_row:.1f} per row, {plan.computed_per_row:.1f} computed ({plan.packing}); "
        f"{plan.computed_tokens:,} computed in all",
        f"packs            training.max_tokens_per_pack={plan.max_tokens_per_pack}; the largest has {plan.largest_pack} "
        f"tokens; checkpointing {'on' if plan.checkpointing else 'off'}",
        f"operations       {_si(total_flops)}FLOP: "
        + ", ".join(f"{name} {value / total_flops:.0%}" for name, value in plan.flops.items()),
        f"memory           {_si(total_memory)}B of {_si(plan.free_memory)}B that are free here ({plan.device}): "
        + ", ".join(f"{name.replace('_', ' ')} {_si(value)}B" for name, value in plan.memory.items()),
    ]
    if plan.hours is None or plan.gflops is None:
        lines.append("time             give a rate (--gflops) or measure one here (--measure)")
    else:
        shown = f"{plan.hours:.2f} h" if plan.hours >= 1 else f"{plan.hours * 3600:.1f} s"
        lines.append(
            f"time             {shown} at {_si(plan.gflops * 1e9)}FLOP/s, without validation and saving"
        )
    return "\n".join(lines)


def _si(value: float) -> str:
    """Three digits with a unit's prefix, and a blank before it."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}"
        value /= 1000
    raise AssertionError("unreachable")
