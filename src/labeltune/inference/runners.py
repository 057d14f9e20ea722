"""Ways to run a model token by token: several sequences in segments, several in the model's own cache, or each by itself."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from labeltune.errors import ModelError, first_line
from labeltune.inference.scoring import CACHED_BYTES, PrefixCache
from labeltune.models.own_cache import OwnCache, run_behind, run_side_by_side
from labeltune.models.precision import passes, sent
from labeltune.models.tree_attention import (
    KVCache,
    Segment,
    SlotCache,
    run_segments,
    run_slots,
    segment_attention_on,
    worth_padding,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Decisions of a sequence that are looked at in one pass, where what comes next is known but for them: what is read in vain costs less
#: than passes do on a GPU.
LOOKAHEAD = {"cpu": 16}
FAR = 64
#: Logits fill memory: one token in so many of a pass has them.
WITH_LOGITS = 4
#: Tokens that are read again rather than in a pass of their own.
AGAIN = 64


@dataclass(frozen=True)
class Reading:
    """What a sequence goes on by, and what is asked about it.

    Attributes:
        state: of the sequence.
        ids: tokens that are added to it.
        certain: how many of them, from the first, will not be dropped.
        asked: (number of a token in `ids`, tokens that may come behind it), in order, from the last certain token on.
    """

    state: Any
    ids: Sequence[int]
    certain: int
    asked: Sequence[tuple[int, Sequence[int]]]


def log_probabilities(logits: torch.Tensor, asked: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities, among all tokens, of those that are asked for.

    Args:
        logits: shape [places, vocabulary].
        asked: token ids of each place.
    """
    widest = max(map(len, asked))
    index = torch.tensor([[*ids, *[ids[0]] * (widest - len(ids))] for ids in asked])
    values = logits.float()
    known = torch.cat([values.gather(1, sent(index, logits.device)), values.logsumexp(-1, keepdim=True)], 1)
    # Differences in fp64: those of fp32 could make equals of what is not.
    return [
        [value - row[-1] for value in row[: len(ids)]] for row, ids in zip(known.tolist(), asked, strict=True)
    ]


def _of_rows(rows: Sequence[Reading], logits: torch.Tensor) -> list[list[list[float]]]:
    """The answers of each row, of logits of all places that are asked about."""
    found = iter(log_probabilities(logits, [ids for row in rows for _, ids in row.asked]))
    return [[next(found) for _ in row.asked] for row in rows]


def lookahead_of(model: PreTrainedModel) -> int:
    """Decisions to look at in one pass on the device that a model is on."""
    return LOOKAHEAD.get(next(model.parameters()).device.type, FAR)


class Session(Protocol):
    """Sequences in progress."""

    def start(self, prompt: Sequence[int], capacity: int) -> tuple[Any, list[int]]:
        """A new sequence: its state, and the tokens that have to go through the model first.

        Args:
            capacity: tokens that may follow the prompt.
        """

    def advance(self, rows: Sequence[tuple[Any, Sequence[int]]]) -> torch.Tensor:
        """Add tokens to sequences; the logits after each of them, shape [rows, vocabulary]."""

    def read(self, rows: Sequence[Reading]) -> list[list[list[float]]]:
        """Add tokens to sequences, some of them on trial; for each row and each place that is asked about, the log-probabilities
        of the tokens that may come there. `drop` has to follow for every row."""

    def drop(self, state: Any, count: int) -> None:
        """Take the last tokens of what has been read out of a sequence again; none with 0."""

    def end(self, state: Any) -> None:
        """A sequence is not continued."""


class Runner(Protocol):
    """A way to run a model.

    Attributes:
        lookahead: decisions of a sequence that it looks at in one pass.
    """

    lookahead: int

    def session(self, prompts: Sequence[Sequence[int]]) -> contextlib.AbstractContextManager[Session]:
        """A session for these prompts."""


