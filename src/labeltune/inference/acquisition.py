"""Which rows of a pool are worth labelling next: how unsure the model is of each, and how they spread over the pool.

Acquisition functions of active learning (Settles 2009, Active Learning Literature Survey) on exact probabilities.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from labeltune.data.near_duplicates import THRESHOLD, ngrams
from labeltune.types import Example, Prediction

#: margin: how close the two best answers are (labels), or the least sure entity. entropy: of all answers of the row. metric: margin,
#: times how much the row's probable labels leave to gain in F1.
By = Literal["margin", "entropy", "metric"]
#: Of the most informative rows so many times what is asked for are looked at for how they spread.
_AHEAD = 20


@dataclass(frozen=True)
class Candidate:
    """A row of the pool, with what the model says of it.

    Attributes:
        score: how much its label would tell, from 0 to 1.
    """

    example: Example
    prediction: Prediction
    score: float


def informativeness(prediction: Prediction, by: By, gains: Mapping[str, float] | None = None) -> float:
    """From 0 (the answer is certain) to 1.

    Args:
        gains: label -> 1 - its F1 on the validation rows, for `metric`.
    """
    unsure = _entropy(prediction) if by == "entropy" else _margin(prediction)
    return unsure * _gain(prediction, gains or {}) if by == "metric" else unsure


def _margin(found: Prediction) -> float:
    if found.entities is not None:
        return 1 - (found.certainty if found.certainty is not None else 1.0)
    probabilities = [p for _, p in found.ranking]
    if found.labels is not None:
        # The label that is closest to being decided otherwise.
        return max((1 - abs(2 * p - 1) for p in probabilities), default=0.0)
    if len(probabilities) < 2:
        return 0.0
    return 1 - (probabilities[0] - probabilities[1])


def _entropy(found: Prediction) -> float:
    """Of the distribution over labels, by the largest it can be; the mean over labels that are decided each by itself; of entities the
    probability that one of them is wrong."""
    if found.entities is not None:
        logs = [e.score for e in found.entities if e.score is not None]
        return 1 - math.exp(sum(logs)) if logs else _margin(found)
    probabilities = [p for _, p in found.ranking]
    if found.labels is not None:
        each = [_bits(p) + _bits(1 - p) for p in probabilities]
        return sum(each) / len(each) if each else 0.0
    if len(probabilities) < 2:
        return 0.0
    return sum(map(_bits, probabilities)) / math.log2(len(probabilities))


def _bits(p: float) -> float:
    return -p * math.log2(p) if p > 0 else 0.0


def _gain(found: Prediction, gains: Mapping[str, float]) -> float:
    """What F1 leaves to gain of the labels that the row probably has; 1 for a label that validation rows do not tell of."""
    if found.entities is not None:
        each = [gains.get(e.label, 1.0) for e in found.entities]
        return sum(each) / len(each) if each else max(gains.values(), default=1.0)
    total = math.fsum(p for _, p in found.ranking)
    return math.fsum(p * gains.get(label, 1.0) for label, p in found.ranking) / total if total else 1.0


def most_informative(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The best `_AHEAD` times `count` of a pool of any size, the best first; of equal ones those that come first."""
    numbered = ((one.score, -number, one) for number, one in enumerate(candidates))
    return [one for *_, one in heapq.nlargest(_AHEAD * count, numbered, key=lambda each: each[:2])]


def spread(
    candidates: Sequence[Candidate], count: int, vectors: Callable[[list[str]], NDArray[Any]] | None = None
) -> list[tuple[Candidate, float]]:
    """Rows that are informative and unlike each other, with how far each is from those before it (0 to 1).

    The first is the most informative; every further one has the largest product of its score and its distance to the nearest that is
    taken (cosine, halved). A near-duplicate of one that is taken is left out.

    Args:
        candidates: the most informative first.
        vectors: texts -> unit vectors, shape [texts, dimensions]; without them only near-duplicates are left out.
    """
    if not candidates:
        return []
    places = vectors([each.example.text for each in candidates]) if vectors is not None else None
    scores = numpy.array([each.score for each in candidates])
    distance = numpy.ones(len(candidates))
    free = numpy.ones(len(candidates), dtype=bool)
    texts: list[frozenset[str]] = []
    taken: list[tuple[Candidate, float]] = []
    while free.any() and len(taken) < count:
        # Of equal ones the first; a score of zero still comes before nothing.
        at = int(numpy.argmax(numpy.where(free, (scores + 1e-9) * distance, -1.0)))
        free[at] = False
        grams = ngrams(candidates[at].example.text)
        if any(_alike(grams, other) for other in texts):
            continue
        texts.append(grams)
        taken.append((candidates[at], float(distance[at])))
        if places is not None:
            distance = numpy.minimum(distance, numpy.clip((1 - places @ places[at]) / 2, 1e-6, 1.0))
    return taken


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    return len(one & other) >= THRESHOLD * len(one | other)


def why(candidate: Candidate, distance: float) -> str:
    """A line about a chosen row."""
    found = candidate.prediction
    if found.entities is not None:
        worst = min(
            (e for e in found.entities if e.score is not None), key=lambda e: e.score or 0.0, default=None
        )
        if worst is None:
            said = f"no entity was found, at {1 - candidate.score:.2f}"
        else:
            said = f"unsure of {worst.text!r} ({worst.label}), at {math.exp(worst.score or 0.0):.2f}"
    elif found.labels is not None:
        label, p = min(found.ranking, key=lambda pair: abs(pair[1] - 0.5))
        said = f"unsure of {label!r}, at {p:.2f}"
    else:
        said = " or ".join(f"{label!r} at {p:.2f}" for label, p in found.ranking[:2])
    return f"{candidate.example.id}: {said}; {distance:.2f} away from the rows before it"
