"""Rows to predict, shared out over the processes of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from labeltune.distributed import (
    all_gather,
    assign,
    is_distributed,
    is_sharded,
    join_uneven,
    rank,
    world_size,
)
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

#: Rows that are predicted together, by one process and from nothing kept. Answers follow from them to the last bit, so neither the
#: number of processes nor who takes what changes anything.
UNIT = 32

Answer = TypeVar("Answer")


def shared_out(
    predictor: Predictor,
    examples: Sequence[Example],
    answer: Callable[[Sequence[Example]], list[Answer]],
) -> list[Answer]:
    """`answer` for all examples, in order; every process gets all of it, and must be called with the same examples."""
    units = [examples[at : at + UNIT] for at in range(0, len(examples), UNIT)]
    if not units:
        return []
    # One verdict, on the same prompts, for all processes.
    predictor.verify_fast_path(examples)
    # Generation calls parts of the model, so weights that are shared out are asked by all for everything.
    together = not is_distributed() or (
        predictor.generation.decoding == "free" and is_sharded(predictor.model)
    )
    owners = (
        [rank()] * len(units)
        if together
        else assign([sum(len(e.text) for e in u) for u in units], world_size())
    )
    mine = [number for number, owner in enumerate(owners) if owner == rank()]
    own: dict[int, list[Answer]] = {}
    with join_uneven(predictor.model):
        for number in mine:
            predictor.engine.forget()
            own[number] = answer(units[number])
    predictor.engine.forget()
    found: dict[int, list[Answer]] = {}
    for part in [own] if together else all_gather(own):
        found |= part
    return [one for number in range(len(units)) for one in found[number]]
