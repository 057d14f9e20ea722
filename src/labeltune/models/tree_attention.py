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
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from labeltune.models.shared_prefix import attend_to, attention_on, refuse_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME = "labeltune_segments"


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
    segments: Sequence[Segment] | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """Attention of every segment over its past and itself; tensors as in `shared_prefix_attention`.

    Raises:
        ValueError: no segments were given, or the model asks for something that this function cannot do.
    """
    if segments is None:
        raise ValueError("segment attention needs segments")
    refuse_unknown(module, query, attention_mask, options)
    layer = module.layer_idx
    sizes = [len(segment.ids) for segment in segments]
    outputs = []
    for segment, q, k, v in zip(
        segments, *(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True
    ):
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
    logits = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        logits_to_keep=torch.tensor(index or [len(ids) - 1], device=device),
        use_cache=False,
        segments=segments,
    ).logits[0]
    for segment in segments:
        if segment.keep:
            segment.past.length += len(segment.ids)
    return logits
