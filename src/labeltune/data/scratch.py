"""A folder for files that no process needs after this one, whether it ends or is killed."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from labeltune.errors import OutputError

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
    import fcntl

    # It gets its name when it is locked, so nobody finds it unlocked while this process lives. It is never closed.
    new = folder / f".{_OWNER}"
    handle = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(folder / _OWNER)


def _remove_abandoned(mine: Path) -> None:
    """Delete the folders whose processes are dead: the system has taken their locks back."""
    if sys.platform == "win32":
        return
    import fcntl

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
