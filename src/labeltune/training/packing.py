"""Examples -> optimizer steps -> packs, in whole numbers only: no tensors, no chance beyond the seed.

A *group* is a set of examples and the tokens they all begin with; these are computed once. A *pack* is what goes through
the model in one piece. How a step is cut into groups and packs decides time and memory, never the result.

With several processes the rows of a step are divided first, so that all have about the same to compute. Work is counted in pairs of a
query and a key: a token costs `pairs_per_token` of them in the matrix products, and one for every token it attends to. What a
process's rows begin with in common costs it once, so each takes neighbours in the order of their tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from labeltune.config import TrainingConfig
from labeltune.prompts.builder import common_prefix

if TYPE_CHECKING:
    from datasets import Dataset

#: `shared_prefix` by our attention function, `shared_cache` through the model's own cache; both are what a config calls `shared_prefix`.
Packing = Literal["shared_prefix", "shared_cache", "packed", "padded"]
SHARING: tuple[Packing, ...] = ("shared_prefix", "shared_cache")

#: Without a model: attention counts for little.
PAIRS_PER_TOKEN = 10_000
#: How many more tokens a step may have than in one piece, for smaller packs.
SLACK = 1.05
#: Steps looked at to choose the size of packs.
SAMPLED_STEPS = 4
#: Packs of this many tokens keep the device busy; more tokens bring no speed.
ENOUGH = {"cuda": 8192, "mps": 2048, "cpu": 2048}
#: Prompt tokens that `shared_cache` computes for every row: answers are predicted behind the prefix, and no batch has one column
#: alone, of which models make a step of generation that writes into their cache.
UNSHARED = 2
#: A call of the model costs as much as this many tokens of padding, where the model is not known (`preflight.call_tokens`).
CALL_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One question of a tokenized example with its answer; most examples have one.

    Attributes:
        ids: the tokens that are read: everything before the answer's last token, which is only ever predicted.
        answer: the tokens that are predicted. Token `i` of them is predicted at position `answer_start - 1 + i`.
        answer_start: position of the answer's first token; `len(ids) == answer_start + len(answer) - 1`.
        weight: what the loss of its answer is multiplied by.
        record: number of the example in its step; the rows of one example are kept together.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    answer_start: int
    weight: float = 1.0
    record: int = -1

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer; only these are ever shared."""
        return self.ids[: self.answer_start]

    @classmethod
    def of(
        cls, ids: Sequence[int], answer_start: int, answer_end: int, weight: float = 1.0, record: int = -1
    ) -> Row:
        """From all tokens of an example and the place of its answer.

        Raises:
            ValueError: the answer is empty, or nothing stands before it.
        """
        if not 0 < answer_start < answer_end <= len(ids):
            raise ValueError(
                f"an answer at {answer_start}:{answer_end} of {len(ids)} tokens cannot be trained"
            )
        answer = tuple(ids[answer_start:answer_end])
        return cls(tuple(ids[: answer_end - 1]), answer, answer_start, weight, record)


@dataclass(frozen=True)
class Group:
    """Examples that share their first `prefix` tokens.

    Attributes:
        prefix: shared tokens; no answer begins before their end.
        rows: indices into the step's rows.
        batches: the same rows, as they go through the model side by side behind the prefix; for `shared_cache` only.
    """

    prefix: int
    rows: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...] = ()

    def tokens(self, rows: Sequence[Row]) -> int:
        """Tokens that the model computes for this group, padding of batches included."""
        if self.batches:
            return self.prefix + sum(len(b) * max(self._own(rows, b)) for b in self.batches)
        return self.prefix + sum(self._own(rows, self.rows))

    def _own(self, rows: Sequence[Row], chosen: Sequence[int]) -> list[int]:
        return [len(rows[i].ids) - self.prefix for i in chosen]

    def in_batches(self, rows: Sequence[Row], call_tokens: int) -> Group:
        """The group with batches of rows of similar lengths: the fewest tokens, where a batch costs `call_tokens` besides."""
        order = sorted(self.rows, key=lambda i: (-len(rows[i].ids), i))
        own = self._own(rows, order)
        # best[end] = (cost, where the last batch begins), of the first `end` rows
        best = [(0, 0)]
        for end in range(1, len(order) + 1):
            best.append(min((best[at][0] + (end - at) * own[at] + call_tokens, at) for at in range(end)))
        batches: list[tuple[int, ...]] = []
        end = len(order)
        while end:
            start = best[end][1]
            batches.append(tuple(order[start:end]))
            end = start
        return replace(self, batches=tuple(reversed(batches)))


