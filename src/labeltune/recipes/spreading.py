"""Prediction and measurement spread over processes and machines."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import DataConfig, TaskName
from labeltune.run_folder import RunInfo
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.data.uris import Place
    from labeltune.inference.predictor import Predictor


def predict_spread(
    run: str,
    source: str,
    output: str,
    labels: tuple[str, ...] = (),
    top_k: int | None = None,
    min_confidence: float | None = None,
    changes: dict[str, Any] | None = None,
    resume: bool = False,
    block_rows: int = 4096,
    workers: int | None = None,
    address: str | None = None,
    with_text: bool = False,
    encoding: str | None = None,
) -> int:
    """Predict a file or folder into a folder of parts, on Ray Data.

    Args:
        run: run folder or checkpoint, where every machine finds it; or on a hub.
        source: jsonl or parquet file, or a folder of them: a path or an address that pyarrow or fsspec knows.
        output: a folder, likewise.
        changes: other values for keys of `generation`.
        block_rows: rows of a part.
        address: a Ray cluster; this machine when None.
        with_text: rows hold their document.
        encoding: of text files; the run's when None.

    Returns:
        The number of rows that could not be predicted.

    Raises:
        LabeltuneError: see `predict_blocks`.
    """
    from labeltune.data.uris import Place
    from labeltune.inference.load import load_changed
    from labeltune.inference.ray_engine import Cluster, Settings, predict_blocks
    from labeltune.inference.stream import alone_with_output, used_encoding

    where = Place.of(output)
    known = run_fingerprint_of(run, changes or {})
    about = run_info_of(run)
    encoding = codecs.lookup(used_encoding(encoding, about.encoding, source)).name
    data = DataConfig(columns=about.columns, encoding=encoding)
    load = partial(load_changed, everywhere(run), changes or {})
    alone = contextlib.nullcontext() if where.remote else alone_with_output(Path(where.where), where.name)
    with alone, _bar() as advance:
        columns = columns_of_inputs(Place.of(source), about.task, data)
        settings = Settings(labels, min_confidence, top_k, with_text, encoding, columns)
        cluster = Cluster(workers, address)
        return predict_blocks(
            load,
            known,
            Place.of(source),
            where,
            settings,
            cluster,
            resume=resume,
            block_rows=block_rows,
            progress=advance,
        )


def columns_of_inputs(source: Place, task: TaskName, data: DataConfig) -> dict[str, dict[str, str]]:
    """Names of the columns of every input where they are not those of `data`, by the first rows; said once.

    Raises:
        DataError: a file cannot be read, or it has no column for the text.
    """
    import pyarrow

    from labeltune.data.blocks import file_records
    from labeltune.data.columns import columns_of_records
    from labeltune.data.records import without_key
    from labeltune.errors import DataError, first_line
    from labeltune.inference.ray_engine import list_inputs

    names: dict[str, dict[str, str]] = {}
    for place, _ in list_inputs(source).values():
        try:
            with place.open() as file:
                records = file_records(place.name, file, data.encoding)
                found = columns_of_records(records, place.name, task, data.columns, False)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{place.name} cannot be read: {first_line(error)}") from error
        if found.problem is not None:
            raise DataError(f"{found.problem.where}: {without_key(found.problem.problem, '--encoding')}")
        if found.columns != data.columns:
            names[place.name] = found.columns.model_dump()
    return names


def run_fingerprint_of(run: str, changes: dict[str, Any]) -> str:
    """Names everything that a run's answers follow from but the rows."""
    from labeltune.inference.load import run_fingerprint

    return run_fingerprint(run, changes)


def run_info_of(run: str) -> RunInfo:
    """What a run says of itself."""
    from labeltune.inference.load import checkpoint_of

    return RunInfo.load(checkpoint_of(run))


def answer_spread(
    run: str,
    overrides: Sequence[str],
    base: bool,
    changes: dict[str, Any],
    examples: Sequence[Example],
    workers: int | None,
    address: str | None,
    advance: Callable[[int], None],
) -> list[Prediction]:
    """Predictions of checked examples, on Ray Data; for `evaluate`, whose arguments these are."""
    from labeltune.inference.ray_engine import Cluster, answer_blocks

    load = partial(_measured_predictor, everywhere(run), tuple(overrides), base, changes)
    return answer_blocks(load, examples, Cluster(workers, address), progress=advance)


_held: list[contextlib.AbstractContextManager[None]] = []


def _measured_predictor(
    run: str, overrides: tuple[str, ...], base: bool, changes: dict[str, Any]
) -> Predictor:
    """What a worker of `evaluate` asks."""
    from labeltune.recipes.evaluation import predictor_of

    predictor = predictor_of(run, overrides)
    predictor.change(**changes)
    if base:
        # Never put back, as the worker does nothing else; a context that nobody holds would be closed.
        context = predictor.base_model()
        context.__enter__()
        _held.append(context)
    return predictor


def everywhere(run: str) -> str:
    """A run's name that means the same in other working folders."""
    return run if run.startswith(("ms:", "hf:")) else str(Path(run).expanduser().absolute())


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int | None, int], None]]:
    """A bar whose total is told with the first count."""
    from labeltune.progress import row_progress

    with contextlib.ExitStack() as stack:
        advance: list[Callable[[int], None]] = []

        def count(total: int | None, rows: int) -> None:
            if not advance:
                advance.append(stack.enter_context(row_progress(total, "predict")))
            advance[0](rows)

        yield count
