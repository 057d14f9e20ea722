"""The table of a torture run, and its place in docs/reliability.md.

`python -m torture.table` puts the results of the last full run there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torture.common import MINIMUMS, ROOT, PartResult

RESULTS = ROOT / "build" / "torture" / "results.json"
RECORDED = ROOT / "docs" / "torture-results.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN = "<!-- torture table: begin (made by python -m torture.table) -->"
END = "<!-- torture table: end -->"


def markdown(results: dict[str, Any]) -> str:
    """The table of a run, with its notes below."""
    lines = [
        "| part | kills survived | faults injected | inputs tried | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    parts: list[dict[str, Any]] = results["parts"]
    for part in parts:
        failed = " (failed)" if part["failures"] else ""
        lines.append(
            f"| {part['part']}{failed} | {part['kills']:,} | {part['faults']:,} | {part['inputs']:,} | {part['seconds']:.0f} |"
        )
    sums = [sum(part[key] for part in parts) for key in ("kills", "faults", "inputs")]
    lines.append(f"| all | {sums[0]:,} | {sums[1]:,} | {sums[2]:,} | {results['seconds']:.0f} |")
    lines += ["", f"{results['date']}, {results['machine']}.", ""]
    lines += [f"- {part['part']}: {note}" for part in parts for note in part["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def too_few(parts: Sequence[PartResult | dict[str, Any]]) -> list[str]:
    """Which promised numbers a run at full size has not reached."""
    found = {part["part"]: part for part in (p if isinstance(p, dict) else p.to_dict() for p in parts)}
    lines = []
    for name, (column, least) in MINIMUMS.items():
        value = found.get(name, {}).get(column, 0)
        if value < least:
            lines.append(f"{name}: {value} {column}, at least {least} are promised")
    return lines


def insert(page: str, table: str) -> str:
    """The page with this table between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Record the last run, which has to be a full one that passed."""
    results = json.loads((Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS).read_text(encoding="utf-8"))
    broken = [line for part in results["parts"] for line in part["failures"]] + too_few(results["parts"])
    if broken or not results["full"]:
        sys.exit("not a full run that passed: " + ("; ".join(broken) or "it was smaller"))
    RECORDED.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), markdown(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
