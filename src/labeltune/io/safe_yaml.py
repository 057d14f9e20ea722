"""YAML from anybody: only plain values, no name twice, and no more of them than a configuration can need."""

from __future__ import annotations

from typing import Any

import yaml

from labeltune.errors import ConfigError

#: Characters of a text, and values in it with every alias written out.
MAX_CHARACTERS = 4 * 2**20
MAX_VALUES = 200_000


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML document, made of plain Python values (`yaml.SafeLoader`).

    Args:
        where: names the text in messages.

    Raises:
        ConfigError: it is no YAML, nests too deeply, names a key twice, contains itself, or is larger than the limits, also
            by aliases that repeat aliases.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{where} has {len(text)} characters, and at most {MAX_CHARACTERS} are read; this is no config"
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check(root, where, {})
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{where} nests too deeply") from None
    # SafeLoader has no error of its own for a date or number that only looks like one.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _check(node: yaml.Node, where: str, sizes: dict[yaml.Node, int | None]) -> int:
    """Number of values of a node with its aliases written out, from which nothing has been built yet.

    Args:
        sizes: of the nodes that have been looked at; None for those that hold this one.

    Raises:
        ConfigError: a key twice, a cycle, or too many values.
    """
    if node in sizes:
        known = sizes[node]
        if known is None:
            raise ConfigError(f"{where}:{node.start_mark.line + 1}: a value contains itself")
        return known
    sizes[node] = None
    size = 1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        size += sum(_check(part, where, sizes) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(part, where, sizes) for part in node.value)
    if size > MAX_VALUES:
        raise ConfigError(f"{where} holds more than {MAX_VALUES} values once its aliases are written out")
    sizes[node] = size
    return size


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(
                f"{where}:{line}: the key {key.value!r} stands twice (first in line {seen[key.value]}); merge the two"
            )
        seen[key.value] = line
