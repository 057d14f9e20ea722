"""Options that other tools have: answered with what they are here, before typer says that there is no such option."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from labeltune.errors import ConfigError
from labeltune.other_names import our_name


def check_options(arguments: Sequence[str], known: Iterable[str]) -> None:
    """Look through the arguments of a command that takes `key=value`.

    Args:
        known: the command's own options.

    Raises:
        ConfigError: some are another tool's options, or config keys with dashes in front.
    """
    known, answers = set(known), []
    for at, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if argument == "--":
            break
        if not name.startswith("--") or name in known:
            continue
        if not separator:
            following = arguments[at + 1] if at + 1 < len(arguments) else "--"
            value = "" if following.startswith("--") else following
        answer = our_name(name, value or None) or _own_key(name, value)
        if answer is not None:
            answers.append(answer)
    if answers:
        raise ConfigError(
            f"{'; '.join(answers)}. Settings are written key=value, without dashes; `labeltune keys` lists them"
        )


def _own_key(option: str, value: str) -> str | None:
    from labeltune.config import config_keys

    wanted = option.lstrip("-").replace("-", "_")
    keys = [key for key, *_ in config_keys()]
    found = [key for key in keys if key == wanted] or [
        key for key in keys if key.rpartition(".")[2] == wanted
    ]
    return f"{option} is written {found[0]}={value or '...'} here" if found else None
