"""From a checked request to its answers: limits, the queue, time-outs, clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from labeltune.config import TaskName
from labeltune.errors import DataError, LabeltuneError, PromptError
from labeltune.prompts.labels import label_fault
from labeltune.serve.batching import Answer, Batcher, Row
from labeltune.serve.guard import ClientGone, Metrics, Receive, note
from labeltune.serve.models import Models, Served
from labeltune.serve.schemas import ApiError
from labeltune.serve.settings import Settings
from labeltune.types import Example


class Service:
    """What the routes and the playground ask."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self.models, self.settings, self.metrics = models, settings, metrics
        self.batcher = Batcher(models.answer, settings, metrics.on_batch)
        metrics.watch_queue(lambda: self.batcher.waiting)

    def named(self, name: str) -> Served:
        """The run of this name.

        Raises:
            ApiError: there is none (404).
        """
        if name not in self.models.served:
            known = ", ".join(self.models.served)
            raise ApiError(404, f"there is no such model here; this server has {known}", "model")
        return self.models.served[name]

    def pick(self, name: str | None, *tasks: TaskName) -> Served:
        """The run that answers, for one of these tasks (any when none is given); where there is only one, it answers to any name, as clients come with other models' names.

        Raises:
            ApiError: there is no run of this name (404), or none for this task (422).
        """
        if name is None:
            found = self.models.first(*tasks) if tasks else next(iter(self.models.served.values()))
            if found is None:
                raise ApiError(422, f"no model of this server does {' or '.join(tasks)}", "model")
            return found
        served = next(iter(self.models.served.values())) if len(self.models.served) == 1 else self.named(name)
        if tasks and served.task not in tasks:
            raise ApiError(422, f"model {served.name} does {served.task}, not {' or '.join(tasks)}", "model")
        return served

    async def ask(
        self,
        served: Served,
        texts: Sequence[str],
        labels: Sequence[str] = (),
        *,
        field: str = "text",
        count_tokens: bool = False,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
        receive: Receive | None = None,
    ) -> list[Answer]:
        """Answers to texts, in order.

        Args:
            labels: candidates; the run's own when empty.
            field: name of the texts in the request, for messages.
            stop: an answer is cut before the first of these; only with `count_tokens`.
            max_tokens: a longer answer is cut; only with `count_tokens`.
            receive: the request's channel, which tells when the client goes away.

        Raises:
            ApiError: a limit is passed (413), a text or label cannot be used (422), the queue is full (429), or it took too
                long (504).
            ClientGone: nobody waits for the answers any more.
        """
        self._check(texts, labels, field, served)
        note(
            model=served.name, rows=len(texts), **({"texts": list(texts)} if self.settings.log_texts else {})
        )
        examples = [
            Example(str(number), text, tuple(labels), source=name)
            for number, (name, text) in enumerate(zip(_names(field, texts), texts, strict=True))
        ]
        futures = self.batcher.submit(
            [
                Row(served.name, e, self.models.cost(served, e), count_tokens, tuple(stop), max_tokens)
                for e in examples
            ]
        )
        answers = asyncio.gather(*map(asyncio.wrap_future, futures))
        answers.add_done_callback(_look_at)
        gone = asyncio.ensure_future(_until_gone(receive)) if receive is not None else None
        waited: set[Any] = {answers, gone} - {None}
        try:
            await asyncio.wait(waited, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answers.done():
                return answers.result()
            if gone is not None and gone.done():
                raise ClientGone
            raise ApiError(504, f"no answer within {self.settings.timeout:g} seconds", retry_after=5)
        except (DataError, PromptError) as error:
            raise ApiError(422, str(error), str(error).partition(":")[0]) from None
        except LabeltuneError as error:
            raise ApiError(503, str(error)) from error
        finally:
            if gone is not None:
                gone.cancel()
            answers.cancel()
            self.batcher.withdraw(futures)

    def _check(self, texts: Sequence[str], labels: Sequence[str], field: str, served: Served) -> None:
        if served.task == "ner" and labels:
            raise ValueError("entity types are a run's own")
        limits = self.settings
        if len(texts) > limits.max_rows:
            raise ApiError(
                413, f"{field} holds {len(texts)} texts; at most {limits.max_rows} are accepted", field
            )
        for name, text in zip(_names(field, texts), texts, strict=True):
            if not text.strip():
                raise ApiError(422, f"{name} is empty", name)
            if len(text) > limits.max_chars:
                raise ApiError(
                    413, f"{name} has {len(text)} characters; at most {limits.max_chars} are accepted", name
                )
        if len(labels) > limits.max_labels:
            raise ApiError(
                413, f"labels holds {len(labels)}; at most {limits.max_labels} are accepted", "labels"
            )
        if sum(map(len, labels)) > limits.max_chars:
            raise ApiError(413, f"labels have more than {limits.max_chars} characters", "labels")
        if served.task != "ner":
            if not labels and not served.labels:
                raise ApiError(422, "this run has no label set of its own; send labels", "labels")
            fault = label_fault(tuple(labels)) if labels else None
            if fault:
                raise ApiError(422, f"labels: {fault}", "labels")

    def close(self) -> None:
        """Answer what is in the queue, then stop."""
        self.batcher.close()


def _names(field: str, texts: Sequence[str]) -> list[str]:
    """What messages call the texts of a request."""
    return [f"{field}[{number}]" for number in range(len(texts))] if len(texts) > 1 else [field] * len(texts)


def _look_at(answers: asyncio.Future[Any]) -> None:
    """What nobody waits for any more has been seen; asyncio would complain of it otherwise."""
    if not answers.cancelled():
        answers.exception()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