@dataclass(frozen=True)
class Pack:
    """What goes through the model in one piece.

    Attributes:
        groups: in the order of their tokens.
        counted: False for a copy that only keeps a process busy; its loss is multiplied by zero.
    """

    groups: tuple[Group, ...]
    counted: bool = True

    @property
    def rows(self) -> tuple[int, ...]:
        """Indices of all examples."""
        return tuple(i for group in self.groups for i in group.rows)

    def tokens(self, rows: Sequence[Row], packing: Packing = "shared_prefix") -> int:
        """Tokens that the model computes, padding included."""
        if packing == "padded":
            return len(self.rows) * max(len(rows[i].ids) for i in self.rows)
        return sum(group.tokens(rows) for group in self.groups)


def to_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows of a tokenized data set -> `Row`s: of each the first question, then the others behind the same prompt."""
    found = []
    for number, r in enumerate(records):
        ids, start, end = r["input_ids"], int(r["answer_start"]), int(r["answer_end"])
        found.append(Row.of(ids, start, end, float(r["weight"]), number))
        for other in r["others"]:
            begin = int(other["begin"])
            whole = [*ids[:begin], *other["ids"]]
            start = begin + int(other["start"])
            found.append(Row.of(whole, start, len(whole), float(other["weight"]), number))
    return found


def step_order(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """The rows of every step of an epoch: a shuffle that only seed and epoch decide, `batch_size` rows a step.

    The last step of an epoch holds what is left.
    """
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def rows_of_steps(dataset: Dataset, steps: Iterable[Sequence[int]], count: int) -> list[list[Row]]:
    """The rows of the first steps of an order, at most `count` of them."""
    return [to_rows([dataset[i] for i in numbers]) for numbers in itertools.islice(steps, count)]


def steps_an_epoch(rows: int, batch_size: int) -> int:
    """The last one may be smaller."""
    return -(-rows // batch_size)


def steps_in_all(rows: int, training: TrainingConfig) -> int:
    """Optimizer steps of a run, as transformers counts them."""
    return training.max_steps or math.ceil(
        chosen(training.epochs) * steps_an_epoch(rows, training.batch_size)
    )


def chosen(value: float | str) -> float:
    """A key's value, once `settled` has put a number in place of `auto`."""
    if isinstance(value, str):
        raise TypeError(f"{value} stands for a number that is chosen when rows and model are known")
    return value


def run_order(rows: int, training: TrainingConfig) -> Iterator[list[int]]:
    """The row numbers of every step of a run, epoch after epoch."""
    order = (
        step
        for epoch in itertools.count()
        for step in step_order(rows, training.batch_size, training.seed, epoch)
    )
    return itertools.islice(order, steps_in_all(rows, training))


def pack_step(
    rows: Sequence[Row],
    max_tokens: int,
    packing: Packing = "shared_prefix",
    processes: int = 1,
    pairs_per_token: int = PAIRS_PER_TOKEN,
    call_tokens: int = CALL_TOKENS,
) -> list[list[Pack]]:
    """Cut one step into packs of at most `max_tokens` tokens (an example longer than that has a pack of its own).

    Args:
        rows: all examples of the step, the same list on every process.
        processes: number of processes that share the step.
        pairs_per_token: for dividing the rows over processes.
        call_tokens: for `shared_cache`, tokens that cost as much as a call of the model.

    Returns:
        For every process its packs: the same number each, the largest first, with about the same work in all.
    """
    if not rows:
        raise ValueError("a step without rows")
    order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt, rows[i].answer, i))
    parts = [order] if processes == 1 else _divided(rows, order, packing, processes, pairs_per_token)
    shares = [_packs(rows, part, max_tokens, packing, call_tokens) if part else [] for part in parts]
    most = max(map(len, shares))
    shares = [_as_many(share, most, rows, packing) for share in shares]
    if packing == "shared_cache":
        shares = [[_in_batches(pack, rows, max_tokens, call_tokens) for pack in share] for share in shares]
    return [
        sorted(
            share,
            key=lambda pack: (-pack.tokens(rows, packing), pack.rows, pack.counted),
        )
        for share in shares
    ]


