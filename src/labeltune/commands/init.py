"""`labeltune init` and `labeltune keys`: a config to start from, and the keys that it can have."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, get_args

import typer

from labeltune.config import TaskName
from labeltune.config_table import key_rows
from labeltune.errors import ConfigError, OutputError
from labeltune.io.outputs import check_folder, write_text
from labeltune.messages import language, localize, spoken
from labeltune.other_names import KEYS, our_name, plain


@spoken("stdout")
def init(
    task: Annotated[
        str | None, typer.Argument(help="What is learnt.", metavar="classification|multilabel|ner")
    ] = None,
    folder: Annotated[Path, typer.Argument(help="Where to write.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_option: Annotated[str | None, typer.Option("--task", hidden=True)] = None,
) -> None:
    """Write a config and sample rows, to train and to test on."""
    if task is None:
        if as_option is not None:
            raise ConfigError(f"name the task: labeltune init {as_option}")
        raise ConfigError(
            "name the task: labeltune init classification, labeltune init multilabel, or labeltune init ner"
        )
    if task not in get_args(TaskName):
        raise ConfigError(f"unknown task {task!r}; it is classification, multilabel or ner")
    check_folder(folder, [])
    source = resources.files("labeltune.starter")
    chinese = language() == "zh"
    names = [f"{task}.yaml", f"{task}.jsonl", f"{task}_test.jsonl"]
    existing = [name for name in names if (folder / name).exists()]
    if existing and not force:
        raise OutputError(f"{folder / existing[0]} exists already; --force replaces it")
    for name in names:
        original = f"{task}.zh.yaml" if chinese and name.endswith(".yaml") else name
        write_text(folder / name, source.joinpath(original).read_text(encoding="utf-8"))
        test = name.endswith("_test.jsonl")
        rows = f"wrote {folder / name}: {'sample rows to test on' if test else 'sample rows to train on'}"
        print(f"wrote {folder / name}: config" if name.endswith(".yaml") else rows)
    if chinese:
        print("the sample is in English, as pocket reads English; for Chinese rows see `model` in the config")
    print("\ngo on with:")
    if folder.resolve() != Path.cwd().resolve():
        print(f"  cd {shlex.quote(str(folder))}")
    print(f"  labeltune data check {task}.jsonl\n  labeltune train {task}.yaml")
    print(f"  labeltune evaluate output/{task} --data {task}_test.jsonl")


def keys(
    word: Annotated[
        str | None,
        typer.Argument(help="Only keys with this in their name or meaning; another tool's name too."),
    ] = None,
) -> None:
    """List the config keys: key, default, meaning."""
    chinese = language() == "zh"
    rows = list(key_rows("zh" if chinese else "en"))
    if word is not None:
        elsewhere = our_name(word)
        if elsewhere is not None:
            print(f"{localize(elsewhere)}\n")
        wanted, named = word.lower(), KEYS.get(plain(word), ("", "", ""))[1]
        rows = [row for row in rows if wanted in row[0] or wanted in row[2].lower() or row[0] == named]
        if not rows and elsewhere is None:
            for near in get_close_matches(word, [row[0] for row in key_rows("en")], n=1):
                raise ConfigError(f"no key has {word!r} in its name or meaning; did you mean {near}?")
            raise ConfigError(
                f"no key has {word!r} in its name or meaning; `labeltune keys` lists all of them"
            )
    width = max(40, shutil.get_terminal_size().columns)
    for key, default, meaning in rows:
        print(localize(f"{key}  (default: {default})") if default else key)
        # Chinese has no blanks to wrap at; the terminal does it.
        indent = "    "
        wrapped = textwrap.fill(meaning, width, initial_indent=indent, subsequent_indent=indent)
        print(f"{indent}{meaning}" if chinese else wrapped)
