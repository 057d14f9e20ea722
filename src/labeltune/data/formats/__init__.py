"""Rows of other tools -> our rows: one reader a format, found by the content of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from labeltune.data.formats import brat, chats, chinese, docbin, doccano, label_studio, prodigy, tags
from labeltune.data.formats.base import FOR_ANY_TASK, LeftOut, Reader, Reading
from labeltune.data.records import Record
from labeltune.io.progress import note

__all__ = ["FOR_ANY_TASK", "LOOKED_AT", "READERS", "Reading", "read_as", "recognise"]

#: By name; of two that recognise a file the first is taken.
READERS: dict[str, Reader] = {
    reader.name: reader
    for module in (label_studio, prodigy, chinese, tags, doccano, chats, brat, docbin)
    for reader in module.READERS
}
#: Rows that are looked at.
LOOKED_AT = 50


def recognise(rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of the format of a file's first rows; empty where they are rows of ours."""
    return next((reader.name for reader in READERS.values() if reader.recognises(rows)), "")


def read_as(format_name: str, name: str, records: Iterable[Record], reading: Reading) -> Iterator[Record]:
    """Raw records of a format -> our rows, under the usual names of columns; what was left out is said at the end.

    Args:
        format_name: of one of `READERS`.
        name: the file's name for messages.
    """
    reader, left_out = READERS[format_name], LeftOut()
    told = reading.told and reading.task is not None
    if told:
        note(f"{name}: read as {reader.title}")
    try:
        for record in reader.read(records, reading, left_out):
            if record.values is None:
                yield record
            else:
                yield Record(
                    record.where, {k: v for k, v in record.values.items() if v is not None}, ours=True
                )
    finally:
        # Also where only the first rows are taken.
        for what, number in sorted(left_out.items()) if told else ():
            if number:
                note(f"{name}: left out: {what} ({number})")
