"""Runs one model for prediction: scores of answers and decoding, by the fastest way that is exact for this model."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from labeltune.errors import ModelError, first_line
from labeltune.inference.runners import (
    CacheRunner,
    PlainRunner,
    Runner,
    SegmentRunner,
    decoded_scores,
)
from labeltune.inference.scoring import (
    LabelTrie,
    Question,
    leak_between_rows,
    own_prefix,
    score_answers,
    score_by_cache,
    score_one_by_one,
    score_side_by_side,
    segment_prefix,
)
from labeltune.models.precision import FELT, fp32_logits, has_experts, spread, weights_in
from labeltune.models.shared_prefix import changing_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Tokens of one pass that keep the device busy.
PASS_TOKENS = {"cuda": 16384, "mps": 4096, "cpu": 1024}
#: Rows of one call that keep the device busy; on slow devices fewer, so that a progress bar moves every few seconds.
CALL_ROWS = {"cuda": 256, "mps": 64, "cpu": 64}
#: Rows that are decoded at once where the config says auto.
DECODED_ROWS = {"cuda": 128}
#: Ways to run a model, the fastest first: attention over segments, the model's own cache, whole rows side by side, and one by one,
#: which the others are compared with.
Way = Literal["segments", "cache", "side_by_side", "one_by_one"]
#: What each of them is said to do.
IN_WORDS: dict[Way, str] = {
    "segments": "replaced attention",
    "cache": "the model's own cache",
    "side_by_side": "whole rows side by side, slower",
    "one_by_one": "every answer by itself, much slower",
}
#: Those there are for scoring and for decoding.
SCORING: tuple[Way, ...] = ("segments", "cache", "side_by_side", "one_by_one")
DECODING: tuple[Way, ...] = ("segments", "cache", "one_by_one")
#: Largest difference of an answer's log-probability per token between a way and plain forward passes, in fp32.
TOLERANCE = 1e-3
#: In bf16 and fp16, once the two agree in fp32: this many times the difference of plain passes from fp32, or this much.
OWN_ROUNDING, SMALL_ROUNDING = 2, 0.02
#: At most, and in bf16 and fp16 where the weights cannot be had in fp32.
MIXED_TOLERANCE = 0.1
#: Prompts, answers of each, and tokens decoded behind each, on which ways are compared.
CHECKED_PROMPTS, CHECKED_ANSWERS, CHECKED_TOKENS = 3, 2, 8

Result = TypeVar("Result")


@contextlib.contextmanager
def predicting(model: PreTrainedModel, weights: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode, without compiled layers (each new shape would be compiled) and without the autocast that accelerate
    puts around a model in training: a run's own validation computes what `labeltune evaluate` will. All is put back.

    Args:
        weights: as of `Engine`.
    """
    was_training = model.training
    stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    mixed, unmixed = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    model.eval()
    try:
        if unmixed is not None:
            model.forward = unmixed
        eager = stance("force_eager") if stance else contextlib.nullcontext()
        loaded = weights_in(model, weights) if weights is not None else contextlib.nullcontext()
        with eager, changing_shapes(), loaded, fp32_logits(model):
            yield
    finally:
        if unmixed is not None:
            model.forward = mixed
        model.train(was_training)


