"""The gate asks the target: an export is served by the engine that will serve it, and asked with the request that the export prints."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.errors import MissingExtraError, ModelError, ParityError, clipped
from labeltune.export.vllm import CLIENT_FILE, request
from labeltune.prompts.builder import PromptBuilder
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.client import LabelClient
    from labeltune.export.folder import Dtype

#: Engines that can be asked.
ENGINES = ("vllm",)
#: Seconds in which a server has to answer, and between two looks.
_START, _LOOK = 900.0, 1.0
#: What vLLM calls number formats.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: How a server calls the base that an adapter belongs to.
_BASE = "labeltune-base"
#: Last lines of a server's output that are shown.
_SHOWN = 5


@dataclass(frozen=True)
class Served:
    """What is served, and where.

    Attributes:
        python: of the environment that has the engine.
        folder: the export.
        base: folder of the base model; None for a whole model.
        name: what requests call it.
        rank: largest rank of the adapter that the server has to take.
        max_tokens: of a prompt with its answer.
    """

    python: str
    folder: Path
    base: Path | None
    name: str
    dtype: Dtype
    rank: int
    max_tokens: int
    trust_remote_code: bool = False

    def command(self, port: int) -> list[str]:
        """What starts vLLM's server on this machine."""
        found = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        found += [
            "--port",
            str(port),
            "--dtype",
            _DTYPES[self.dtype],
            "--max-model-len",
            str(self.max_tokens),
        ]
        if self.base is None:
            found += ["--model", str(self.folder), "--served-model-name", self.name]
        else:
            found += ["--model", str(self.base), "--served-model-name", _BASE, "--enable-lora"]
            found += ["--lora-modules", f"{self.name}={self.folder}", "--max-lora-rank", str(self.rank)]
            found += ["--chat-template", str(self.folder / "chat_template.jinja")]
        return [*found, "--trust-remote-code"] if self.trust_remote_code else found


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
def running(served: Served) -> Iterator[str]:
    """The server's address; it is ended behind the block, with all its processes.

    Raises:
        ModelError: it cannot be started, ends before it is ready, or takes too long; the message has its last words.
    """
    httpx = client_library()
    if shutil.which(served.python) is None:
        raise ModelError(f"--engine-python {served.python} is no program; name the python that has vLLM")
    port = _free_port()
    with tempfile.TemporaryFile() as log:
        # On a CPU vLLM would take half of the memory for its cache.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        process = subprocess.Popen(
            served.command(port),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )

        def last_words() -> str:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            # The first error is the cause of the others.
            errors = [line for line in lines if re.search(r"\w(Error|Exception): ", line)]
            return "\n".join([*errors[:1], *lines[-_SHOWN:]])

        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + _START
            while True:
                if process.poll() is not None:
                    raise ModelError(
                        f"vLLM does not start with this export (exit code {process.returncode}): {last_words()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/v1/models", timeout=5).is_success:
                        break
                if time.monotonic() > until:
                    raise ModelError(f"vLLM is not ready after {_START:.0f} s: {last_words()}")
                time.sleep(_LOOK)
            yield f"{url}/v1"
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


def check_heard(url: str, name: str, prompt: str) -> None:
    """Whether a server's adapter changes anything: the probability of a prompt's tokens is another one than the base's.

    Raises:
        ParityError: it is not.
    """

    def told(model: str) -> Any:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        with _answers(f"{url}/completions", body) as answer:
            places = answer["choices"][0]["prompt_logprobs"]
        return [each["logprob"] for place in places if place for each in place.values()]

    if told(name) == told(_BASE):
        raise ParityError(
            "the server ignores the adapter: a prompt is exactly as probable with it as with the base alone. Nothing was exported; "
            "export the whole model with --merged"
        )


@contextlib.contextmanager
def _answers(url: str, body: dict[str, Any]) -> Iterator[Any]:
    httpx = client_library()
    try:
        found = httpx.post(url, json=body, timeout=600)
        found.raise_for_status()
        yield found.json()
    except httpx.HTTPStatusError as error:
        raise ModelError(f"the server refuses a request: {clipped(error.response.text, 500)}") from None
    except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"the server's answer cannot be read: {error}") from error


def answers(
    url: str,
    served: Served,
    builder: PromptBuilder,
    rows: Sequence[Example],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Prediction]:
    """What the server says of rows: the label or the entities that it writes, and probabilities of labels by `labeltune.client`.

    Args:
        rows: they fit without being shortened.
        max_new_tokens: of an answer with entities.

    Raises:
        ModelError: it refuses, or its answers cannot be read.
        ParityError: it reads another prompt than the run.
    """
    from labeltune.client import LabelClient, ServerError

    file = served.folder / CLIENT_FILE
    found = []
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(LabelClient(url, file, timeout=600)) if file.is_file() else None
        for row in rows:
            try:
                found.append(_answer(url, served, builder, row, max_new_tokens, client))
            except (ServerError, ValueError) as error:
                raise ModelError(f"{row.where}: {error}") from error
            advance(1)
    return found


def _answer(
    url: str,
    served: Served,
    builder: PromptBuilder,
    row: Example,
    max_new_tokens: int,
    client: LabelClient | None,
) -> Prediction:
    task = builder.task
    ranking: tuple[tuple[str, float], ...] = ()
    if client is not None:
        told = client.predict(row.text, row.candidates or None)
        ranking = tuple((each["label"], each["probability"]) for each in told["ranking"])
        if task.name == "multilabel":
            return Prediction(row.id, "", labels=tuple(told["labels"]), ranking=ranking)
    body = {**request(task, builder.template, served.name, max_new_tokens, row), "return_token_ids": True}
    with _answers(f"{url}/chat/completions", body) as answer:
        text = str(answer["choices"][0]["message"]["content"])
        _check_prompt(builder, row, answer["prompt_token_ids"])
    return replace(task.parse(row, text.removeprefix(builder.template.answer_lead)), ranking=ranking)


def _check_prompt(builder: PromptBuilder, row: Example, read: Sequence[int]) -> None:
    """Whether the server reads the prompt that the run was trained on, to the token.

    Raises:
        ParityError: it does not: another template, none of the words that an answer follows, or a token too many at the beginning.
    """
    wanted = builder.prompt(row).ids
    if list(read) == wanted:
        return
    at = next((n for n, pair in enumerate(zip(wanted, read, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(wanted), len(read)) if at is None else at
    own, other = (builder.template.tokenizer.decode(ids[at : at + 8]) for ids in (wanted, list(read)))
    raise ParityError(
        f"{row.where}: the server reads another prompt than the run was trained on: from token {at + 1} on {other!r} where {own!r} should "
        "stand. Nothing was exported"
    )


def rows_that_fit(builder: PromptBuilder, rows: Sequence[Example]) -> list[int]:
    """Numbers of the rows whose text is read whole, so that a server reads what the run reads."""
    return [n for n, row in enumerate(rows) if builder.prompt(row).text.strip() == row.text.strip()]
