"""The entry point: finds the verb that is called, and turns errors into one message and an exit code.

A verb's page is imported when it is called, so that `labeltune --help` loads none of them.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from labeltune import __version__
from labeltune.commands.options import Command
from labeltune.distributed import rank, world_size
from labeltune.errors import ConfigError, DataError, Interrupted, LabeltuneError, OutputError, printable
from labeltune.io.processes import ended_like_ctrl_c
from labeltune.messages import localize, spoken
from labeltune.other_names import our_name

#: Of each verb: the module of this package, the function (or group of commands) in it, and the first line of its help.
VERBS = {
    "init": ("init", "init", "Write a config and sample rows, to train and to test on."),
    "doctor": ("doctor", "doctor", "Say what this machine has and what each lack means."),
    "data": ("data", "app", "Check, convert and download data."),
    "keys": ("init", "keys", "List the config keys: key, default, meaning."),
    "plan": ("train", "plan_command", "Say what training will cost: tokens, memory, hours."),
    "train": ("train", "train_command", "Fine-tune a model; checkpoints go to the config's output_dir."),
    "sweep": ("sweep", "sweep", "Try values of config keys and compare the runs."),
    "evaluate": ("evaluate", "evaluate_command", "Measure a run on labelled rows."),
    "compare": ("compare", "compare_command", "Compare two models on the same rows."),
    "export": ("export", "export_command", "Write a run as others load it, and check its answers."),
    "predict": ("predict", "predict_command", "Answer texts or the rows of a file: one JSON line a row."),
    "next": ("next", "next_command", "Choose the rows whose labels are worth most."),
    "serve": ("serve", "serve", "Answer over HTTP, with a page at / and its API at /docs."),
    "board": ("board", "board", "Open the local SwanLab dashboard on a folder of runs."),
}
#: Verbs that take `key=value`.
WITH_KEYS = ("train", "plan", "sweep", "evaluate")


class _Verb(TyperCommand):
    """Stands for a verb in the list of commands until it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which is imported now."""
        return load_verb(str(self.name)).make_context(info_name, args, parent, **extra)


def load_verb(verb: str) -> Any:
    """The command of a verb, with its options."""
    module, name, _ = VERBS[verb]
    found = getattr(importlib.import_module(f"labeltune.commands.{module}"), name)
    return typer.main.get_command(found if isinstance(found, typer.Typer) else single(found, verb))


def single(command: Callable[..., None], name: str | None = None) -> typer.Typer:
    """An application of one command."""
    found = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    found.command(name, cls=Command)(command)
    return found


app = typer.Typer(
    name="labeltune",
    help="Fine-tune Qwen into a text classifier or an entity extractor, and watch it in SwanLab.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verb, (_, _, _described) in VERBS.items():
    app.command(_verb, cls=_Verb, help=_described)(lambda: None)


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
    if command is not app:
        called = typer.main.get_command(command)
    elif given[0] in WITH_KEYS:
        called, given = load_verb(given[0]), given[1:]
    else:
        return
    check_options(given, {"--help", *(option for parameter in called.params for option in parameter.opts)})


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
        quiet_libraries()
        _check_options(command)
        try:
            # Without a word behind it, typer prints its help, which is English.
            with ended_like_ctrl_c(), spoken("stderr") if sys.argv[1:] else contextlib.nullcontext():
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


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal; call before transformers or datasets is imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "40")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def check_options(arguments: Sequence[str], known: Iterable[str]) -> None:
    """Answer other tools' options with what they are here, before typer says that there is no such option.

    Args:
        known: the command's own options.

    Raises:
        ConfigError: some are another tool's options, or config keys with dashes in front.
    """
    known, answers = set(known), []
    for at, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if argument == "--":
            break
        if not name.startswith("--") or name in known:
            continue
        if not separator:
            following = arguments[at + 1] if at + 1 < len(arguments) else "--"
            value = "" if following.startswith("--") else following
        answer = our_name(name, value or None) or _own_key(name, value)
        if answer is not None:
            answers.append(answer)
    if answers:
        raise ConfigError(
            f"{'; '.join(answers)}. Settings are written key=value, without dashes; `labeltune keys` lists them"
        )


def _own_key(option: str, value: str) -> str | None:
    from labeltune.config import config_keys

    wanted = option.lstrip("-").replace("-", "_")
    keys = [key for key, *_ in config_keys()]
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    # As `--epoch`: one letter away from a key, and no option of the command.
    near = difflib.get_close_matches(wanted, last, 1, 0.85)
    found = wanted if wanted in keys else last.get(wanted) or (last[near[0]] if near else None)
    return f"{option} is written {found}={value or '...'} here" if found else None


class Closed(io.TextIOBase):
    """Stands for a stream that was closed before the program began: whoever uses it gets the error."""

    def __init__(self, error: LabeltuneError) -> None:
        self._error = error

    def _refuse(self, *_: Any) -> NoReturn:
        raise self._error

    write = read = readline = __next__ = _refuse

    @property
    def buffer(self) -> NoReturn:
        """The bytes below; not there either."""
        raise self._error

    def isatty(self) -> bool:
        """No terminal."""
        return False


def prepare_streams() -> None:
    """Call before anything is opened or printed.

    A closed descriptor is given to the null device, so that no file that is opened later takes its number and what a library
    prints. Names of files that are not UTF-8 are printed with escapes.
    """
    try:
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    except OSError as error:  # no null device here
        raise OutputError(f"{os.devnull} cannot be opened: {error.strerror}") from None
    if sys.stdin is None:
        sys.stdin = Closed(DataError("standard input is closed; name a file, or give --text"))  # type: ignore[assignment]
    if sys.stdout is None:
        sys.stdout = Closed(  # type: ignore[assignment]
            OutputError("standard output is closed; send it to a file, or to /dev/null to drop it")
        )
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def drop_output() -> None:
    """What is left in the buffers goes nowhere, without a second error at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
