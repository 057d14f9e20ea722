"""The rows of one step, divided over processes so that all have about the same to compute. Whole numbers only.

Work is counted in pairs of a query and a key. A token costs `pairs_per_token` of them in the matrix products, and one for every
token it attends to. What a process's rows begin with in common costs it once, so rows that are alike are better together.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labeltune.training.planner import Row

#: Rounds of moving and swapping rows between the process with the most work and the one with the least, until they differ
#: by less than this part of it.
ROUNDS, ENOUGH = 16, 1 / 1024
#: Processes with the least work that are compared for a row. More make planning a large cluster's steps slow.
CANDIDATES = 8
#: Rows of a process that are tried for moving or swapping.
_TRIED = 64
#: Rows that lie this far apart look their minimum up in a table.
_FAR = 32
#: Without a model: attention counts for little.
PAIRS_PER_TOKEN = 10_000


class Work:
    """What rows cost, in the order of their tokens; a row is named by its place in that order.

    Args:
        common: tokens that each row may share with the one before it.
    """

    def __init__(self, rows: Sequence[Row], common: Sequence[int], pairs_per_token: int) -> None:
        self.common = common
        self._least: list[Sequence[int]] = [common]
        self._prefix = [self._pairs(n, pairs_per_token) for n in range(max(len(r.ids) for r in rows) + 1)]
        self._whole = [self._prefix[len(row.ids)] for row in rows]

    @staticmethod
    def _pairs(tokens: int, pairs_per_token: int) -> int:
        return tokens * pairs_per_token + tokens * (tokens + 1) // 2

    def behind(self, before: int | None, place: int) -> int:
        """What a row costs when this one was computed before it."""
        if before is None:
            return self._whole[place]
        return self._whole[place] - self._prefix[self.shared(before, place)]

    def shared(self, before: int, place: int) -> int:
        """Tokens that two rows, and all that lie between them, begin with in common."""
        start, end = before + 1, place + 1
        if end - start <= _FAR:
            return min(self.common[start:end])
        # The minima of all ranges of 1, 2, 4 ... rows; two of them cover any range.
        level = (end - start).bit_length() - 1
        while len(self._least) <= level:
            below, half = self._least[-1], 1 << (len(self._least) - 1)
            self._least.append(list(map(min, below, below[half:])))
        return min(self._least[level][start], self._least[level][end - (1 << level)])


class Share:
    """The rows of one process, as sorted places, and their work."""

    def __init__(self, work: Work) -> None:
        self.work, self.places, self.load = work, list[int](), 0

    def cost(self, place: int, without: int | None = None) -> int:
        """What one more row adds; `without` counts as gone already."""
        left = right = bisect.bisect_left(self.places, place)
        left -= 1
        if left >= 0 and self.places[left] == without:
            left -= 1
        if right < len(self.places) and self.places[right] == without:
            right += 1
        before = self.places[left] if left >= 0 else None
        added = self.work.behind(before, place)
        if right < len(self.places):
            after = self.places[right]
            added += self.work.behind(place, after) - self.work.behind(before, after)
        return added

    def add(self, place: int) -> None:
        """Take a row."""
        self.load += self.cost(place)
        bisect.insort(self.places, place)

    def remove(self, place: int) -> None:
        """Give a row away."""
        self.places.remove(place)
        self.load -= self.cost(place)

    def saved(self, place: int) -> int:
        """What giving a row away saves."""
        self.places.remove(place)
        found = self.cost(place)
        bisect.insort(self.places, place)
        return found


def divide(work: Work, count: int, processes: int) -> list[list[int]]:
    """The places 0 .. count - 1 as one sorted list for every process; some are empty where rows are few."""
    found = min(
        (_largest_first(work, count, processes), _in_order(work, count, processes)),
        key=lambda shares: max(share.load for share in shares),
    )
    for _ in range(ROUNDS):
        if not _improved(found):
            break
    return [share.places for share in found]


def _largest_first(work: Work, count: int, processes: int) -> list[Share]:
    """Each row to the process that has the least to compute with it, of those that have the least without."""
    shares = [Share(work) for _ in range(processes)]
    loads = [(0, number) for number in range(processes)]  # sorted
    own = [work.behind(place - 1 if place else None, place) for place in range(count)]
    for place in sorted(range(count), key=lambda p: (-own[p], p)):
        costs = [load + shares[number].cost(place) for load, number in loads[:CANDIDATES]]
        _, number = loads.pop(costs.index(min(costs)))
        shares[number].add(place)
        bisect.insort(loads, (shares[number].load, number))
    return shares


def _in_order(work: Work, count: int, processes: int) -> list[Share]:
    """Ranges of neighbours, with the least possible work in the largest: found by halving what is allowed."""
    whole = [work.behind(None, place) for place in range(count)]
    low, high = max(whole), sum(whole)
    while low < high:
        middle = (low + high) // 2
        if len(_ranges(work, count, middle)) <= processes:
            high = middle
        else:
            low = middle + 1
    shares = [Share(work) for _ in range(processes)]
    for share, places in zip(shares, _ranges(work, count, low), strict=False):
        for place in places:
            share.add(place)
    return shares


def _ranges(work: Work, count: int, allowed: int) -> list[list[int]]:
    """Ranges of neighbours, each as long as is allowed (a row by itself always is)."""
    found: list[list[int]] = []
    load = 0
    for place in range(count):
        added = work.behind(place - 1, place) if found else 0
        if found and load + added <= allowed:
            found[-1].append(place)
            load += added
            continue
        load = work.behind(None, place)
        found.append([place])
    return found


def _some(places: list[int]) -> list[int]:
    """All of them where they are few."""
    return places[:: max(1, -(-len(places) // _TRIED))]


def _improved(shares: list[Share]) -> bool:
    """Move a row from the largest share to the smallest, or swap two of theirs, if that makes the larger of both smaller."""
    most = max(shares, key=lambda share: share.load)
    least = min(shares, key=lambda share: share.load)
    if most.load - least.load <= most.load * ENOUGH:
        return False
    best, change = most.load, None
    saved = {place: most.saved(place) for place in _some(most.places)}
    freed = {place: least.saved(place) for place in _some(least.places)}
    for given, gain in saved.items():
        larger = max(most.load - gain, least.load + least.cost(given))
        if larger < best:
            best, change = larger, (given, -1)
        for taken, relief in freed.items():
            # A first guess without the neighbours that both would lose, which is nearly always none.
            if max(most.load - gain + relief // 2, least.load - relief) >= best:
                continue
            larger = max(
                most.load - gain + most.cost(taken, without=given),
                least.load - relief + least.cost(given, without=taken),
            )
            if larger < best:
                best, change = larger, (given, taken)
    if change is None:
        return False
    given, taken = change
    most.remove(given)
    if taken >= 0:
        least.remove(taken)
        most.add(taken)
    least.add(given)
    return True
