"""What training minimizes: the cross-entropy of the right answer's tokens, of the right one among all complete answers, or both.

Of complete answers the score is the sum of the log-probabilities of their tokens, as in prediction, and the loss is the cross-entropy of their
softmax. Its gradient is that of the answers' token losses, each multiplied by its share in the right label minus its probability:

    d loss / d score_k = p_k - q_k,   so   grad loss = sum_k (q_k - p_k) grad(token loss of answer k).

So a step first computes the token losses alone, and then, with the same dropout, the weighted token losses with their gradients; however the
rows are cut into packs and over processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from labeltune.training.packing import Row

Objective = Literal["tokens", "labels", "both"]


@dataclass(frozen=True)
class Weighed:
    """A step's objective.

    Attributes:
        weights: what the token loss of each row is multiplied by, so that the gradients of the sum are the objective's.
        value: the objective itself.
    """

    weights: tuple[float, ...]
    value: float


def token_weights(rows: Sequence[Row]) -> list[float]:
    """Those of the mean token loss of a step."""
    answers = sum(row.weight * len(row.answer) for row in rows)
    return [row.weight / answers for row in rows]


def weighed(objective: Objective, rows: Sequence[Row], losses: torch.Tensor) -> Weighed:
    """The objective of a step, whose rows of one example are all of its possible answers.

    The weight of a row is its share in the right label, times that of its class; an example counts as the sum of its rows' weights, as in
    PyTorch's `cross_entropy` with `weight`.

    Args:
        losses: the sum of the token losses of each row's answer, fp64 on the CPU, shape [rows].
    """
    of_example: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        of_example[row.record].append(number)
    total = sum(row.weight for row in rows)
    weights = torch.zeros(len(rows), dtype=torch.float64)
    value = 0.0
    for numbers in of_example.values():
        at = torch.tensor(numbers)
        shares = torch.tensor([rows[i].weight for i in numbers], dtype=torch.float64)
        found = torch.log_softmax(-losses[at], 0)
        weights[at] = (shares - shares.sum() * found.exp()) / total
        value -= float(shares @ found) / total
    if objective == "both":
        tokens = torch.tensor(token_weights(rows), dtype=torch.float64)
        weights += tokens
        value += float(tokens @ losses)
    return Weighed(tuple(weights.tolist()), value)
