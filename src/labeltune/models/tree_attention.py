"""Attention over segments that see kept keys and values: what prediction runs on.

A row of tokens is cut into segments that stand behind each other and do not see each other. A segment sees everything that
its `past` holds, and of itself either what is causal or what a mask allows (a label trie: every node its ancestors). A
segment may add its own keys and values to its past, for those behind it and for later calls. So prompts that begin alike
are computed once, all labels of a row are scored in one pass, and rows at different lengths decode side by side without padding.

The function is registered with transformers' `AttentionInterface`. Whether a model really hands the segments down to it is
found out by comparing numbers (`labeltune.inference.engine`), never assumed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from labeltune.models.precision import passes, sent
from labeltune.models.shared_prefix import attend_to, attention_on, bias, make_layout, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME = "labeltune_segments"

#: Tokens of a pass, padding included, for every one that is none; a single token is also cheaper where a state is kept.
PADDED = 1.5
#: Tokens of a pass, padding included, below which more passes cost more than padding.
FEW = 512


class KVCache:
    """Keys and values of one sequence of tokens, for every layer; grows in place.

    Args:
        parent: what the sequence begins with; copied.
        room: tokens that can be added before memory is moved.
    """

    def __init__(self, parent: KVCache | None = None, room: int = 0) -> None:
        self.length = 0
        self.room = room
        self._layers: dict[int, tuple[Any, Any, int]] = {}
        if parent is not None:
            self.length = parent.length
            for layer, (key, value, used) in parent._layers.items():
                self._layers[layer] = (
                    self._grown(key[:, :, :used], used + room),
                    self._grown(value[:, :, :used], used + room),
                    used,
                )

    @staticmethod
    def _grown(tensor: torch.Tensor, size: int) -> Any:
        shape = list(tensor.shape)
        shape[2] = max(size, shape[2])
        grown = tensor.new_empty(shape)
        grown[:, :, : tensor.shape[2]] = tensor
        return grown

    def view(self, layer: int) -> tuple[Any, Any] | None:
        """Keys and values of a layer, shape [1, key heads, tokens, head size]; None when there are none."""
        if layer not in self._layers:
            return None
        key, value, used = self._layers[layer]
        return key[:, :, :used], value[:, :, :used]

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """Add tokens and return all of them."""
        added = key.shape[2]
        if layer not in self._layers:
            self._layers[layer] = (
                self._grown(key, added + self.room),
                self._grown(value, added + self.room),
                added,
            )
        else:
            keys, values, used = self._layers[layer]
            if used + added > keys.shape[2]:
                keys, values = (self._grown(x[:, :, :used], 2 * (used + added)) for x in (keys, values))
            keys[:, :, used : used + added] = key
            values[:, :, used : used + added] = value
            self._layers[layer] = (keys, values, used + added)
        found = self.view(layer)
        assert found is not None
        return found

    def drop(self, tokens: int) -> None:
        """Take the last tokens out again."""
        self.length -= tokens
        for layer, (key, value, used) in self._layers.items():
            self._layers[layer] = key, value, used - tokens


@dataclass
class Segment:
    """Some tokens behind each other.

    Attributes:
        ids: the tokens.
        past: what all of them see.
        keep: add the tokens to `past`.
        depths: place of every token behind the past, when it is not 0, 1, 2 ...
        visible: shape [tokens, tokens], which tokens of the segment each of them sees; causal when None.
        wanted: tokens (numbers in the segment) whose next token is to be predicted.
        begins_at: tokens of the past; given where a segment before this one adds to it in the same call.
    """

    ids: Sequence[int]
    past: KVCache
    keep: bool = False
    depths: Sequence[int] | None = None
    visible: Any = None
    wanted: Sequence[int] = ()
    begins_at: int | None = None
    _masks: dict[tuple[int, int | None], Any] = field(default_factory=dict, init=False, repr=False)

    def mask(self, keys: int, window: int | None, like: torch.Tensor) -> Any:
        """What the tokens see of `keys` tokens, theirs the last, shape [tokens, keys]; None for everything.

        Built once for all layers that ask for the same.

        Args:
            window: a token sees this many positions, itself included; None for all.
            like: a tensor with the device and number format of the queries.
        """
        window = None if window is None or window >= keys else window
        if len(self.ids) == 1 and window is None:
            return None
        if (keys, window) not in self._masks:
            seen = self._seen(keys, window, like.device)
            if like.device.type == "cpu":
                # What PyTorch's kernel would make of it again in every layer.
                seen = like.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)
            self._masks[keys, window] = seen
        return self._masks[keys, window]

    def _seen(self, keys: int, window: int | None, device: torch.device) -> Any:
        tokens = len(self.ids)
        before = keys - tokens
        own = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        if self.visible is not None:
            own = self.visible.to(device)
        seen = torch.cat([torch.ones(tokens, before, dtype=torch.bool, device=device), own], dim=1)
        if window is not None:
            places = torch.tensor(
                list(self.depths) if self.depths is not None else range(tokens), device=device
            )
            at_key = torch.cat([torch.arange(before, device=device), before + places])
            seen &= (before + places)[:, None] - at_key[None, :] < window
        return seen

    def positions(self) -> list[int]:
        """Position ids."""
        places = range(len(self.ids)) if self.depths is None else self.depths
        start = self.past.length if self.begins_at is None else self.begins_at
        return [start + place for place in places]


class SlotCache:
    """Keys and values of many sequences, each in a slot of its own of one tensor a layer; they begin alike and grow in place.

    Args:
        parent: what every sequence begins with; copied.
        room: tokens that a sequence may have behind that before memory is moved.
    """

    def __init__(self, parent: KVCache, room: int) -> None:
        self.parent, self.capacity = parent, parent.length + room
        self.lengths: list[int] = []
        self._layers: dict[int, tuple[Any, Any]] = {}

    def begin(self, slot: int) -> None:
        """Another sequence is to take this slot; new ones are added before the first tokens are."""
        if slot == len(self.lengths):
            assert not self._layers
            self.lengths.append(0)
        self.lengths[slot] = self.parent.length

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens."""
        if tokens <= self.capacity:
            return
        more = -(-tokens // 64) * 64 - self.capacity
        self.capacity += more
        pad = torch.nn.functional.pad
        for layer in list(self._layers):
            keys, values = self._layers.pop(layer)
            self._layers[layer] = pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))

    def extend(self, layer: int, batch: SlotRows, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """Add tokens of shape [rows, heads, longest, head size] and return all up to the longest sequence."""
        if layer not in self._layers:
            held = self.parent.view(layer)
            made = []
            for at, new in enumerate((key, value)):
                # One place more, for padding.
                whole = new.new_zeros(len(self.lengths), new.shape[1], self.capacity + 1, new.shape[3])
                if held is not None:
                    whole[:, :, : self.parent.length] = held[at]
                made.append(whole)
            self._layers[layer] = made[0], made[1]
        keys, values = self._layers[layer]
        rows, places = batch.slots[:, None], batch.places
        # Indices around a slice go first: [rows, longest, heads, head size].
        keys[rows, :, places] = key.transpose(1, 2)
        values[rows, :, places] = value.transpose(1, 2)
        keys, values = keys[:, :, : batch.used], values[:, :, : batch.used]
        return (
            (keys, values)
            if batch.all_slots
            else (keys.index_select(0, batch.slots), values.index_select(0, batch.slots))
        )


class SegmentRows:
    """Segments side by side behind the same past, padded to the longest, with what all layers need of them built once."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.past = segments[0].past
        self.sizes = [len(segment.ids) for segment in segments]
        self.layout = make_layout([(0, self.sizes)]).map(lambda tensor: sent(tensor, device)).groups[0]
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """The past in front of the rows' own keys and values, shape [rows, heads, past + longest, head size]."""
        before = self.past.view(layer)
        if before is None:
            return key, value
        rows = len(self.sizes)
        return (
            torch.cat([before[0].expand(rows, -1, -1, -1), key], dim=2),
            torch.cat([before[1].expand(rows, -1, -1, -1), value], dim=2),
        )

    def mask(self, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, shape [rows, 1, longest, keys]. Padding sees itself, so that no row is without a key."""
        window = None if window is None or window >= keys else window
        if (keys, window) not in self._masks:
            widest = max(self.sizes)
            before = keys - widest
            seen = torch.zeros(len(self.sizes), 1, widest, keys, dtype=torch.bool)
            seen[:, 0, range(widest), range(before, keys)] = True
            for row, (segment, size) in enumerate(zip(self.segments, self.sizes, strict=True)):
                own = segment._seen(before + size, window, torch.device("cpu"))
                seen[row, 0, :size, : before + size] = own
            self._masks[keys, window] = bias(sent(~seen, like.device), like)
        return self._masks[keys, window]


class SlotRows:
    """Sequences that go on in their slots, side by side and padded to the longest.

    Args:
        ids: the tokens that each goes on by.
        slots: where each is.
    """

    def __init__(
        self, cache: SlotCache, ids: Sequence[Sequence[int]], slots: Sequence[int], device: torch.device
    ) -> None:
        self.cache = cache
        self.sizes = [len(each) for each in ids]
        widest = max(self.sizes)
        lengths = [cache.lengths[slot] for slot in slots]
        # A multiple, so that few shapes follow each other as sequences grow.
        self.used = min(-(-(max(lengths) + widest) // 64) * 64, cache.capacity)
        self.all_slots = list(slots) == list(range(len(cache.lengths)))
        layout = make_layout([(0, self.sizes)])
        starts = torch.tensor(lengths)[:, None]
        # Padding is written where the sequence goes on later, or behind its last place, and is read by none.
        places = (starts + torch.arange(widest)).clamp(max=cache.capacity)
        self.layout, self.slots, self.places = (
            layout.map(lambda tensor: sent(tensor, device)).groups[0],
            sent(torch.tensor(slots), device),
            sent(places, device),
        )
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Any, Any]:
        """All keys and values up to the longest sequence."""
        return self.cache.extend(layer, self, key, value)

    def mask(self, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """What is added to the scores, shape [rows, 1, longest, keys]: causal."""
        if (keys, window) not in self._masks:
            at_key, at_query = torch.arange(keys, device=like.device), self.places[:, None, :, None]
            hidden = at_key > at_query
            if window is not None:
                hidden |= at_query - at_key >= window
            self._masks[keys, window] = bias(hidden, like)
        return self._masks[keys, window]


def worth_padding(sizes: Sequence[int]) -> bool:
    """Whether rows of so many tokens cost less side by side, padded to the longest, than in several parts."""
    return len(sizes) * max(sizes) <= max(PADDED * sum(sizes), FEW)


def _alike(segments: Sequence[Segment]) -> bool:
    return worth_padding([len(segment.ids) for segment in segments])


def _side_by_side(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: SegmentRows | SlotRows,
    layer: int,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Tensors of shape [1, heads, tokens, head size], all rows' tokens one behind the other."""
    shape = len(rows.sizes), max(rows.sizes)
    # [1, heads, tokens, size] -> [rows, heads, longest, size]
    q, k, v = (
        torch.unflatten(x[0].index_select(1, rows.layout.gather), 1, shape).transpose(0, 1)
        for x in (query, key, value)
    )
    k, v = rows.extend(layer, k, v)
    output = attend_to(q, k, v, rows.mask(k.shape[2], window, q), scaling).transpose(1, 2).flatten(0, 1)
    found: torch.Tensor = output.index_select(0, rows.layout.scatter)
    return found.transpose(0, 1).unsqueeze(0)


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Sequence[Segment | SegmentRows | SlotRows] | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """Attention of every segment over its past and itself; tensors as in `shared_prefix_attention`.

    Raises:
        ValueError: no segments were given, or the model asks for something that this function cannot do.
    """
    if segments is None:
        raise ValueError("segment attention needs segments")
    refuse_unknown(module, query, attention_mask, options)
    layer: Any = module.layer_idx
    sizes = [len(each.ids) if isinstance(each, Segment) else sum(each.sizes) for each in segments]
    outputs = []
    for segment, q, k, v in zip(
        segments, *(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True
    ):
        if not isinstance(segment, Segment):
            outputs.append(_side_by_side(q, k, v, segment, layer, scaling=scaling, window=sliding_window))
            continue
        if segment.keep:
            k, v = segment.past.extend(layer, k, v)
        else:
            before = segment.past.view(layer)
            if before is not None:
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
        mask = segment.mask(k.shape[2], sliding_window, q)
        outputs.append(attend_to(q, k, v, mask, scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def segment_attention_on(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Have a model use the function, inside the `with` only."""
    return attention_on(model, NAME, segment_attention)


def run_segments(model: PreTrainedModel, segments: Sequence[Segment]) -> Any:
    """Run segments through the model; kept ones are then part of their past.

    Must be called inside `segment_attention_on(model)` and without gradients.

    Returns:
        Logits of all wanted tokens in order, shape [wanted tokens, vocabulary]; of one unspecified token when none is wanted.
    """
    device = next(model.parameters()).device
    ids = [token for segment in segments for token in segment.ids]
    positions = [position for segment in segments for position in segment.positions()]
    index, start = [], 0
    for segment in segments:
        index += [start + at for at in segment.wanted]
        start += len(segment.ids)
    given: Sequence[Segment | SegmentRows] = segments
    if device.type != "cpu":  # where padding costs less than many small calls
        kept = [segment for segment in segments if segment.keep]
        behind = segments[len(kept) :]
        if behind and not any(segment.keep or segment.past is not behind[0].past for segment in behind):
            given = [*kept, *(SegmentRows(part, device) for part in passes(behind, _alike))]
    logits = _run(model, ids, positions, index or [len(ids) - 1], given)
    for segment in segments:
        if segment.keep:
            segment.past.length += len(segment.ids)
    return logits


def run_slots(
    model: PreTrainedModel,
    cache: SlotCache,
    ids: Sequence[Sequence[int]],
    slots: Sequence[int],
    wanted: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Run tokens behind the sequences of a cache, which then holds them; as `run_segments`.

    Args:
        wanted: tokens of each sequence (numbers in its ids) whose next token is to be predicted; its last one when None.

    Returns:
        Logits behind them in order, shape [wanted tokens, vocabulary].
    """
    device = next(model.parameters()).device
    cache.reserve(max(cache.lengths[slot] + len(each) for slot, each in zip(slots, ids, strict=True)))
    rows = SlotRows(cache, ids, slots, device)
    positions = [
        cache.lengths[slot] + at for slot, each in zip(slots, ids, strict=True) for at in range(len(each))
    ]
    ends = list(itertools.accumulate(rows.sizes))
    index = (
        [end - 1 for end in ends]
        if wanted is None
        else [end - size + at for end, size, own in zip(ends, rows.sizes, wanted, strict=True) for at in own]
    )
    logits = _run(model, [token for each in ids for token in each], positions, index, [rows])
    for slot, size in zip(slots, rows.sizes, strict=True):
        cache.lengths[slot] += size
    return logits


def _run(
    model: PreTrainedModel,
    ids: Sequence[int],
    positions: Sequence[int],
    wanted: Sequence[int],
    segments: Sequence[Segment | SegmentRows | SlotRows],
) -> Any:
    sizes = [len(ids), len(positions), len(wanted)]
    together = sent(torch.tensor([*ids, *positions, *wanted]), next(model.parameters()).device)
    tokens, places, index = torch.split(together, sizes)
    return model(
        input_ids=tokens[None],
        position_ids=places[None],
        logits_to_keep=index,
        use_cache=False,
        segments=segments,
    ).logits[0]
