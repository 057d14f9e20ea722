"""Raw rows, each with its place in the file: the lines of a text file, JSON in them, and JSON that goes over lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from labeltune.data.containers import DAMAGED, ROW_LISTS, iconv, is_row, row_lists

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
        ours: its columns have their usual names, whatever the config calls those of files.
    """

    where: str
    values: dict[str, Any] | None
    kind: str = ""
    problem: str = ""
    whole: bool = False
    ours: bool = False


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
            yield at, _encoding_fault(name, at, "the file is UTF-16", "UTF-16")
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
        return _encoding_fault(name, line, f"not valid UTF-8 at byte {offset}")
    fix = _encoding_fix(name, "utf-8", encoding)
    return Record(f"{name}:{line}", None, "encoding", f"not valid {encoding}; {fix}; the rest was not read")


def _encoding_fault(name: str, line: int, what: str, encoding: str = "GB18030") -> Record:
    fix = _encoding_fix(name, encoding)
    return Record(f"{name}:{line}", None, "encoding", f"{what}; {fix}; the rest was not read")


def _encoding_fix(name: str, encoding: str, wanted: str = "utf-8") -> str:
    return (
        f"set data.encoding={encoding.lower()}, or convert it with: {iconv(name, encoding, wanted)} "
        "(or from whatever encoding it has)"
    )


_KEY = re.compile(r"set data\.encoding=([\w-]+), or (?=convert it with: iconv)")
_COLUMN_KEY = re.compile(
    r"add .*data\.columns\..* to the command(, where COLUMN is its name in the file)?, or (?=rename th)"
)


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
        yield _row(where, values)


def _row(where: str, value: object) -> Record:
    """A JSON value that stands where a row does."""
    if isinstance(value, dict):
        return Record(where, value)
    problem = f"a JSON object is expected, not a {type(value).__name__}"
    return Record(where, None, "unparsable_line", problem)


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


_BLANKS = " \t\r\n"


def value_records(name: str, chunks: Iterable[bytes], encoding: str = "utf-8") -> Iterator[Record]:
    """The rows, each at the line where it begins; what is no JSON ends the file with a record that says so.

    Args:
        name: the file's name for messages.
        chunks: its content, as UTF-8.
        encoding: what it was before, for messages.
    """
    text = _Text(chunks)
    try:
        while begins := text.next():
            if begins == "[":
                yield from _array_rows(name, text)
            elif begins == "{":
                yield from _object_rows(name, text)
                if text.next() == ",":  # objects one after the other, as they stand in an array
                    text.take(",")
            else:
                raise ValueError("a JSON object or array is expected")
    except UnicodeDecodeError as error:
        line = text.line + text.rest().count("\n")
        yield encoding_fault(name, line, text.bytes + error.start, encoding)
    except (ValueError, RecursionError) as error:
        where = f"{name}:{error.line if isinstance(error, _NoJson) else text.line}"
        yield Record(where, None, "unparsable_line", f"not valid JSON: {error}; the rest was not read")


class _NoJson(ValueError):
    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def _array_rows(name: str, text: _Text) -> Iterator[Record]:
    """The rows of an array, of which the bracket comes next."""
    text.take("[")
    if text.next() == "]":
        text.take("]")
        return
    while True:
        text.next()
        where = f"{name}:{text.line}"
        yield _row(where, text.value())
        if text.next() != ",":
            text.take("]")
            return
        text.take(",")


def _object_rows(name: str, text: _Text) -> Iterator[Record]:
    """A row; or the rows of the list that the object holds, one at a time."""
    where = f"{name}:{text.line}"
    lists: list[str] | None = None
    try:
        whole, size = text.parsed()
    except (ValueError, RecursionError, *DAMAGED):
        pass  # longer than a row may be, or something is wrong further down
    else:
        lists = row_lists(whole)
        if not lists:
            text.advance(size)
            yield Record(where, whole)
            return
        del whole
    values: dict[str, Any] = {}
    list_name = ""
    text.take("{")
    while text.next() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise ValueError("a key is expected")
        if key in values:
            raise ValueError(f"the key {key!r} stands twice in an object")
        text.next()
        text.take(":")
        holds_rows = key in lists if lists is not None else key.lower() in ROW_LISTS and not is_row(values)
        if text.next() == "[" and holds_rows:
            if list_name:
                raise ValueError(
                    f"it holds two lists of rows, {list_name!r} and {key!r}; write a file for each"
                )
            list_name = key
            yield from _array_rows(name, text)
            values[key] = None
        else:
            values[key] = text.value()
        if text.next() != ",":
            break
        text.take(",")
        if text.next() == "}":
            raise ValueError("a key is expected behind a comma")
    text.take("}")
    if not list_name:
        yield Record(where, values)


class _Text:
    """A text of which no more is held than a row.

    Attributes:
        at: place in what is held.
        line: its line in the file, from 1.
        bytes: bytes that were decoded.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._held = ""
        self._ended = False
        self._failed: Exception | None = None
        self.at, self.line, self.bytes = 0, 1, 0

    def rest(self) -> str:
        """What is held and not taken."""
        return self._held[self.at :]

    def next(self) -> str:
        """The next character that is not blank, not taken; empty at the end."""
        while True:
            end = self.at
            while end < len(self._held) and self._held[end] in _BLANKS:
                end += 1
            self.advance(end - self.at)
            if end < len(self._held):
                return self._held[end]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Take the next character.

        Raises:
            ValueError: it is another one.
        """
        if self.next() != character:
            raise ValueError(f"{character!r} is expected, not {self.next()!r}")
        self.advance(1)

    def value(self) -> Any:
        """Take the next value; raises as `parsed` does."""
        found, size = self.parsed()
        self.advance(size)
        return found

    def parsed(self) -> tuple[Any, int]:
        """The next value and its characters, not taken.

        Raises:
            ValueError: it is no JSON, or longer than a row may be.
            RecursionError: it is nested too deeply.
        """
        self.next()
        while True:
            try:
                found, end = json_decoder().raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                line = self.line + self._held.count("\n", self.at, error.pos)
                if len(self._held) - self.at > MAX_LINE_BYTES or not self._more():
                    raise _NoJson(error.msg, line) from None
                continue
            size = end - self.at
            if end == len(self._held) and self._more():
                continue  # a number may go on
            if size > MAX_LINE_BYTES:
                raise ValueError(f"the row has more than {MAX_LINE_BYTES} characters")
            return found, size

    def advance(self, size: int) -> None:
        """Take so many characters."""
        self.line += self._held.count("\n", self.at, self.at + size)
        self.at += size

    def _more(self) -> bool:
        """Read on; as much again as is held, so that a long value is not looked at too often.

        What fails, fails again each time: what was read before stays.
        """
        if self._failed is not None:
            raise self._failed
        if self._ended:
            return False
        parts = [self._held[self.at :]]
        wanted = max(1, len(parts[0]))
        try:
            while wanted > 0 and not self._ended:
                raw = next(self._chunks, None)
                self._ended = raw is None
                part = self._decoder.decode(raw or b"", self._ended)
                if self.bytes == 0:
                    part = part.removeprefix("\ufeff")
                self.bytes += len(raw or b"")
                parts.append(part)
                wanted -= len(part)
        except Exception as error:
            self._failed = error
            raise
        finally:
            self._held, self.at = "".join(parts), 0
        return len(self._held) > len(parts[0])
