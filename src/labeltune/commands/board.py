"""`labeltune board`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from labeltune.errors import LabeltuneError, printable
from labeltune.io.progress import tell


def board(
    folder: Annotated[Path, typer.Argument(help="Folder of local SwanLab runs.")] = Path("swanlog"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 5092,
) -> None:
    """Open the local SwanLab dashboard on a folder of runs.

    It is `swanlab watch`.
    """
    if not folder.is_dir():
        raise LabeltuneError(
            f"no folder {folder}; train first, or name the folder of the runs: labeltune board FOLDER"
        )
    if importlib.util.find_spec("swanboard") is None:
        raise LabeltuneError(
            "the local dashboard is not installed; install it with: pip install 'swanlab[dashboard]'"
        )
    command = [sys.executable, "-m", "swanlab", "watch", str(folder), "--host", host, "--port", str(port)]
    tell(f"runs in {printable(str(folder))}: open http://{host}:{port} in a browser; Ctrl-C ends the board")
    if os.name == "posix":
        # In the place of this process, so that a signal that stops it stops the server.
        sys.stdout.flush()
        os.execv(command[0], command)
    raise typer.Exit(subprocess.run(command).returncode)
