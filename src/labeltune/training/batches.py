"""Which rows a step reads: the same on every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from labeltune.training.planner import Row, step_order


class StepBatches:
    """Batch sampler: the row numbers of every step of the current epoch, the same on every process."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer calls this at the beginning of an epoch."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> StepBatches:
        """Trainer looks for `set_epoch` one level down, where it expects accelerate's wrapper (which a resumed epoch has)."""
        return self

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return step_order(self.count, self.batch_size, self.seed, self.epoch)


def to_rows(records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows of a tokenized data set -> rows of the planner."""
    return [Row.of(r["input_ids"], int(r["answer_start"]), int(r["answer_end"])) for r in records]
