"""Dispatch only: `labeltune --help` imports no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from labeltune import __version__
from labeltune.cli import (
    board,
    compare,
    data,
    doctor,
    evaluate,
    export,
    init,
    plan,
    predict,
    serve,
    sweep,
    train,
)
from labeltune.errors import LabeltuneError, printable
from labeltune.ranks import rank, world
from labeltune.run_folder import why_not_written

app = typer.Typer(
    name="labeltune",
    help="Fine-tune Qwen into a text classifier or an entity extractor, and watch it in SwanLab.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(shown: bool) -> None:
    if shown:
        print(f"labeltune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("init")(init.init)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("sweep")(sweep.sweep)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("export")(export.export)
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)
app.command("board")(board.board)


def run() -> None:
    """Entry point of `labeltune`."""
    run_app(app, "labeltune")


def _on_rank() -> str:
    """Which process of a training job speaks, where there are several."""
    return f" on rank {rank()}" if world() > 1 else ""


def run_app(command: typer.Typer, name: str | None = None) -> None:
    """Errors a user can repair become one message and an exit code, without a traceback."""
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)
    try:
        try:
            command(prog_name=name)
        finally:
            sys.stdout.flush()
    except LabeltuneError as error:
        message = printable(str(error), keep="\n")
        print(f"error{_on_rank()}: {message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(141)
    except OSError as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        # Files have errors of their own, which name them.
        print(
            f"error: {'a file' if error.filename else 'the output'} cannot be written: {reason}",
            file=sys.stderr,
        )
        _close_stdout()
        sys.exit(2)


def _close_stdout() -> None:
    """What is left in the buffer goes nowhere, without a second error at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
