"""Runs one model for prediction: scores of answers and decoding, by the fast path where it is exact for this model."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from labeltune.errors import ModelError, first_line
from labeltune.inference.extraction import PlainRunner, Runner, SegmentRunner
from labeltune.inference.scoring import (
    LabelTrie,
    PrefixCache,
    Question,
    leak_between_rows,
    score_answers,
    score_one_by_one,
)
from labeltune.models.precision import weights_in
from labeltune.models.shared_prefix import changing_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Tokens of one pass that keep the device busy.
PASS_TOKENS = {"cuda": 16384, "mps": 4096, "cpu": 1024}
#: Rows of one call that keep the device busy; on slow devices fewer, so that a progress bar moves every few seconds.
CALL_ROWS = {"cuda": 256, "mps": 64, "cpu": 64}
#: Largest difference of an answer's log-probability per token between the fast path and plain forward passes, in fp32.
TOLERANCE = 1e-3
#: In bf16 and fp16, once the two agree in fp32: this many times the difference of plain passes from fp32, or this much.
OWN_ROUNDING, SMALL_ROUNDING = 2, 0.02
#: In bf16 and fp16 where the weights cannot be had in fp32.
MIXED_TOLERANCE = 0.1
#: Prompts, and answers of each, on which the two are compared.
CHECKED_PROMPTS, CHECKED_ANSWERS = 3, 2

Result = TypeVar("Result")


@contextlib.contextmanager
def predicting(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, without compiled layers (each new shape would be compiled) and without the autocast that accelerate
    puts around a model in training: a run's own validation computes what `labeltune evaluate` will. All is put back.
    """
    was_training = model.training
    stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    mixed, unmixed = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    model.eval()
    try:
        if unmixed is not None:
            model.forward = unmixed
        with stance("force_eager") if stance else contextlib.nullcontext(), changing_shapes():
            yield
    finally:
        if unmixed is not None:
            model.forward = mixed
        model.train(was_training)