def useful_tokens(
    steps: Sequence[Sequence[Row]],
    packing: Packing,
    processes: int,
    enough: int,
    call_tokens: int = CALL_TOKENS,
) -> int:
    """The smallest pack size with nearly the fewest tokens to compute that also keeps the device busy; calls of the model
    behind a cache count as `call_tokens` each."""

    def computed(size: int) -> int:
        return sum(
            pack.tokens(step, packing) + call_tokens * sum(len(group.batches) for group in pack.groups)
            for step in steps
            for share in pack_step(step, size, packing, processes, call_tokens=call_tokens)
            for pack in share
            if pack.counted
        )

    whole = max(sum(len(row.ids) for row in step) for step in steps)
    if packing not in SHARING:
        return min(enough, whole)
    best = computed(whole)
    size = enough
    while size < whole and computed(size) > SLACK * best:
        size = size * 5 // 4
    return min(size, whole)


def _divided(
    rows: Sequence[Row], order: list[int], packing: Packing, processes: int, pairs_per_token: int
) -> list[list[int]]:
    """The sorted rows, divided over processes."""
    common = _shareable(rows, order) if packing in SHARING else [0] * len(rows)
    ranges = divide([len(rows[i].ids) for i in order], common, processes, pairs_per_token)
    return [order[places.start : places.stop] for places in ranges]


def _packs(
    rows: Sequence[Row], order: list[int], max_tokens: int, packing: Packing, call_tokens: int
) -> list[Pack]:
    """Packs of these rows, which come in the order of their tokens."""
    if packing == "shared_prefix":
        return _fill(_share(rows, order, max_tokens), rows, max_tokens)
    if packing == "shared_cache":
        groups = _share(rows, order, max_tokens, UNSHARED)
        alone = tuple(i for group in groups if not group.prefix for i in group.rows)
        groups = [group for group in groups if group.prefix] + ([Group(0, alone)] if alone else [])
        return [pack for group in groups for pack in _within(Pack((group,)), rows, max_tokens, call_tokens)]
    longest_first = sorted(order, key=lambda i: -len(rows[i].ids))
    return _fill([Group(0, (i,)) for i in longest_first], rows, max_tokens, packing)


