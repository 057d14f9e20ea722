"""The shared-prefix layout, and the attention function that understands it.

Examples that begin with the same tokens P are laid out as one row, `[P][rest 1][rest 2] ... [rest K]`; several such groups
may follow each other. Position ids restart behind the prefix for every example. Tokens of P attend causally to P; tokens
of example k attend to P and causally to their own example, and to nothing else. So every hidden state is that of K
separate sequences, up to rounding, while P is computed once, forward and backward.

The function is registered with transformers' `AttentionInterface`; any model that takes its attention from there and
hands unknown keyword arguments down to it can use it. Whether a model really does is found out by comparing numbers
(`labeltune.training.self_check`), never assumed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAME = "labeltune_shared_prefix"

#: Keyword arguments of attention calls that change its result and that this function does not know.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


@dataclass(frozen=True)
class GroupLayout:
    """Where one group's tokens stand.

    Attributes:
        start: its first position in the row.
        prefix: number of shared tokens.
        rests: number of tokens behind the prefix of every example that has any.
        gather: shape [examples * longest rest], positions behind the prefix; 0 where a rest is shorter.
        scatter: shape [sum of rests], where each of these tokens stands in the flattened gather.
    """

    start: int
    prefix: int
    rests: tuple[int, ...]
    gather: Any
    scatter: Any

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return self.prefix + sum(self.rests)


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of a row, in order; together they cover it."""

    groups: tuple[GroupLayout, ...]
    _masks: dict[tuple[int, int, int | None, torch.dtype], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PrefixLayout:
        """The same layout with other index tensors, on another device."""
        return PrefixLayout(
            tuple(replace(g, gather=change(g.gather), scatter=change(g.scatter)) for g in self.groups)
        )

    def mask(self, queries: int, keys: int, window: int | None, like: torch.Tensor) -> Any:
        """What is added to the attention scores of the last `queries` of `keys` tokens, shape [queries, keys]; causal.

        Built once for all layers that ask for the same: the kernels would make it of a mask of bools again in every layer.

        Args:
            window: a token sees this many positions, itself included; None for all.
            like: a tensor with the device and number format of the queries.
        """
        key = queries, keys, window, like.dtype
        if key not in self._masks:
            at_query = torch.arange(keys - queries, keys, device=like.device)[:, None]
            at_key = torch.arange(keys, device=like.device)[None, :]
            hidden = at_key > at_query
            if window is not None:
                hidden |= at_query - at_key >= window
            self._masks[key] = bias(hidden, like)
        return self._masks[key]


def bias(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What is added to attention scores: minus infinity where a key is hidden, in the format of `like`.

    Rows begin at multiples of 16 bytes, as CUDA's kernels copy other masks in every layer.
    """
    keys = hidden.shape[-1]
    columns = keys if like.device.type == "cpu" else -(-keys // 8) * 8
    return like.new_zeros(*hidden.shape[:-1], columns)[..., :keys].masked_fill_(hidden, -math.inf)


def make_layout(groups: Sequence[tuple[int, Sequence[int]]]) -> PrefixLayout:
    """The layout of groups given as (tokens of the prefix, [tokens of each example behind it]).

    Examples without tokens of their own take no place.
    """
    made, start = [], 0
    for prefix, lengths in groups:
        rests = tuple(length for length in lengths if length)
        widest = max(rests, default=0)
        gather = torch.zeros(len(rests) * widest, dtype=torch.long)
        scatter = torch.empty(sum(rests), dtype=torch.long)
        at = 0
        for k, length in enumerate(rests):
            own = torch.arange(length)
            gather[k * widest + own] = at + own
            scatter[at : at + length] = k * widest + own
            at += length
        made.append(GroupLayout(start, prefix, rests, gather, scatter))
        start += made[-1].tokens
    return PrefixLayout(tuple(made))


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    prefix_layout: PrefixLayout | None = None,
    **options: Any,
) -> tuple[Any, None]:
    """Attention over one row in the shared-prefix layout.

    Args:
        query: shape [1, heads, tokens, head size]; `key` and `value` with as many heads or a divisor of them (GQA).
        sliding_window: a token sees this many positions, itself included; None for all.
        prefix_layout: required.

    Returns:
        Output of shape [1, tokens, heads, head size], and None for the weights.

    Raises:
        ValueError: no layout was given, or the model asks for something that this function cannot do.
    """
    if prefix_layout is None:
        raise ValueError("shared-prefix attention needs prefix_layout")
    refuse_unknown(module, query, attention_mask, options)
    # On the CPU many small calls cost less than padding; elsewhere it is the other way round.
    attend = _one_by_one if query.device.type == "cpu" else _side_by_side
    attention = Attend(prefix_layout, dropout, scaling, sliding_window)
    sizes = [group.tokens for group in prefix_layout.groups]
    parts = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    outputs = [
        output
        for (q, k, v), group in zip(parts, prefix_layout.groups, strict=True)
        for output in attend(q, k, v, group, attention)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def refuse_unknown(
    module: torch.nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    """What a model may ask of an attention function, and ours do not know.

    Raises:
        ValueError: it asks for that.
    """
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if asked or not getattr(module, "is_causal", True) or query.shape[0] != 1:
        raise ValueError(f"labeltune's attention does not know {asked or 'batches and non-causal layers'}")


def attend_to(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    **options: Any,
) -> Any:
    """PyTorch's attention with fewer key heads than query heads (GQA); tensors of shape [batch, heads, tokens, head size]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu":
        # The kernels that take a mask, or fp32, do not take fewer key heads.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1], **options
    )


@dataclass(frozen=True)
class Attend:
    """Causal attention whose last query stands at the last key.

    What pads a query's rest stands on the right, behind every key that a token of the example may see, so that one mask
    serves all examples of a batch.
    """

    layout: PrefixLayout
    dropout: float
    scaling: float | None
    window: int | None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        """Tensors of shape [batch, heads, tokens, head size]."""
        queries, keys = query.shape[2], key.shape[2]
        whole = queries == keys and (self.window is None or self.window >= keys)
        mask = None if whole else self.layout.mask(queries, keys, self.window, query)
        return attend_to(query, key, value, mask, self.scaling, is_causal=whole, dropout_p=self.dropout)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: GroupLayout, attend: Attend
) -> Iterator[Any]:
    """The prefix, then every example by itself: nothing is padded. Splitting along the tokens costs the backward pass one
    concatenation."""
    sizes = [group.prefix, *group.rests]
    (q, *queries), (k, *keys), (v, *values) = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    if group.prefix:
        yield attend(q, k, v)
    for own_q, own_k, own_v in zip(queries, keys, values, strict=True):
        if group.prefix:
            own_k, own_v = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
        yield attend(own_q, own_k, own_v)


