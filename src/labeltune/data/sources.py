"""Files and hub data sets -> raw records, one at a time, each with its place in the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from labeltune.config import HubConfig
from labeltune.errors import DataError, HubError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: A line of a file, or a row of it, that is longer than this is no document; it is a fault, and never held in memory.
MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Record:
    """A raw row, or the reason why there is none.

    Attributes:
        where: `file:line` (`file:row N` for parquet), 1-based.
        values: column -> value, None when the line could not be read.
        kind: the fault's kind when `values` is None.
        problem: the fault's message when `values` is None.
    """

    where: str
    values: dict[str, Any] | None
    kind: str = ""
    problem: str = ""


def resolve_data(spec: str, hub: HubConfig | None = None) -> Path:
    """A data spec -> a local file.

    `spec` is a path, or `ms:org/name[/file]` (ModelScope) or `hf:org/name[/file]` (Hugging Face); a hub data set is
    downloaded by the hub's own client, and no code of it is run.

    Raises:
        DataError: the file does not exist, has an unknown suffix, or the data set holds several candidates.
        HubError: the hub cannot be reached.
    """
    if spec.startswith(("ms:", "hf:")):
        path = _download(spec, hub or HubConfig())
    else:
        path = Path(spec).expanduser()
        if not path.exists():
            raise DataError(
                f"data file {spec} does not exist (looked in {Path.cwd()}). Give another path, "
                "or fetch the original data with: labeltune data download fudan|ccfbdci"
            )
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        raise DataError(f"data file {spec} must end in {', '.join(SUFFIXES)}")
    return path


def _download(spec: str, hub: HubConfig) -> Path:
    parts = spec[3:].split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise DataError(
            f"data set {spec!r} must look like {spec[:3]}org/name or {spec[:3]}org/name/file.jsonl"
        )
    folder = download_dataset(spec[:2], "/".join(parts[:2]), hub)
    if len(parts) > 2:
        # Not resolved: in the Hugging Face cache a file is a link to a blob outside the snapshot's folder.
        inside = Path(*parts[2:]) if all(parts[2:]) else Path("..")
        if inside.is_absolute() or ".." in inside.parts or not (folder / inside).is_file():
            raise DataError(f"data set {spec!r}: no file {'/'.join(parts[2:])} in it")
        return folder / inside
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    train = [p for p in files if p.stem == "train"]
    found = train if len(train) == 1 else files
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in files) or "none"
        raise DataError(f"data set {spec!r}: name one of its files, as in {spec}/FILE; it holds: {names}")
    return found[0]


def download_dataset(
    hub_name: str, repo: str, hub: HubConfig, local_dir: str | None = None, files: list[str] | None = None
) -> Path:
    """Fetch a data set repository with its hub's own client.

    Args:
        hub_name: `ms` or `hf`.
        repo: `org/name`.
        local_dir: where to put the files; the hub's cache when None.
        files: patterns of the files wanted; all when None.

    Raises:
        HubError: the hub cannot be reached or has no such repository.
    """
    try:
        if hub_name == "ms":
            from modelscope import snapshot_download as ms_download

            return Path(
                ms_download(
                    repo,
                    repo_type="dataset",
                    cache_dir=hub.cache_dir,
                    local_dir=local_dir,
                    allow_patterns=files,
                )
            )
        from huggingface_hub import snapshot_download as hf_download

        return Path(
            hf_download(
                repo, repo_type="dataset", cache_dir=hub.cache_dir, local_dir=local_dir, allow_patterns=files
            )
        )
    except Exception as error:
        raise HubError(
            f"data set {repo} could not be fetched from {'ModelScope' if hub_name == 'ms' else 'Hugging Face'} "
            f"({first_line(error)}). Check the name and the network, "
            "or download the file by hand and give its path as data.train"
        ) from error


def iter_records(path: Path) -> Iterator[Record]:
    """Stream a file; faults of single lines are yielded, in place, as records without values."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _iter_csv(path)
    elif suffix == ".parquet":
        yield from _iter_parquet(path)
    else:
        yield from json_records(str(path), _iter_lines(path))


class LongLine(bytes):
    """The beginning of a line that is longer than `MAX_LINE_BYTES`; `size` is that of the whole line in bytes."""

    size = 0


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, of which none is held in memory beyond `MAX_LINE_BYTES`; longer ones come as `LongLine`."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        rest = 0
        ended = False
        while not ended and (more := file.readline(1 << 20)):
            rest += len(more)
            ended = more.endswith(b"\n")
        if not rest:
            yield line
            continue
        long = LongLine(line[:1000])
        long.size = len(line) + rest
        yield long