def _as_many(packs: list[Pack], count: int, rows: Sequence[Row], packing: Packing) -> list[Pack]:
    """The same rows in `count` packs: some are halved, and where each has one row already, one is repeated without
    counting."""
    found = list(packs)
    while len(found) < count:
        divisible = [pack for pack in found if len(pack.rows) > 1]
        if divisible:
            largest = max(divisible, key=lambda pack: (pack.tokens(rows, packing), pack.rows))
            found.remove(largest)
            found += _halves(largest)
        else:
            shortest = min(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
            found.append(Pack((Group(0, (shortest,)),), counted=False))
    return found


def _shareable(rows: Sequence[Row], order: Sequence[int]) -> list[int]:
    """For each of the sorted rows the prompt tokens that it has in common with the one before it."""
    return [0, *(common_prefix(rows[a].prompt, rows[b].prompt) for a, b in itertools.pairwise(order))]


def _in_batches(pack: Pack, rows: Sequence[Row], max_tokens: int, call_tokens: int) -> Pack:
    """The pack with its rows in batches; in more of them, with less padding, where it would not be within `max_tokens` otherwise."""
    (group,) = pack.groups
    found = group.in_batches(rows, call_tokens)
    while call_tokens and found.tokens(rows) > max_tokens:
        call_tokens //= 2
        found = group.in_batches(rows, call_tokens)
    return replace(pack, groups=(found,))


def _within(pack: Pack, rows: Sequence[Row], max_tokens: int, call_tokens: int) -> list[Pack]:
    """The rows of a pack in packs that have at most `max_tokens` tokens with their padding, or one row."""
    if len(pack.rows) == 1 or _in_batches(pack, rows, max_tokens, call_tokens).tokens(rows) <= max_tokens:
        return [pack]
    (group,) = pack.groups
    longest_first = sorted(group.rows, key=lambda i: (-len(rows[i].ids), i))
    halves = _halves(Pack((replace(group, rows=tuple(longest_first)),)))
    return [part for half in halves for part in _within(half, rows, max_tokens, call_tokens)]


def _share(rows: Sequence[Row], order: list[int], max_tokens: int, unshared: int = 0) -> list[Group]:
    """Ranges of the sorted rows with the fewest tokens in all, each within `max_tokens`; of equals, the fewest and then
    the most even ranges.

    Prompts in the order of their tokens have their longest common prefixes with their neighbours. The best cut is found
    by dynamic programming over where the last range begins.

    Args:
        unshared: tokens before each answer that are not shared.
    """
    common = _shareable(rows, order)
    atoms = _together(rows, order, common, max_tokens)
    whole = [sum(len(rows[order[place]].ids) for place in atom) for atom in atoms]
    # What the rows of each have in common, by themselves.
    own = [
        min(
            *(max(0, rows[order[place]].answer_start - unshared) for place in atom),
            *common[atom.start + 1 : atom.stop],
            len(rows[order[atom.start]].ids),
        )
        for atom in atoms
    ]
    # best[end] = (tokens, groups, tokens of the largest group, where the last group begins, its prefix)
    best: list[tuple[int, int, int, int, int]] = [(0, 0, 0, 0, 0)]
    for end in range(1, len(atoms) + 1):
        found: tuple[int, int, int, int, int] | None = None
        shared, total, size = own[end - 1], 0, 0
        for start in range(end - 1, -1, -1):
            total += whole[start]
            size += len(atoms[start])
            shared = min(shared, own[start])
            if start < end - 1:
                shared = min(shared, common[atoms[start].stop])
            prefix = shared if size > 1 else 0
            tokens = total - (size - 1) * prefix
            if start < end - 1 and tokens > max_tokens:
                break
            before = best[start]
            candidate = (before[0] + tokens, before[1] + 1, max(before[2], tokens), start, prefix)
            if found is None or candidate < found:
                found = candidate
        assert found is not None
        best.append(found)
    groups = []
    end = len(atoms)
    while end:
        _, _, _, start, prefix = best[end]
        groups.append(Group(prefix, tuple(order[atoms[start].start : atoms[end - 1].stop])))
        end = start
    return groups[::-1]


def _together(
    rows: Sequence[Row], order: Sequence[int], common: Sequence[int], max_tokens: int
) -> list[range]:
    """Places of neighbours that are questions about one example, which share more with each other than with any other row; cut
    only where they would not be within `max_tokens`."""
    found: list[range] = []
    tokens = shared = 0
    for place, at in enumerate(order):
        size = len(rows[at].ids)
        if place and rows[at].record == rows[order[place - 1]].record >= 0:
            least = min(shared, common[place]) if len(found[-1]) > 1 else common[place]
            whole = tokens + size
            if whole - len(found[-1]) * least <= max_tokens:
                found[-1] = range(found[-1].start, place + 1)
                tokens, shared = whole, least
                continue
        found.append(range(place, place + 1))
        tokens, shared = size, size
    return found


def _fill(
    groups: list[Group], rows: Sequence[Row], max_tokens: int, packing: Packing = "shared_prefix"
) -> list[Pack]:
    """Groups into packs. Neighbours stay together, as they are alike; a group is never cut here."""
    packs: list[Pack] = []
    for group in groups:
        if packs:
            wider = Pack((*packs[-1].groups, group))
            if wider.tokens(rows, packing) <= max_tokens:
                packs[-1] = wider
                continue
        packs.append(Pack((group,)))
    return packs


def _halves(pack: Pack) -> list[Pack]:
    """The same examples in two packs; a group that is cut keeps its prefix in both."""
    left: list[Group] = []
    right: list[Group] = []
    wanted = len(pack.rows) // 2
    for group in pack.groups:
        room = max(0, wanted - sum(len(g.rows) for g in left))
        if group.rows[:room]:
            left.append(Group(group.prefix, group.rows[:room]))
        if group.rows[room:]:
            right.append(Group(group.prefix, group.rows[room:]))
    return [Pack(tuple(left)), Pack(tuple(right))]


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
