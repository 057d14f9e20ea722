"""Run the parts and print one table: python -m torture [--scale 0.1] [--jobs 1] [PART ...]."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torture.common import ROOT, PartResult
from torture.table import RESULTS, markdown, too_few

#: A part that takes longer hangs.
PART_SECONDS = 40 * 60


def part_names() -> list[str]:
    """`part_NAME.py` -> NAME, by name."""
    return sorted(path.stem.removeprefix("part_") for path in Path(__file__).parent.glob("part_*.py"))


def run_part(name: str, folder: Path, seed: int, scale: float) -> PartResult:
    """Run a part in a process of its own; its output goes to `folder/NAME.log`."""
    work, log, result = folder / name, folder / f"{name}.log", folder / f"{name}.json"
    work.mkdir(parents=True)
    print(f"torture: {name} ... (log: {log})", flush=True)
    command = [sys.executable, "-m", "torture.one", name, str(work), str(seed), str(scale), str(result)]
    begun = time.monotonic()
    with log.open("wb") as out:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=PART_SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.monotonic() - begun
    if result.exists():
        done = PartResult(**json.loads(result.read_text(encoding="utf-8")))
    else:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        done = PartResult(name.replace("_", " "), failures=[f"the part died (exit code {code}): {last}"])
    done.seconds = round(seconds, 1)
    print(f"torture: {name}: {'FAILED' if done.failures else 'passed'} in {seconds:.0f} s", flush=True)
    if not done.failures:
        shutil.rmtree(work, ignore_errors=True)
    return done


def machine() -> str:
    """Where figures were made, without the machine's name."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    at = f", commit {commit.stdout.strip()}" if commit.returncode == 0 else ""
    return f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}{at}"


def main() -> None:
    """See the module."""
    names = part_names()
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; all when none is named"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="1: the full run; 0.1: a tenth of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parts that run side by side")
    parser.add_argument("--folder", type=Path, default=RESULTS.parent, help="logs, results, and what failed")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(names):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    begun = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        chosen = given.parts or names
        parts = list(pool.map(lambda name: run_part(name, given.folder, given.seed, given.scale), chosen))
    full = given.scale >= 1 and not given.parts
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "full": full,
        "scale": given.scale,
        "seed": given.seed,
        "seconds": round(time.monotonic() - begun, 1),
        "parts": [part.to_dict() for part in parts],
    }
    table = markdown(results)
    (given.folder / "results.json").write_text(
        json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    (given.folder / "results.md").write_text(table, encoding="utf-8")
    broken = [f"{part.part}: {line}" for part in parts for line in part.failures]
    if full:
        broken += too_few(parts)
    print(f"\n{table}\n" + "".join(f"BROKEN: {line}\n" for line in broken), end="", flush=True)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
