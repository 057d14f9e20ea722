"""`labeltune predict`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from labeltune.errors import counted
from labeltune.run_folder import write_text
from labeltune.types import Example


def predict(
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    file: Annotated[
        str | None,
        typer.Argument(
            help="jsonl, json, csv, tsv, parquet or xlsx with a `text` column; - or nothing: stdin."
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="A document (may be repeated).")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Candidate labels, as a list or between commas.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of a text file, e.g. gb18030.")] = "utf-8",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="jsonl to write; standard output when missing.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an output that was left unfinished.")
    ] = False,
    min_confidence: Annotated[
        float | None, typer.Option(help="Below this probability the label is null.", min=0.0, max=1.0)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Candidates shown a row; all when missing.", min=1)
    ] = None,
    decoding: Annotated[str | None, typer.Option(help="exact or free; the run's own when missing.")] = None,
    long_text: Annotated[
        str | None, typer.Option(help="truncate or window; the run's own when missing.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="local, or ray: blocks of FILE on many processes or machines, OUTPUT is a folder."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Models loaded side by side by ray; one a GPU, or one a machine without GPUs.", min=1
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster, e.g. auto; this machine when missing.")
    ] = None,
    block_rows: Annotated[
        int, typer.Option(help="Rows of a part that ray writes; a multiple of 256.", min=256)
    ] = 4096,
) -> None:
    """Predict; one JSON line a row, with its id, in the order of the input.

    On stdin a JSON object is a row as in a file, every other line is a document. Blank lines are no rows: they take no id (ids
    count rows from 0). A row that cannot be read gets an `error` in its place, and the exit code is 1 at the end.
    """
    from labeltune.cli.quiet import quiet_libraries
    from labeltune.config import build_config
    from labeltune.data.labels import named_labels
    from labeltune.data.sources import iter_records, resolve_data
    from labeltune.errors import ConfigError, DataError

    labels = named_labels("--category", category) if category is not None else ()
    check_engine(engine, workers, address)
    changes = {"decoding": decoding, "long_text": long_text}
    changes = {key: value for key, value in changes.items() if value is not None}
    if engine == "ray":
        if file is None or file == "-" or output is None or text:
            raise ConfigError(
                "--engine ray needs an input file or folder, and --output for a folder of parts"
            )
        quiet_libraries()
        from labeltune.recipes.spreading import predict_spread

        how = top_k, min_confidence
        _end(predict_spread(run, file, output, labels, *how, changes, resume, block_rows, workers, address))
        return
    given: list[Example] = []
    path: Path | None = None
    if text:
        if file is not None:
            raise DataError("give --text or a file, not both")
        given = [_checked(i, {"text": t}, labels, f"--text {i + 1}") for i, t in enumerate(text)]
    elif file is not None and file != "-":
        path = resolve_data(file)
        build_config({"data": {"encoding": encoding}}, "--encoding")
        unreadable = next(iter_records(path, encoding), None)
        if unreadable is not None and unreadable.whole:
            raise DataError(f"{unreadable.where}: {unreadable.problem}")
    if resume and (path is None or output is None):
        raise ConfigError("--resume needs an input file and --output")
    quiet_libraries()
    from labeltune.inference.load import load_predictor
    from labeltune.inference.stream import (
        BadRow,
        Row,
        count_rows,
        predict_file,
        predict_rows,
        read_rows,
        read_stream,
        to_line,
    )
    from labeltune.progress import row_progress

    bad = 0
    with load_predictor(run, merge=True) as predictor:
        predictor.change(**changes)
        total = len(given) or None if path is None else count_rows(path, encoding)
        shown = total is None or total > predictor.generation.batch_size
        with row_progress(total, "predict", shown=shown) as advance:
            if path is not None and output is not None:
                bad = predict_file(
                    predictor,
                    path,
                    Path(output),
                    labels=labels,
                    resume=resume,
                    min_confidence=min_confidence,
                    top_k=top_k,
                    progress=advance,
                    encoding=encoding,
                )
            else:
                source: Iterable[Row] = given
                if path is not None:
                    source = read_rows(path, predictor, labels, encoding)
                elif not text:
                    source = read_stream(sys.stdin.buffer, predictor, labels)
                written = []
                for chunk in predict_rows(predictor, source, min_confidence=min_confidence, on_rows=advance):
                    bad += sum(isinstance(row, BadRow) for row in chunk)
                    lines = "".join(to_line(row, top_k) for row in chunk)
                    if output is None:
                        sys.stdout.write(lines)
                        sys.stdout.flush()
                    else:
                        written.append(lines)
                if output is not None:
                    write_text(Path(output), "".join(written))
    _end(bad)


def _end(bad: int) -> None:
    if bad:
        lines = "its line holds" if bad == 1 else "their lines hold"
        print(f"{counted(bad, 'row')} could not be predicted; {lines} an error", file=sys.stderr)
        raise typer.Exit(1)


def check_engine(engine: str, workers: int | None, address: str | None) -> None:
    """Raise what is wrong with `--engine`, `--workers` and `--address`."""
    import importlib.util

    from labeltune.errors import ConfigError, MissingExtraError

    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine must be local or ray, not {engine!r}")
    if engine == "local" and (workers is not None or address is not None):
        raise ConfigError("--workers and --address need --engine ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--engine ray", "ray")


def _checked(number: int, values: dict[str, Any], labels: tuple[str, ...], where: str) -> Example:
    """The example of these values, which choose from `labels` unless they bring candidates.

    Raises:
        DataError: the text is empty, or cannot be written.
    """
    from labeltune.config import ColumnsConfig
    from labeltune.data.schemas import parse_record
    from labeltune.data.sources import Record
    from labeltune.errors import DataError
    from labeltune.inference.stream import with_labels

    record = Record(where, values)
    example, faults = parse_record(record, number, "classification", ColumnsConfig(), answers_required=False)
    if example is None:
        raise DataError(str(faults[0]))
    return with_labels(example, labels)
