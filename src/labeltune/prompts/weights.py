"""What each answer of an example counts for in training: soft labels, label smoothing, and classes of different size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum


@dataclass(frozen=True)
class AnswerWeights:
    """Weights of answers, as PyTorch's `cross_entropy` counts `weight` and `label_smoothing`.

    Attributes:
        classes: label -> what the loss of its answer is multiplied by; labels that are missing count 1.
        smoothing: share of the right answer that is spread evenly over all candidates (Szegedy et al. 2016, arXiv:1512.00567).
    """

    classes: Mapping[str, float] = field(default_factory=dict)
    smoothing: float = 0.0

    def of(self, label: str) -> float:
        """The weight of a class."""
        return self.classes.get(label, 1.0)

    def weighed(self, shares: Mapping[str, float], candidates: Sequence[str]) -> dict[str, float]:
        """The answers that are trained, with their weights: the right ones, with smoothing all others behind them.

        Args:
            shares: right answer -> its share; they sum to 1.
            candidates: all answers there are.
        """
        found = dict(shares)
        if self.smoothing:
            spread = self.smoothing / len(candidates)
            every = dict.fromkeys((*shares, *candidates), 0.0) | found
            found = {answer: (1 - self.smoothing) * share + spread for answer, share in every.items()}
        return {answer: share * self.of(answer) for answer, share in found.items()}


def balanced(counts: Mapping[str, float]) -> dict[str, float]:
    """Weights with which all classes count the same: rows / (classes * rows of the class), as scikit-learn's
    `class_weight="balanced"`.

    Args:
        counts: rows of each class that has any; soft labels count by their shares.
    """
    rows = fsum(counts.values())
    return {label: rows / (len(counts) * count) for label, count in counts.items()}
