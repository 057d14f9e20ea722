"""JSON that goes over lines: an array, an object that holds a list of rows, or objects one after the other; a row at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

from labeltune.data import records
from labeltune.data.formats import DAMAGED, ROW_LISTS, is_row, row_lists
from labeltune.data.records import Record

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
                yield from _elements(name, text)
            elif begins == "{":
                yield from _object(name, text)
                if text.next() == ",":  # objects one after the other, as they stand in an array
                    text.take(",")
            else:
                raise ValueError("a JSON object or array is expected")
    except UnicodeDecodeError as error:
        line = text.line + text.rest().count("\n")
        yield records.encoding_fault(name, line, text.bytes + error.start, encoding)
    except (ValueError, RecursionError) as error:
        where = f"{name}:{error.line if isinstance(error, _NoJson) else text.line}"
        yield Record(where, None, "unparsable_line", f"not valid JSON: {error}; the rest was not read")


class _NoJson(ValueError):
    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def _elements(name: str, text: _Text) -> Iterator[Record]:
    """The rows of an array, of which the bracket comes next."""
    text.take("[")
    if text.next() == "]":
        text.take("]")
        return
    while True:
        text.next()
        where = f"{name}:{text.line}"
        value = text.value()
        if isinstance(value, dict):
            yield Record(where, value)
        else:
            problem = f"a JSON object is expected, not a {type(value).__name__}"
            yield Record(where, None, "unparsable_line", problem)
        if text.next() != ",":
            text.take("]")
            return
        text.take(",")


def _object(name: str, text: _Text) -> Iterator[Record]:
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
            yield from _elements(name, text)
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
                found, end = records.json_decoder().raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                line = self.line + self._held.count("\n", self.at, error.pos)
                if len(self._held) - self.at > records.MAX_LINE_BYTES or not self._more():
                    raise _NoJson(error.msg, line) from None
                continue
            size = end - self.at
            if end == len(self._held) and self._more():
                continue  # a number may go on
            if size > records.MAX_LINE_BYTES:
                raise ValueError(f"the row has more than {records.MAX_LINE_BYTES} characters")
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
