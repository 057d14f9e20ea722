"""Which rows chose a checkpoint: remembered beside it, so that figures on them are never taken for test figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy

from labeltune.data.audit import text_hash
from labeltune.errors import ModelError
from labeltune.run_folder import write_bytes

SELECTION_FILE = "selection.u64"


def save_selection(folder: Path, texts: Iterable[str]) -> None:
    """Write the hashes of these texts into a checkpoint: 8 bytes each, little-endian, sorted."""
    found = numpy.array(sorted({text_hash(text) for text in texts}), dtype="<u8")
    write_bytes(folder / SELECTION_FILE, found.tobytes())


def count_selection(folder: Path | None, texts: Iterable[str]) -> int:
    """How many of these texts chose the checkpoint in this folder; 0 where that is not known.

    Raises:
        ModelError: the file is damaged.
    """
    file = folder / SELECTION_FILE if folder is not None else None
    if file is None or not file.is_file():
        return 0
    content = file.read_bytes()
    if len(content) % 8:
        raise ModelError(f"{file} is damaged: {len(content)} bytes are no whole number of hashes")
    known = numpy.frombuffer(content, dtype="<u8")
    return int(numpy.isin(numpy.array([text_hash(text) for text in texts], dtype="<u8"), known).sum())