def _side_by_side(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: GroupLayout, attend: Attend
) -> Iterator[Any]:
    """The prefix, then all examples as one padded batch.

    Rows are taken by `index_select`: on CUDA its gradient adds them up in parallel, where that of advanced indexing adds
    the rows of one index one after the other, and all padding has the same index.
    """
    sizes = [group.prefix, sum(group.rests)]
    (q, own_q), (k, own_k), (v, own_v) = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    if group.prefix:
        yield attend(q, k, v)
    if group.rests:
        examples, widest = len(group.rests), max(group.rests)
        # [1, heads, tokens, size] -> [examples, heads, longest rest, size]
        own_q, own_k, own_v = (
            torch.unflatten(x[0].index_select(1, group.gather), 1, (examples, widest)).transpose(0, 1)
            for x in (own_q, own_k, own_v)
        )
        if group.prefix:
            own_k = torch.cat([k.expand(examples, -1, -1, -1), own_k], dim=2)
            own_v = torch.cat([v.expand(examples, -1, -1, -1), own_v], dim=2)
        output = attend(own_q, own_k, own_v).transpose(1, 2).flatten(0, 1)
        yield output.index_select(0, group.scatter).transpose(0, 1).unsqueeze(0)


def shared_prefix_attention_on(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Have a model use the function, for forward and backward (checkpointed layers run again there), then no longer."""
    return attention_on(model, NAME, shared_prefix_attention)


@contextlib.contextmanager
def attention_on(
    model: PreTrainedModel, name: str, function: Callable[..., tuple[torch.Tensor, None]]
) -> Iterator[None]:
    """Have a model use an attention function inside the `with`: only there does it need what the function asks for.

    Compiled layers call it as it is: compiling it would start anew for every layout.
    """
    AttentionInterface.register(name, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        with changing_shapes():
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


#: Of a model that has been asked for: thousands of modules are walked for a few configs.
_CONFIGS: WeakKeyDictionary[torch.nn.Module, list[PreTrainedConfig]] = WeakKeyDictionary()


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of its modules, each once."""
    if model not in _CONFIGS:
        found = [getattr(module, "config", None) for module in model.modules()]
        _CONFIGS[model] = list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())
    return _CONFIGS[model]


@contextlib.contextmanager
def changing_shapes() -> Iterator[None]:
    """Keep cuDNN out of PyTorch's attention: it is tried first on an H100 or H200 and makes a plan for every new shape, 55 ms
    to 3 s each (measured, docs/benchmarks.md), and texts hardly ever have the same lengths twice. Changes nothing on a CPU.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