class SegmentRunner:
    """All sequences in one row; what their prompts begin with is computed once. On the CPU each has keys and values of its own, elsewhere
    all have one tensor a layer."""

    def __init__(self, model: PreTrainedModel, cache: PrefixCache[KVCache], max_tokens: int) -> None:
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self.lookahead = lookahead_of(model)

    @contextlib.contextmanager
    def session(self, prompts: Sequence[Sequence[int]]) -> Iterator[Session]:
        """Segment attention is switched on while the session is open."""
        with torch.inference_mode(), segment_attention_on(self.model):
            prefix = (self.cache.common(self.model, prompts) if prompts else None) or KVCache()
            on_cpu = next(self.model.parameters()).device.type == "cpu"
            longest = max(map(len, prompts), default=0)
            yield (
                _Segments(self.model, prefix, self.max_tokens)
                if on_cpu
                else _Slots(self.model, prefix, longest, self.max_tokens)
            )


class _Segments:
    def __init__(self, model: PreTrainedModel, prefix: KVCache, max_tokens: int) -> None:
        self.model, self.prefix, self.max_tokens = model, prefix, max_tokens

    def start(self, prompt: Sequence[int], capacity: int) -> tuple[KVCache, list[int]]:
        own = list(prompt[self.prefix.length :])
        return KVCache(self.prefix, len(own) + capacity), own

    def advance(self, rows: Sequence[tuple[KVCache, Sequence[int]]]) -> torch.Tensor:
        def fits(part: Sequence[Segment]) -> bool:
            return sum(len(segment.ids) for segment in part) <= self.max_tokens

        segments = [Segment(ids, cache, keep=True, wanted=[len(ids) - 1]) for cache, ids in rows]
        return torch.cat([run_segments(self.model, part) for part in passes(segments, fits)])

    def read(self, rows: Sequence[Reading]) -> list[list[list[float]]]:
        def fits(part: Sequence[Reading]) -> bool:
            asked = sum(len(row.asked) for row in part)
            return max(sum(len(row.ids) for row in part), asked * WITH_LOGITS) <= self.max_tokens

        found = []
        for part in passes(rows, fits):
            segments = [
                Segment(row.ids, row.state, keep=True, wanted=[at for at, _ in row.asked]) for row in part
            ]
            found += _of_rows(part, run_segments(self.model, segments))
        return found

    def drop(self, state: KVCache, count: int) -> None:
        state.drop(count)

    def end(self, state: KVCache) -> None:
        """Its memory goes with it."""


