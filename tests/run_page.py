"""Runs the commands of a documentation page one after the other in the working folder: `python run_page.py COMMANDS.json`.

The file holds a list of `labeltune ...`, `python SCRIPT ...`, `cat FILE | labeltune ...`, and whole Python programs (with a line break).
Each runs in a fork of one process that has imported torch, transformers and peft, which takes longer than what they do here.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torture.zygote import warm  # noqa: E402

SERVER_STARTS = 120.0


def run(command: str) -> None:
    """In the child: what a shell would start."""
    if "\n" in command:
        exec(compile(command, "page", "exec"), {"__name__": "__main__"})
        return
    file, piped, rest = command.partition(" | ")
    if piped:
        os.dup2(os.open(file.removeprefix("cat "), os.O_RDONLY), 0)
        command = rest
    words = shlex.split(command)
    if words[0] == "python":
        sys.argv = words[1:]
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        return
    assert words[0] == "labeltune", command
    sys.argv = words
    from labeltune.cli import main

    main.run()


def fork(command: str) -> int:
    """Start it; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
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


def served(command: str) -> int:
    """Start a server, wait until it is ready, stop it; its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = fork(f"{command} --port {port}")
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
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    warm()
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(f"$ {command}", file=sys.stderr)
        begun = time.monotonic()
        if command.startswith("labeltune serve"):
            code = served(command)
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(fork(command), 0)[1])
        print(f"{time.monotonic() - begun:.1f} s", file=sys.stderr)
        if code:
            sys.exit(f"exit code {code}: {command}")


if __name__ == "__main__":
    main()
