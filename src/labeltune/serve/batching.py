"""Requests -> batches: rows wait in one bounded queue, and one thread runs the model on as many as fit together."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from labeltune.serve.schemas import ApiError
from labeltune.serve.settings import Settings
from labeltune.types import Example, Prediction


@dataclass(frozen=True)
class Answer:
    """A prediction, with the tokens of prompt and answer where they were asked for."""

    prediction: Prediction
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Row:
    """One text to be answered.

    Attributes:
        model: the name of the run that answers.
        cost: tokens, estimated from above.
        count_tokens: the answer says how many tokens it took, and is cut as `stop` and `max_tokens` say.
    """

    model: str
    example: Example
    cost: int
    count_tokens: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class _Waiting:
    row: Row
    future: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


#: Answers rows of one model, in order; what could not be answered is an exception in its place.
Run = Callable[[Sequence[Row]], list[Answer | Exception]]


class Batcher:
    """The queue and its worker.

    A batch holds rows of one model: those of the row that has waited longest, in the order of arrival, until `batch_rows` or
    `batch_tokens` is reached. It starts when it is full, or when its first row has waited for `max_wait_ms`.
    """

    def __init__(
        self, run: Run, settings: Settings, on_batch: Callable[[str, int, float], None] | None = None
    ) -> None:
        self._run, self._settings, self._on_batch = run, settings, on_batch
        self._queue: dict[int, _Waiting] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._worker = threading.Thread(target=self._work, name="labeltune-serve", daemon=True)
        self._worker.start()

    def submit(self, rows: Sequence[Row]) -> list[Future[Answer]]:
        """Put all rows of a request in the queue, or none.

        Raises:
            ApiError: the queue is full (429), or the server is being stopped (503).
        """
        with self._changed:
            if self._closing:
                raise ApiError(503, "the server is being stopped", retry_after=5)
            if self._queue and len(self._queue) + len(rows) > self._settings.queue_rows:
                raise ApiError(
                    429, f"{len(self._queue)} texts are waiting; try again later", retry_after=self._seconds()
                )
            found = []
            for row in rows:
                waiting = _Waiting(row)
                self._queue[next(self._numbers)] = waiting
                found.append(waiting.future)
            self._changed.notify()
            return found

    def withdraw(self, futures: Sequence[Future[Answer]]) -> None:
        """Give back the places of rows that nobody waits for any more; those in progress are finished and dropped."""
        gone = {id(future) for future in futures if future.cancel()}
        if gone:
            with self._changed:
                for number in [n for n, waiting in self._queue.items() if id(waiting.future) in gone]:
                    del self._queue[number]
                self._changed.notify()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Rows are still taken."""
        return self._worker.is_alive() and not self._closing

    def close(self) -> None:
        """Answer what is in the queue, then stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._worker.join()

    def _seconds(self) -> int:
        """How long the queue will take, by the speed of the last batches."""
        rows, seconds = (
            (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0, 0.0)
        )
        return min(60, max(1, math.ceil(len(self._queue) * seconds / rows))) if rows else 1

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.monotonic()
            running = [waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()]
            if not running:
                continue
            try:
                found = self._run([waiting.row for waiting in running])
            except Exception as error:  # the worker outlives whatever a batch does to it
                found = [error] * len(running)
            seconds = time.monotonic() - started
            self._recent.append((len(running), seconds))
            if self._on_batch is not None:
                self._on_batch(running[0].row.model, len(running), seconds)
            for waiting, answer in zip(running, found, strict=True):
                if isinstance(answer, Answer):
                    waiting.future.set_result(answer)
                else:
                    waiting.future.set_exception(answer)

    def _next_batch(self) -> list[_Waiting]:
        """Blocks until a batch is due; empty when the server stops and nothing is left."""
        with self._changed:
            while True:
                if self._queue:
                    numbers, full = self._fitting()
                    first = self._queue[numbers[0]]
                    left = first.since + self._settings.max_wait_ms / 1000 - time.monotonic()
                    if full or left <= 0 or self._closing:
                        return [self._queue.pop(number) for number in numbers]
                    self._changed.wait(left)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()

    def _fitting(self) -> tuple[list[int], bool]:
        """The rows that would go together now, and whether no more would fit."""
        numbers: list[int] = []
        cost, model = 0, next(iter(self._queue.values())).row.model
        for number, waiting in self._queue.items():
            if waiting.row.model != model:
                continue
            cost += waiting.row.cost
            if numbers and cost > self._settings.batch_tokens:
                return numbers, True
            numbers.append(number)
            if len(numbers) == self._settings.batch_rows:
                return numbers, True
        return numbers, False
