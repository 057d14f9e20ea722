"""From a tokenized data set to what goes through the model: which rows a step reads, and a pack of them as tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from labeltune.models.shared_prefix import changing_shapes, make_layout, shared_prefix_attention_on
from labeltune.training.packing import Pack, Packing, Row, step_order, steps_an_epoch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return steps_an_epoch(self.count, self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return step_order(self.count, self.batch_size, self.seed, self.epoch)


@dataclass(frozen=True)
class PackBatch:
    """One call of the model.

    Attributes:
        inputs: keyword arguments of the model; `input_ids` of shape [1, tokens], padded: [rows, longest].
        index: positions whose next token is predicted, over the flattened batch and row; shape [answer tokens].
        targets: these tokens, shape [answer tokens].
        tokens: size of `input_ids`.
    """

    inputs: dict[str, Any]
    index: torch.Tensor
    targets: torch.Tensor
    tokens: int

    def to(self, device: torch.device) -> PackBatch:
        """The same on another device."""
        moved = {
            key: value.to(device) if hasattr(value, "to") else value for key, value in self.inputs.items()
        }
        return PackBatch(moved, self.index.to(device), self.targets.to(device), self.tokens)


def make_batch(rows: Sequence[Row], pack: Pack, packing: Packing, pad_id: int) -> PackBatch:
    """Tensors of one pack of a step's rows."""
    if packing == "padded":
        return _padded([rows[i] for i in pack.rows], pad_id)
    if packing == "packed":
        return _one_row([(0, [rows[i]]) for i in pack.rows], with_layout=False)
    return _one_row([(g.prefix, [rows[i] for i in g.rows]) for g in pack.groups], with_layout=True)


def attention_for(model: PreTrainedModel, packing: Packing) -> contextlib.AbstractContextManager[None]:
    """What must be on while a batch of this kind runs forward and backward."""
    return shared_prefix_attention_on(model) if packing == "shared_prefix" else changing_shapes()


def _one_row(groups: Sequence[tuple[int, Sequence[Row]]], with_layout: bool) -> PackBatch:
    """Groups one behind the other; without prefixes that is plain packing, which transformers knows by the position ids
    that start again at 0."""
    ids: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    targets: list[int] = []
    for prefix, rows in groups:
        start = len(ids)
        ids += rows[0].ids[:prefix]
        positions += range(prefix)
        for row in rows:
            # Where position i of the example stands: in the shared prefix, or in its own part.
            shift = len(ids) - prefix
            ids += row.ids[prefix:]
            positions += range(prefix, len(row.ids))
            first = row.answer_start - 1
            index += [(start if at < prefix else shift) + at for at in range(first, first + len(row.answer))]
            targets += row.answer
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "use_cache": False,
    }
    if with_layout:
        inputs["prefix_layout"] = make_layout(
            [(prefix, [len(row.ids) - prefix for row in rows]) for prefix, rows in groups]
        )
    return PackBatch(inputs, torch.tensor(index), torch.tensor(targets), len(ids))


def _padded(rows: Sequence[Row], pad_id: int) -> PackBatch:
    """Padding stands on the left, so that all answers are in the last columns."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    index: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows):
        left = width - len(row.ids)
        ids[number, left:] = torch.tensor(row.ids)
        mask[number, left:] = 1
        first = number * width + left + row.answer_start - 1
        index += range(first, first + len(row.answer))
        targets += row.answer
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    return PackBatch(inputs, torch.tensor(index), torch.tensor(targets), ids.numel())
