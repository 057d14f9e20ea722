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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NAME = "labeltune_shared_prefix"

#: Keyword arguments of attention calls that change its result and that this function does not know.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


@dataclass(frozen=True)
class GroupLayout:
    """Where one group's tokens stand.

    Attributes:
        start: its first position in the row.
        prefix: number of shared tokens.
        tokens: number of all tokens.
        gather: shape [examples, longest rest], positions behind the prefix; 0 where a rest is shorter. None when no
            example has tokens of its own.
        scatter: shape [tokens - prefix], where each of these tokens stands in the flattened gather.
    """

    start: int
    prefix: int
    tokens: int
    gather: Any
    scatter: Any


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of a row, in order; together they cover it."""

    groups: tuple[GroupLayout, ...]

    def to(self, device: Any) -> PrefixLayout:
        """The same layout with its index tensors on another device."""
        return PrefixLayout(
            tuple(
                GroupLayout(
                    g.start,
                    g.prefix,
                    g.tokens,
                    None if g.gather is None else g.gather.to(device),
                    None if g.scatter is None else g.scatter.to(device),
                )
                for g in self.groups
            )
        )


def make_layout(groups: Sequence[tuple[int, Sequence[int]]]) -> PrefixLayout:
    """The layout of groups given as (tokens of the prefix, [tokens of each example behind it]).

    Examples without tokens of their own take no place.
    """
    import torch

    made, start = [], 0
    for prefix, rests in groups:
        lengths = [length for length in rests if length]
        gather = scatter = None
        if lengths:
            widest = max(lengths)
            gather = torch.zeros(len(lengths), widest, dtype=torch.long)
            scatter = torch.empty(sum(lengths), dtype=torch.long)
            at = 0
            for k, length in enumerate(lengths):
                own = torch.arange(length)
                gather[k, :length] = at + own
                scatter[at : at + length] = k * widest + own
                at += length
        made.append(GroupLayout(start, prefix, prefix + sum(lengths), gather, scatter))
        start += made[-1].tokens
    return PrefixLayout(tuple(made))


def shared_prefix_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
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
    import torch

    if prefix_layout is None or attention_mask is not None:
        raise ValueError("shared-prefix attention needs prefix_layout and takes no attention mask")
    asked = [name for name in UNSUPPORTED if options.get(name) is not None]
    if asked or not getattr(module, "is_causal", True) or query.shape[0] != 1:
        raise ValueError(f"shared-prefix attention does not know {asked or 'batches and non-causal layers'}")
    outputs = []
    for group in prefix_layout.groups:
        end = group.start + group.tokens
        q, k, v = (x[:, :, group.start : end] for x in (query, key, value))
        outputs.append(_group_attention(q, k, v, group, dropout, scaling, sliding_window))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output, None


def _group_attention(
    query: Any,
    key: Any,
    value: Any,
    group: GroupLayout,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Any:
    """Attention of one group; tensors of shape [1, heads, tokens, head size] -> [1, tokens, heads, head size]."""
    import torch

    prefix = group.prefix
    parts = []
    if prefix:
        q, k, v = (x[:, :, :prefix] for x in (query, key, value))
        parts.append(_attend(q, k, v, dropout, scaling, window).transpose(1, 2))
    if group.gather is not None:
        # [1, heads, tokens, size] -> [examples, heads, longest rest, size]
        q, k, v = (
            x[0, :, prefix:].transpose(0, 1)[group.gather].transpose(1, 2) for x in (query, key, value)
        )
        if prefix:
            examples = q.shape[0]
            k, v = (
                torch.cat([shared[:, :, :prefix].expand(examples, -1, -1, -1), own], dim=2)
                for shared, own in ((key, k), (value, v))
            )
        rest = _attend(q, k, v, dropout, scaling, window)
        heads, size = rest.shape[1], rest.shape[3]
        parts.append(rest.transpose(1, 2).reshape(-1, heads, size)[group.scatter].unsqueeze(0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(
    query: Any, key: Any, value: Any, dropout: float, scaling: float | None, window: int | None
) -> Any:
    """Causal attention whose last query stands at the last key (a query's rest is padded on the right, behind every key
    that a token of the example may see, so that one mask serves all examples)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    queries, keys = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    if queries == keys and (window is None or window >= keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    behind = keys - queries
    at_query = torch.arange(behind, keys, device=query.device)[:, None]
    at_key = torch.arange(keys, device=query.device)[None, :]
    mask = at_key <= at_query
    if window is not None:
        mask = mask & (at_query - at_key < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


@contextlib.contextmanager
def shared_prefix_attention_on(model: Any) -> Iterator[None]:
    """Have a model use the function, for forward and backward (checkpointed layers run again there), then no longer.

    Only inside does a model need a layout: prediction between two steps uses the model's own attention.
    """
    from transformers import AttentionInterface, PreTrainedConfig

    AttentionInterface.register(NAME, shared_prefix_attention)
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = {at: config._attn_implementation for at, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for at, config in configs.items():
            config._attn_implementation = before[at]
