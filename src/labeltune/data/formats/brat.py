"""brat's standoff: a text in `NAME.txt` and its annotations in `NAME.ann`; a folder of such pairs, or of folders of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from labeltune.data.formats.base import LeftOut, Reader, Reading, Unreadable, each, entity
from labeltune.data.records import Record
from labeltune.errors import printable

#: What the letters of brat's lines stand for, beside T for an entity.
_OTHERS = {
    "R": "relations",
    "E": "events",
    "A": "attributes",
    "M": "attributes",
    "N": "normalizations",
    "*": "relations",
    "#": "notes",
}
_ENTITY = re.compile(r"T\S*\t(\S+) (\d+ \d+(?:;\d+ \d+)*)\t(.*)", re.DOTALL)


def is_brat(path: Path) -> bool:
    """Whether a path is a folder of annotated texts, or one of the two files of one."""
    if path.is_dir():
        return any(_of_folder(path, ".ann"))
    return path.suffix.lower() in (".ann", ".txt") and path.with_suffix(".ann").is_file()


def _of_folder(folder: Path, suffix: str) -> Iterator[Path]:
    """Files of a folder and of the folders in it, as a collection has them for training and test."""
    yield from folder.glob(f"*{suffix}")
    yield from folder.glob(f"*/*{suffix}")


def brat_records(path: Path) -> Iterator[Record]:
    """A record a text, with its annotations as lines: `name`, `text` and `lines`; texts of a folder in the order of their names, which
    tell the folder within it."""
    names = (
        {each.with_suffix("") for suffix in (".ann", ".txt") for each in _of_folder(path, suffix)}
        if path.is_dir()
        else {path.with_suffix("")}
    )
    for stem in sorted(names):
        ann, txt = stem.with_name(f"{stem.name}.ann"), stem.with_name(f"{stem.name}.txt")
        name = stem.relative_to(path).as_posix() if path.is_dir() else stem.name
        where = f"{printable(str(ann))}:1"
        if not txt.is_file():
            yield Record(
                where,
                None,
                "unparsable_line",
                f"there is no {printable(txt.name)} beside it",
                whole=not path.is_dir(),
            )
            continue
        try:
            text = txt.read_bytes().decode("utf-8-sig")
            lines = ann.read_bytes().decode("utf-8-sig").split("\n") if ann.is_file() else None
        except UnicodeDecodeError as error:
            yield Record(
                where,
                None,
                "encoding",
                f"{printable(txt.name)} or it is not valid UTF-8 at byte {error.start}",
            )
            continue
        yield Record(f"{printable(str(txt))}:1", {"name": name, "text": text, "lines": lines})


def _text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return {"id": row["name"], "text": row["text"].rstrip("\r\n")}


def _answer(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    text = str(found["text"])
    if row["lines"] is None:
        left_out["texts without annotations"] += 1
        return None
    entities = []
    for number, ended in enumerate(row["lines"], start=1):
        line = ended.rstrip("\r")
        if not line.strip():
            continue
        if line[0] in _OTHERS:
            left_out[_OTHERS[line[0]]] += 1
            continue
        match = _ENTITY.fullmatch(line)
        if match is None:
            raise Unreadable(
                "unparsable_line", f"line {number} of {row['name']}.ann is none of brat's: {line[:60]!r}"
            )
        if ";" in match[2]:
            left_out["discontinuous entities"] += 1
            continue
        start, end = (int(at) for at in match[2].split())
        # In the .ann file a line break of the text is a blank.
        same = text[start:end].replace("\r", " ").replace("\n", " ") == match[3]
        entities.append(entity(text, start, end, match[1], None if same else match[3]))
    return {"entities": entities}


READERS = (Reader("brat", "brat", lambda rows: False, each(_text, _answer)),)
