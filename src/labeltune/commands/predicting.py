"""Asking a run: some texts, or files that are shared out over processes and machines."""

from __future__ import annotations

import codecs
import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import DataConfig
from labeltune.io.progress import row_progress, track
from labeltune.io.run_folder import RunInfo
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.files import PredictOptions
    from labeltune.inference.ray import Cluster


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
    from labeltune.data.uris import Place
    from labeltune.inference.files import alone_with_output, used_encoding
    from labeltune.inference.load import checkpoint_of, load_changed, run_fingerprint
    from labeltune.inference.ray import ray_workers
    from labeltune.inference.shards import begin_folder, cut_sources, list_sources, predict_shard

    target, changes = Place.of(output), changes or {}
    known, about = run_fingerprint(run, changes), RunInfo.load(checkpoint_of(run))
    encoding = codecs.lookup(used_encoding(options.encoding, about.encoding, source)).name
    options = replace(options, encoding=encoding)
    data = DataConfig(columns=about.columns, encoding=encoding)
    load = partial(load_changed, everywhere(run), changes)
    bad = 0
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
    return bad


def everywhere(run: str) -> str:
    """A run's name that means the same in other working folders."""
    return run if run.startswith(("ms:", "hf:")) else str(Path(run).expanduser().absolute())
