"""What each answer of an example counts for in training: soft labels, label smoothing, and classes of different size."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum


@dataclass(frozen=True)
class AnswerWeights:
    """Weights of answers, as PyTorch's `cross_entropy` counts `weight` and `label_smoothing`.

    Attributes:
        classes: label -> what the loss of its answer is multiplied by; labels that are missing count 1.
        smoothing: share of the right answer that is spread evenly over all candidates (Szegedy et al. 2016, arXiv:1512.00567).
        every: candidates that weigh nothing are trained answers too: the loss is over all of them.
        negatives: of labels that are decided each by itself, how many that do not apply to a row are trained, drawn by `seed`; all
            when None.
    """

    classes: Mapping[str, float] = field(default_factory=dict)
    smoothing: float = 0.0
    every: bool = False
    negatives: int | None = None
    seed: int = 0

    def of(self, label: str) -> float:
        """The weight of a class."""
        return self.classes.get(label, 1.0)

    def weighed(self, shares: Mapping[str, float], candidates: Sequence[str]) -> dict[str, float]:
        """The answers that are trained, with their weights: the right ones, with smoothing or `every` all others behind them.

        Args:
            shares: right answer -> its share; they sum to 1.
            candidates: all answers there are.
        """
        found = dict(shares)
        if self.smoothing or self.every:
            spread = self.smoothing / len(candidates)
            every = dict.fromkeys((*shares, *candidates), 0.0) | found
            found = {answer: (1 - self.smoothing) * share + spread for answer, share in every.items()}
        return {answer: share * self.of(answer) for answer, share in found.items()}

    def decided(self, text: str, applies: Mapping[str, bool]) -> dict[str, tuple[float, float]]:
        """The labels of a row that are trained, each decided by itself, with the weights of its right and of its other answer.

        The weight of a class is that of the rows to which it applies, as `pos_weight` of PyTorch's `BCEWithLogitsLoss`. Labels that
        do not apply weigh more, the fewer of them are drawn, so that the loss is on average that of all.

        Args:
            applies: of each candidate, whether it is right.
        """
        wrong = [label for label, right in applies.items() if not right]
        most = len(wrong) if self.negatives is None else min(self.negatives, len(wrong))
        drawn = wrong if most == len(wrong) else random.Random(f"{self.seed}:{text}").sample(wrong, most)
        kept = {label: len(wrong) / most for label in drawn}
        kept |= {label: self.of(label) for label, right in applies.items() if right}
        other = self.smoothing / 2
        return {label: (kept[label] * (1 - other), kept[label] * other) for label in applies if label in kept}


def balanced(counts: Mapping[str, float]) -> dict[str, float]:
    """Weights with which all classes count the same: rows / (classes * rows of the class), as scikit-learn's
    `class_weight="balanced"`.

    Args:
        counts: rows of each class that has any; soft labels count by their shares.
    """
    rows = fsum(counts.values())
    return {label: rows / (len(counts) * count) for label, count in counts.items()}


def balanced_each(counts: Mapping[str, int], rows: int) -> dict[str, float]:
    """Weights with which the rows that have a label count as much as those that do not: (rows - count) / count.

    Args:
        counts: rows of each label that has any.
    """
    return {label: max(rows - count, 1) / count for label, count in counts.items()}