class Engine:
    """Runs a model for prediction. Calls from several threads wait for each other.

    The first call compares the ways to do it with plain forward passes on some of its own prompts, the fastest first, and takes the
    first that agrees; where that is not the fastest (capped attention, state-space layers, a backend that drops its arguments) one
    warning says which it is.

    Attributes:
        weights: the number format that a checkpoint of this model will be loaded in, where training keeps all weights in a wider one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights: torch.dtype | None = None
        self._max_tokens: int | None = None
        self._segments, self._own = segment_prefix(), own_prefix()
        self._lock = threading.RLock()
        self._scoring: Way | None = None
        self._decoding: Way | None = None

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

    def decoded_rows(self, wanted: int | Literal["auto"]) -> int:
        """Rows to decode at once; fewer once the device has run out of memory, which their keys and values fill."""
        rows = DECODED_ROWS.get(self._device, 16) if wanted == "auto" else wanted
        return max(1, min(rows, rows * self.max_tokens // PASS_TOKENS.get(self._device, 1024)))

    @property
    def _device(self) -> str:
        return str(next(self.model.parameters()).device.type)

    def reset_cache(self) -> None:
        """Drop the keys and values of earlier prompts; needed when the model's weights have changed."""
        with self._lock:
            self._segments.clear()
            self._own.clear()

    def verify_scoring(self, questions: Sequence[Question]) -> None:
        """Choose how answers are scored by some of these questions, if no call has done so yet."""
        with self._lock, predicting(self.model, self.weights):
            self._within_memory(lambda: self._way_to_score(questions))

    def verify_decoding(self, prompts: Sequence[Sequence[int]]) -> None:
        """Choose how prompts are decoded by some of these, if no call has done so yet."""
        with self._lock, predicting(self.model, self.weights):
            self._within_memory(lambda: self._way_to_decode(prompts))

    def score(self, questions: Sequence[Question]) -> list[list[float]]:
        """Log-probability of every answer of every question."""
        if not questions:
            return []
        with self._lock, predicting(self.model, self.weights):
            return self._within_memory(lambda: self._scores(self._way_to_score(questions), questions))

    def decode(self, prompts: Sequence[Sequence[int]], run: Callable[[Runner], Result]) -> Result:
        """Run something that decodes step by step, by the fastest way that is exact for this model.

        Args:
            prompts: its prompts; the ways are compared on some of them.
            run: called with the runner; again after the device has run out of memory.
        """
        with self._lock, predicting(self.model, self.weights):
            return self._within_memory(lambda: run(self._runner(self._way_to_decode(prompts))))

    def _within_memory(self, run: Callable[[], Result]) -> Result:
        """Again with smaller passes when the device runs out of memory."""
        while True:
            # What the failed passes hold is freed when their exception is gone.
            with contextlib.suppress(torch.OutOfMemoryError):
                return run()
            self.reset_cache()
            torch.cuda.empty_cache()
            if self.max_tokens <= 256:
                raise ModelError("a document does not fit into the device's memory; lower prompt.max_length")
            self.max_tokens //= 2

    def _way_to_score(self, questions: Sequence[Question]) -> Way:
        if self._scoring is None:
            asked = questions_to_check(questions)

            def measure(way: Way) -> list[float]:
                self.reset_cache()
                scores = self._scores(way, asked)
                paths = [path for question in asked for path in question.trie.paths]
                return [x / len(path) for x, path in zip(itertools.chain(*scores), paths, strict=True)]

            self._scoring = self._choose(SCORING, measure, asked)
        return self._scoring

    def _way_to_decode(self, prompts: Sequence[Sequence[int]]) -> Way:
        if self._decoding is None:
            asked = questions_to_check([Question(prompt, PLACEHOLDER_ANSWERS) for prompt in prompts])
            rows = [(question.prompt, question.prompt[:CHECKED_TOKENS]) for question in asked]

            def measure(way: Way) -> list[float]:
                self.reset_cache()
                return list(itertools.chain(*decoded_scores(self._runner(way), rows)))

            self._decoding = self._choose(DECODING, measure, asked)
        return self._decoding

    def _scores(self, way: Way, questions: Sequence[Question]) -> list[list[float]]:
        if way == "segments":
            return score_answers(self.model, questions, self.max_tokens, self._segments)
        if way == "cache":
            return score_by_cache(self.model, questions, self.max_tokens, self._own)
        if way == "side_by_side":
            return score_side_by_side(self.model, questions, self.max_tokens)
        return [score_one_by_one(self.model, question) for question in questions]

    def _runner(self, way: Way) -> Runner:
        if way == "segments":
            return SegmentRunner(self.model, self._segments, self.max_tokens)
        return (
            CacheRunner(self.model, self._own, self.max_tokens) if way == "cache" else PlainRunner(self.model)
        )

    def _choose(
        self, ways: Sequence[Way], measure: Callable[[Way], list[float]], questions: Sequence[Question]
    ) -> Way:
        """The first way that computes what the last one does.

        Args:
            measure: what is compared, a token.
        """
        reasons = []
        known: dict[str, list[float]] = {}
        for way in ways:
            reason = None if way == ways[-1] else self._disagreement(way, ways[-1], measure, questions, known)
            if reason is None:
                break
            reasons.append(f"{IN_WORDS[way].partition(',')[0]}: {reason}")
        self.reset_cache()
        if reasons:
            warnings.warn(
                f"prediction uses {IN_WORDS[way]}; what is faster is not exact for this model ({'; '.join(reasons)})",
                stacklevel=5,
            )
        return way

    def _disagreement(
        self,
        way: Way,
        plain: Way,
        measure: Callable[[Way], list[float]],
        questions: Sequence[Question],
        known: dict[str, list[float]],
    ) -> str | None:
        """Why a way cannot be used, or None.

        Rounding must not hide a wrong result, nor a small effect that it has on these prompts: no segment may be changed by the
        tokens of another one, and weights in bf16 or fp16 are compared in fp32 first, where that is possible.

        Args:
            known: what plain passes gave, in fp32 and in the model's own format; filled here.
        """
        rounded = next(self.model.parameters()).dtype != torch.float32
        context = weights_in(self.model, torch.float32) if rounded else contextlib.nullcontext(True)
        try:
            with context as in_fp32:
                if way == "segments":
                    slack = FELT if in_fp32 and has_experts(self.model) else 0.0
                    leak = leak_between_rows(self.model, questions, slack)
                    if leak is not None:
                        return leak
                if in_fp32:
                    if "exact" not in known:
                        known["exact"] = measure(plain)
                    reason = _too_far(measure(way), known["exact"], TOLERANCE)
                    if reason is not None or not rounded:
                        return reason and f"{reason} in fp32"
            if "plain" not in known:
                known["plain"] = measure(plain)
            if "exact" not in known:
                return _too_far(measure(way), known["plain"], MIXED_TOLERANCE)
            own = OWN_ROUNDING * _difference(known["plain"], known["exact"])
            allowed = min(max(own, SMALL_ROUNDING), MIXED_TOLERANCE)
            return _too_far(measure(way), known["exact"], allowed)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign model does with what it does not know
            return first_line(error)


