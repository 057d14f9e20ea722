"""How token sequences go through a model step by step: several at once in segments, or each by itself, plainly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from labeltune.inference.scoring import PrefixCache
from labeltune.models.tree_attention import KVCache, Segment, run_segments, segment_attention_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Session(Protocol):
    """Sequences in progress."""

    def start(self, prompt: Sequence[int], room: int) -> tuple[Any, list[int]]:
        """A new sequence: its state, and the tokens that have to go through the model first.

        Args:
            room: tokens that may follow the prompt.
        """

    def advance(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> Any:
        """Add tokens to sequences; the logits behind each of them, shape [rows, vocabulary]."""


class Runner(Protocol):
    """A way to run a model."""

    def session(self, prompts: Sequence[Sequence[int]]) -> contextlib.AbstractContextManager[Session]:
        """A session for these prompts."""


class SegmentRunner:
    """All sequences in one row, what their prompts begin with computed once."""

    def __init__(self, model: PreTrainedModel, cache: PrefixCache, max_tokens: int) -> None:
        self.model, self.cache, self.max_tokens = model, cache, max_tokens

    @contextlib.contextmanager
    def session(self, prompts: Sequence[Sequence[int]]) -> Iterator[Session]:
        """Switches the model's attention meanwhile."""
        with torch.inference_mode(), segment_attention_on(self.model):
            past = self.cache.common(self.model, prompts) if prompts else KVCache()
            yield _Segments(self.model, past, self.max_tokens)


class _Segments:
    def __init__(self, model: PreTrainedModel, past: KVCache, max_tokens: int) -> None:
        self.model, self.past, self.max_tokens = model, past, max_tokens

    def start(self, prompt: Sequence[int], room: int) -> tuple[Any, list[int]]:
        own = list(prompt[self.past.length :])
        return KVCache(self.past, room=len(own) + room), own

    def advance(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> Any:
        parts: list[Any] = []
        batch: list[Segment] = []
        for state, ids in rows:
            if batch and sum(len(s.ids) for s in batch) + len(ids) > self.max_tokens:
                parts.append(run_segments(self.model, batch))
                batch = []
            batch.append(Segment(ids, state, keep=True, wanted=[len(ids) - 1]))
        parts.append(run_segments(self.model, batch))
        return torch.cat(parts)


class PlainRunner:
    """Every sequence by itself through the model's own attention and cache: the twin, and for models that cannot do more."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def session(self, prompts: Sequence[Sequence[int]]) -> Iterator[Session]:
        """Nothing to prepare."""
        with torch.inference_mode():
            yield _Plain(self.model)


class _Plain:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = next(model.parameters()).device

    def start(self, prompt: Sequence[int], room: int) -> tuple[Any, list[int]]:
        return {}, list(prompt)

    def advance(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> Any:
        found = []
        for state, ids in rows:
            output = self.model(
                input_ids=torch.tensor([list(ids)], device=self.device),
                past_key_values=state.get("cache"),
                use_cache=True,
                logits_to_keep=1,
            )
            state["cache"] = output.past_key_values
            found.append(output.logits[0, -1])
        return torch.stack(found)
