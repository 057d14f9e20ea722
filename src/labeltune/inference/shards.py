"""Shards: parts of files that are predicted by themselves, each into a file of its own that is whole or not there.

A shard is read to the rows, with the places and numbers, that a pass over the whole file gives, and holds whole chunks of
`predict_file`. So the outputs of all shards, one behind the other, are the output of the whole file, byte for byte (where threads
and kind of machine are the same), whoever predicts them, and however often.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow

from labeltune.config import ColumnsConfig, DataConfig, TaskName
from labeltune.data.blocks import Block, block_records, cut_file, file_records, joined
from labeltune.data.columns import columns_of_records, reading_of
from labeltune.data.records import without_key
from labeltune.errors import ConfigError, DataError, OutputError, first_line, printable
from labeltune.inference.files import (
    CHUNK_ROWS,
    PredictOptions,
    check_same,
    predict_lines,
    reading_for,
    rows_of,
)
from labeltune.io.outputs import remove_leftovers
from labeltune.io.uris import Place

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

MANIFEST = "_manifest.json"
SUFFIXES = (".jsonl", ".json", ".parquet")
_FORMAT = 1

Load = Callable[[], "Predictor"]
#: Calls a function with what loads the predictor and with each item, here or elsewhere; yields items with results as they come.
Work = Callable[[Callable[[Load, Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]


def shard_block(path: Path, number: int, count: int, encoding: str) -> Block:
    """The rows of one of `count` shards of a file, by one pass over its lines or by parquet's metadata.

    Shards differ by at most one chunk; where there are fewer chunks than shards, some hold no row.

    Raises:
        DataError: the file cannot be read.
    """
    name = printable(str(path))
    try:
        with path.open("rb") as file:
            chunks = list(cut_file(name, file, CHUNK_ROWS, most_bytes=sys.maxsize, encoding=encoding))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read: {first_line(error)}") from error
    if chunks and chunks[0].whole:
        rows = chunks[0].rows
        chunks = [
            replace(chunks[0], first=at, rows=min(CHUNK_ROWS, rows - at)) for at in range(0, rows, CHUNK_ROWS)
        ]
    begin, end = ((at * len(chunks)) // count for at in (number - 1, number))
    return joined(chunks[begin:end]) if begin < end else Block(name, 0, 0, 0, whole=True)


@dataclass(frozen=True)
class Shard:
    """A part of one of several files, and of an output folder.

    Attributes:
        number: of its part.
        source: the file.
        block: the rows.
        columns: names of the file's columns where they are not the run's.
    """

    number: int
    source: Place
    block: Block
    columns: ColumnsConfig | None = None

    def __str__(self) -> str:
        """For messages."""
        return f"rows {self.block.first} to {self.block.first + self.block.rows - 1} of {self.block.file}"


def predict_shard(output: Place, options: PredictOptions, load: Load, shard: Shard) -> tuple[int, int]:
    """Write a shard's part; one that is there is counted and kept, and needs no model.

    Returns:
        Its rows, and how many of them could not be predicted.

    Raises:
        DataError: the file cannot be read, or has changed since it was cut.
        OutputError: the part cannot be written.
    """
    part, block = output.inside(part_name(shard.number)), shard.block
    if part.is_file():
        lines = part.read().splitlines()
        if len(lines) == block.rows:
            return len(lines), sum("error" in json.loads(line) for line in lines)
    predictor = load()
    with shard.source.open() as file:
        encoding = options.encoding or predictor.encoding
        records = block_records(block, file, encoding, reading_for(predictor))
        rows = rows_of(records, predictor, options.labels, first=block.first, columns=shard.columns)
        found = list(predict_lines(predictor, rows, options))
    if len(found) != block.rows:
        raise DataError(
            f"{block.file} has changed: block {block.number} had {block.rows} rows and has {len(found)}"
        )
    if not output.remote:
        remove_leftovers(Path(output.where), part_name(shard.number))
    part.write("".join(line for line, _ in found).encode())
    return len(found), sum(not answered for _, answered in found)


def part_name(number: int) -> str:
    """File of a shard in an output folder; names sort in the order of the rows up to a million of them."""
    return f"part-{number:06d}.jsonl"


@dataclass(frozen=True)
class Source:
    """A file to read.

    Attributes:
        about: its size and time of change.
        columns: names of its columns where they are not the run's.
    """

    place: Place
    about: dict[str, Any]
    columns: ColumnsConfig | None = None


def list_sources(given: Place, task: TaskName, data: DataConfig) -> list[Source]:
    """A file, or the files of a folder in the order of their names; columns are found by the first rows, and said once.

    Raises:
        DataError: there is none, one is of another kind, cannot be read, or has no column for the text.
    """
    files, alone = given.files(), given.is_file()
    if not files:
        raise DataError(f"{given.name} does not exist, or holds no file")
    wrong = [name for name in files if not name.lower().endswith(SUFFIXES)]
    if wrong:
        raise DataError(
            f"{wrong[0]} in {given.name}: --engine ray reads {', '.join(SUFFIXES)}; csv goes through the local engine"
        )
    places = [(given if alone else given.inside(name), about) for name, about in files.items()]
    return [Source(place, about, _columns(place, task, data)) for place, about in places]


def _columns(place: Place, task: TaskName, data: DataConfig) -> ColumnsConfig | None:
    try:
        with place.open() as file:
            records = file_records(place.name, file, data.encoding, reading_of(data, task, False))
            found = columns_of_records(records, place.name, task, data.columns, False)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place.name} cannot be read: {first_line(error)}") from error
    if found.problem is not None:
        raise DataError(f"{found.problem.where}: {without_key(found.problem.problem, '--encoding')}")
    return found.columns if found.columns != data.columns else None


def begin_folder(
    output: Place, sources: list[Source], options: PredictOptions, run: str, block_rows: int, resume: bool
) -> None:
    """Make an output folder ready: an earlier output goes, or is what `resume` goes on with.

    Args:
        run: names everything that answers follow from but the rows (`fingerprint`).
        block_rows: rows of a shard.

    Raises:
        ConfigError: `block_rows` is no multiple of the local engine's chunks.
        OutputError: the folder holds something else, there is nothing to resume, or it belongs to another input, run or setting.
    """
    if block_rows % CHUNK_ROWS:
        raise ConfigError(f"--block-rows={block_rows} must be a multiple of {CHUNK_ROWS}")
    mine = {
        "format": _FORMAT,
        "inputs": {source.place.name.rpartition("/")[2]: source.about for source in sources},
        "run": run,
        "block_rows": block_rows,
        **asdict(options),
        "labels": list(options.labels),
        "columns": {s.place.name: s.columns.model_dump() for s in sources if s.columns is not None},
    }
    manifest = output.inside(MANIFEST)
    if not resume:
        _clear(output)
        manifest.write(json.dumps(mine).encode())
        return
    if not manifest.is_file():
        raise OutputError(f"nothing to resume: {output.name} holds no {MANIFEST}; start without --resume")
    check_same(json.loads(manifest.read()), mine, output.name)


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


def cut_sources(sources: list[Source], rows: int, encoding: str, work: Work) -> list[Shard]:
    """The shards of all files; files are cut side by side, each by one pass over its lines."""
    blocks = dict(work(partial(_cut, rows, encoding), [source.place for source in sources]))
    found = [(source, block) for source in sources for block in blocks[source.place]]
    return [Shard(n, source.place, block, source.columns) for n, (source, block) in enumerate(found)]


def _cut(rows: int, encoding: str, load: Load, place: Place) -> list[Block]:
    with place.open() as file:
        return list(cut_file(place.name, file, rows, CHUNK_ROWS, encoding=encoding))