class Engine:
    """Runs a model for prediction. Calls from several threads wait for each other.

    The first call compares the fast path with plain forward passes on some of its own prompts. A model for which they disagree
    (capped attention, state-space layers, a backend that drops its arguments) is run plainly, with one warning.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._max_tokens: int | None = None
        self._cache = PrefixCache()
        self._lock = threading.RLock()
        self._fast: bool | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of one pass; by the device that the model is on when it is first asked."""
        if self._max_tokens is None:
            self._max_tokens = PASS_TOKENS.get(self._device, 1024)
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        """Other passes from now on."""
        self._max_tokens = value

    @property
    def call_rows(self) -> int:
        """Rows to ask for in one call when there are many."""
        return CALL_ROWS.get(self._device, 64)

    @property
    def _device(self) -> str:
        return str(next(self.model.parameters()).device.type)

    def reset_cache(self) -> None:
        """Drop the keys and values of earlier prompts; needed when the model's weights have changed."""
        with self._lock:
            self._cache.clear()

    def verify_fast_path(self, questions: Sequence[Question]) -> None:
        """Compare the fast path with plain passes on some of these questions, if no call has done so yet."""
        with self._lock, predicting(self.model):
            self._is_fast(questions)

    def score(self, questions: Sequence[Question]) -> list[list[float]]:
        """Log-probability of every answer of every question."""
        if not questions:
            return []
        with self._lock, predicting(self.model):
            if self._is_fast(questions):
                return self._within_memory(
                    lambda: score_answers(self.model, questions, self.max_tokens, self._cache)
                )
            return self._plainly(questions)

    def decode(self, prompts: Sequence[Sequence[int]], run: Callable[[Runner], Result]) -> Result:
        """Run something that decodes step by step, by the path that is exact for this model.

        Args:
            prompts: its prompts; the two paths are compared on some of them.
            run: called with the runner; again after the device has run out of memory.
        """
        with self._lock, predicting(self.model):
            if not self._is_fast([Question(prompt, PLACEHOLDER_ANSWERS) for prompt in prompts]):
                return run(PlainRunner(self.model))
            return self._within_memory(lambda: run(SegmentRunner(self.model, self._cache, self.max_tokens)))

    def _within_memory(self, run: Callable[[], Result]) -> Result:
        """Again with smaller passes when the device runs out of memory."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                self._cache.clear()
                torch.cuda.empty_cache()
                if self.max_tokens <= 256:
                    raise ModelError(
                        "a document does not fit into the device's memory; lower prompt.max_length"
                    ) from error
                self.max_tokens //= 2

    def _is_fast(self, questions: Sequence[Question]) -> bool:
        if self._fast is None:
            reason = self._disagreement(questions_to_check(questions))
            self._fast = reason is None
            if reason is not None:
                warnings.warn(
                    f"the fast way of predicting is not exact for this model ({reason}); it is run plainly, slower and exact",
                    stacklevel=4,
                )
        return self._fast

    def _disagreement(self, questions: Sequence[Question]) -> str | None:
        """Why the fast path cannot be used, or None.

        Rounding must not hide a wrong result: weights in bf16 or fp16 are first compared in fp32; where that is impossible, no
        row may be changed by the tokens of another one.
        """
        rounded = next(self.model.parameters()).dtype != torch.float32
        try:
            exact = None
            if rounded:
                with weights_in(self.model, torch.float32) as possible:
                    if possible:
                        exact = self._plainly(questions)
                        reason = _too_far(self._fast_scores(questions), exact, questions, TOLERANCE)
                        if reason is not None:
                            return f"{reason} in fp32"
            plain = self._plainly(questions)
            if exact is None:
                allowed = MIXED_TOLERANCE if rounded else TOLERANCE
                leak = leak_between_rows(self.model, questions) if rounded else None
                return leak or _too_far(self._fast_scores(questions), plain, questions, allowed)
            allowed = max(OWN_ROUNDING * _difference(plain, exact, questions), SMALL_ROUNDING)
            return _too_far(self._fast_scores(questions), exact, questions, allowed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign model does with segments it does not know
            return first_line(error)

    def _fast_scores(self, questions: Sequence[Question]) -> list[list[float]]:
        return score_answers(self.model, questions, self.max_tokens, PrefixCache())

    def _plainly(self, questions: Sequence[Question]) -> list[list[float]]:
        return [score_one_by_one(self.model, question) for question in questions]


#: Answers for prompts that come without any.
PLACEHOLDER_ANSWERS = LabelTrie.of([(0, 1, 2), (0, 2, 1), (1, 0, 2)])


def questions_to_check(questions: Sequence[Question]) -> list[Question]:
    """Different prompts, the shortest, the longest and one between, each with its longest and its shortest answer; a prompt that
    is alone gets its own end backwards for company."""
    prompts = {tuple(question.prompt): question.trie for question in questions}
    ordered = sorted(prompts, key=lambda prompt: (len(prompt), prompt))
    count = min(CHECKED_PROMPTS, len(ordered))
    chosen = [ordered[at * (len(ordered) - 1) // max(1, count - 1)] for at in range(count)]
    asked = [(prompt, prompts[prompt]) for prompt in chosen]
    if len(asked) == 1:
        asked.append((asked[0][0][: -64 - 1 : -1], asked[0][1]))
    return [Question(prompt, _few_answers(trie)) for prompt, trie in asked]


def _few_answers(trie: LabelTrie) -> LabelTrie:
    """The trie of its longest and shortest answers only."""
    answers = sorted(([token for _, token in path] for path in trie.paths), key=len, reverse=True)
    return LabelTrie.of([*answers[: CHECKED_ANSWERS - 1], *answers[1:][-1:]])


def _difference(
    found: Sequence[Sequence[float]], right: Sequence[Sequence[float]], questions: Sequence[Question]
) -> float:
    """The largest difference of an answer's log-probability, divided by its number of tokens; NaN where there is one."""
    differences = [
        abs(x - y) / len(path)
        for xs, ys, question in zip(found, right, questions, strict=True)
        for x, y, path in zip(xs, ys, question.trie.paths, strict=True)
    ]
    return max(differences) if all(d == d for d in differences) else math.nan


def _too_far(
    found: Sequence[Sequence[float]],
    right: Sequence[Sequence[float]],
    questions: Sequence[Question],
    allowed: float,
) -> str | None:
    difference = _difference(found, right, questions)
    # NaN compares as a disagreement.
    return None if difference <= allowed else f"log-probabilities differ by {difference:.1e} a token"
