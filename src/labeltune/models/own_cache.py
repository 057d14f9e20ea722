"""A model's own cache: what its layers keep of tokens they have read, repeated for the sequences that go on behind it.

Layers keep keys and values, convolution states or recurrent states; transformers' cache classes hold them all, so tokens that
many sequences begin with are computed once, whatever the layers are. A state runs through every token of its row, padding
too: rows that are read from go together only when they have the same number of tokens, and padding stands on the right of
rows behind which nothing follows. Whether a model continues its own cache exactly is found out by comparing numbers, never assumed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from labeltune.errors import ModelError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

#: The names by which models return their cache and take it.
NAMES = ("past_key_values", "cache_params")

#: What a layer's cache calls its tensors of shape [rows, ..., tokens, size], and the number of tokens it has read.
ONE_PER_TOKEN, READ = ("keys", "values", "indexer_keys"), "cumulative_length"


@dataclass(frozen=True)
class OwnCache:
    """What a model keeps of the tokens of some rows. A call of the model that is given `cache` changes it.

    Attributes:
        name: the keyword argument by which the model takes it.
        cache: transformers' object.
        length: tokens read; of the longest row.
    """

    name: str
    cache: Cache
    length: int

    def repeated(self, rows: Sequence[int] | torch.Tensor, *, last: bool = False) -> OwnCache:
        """A copy that holds the given rows (numbers, as often as they are named); differentiable.

        Args:
            last: nothing will follow the tokens behind it, so no state is written in place, which a backward pass needs.
        """
        repeated = copy.copy(self.cache)
        repeated.layers = [_same_tensors(layer) for layer in self.cache.layers]
        repeated.reorder_cache(torch.as_tensor(rows, dtype=torch.long))
        if last:
            for layer in repeated.layers:
                layer.record_past = True
                layer.update_recurrent_state = _unchanged
        return OwnCache(self.name, repeated, self.length)

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row, at least 1."""
        held = [value for layer in self.cache.layers for value in vars(layer).values()]
        tensors = [
            each for value in held for each in (value.values() if isinstance(value, dict) else [value])
        ]
        size: int = sum(each.nbytes // max(1, each.shape[0]) for each in tensors if _is_of_rows(each))
        return max(1, size)


def run_behind(
    model: PreTrainedModel,
    cache: OwnCache | None,
    ids: Sequence[Sequence[int]] | torch.Tensor,
    logits_to_keep: int,
    **options: torch.Tensor,
) -> tuple[torch.Tensor, OwnCache]:
    """Run tokens, shape [rows, tokens], behind a cache of as many rows, which is used up; None for the beginning of rows.

    Returns:
        Logits of the last `logits_to_keep` tokens, shape [rows, tokens, vocabulary], and the cache behind all of them.

    Raises:
        ModelError: the model returns no cache.
    """
    device = next(model.parameters()).device
    known: dict[str, Any] = {} if cache is None else {cache.name: cache.cache}
    output = model(
        input_ids=torch.as_tensor(ids, device=device),
        logits_to_keep=logits_to_keep,
        use_cache=True,
        **known,
        **options,
    )
    name = next((name for name in NAMES if getattr(output, name, None) is not None), None)
    if name is None:
        raise ModelError(
            "the model returns no cache, so it cannot go on behind a prompt; generation.decoding=free needs none"
        )
    read = 0 if cache is None else cache.length
    return output.logits, OwnCache(name, getattr(output, name), read + len(ids[0]))


def run_side_by_side(
    model: PreTrainedModel,
    caches: Sequence[OwnCache] | None,
    ids: Sequence[Sequence[int]],
    logits_to_keep: int = 1,
) -> tuple[torch.Tensor, list[OwnCache]]:
    """Run as many tokens for each of some rows of different lengths, as one batch whose shorter rows are padded on their left.

    Args:
        caches: of one row each; they stay as they are. None for the beginning of rows.

    Returns:
        Logits of each row's last `logits_to_keep` tokens, shape [rows, tokens, vocabulary], and the rows' caches behind them.
    """
    lengths = [cache.length for cache in caches] if caches else [0] * len(ids)
    longest, added = max(lengths), len(ids[0])
    options = {}
    if min(lengths) < longest:
        device = next(model.parameters()).device
        starts = torch.tensor(lengths, device=device)[:, None]
        places = torch.arange(longest + added, device=device)
        options = {
            "position_ids": starts + torch.arange(added, device=device),
            "attention_mask": (places >= longest - starts).long(),
        }
    logits, behind = run_behind(
        model, _batch(caches, longest) if caches else None, ids, logits_to_keep, **options
    )
    found = []
    for row, length in enumerate(lengths):
        own = copy.copy(behind.cache)
        own.layers = [_of_row(layer, row, length + added) for layer in behind.cache.layers]
        found.append(OwnCache(behind.name, own, length + added))
    return logits[:, -logits_to_keep:], found


def _batch(caches: Sequence[OwnCache], length: int) -> OwnCache:
    """Caches of one row each as one; tensors are new."""
    whole = copy.copy(caches[0].cache)
    whole.layers = [_joined(layers) for layers in zip(*(each.cache.layers for each in caches), strict=True)]
    return OwnCache(caches[0].name, whole, length)


def _same_tensors(layer: Any) -> Any:
    """A layer's cache that can be assigned to without changing this one; tensors are the same."""
    copied = copy.copy(layer)
    for name, value in vars(copied).items():
        if isinstance(value, dict):
            setattr(copied, name, dict(value))
    return copied


def _unchanged(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return states


def _joined(layers: Sequence[Any]) -> Any:
    """A layer's cache of several rows in one; tensors are new."""
    whole = copy.copy(layers[0])
    for name in vars(whole):
        values = [getattr(layer, name) for layer in layers]
        if isinstance(values[0], dict):
            setattr(whole, name, {key: _rows_of([value[key] for value in values]) for key in values[0]})
        else:
            setattr(whole, name, max(values) if name == READ else _rows_of(values))
    return whole


def _rows_of(values: Sequence[Any]) -> Any:
    """Tensors of one row each as one, its rows filled with zeros in front of the shorter ones' tokens; else the first value."""
    if not _is_of_rows(values[0]):
        return values[0]
    widest = max(value.shape[-2] for value in values)
    pad = torch.nn.functional.pad
    return torch.cat([pad(value, (0, 0, widest - value.shape[-2], 0)) for value in values])


def _of_row(layer: Any, row: int, length: int) -> Any:
    """A layer's cache of one row that has read so many tokens; it shares memory with all rows."""
    own = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(own, name, {k: v[row : row + 1] if _is_of_rows(v) else v for k, v in value.items()})
        elif _is_of_rows(value):
            kept = value[row : row + 1]
            setattr(own, name, kept[..., -length:, :] if name in ONE_PER_TOKEN else kept)
        elif name == READ:
            setattr(own, name, length)
    return own


def _is_of_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1
