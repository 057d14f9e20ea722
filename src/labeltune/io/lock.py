"""One process at a time: a lock that the operating system takes back from a process that dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from labeltune.errors import OutputError


@contextlib.contextmanager
def alone_with(lock: Path, what: str, way_out: str, *, tidy: bool = False) -> Iterator[None]:
    """Hold a lock file while the context is open; its folder is made when missing.

    Args:
        lock: the file; it stays behind, empty of meaning.
        what: what the other process is doing, for the message: "another training writes into out".
        way_out: what to do about it.
        tidy: remove the file at the end. A process that had opened it before finds that it has no name any more, and is
            refused; one that comes later makes a new one.

    Raises:
        OutputError: another process holds it (the message names its pid), or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    holder = lock.with_name(f"{lock.name}.pid")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=0)
        held.acquire()
    except Timeout:
        raise OutputError(f"{what} (process {_pid(holder)}); {way_out}") from None
    except OSError as error:
        raise OutputError(f"{lock.parent} cannot be written: {error}") from error
    try:
        with contextlib.suppress(OSError):  # the number is for a message only
            holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        if tidy:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                lock.unlink()
        held.release()


def _pid(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "unknown"
