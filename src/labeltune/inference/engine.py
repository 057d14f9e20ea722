"""One model, asked exactly: scores of answers and decoding, by the fast way where it is right for this model."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from labeltune.errors import ModelError, first_line
from labeltune.inference.runner import PlainRunner, Runner, SegmentRunner
from labeltune.inference.scoring import PrefixCache, Question, score_answers, score_one_by_one
from labeltune.inference.trie import LabelTrie

#: Tokens of one pass that keep the device busy.
PASS_TOKENS = {"cuda": 16384, "mps": 4096, "cpu": 1024}
#: Largest difference of a log-probability between the fast way and the plain one, by number format of the weights.
TOLERANCE = {"torch.float32": 1e-3, "torch.float16": 0.1, "torch.bfloat16": 0.5}

Result = TypeVar("Result")


@contextlib.contextmanager
def predicting(model: Any) -> Iterator[None]:
    """Evaluation mode, without compiled layers (each new shape would be compiled); a model in training is put back."""
    import torch

    was_training = model.training
    stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    model.eval()
    try:
        with stance("force_eager") if stance else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)


class Engine:
    """Runs a model for prediction. Calls from several threads wait for each other.

    The first call compares the fast way with plain forward passes on its own first prompt; a model for which they disagree
    (capped attention, state-space layers, a backend that drops its arguments) is run the plain way, with one warning.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._max_tokens: int | None = None
        self._cache = PrefixCache()
        self._lock = threading.RLock()
        self._fast: bool | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of one pass; by the device that the model is on when it is first asked."""
        if self._max_tokens is None:
            self._max_tokens = PASS_TOKENS.get(next(self.model.parameters()).device.type, 1024)
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        """Other passes from now on."""
        self._max_tokens = value

    def forget(self) -> None:
        """Drop what was kept of earlier prompts; needed when the model's weights have changed."""
        with self._lock:
            self._cache.clear()

    def settle(self, prompt: Sequence[int]) -> None:
        """Compare the two ways on this prompt, if no call has done so yet."""
        with self._lock, predicting(self.model):
            self._is_fast(prompt)

    def score(
        self, questions: Sequence[Question], on_rows: Callable[[int], None] | None = None
    ) -> list[list[float]]:
        """Log-probability of every answer of every question."""
        if not questions:
            return []
        with self._lock, predicting(self.model):
            if self._is_fast(questions[0].prompt):
                return self._within_memory(
                    lambda: score_answers(self.model, questions, self.max_tokens, self._cache, on_rows)
                )
            found = []
            for question in questions:
                found.append(score_one_by_one(self.model, question))
                if on_rows is not None:
                    on_rows(1)
            return found

    def decode(self, prompt: Sequence[int], run: Callable[[Runner], Result]) -> Result:
        """Run something that decodes step by step, in the way that is right for this model.

        Args:
            prompt: one of the prompts, to find that out with.
            run: called with the runner; again after the device has run out of memory.
        """
        with self._lock, predicting(self.model):
            if not self._is_fast(prompt):
                return run(PlainRunner(self.model))
            return self._within_memory(lambda: run(SegmentRunner(self.model, self._cache, self.max_tokens)))

    def _within_memory(self, run: Callable[[], Result]) -> Result:
        """Again with smaller passes when the device runs out of memory."""
        import torch

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

    def _is_fast(self, prompt: Sequence[int]) -> bool:
        if self._fast is None:
            reason = self._disagreement(prompt)
            self._fast = reason is None
            if reason is not None:
                warnings.warn(
                    f"the fast way of predicting is not exact for this model ({reason}); it is run plainly, slower and exact",
                    stacklevel=4,
                )
        return self._fast

    def _disagreement(self, prompt: Sequence[int]) -> str | None:
        """Why the fast way cannot be used, or None: made-up answers to the prompt, and to it backwards, both ways."""
        import torch

        trie = LabelTrie.of([(0, 1, 2), (0, 2, 1), (1, 0, 2)])
        tokens = list(prompt[-64:])
        questions = [Question(tokens, trie), Question(tokens[::-1], trie)]
        try:
            found = score_answers(self.model, questions, self.max_tokens, PrefixCache())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign model does with segments it does not know
            return first_line(error)
        right = [score_one_by_one(self.model, question) for question in questions]
        pairs = [pair for row in zip(found, right, strict=True) for pair in zip(*row, strict=True)]
        difference = max(abs(x - y) / 3 for x, y in pairs)
        allowed = TOLERANCE.get(str(next(self.model.parameters()).dtype), 0.5)
        # NaN compares as a disagreement.
        return None if difference <= allowed else f"log-probabilities differ by {difference:.1e}"
