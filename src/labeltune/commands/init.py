"""`labeltune init`."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from labeltune.messages import spoken


@spoken("stdout")
def init(
    task: Annotated[str, typer.Argument(help="classification or ner")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write a config and sample rows, to train and to test on."""
    from labeltune.errors import ConfigError, OutputError
    from labeltune.io.outputs import check_folder, write_text

    if task not in ("classification", "ner"):
        raise ConfigError(f"unknown task {task!r}; it is classification or ner")
    check_folder(folder, [])
    source = resources.files("labeltune.starter")
    names = [f"{task}.yaml", f"{task}.jsonl", f"{task}_test.jsonl"]
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise OutputError(f"{folder / existing[0]} exists already; --force replaces it")
    for name in names:
        write_text(folder / name, source.joinpath(name).read_text(encoding="utf-8"))
        print(folder / name)
    print("\ngo on with:")
    if folder.resolve() != Path.cwd().resolve():
        print(f"  cd {shlex.quote(str(folder))}")
    print(f"  labeltune data check {task}.jsonl\n  labeltune train {task}.yaml")
    print(f"  labeltune evaluate output/{task} --data {task}_test.jsonl")
