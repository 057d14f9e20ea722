"""YAML from anybody: only plain values, no name twice, and no more of them than a configuration can need."""

from __future__ import annotations

from collections.abc import Iterator
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
            _check(root, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError:
        raise ConfigError(f"{where} nests too deeply") from None
    # SafeLoader has no error of its own for a date or number that only looks like one.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _check(root: yaml.Node, where: str) -> None:
    """Refuse repeated keys, cycles, and aliases that multiply; nothing has been built from the nodes yet."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in _children(node))
            if sizes[id(node)] > MAX_VALUES:
                raise ConfigError(
                    f"{where} holds more than {MAX_VALUES} values once its aliases are written out"
                )
            continue
        if id(node) in sizes:
            continue
        if id(node) in open_nodes:
            raise ConfigError(f"{where}:{node.start_mark.line + 1}: a value contains itself")
        open_nodes.add(id(node))
        _check_keys(node, where)
        stack.append((node, True))
        stack.extend((child, False) for child in _children(node))


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.Node, where: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
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
