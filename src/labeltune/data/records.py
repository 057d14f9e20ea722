"""Raw rows, each with its place in the file; the lines of a text file, and the rows that stand in them as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

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
