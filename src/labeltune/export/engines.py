"""The gate asks the target: an export is served by the engine that will serve it, and asked with the request that the export prints."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.errors import MissingExtraError, ModelError, ParityError, clipped, first_line
from labeltune.prompts.builder import PromptBuilder
from labeltune.types import Entity, Example, Prediction

if TYPE_CHECKING:
    from labeltune.client import LabelClient
    from labeltune.export.folder import Dtype

#: Engines that can be asked.
ENGINES = ("vllm", "llama.cpp", "ollama", "transformers")
#: What an export tells `labeltune.client`.
CLIENT_FILE = "client.json"
#: Seconds in which a server has to answer, and between two looks.
_START, _LOOK = 900.0, 1.0
#: Last lines of a server's output that are shown.
_SHOWN = 5


@dataclass(frozen=True)
class Served:
    """What is served, and how it is asked.

    Attributes:
        folder: the export.
        base: folder of the base model; None for a whole model.
        name: what requests call it.
        rank: largest rank of the adapter that the server has to take.
        max_tokens: of a prompt with its answer.
        max_new_tokens: of an answer with entities.
        text_only: the model reads images too, and was trained on texts.
    """

    folder: Path
    base: Path | None
    name: str
    dtype: Dtype
    rank: int
    max_tokens: int
    max_new_tokens: int
    builder: PromptBuilder
    trust_remote_code: bool = False
    text_only: bool = False


class Engine(ABC):
    """A program that serves an export.

    Attributes:
        name: what people call it.
        served: what it serves.
        health: where it answers when it is ready.
        tells: it says how probable tokens are, as `labeltune.client` asks it.
        holds: its answers can be held to the text they are about, as `labeltune.client` does.
    """

    name: str
    health: str
    tells = True
    holds = True

    def __init__(self, served: Served) -> None:
        self.served = served

    @abstractmethod
    def command(self, port: int) -> list[str]:
        """What starts it on this machine."""

    def environment(self, port: int) -> dict[str, str]:
        """What its process is told beside the environment of this one."""
        return {}

    def begin(self, port: int) -> None:  # noqa: B027
        """What is left to do when it answers."""

    @abstractmethod
    def prompt_told(self, url: str, prompt: list[int], adapter: bool) -> Any:
        """Something that says how probable tokens are, with the adapter or without."""

    @abstractmethod
    def written(self, url: str, row: Example) -> tuple[str, list[int] | int]:
        """What it writes about a row, and the tokens of the prompt that it reads, or their number, where it tells no more."""


def client_library() -> Any:
    """httpx.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise MissingExtraError("--engine", "client") from None
    return httpx


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[str]:
    """The server's address, without `/v1`; it is ended behind the block, with all its processes.

    Raises:
        ModelError: it cannot be started, ends before it is ready, or takes too long; the message has its last words.
    """
    httpx = client_library()
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                engine.command(port),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **engine.environment(port)},
            )
        except OSError as error:
            raise ModelError(f"{engine.name} cannot be started: {error}") from error

        def last_words() -> str:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            # The first error is the cause of the others.
            errors = [line for line in lines if re.search(r"\w(Error|Exception): |\berror: ", line)]
            return "\n".join([*errors[:1], *lines[-_SHOWN:]])

        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + _START
            while True:
                if process.poll() is not None:
                    raise ModelError(
                        f"{engine.name} does not start with this export (exit code {process.returncode}): {last_words()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}{engine.health}", timeout=5).is_success:
                        break
                if time.monotonic() > until:
                    raise ModelError(f"{engine.name} is not ready after {_START:.0f} s: {last_words()}")
                time.sleep(_LOOK)
            engine.begin(port)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def told(url: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
    """A server's answer to a request with a body, or without one; what is missing in it is an error of the server.

    Raises:
        ModelError: it refuses, or its answer cannot be read.
    """
    httpx = client_library()
    try:
        found = httpx.get(url, timeout=600) if body is None else httpx.post(url, json=body, timeout=600)
        found.raise_for_status()
        yield found.json()
    except httpx.HTTPStatusError as error:
        raise ModelError(f"the server refuses a request: {clipped(error.response.text, 500)}") from None
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"the server's answer cannot be read: {error}") from error


