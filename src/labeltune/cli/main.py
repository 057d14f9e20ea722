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
from labeltune.errors import LabeltuneError

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
        command(prog_name=name)
    except LabeltuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
