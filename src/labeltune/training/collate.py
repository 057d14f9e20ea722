"""From a tokenized data set to what goes through the model: which rows a step reads, and a pack of them as tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from labeltune.models.lora import uncast_adapters
from labeltune.models.precision import sent
from labeltune.models.shared_prefix import (
    PrefixLayout,
    changing_shapes,
    make_layout,
    shared_prefix_attention_on,
)
from labeltune.training.packing import Group, Pack, Packing, Row, step_order, steps_an_epoch

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


#: Makes one tensor of another.
Change = Callable[[torch.Tensor], torch.Tensor]


def _mapped(value: Any, change: Change) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return value.map(change) if isinstance(value, PrefixLayout) else value


@dataclass(frozen=True)
class ModelCall:
    """One call of the model.

    Attributes:
        inputs: keyword arguments of the model; `input_ids` of shape [1, tokens], padded: [rows, longest].
        index: positions whose next token is predicted, over the flattened batch and row; shape [answer tokens].
        columns: those of these positions, each once, shape [columns].
        picked: the positions over the flattened batch and columns, shape [answer tokens].
        targets: the tokens that are predicted, shape [answer tokens].
        weights: what the loss of each is multiplied by, shape [answer tokens]: the bits of fp32 numbers as integers, like all tensors that
            travel to the device together; None where all are 1.
        rows: the examples, in the order of their answer tokens.
    """

    inputs: dict[str, Any]
    index: torch.Tensor
    columns: torch.Tensor
    picked: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    rows: tuple[int, ...]

    @staticmethod
    def of(
        inputs: dict[str, Any], index: Sequence[int], rows: Sequence[Row], chosen: Sequence[int]
    ) -> ModelCall:
        """A call that is to predict the answers of chosen rows at these positions."""
        answers = [rows[i] for i in chosen]
        targets = torch.tensor([token for row in answers for token in row.answer])
        weights = None
        if any(row.weight != 1 for row in answers):
            each = torch.tensor([row.weight for row in answers for _ in row.answer], dtype=torch.float32)
            weights = each.view(torch.int32).long()
        at, width = torch.tensor(index), inputs["input_ids"].shape[1]
        columns, place = torch.unique(at % width, return_inverse=True)
        picked = at // width * len(columns) + place
        return ModelCall(inputs, at, columns, picked, targets, weights, tuple(chosen))

    @property
    def loss_weights(self) -> torch.Tensor | None:
        """The weights as fp32 numbers."""
        return None if self.weights is None else self.weights.to(torch.int32).view(torch.float32)

    def weighed(self, weights: Sequence[float], sizes: Sequence[int]) -> ModelCall:
        """The same with a weight for each row of the step.

        Args:
            sizes: answer tokens of each row.
        """
        each = torch.tensor([weights[i] for i in self.rows for _ in range(sizes[i])], dtype=torch.float32)
        return replace(self, weights=each.view(torch.int32).long())

    def wanted(self, found: torch.Tensor) -> torch.Tensor:
        """Those of the answer tokens, from what the model gives when it is asked for `columns`: [rows, columns, size] -> [answer tokens, size].

        Some models give all positions whatever they are asked for (xLSTM).
        """
        asked_for = found.shape[1] == len(self.columns)
        return found.flatten(0, 1).index_select(0, self.picked if asked_for else self.index)

    def map(self, change: Change) -> ModelCall:
        """The same with other tensors."""
        inputs = {key: _mapped(value, change) for key, value in self.inputs.items()}
        index, columns, picked, targets = map(change, (self.index, self.columns, self.picked, self.targets))
        weights = None if self.weights is None else change(self.weights)
        return ModelCall(inputs, index, columns, picked, targets, weights, self.rows)


@dataclass(frozen=True)
class PackBatch:
    """A pack as tensors.

    Attributes:
        calls: all that is computed; one call, but for `shared_cache`.
        prefix: tokens that the calls follow by way of the model's cache, shape [1, prefix]; None where they follow nothing.
    """

    calls: tuple[ModelCall, ...]
    prefix: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        calls = sum(call.inputs["input_ids"].numel() for call in self.calls)
        return int(calls + (0 if self.prefix is None else self.prefix.numel()))

    def weighed(self, rows: Sequence[Row], weights: Sequence[float]) -> PackBatch:
        """The same with a weight for each row of the step."""
        sizes = [len(row.answer) for row in rows]
        return replace(self, calls=tuple(call.weighed(weights, sizes) for call in self.calls))

    def map(self, change: Change) -> PackBatch:
        """The same with other tensors."""
        prefix = None if self.prefix is None else change(self.prefix)
        return PackBatch(tuple(call.map(change) for call in self.calls), prefix)

    def to(self, device: torch.device) -> PackBatch:
        """The same on another device. All tensors, which hold integers, travel as one, and nothing waits for it."""
        if device.type == "cpu":
            return self
        tensors: list[torch.Tensor] = []
        self.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        together = sent(torch.cat([tensor.flatten() for tensor in tensors]), device)
        parts = iter(torch.split(together, [tensor.numel() for tensor in tensors]))
        return self.map(lambda tensor: next(parts).view(tensor.shape))


class StepRows(list[Row]):
    """The rows of a step, and what a worker thread makes of them meanwhile.

    Attributes:
        made: its result.
    """

    made: Future[Any]


class AheadLoader(DataLoader[Any]):
    """A DataLoader whose rows are worked on a step ahead: most of a step on a GPU, Python waits in the backward pass.

    Args:
        make: what is done with the rows of each step.
    """

    def __init__(self, *given: Any, make: Callable[[Sequence[Row]], Any], **options: Any) -> None:
        super().__init__(*given, **options)
        self._make = make

    def __iter__(self) -> Any:
        with ThreadPoolExecutor(1, "labeltune-packs") as worker:
            waiting = None
            for rows in super().__iter__():
                step = StepRows(rows)
                step.made = worker.submit(self._make, step)
                if waiting is not None:
                    yield waiting
                waiting = step
            if waiting is not None:
                yield waiting


def make_batch(rows: Sequence[Row], pack: Pack, packing: Packing, pad_id: int) -> PackBatch:
    """Tensors of one pack of a step's rows."""
    if packing == "shared_cache":
        (group,) = pack.groups
        prefix = torch.tensor([rows[group.rows[0]].ids[: group.prefix]]) if group.prefix else None
        return PackBatch(tuple(_behind(rows, batch, group.prefix, pad_id) for batch in group.batches), prefix)
    if packing == "padded":
        return PackBatch((_padded(rows, pack.rows, pad_id),))
    groups = pack.groups if packing == "shared_prefix" else [Group(0, (i,)) for i in pack.rows]
    return PackBatch((_one_row(rows, groups, with_layout=packing == "shared_prefix"),))


