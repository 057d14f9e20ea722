"""Plain values of a config: what is made of them before they are checked, and what is said of wrong ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from labeltune.errors import ConfigError, clipped, near_it
from labeltune.io.safe_yaml import read_yaml
from labeltune.other_names import KEYS, our_name, plain

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: How names of config files end.
CONFIG_SUFFIXES = (".yaml", ".yml")
#: Formats of `labeltune.data.formats`; rows are ours.
FormatName = Literal[
    "auto",
    "rows",
    "label-studio",
    "label-studio-min",
    "prodigy",
    "cluener",
    "clue",
    "uie",
    "conll",
    "tokens",
    "gliner",
    "doccano",
    "messages",
    "alpaca",
    "brat",
    "spacy",
]
#: Which of several annotations of a task counts.
Annotations = Literal["latest", "agreed", "first"]


def with_descriptions(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a mapping `data.labels` as what it stands for: its keys there, and itself as `prompt.descriptions`.

    Raises:
        ValueError: there are descriptions in both places, or one is no text.
    """
    data, prompt = values.get("data"), values.get("prompt") or {}
    if not isinstance(data, dict) or not isinstance(data.get("labels"), dict) or not isinstance(prompt, dict):
        return values
    described = {label: text for label, text in data["labels"].items() if text is not None}
    if prompt.get("descriptions"):
        raise ValueError(
            "labels are described in data.labels and in prompt.descriptions; write the descriptions into one of them"
        )
    for label, text in described.items():
        if not isinstance(text, str | int | float):
            raise ValueError(
                f"data.labels.{label} is the description of a label and must be a string, not {type(text).__name__}"
            )
    return {
        **values,
        "data": {**data, "labels": [*data["labels"]]},
        "prompt": {**prompt, "descriptions": described},
    }


def unwritable(value: object, key: str = "") -> Iterator[str]:
    """Dotted names of strings that no file could hold."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            yield key
    elif isinstance(value, dict):
        for name, child in value.items():
            if key:
                yield from unwritable(name, key)
            yield from unwritable(child, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from unwritable(child, key)


def describe(problems: Sequence[ErrorDetails], known: Mapping[str, str]) -> str:
    """What is wrong with a config.

    Args:
        known: all keys that there are, with their types.
    """
    found: dict[str, list[ErrorDetails]] = {}
    for problem in problems:
        *parts, last = map(str, problem["loc"] or ("",))
        key = ".".join(parts)
        # Of a key that takes a number or a word, pydantic tells what is wrong with either.
        two_kinds = "Literal" in known.get(key, "") and not isinstance(problem["input"], (dict, list))
        found.setdefault(key if two_kinds else ".".join([*parts, last]), []).append(problem)
    told = []
    for key, each in found.items():
        if len(each) == 1:
            told.append(_described(each[0], [*known]))
        else:
            ways = ", or ".join(problem["msg"].removeprefix("Input should be ") for problem in each)
            told.append(f"{key}: Input should be {ways} (got {clipped(repr(each[0]['input']), 200)})")
    return "; ".join(told)


def _described(problem: ErrorDetails, known: Sequence[str]) -> str:
    """What is wrong with one key."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {clipped(key, 200)!r}{_suggestion(key, known, problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {clipped(repr(problem['input']), 200)})" if key else message


#: What people call a key, where it is spelled too differently to be found and no other tool's name.
_OTHER_NAMES = {"rank": "lora.r"}


def _suggestion(key: str, known: Sequence[str], value: object) -> str:
    sections = sorted({name.rpartition(".")[0] for name in known if "." in name})
    leaf = key.rpartition(".")[2]
    elsewhere = our_name(key, value)
    if elsewhere is not None:
        named = KEYS.get(plain(key))
        return f": {elsewhere}" if named is None else f"; did you mean {named[1]!r}? {elsewhere}"
    if leaf in _OTHER_NAMES:
        close = [_OTHER_NAMES[leaf]]
    else:
        close = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0.75)
    if not close:
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        found = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)
        close = [leaves[found[0]]] if found else []
    return f"; did you mean {close[0]!r}?" if close else "; `labeltune keys` lists all keys"


def values_of_file(path: Path) -> dict[str, Any]:
    """What stands in a config file.

    Raises:
        ConfigError: it is missing, or no YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist; `labeltune init classification` writes one"
            f"{near_it(path, lambda other: other.suffix in CONFIG_SUFFIXES)}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder; name a config file, or give --data FILE. To go on with a run, repeat the command that began it, "
            "with --resume"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    loaded = read_yaml(text, f"config file {path}")
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(
            f"config file {path} must hold `key: value` lines, not a {type(loaded).__name__}; a file of rows is given with --data"
        )
    return loaded or {}


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in a plain mapping; the value is read as YAML.

    Raises:
        ConfigError: it does not look like that, or the key leads through a value.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key=value, e.g. training.epochs=3")
    try:
        value = read_yaml(text, f"override {key}") if text.strip() else None
    except ConfigError:
        value = text
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = value
