"""Python in processes of their own, each the fork of one that has imported torch, transformers and peft: that takes longer than what
most tests do there.

`run` and `start` stand for `subprocess.run` and `subprocess.Popen` of `[sys.executable, *arguments]`. A fork has the descriptors,
environment, folder, signals and end of such a process. What depends on how a process begins (its imports, PYTHONPATH,
OMP_NUM_THREADS) needs a real one, and so does one test of every verb.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
_NUMBER = struct.Struct("<i")


class Fork:
    """As subprocess.Popen: its output is text, in pipes; its input is empty."""

    def __init__(
        self, arguments: Sequence[str | Path], cwd: Path | None, env: Mapping[str, str] | None
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        task = {
            "arguments": self.args,
            "folder": str(cwd or Path.cwd()),
            "environment": dict(env or os.environ),
        }
        server = _server()
        self._watch, theirs = socket.socketpair()
        (out, out_end), (err, err_end), null = os.pipe(), os.pipe(), os.open(os.devnull, os.O_RDONLY)
        given = [null, out_end, err_end, theirs.detach()]
        socket.send_fds(server, [b"."], given)
        for handle in given:
            os.close(handle)
        self.stdout: TextIO = os.fdopen(out, encoding="utf-8")
        self.stderr: TextIO = os.fdopen(err, encoding="utf-8")
        self._watch.sendall(json.dumps(task).encode())
        self._watch.shutdown(socket.SHUT_WR)
        self.pid = self._number()

    def _number(self) -> int:
        return int(_NUMBER.unpack(self._watch.recv(_NUMBER.size))[0])

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._watch.settimeout(timeout)
            try:
                self.returncode = self._number()
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._watch.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints from now on, read to the end."""
        printed: dict[TextIO, str] = {}

        def read(stream: TextIO) -> None:
            printed[stream] = stream.read()
            stream.close()

        readers = [threading.Thread(target=read, args=(stream,)) for stream in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            for reader in readers:
                reader.join()
        return printed[self.stdout], printed[self.stderr]


def start(
    arguments: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Fork:
    return Fork(arguments, cwd, env)


def run(
    arguments: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    fork = start(arguments, cwd=cwd, env=env)
    out, err = fork.communicate(timeout=240)
    return subprocess.CompletedProcess(fork.args, fork.wait(), out, err)


@functools.cache
def _server() -> socket.socket:
    """Start it; it ends when this process does, which closes the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT, stdin=subprocess.DEVNULL)
    atexit.register(server.wait)
    atexit.register(ours.shutdown, socket.SHUT_RDWR)
    return ours


def _next_task(control: socket.socket) -> list[str] | None:
    """In the server, until nobody asks any more: None. In a fork: the arguments that it shall run with."""
    watching: list[int] = []
    while True:
        _, handles, *_ = socket.recv_fds(control, 1, 4)
        watching = [child for child in watching if os.waitpid(child, os.WNOHANG)[0] == 0]
        if not handles:
            return None
        child = os.fork()
        if child == 0:
            control.close()
            return _watched(handles)
        watching.append(child)
        for handle in handles:
            os.close(handle)


def _watched(handles: Sequence[int]) -> list[str]:
    """Between server and fork stands a process that waits for the fork, and tells how it ended."""
    with socket.socket(fileno=handles[3]) as watch:
        task = json.loads(b"".join(iter(lambda: watch.recv(1 << 16), b"")))
        child = os.fork()
        if child:
            for handle in handles[:3]:
                os.close(handle)
            watch.sendall(_NUMBER.pack(child))
            watch.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
            os._exit(0)
    for number, handle in enumerate(handles[:3]):
        os.dup2(handle, number)
        os.close(handle)
    # New ones: the server's know whether they stand for a file or a pipe.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    sys.stderr.reconfigure(line_buffering=True)
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    return list(task["arguments"])


def _become(arguments: list[str]) -> None:
    """`python ARGUMENTS`, to its end; only the modules are not taken apart, which takes longer than what most tests do."""
    code = 0
    try:
        _run(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _run(arguments: list[str]) -> None:
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _main() -> None:
    sys.path[:1] = [str(ROOT / "src"), str(ROOT)]
    from labeltune.commands.main import quiet_libraries
    from torture.zygote import warm

    quiet_libraries()
    warm()
    gc.freeze()  # forks share what is there now
    arguments = _next_task(socket.socket(fileno=int(sys.argv[1])))
    if arguments is not None:
        _become(arguments)


if __name__ == "__main__":
    _main()
