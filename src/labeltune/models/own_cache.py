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

    def repeated(self, rows: Sequence[int], *, last: bool = False) -> OwnCache:
        """A copy that holds the given rows (numbers, as often as they are named); differentiable.

        Args:
            last: nothing will follow the tokens behind it, so no state is written in place, which a backward pass needs.
        """
        repeated = copy.copy(self.cache)
        repeated.layers = [_same_tensors(layer) for layer in self.cache.layers]
        repeated.reorder_cache(torch.tensor(rows, dtype=torch.long))
        if last:
            for layer in repeated.layers:
                layer.record_past = True
                layer.update_recurrent_state = _unchanged
        return OwnCache(self.name, repeated, self.length)


def run_behind(
    model: PreTrainedModel,
    cache: OwnCache | None,
    ids: Sequence[Sequence[int]],
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
        input_ids=torch.tensor(ids, device=device),
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


def _same_tensors(layer: Any) -> Any:
    """A layer's cache that can be assigned to without changing this one; tensors are the same."""
    copied = copy.copy(layer)
    for name, value in vars(copied).items():
        if isinstance(value, dict):
            setattr(copied, name, dict(value))
    return copied


def _unchanged(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return states
