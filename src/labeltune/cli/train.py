"""`labeltune train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML config; `labeltune init classification` writes one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: key=value ..., e.g. training.epochs=3", metavar="[KEY=VALUE]..."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run's checkpoints first.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Shorthand for model=...")] = None,
    accept_license: Annotated[
        str | None, typer.Option(help="Accept a model's terms by name, e.g. gemma.")
    ] = None,
) -> None:
    """Fine-tune a model; checkpoints go to the config's output_dir."""
    from labeltune.config import load_config

    changes = list(overrides or [])
    if model is not None:
        changes.append(f"model={model}")
    if accept_license is not None:
        changes.append(f"hub.accept_license={accept_license}")
    loaded = load_config(config, changes)

    from labeltune.cli.quiet import quiet_libraries

    quiet_libraries()
    from labeltune import recipes

    command = shlex.join(["labeltune", "train", str(config), *changes])
    recipes.train(loaded, resume=resume, overwrite=overwrite, command=command)
