"""`labeltune train`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    *,
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML config; `labeltune init classification` writes one. None is needed with --data."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: key=value ..., e.g. training.epochs=3", metavar="[KEY=VALUE]..."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run's checkpoints first.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what training will cost: time three real steps, and save nothing."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Shorthand for data.train=...; enough without a config."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Shorthand for model=...")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Shorthand for task=...; guessed from the columns of --data without a config."),
    ] = None,
    accept_license: Annotated[
        str | None, typer.Option(help="Accept a model's terms by name, e.g. gemma.")
    ] = None,
) -> None:
    """Fine-tune a model; checkpoints go to the config's output_dir."""
    from labeltune.commands.data import named_task
    from labeltune.config import load_config
    from labeltune.distributed import rank
    from labeltune.errors import ConfigError

    changes = list(overrides or [])
    if config is not None and "=" in config and not Path(config).exists():
        changes.insert(0, config)
        config = None
    defaults: list[str] = []
    if config is None:
        if data is None:
            raise ConfigError(
                "name a config (`labeltune init classification` writes one) or rows: --data FILE"
            )
        defaults = _defaults(data, task, changes)
    elif data is not None:
        changes.append(_change("data.train", data))
    for key, value in (("task", task), ("model", model), ("hub.accept_license", accept_license)):
        if value is not None:
            changes.append(f"{key}={value}")
    loaded = load_config(config, [*defaults, *changes])
    if config is None and rank() == 0:
        how = "by its columns"
        if task is not None or named_task(changes) is not None:
            how = "as --task says" if task is not None else "as task= says"
        print(
            f"no config: task={loaded.task} ({how}), model={loaded.model}, output_dir={loaded.output_dir}",
            file=sys.stderr,
        )
    if dry_run:
        from labeltune.commands.plan import print_costs

        if resume:
            raise ConfigError("--dry-run is about a whole run; leave out --resume")
        print_costs(loaded, as_json=False)
        return
    from labeltune.commands.quiet import quiet_libraries
    from labeltune.io.run_folder import check_inputs_kept

    check_inputs_kept(loaded, config, overwrite and not resume)

    quiet_libraries()
    import labeltune

    begins = ["--data", str(data)] if config is None else [config]
    command = shlex.join(["labeltune", "train", *begins, *changes])
    labeltune.train(loaded, resume=resume, overwrite=overwrite, command=command)


def _defaults(data: str, task: str | None, changes: list[str]) -> list[str]:
    """What stands in for a config: the task, the rows, and places named after the file."""
    from labeltune.commands.data import guess_task, named_task, reading_config
    from labeltune.io.outputs import is_hub_name

    name = Path(data.partition(":")[2] if is_hub_name(data) else data).name.partition(".")[0] or "run"
    guessed = task or named_task(changes) or guess_task(data, reading_config(changes))
    return [
        f"task={guessed}",
        _change("data.train", data),
        _change("output_dir", f"output/{name}"),
        "swanlab.project=labeltune",
    ]


def _change(key: str, text: str) -> str:
    """An override whose value stays this text, whatever YAML would make of it."""
    return f"{key}={json.dumps(text)}"
