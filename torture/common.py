"""What a part of the torture run is given, and what it gives back.

A part is a module `part_NAME.py` with `def run(settings: Settings) -> PartResult`. It runs in a process of its own, so it may
import, kill and crash what it likes; a part that raises or dies has failed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: Part -> (column, least value) in a run at full size.
MINIMUMS = {
    "training kills": ("kills", 100),
    "predict kills": ("kills", 50),
    "hostile rows": ("inputs", 10_000),
}


@dataclass(frozen=True)
class Settings:
    """How hard to try.

    Attributes:
        folder: an empty folder of the part's own; removed at the end unless the part failed.
        seed: of everything random.
        scale: 1 is the full size that the documentation promises; 0.1 a tenth of the kills, rows and time.
    """

    folder: Path
    seed: int = 0
    scale: float = 1.0

    def count(self, full: int, least: int = 1) -> int:
        """`full` at scale 1, less at a smaller one."""
        return max(least, round(full * self.scale))

    def seconds(self, full: float) -> float:
        """A time limit for what is bounded by time, such as fuzzing."""
        return full * self.scale

    def random(self, *names: object) -> random.Random:
        """A generator that depends on the seed and on the names alone."""
        return random.Random(":".join(map(str, (self.seed, *names))))


@dataclass
class PartResult:
    """What a part came to: one row of the table.

    Attributes:
        part: its name in the table, such as "training kills".
        kills: processes that were killed and whose work then ended as if they had not been.
        faults: faults that were injected and answered as promised: full disks, flipped bytes, missing rights, second processes.
        inputs: inputs that were tried: rows, files, configs.
        failures: what was not as promised; empty when the part passed.
        notes: what the table cannot say, in short lines: memory measured, versions, what was tried where.
        seconds: set by the runner.
    """

    part: str
    kills: int = 0
    faults: int = 0
    inputs: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, fine: bool, otherwise: str) -> bool:
        """Remember a broken promise; returns `fine`."""
        if not fine:
            self.failures.append(otherwise)
            print(f"BROKEN: {otherwise}", file=sys.stderr, flush=True)
        return fine

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


Part = Callable[[Settings], PartResult]


def say(line: str) -> None:
    """Progress, in the part's log."""
    print(line, file=sys.stderr, flush=True)


def use_tests() -> None:
    """Make the helpers of the tests importable (`from helpers.tiny_models import make_model`)."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
