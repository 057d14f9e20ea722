"""`labeltune predict`: a run answers texts, the rows of a file, or files shared out over processes and machines."""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune.commands.main import Closed
from labeltune.commands.options import Address, Decoding, Encoding, To, Workers
from labeltune.config import ColumnsConfig, DataConfig, build_config
from labeltune.data.check import first_error
from labeltune.data.labels import named_labels
from labeltune.data.records import Record
from labeltune.data.schemas import parse_record
from labeltune.data.sources import resolve_data
from labeltune.errors import ConfigError, DataError, MissingExtraError, OutputError, counted
from labeltune.inference.files import (
    CHUNK_ROWS,
    csv_of,
    is_csv,
    parse_shard,
    shard_output,
    text_columns,
    unfinished_names,
)
from labeltune.io.outputs import (
    check_file,
    check_folder,
    is_file_of,
    is_hub_name,
    is_stream,
    note_replaced,
    open_stream,
    write_text,
)
from labeltune.io.progress import begin, phase, row_progress, track
from labeltune.io.run_folder import RunInfo, files_read, find_checkpoint
from labeltune.io.uris import Place
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.files import PredictOptions, Row
    from labeltune.inference.predictor import Predictor
    from labeltune.inference.ray import Cluster

#: What is read when no file is named.
STANDARD_INPUT = Path("/dev/stdin")


Category = Annotated[str | None, typer.Option(help="Candidate labels, as a list or between commas.")]
File = Annotated[
    str | None,
    typer.Argument(help="jsonl, json, csv, tsv, parquet or xlsx with a `text` column; - or nothing: stdin."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="jsonl to write, or csv by its name (ranking and entities as JSON in a cell); standard output when missing.",
    ),
]
Texts = Annotated[list[str] | None, typer.Option("--text", "-t", help="A document (may be repeated).")]
WithText = Annotated[bool, typer.Option("--with-text", help="Put the document into its row, as `text`.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an output that was left unfinished.")]
MinConfidence = Annotated[
    float | None, typer.Option(help="Below this probability the label is null.", min=0.0, max=1.0)
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Several labels a row: give those from this probability on.", min=0.0, max=1.0),
]
TopK = Annotated[int | None, typer.Option(help="Candidates shown a row; all when missing.", min=1)]
LongText = Annotated[str | None, typer.Option(help="truncate or window; the run's own when missing.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Only this part of FILE, as 3/16, into OUTPUT-00003-of-00016: one process a part, on any machine.",
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine", help="local, or ray: shards of FILE on many processes or machines, OUTPUT is a folder."
    ),
]
BlockRows = Annotated[
    int, typer.Option(help=f"Rows of a part that ray writes; a multiple of {CHUNK_ROWS}.", min=CHUNK_ROWS)
]


def predict_command(
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    file: File = None,
    *,
    text: Texts = None,
    category: Category = None,
    encoding: Encoding = None,
    output: Output = None,
    with_text: WithText = False,
    resume: Resume = False,
    min_confidence: MinConfidence = None,
    threshold: Threshold = None,
    top_k: TopK = None,
    to: To = None,
    decoding: Decoding = None,
    long_text: LongText = None,
    shard: ShardOption = None,
    engine: EngineOption = "local",
    workers: Workers = None,
    address: Address = None,
    block_rows: BlockRows = 4096,
) -> None:
    """Answer texts or the rows of a file: one JSON line a row.

    Rows come with their id, in the order of the input. On stdin a JSON object is a row as in a file, every other line is a
    document. Blank lines are no rows: they take no id (ids count rows from 0).

    A row that cannot be read gets an `error` in its place, and the exit code is 1 at the end. The `score` of an
    entity is the mean log-probability of the tokens of its answer: 0 is certain, -0.1 is 90 % a token.
    """
    labels = named_labels("--category", category) if category is not None else ()
    check_engine(engine, workers, address)
    _check_bounds(run, min_confidence, threshold)
    if encoding is not None:
        build_config({"data": {"encoding": encoding}}, "--encoding")
    given = (("decoding", decoding), ("long_text", long_text))
    changes: dict[str, Any] = {key: value for key, value in given if value is not None}
    if to is not None and (engine == "ray" or shard is not None or (output or "").endswith(".csv")):
        raise ConfigError(
            f"--to {to} writes one file of tasks: it takes no --shard, no --engine ray and no .csv"
        )
    if engine == "ray":
        source, folder = _ray_files(run, file, output, bool(text or shard))
        from labeltune.inference.files import PredictOptions
        from labeltune.inference.ray import Cluster

        options = PredictOptions(labels, min_confidence, top_k, with_text, encoding, threshold)
        spread = partial(predict_on_ray, run, source, folder, options, Cluster(workers, address))
        _end(spread(changes=changes, resume=resume, block_rows=block_rows))
        return
    part = parse_shard(shard) if shard is not None else None
    texts = _texts(text or (), file)
    path = _input_file(file, run, encoding)
    target = _target(run, STANDARD_INPUT if path is None and not text else path, output, part, resume)
    from labeltune.inference.files import PredictOptions, used_encoding, with_labels
    from labeltune.inference.load import load_predictor

    texts = [with_labels(example, labels) for example in texts]
    with phase("loading the model"), load_predictor(run, merge=True) as predictor:
        begin("predicting the rows")
        predictor.change(**changes)
        if not text:
            encoding = used_encoding(encoding, predictor.encoding, str(path or "stdin"))
        options = PredictOptions(labels, min_confidence, top_k, with_text, encoding, threshold, to)
        bad = _answer(predictor, texts, path, target, options, part=part, resume=resume)
    _end(bad)


