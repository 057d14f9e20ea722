"""Real `labeltune` commands in forked processes, and ways to kill them.

Importing torch, transformers and peft takes longer than training a two-layer model. So the part's process imports them once,
computes nothing itself, and forks; a child runs the command line's own `run()` in a session of its own and is killed like any process.
What kills from inside (at a file operation, in the middle of a file) is installed in the child: the product has no hooks for it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import labeltune
from labeltune.errors import MissingExtraError

#: Exit code of a command that raised something other than its own errors.
TRACEBACK = 70
#: A command that takes longer hangs.
HANGS = 300.0

#: It runs the command line; Ray and Gradio take long to import, and few commands need them.
_NOT_WARMED = {
    "labeltune.__main__",
    "labeltune.inference.ray",
    "labeltune.serve.playground",
    "labeltune.tracking.tensorboard",
    "labeltune.tracking.wandb",
}

#: File operations that Python reports to audit hooks.
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.truncate"}


@dataclass(frozen=True)
class Kill:
    """When a child dies.

    Attributes:
        kind: `time` (seconds after its start), `event` (before its n-th change under `watched`) or `torn` (when its n-th tensor
            file or part of an output is written as far as `share`).
        at: seconds, or a number from 1.
        share: how much of the file is written.
        watched: folder whose changes count.
    """

    kind: str
    at: float
    share: float = 0.5
    watched: Path | None = None


def warm() -> None:
    """Import what commands need, and compute nothing; call it before the first `start`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for module in pkgutil.walk_packages(labeltune.__path__, "labeltune."):
        if module.name in _NOT_WARMED:
            continue
        try:
            importlib.import_module(module.name)
        except (ModuleNotFoundError, MissingExtraError) as error:
            # An extra that is missing here is missing for its command too.
            if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("labeltune"):
                raise
    for name in (
        "peft",
        "datasets",
        "transformers",
        "swanlab",
        "pandas",
        "pyarrow.parquet",
        "sklearn.metrics",
    ):
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, Trainer  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401


def start(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    kill: Kill | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Fork a child that runs `labeltune ARGUMENTS` in `folder`; returns its process id.

    Args:
        log: what it prints is added there.
        before: called in the child first, to set limits or give up rights.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = TRACEBACK
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        if before is not None:
            before()
        if kill is not None:
            _arm(kill)
        code = _command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(arguments: Sequence[str]) -> int:
    from labeltune.commands import main

    sys.argv = ["labeltune", *arguments]
    try:
        main.run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def finish(child: int, after: float | None = None) -> int:
    """Wait for a child, or kill it `after` seconds; its exit code, -9 when it was killed."""
    begun = time.monotonic()
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - begun
        if (after is not None and elapsed >= after) or elapsed > HANGS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if after is None:
                raise TimeoutError(f"a command hung for {HANGS:.0f} s and was killed")
            return code
        time.sleep(0.002)


def run(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    kill: Kill | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """`start` and `finish`."""
    child = start(arguments, folder, log, kill, before)
    return finish(child, kill.at if kill is not None and kill.kind == "time" else None)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(kill: Kill) -> None:
    if kill.kind == "event":
        assert kill.watched is not None
        sys.addaudithook(_counter(str(kill.watched), int(kill.at), _die))
    elif kill.kind == "torn":
        _tear(int(kill.at), kill.share)


def count_changes(watched: Path, result: Path) -> Callable[[], None]:
    """A `before` that writes to `result` how many changes a command makes under `watched`: a byte each."""

    def begin() -> None:
        handle = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        sys.addaudithook(_counter(str(watched), None, lambda: os.write(handle, b".")))

    return begin


def _counter(
    watched: str, number: int | None, act: Callable[[], Any]
) -> Callable[[str, tuple[Any, ...]], None]:
    left = number

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, _, flags = values
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            inside = _absolute(path).startswith(watched)
        elif event in _CHANGES:
            # Inside shutil.rmtree names are relative to an open folder.
            inside = _absolute(values[0]).startswith(watched) or (
                event in ("os.remove", "os.rmdir") and values[1] != -1
            )
        else:
            return
        if not inside:
            return
        if left is None:
            act()
            return
        left -= 1
        if left == 0:
            act()

    return hook


def _absolute(path: Any) -> str:
    # Path.resolve would follow `best`, and open folders.
    return os.path.abspath(str(path))  # noqa: PTH100


def _tear(number: int, share: float) -> None:
    """Die when the n-th file of tensors, or piece of an unfinished output, has been written in part."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils
    from peft import peft_model

    left = number

    def torn(file: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.truncate(file, int(Path(file).stat().st_size * share))
            _die()

    save = torch.save

    def save_torn(value: Any, file: Any, *rest: Any, **named: Any) -> None:
        save(value, file, *rest, **named)
        torn(str(file))

    save_file = safetensors.torch.save_file

    def save_file_torn(tensors: Any, file: Any, *rest: Any, **named: Any) -> None:
        save_file(tensors, file, *rest, **named)
        torn(str(file))

    torch.save = save_torn  # type: ignore[assignment]
    for module in (safetensors.torch, peft_model, transformers.modeling_utils):
        for name in ("save_file", "safe_save_file"):
            if hasattr(module, name):
                setattr(module, name, save_file_torn)

    open_path = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        nonlocal left
        file = open_path(self, mode, *rest, **named)
        return _TornFile(file, torn_write) if mode == "ab" else file

    def torn_write(file: Any, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            file.write(content[: int(len(content) * share)])
            file.flush()
            _die()

    Path.open = opened  # type: ignore[method-assign,assignment]


class _TornFile:
    """A file open for appending whose n-th write stops in its middle."""

    def __init__(self, file: Any, before: Callable[[Any, bytes], None]) -> None:
        self._file, self._before = file, before

    def __enter__(self) -> _TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> int:
        self._before(self._file, content)
        return int(self._file.write(content))

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())
