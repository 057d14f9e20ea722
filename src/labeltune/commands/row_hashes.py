"""Which rows trained a run and which chose its checkpoint: remembered beside the weights, so that figures on them are never
taken for test figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from labeltune.data.check import text_hash
from labeltune.data.loading import load_rows
from labeltune.errors import DataError, ModelError
from labeltune.evaluation.summary import SELECTION, TRAINING
from labeltune.io.outputs import is_hub_name, write_bytes
from labeltune.io.run_folder import SELECTION_FILE, TRAINING_FILE, trained_config
from labeltune.types import Example

Hashes = numpy.ndarray[Any, Any]
#: A larger file of training rows is not read again only to see what a linear model makes of them.
MAX_BYTES = 100_000_000


@dataclass(frozen=True)
class Seen:
    """How many rows a run knows.

    Attributes:
        trained: rows it was trained on; None where it does not remember.
        selected: rows that chose its checkpoint, and that it was not trained on.
    """

    trained: int | None
    selected: int

    def to_dict(self) -> dict[str, Any]:
        """As figures tell of it: `rows_are` is `test`, or what the rows were used for as soon as one was."""
        found: dict[str, Any] = {"rows_are": "test", "training_rows": self.trained}
        if self.selected:
            found |= {"rows_are": SELECTION, "selection_rows": self.selected}
        if self.trained:
            found["rows_are"] = TRAINING
        return found


def hashes_file(hashes: Hashes) -> bytes:
    """Content of a file of hashes."""
    return numpy.unique(hashes).astype("<u8").tobytes()


def save_selection(folder: Path, texts: Iterable[str]) -> None:
    """Write the hashes of these texts into a checkpoint."""
    write_bytes(folder / SELECTION_FILE, hashes_file(_hashes(texts)))


def rows_seen(folders: Sequence[Path | None], texts: Iterable[str]) -> Seen:
    """How many of these texts one of the checkpoints was trained on or chosen by; None stands for an untuned model.

    Raises:
        ModelError: a file is damaged.
    """
    rows = _hashes(texts)
    trained, selected = numpy.zeros(len(rows), dtype=bool), numpy.zeros(len(rows), dtype=bool)
    remembered = True
    for folder in filter(None, folders):
        for name, found in ((TRAINING_FILE, trained), (SELECTION_FILE, selected)):
            known = _read(folder / name)
            if known is not None:
                found |= numpy.isin(rows, known)
            elif name == TRAINING_FILE:
                remembered = False
    return Seen(int(trained.sum()) if remembered else None, int((selected & ~trained).sum()))


def known_texts(folder: Path) -> frozenset[int]:
    """Hashes of all texts that a checkpoint was trained on or chosen by.

    Raises:
        ModelError: a file is damaged.
    """
    files = (_read(folder / name) for name in (TRAINING_FILE, SELECTION_FILE))
    return frozenset(int(each) for found in files if found is not None for each in found)


def training_rows(folder: Path) -> list[Example]:
    """The labelled rows that a checkpoint was trained on, read again where they were.

    Raises:
        DataError: they cannot be; the message says why.
    """
    config, known = trained_config(folder), _read(folder / TRAINING_FILE)
    if config is None or known is None:
        raise DataError("the run does not say what it was trained on")
    if is_hub_name(config.data.train):
        raise DataError("its training rows are on a hub")
    path = Path(config.data.train)
    if not path.exists():
        raise DataError(f"{config.data.train} is not there")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{config.data.train} is large")
    rows = load_rows(str(path), config.task, config.data, config.hub)
    kept = numpy.flatnonzero(numpy.isin(numpy.array(rows.audit.text_hashes, dtype="<u8"), known))
    if not len(kept):
        raise DataError(f"{config.data.train} holds none of the rows that the run was trained on")
    return [rows.example(int(row)) for row in kept]


def _hashes(texts: Iterable[str]) -> Hashes:
    return numpy.array([text_hash(text) for text in texts], dtype="<u8")


def _read(file: Path) -> Hashes | None:
    if not file.is_file():
        return None
    content = file.read_bytes()
    if len(content) % 8:
        raise ModelError(f"{file} is damaged: {len(content)} bytes are no whole number of hashes")
    return numpy.frombuffer(content, dtype="<u8")
