"""`labeltune serve`."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from labeltune.errors import ConfigError, MissingExtraError
from labeltune.io.outputs import is_hub_name
from labeltune.io.progress import no_long_silence
from labeltune.io.run_folder import find_checkpoint
from labeltune.messages import localize
from labeltune.serve.settings import Settings, read_api_key

#: What the extra `serve` installs.
SERVE_MODULES = ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client")

_count = partial(typer.Option, min=1)


def serve(
    *,
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    name: Annotated[
        str | None, typer.Option(help="What clients call this run; its folder's name when missing.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="One more run on the same base model (may be repeated).", metavar="NAME=RUN"),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key; LABELTUNE_API_KEY when missing.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name in the Host header that a server on localhost without a key answers to (may be repeated)."
        ),
    ] = None,
    max_wait_ms: Annotated[
        float, typer.Option(help="Milliseconds the first text of a batch waits for others.", min=0)
    ] = Settings.max_wait_ms,
    batch_rows: Annotated[int, _count(help="Texts of one batch.")] = Settings.batch_rows,
    batch_tokens: Annotated[int, _count(help="Tokens of one batch, about.")] = Settings.batch_tokens,
    queue_rows: Annotated[int, _count(help="Texts that may wait; more get 429.")] = Settings.queue_rows,
    max_rows: Annotated[int, _count(help="Texts of one request; more get 413.")] = Settings.max_rows,
    max_chars: Annotated[int, _count(help="Characters of one text; more get 413.")] = Settings.max_chars,
    max_body_bytes: Annotated[
        int, _count(help="Bytes of a request; more get 413.")
    ] = Settings.max_body_bytes,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request is given up with 504.", min=0.001)
    ] = Settings.timeout,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Log the documents.")] = Settings.log_texts,
    label_studio: Annotated[
        bool,
        typer.Option(
            "--label-studio",
            help="Be an ML backend of Label Studio: predict for its projects, train on their annotations.",
        ),
    ] = False,
    playground: Annotated[bool, typer.Option(help="Serve the page at /.")] = Settings.playground,
    device: Annotated[str | None, typer.Option(help="cuda, cpu ...; the best there is when missing.")] = None,
) -> None:
    """Answer over HTTP, with a page at / and its API at /docs.

    /v1/classify, /v1/extract and /v1/chat/completions.

    SIGTERM and Ctrl-C finish what was accepted. Logs are JSON lines on standard error, the steps of the start plain ones on
    standard output.
    """
    started = time.monotonic()
    if not all(map(find_spec, (*SERVE_MODULES, "gradio") if playground else SERVE_MODULES)):
        raise MissingExtraError("labeltune serve", "serve")
    if not is_hub_name(run):
        find_checkpoint(run)  # a wrong name is told before anything is loaded
    from labeltune.serve.app import bind
    from labeltune.serve.app import serve as run_server
    from labeltune.serve.models import load_models, parse_adapter

    settings = Settings(
        max_wait_ms=max_wait_ms,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
        queue_rows=queue_rows,
        max_rows=max_rows,
        max_chars=max_chars,
        max_body_bytes=max_body_bytes,
        timeout=timeout,
        api_key=read_api_key(api_key_file),
        log_texts=log_texts,
        playground=playground,
        label_studio=label_studio,
        allow_hosts=tuple(name.lower() for name in allow_host or ()),
    )
    adapters = [parse_adapter(given) for given in adapter or []]
    if label_studio and adapters:
        raise ConfigError("--label-studio serves one run; leave out --adapter")

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it; the server goes on
            print(f"{time.monotonic() - started:5.1f} s  {localize(line)}", flush=True)

    with bind(host, port) as bound:
        with no_long_silence(say):
            models = load_models(run, name, adapters, device, say)
        run_server(models, settings, bound, say)
