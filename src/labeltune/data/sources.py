"""Files and hub data sets -> raw records, one at a time, each with its place in the file."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from labeltune.config import HubConfig
from labeltune.data.formats import DAMAGED, SUFFIXES, Format, find_format, is_data_file, opened
from labeltune.errors import DataError, first_line, near_it, printable
from labeltune.hubs import asking
from labeltune.untrusted import check_inside

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
        whole: the fault is one of the file, of which nothing can be read.
    """

    where: str
    values: dict[str, Any] | None
    kind: str = ""
    problem: str = ""
    whole: bool = False


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
    _check_file(path, printable(spec))
    return path


def _check_file(path: Path, spec: str) -> None:
    """Raise why a path is no file of data; nothing is opened, as a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(
            f"data file {spec} does not exist (looked in {printable(str(Path.cwd()))}). Give another path"
            f"{near_it(path, lambda each: is_data_file(each.name))}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data file {spec} cannot be read: {reason}") from None
    endings = ", ".join(SUFFIXES)
    if stat.S_ISDIR(mode):
        raise DataError(f"data file {spec} is a folder; name a file in it, which ends in {endings}")
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(f"data file {spec} is {what}; write its rows to a file that ends in {endings}")
    if not is_data_file(path.name):
        raise DataError(f"data file {spec} must end in {endings}")
    if not os.access(path, os.R_OK):
        raise DataError(f"data file {spec} cannot be read: permission denied")


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
    files = sorted(p for p in folder.rglob("*") if is_data_file(p.name))
    train = [p for p in files if p.name.partition(".")[0] == "train"]
    found = train if len(train) == 1 else files
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in files) or "none"
        raise DataError(f"data set {spec!r}: name one of its files, as in {spec}/FILE; it holds: {names}")
    return found[0]


def download_dataset(
    hub_name: str,
    repo: str,
    hub: HubConfig,
    local_dir: str | None = None,
    files: list[str] | None = None,
    instead: str = "give the path of the one with the rows in place of the data set",
) -> Path:
    """Fetch a data set repository with its hub's own client.

    Args:
        hub_name: `ms` or `hf`.
        repo: `org/name`.
        local_dir: where to put the files; the hub's cache when None.
        files: patterns of the files wanted; all when None.
        instead: what to do with files that were downloaded by hand, for the error.

    Raises:
        HubError: the hub cannot be reached or has no such repository.
    """
    with asking(hub_name, "dataset", repo, instead):
        folder = _fetch_dataset(hub_name, repo, hub, local_dir, files)
    if local_dir is None:
        check_inside(folder, f"{hub_name}:{repo}")
    return folder


def _fetch_dataset(
    hub_name: str, repo: str, hub: HubConfig, local_dir: str | None, files: list[str] | None
) -> Path:
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


def iter_records(path: Path, encoding: str = "utf-8") -> Iterator[Record]:
    """Stream a file; faults of single lines are yielded, in place, as records without values.

    Args:
        encoding: of a text file.
    """
    name = printable(str(path))
    with path.open("rb") as file:
        form = find_format(path.name, file, encoding)
        if form.kind == "parquet" and not form.problem:
            yield from _iter_parquet(path, name)
        else:
            yield from records_of(name, file, form)


def records_of(name: str, file: BinaryIO, form: Format) -> Iterator[Record]:
    """The records of an open file that is no parquet.

    Args:
        name: the file's name for messages.
        form: as `find_format` says.
    """
    if form.problem:
        yield Record(f"{name}:1", None, "unparsable_line", form.problem, whole=True)
        return
    from labeltune.data.json_values import value_records
    from labeltune.data.tables import sheet_records, table_records

    if form.kind == "sheet":
        yield from sheet_records(name, file)
        return
    text = opened(file, form)
    last: Record | None = None
    try:
        if form.kind == "json":
            chunks = iter(lambda: text.read(1 << 16), b"")
            records = value_records(name, chunks, form.encoding)
        else:
            lines = decoded_lines(name, bounded_lines(text), encoding=form.encoding)
            records = (
                json_records(name, lines)
                if form.kind == "lines"
                else table_records(name, lines, form.delimiter)
            )
        for record in records:
            last = record
            yield record
    except DAMAGED as error:
        line = int(last.where.rpartition(":")[2].removeprefix("row ")) + 1 if last else 1
        problem = f"the gzip data is damaged ({first_line(error)}); the rest was not read"
        yield Record(f"{name}:{line}", None, "unparsable_line", problem, whole=last is None)


class LongLine(bytes):
    """The beginning of a line that is longer than `MAX_LINE_BYTES`; `size` is that of the whole line in bytes."""

    size = 0


class Lines(Protocol):
    """What lines are read from."""

    def readline(self, limit: int, /) -> bytes:
        """The next line, or as much of it as `limit` bytes."""


def bounded_lines(file: Lines) -> Iterator[bytes]:
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
    name: str, lines: Iterable[bytes], number: int = 1, offset: int = 0, encoding: str = "utf-8"
) -> Iterator[tuple[int, str | Record]]:
    """Lines with their numbers, decoded. A line that is too long becomes a record; so does one that is not UTF-8, and that
    ends the file.

    Args:
        name: the file's name for messages.
        lines: as `bounded_lines` gives them.
        number: of the first line.
        offset: bytes before it.
        encoding: what the lines were before they were UTF-8, for messages.
    """
    for at, raw in enumerate(lines, start=number):
        if isinstance(raw, LongLine):
            problem = (
                f"the line has {raw.size} bytes, and a row may have {MAX_LINE_BYTES}; split the document"
            )
            yield at, Record(f"{name}:{at}", None, "unparsable_line", problem)
            offset += raw.size
            continue
        if at == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff") and encoding == "utf-8":
            yield at, _encoding_fault(name, at, 0, "the file is UTF-16", "UTF-16")
            return
        if at == 1 and raw.startswith(b"\xef\xbb\xbf"):
            raw, offset = raw[3:], 3
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield at, encoding_fault(name, at, offset + error.start, encoding)
            return
        yield at, text
        offset += len(raw)


def encoding_fault(name: str, line: int, offset: int, encoding: str = "utf-8") -> Record:
    """What is not valid in the encoding that the file should have.

    Args:
        offset: of the first wrong byte; not told where the encoding is not UTF-8.
    """
    if encoding == "utf-8":
        return _encoding_fault(name, line, offset, "not valid UTF-8")
    fix = _encoding_fix(name, "utf-8", encoding)
    return Record(f"{name}:{line}", None, "encoding", f"not valid {encoding}; {fix}; the rest was not read")


def _encoding_fault(name: str, line: int, offset: int, what: str, encoding: str = "GB18030") -> Record:
    fix = _encoding_fix(name, encoding)
    return Record(
        f"{name}:{line}", None, "encoding", f"{what} at byte {offset}; {fix}; the rest was not read"
    )


def _encoding_fix(name: str, encoding: str, wanted: str = "utf-8") -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    return (
        f"set data.encoding={encoding.lower()}, or convert it with: iconv -f {encoding.upper()} -t {wanted.upper()} {last} "
        "(or from whatever encoding it has)"
    )


_KEY = re.compile(r"set data\.encoding=([\w-]+), or (?=convert it with: iconv)")
_COLUMN_KEY = re.compile(r"add .*data\.columns\..* to the command, or (?=rename th)")


def without_key(message: str, option: str | None = None) -> str:
    """A message about an encoding or columns for a command where no key can be set: it names the command's `option` instead,
    and how to go on without.

    >>> without_key("x; set data.encoding=gb18030, or convert it with: iconv -f ...", "--encoding")
    'x; give --encoding gb18030, or convert it with: iconv -f ...'
    """
    told = _KEY.sub(rf"give {option} \1, or " if option is not None else "", message)
    return _COLUMN_KEY.sub("", told)


def json_records(name: str, lines: Iterable[tuple[int, str | Record]]) -> Iterator[Record]:
    """Decoded lines -> records."""
    for number, line in lines:
        where = f"{name}:{number}"
        if isinstance(line, Record):
            yield line
            if line.kind == "encoding":
                return
            continue
        if not line or line.isspace():
            continue
        try:
            values = json_decoder().decode(line)
        except (ValueError, RecursionError) as error:
            at = f" (column {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            yield Record(where, None, "unparsable_line", f"not valid JSON: {reason}{at}")
            continue
        if isinstance(values, dict):
            yield Record(where, values)
        else:
            yield Record(
                where, None, "unparsable_line", f"a JSON object is expected, not a {type(values).__name__}"
            )


@lru_cache(maxsize=1)
def json_decoder() -> json.JSONDecoder:
    """Reads objects whose keys are all different."""
    return json.JSONDecoder(object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; json would keep the last of equal ones in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _iter_parquet(path: Path, name: str) -> Iterator[Record]:
    from labeltune.data.parquet import iter_rows

    return parquet_records(name, iter_rows(path, MAX_LINE_BYTES))


def parquet_records(name: str, rows: Iterable[dict[str, Any] | str], first: int = 0) -> Iterator[Record]:
    """Rows of `labeltune.data.parquet` as records.

    Args:
        name: the file's name for messages.
        first: number of the first row, from 0.
    """
    for row, values in enumerate(rows, start=first + 1):
        if isinstance(values, dict):
            yield Record(f"{name}:row {row}", values)
        else:
            yield Record(f"{name}:row {row}", None, "unparsable_line", values)
