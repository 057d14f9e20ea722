"""Prediction spread over processes and machines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any


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
) -> int:
    """Predict a file or folder into a folder of parts, on Ray Data.

    Args:
        run: run folder or checkpoint, where every machine finds it; or on a hub.
        source: jsonl or parquet file, or a folder of them: a path or an address that pyarrow or fsspec knows.
        output: a folder, likewise.
        changes: other values for keys of `generation`.
        block_rows: rows of a part.
        address: a Ray cluster; this machine when None.

    Returns:
        The number of rows that could not be predicted.

    Raises:
        LabeltuneError: see `predict_blocks`.
    """
    from labeltune.data.places import Place
    from labeltune.inference.load import load_changed, run_fingerprint
    from labeltune.inference.ray_engine import Cluster, Settings, predict_blocks
    from labeltune.inference.stream import alone_with_output

    where = Place.of(output)
    known = run_fingerprint(run, changes or {})
    load = partial(load_changed, everywhere(run), changes or {})
    alone = contextlib.nullcontext() if where.remote else alone_with_output(where.where, where.name)
    with alone, _bar() as advance:
        settings = Settings(labels, min_confidence, top_k)
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
