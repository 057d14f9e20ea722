"""Files and data sets of hubs, the original recipe's among them -> raw records, one at a time."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from labeltune.config import HubConfig
from labeltune.data.containers import DAMAGED, SUFFIXES, TOOLS, Format, find_format, is_data_file, opened
from labeltune.data.formats import FOR_ANY_TASK, LOOKED_AT, READERS, Reading, read_as, recognise
from labeltune.data.formats.brat import brat_records, is_brat
from labeltune.data.formats.docbin import docbin_records
from labeltune.data.formats.tags import looks_tagged, tagged_records
from labeltune.data.records import (
    Record,
    bounded_lines,
    decoded_lines,
    json_records,
    value_records,
)
from labeltune.data.tables import parquet_records, sheet_records, table_records
from labeltune.errors import DataError, HubError, first_line, near_it, printable
from labeltune.io.hubs import fetch
from labeltune.io.outputs import check_folder, is_hub_name, open_whole

#: Bytes of a file of words with tags, and characters of rows, that are looked at.
_HEAD = 1 << 16
#: Characters at either end of a text that are looked at where a tool is looked for.
_TEXT = 1000


def resolve_data(spec: str, hub: HubConfig | None = None) -> Path:
    """A data spec -> a local file.

    `spec` is a path, or `ms:org/name[/file]` (ModelScope) or `hf:org/name[/file]` (Hugging Face); a hub data set is
    downloaded by the hub's own client, and no code of it is run.

    Raises:
        DataError: the file does not exist, has an unknown suffix, or the data set holds several candidates.
        HubError: the hub cannot be reached.
    """
    if is_hub_name(spec):
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
    if is_brat(path):
        return
    if stat.S_ISDIR(mode):
        raise DataError(f"data file {spec} is a folder; name a file in it, which ends in {endings}")
    if not stat.S_ISREG(mode):
        what = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(f"data file {spec} is {what}; write its rows to a file that ends in {endings}")
    if not is_data_file(path.name) and not path.name.lower().endswith(TOOLS):
        raise DataError(f"data file {spec} must end in {endings}")
    if not os.access(path, os.R_OK):
        raise DataError(f"data file {spec} cannot be read: permission denied")


def _download(spec: str, hub: HubConfig) -> Path:
    parts = spec[3:].split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise DataError(
            f"data set {spec!r} must look like {spec[:3]}org/name or {spec[:3]}org/name/file.jsonl"
        )
    folder = fetch(
        spec[:2],
        "dataset",
        "/".join(parts[:2]),
        "give the path of the one with the rows in place of the data set",
        cache_dir=hub.cache_dir,
    )
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


def iter_records(path: Path, encoding: str = "utf-8", reading: Reading = FOR_ANY_TASK) -> Iterator[Record]:
    """Stream a file, or a folder of brat's; faults of single lines are yielded, in place, as records without values.

    Args:
        encoding: of a text file.
        reading: what rows of an annotation tool are read for.
    """
    name = printable(str(path))
    if reading.format in ("auto", "brat") and is_brat(path):
        yield from read_as("brat", name, brat_records(path), reading)
        return
    with path.open("rb") as file:
        form = find_form(name, file, encoding, reading)
        if form.readable_parquet:
            yield from _iter_parquet(path, name, reading.classes)
        else:
            yield from records_of(name, file, form, reading)


def find_form(name: str, file: BinaryIO, encoding: str = "utf-8", reading: Reading = FOR_ANY_TASK) -> Format:
    """What an open file is, and the tool whose rows it holds; it is positioned at its beginning again.

    Args:
        name: ends in one of `SUFFIXES` or `TOOLS`.
        reading: its `format` names the tool; by the content where that is `auto`.
    """
    form, wanted = find_format(name, file, encoding), reading.format
    if wanted == "conll" and form.kind in ("lines", "json", "table"):
        form = replace(form, kind="tagged", problem="")
    if form.problem:
        return form
    if form.kind == "docbin":
        return replace(form, tool="spacy")
    if form.kind == "tagged":
        head = opened(file, form).read(_HEAD).decode("utf-8", "replace")
        file.seek(0)
        if wanted == "conll" or looks_tagged(head):
            return replace(form, tool="conll")
        how = "a word, a blank or tab and a tag such as B-PER on each line, a blank line between sentences"
        return replace(form, problem=f"it is plain text, not {how}; write its documents as jsonl, or csv")
    if wanted == "rows":
        return form
    if wanted in ("brat", "spacy"):
        return replace(form, problem=f"it is none of {READERS[wanted].title}'s files; leave data.format out")
    if wanted != "auto":
        return replace(form, tool=wanted)
    try:
        tool = recognise(_first_values(_raw_records(name, file, form)))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        tool = ""  # a damaged file: reading its rows says where
    file.seek(0)
    return replace(form, tool=tool)


def _first_values(records: Iterator[Record]) -> list[dict[str, Any]]:
    """The first rows that can be read, without the rest of long texts; fewer where they are large."""
    found: list[dict[str, Any]] = []
    size = 0
    for record in islice(records, LOOKED_AT):
        if record.values is not None:
            size += sum(len(value) for value in record.values.values() if isinstance(value, str | list))
            found.append({k: _short(v) if isinstance(v, str) else v for k, v in record.values.items()})
        if size > _HEAD:
            break
    return found


def _short(text: str) -> str:
    """Its beginning and its end."""
    return text if len(text) <= 2 * _TEXT else f"{text[:_TEXT]}\n{text[-_TEXT:]}"


def records_of(name: str, file: BinaryIO, form: Format, reading: Reading = FOR_ANY_TASK) -> Iterator[Record]:
    """The records of an open file that is no parquet of rows.

    Args:
        name: the file's name for messages.
        form: as `find_form` says.
    """
    found = _raw_records(name, file, form)
    yield from read_as(form.tool, name, found, reading) if form.tool else found


def _raw_records(name: str, file: BinaryIO, form: Format) -> Iterator[Record]:
    """What stands in a file, as it stands there."""
    if form.problem:
        yield Record(f"{name}:1", None, "unparsable_line", form.problem, whole=True)
        return
    if form.kind == "sheet":
        yield from sheet_records(name, file)
        return
    if form.kind == "docbin":
        yield from docbin_records(name, file)
        return
    if form.kind == "parquet":
        yield from parquet_records(name, file)
        return
    text = opened(file, form)
    last: Record | None = None
    try:
        if form.kind == "json":
            chunks = iter(lambda: text.read(1 << 16), b"")
            found = value_records(name, chunks, form.encoding)
        else:
            lines = decoded_lines(name, bounded_lines(text), encoding=form.encoding)
            found = _of_lines(name, lines, form)
        for record in found:
            last = record
            yield record
    except DAMAGED as error:
        line = int(last.where.rpartition(":")[2].removeprefix("row ")) + 1 if last else 1
        problem = f"the gzip data is damaged ({first_line(error)}); the rest was not read"
        yield Record(f"{name}:{line}", None, "unparsable_line", problem, whole=last is None)


def _of_lines(name: str, lines: Iterator[tuple[int, str | Record]], form: Format) -> Iterator[Record]:
    if form.kind == "tagged":
        return tagged_records(name, lines)
    return json_records(name, lines) if form.kind == "lines" else table_records(name, lines, form.delimiter)


def _iter_parquet(path: Path, name: str, classes: tuple[str, ...] | None) -> Iterator[Record]:
    row = 0
    try:
        for row, record in enumerate(parquet_records(name, path, classes=classes), start=1):  # noqa: B007
            yield record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Record(f"{name}:row {row + 1}", None, "unparsable_line", f"not readable parquet: {error}")


#: name -> (hub, repository, {file name in the repository: file name the scripts expect})
ORIGINALS = {
    "fudan": ("ms", "swift/zh_cls_fudan-news", {"train.jsonl": "train.jsonl", "test.jsonl": "test.jsonl"}),
    "ccfbdci": ("hf", "qgyd2021/chinese_ner_sft", {"ccfbdci.jsonl": "ccfbdci.jsonl"}),
}


def download_original(name: str, folder: Path) -> list[Path]:
    """Fetch one of `ORIGINALS` into a folder; existing files are left alone.

    Raises:
        DataError: the name is unknown.
        HubError: the hub cannot be reached, or the repository has changed.
        OutputError: the folder cannot be written.
    """
    if name not in ORIGINALS:
        raise DataError(f"unknown data set {name!r}; there are: {', '.join(ORIGINALS)}")
    hub_name, repo, files = ORIGINALS[name]
    targets = [folder / target for target in files.values()]
    check_folder(folder, [], files.values())
    if all(target.exists() for target in targets):
        return targets
    with tempfile.TemporaryDirectory() as temporary:
        fetched = fetch(
            hub_name,
            "dataset",
            repo,
            f"put them here: {', '.join(str(target.absolute()) for target in targets)}",
            local_dir=temporary,
            allowed=[f"*{f}" for f in files],
        )
        for source_name, target_name in files.items():
            if (folder / target_name).exists():
                continue
            found = sorted(fetched.rglob(source_name), key=lambda path: len(path.parts))
            if not found:
                raise HubError(
                    f"{repo} holds no {source_name} any more; look at the repository and fetch the file by hand"
                )
            with found[0].open("rb") as source, open_whole(folder / target_name) as target:
                shutil.copyfileobj(source, target)
    return targets
