"""Checkpoints that are whole or not there: written aside, hashed, brought to the disk, and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from labeltune.errors import OutputError
from labeltune.output_paths import obey_umask
from labeltune.run_folder import (
    MANIFEST_FILE,
    RunInfo,
    file_hash,
    why_not_written,
    write_bytes,
    write_json,
)

#: Where a checkpoint is written before it gets its name; what a killed run left there is removed by the next.
STAGING = ".saving"
#: A test sets this to kill the process between two moments of a save; nobody else does.
after: Callable[[str], None] = lambda moment: None  # noqa: E731


def staging_folder(output_dir: Path) -> Path:
    """The folder that a checkpoint is written into."""
    return output_dir / STAGING


def clear_staging(output_dir: Path) -> None:
    """Remove what an earlier process left half-written."""
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)


def publish(output_dir: Path, name: str, info: RunInfo, files: Mapping[str, bytes] | None = None) -> Path:
    """Complete the checkpoint that stands in the staging folder and give it its place.

    `labeltune.json`, `files` (content by name) and a manifest of SHA-256 sums are added, every file is brought to the disk, and
    the folder is renamed: whoever looks finds the whole checkpoint or none. A damaged one of the same name is replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    staged, final = staging_folder(output_dir) / name, output_dir / name
    info.save(staged)
    for file, content in (files or {}).items():
        write_bytes(staged / file, content)
    # peft's empty model card; `labeltune export` writes a true one.
    (staged / "README.md").unlink(missing_ok=True)
    obey_umask(staged)
    write_manifest(staged)
    after("manifest")
    for path in sorted(staged.rglob("*")):
        _to_disk(path)
    _to_disk(staged)
    after("fsync")
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    _to_disk(output_dir)
    after("rename")
    shutil.rmtree(staging_folder(output_dir), ignore_errors=True)
    return final


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: the SHA-256 of every file of a checkpoint, by its name in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    write_json(folder / MANIFEST_FILE, {p.relative_to(folder).as_posix(): file_hash(p) for p in files})


@contextmanager
def failures_named(output_dir: Path, name: str, last: str | None) -> Iterator[None]:
    """A save that fails is one clear error; what was half-written is removed.

    Args:
        last: name of the last good checkpoint, to go on from.

    Raises:
        OutputError: whatever the writers raised: no space left, no permission, an I/O error.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        clear_staging(output_dir)
        then = (
            f"{last} is untouched; make room and go on with --resume"
            if last
            else "no checkpoint was saved before it"
        )
        raise OutputError(f"{output_dir / name} cannot be written: {reason}. {then}") from error


def _to_disk(path: Path) -> None:
    """fsync of a file or folder, where the system knows how."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # folders on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
