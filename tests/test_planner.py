"""The planner: whole numbers in, whole numbers out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labeltune.prompts.builder import common_prefix
from labeltune.training.packing import Group, Pack, Packing, Row, divide, pack_step, step_order


def row(prompt: list[int], answer: list[int]) -> Row:
    return Row.of([*prompt, *answer], len(prompt), len(prompt) + len(answer))


rows_of_few_tokens = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=8),
        st.lists(st.integers(0, 1), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=7,
).map(lambda pairs: [row(prompt, answer) for prompt, answer in pairs])


def test_the_last_answer_token_is_predicted_and_never_read() -> None:
    made = Row.of([5, 6, 7, 8, 9], 2, 4)
    assert made == Row(ids=(5, 6, 7), answer=(7, 8), answer_start=2)
    for start, end in ((0, 2), (2, 2), (3, 6)):
        with pytest.raises(ValueError, match="cannot be trained"):
            Row.of([5, 6, 7, 8, 9], start, end)


@given(
    rows_of_few_tokens,
    st.integers(1, 40),
    st.sampled_from(["shared_prefix", "packed", "padded"]),
    st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_every_row_is_computed_once_within_the_budget(
    rows: list[Row], budget: int, packing: Packing, processes: int
) -> None:
    shares = pack_step(rows, budget, packing, processes)
    assert len(shares) == processes
    assert len({len(share) for share in shares}) == 1, "every process has the same number of packs"
    counted = [pack for share in shares for pack in share if pack.counted]
    assert sorted(i for pack in counted for i in pack.rows) == list(range(len(rows)))
    for pack in itertools.chain(*shares):
        assert len(pack.rows) == 1 or pack.tokens(rows, packing) <= budget
        for group in pack.groups:
            first = rows[group.rows[0]]
            for i in group.rows:
                assert rows[i].ids[: group.prefix] == first.ids[: group.prefix]
                assert group.prefix <= rows[i].answer_start, "answers do not begin in the shared part"
        if packing != "shared_prefix":
            assert all(group.prefix == 0 for group in pack.groups)
    assert pack_step(list(rows), budget, packing, processes) == shares, "the same rows give the same plan"


def all_cuts(items: list[int]) -> list[list[list[int]]]:
    if not items:
        return [[]]
    return [[items[:at], *rest] for at in range(1, len(items) + 1) for rest in all_cuts(items[at:])]


@given(rows_of_few_tokens, st.integers(1, 30))
@example([row([0], [0, 0]), row([0], [0]), row([0], [1])], 1)
@settings(max_examples=200, deadline=None)
def test_no_cut_of_the_sorted_rows_has_fewer_tokens(rows: list[Row], budget: int) -> None:
    def group(members: list[int]) -> Group:
        columns = zip(*(rows[i].prompt for i in members), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        return Group(same if len(members) > 1 else 0, tuple(members))

    def tokens(cut: list[list[int]]) -> float:
        groups = [group(members) for members in cut]
        too_large = any(len(g.rows) > 1 and g.tokens(rows) > budget for g in groups)
        return float("inf") if too_large else sum(g.tokens(rows) for g in groups)

    # The planner's own order: with a small budget, rows of one prompt are cut apart where that order has them.
    order = sorted(range(len(rows)), key=lambda i: (rows[i].prompt, rows[i].answer))
    found = sum(pack.tokens(rows) for pack in pack_step(rows, budget)[0])
    assert found == min(tokens(cut) for cut in all_cuts(order))


def test_rows_with_the_same_candidates_share_them() -> None:
    instruction, list_a, list_b = [1] * 10, [2] * 20, [3] * 20
    rows = [row([*instruction, *(list_a if k % 2 else list_b), 50 + k], [9]) for k in range(6)]
    (pack,) = pack_step(rows, 1000)[0]
    assert sorted((group.prefix, len(group.rows)) for group in pack.groups) == [(30, 3), (30, 3)]


def test_a_prefix_may_be_the_whole_prompt() -> None:
    rows = [row([1, 2, 3], [4]), row([1, 2, 3], [5]), row([1, 2, 3], [5, 6])]
    (pack,) = pack_step(rows, 100)[0]
    assert pack == Pack((Group(3, (0, 1, 2)),)) or pack.groups[0].prefix == 3
    assert pack.tokens(rows) == 4, "three shared tokens, and the first token of the longer answer"


def test_work_is_spread_evenly() -> None:
    generator = random.Random(0)
    rows = [
        row([generator.randrange(9) for _ in range(generator.randrange(5, 60))], [1, 2]) for _ in range(64)
    ]
    shares = pack_step(rows, 128, "shared_prefix", 4)
    loads = [sum(pack.tokens(rows) for pack in share) for share in shares]
    assert max(loads) <= 1.03 * min(loads)


def test_long_rows_count_for_their_attention() -> None:
    """One row of 1,000 tokens attends to more pairs than five of 200; with as many tokens they would be equal."""
    rows = [row([n] * 1000, [1]) for n in range(2)] + [row([9 + n] * 200, [1]) for n in range(10)]

    def tokens(pairs_per_token: int) -> list[int]:
        shares = pack_step(rows, 5000, "packed", 3, pairs_per_token)
        return sorted(sum(pack.tokens(rows, "packed") for pack in share) for share in shares)

    assert tokens(10_000_000) == [1000, 1400, 1600]
    assert tokens(1) == [1000, 1000, 2000]


def naive_work(rows: list[Row], per_token: int) -> int:
    """Every different beginning of a prompt once, every token of the answers for each row."""
    beginnings = {r.prompt[:n] for r in rows for n in range(1, len(r.prompt) + 1)}
    answers = [n for r in rows for n in range(r.answer_start + 1, len(r.ids) + 1)]
    return sum(per_token + len(b) for b in beginnings) + sum(per_token + n for n in answers)


@given(rows_of_few_tokens, st.integers(1, 4), st.sampled_from([1, 10]))
@settings(max_examples=200, deadline=None)
def test_no_cut_into_ranges_has_less_work_in_the_largest(
    rows: list[Row], processes: int, per_token: int
) -> None:
    rows = sorted(rows[:7], key=lambda r: (r.prompt, r.answer))
    common = [0] + [common_prefix(a.prompt, b.prompt) for a, b in itertools.pairwise(rows)]
    parts = divide([len(r.ids) for r in rows], common, processes, per_token)
    assert len(parts) == processes
    assert list(itertools.chain(*parts)) == list(range(len(rows)))

    def largest(cuts: Sequence[int]) -> int:
        ends = itertools.pairwise([0, *cuts, len(rows)])
        return max(naive_work(rows[start:end], per_token) for start, end in ends)

    found = max(naive_work([rows[i] for i in part], per_token) for part in parts)
    every = itertools.combinations_with_replacement(range(len(rows) + 1), processes - 1)
    assert found == min(map(largest, every))


def test_a_large_step_is_divided_evenly_too() -> None:
    generator = random.Random(0)
    prompts = [tuple(generator.randrange(3) for _ in range(generator.randint(2, 60))) for _ in range(2_500)]
    rows = sorted((row(list(prompt), [7, 8]) for prompt in prompts), key=lambda r: r.prompt)
    common = [0] + [common_prefix(a.prompt, b.prompt) for a, b in itertools.pairwise(rows)]
    for processes in (2, 30):
        parts = divide([len(r.ids) for r in rows], common, processes, 100)
        loads = [naive_work([rows[i] for i in part], 100) for part in parts]
        assert max(loads) <= 1.02 * sum(loads) / processes


def test_a_process_without_rows_is_kept_busy_with_a_copy_that_does_not_count() -> None:
    shares = pack_step([row([1, 2], [3])], 100, "shared_prefix", 3)
    assert [share[0].counted for share in shares].count(True) == 1
    assert all(len(share) == 1 for share in shares)


def test_steps_hold_exactly_batch_size_rows() -> None:
    steps = list(step_order(37, 16, seed=1, epoch=0))
    assert [len(step) for step in steps] == [16, 16, 5]
    assert sorted(i for step in steps for i in step) == list(range(37))
    assert steps == list(step_order(37, 16, seed=1, epoch=0))
    assert steps != list(step_order(37, 16, seed=1, epoch=1))
    assert steps != list(step_order(37, 16, seed=2, epoch=0))
