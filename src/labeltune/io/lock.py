"""One process at a time, and a folder that goes with its process: by locks that the system takes back from one that dies."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from labeltune.errors import OutputError


@contextlib.contextmanager
def alone_with(lock: Path, what: str, way_out: str, *, tidy: bool = False) -> Iterator[None]:
    """Hold a lock file while the context is open; its folder is made when missing.

    Args:
        lock: the file; it stays behind, empty of meaning.
        what: what the other process is doing, for the message: "another training writes into out".
        way_out: what to do about it.
        tidy: remove the file at the end, and a folder that was made for it and is empty. A process that had opened it before
            finds that it has no name any more, and is refused; one that comes later makes a new one.

    Raises:
        OutputError: another process holds it (the message names its pid), or the folder cannot be written.
    """
    holder = lock.with_name(f"{lock.name}.pid")
    made = not lock.parent.exists()
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
        if tidy and made:
            with contextlib.suppress(OSError):  # something was written there
                lock.parent.rmdir()


def _pid(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "unknown"


if sys.platform != "win32":
    import fcntl

OTHER_TEMPORARY = "make room, or set TMPDIR to a folder that has it"
_PREFIX = "labeltune-rows-"
#: In such a folder: locked by its process, for as long as that lives.
_OWNER = "owner"
_folders: dict[int, Path] = {}


def scratch_folder() -> Path:
    """One folder a process, removed when it ends; those that killed processes have left are removed on the way.

    Raises:
        OutputError: there is no temporary folder that can be written.
    """
    if os.getpid() not in _folders:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            _own(folder)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"there is no temporary folder: {reason}; {OTHER_TEMPORARY}") from error
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _folders[os.getpid()] = folder
        _remove_abandoned(folder)
    return _folders[os.getpid()]


def _own(folder: Path) -> None:
    if sys.platform == "win32":
        return
    # It gets its name when it is locked, so nobody finds it unlocked while this process lives. It is never closed.
    new = folder / f".{_OWNER}"
    handle = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / _OWNER)


def _remove_abandoned(mine: Path) -> None:
    """Delete the folders whose processes are dead: the system has taken their locks back."""
    if sys.platform == "win32":
        return
    for owner in mine.parent.glob(f"{_PREFIX}*/{_OWNER}"):
        if owner.parent == mine or owner.parent.is_symlink():
            continue
        try:
            handle = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process lives
            continue
        else:
            shutil.rmtree(owner.parent, ignore_errors=True)
        finally:
            os.close(handle)
