"""The program behind `make torture`: its parts, its table, and a small run of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torture.__main__ import part_names, run_part  # noqa: E402
from torture.common import MINIMUMS, PartResult  # noqa: E402
from torture.table import BEGIN, END, PAGE, RECORDED, insert, markdown, too_few  # noqa: E402

RESULTS = {
    "date": "2030-01-01",
    "machine": "2 CPU cores",
    "seconds": 61.4,
    "parts": [
        PartResult("training kills", kills=100, notes=["all of them"], seconds=60.4).to_dict(),
        PartResult("hostile rows", inputs=12345, failures=["one"], seconds=1.0).to_dict(),
    ],
}


def test_the_table() -> None:
    table = markdown(RESULTS)
    assert "| training kills | 100 | 0 | 0 | 60 |" in table and "- training kills: all of them" in table
    assert "| hostile rows (failed) | 0 | 0 | 12,345 | 1 |" in table
    assert "| all | 100 | 0 | 12,345 | 61 |" in table
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert insert(page, table) == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"
    assert insert(insert(page, "x"), table) == insert(page, table)


def test_too_few_kills_are_noticed() -> None:
    assert too_few(RESULTS["parts"]) == ["predict kills: 0 kills, at least 50 are promised"]  # type: ignore[arg-type]


def test_a_part_that_dies_has_failed(tmp_path: Path) -> None:
    (failure,) = run_part("that_does_not_exist", tmp_path, 0, 1.0).failures
    assert "the part died (exit code 1)" in failure and "ModuleNotFoundError" in failure


def test_the_recorded_run_is_a_full_one_that_kept_all_promises() -> None:
    """And the page shows it."""
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    for name in re.findall(r"`((?:torture|tests)/\w+\.py)`", page):
        assert (ROOT / name).is_file(), name
    for name in part_names():
        assert f"torture/part_{name}.py" in page, (
            f"docs/reliability.md does not say what part_{name}.py is for"
        )
    if not RECORDED.exists():
        pytest.skip("no full run has been recorded yet: make torture && python -m torture.table")
    results = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert results["full"] and not too_few(results["parts"])
    assert not [line for part in results["parts"] for line in part["failures"]]
    assert results["modules"] == part_names()
    assert set(MINIMUMS) <= {part["part"] for part in results["parts"]}
    assert insert(page, markdown(results)) == page, "run: python -m torture.table docs/torture-results.json"


def test_a_small_run(tmp_path: Path) -> None:
    """One kind of training, killed five times, and memory over thirty thousand rows."""
    command = [
        sys.executable,
        "-m",
        "torture",
        "training_kills",
        "memory",
        "--scale",
        "0.03",
        "--folder",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    parts = json.loads((tmp_path / "t" / "results.json").read_text(encoding="utf-8"))["parts"]
    assert [part["failures"] for part in parts] == [[], []]
    assert sum(part["kills"] for part in parts) >= 5 and sum(part["inputs"] for part in parts) >= 60_000