def decoded_lines(
    name: str, lines: Iterable[bytes], number: int = 1, offset: int = 0
) -> Iterator[tuple[int, str | Record]]:
    """Lines with their numbers, decoded. A line that is too long becomes a record; so does one that is not UTF-8, and that
    ends the file.

    Args:
        name: the file's name for messages.
        lines: as `bounded_lines` gives them.
        number: of the first line.
        offset: bytes before it.
    """
    for at, raw in enumerate(lines, start=number):
        if isinstance(raw, LongLine):
            problem = (
                f"the line has {raw.size} bytes, and a row may have {MAX_LINE_BYTES}; split the document"
            )
            yield at, Record(f"{name}:{at}", None, "unparsable_line", problem)
            offset += raw.size
            continue
        if at == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield at, _encoding_fault(name, at, 0, "the file is UTF-16", "UTF-16")
            return
        if at == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw, offset = raw[3:], 3
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield at, _encoding_fault(name, at, offset + error.start, "not valid UTF-8")
            return
        yield at, text
        offset += len(raw)


def _iter_lines(path: Path) -> Iterator[tuple[int, str | Record]]:
    with path.open("rb") as file:
        yield from decoded_lines(str(path), bounded_lines(file))


def _encoding_fault(name: str, line: int, offset: int, what: str, encoding: str = "GB18030") -> Record:
    last = name.replace("\\", "/").rpartition("/")[2]
    fix = f"convert it with: iconv -f {encoding} -t UTF-8 {last} (or from whatever encoding it has)"
    return Record(
        f"{name}:{line}", None, "encoding", f"{what} at byte {offset}; {fix}; the rest was not read"
    )


def json_records(
    name: str, lines: Iterable[tuple[int, str | Record]], first: bool = True
) -> Iterator[Record]:
    """Decoded lines -> records.

    Args:
        first: no record stands before these lines.
    """
    for number, line in lines:
        where = f"{name}:{number}"
        if isinstance(line, Record):
            yield line
            if line.kind == "encoding":
                return
            first = False
            continue
        if not line or line.isspace():
            continue
        if first and is_json_array(name, line):
            yield Record(
                where, None, "unparsable_line", "a JSON array; write one JSON object a line (jsonl) instead"
            )
            return
        first = False
        try:
            values = _decoder().decode(line)
        except (ValueError, RecursionError) as error:
            yield Record(where, None, "unparsable_line", f"not valid JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Record(where, values)
        else:
            yield Record(
                where, None, "unparsable_line", f"a JSON object is expected, not a {type(values).__name__}"
            )


def is_json_array(name: str, first_line: str) -> bool:
    """Whether a file is one JSON array, by its name and its first line that is not blank; it is read no further."""
    return name.lower().endswith(".json") and first_line.lstrip().startswith("[")


@lru_cache(maxsize=1)
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; json would keep the last of equal ones in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


class _DecodedLines:
    """Feeds csv with checked lines, and remembers the fault that ended them.

    Attributes:
        room: characters that the current row may still have; without it a quote that is never closed reads the whole file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = _iter_lines(path)
        self.fault: Record | None = None
        self.room = MAX_LINE_BYTES

    def __iter__(self) -> _DecodedLines:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        if isinstance(line, Record):
            self.fault = line
            raise StopIteration
        self.room -= len(line)
        if self.room < 0:
            raise csv.Error(
                f"the row has more than {MAX_LINE_BYTES} characters; perhaps a quote is not closed"
            )
        return line


def _iter_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    lines = _DecodedLines(path)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        lines.room = MAX_LINE_BYTES
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if lines.fault is not None:
                break
            yield Record(where, None, "unparsable_line", f"not valid CSV: {error}; the rest was not read")
            return
        if not row:
            continue
        if header is None:
            header = row
            twice = next((name for i, name in enumerate(row) if name in row[:i]), None)
            if twice is not None:
                problem = f"two columns are called {twice!r}; rename one"
                yield Record(where, None, "unparsable_line", f"{problem}; the rest was not read")
                return
        elif len(row) != len(header):
            yield Record(
                where,
                None,
                "unparsable_line",
                f"the header names {len(header)} columns, this row has {len(row)}",
            )
        else:
            yield Record(where, dict(zip(header, row, strict=True)))
    if lines.fault is not None:
        yield lines.fault


def _iter_parquet(path: Path) -> Iterator[Record]:
    import pyarrow

    from labeltune.data.parquet import parquet_records

    row = 0
    try:
        for record in parquet_records(str(path), path):
            row += 1
            yield record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Record(f"{path}:row {row + 1}", None, "unparsable_line", f"not readable parquet: {error}")
