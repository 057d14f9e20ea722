"""`labeltune predict`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune.cli.streams import Closed
from labeltune.errors import counted

if TYPE_CHECKING:
    from labeltune.types import Example

#: What is read when no file is named.
STANDARD_INPUT = Path("/dev/stdin")


def predict(
    *,
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
    encoding: Annotated[
        str | None,
        typer.Option(help="Encoding of a text file, e.g. gb18030; that of the run's data when missing."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="jsonl to write, or csv by its name (ranking and entities as JSON in a cell); standard output when missing.",
        ),
    ] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Put the document into its row, as `text`.")
    ] = False,
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
    """Answer texts or the rows of a file: one JSON line a row.

    Rows come with their id, in the order of the input. On stdin a JSON object is a row as in a file, every other line is a
    document. Blank lines are no rows: they take no id (ids count rows from 0).

    A row that cannot be read gets an `error` in its place, and the exit code is 1 at the end. The `score` of an
    entity is the mean log-probability of the tokens of its answer: 0 is certain, -0.1 is 90 % a token.
    """
    from labeltune.cli.quiet import quiet_libraries
    from labeltune.config import build_config
    from labeltune.data.labels import named_labels
    from labeltune.data.records import without_key
    from labeltune.data.sources import iter_records, resolve_data
    from labeltune.errors import ConfigError, DataError
    from labeltune.output_paths import check_folder, is_stream, open_stream
    from labeltune.run_files import encoding_of, files_read
    from labeltune.run_folder import write_text

    labels = named_labels("--category", category) if category is not None else ()
    check_engine(engine, workers, address)
    if encoding is not None:
        build_config({"data": {"encoding": encoding}}, "--encoding")
    changes = {"decoding": decoding, "long_text": long_text}
    changes = {key: value for key, value in changes.items() if value is not None}
    if output == "-":
        output = None
    if engine == "ray":
        if file is None or file == "-" or output is None or text:
            raise ConfigError(
                "--engine ray needs an input file or folder, and --output for a folder of parts"
            )
        if "://" not in output:
            check_folder(Path(output).expanduser(), [file, *files_read(run)], replaced=True)
        quiet_libraries()
        from labeltune.recipes.spreading import predict_spread

        how = top_k, min_confidence
        done = predict_spread(
            run,
            file,
            output,
            labels,
            *how,
            changes,
            resume,
            block_rows,
            workers,
            address,
            with_text,
            encoding,
        )
        _end(done)
        return
    given: list[Example] = []
    path: Path | None = None
    if text:
        if file is not None:
            raise DataError("give --text or a file, not both")
        given = [_checked(i, {"text": t}, labels, f"--text {i + 1}") for i, t in enumerate(text)]
    elif file is not None and file != "-":
        path = resolve_data(file)
        known = encoding or encoding_of(run)
        unreadable = next(iter_records(path, known), None) if known is not None else None
        if unreadable is not None and unreadable.whole:
            raise DataError(f"{unreadable.where}: {without_key(unreadable.problem, '--encoding')}")
    target = Path(output) if output is not None else None
    if resume and (path is None or target is None or is_stream(target)):
        raise ConfigError("--resume needs an input file, and a file for --output")
    _check_target(output, STANDARD_INPUT if path is None and not text else path, run)
    quiet_libraries()
    from labeltune.inference.load import load_predictor
    from labeltune.inference.row_files import csv_of, is_csv
    from labeltune.inference.stream import (
        Row,
        count_rows,
        predict_file,
        predict_lines,
        read_rows,
        read_stream,
        used_encoding,
    )
    from labeltune.progress import row_progress

    bad = 0
    with load_predictor(run, merge=True) as predictor:
        predictor.change(**changes)
        if not text:
            encoding = used_encoding(encoding, predictor.encoding, str(path or "stdin"))
        total = len(given) or None if path is None else count_rows(path, encoding or "utf-8")
        shown = total is None or total > predictor.generation.batch_size
        with row_progress(total, "predict", shown=shown) as advance:
            how_rows: dict[str, Any] = {
                "min_confidence": min_confidence,
                "top_k": top_k,
                "with_text": with_text,
            }
            if path is not None and target is not None and not is_stream(target):
                bad = predict_file(
                    predictor,
                    path,
                    target,
                    labels=labels,
                    resume=resume,
                    **how_rows,
                    progress=advance,
                    encoding=encoding,
                )
            else:
                source: Iterable[Row] = given
                if path is not None:
                    source = read_rows(path, predictor, labels, encoding)
                elif not text:
                    source = read_stream(sys.stdin.buffer, predictor, labels, encoding)

                def lines() -> Iterator[str]:
                    nonlocal bad
                    for found, faults in predict_lines(predictor, source, **how_rows, on_rows=advance):
                        bad += faults
                        yield from found

                rows = csv_of(lines()) if target is not None and is_csv(target) else lines()
                if target is None:
                    for line in rows:
                        sys.stdout.write(line)
                        sys.stdout.flush()
                elif is_stream(target):
                    with open_stream(target) as stream:
                        for line in rows:
                            stream.write(line.encode())
                            stream.flush()
                else:
                    write_text(target, "".join(rows))
    _end(bad)


def _check_target(output: str | None, path: Path | None, run: str) -> None:
    """Find out before the model is loaded whether rows can go there, and would replace nothing that is read.

    Raises:
        OutputError: see `check_file`; or standard output is the file that is read.
    """
    from labeltune.errors import OutputError
    from labeltune.inference.row_files import is_csv, unfinished_names
    from labeltune.output_paths import check_file, is_file_of
    from labeltune.run_files import files_read

    if path == STANDARD_INPUT and isinstance(sys.stdin, Closed):
        sys.stdin.read()  # raises
    inputs = [*([path] if path is not None else []), *files_read(run)]
    if output is None:
        sys.stdout.write("")  # raises where it is closed
        if path is not None and is_file_of(sys.stdout, path):
            raise OutputError(f"standard output is {path}, which this command reads; choose another output")
        return
    if output.endswith(("/", os.sep)):
        raise OutputError(f"{output} names a folder; name a file")
    target = Path(output)
    is_csv(target)
    check_file(target, inputs, unfinished_names(target.name))


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
    from labeltune.data.audit import first_error
    from labeltune.data.records import Record
    from labeltune.data.schemas import parse_record
    from labeltune.errors import DataError
    from labeltune.inference.stream import with_labels

    record = Record(where, values)
    example, faults = parse_record(record, number, "classification", ColumnsConfig(), answers_required=False)
    if example is None:
        raise DataError(str(first_error(faults)))
    return with_labels(example, labels)
