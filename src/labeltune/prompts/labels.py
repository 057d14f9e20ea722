"""The labels that a row chooses from, for both kinds of classification."""

from __future__ import annotations

import functools
import unicodedata

from labeltune.errors import DataError
from labeltune.types import Example


@functools.lru_cache(maxsize=1024)
def label_fault(labels: tuple[str, ...]) -> str | None:
    """Why these labels cannot be chosen from, or None: one is empty, or two are equal but for spaces around them and Unicode
    composition (NFC, which tokenizers apply)."""
    seen: dict[str, str] = {}
    for label in labels:
        plain = unicodedata.normalize("NFC", label).strip()
        if not plain:
            return f"the label {label!r} is empty"
        if plain in seen:
            return f"the labels {seen[plain]!r} and {label!r} cannot be told apart; rename one or remove it"
        seen[plain] = label
    return None


def candidates_of(example: Example, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that this example chooses from: its own, else those of its task.

    Raises:
        DataError: neither has any; one is empty, or two cannot be told apart.
    """
    found = example.candidates or labels
    fault = "no candidate labels, and no label set is known" if not found else label_fault(found)
    if fault:
        raise DataError(f"{example.where}: {fault}")
    return found
