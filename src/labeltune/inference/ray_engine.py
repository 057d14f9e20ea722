"""Prediction on Ray Data: blocks of the input go to actors that hold the model, each block becomes one part of the output.

Ray hands out blocks, starts actors and starts them again where they die. What is exact is ours: a block is cut once, noted in
the manifest and named by its number, and its part appears whole, by a rename. So a block that is predicted twice, because its
actor died at whatever moment, is written once.
"""

from __future__ import annotations

import json
import logging
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow
import ray.data
import ray.exceptions

from labeltune.config import ColumnsConfig
from labeltune.data.blocks import Block, cut_file, read_block
from labeltune.data.uris import Place
from labeltune.errors import ConfigError, DataError, LabeltuneError, ModelError, OutputError, first_line
from labeltune.inference.predictor import Predictor
from labeltune.inference.stream import CHUNK_ROWS, predict_lines, rows_of
from labeltune.ray_session import Shares, ray_session, shares
from labeltune.types import Example, Prediction

#: Rows of a block: whole chunks, so that its answers are those of the local engine to the last bit.
BLOCK_ROWS = 16 * CHUNK_ROWS
MANIFEST = "_manifest.json"
SUFFIXES = (".jsonl", ".json", ".parquet")
_FORMAT = 1
#: How often a block may begin; Ray would give one that kills its actor to others for ever.
MOST_ATTEMPTS = 5
_ATTEMPT = "_attempt-"

Load = Callable[[], Predictor]


@dataclass(frozen=True)
class Settings:
    """What answers follow from beside the rows and the model.

    Attributes:
        labels: candidates for rows that bring none.
        encoding: of text files, by Python's name.
        columns: file -> names of its columns, where they are not the run's (see `recipes.spreading`).
    """

    labels: tuple[str, ...] = ()
    min_confidence: float | None = None
    top_k: int | None = None
    with_text: bool = False
    encoding: str = "utf-8"
    columns: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """Where it runs: `address` of a Ray cluster, this machine when None; `workers` actors, one a GPU or machine when None."""

    workers: int | None = None
    address: str | None = None


class _Actor:
    """Loads the model when it first needs it, and keeps it."""

    def __init__(self, load: Load, threads: int) -> None:
        self._load, self._threads = load, threads
        self._predictor: Predictor | None = None

    @property
    def predictor(self) -> Predictor:
        if self._predictor is None:
            import torch

            torch.set_num_threads(self._threads)
            self._predictor = self._load()
        return self._predictor


class PartWriter(_Actor):
    """Reads a block, predicts it, writes its part; a part that is there is counted and kept."""

    def __init__(self, load: Load, threads: int, settings: Settings, output: Place, session: str) -> None:
        super().__init__(load, threads)
        self._settings, self._output, self._session = settings, output, session

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """`part`: numbers of parts, `block` their blocks, as JSON -> `rows` and `bad` of each."""
        found = [
            self._part(int(number), json.loads(block))
            for number, block in zip(batch["part"], batch["block"], strict=True)
        ]
        return {"rows": [rows for rows, _ in found], "bad": [bad for _, bad in found]}

    def _part(self, number: int, values: dict[str, Any]) -> tuple[int, int]:
        place, block = self._output.inside(part_name(number)), Block(**values["block"])
        if place.is_file():
            lines = place.read().splitlines()
            if len(lines) == block.rows:
                return len(lines), sum("error" in json.loads(line) for line in lines)
        attempts = self._attempts(number, block)
        settings, bad = self._settings, 0
        written: list[str] = []
        try:
            with Place(block.file, values["where"]).open() as file:
                names = settings.columns.get(block.file)
                rows = rows_of(
                    read_block(block, file, settings.encoding),
                    self.predictor,
                    settings.labels,
                    block.first,
                    ColumnsConfig(**names) if names is not None else None,
                )
                for found, faults in predict_lines(
                    self.predictor,
                    rows,
                    min_confidence=settings.min_confidence,
                    top_k=settings.top_k,
                    with_text=settings.with_text,
                ):
                    bad += faults
                    written += found
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            first, last = block.first + 1, block.first + block.rows
            raise DataError(
                f"{block.file}: rows {first} to {last} cannot be read: {first_line(error)}"
            ) from error
        if len(written) != block.rows:
            raise DataError(
                f"{block.file} has changed: block {block.number} had {block.rows} rows and has {len(written)}"
            )
        place.write("".join(written).encode())
        for attempt in attempts:
            attempt.remove()
        return len(written), bad

    def _attempts(self, number: int, block: Block) -> list[Place]:
        """Note that a block is begun; the notes of this session about it."""
        found: list[Place] = []
        for attempt in range(MOST_ATTEMPTS):
            found.append(self._output.inside(f"{_ATTEMPT}{self._session}-{number:06d}-{attempt}"))
            if not found[-1].is_file():
                found[-1].write(b"")
                return found
        raise ModelError(
            f"rows {block.first} to {block.first + block.rows - 1} of {block.file} ended {MOST_ATTEMPTS} workers; is there too "
            "little memory? Fewer --workers need less. Go on with --resume"
        )