class _Slots:
    def __init__(self, model: PreTrainedModel, prefix: KVCache, longest: int, max_tokens: int) -> None:
        self.model, self.prefix, self.longest, self.max_tokens = model, prefix, longest, max_tokens
        self.cache: SlotCache | None = None
        self.used: set[int] = set()

    def start(self, prompt: Sequence[int], capacity: int) -> tuple[int, list[int]]:
        if self.cache is None:
            self.cache = SlotCache(self.prefix, self.longest - self.prefix.length + capacity)
        slot = next(at for at in itertools.count() if at not in self.used)
        self.used.add(slot)
        self.cache.begin(slot)
        return slot, list(prompt[self.prefix.length :])

    def advance(self, rows: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        assert self.cache is not None

        def fits(part: Sequence[int]) -> bool:
            sizes = [len(rows[i][1]) for i in part]
            return len(part) * max(sizes) <= self.max_tokens and worth_padding(sizes)

        found: dict[int, torch.Tensor] = {}
        for part in passes(sorted(range(len(rows)), key=lambda i: len(rows[i][1])), fits):
            part.sort(key=lambda i: rows[i][0])
            logits = run_slots(self.model, self.cache, [rows[i][1] for i in part], [rows[i][0] for i in part])
            found |= dict(zip(part, logits, strict=True))
        return torch.stack([found[i] for i in range(len(rows))])

    def read(self, rows: Sequence[Reading]) -> list[list[list[float]]]:
        assert self.cache is not None

        def fits(part: Sequence[int]) -> bool:
            sizes = [len(rows[i].ids) for i in part]
            asked = sum(len(rows[i].asked) for i in part)
            return max(len(part) * max(sizes), asked * WITH_LOGITS) <= self.max_tokens and worth_padding(
                sizes
            )

        found: dict[int, list[list[float]]] = {}
        for part in passes(sorted(range(len(rows)), key=lambda i: len(rows[i].ids)), fits):
            part.sort(key=lambda i: rows[i].state)
            mine = [rows[i] for i in part]
            logits = run_slots(
                self.model,
                self.cache,
                [row.ids for row in mine],
                [row.state for row in mine],
                [[at for at, _ in row.asked] for row in mine],
            )
            found |= dict(zip(part, _of_rows(mine, logits), strict=True))
        return [found[i] for i in range(len(rows))]

    def drop(self, state: int, count: int) -> None:
        assert self.cache is not None
        self.cache.lengths[state] -= count

    def end(self, state: int) -> None:
        self.used.discard(state)


class CacheRunner:
    """Through the model's own cache; sequences that go on by as many tokens go together, padded in front where they are shorter."""

    def __init__(self, model: PreTrainedModel, cache: PrefixCache[OwnCache], max_tokens: int) -> None:
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self.lookahead = lookahead_of(model)

    @contextlib.contextmanager
    def session(self, prompts: Sequence[Sequence[int]]) -> Iterator[Session]:
        """What the prompts begin with is computed first."""
        with torch.inference_mode():
            prefix = self.cache.common(self.model, prompts) if prompts else None
            yield _Cached(self.model, prefix, self.max_tokens)


@dataclass
class _Held:
    """A sequence in progress.

    Attributes:
        cache: None before its first token.
        again: tokens behind the cache that have to go through the model again.
        tried: tokens behind the cache that were read last, and the cache behind them; None where padding stands there.
    """

    cache: OwnCache | None
    again: list[int] = field(default_factory=list)
    tried: tuple[list[int], OwnCache | None] = ([], None)


class _Cached:
    def __init__(self, model: PreTrainedModel, prefix: OwnCache | None, max_tokens: int) -> None:
        self.model, self.prefix, self.max_tokens = model, prefix, max_tokens

    def start(self, prompt: Sequence[int], capacity: int) -> tuple[_Held, list[int]]:
        return _Held(self.prefix), list(prompt[self.prefix.length if self.prefix else 0 :])

    def advance(self, rows: Sequence[tuple[_Held, Sequence[int]]]) -> torch.Tensor:
        sizes = [state.cache.bytes_per_row if state.cache else 0 for state, _ in rows]
        kinds = [(state.cache is None, len(ids)) for state, ids in rows]

        def fits(part: Sequence[int]) -> bool:
            return (
                kinds[part[0]] == kinds[part[-1]]
                and len(part) * kinds[part[0]][1] <= self.max_tokens
                and len(part) * max(sizes[i] for i in part) <= CACHED_BYTES * self.max_tokens
            )

        found: dict[int, torch.Tensor] = {}
        for part in passes(sorted(range(len(rows)), key=kinds.__getitem__), fits):
            caches = [cache for i in part if (cache := rows[i][0].cache) is not None]
            logits, behind = run_side_by_side(self.model, caches or None, [rows[i][1] for i in part])
            for k, i in enumerate(part):
                rows[i][0].cache, found[i] = behind[k], logits[k, -1]
        return torch.stack([found[i] for i in range(len(rows))])

    def read(self, rows: Sequence[Reading]) -> list[list[list[float]]]:
        """A state cannot go back to where it was, so what is dropped leaves the cache as it was before, and what stays is read again;
        many certain tokens are read first, in a pass of their own. Shorter rows are padded behind."""
        sure = [(row.state, [*row.state.again, *row.ids[: row.certain - 1]]) for row in rows]
        if long := [(state, ids) for state, ids in sure if len(ids) > AGAIN]:
            self.advance(long)
        read_first = [len(ids) > AGAIN for _, ids in sure]
        fed: list[list[int]] = []
        for row, (state, ids), done in zip(rows, sure, read_first, strict=True):
            state.again = [] if done else ids
            fed.append([*state.again, *row.ids[row.certain - 1 :]])

        def fits(part: Sequence[int]) -> bool:
            sizes = [len(fed[i]) for i in part]
            states = [rows[i].state for i in part]
            bytes_per_row = max(state.cache.bytes_per_row if state.cache else 0 for state in states)
            return (
                (states[0].cache is None) == (states[-1].cache is None)
                and len(part) * max(sizes) * WITH_LOGITS <= self.max_tokens
                and worth_padding(sizes)
                and len(part) * bytes_per_row <= CACHED_BYTES * self.max_tokens
            )

        found: dict[int, list[list[float]]] = {}
        for part in passes(
            sorted(range(len(rows)), key=lambda i: (rows[i].state.cache is None, len(fed[i]))), fits
        ):
            longest = max(len(fed[i]) for i in part)
            caches = [cache for i in part if (cache := rows[i].state.cache) is not None]
            padded = [fed[i] + fed[i][-1:] * (longest - len(fed[i])) for i in part]
            logits, behind = run_side_by_side(self.model, caches or None, padded, longest)
            for k, i in enumerate(part):
                row, first = rows[i], len(rows[i].state.again) - rows[i].certain + 1
                row.state.tried = fed[i], behind[k] if len(fed[i]) == longest else None
                found[i] = log_probabilities(
                    logits[k, [first + at for at, _ in row.asked]], [ids for _, ids in row.asked]
                )
        return [found[i] for i in range(len(rows))]

    def drop(self, state: _Held, count: int) -> None:
        ids, behind = state.tried
        if count or behind is None:
            state.again = ids[: len(ids) - count]
        else:
            state.cache, state.again = behind, []
        state.tried = [], None

    def end(self, state: _Held) -> None:
        """Its memory goes with it."""


def decoded_scores(runner: Runner, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Log-probabilities of tokens behind prompts, decoded side by side; the rows go on by one token or two, at different times.

    Args:
        rows: prompts and at least one token behind each.
    """
    found: list[list[float]] = [[] for _ in rows]
    with runner.session([prompt for prompt, _ in rows]) as session:
        active = [
            (number, *session.start(prompt, len(behind)), 0) for number, (prompt, behind) in enumerate(rows)
        ]
        while active:
            logits = session.advance([(state, ids) for _, state, ids, _ in active])
            still = []
            for (number, state, _, at), row in zip(active, logits.float().log_softmax(-1), strict=True):
                behind = rows[number][1]
                found[number].append(float(row[behind[at]]))
                end = at + 1 + (at + number) % 2
                if end < len(behind):
                    still.append((number, state, list(behind[at:end]), end))
                else:
                    session.end(state)
            active = still
    return found


class PlainRunner:
    """Every sequence by itself, and behind its prompt token by token, as `generate` does: the reference, and for models that need it."""

    lookahead = 0

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @contextlib.contextmanager
    def session(self, prompts: Sequence[Sequence[int]]) -> Iterator[Session]:
        """Needs no preparation."""
        with torch.inference_mode():
            yield _Plain(self.model)


class _Plain:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(self, prompt: Sequence[int], capacity: int) -> tuple[_Held, list[int]]:
        return _Held(None), list(prompt)

    def advance(self, rows: Sequence[tuple[_Held, Sequence[int]]]) -> torch.Tensor:
        found = []
        for state, ids in rows:
            for part in [ids] if state.cache is None else [[token] for token in ids]:
                try:
                    logits, state.cache = run_behind(self.model, state.cache, [part], 1)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise ModelError(
                        f"the model's own code cannot go on behind what it has read, which entities need: {first_line(error)}"
                    ) from error
            found.append(logits[0, -1])
        return torch.stack(found)

    def read(self, rows: Sequence[Reading]) -> list[list[list[float]]]:
        """Nothing is read on trial."""
        logits = self.advance([(row.state, row.ids) for row in rows])
        return [
            [log_probabilities(own[None], [ids])[0] for _, ids in row.asked]
            for row, own in zip(rows, logits, strict=True)
        ]

    def drop(self, state: _Held, count: int) -> None:
        assert count == 0

    def end(self, state: _Held) -> None:
        """Its memory goes with it."""
