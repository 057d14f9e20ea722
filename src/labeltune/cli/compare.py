"""`labeltune compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    first: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint, config.yaml, or `base`: SECOND without its adapter."),
    ],
    second: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Labelled rows: jsonl, csv, parquet, ms: or hf:")],
    on_error: Annotated[str, typer.Option(help="Faulty rows: stop or skip.")] = "stop",
    max_rows: Annotated[int | None, typer.Option(help="Only the first rows.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for comparison.json, changed.jsonl and comparison.html."),
    ] = None,
) -> None:
    """Compare two models on the same rows; JSON on standard output."""
    from labeltune.cli.quiet import quiet_libraries
    from labeltune.errors import ConfigError

    if on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error must be stop or skip, not {on_error!r}")
    quiet_libraries()
    from labeltune import recipes

    found = recipes.compare(first, second, data, on_error=on_error, max_rows=max_rows, output=output)
    print_differences(found)
    if output is not None:
        print(f"report: {output / 'comparison.html'}", file=sys.stderr)
    print(json.dumps(found, ensure_ascii=False, indent=2))


def print_differences(found: dict[str, Any]) -> None:
    """One line a figure on standard error, for people."""
    from labeltune.evaluation.headline import rows_line

    print(f"rows: {rows_line(found)}", file=sys.stderr)
    for name, d in found["differences"].items():
        change = d["difference"]
        print(
            f"{name}: {d['first']:.3f} -> {d['second']:.3f}, {change['value']:+.3f} "
            f"(95 % interval {change['low']:+.3f} to {change['high']:+.3f}, p = {d['p_value']:.2g})",
            file=sys.stderr,
        )
    changed = found["changed"]
    print(
        f"rows that only the second model has right: {len(changed['gained'])}, only the first: {len(changed['lost'])}",
        file=sys.stderr,
    )