class Answerer(_Actor):
    """Predicts examples that come with the block; for evaluation, whose rows are checked before."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """`examples`: pickled lists of examples -> `predictions`, pickled lists."""
        found = []
        for examples in batch["examples"]:
            self.predictor.engine.forget()
            found.append(pickle.dumps(self.predictor.predict(pickle.loads(examples))))
        return {"predictions": found}


def predict_blocks(
    load: Load,
    run: str,
    source: Place,
    output: Place,
    settings: Settings,
    cluster: Cluster,
    *,
    resume: bool = False,
    block_rows: int = BLOCK_ROWS,
    progress: Callable[[int | None, int], None] | None = None,
) -> int:
    """Predict a file, or the files of a folder in the order of their names, into a folder of parts.

    `part-000000.jsonl`, `part-000001.jsonl` ... hold a line for each row, in the order of the rows: one behind the other they are
    what the local engine writes, byte for byte. The manifest notes inputs and blocks; `resume` keeps the parts that are
    there and does the others.

    Args:
        load: makes the predictor, in every actor.
        run: names everything that answers follow from but the rows (`fingerprint`).
        progress: called with (rows in all, rows that were finished).

    Returns:
        The number of rows that could not be predicted.

    Raises:
        ConfigError: `block_rows` is no multiple of the local engine's chunks.
        OutputError: the folder holds something else, there is nothing to resume, or it belongs to another input, run or setting.
        DataError: a file cannot be read.
        ModelError: an actor could not load the model, or kept dying.
    """
    if block_rows % CHUNK_ROWS:
        raise ConfigError(f"--block-rows={block_rows} must be a multiple of {CHUNK_ROWS}")
    inputs = list_inputs(source)
    mine = {
        "format": _FORMAT,
        "inputs": {name: inputs[name][1] for name in inputs},
        "run": run,
        "block_rows": block_rows,
        **asdict(settings),
        "labels": list(settings.labels),
    }
    blocks = _resumed(output, mine) if resume else None
    if not resume:
        _clear(output)
    with ray_session(cluster.address):
        if blocks is None:
            places = {name: place for name, (place, _) in inputs.items()}
            blocks = _cut_all(places, block_rows, settings.encoding)
            note = {**mine, "blocks": [asdict(block) for block in blocks]}
            output.inside(MANIFEST).write(json.dumps(note).encode())
        wheres = {place.name: place.where for place, _ in inputs.values()}
        items = [
            {"part": n, "block": json.dumps({"block": asdict(block), "where": wheres[block.file]})}
            for n, block in enumerate(blocks)
        ]
        total, bad, done = sum(block.rows for block in blocks), 0, 0
        if progress is not None:
            progress(total, 0)
        given = shares(cluster.workers)
        for row in _mapped(
            items, PartWriter, (load, given.cpus, settings, output, uuid.uuid4().hex[:8]), given
        ):
            bad += row["bad"]
            done += row["rows"]
            if progress is not None:
                progress(total, row["rows"])
    for name in output.files(hidden=True):
        if name.startswith(_ATTEMPT):
            output.inside(name).remove()
    if done != total:
        raise OutputError(f"{output.name} holds {done} rows, not {total}; go on with --resume")
    return bad


def answer_blocks(
    load: Load,
    examples: Sequence[Example],
    cluster: Cluster,
    *,
    block_rows: int = 4 * CHUNK_ROWS,
    progress: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Predictions of examples, in order, like `Predictor.predict`; equal to it up to rounding.

    Raises:
        ModelError: an actor could not load the model, or kept dying.
    """
    items = [
        {"at": at, "examples": pickle.dumps(list(examples[at : at + block_rows]))}
        for at in range(0, len(examples), block_rows)
    ]
    found: list[Prediction] = []
    with ray_session(cluster.address):
        given = shares(cluster.workers)
        for row in _mapped(items, Answerer, (load, given.cpus), given):
            predictions = pickle.loads(row["predictions"])
            found += predictions
            if progress is not None:
                progress(len(predictions))
    return found