def check_address(url: str) -> None:
    """Whether a server answers there, before any work is done.

    Raises:
        ModelError: it does not.
    """
    httpx = client_library()
    try:
        httpx.get(url, timeout=10)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ModelError(
            f"--engine-url {url} does not answer ({first_line(error)}); write it as http://localhost:8000"
        ) from error


def check_heard(engine: Engine, url: str, prompt: list[int]) -> None:
    """Whether a server's adapter changes anything: what it says of a prompt is not what the base says.

    Raises:
        ParityError: it is.
    """
    if engine.prompt_told(url, prompt, False) == engine.prompt_told(url, prompt, True):
        raise ParityError(
            "the server ignores the adapter: a prompt is exactly as probable with it as with the base alone. Nothing was exported; "
            "export the whole model with --merged"
        )


def answers(
    engine: Engine, url: str, rows: Sequence[Example], advance: Callable[[int], None] = lambda _: None
) -> list[Prediction]:
    """What a server says of rows: the label that it writes, and probabilities and entities by `labeltune.client` where that is possible.

    Args:
        rows: they fit without being shortened.

    Raises:
        ModelError: it refuses, or its answers cannot be read.
        ParityError: it reads another prompt than the run.
    """
    from labeltune.client import LabelClient, ServerError

    file = engine.served.folder / CLIENT_FILE
    found = []
    with contextlib.ExitStack() as stack:
        ner = engine.served.builder.task.name == "ner"
        asked = (engine.holds if ner else engine.tells) and file.is_file()
        client = stack.enter_context(LabelClient(f"{url}/v1", file, timeout=600)) if asked else None
        for row in rows:
            try:
                found.append(_answer(engine, url, row, client))
            except (ServerError, ValueError) as error:
                raise ModelError(f"{row.where}: {error}") from error
            advance(1)
    return found


def _answer(engine: Engine, url: str, row: Example, client: LabelClient | None) -> Prediction:
    builder = engine.served.builder
    task = builder.task
    ranking: tuple[tuple[str, float], ...] = ()
    given = {} if client is None else client.predict(row.text, row.candidates or None)
    if "ranking" in given:
        ranking = tuple((each["label"], each["probability"]) for each in given["ranking"])
    text, read = engine.written(url, row)
    _check_prompt(builder, row, read)
    if client is not None and task.name == "multilabel":  # what is written is about one label
        return Prediction(row.id, "", labels=tuple(given["labels"]), ranking=ranking)
    found = replace(task.parse(row, text.removeprefix(builder.template.answer_lead)), ranking=ranking)
    if "entities" in given:  # what is written may not be in the text
        entities = tuple(Entity(**each) for each in given["entities"])
        return replace(found, entities=entities, truncated="truncated" in given)
    return found


def _check_prompt(builder: PromptBuilder, row: Example, read: list[int] | int) -> None:
    """Whether the server reads the prompt that the run was trained on, to the token.

    Raises:
        ParityError: it does not: another template, none of the words that an answer follows, or a token too many at the beginning.
    """
    wanted = builder.prompt(row).ids
    if isinstance(read, int):
        if read != len(wanted):
            raise ParityError(
                f"{row.where}: the server reads another prompt than the run was trained on: {read} tokens instead of {len(wanted)}. "
                "Nothing was exported"
            )
        return
    if read == wanted:
        return
    at = next((n for n, pair in enumerate(zip(wanted, read, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(wanted), len(read)) if at is None else at
    own, other = (builder.template.tokenizer.decode(ids[at : at + 8]) for ids in (wanted, read))
    raise ParityError(
        f"{row.where}: the server reads another prompt than the run was trained on: from token {at + 1} on {other!r} where {own!r} should "
        "stand. Nothing was exported"
    )


def rows_that_fit(builder: PromptBuilder, rows: Sequence[Example]) -> list[int]:
    """Numbers of the rows whose text is read whole, so that a server reads what the run reads."""
    return [n for n, row in enumerate(rows) if builder.prompt(row).text.strip() == row.text.strip()]