def predict(
    run: str | os.PathLike[str],
    texts: Iterable[str | Example],
    labels: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Load a run, answer some texts in order, and let go of the model. For more than one call use `load_predictor`."""
    from labeltune.inference.load import load_predictor

    rows = list(texts)
    with load_predictor(run) as predictor:
        return list(track(predictor.stream(rows, labels), len(rows), shown=progress))


def predict_on_ray(
    run: str,
    source: str,
    output: str,
    options: PredictOptions,
    cluster: Cluster,
    *,
    changes: dict[str, Any] | None = None,
    resume: bool = False,
    block_rows: int = 4096,
) -> int:
    """Predict a file, or the files of a folder, into a folder of parts, one a shard.

    `part-000000.jsonl`, `part-000001.jsonl` ... hold a line for each row, in the order of the rows: one behind the other they are
    what the local engine writes, byte for byte. `resume` keeps the parts that are there and makes the others.

    Args:
        run: run folder or checkpoint, where every machine finds it; or on a hub.
        source: jsonl or parquet file, or a folder of them: a path or an address that pyarrow or fsspec knows.
        output: a folder, likewise.
        changes: other values for keys of `generation`.
        block_rows: rows of a part.

    Returns:
        The number of rows that could not be predicted.

    Raises:
        ConfigError, DataError, OutputError: see `begin_folder`, `list_sources` and `predict_shard`.
        ModelError: a worker could not load the model, or shards kept ending theirs.
    """
    from labeltune.inference.files import alone_with_output, tell_written, used_encoding
    from labeltune.inference.load import checkpoint_of, load_changed, run_fingerprint
    from labeltune.inference.ray import ray_workers
    from labeltune.inference.shards import begin_folder, cut_sources, list_sources, predict_shard

    target, changes = Place.of(output), changes or {}
    known, about = run_fingerprint(run, changes), RunInfo.load(checkpoint_of(run))
    encoding = codecs.lookup(used_encoding(options.encoding, about.encoding, source)).name
    options = replace(options, encoding=encoding)
    data = DataConfig(columns=about.columns, encoding=encoding, format=about.rows_format)
    load = partial(load_changed, absolute_run(run), changes)
    bad, started = 0, time.monotonic()
    with contextlib.nullcontext() if target.remote else alone_with_output(Path(target.where), target.name):
        sources = list_sources(Place.of(source), about.task, data)
        begin_folder(target, sources, options, known, block_rows, resume)
        with ray_workers(load, cluster) as work:
            shards = cut_sources(sources, block_rows, encoding, work)
            total = sum(shard.block.rows for shard in shards)
            with row_progress(total, "predict") as advance:
                for _, (rows, faults) in work(partial(predict_shard, target, options), shards):
                    bad += faults
                    advance(rows)
    tell_written(output, total, bad, started)
    return bad


def absolute_run(run: str) -> str:
    """A run's name that means the same in other working folders."""
    return run if is_hub_name(run) else str(Path(run).expanduser().absolute())


def _check_bounds(run: str, min_confidence: float | None, threshold: float | None) -> None:
    """Raise ConfigError where a bound is for runs of another task; a run on a hub is not fetched for it."""
    if (min_confidence is None and threshold is None) or is_hub_name(run):
        return
    several = RunInfo.load(find_checkpoint(run)).task == "multilabel"
    if threshold is not None and not several:
        raise ConfigError(
            "--threshold is for several labels a row; --min-confidence withholds an unsure label"
        )
    if min_confidence is not None and several:
        raise ConfigError(
            "--min-confidence is for one label a row; --threshold decides which of several are given"
        )


def _ray_files(run: str, file: str | None, output: str | None, other: bool) -> tuple[str, str]:
    """What ray reads and writes.

    Args:
        other: there are texts, or a shard, which ray has no use for.

    Raises:
        ConfigError: there is no file or no folder.
        OutputError: what is read lies in the folder, or it cannot be written.
    """
    if file is None or output is None or "-" in (file, output) or other:
        raise ConfigError(
            "--engine ray needs an input file or folder, and --output for a folder of parts; it takes no --text and no --shard"
        )
    if "://" not in output:
        check_folder(Path(output).expanduser(), [file, *files_read(run)], replaced=True)
    return file, output


def _texts(given: Sequence[str], file: str | None) -> list[Example]:
    """The documents of `--text`."""
    if given and file is not None:
        raise DataError("give --text or a file, not both")
    return [_checked(i, text) for i, text in enumerate(given)]


def _input_file(file: str | None, run: str, encoding: str | None) -> Path | None:
    """The file to read, None for standard input; one whose texts cannot be found is refused before a model is loaded."""
    if file is None or file == "-":
        return None
    path = resolve_data(file)
    if path.is_dir():
        raise DataError(
            f"{file} is a folder; `labeltune data convert {file} rows.jsonl --to rows` writes its texts into a file"
        )
    if not is_hub_name(run):
        about = RunInfo.load(find_checkpoint(run))
        text_columns(
            path, about.task, about.columns, encoding or about.encoding, "--encoding", about.rows_format
        )
    return path


def _target(
    run: str, path: Path | None, output: str | None, part: tuple[int, int] | None, resume: bool
) -> Path | None:
    """Where lines go, None for standard output.

    Raises:
        ConfigError: an option needs files, or another kind of file.
        OutputError: see `_check_target`.
    """
    output = None if output == "-" else output
    in_files = path not in (None, STANDARD_INPUT) and output is not None and not is_stream(Path(output))
    if resume and not in_files:
        raise ConfigError("--resume needs an input file, and a file for --output")
    if part is not None:
        if not in_files or output is None or output.endswith(".csv"):
            raise ConfigError(
                "--shard needs an input file, and a jsonl file for --output, to whose name the shard's number is added"
            )
        output = str(shard_output(Path(output), *part))
    _check_target(output, path, run)
    return Path(output) if output is not None else None


def _answer(
    predictor: Predictor,
    texts: list[Example],
    path: Path | None,
    target: Path | None,
    options: PredictOptions,
    *,
    part: tuple[int, int] | None,
    resume: bool,
) -> int:
    """Predict what was given and write it; returns how many rows could not be predicted."""
    from labeltune.inference.files import (
        count_rows,
        predict_file,
        predict_lines,
        read_rows,
        read_stream,
        tasks_of,
        tell_written,
        version_of,
    )
    from labeltune.inference.shards import shard_block

    started = time.monotonic()
    encoding = options.encoding or predictor.encoding
    if path is not None and target is not None and not is_stream(target):
        block = shard_block(path, *part, encoding) if part is not None else None
        return predict_file(predictor, path, target, options, block=block, resume=resume, progress=True)
    rows: Iterable[Row] = texts
    if path is not None:
        rows = read_rows(path, predictor, options.labels, encoding)
    elif not texts:
        rows = read_stream(sys.stdin.buffer, predictor, options.labels, encoding)
    total = len(texts) or None if path is None else count_rows(path, encoding)
    many = total is None or total > predictor.decoded_rows
    # On a terminal the answers themselves are what moves.
    shown = many and not (target is None and sys.stdout.isatty())
    bad = 0
    with row_progress(total, "predict", shown) as advance:

        def answered() -> Iterator[str]:
            nonlocal bad
            for line, good in predict_lines(predictor, rows, options):
                bad += not good
                advance(1)
                yield line

        def shaped(lines: Iterable[str], faulty: bool = True) -> Iterable[str]:
            if options.to is not None:
                return tasks_of(lines, options.to, version_of(predictor))
            return csv_of(lines, faulty) if target is not None and is_csv(target) else lines

        if target is None:
            for line in shaped(answered()):
                sys.stdout.write(line)
                sys.stdout.flush()
        elif is_stream(target):
            with open_stream(target) as stream:
                for line in shaped(answered()):
                    stream.write(line.encode())
                    stream.flush()
        else:
            lines = list(answered())
            write_text(target, "".join(shaped(lines, bad > 0)))
            tell_written(str(target), len(lines), bad, started)
    return bad


def _check_target(output: str | None, path: Path | None, run: str) -> None:
    """Find out before the model is loaded whether rows can go there, and would replace nothing that is read.

    Raises:
        OutputError: see `check_file`; or standard output is the file that is read.
    """
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
    note_replaced(target)


def _end(bad: int) -> None:
    if bad:
        lines = "its line holds" if bad == 1 else "their lines hold"
        print(f"{counted(bad, 'row')} could not be predicted; {lines} an error", file=sys.stderr)
        raise typer.Exit(1)


def check_engine(engine: str, workers: int | None, address: str | None) -> None:
    """Raise what is wrong with `--engine`, `--workers` and `--address`."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine must be local or ray, not {engine!r}")
    if engine == "local" and (workers is not None or address is not None):
        raise ConfigError("--workers and --address need --engine ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise MissingExtraError("--engine ray", "ray")


def _checked(number: int, text: str) -> Example:
    """The row of a `--text`.

    Raises:
        DataError: the text is empty, or cannot be written.
    """
    record = Record(f"--text {number + 1}", {"text": text})
    example, faults = parse_record(record, number, "classification", ColumnsConfig(), answers_required=False)
    if example is None:
        raise DataError(str(first_error(faults)))
    return example