def part_name(number: int) -> str:
    """File of a part; names sort in the order of the rows up to a million parts."""
    return f"part-{number:06d}.jsonl"


def list_inputs(source: Place) -> dict[str, tuple[Place, dict[str, Any]]]:
    """The files to read, by name: where each is, and its size and time of change.

    Raises:
        DataError: there is none, or one of another kind.
    """
    files = source.files()
    alone = source.is_file()
    if not files:
        raise DataError(f"{source.name} does not exist, or holds no file")
    wrong = [name for name in files if not name.lower().endswith(SUFFIXES)]
    if wrong:
        raise DataError(
            f"{wrong[0]} in {source.name}: --engine ray reads {', '.join(SUFFIXES)}; csv goes through the local engine"
        )
    return {name: (source if alone else source.inside(name), about) for name, about in files.items()}


def _cut(where: Place, rows: int, encoding: str = "utf-8") -> list[Block]:
    with where.open() as file:
        return list(cut_file(where.name, file, rows, CHUNK_ROWS, encoding=encoding))


def _cut_all(inputs: dict[str, Place], rows: int, encoding: str) -> list[Block]:
    """The blocks of all files; files are cut side by side, each by one pass over its lines."""
    cut = ray.remote(_cut)
    try:
        found = ray.get([cut.remote(place, rows, encoding) for place in inputs.values()])
    except ray.exceptions.RayError as error:
        raise _own(error) from error
    return [block for blocks in found for block in blocks]


def _mapped(
    items: list[dict[str, Any]], actor: type[_Actor], given: tuple[Any, ...], share: Shares
) -> Iterator[dict[str, Any]]:
    """The actor's results for every item, in order, each as soon as it and those before it are there."""
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = True
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=share.workers, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=given,
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )
    try:
        yield from dataset.iter_rows()
    except (ray.exceptions.RayError, LabeltuneError) as error:
        raise _own(error) from error


def _own(error: BaseException) -> LabeltuneError:
    """What of ours is behind an error of Ray's."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray makes errors that are of our kind too, with a traceback for a message; the cause is the one that was raised.
        if isinstance(seen, LabeltuneError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return ModelError(
        f"Ray stopped: {first_line(error)}; what is done is kept, go on with --resume. If workers die again and again, look at "
        "their memory: fewer --workers need less"
    )


def _clear(output: Place) -> None:
    """Make room for a new run: an earlier output goes, anything else is not ours to remove."""
    if output.is_file():
        raise OutputError(
            f"--output {output.name} is a file; --engine ray writes a folder of parts, name another one"
        )
    ours = output.inside(MANIFEST).is_file()
    found = output.files()
    foreign = [name for name in found if not (ours and name.startswith("part-") and name.endswith(".jsonl"))]
    if foreign:
        raise OutputError(
            f"--output {output.name} holds {foreign[0]}, which is not ours; name another folder"
        )
    for name in found:
        output.inside(name).remove()
    if ours:
        output.inside(MANIFEST).remove()


def _resumed(output: Place, mine: dict[str, Any]) -> list[Block]:
    """The blocks of an unfinished output, by its manifest."""
    if not output.inside(MANIFEST).is_file():
        raise OutputError(f"nothing to resume: {output.name} holds no {MANIFEST}; start without --resume")
    earlier = {"with_text": False, "encoding": "utf-8", "columns": {}}
    theirs = {**earlier, **json.loads(output.inside(MANIFEST).read())}
    differing = ", ".join(key for key in mine if theirs.get(key) != mine[key])
    if differing:
        raise OutputError(
            f"the unfinished {output.name} was made with another {differing}; start without --resume to begin again"
        )
    return [Block(**values) for values in theirs["blocks"]]
