"""Runs commands of documentation pages, each in a fork of one process that has imported torch, transformers and peft, which takes
longer than what the commands do here.

Reads a JSON object a line from standard input: `folder` to work in, `commands` and a file `log`; answers each with the first command that
failed, or null. A command is `labeltune ...`, `python SCRIPT ...`, `cat FILE | labeltune ...`, or a whole Python program (with a line break).
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from torture.zygote import warm  # noqa: E402

SERVER_STARTS = 120.0


def run(command: str) -> None:
    """In the child: what a shell would start."""
    if "\n" in command:
        exec(compile(command, "page", "exec"), {"__name__": "__main__"})
        return
    file, piped, rest = command.partition(" | ")
    os.dup2(os.open(file.removeprefix("cat ") if piped else os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # this process has read from the one before
    words = shlex.split(rest if piped else command)
    if words[0] == "python":
        sys.argv = words[1:]
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    assert words[0] == "labeltune", command
    sys.argv = words
    from labeltune.commands import main

    main.run()


def fork(command: str, log: str) -> int:
    """Start it; its process id. What it prints is added to the log."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        print(f"$ {command}", flush=True)
        run(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for it; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def served(command: str, log: str) -> int:
    """Start a server, wait until it is ready, stop it; its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = fork(f"{command} --port {port}", log)
    begun = time.monotonic()
    while time.monotonic() - begun < SERVER_STARTS:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                break
        except (urllib.error.URLError, ConnectionError):
            if os.waitpid(child, os.WNOHANG)[0]:
                return 1
            time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    return ended(child)


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        warm()
        for line in sys.stdin:
            task = json.loads(line)
            os.chdir(task["folder"])
            failed = None
            for command in task["commands"]:
                serves = command.startswith("labeltune serve")
                if served(command, task["log"]) if serves else ended(fork(command, task["log"])):
                    failed = command
                    break
            print(json.dumps(failed), file=answers, flush=True)


if __name__ == "__main__":
    main()
