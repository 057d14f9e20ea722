"""Every step of a run, planned as training plans it, without computing it: tokens, packs, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Any

from labeltune.config import TrainingConfig
from labeltune.processes import mapped
from labeltune.training.planner import Pack, Packing, Row, plan_step, step_order

if TYPE_CHECKING:
    from datasets import Dataset

#: Steps that a process plans at once.
_UNIT_STEPS = 32


@dataclass(frozen=True)
class TokenPlan:
    """What goes through the model in a run; counts are sums over all its steps and processes.

    Attributes:
        steps: optimizer steps.
        rows: examples, each as often as it is trained on.
        given: tokens of these examples (all but the last of each answer, which is only predicted).
        computed: tokens that the model computes, shared ones once, padding included.
        answers: positions that the output layer runs on.
        pairs: pairs of a token and one that it attends to, as the kernels compute them.
        packs: how many there are.
        largest: tokens of the largest pack.
        largest_step: numbers of the rows of its step.
    """

    steps: int
    rows: int
    given: int
    computed: int
    answers: int
    pairs: int
    packs: int
    largest: int
    largest_step: tuple[int, ...]

    def plus(self, other: TokenPlan) -> TokenPlan:
        """Of both."""
        larger = max(self, other, key=lambda plan: plan.largest)
        return TokenPlan(
            self.steps + other.steps,
            self.rows + other.rows,
            self.given + other.given,
            self.computed + other.computed,
            self.answers + other.answers,
            self.pairs + other.pairs,
            self.packs + other.packs,
            larger.largest,
            larger.largest_step,
        )


def to_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows of a tokenized data set -> rows of the planner."""
    return [Row.of(r["input_ids"], int(r["answer_start"]), int(r["answer_end"])) for r in records]


def steps_in_all(rows: int, training: TrainingConfig) -> int:
    """Optimizer steps of a run, as transformers counts them."""
    return training.max_steps or math.ceil(training.epochs * -(-rows // training.batch_size))


def run_order(rows: int, training: TrainingConfig) -> Iterator[list[int]]:
    """The row numbers of every step of a run, epoch after epoch."""

    def endless() -> Iterator[list[int]]:
        epoch = 0
        while True:
            yield from step_order(rows, training.batch_size, training.seed, epoch)
            epoch += 1

    return islice(endless(), steps_in_all(rows, training))


def attention_pairs(pack: Pack, rows: Sequence[Row], packing: Packing) -> int:
    """Pairs of query and key; causal halves are counted, as kernels are not asked to leave them out."""
    if packing == "padded":
        return len(pack.rows) * max(len(rows[i].ids) for i in pack.rows) ** 2
    if packing == "packed":
        return pack.tokens(rows) ** 2
    total = 0
    for group in pack.groups:
        rests = (len(rows[i].ids) - group.prefix for i in group.rows)
        total += group.prefix**2 + sum(rest * (group.prefix + rest) for rest in rests)
    return total


def sums(
    rows: Sequence[Row], packs: Sequence[Pack], packing: Packing, numbers: tuple[int, ...] = ()
) -> TokenPlan:
    """Of one step, whose rows have these numbers and are cut into these packs."""
    sizes = [pack.tokens(rows, packing) for pack in packs]
    return TokenPlan(
        steps=1,
        rows=len(rows),
        given=sum(len(row.ids) for row in rows),
        computed=sum(sizes),
        answers=sum(len(row.answer) for row in rows),
        pairs=sum(attention_pairs(pack, rows, packing) for pack in packs),
        packs=len(packs),
        largest=max(sizes),
        largest_step=numbers,
    )


@dataclass(frozen=True)
class _Planner:
    """Row numbers of steps -> their sums."""

    tokens: Dataset
    max_tokens: int
    packing: Packing
    processes: int

    def __call__(self, steps: list[list[int]]) -> TokenPlan:
        numbers = [number for step in steps for number in step]
        columns = self.tokens[numbers]
        spans = zip(columns["input_ids"], columns["answer_start"], columns["answer_end"], strict=True)
        rows = [Row.of(ids, int(start), int(end)) for ids, start, end in spans]
        found, at = [], 0
        for step in steps:
            inside = rows[at : at + len(step)]
            at += len(step)
            shares = plan_step(inside, self.max_tokens, self.packing, self.processes)
            found.append(
                sums(inside, [pack for share in shares for pack in share], self.packing, tuple(step))
            )
        return reduce(TokenPlan.plus, found)


def plan_tokens(
    tokens: Dataset,
    training: TrainingConfig,
    max_tokens: int,
    packing: Packing,
    processes: int = 1,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> TokenPlan:
    """Plan all steps of a run, with the code and in the order that training has.

    Args:
        tokens: what training reads (`tokenize_rows`).
        processes: that train together; copies of packs that keep one of them busy are counted too.
        workers: processes that plan; never the result.
        progress: told how many more rows are planned.
    """
    order = run_order(len(tokens), training)
    units = iter(lambda: list(islice(order, _UNIT_STEPS)), [])
    with closing(mapped(_Planner(tokens, max_tokens, packing, processes), units, workers)) as found:
        total = next(found)
        progress(total.rows)
        for part in found:
            progress(part.rows)
            total = total.plus(part)
    return total


def largest_pack(
    plan: TokenPlan, tokens: Dataset, max_tokens: int, packing: Packing, processes: int = 1
) -> tuple[list[Row], Pack]:
    """(rows of its step, the pack) with the most tokens of a run."""
    rows = to_rows([tokens[i] for i in plan.largest_step])
    shares = plan_step(rows, max_tokens, packing, processes)
    return rows, max((p for share in shares for p in share), key=lambda pack: pack.tokens(rows, packing))
