"""Commands, in this process and in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from labeltune.commands import main

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    """A real command in this process."""
    monkeypatch.setattr(sys, "argv", ["labeltune", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main.run()
    shown = capsys.readouterr()
    return Result(int(ended.value.code or 0), shown.out, shown.err)


def process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=120
    )


def refused(found: Result, part: str) -> None:
    assert (found.code, found.out) == (2, ""), found.err
    assert found.err.startswith("error: ") and found.err.count("\n") == 1, found.err
    assert part in found.err, found.err
