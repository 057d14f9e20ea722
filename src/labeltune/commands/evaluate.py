"""`labeltune evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from labeltune.commands.predict import Address, Decoding, Workers, check_engine


def evaluate(
    *,
    run: Annotated[str, typer.Argument(help="Run folder, checkpoint, or config.yaml (its untuned model).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes when RUN is a config file.", metavar="[KEY=VALUE]...")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Labelled rows; the run's data.test when missing."),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Switch the adapter off: measure the untuned model.")
    ] = False,
    on_error: Annotated[str, typer.Option(help="Faulty rows: stop or skip.")] = "stop",
    max_rows: Annotated[int | None, typer.Option(help="Only the first rows.", min=1)] = None,
    train_data: Annotated[
        str | None, typer.Option(help="Training rows, for the dictionary baseline (NER).")
    ] = None,
    decoding: Decoding = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for metrics.json, predictions.jsonl and report.html."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="All figures as JSON, also with --output or on a terminal.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray: on many processes or machines.")] = "local",
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Measure a run on labelled rows.

    A summary goes to standard error. All figures go as JSON to metrics.json with --output, else to standard output unless
    that is a terminal.
    """
    from labeltune.commands.quiet import quiet_libraries
    from labeltune.errors import ConfigError

    if on_error not in ("stop", "skip"):
        raise ConfigError(f"--on-error must be stop or skip, not {on_error!r}")
    check_engine(engine, workers, address)
    from labeltune.commands.inputs import data_to_measure, files_of
    from labeltune.io.outputs import check_folder
    from labeltune.io.run_files import EVALUATION_FILES

    read = [*files_of(run, overrides or [])]
    data = data_to_measure(run, data, overrides or [])
    if output is not None:
        read += [data, *([train_data] if train_data is not None else [])]
        check_folder(output, read, EVALUATION_FILES)
    quiet_libraries()
    import labeltune
    from labeltune.io.progress import phase

    with phase("loading the model"):
        metrics = labeltune.evaluate(
            run,
            data,
            base=base,
            on_error=on_error,
            max_rows=max_rows,
            output=output,
            overrides=overrides or [],
            train_data=train_data,
            decoding=decoding,
            engine="ray" if engine == "ray" else "local",
            workers=workers,
            address=address,
        )
    print_summary(metrics)
    if output is not None:
        print(f"report: {output / 'report.html'}", file=sys.stderr)
    if wants_json(as_json, output):
        print(json.dumps(metrics, ensure_ascii=False, indent=2))


def wants_json(asked: bool, output: Path | None) -> bool:
    """Whether figures go to standard output: on demand, else for programs that have no file to read them from."""
    return asked or (output is None and not is_terminal())


def is_terminal() -> bool:
    """Whether standard output is read by a person."""
    return sys.stdout.isatty()


def print_summary(metrics: dict[str, Any]) -> None:
    """Headline figures on standard error, for people."""
    from labeltune.evaluation.summary import rows_line, shown_headline, worse_than_constant

    print(f"rows: {rows_line(metrics)}", file=sys.stderr)
    for key, value in shown_headline(metrics):
        print(f"{key}: {value}", file=sys.stderr)
    if (worse := worse_than_constant(metrics)) is not None:
        print(f"accuracy: {worse}", file=sys.stderr)
    for name, m in metrics.get("baselines", {}).items():
        print(f"baseline {name}: {m['value']:.3f}", file=sys.stderr)
    print(f"unparsable answers: {metrics['unparsable']:.1%} of {metrics['rows']} rows", file=sys.stderr)
