"""Dispatch only: `labeltune --help` imports no torch."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from labeltune import __version__
from labeltune.commands import (
    board,
    compare,
    data,
    doctor,
    evaluate,
    export,
    init,
    keys,
    plan,
    predict,
    serve,
    sweep,
    train,
)
from labeltune.commands.habits import check_options
from labeltune.commands.streams import drop_output, prepare_streams
from labeltune.distributed import rank, world_size
from labeltune.errors import Interrupted, LabeltuneError, printable
from labeltune.messages import localize, spoken

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
app.command("keys")(keys.keys)
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
    return f" on rank {rank()}" if world_size() > 1 else ""


def _check_options(command: typer.Typer) -> None:
    """Answer other tools' options of the commands that take `key=value`."""
    given = sys.argv[1:]
    if not any(argument.startswith("--") for argument in given):
        return
    called = typer.main.get_command(command)
    if command is app:
        if not given or given[0] not in ("train", "plan", "sweep", "evaluate"):
            return
        called, given = called.commands[given[0]], given[1:]  # type: ignore[attr-defined]
    known = {"--help", *(option for parameter in called.params for option in parameter.opts)}
    check_options(given, known)


def run_app(command: typer.Typer, name: str | None = None) -> None:
    """Errors a user can repair become one message and an exit code, without a traceback."""
    try:
        _run_app(command, name)
    except BrokenPipeError:  # nobody reads any more: 128 + SIGPIPE, as a shell says it
        drop_output()
        sys.exit(141)


def _run_app(command: typer.Typer, name: str | None) -> None:
    try:
        prepare_streams()
        _check_options(command)
        try:
            with spoken("stderr"):
                command(prog_name=name)
        except SystemExit as stop:
            # typer makes exit code 1 of a broken pipe, which means something else here, and says nothing of Ctrl-C.
            cause = stop.__context__
            while cause is not None and not isinstance(cause, BrokenPipeError | KeyboardInterrupt):
                cause = cause.__context__
            if cause is not None:
                raise cause from None
            raise
        finally:
            sys.stdout.flush()
    except LabeltuneError as error:
        # Who pressed Ctrl-C knows that nothing went wrong.
        begins = "" if isinstance(error, Interrupted) else f"error{_on_rank()}: "
        print(printable(localize(f"{begins}{error}"), keep="\n"), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(localize("interrupted"), file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise
    except OSError as error:
        from labeltune.io.outputs import why_not_written

        closed = "it is not open for writing" if error.errno == errno.EBADF else None
        reason = why_not_written(error) or closed
        if reason is None:
            raise
        # Files have errors of their own, which name them.
        what = "a file" if error.filename else "the output"
        print(localize(f"error: {what} cannot be written: {reason}"), file=sys.stderr)
        drop_output()
        sys.exit(2)
