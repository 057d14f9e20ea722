"""`labeltune compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    *,
    first: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint, config.yaml, or `base`: SECOND without its adapter."),
    ],
    second: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Labelled rows; the data.test of SECOND when missing."),
    ] = None,
    on_error: Annotated[str, typer.Option(help="Faulty rows: stop or skip.")] = "stop",
    max_rows: Annotated[int | None, typer.Option(help="Only the first rows.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for comparison.json, changed.jsonl and comparison.html."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="All figures as JSON, also with --output or on a terminal.")
    ] = False,
) -> None:
    """Compare two models on the same rows.

    A summary goes to standard error. All figures go as JSON to comparison.json with --output, else to standard output unless
    that is a terminal.
    """
    from labeltune.commands.evaluate import wants_json
    from labeltune.commands.quiet import quiet_libraries
    from labeltune.errors import ConfigError

    if on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error must be stop or skip, not {on_error!r}")
    if second == "base":
        raise ConfigError("the second model cannot be `base`; write: labeltune compare base RUN --data FILE")
    from labeltune.commands.inputs import data_to_measure, files_of
    from labeltune.io.outputs import check_folder

    read = [*(files_of(first) if first != "base" else []), *files_of(second)]
    data = data_to_measure(second, data)
    if output is not None:
        check_folder(output, [*read, data], ("comparison.json", "changed.jsonl", "comparison.html"))
    quiet_libraries()
    import labeltune
    from labeltune.io.progress import phase

    with phase("loading the model"):
        found = labeltune.compare(first, second, data, on_error=on_error, max_rows=max_rows, output=output)
    print_differences(found)
    if output is not None:
        print(f"report: {output / 'comparison.html'}", file=sys.stderr)
    if wants_json(as_json, output):
        print(json.dumps(found, ensure_ascii=False, indent=2))


def print_differences(found: dict[str, Any]) -> None:
    """One line a figure on standard error, for people."""
    from labeltune.evaluation.summary import rows_line

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
