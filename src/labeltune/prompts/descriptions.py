"""Labels as a prompt lists them: their names, or a line each with what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def listed(labels: Sequence[str], descriptions: Mapping[str, str]) -> dict[str, str]:
    """What the places `category` and `labels` of a prompt are filled with.

    Labels of which none is described stand as Python writes a list of strings, and between semicolons. Else both places hold
    a line a label, the first of them behind a line break.
    """
    if not any(label in descriptions for label in labels):
        return {"category": repr(list(labels)), "labels": "; ".join(labels)}
    lines = "".join(
        f"\n{label}: {descriptions[label]}" if label in descriptions else f"\n{label}" for label in labels
    )
    return {"category": lines, "labels": lines}