#: Answers for prompts that come without any.
PLACEHOLDER_ANSWERS = LabelTrie.of([(0, 1, 2), (0, 2, 1), (1, 0, 2)])


def questions_to_check(questions: Sequence[Question]) -> list[Question]:
    """Different prompts, the shortest, the longest and one between, each with its longest and its shortest answer; a prompt that
    is alone gets itself, the second half backwards, for company."""
    prompts = {tuple(question.prompt): question.trie for question in questions}
    ordered = sorted(prompts, key=lambda prompt: (len(prompt), prompt))
    asked = [(prompt, prompts[prompt]) for prompt in spread(ordered, CHECKED_PROMPTS)]
    if len(asked) == 1:
        prompt, trie = asked[0]
        half = len(prompt) // 2
        asked.append(((*prompt[:half], *reversed(prompt[half:])), trie))
    return [Question(prompt, _few_answers(trie)) for prompt, trie in asked]


def _few_answers(trie: LabelTrie) -> LabelTrie:
    """The trie of its longest and shortest answers only."""
    answers = sorted(([token for _, token in path] for path in trie.paths), key=len, reverse=True)
    return LabelTrie.of([*answers[: CHECKED_ANSWERS - 1], *answers[1:][-1:]])


def _difference(found: Sequence[float], right: Sequence[float]) -> float:
    """The largest; NaN where there is one."""
    differences = [abs(x - y) for x, y in zip(found, right, strict=True)]
    return max(differences) if all(d == d for d in differences) else math.nan


def _too_far(found: Sequence[float], right: Sequence[float], allowed: float) -> str | None:
    difference = _difference(found, right)
    # NaN compares as a disagreement.
    return None if difference <= allowed else f"log-probabilities differ by {difference:.1e} a token"
