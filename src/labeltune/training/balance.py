"""The rows of one step, divided over processes so that all have about the same to compute. Whole numbers only.

Work is counted in pairs of a query and a key. A token costs `pairs_per_token` of them in the matrix products, and one for every
token it attends to. What a process's rows begin with in common costs it once, so each takes neighbours in the order of their
tokens.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

#: Without a model: attention counts for little.
PAIRS_PER_TOKEN = 10_000


def pairs(tokens: int, pairs_per_token: int) -> int:
    """The work of a row of so many tokens, or of the first ones of a row."""
    return tokens * pairs_per_token + tokens * (tokens + 1) // 2


def divide(
    lengths: Sequence[int], common: Sequence[int], processes: int, pairs_per_token: int = PAIRS_PER_TOKEN
) -> list[range]:
    """The places 0 .. len(lengths) - 1 as one range for every process, with the least possible work in the largest.

    Args:
        lengths: tokens of each row, in the order of their tokens; at least one row.
        common: tokens that each row may share with the one before it, in whose process these cost nothing.

    Returns:
        In order; the last ones are empty where rows are few.
    """
    whole = [pairs(length, pairs_per_token) for length in lengths]
    behind = [work - pairs(shared, pairs_per_token) for work, shared in zip(whole, common, strict=True)]
    allowed = range(max(whole), sum(whole) + 1)
    least = bisect_left(allowed, True, key=lambda work: len(_ranges(whole, behind, work)) <= processes)
    found = _ranges(whole, behind, allowed[least])
    return found + [range(0)] * (processes - len(found))


def _ranges(whole: Sequence[int], behind: Sequence[int], allowed: int) -> list[range]:
    """Ranges of neighbours, each as long as is allowed.

    Args:
        whole: work of each row where it is the first of a range; `behind`: where it is not.
    """
    starts, load = [0], whole[0]
    for place in range(1, len(whole)):
        load += behind[place]
        if load > allowed:
            starts.append(place)
            load = whole[place]
    return [range(start, end) for start, end in itertools.pairwise([*starts, len(whole)])]
