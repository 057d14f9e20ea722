"""`labeltune keys`."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated

import typer


def keys(
    word: Annotated[
        str | None,
        typer.Argument(help="Only keys with this in their name or meaning; another tool's name too."),
    ] = None,
) -> None:
    """List the config keys: key, default, meaning."""
    from labeltune.config_table import key_rows
    from labeltune.errors import ConfigError
    from labeltune.messages import language, localize
    from labeltune.other_names import KEYS, our_name, plain

    chinese = language() == "zh"
    rows = list(key_rows("zh" if chinese else "en"))
    if word is not None:
        elsewhere = our_name(word)
        if elsewhere is not None:
            print(f"{localize(elsewhere)}\n")
        wanted, named = word.lower(), KEYS.get(plain(word), ("", "", ""))[1]
        rows = [row for row in rows if wanted in row[0] or wanted in row[2].lower() or row[0] == named]
        if not rows and elsewhere is None:
            raise ConfigError(
                f"no key has {word!r} in its name or meaning; `labeltune keys` lists all of them"
            )
    width = max(40, shutil.get_terminal_size().columns)
    for key, default, meaning in rows:
        print(f"{key}" + (f"  (default: {default})" if default else ""))
        # Chinese has no blanks to wrap at; the terminal does it.
        indent = "    "
        wrapped = textwrap.fill(meaning, width, initial_indent=indent, subsequent_indent=indent)
        print(f"{indent}{meaning}" if chinese else wrapped)
