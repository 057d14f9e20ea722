"""Does what was exported answer as the run does? Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labeltune.errors import ParityError, listed
from labeltune.evaluation.spans import spans
from labeltune.types import Entity, Example, Prediction

#: Differing rows that an error lists.
SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """A row that is answered otherwise.

    Attributes:
        margin: probability of the run's label minus that of the export's label, both in the run's ranking; None for
            entities and for generated answers.
    """

    where: str
    before: str
    after: str
    margin: float | None

    def __str__(self) -> str:
        margin = "" if self.margin is None else f" (margin {self.margin:.4f})"
        return f"{self.where}: {self.before} -> {self.after}{margin}"


@dataclass(frozen=True)
class Parity:
    """How far the answers of an export are from those of its run.

    Attributes:
        largest_shift: the largest change of a candidate's probability over all rows; None without probabilities.
        unparsed: answers of the export that do not have the form that was asked for.
    """

    rows: int
    differences: tuple[Difference, ...]
    largest_shift: float | None
    unparsed: int = 0

    @property
    def share(self) -> float:
        """Share of the rows that are answered otherwise."""
        return len(self.differences) / self.rows if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, without texts."""
        shift = None if self.largest_shift is None else round(self.largest_shift, 6)
        return {
            "rows": self.rows,
            "differing": len(self.differences),
            "largest_probability_shift": shift,
            "unparsed": self.unparsed,
        }

    def __str__(self) -> str:
        shift = (
            "" if self.largest_shift is None else f"; largest shift of a probability {self.largest_shift:.2g}"
        )
        form = f"; {self.unparsed} answers do not have the form that was asked for" if self.unparsed else ""
        return f"{self.rows - len(self.differences)} of {self.rows} rows are answered the same{shift}{form}"


def compare_answers(
    examples: Sequence[Example], before: Sequence[Prediction], after: Sequence[Prediction]
) -> Parity:
    """The run's answers against the export's: a label, a set of labels, or entities as a set of places and types."""
    differences, shifts = [], []
    for example, old, new in zip(examples, before, after, strict=True):
        known, given = dict(old.ranking), dict(new.ranking)
        shifts += [abs(known[label] - given.get(label, 0.0)) for label in known if given]
        if old.entities is not None:
            same = spans(old.entities) == spans(new.entities)
            shown = _entities(old.entities), _entities(new.entities or ())
            margin = None
        elif old.labels is not None:
            kept, other = set(old.labels), set(new.labels or ())
            same, margin = kept == other, None
            shown = _labels(old.labels), _labels(new.labels or ())
        else:
            same = old.label == new.label
            shown = str(old.label), str(new.label)
            both = old.label in known and new.label in known
            margin = known[str(old.label)] - known[str(new.label)] if both else None
        if not same:
            differences.append(Difference(example.where, *shown, margin))
    unparsed = sum(not each.parsed for each in after)
    return Parity(len(examples), tuple(differences), max(shifts, default=None), unparsed)


def _labels(labels: Sequence[str]) -> str:
    return ", ".join(labels) or "no label"


def _entities(entities: Sequence[Entity]) -> str:
    return ", ".join(f"{e.text} ({e.label}, {e.start}-{e.end})" for e in entities) or "no entity"


def check_parity(parity: Parity, tolerance: float, what: str) -> None:
    """Let an export pass, or not.

    Args:
        tolerance: share of the rows that may differ, from 0 to 1.
        what: names the export, for the message.

    Raises:
        ParityError: more rows differ; the message lists them with their margins.
    """
    if parity.share <= tolerance:
        return
    count = len(parity.differences)
    raise ParityError(
        f"{what} does not answer as the run does: {count} of {parity.rows} rows differ "
        f"(--tolerance {tolerance:g}). Nothing was exported.\n  {listed(parity.differences, count, SHOWN)}\n"
        "Small margins come from rounding: export with --dtype fp32, or allow a share of rows with --tolerance 0.01"
    )


def costs_told(costs: Mapping[str, Any]) -> str:
    """Figures of the run and of an engine, and the interval of their difference (`differences` of `compare_predictions`)."""
    told = []
    for figure, found in costs.items():
        change = found["difference"]
        told.append(
            f"{figure} {found['first']:.3f} -> {found['second']:.3f} ({change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
        )
    return "; ".join(told)