@contextlib.contextmanager
def attention_for(model: PreTrainedModel, packing: Packing) -> Iterator[None]:
    """What must be on while a batch of this kind runs forward and backward."""
    attention = shared_prefix_attention_on(model) if packing == "shared_prefix" else changing_shapes()
    with attention, uncast_adapters(model):
        yield


def _one_row(rows: Sequence[Row], groups: Sequence[Group], with_layout: bool) -> ModelCall:
    """Groups one behind the other; without prefixes that is plain packing, which transformers knows by the position ids
    that start again at 0."""
    ids: list[int] = []
    positions: list[int] = []
    index: list[int] = []
    for group in groups:
        start, prefix = len(ids), group.prefix
        ids += rows[group.rows[0]].ids[:prefix]
        positions += range(prefix)
        for row in (rows[i] for i in group.rows):
            # Where position i of the example stands: in the shared prefix, or in its own part.
            shift = len(ids) - prefix
            ids += row.ids[prefix:]
            positions += range(prefix, len(row.ids))
            first = row.answer_start - 1
            index += [(start if at < prefix else shift) + at for at in range(first, first + len(row.answer))]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "use_cache": False,
        }
    if with_layout:
        inputs["prefix_layout"] = make_layout(
            [(g.prefix, [len(rows[i].ids) - g.prefix for i in g.rows]) for g in groups]
        )
    together = tuple(i for group in groups for i in group.rows)
    return ModelCall.of(inputs, index, rows, together)


def _padded(rows: Sequence[Row], chosen: Sequence[int], pad_id: int) -> ModelCall:
    """Padding stands on the left, so that all answers are in the last columns."""
    width = max(len(rows[i].ids) for i in chosen)
    ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    index: list[int] = []
    for number, row in enumerate(rows[i] for i in chosen):
        left = width - len(row.ids)
        ids[number, left:] = torch.tensor(row.ids)
        mask[number, left:] = 1
        first = number * width + left + row.answer_start - 1
        index += range(first, first + len(row.answer))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    return ModelCall.of(inputs, index, rows, chosen)


def _behind(rows: Sequence[Row], chosen: Sequence[int], prefix: int, pad_id: int) -> ModelCall:
    """What stands behind a prefix. Padding is on the right, where neither attention nor a state comes from, so no mask is needed."""
    width = max(len(rows[i].ids) - prefix for i in chosen)
    ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
    index: list[int] = []
    for number, row in enumerate(rows[i] for i in chosen):
        ids[number, : len(row.ids) - prefix] = torch.tensor(row.ids[prefix:])
        first = number * width + row.answer_start - 1 - prefix
        index += range(first, first + len(row.answer))
    positions = torch.arange(prefix, prefix + width).expand(len(chosen), -1)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return ModelCall.of(inputs, index, rows, chosen)
