"""Where a command may write: never over what it reads, never over a folder or a device, and known before the work begins."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from labeltune.errors import OutputError

#: Names of descriptors that are open already.
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")
_MOST_LINKS = 40


def check_file(output: Path, inputs: Iterable[str | os.PathLike[str]], beside: Iterable[str] = ()) -> None:
    """Whether a file may be written, and would replace nothing that the command reads.

    Args:
        inputs: files and folders that the command reads; what is on a hub or elsewhere is passed over. An input folder stands
            for the files that lie in it by themselves.
        beside: names of other files that the command writes in the same folder.

    Raises:
        OutputError: it is one of the inputs by whatever path, is a folder or a block device, or its folder cannot be written.
    """
    inputs = list(inputs)
    if is_stream(output):
        _check_stream(output, inputs)
        return
    target = link_target(output)
    if _mode(target, output) is not None and target.is_dir():
        raise OutputError(f"{output} is a folder; name a file in it")
    for written in (target, *(target.with_name(name) for name in beside)):
        if _mode(written, output) is not None:
            for given in inputs:
                _check_apart(output, written, given)
    _check_parent(output, target.absolute().parent)


def check_folder(
    output: Path, inputs: Iterable[str | os.PathLike[str]], names: Iterable[str] = (), replaced: bool = False
) -> None:
    """Whether files may be written into a folder, and would replace nothing that the command reads.

    Args:
        inputs: as in `check_file`.
        names: of the files.
        replaced: what is in the folder goes away, so that no input may lie in it.

    Raises:
        OutputError: as `check_file`.
    """
    kind = _mode(output, output)
    if kind is None and output.is_symlink():
        raise OutputError(f"{output} is a link to a folder that is not there")
    if kind is not None and not stat.S_ISDIR(kind):
        raise OutputError(f"{output} is a file and cannot be written into; name a folder")
    if replaced and kind is not None:
        for given in inputs:
            place = local_path(given)
            if place is not None and any(same_file(output, p) for p in _with_parents(place)):
                raise OutputError(f"{output} holds {given}, which this command reads; choose another folder")
    for name in names:
        check_file(output / name, inputs)
    _check_parent(output, output.absolute())


def is_hub_name(spec: str) -> bool:
    """Whether a model, a run or a data set is one on ModelScope (`ms:...`) or Hugging Face (`hf:...`)."""
    return spec.startswith(("ms:", "hf:"))


def local_path(given: str | os.PathLike[str]) -> Path | None:
    """The path that an input means, None when it is on a hub, at another address or not there."""
    name = os.fspath(given)
    if is_hub_name(name) or "://" in name:
        return None
    path = Path(name).expanduser()
    try:
        return path if path.exists() else None
    except OSError:
        return None


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two names mean one file or folder: by its number on its disk, which looks through links and spelling."""
    try:
        return Path(first).samefile(second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def is_file_of(stream: TextIO, path: Path) -> bool:
    """Whether a stream is connected to a file on disk, and to this one."""
    try:
        about = os.fstat(stream.fileno())
        return stat.S_ISREG(about.st_mode) and os.path.samestat(about, path.stat())
    except OSError:
        return False


def link_target(path: Path) -> Path:
    """The file that a link leads to, there or not, so that the link can stay.

    Raises:
        OutputError: the links lead nowhere.
    """
    found = path
    try:
        for _ in range(_MOST_LINKS):
            if not found.is_symlink():
                return found
            found = found.parent / found.readlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    raise OutputError(f"{path} cannot be written: too many links, one behind the other")


def descriptor(path: Path) -> int | None:
    """The number of the open descriptor that a path such as `/dev/stdout` names, through links too."""
    for _ in range(_MOST_LINKS):
        name = os.path.normpath(path)
        if name in _STANDARD:
            return _STANDARD[name]
        found = _DESCRIPTOR.fullmatch(name)
        if found is not None:
            pid = name.split("/")[2]
            return int(found[1]) if not pid.isdigit() or int(pid) == os.getpid() else None
        try:
            path = path.parent / path.readlink()
        except OSError:
            return None
    return None


def is_stream(path: Path) -> bool:
    """Whether a path names what rows can only be sent to: a device, a FIFO, a socket or an open descriptor."""
    if descriptor(path) is not None:
        return True
    try:
        kind = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(kind) and not stat.S_ISDIR(kind)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open what `is_stream` is true of; a FIFO waits for its reader. What was open already stays open.

    Raises:
        OutputError: it cannot be opened.
    """
    number = descriptor(path)
    try:
        if number is None:
            # No O_CREAT: if it has gone, no file takes its place.
            stream = os.fdopen(os.open(path, os.O_WRONLY), "wb")
        else:
            stream = os.fdopen(os.dup(number), "wb")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    with stream:
        yield stream


def _check_stream(output: Path, inputs: list[str | os.PathLike[str]]) -> None:
    number = descriptor(output)
    try:
        about = output.stat() if number is None else os.fstat(number)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from None
    if stat.S_ISBLK(about.st_mode) or (number is None and stat.S_ISSOCK(about.st_mode)):
        raise OutputError(f"{output} is a disk or a socket; name a file, a FIFO or a character device")
    if stat.S_ISCHR(about.st_mode):
        return  # a terminal may be both
    for given in inputs:
        place = local_path(given)
        if place is not None and os.path.samestat(place.stat(), about):
            raise OutputError(f"{output} is {given}, which this command reads; choose another output")


def _check_apart(output: Path, written: Path, given: str | os.PathLike[str]) -> None:
    place = local_path(given)
    if place is None:
        return
    if same_file(written, place) or (
        place.is_dir() and any(same_file(written, file) for file in place.iterdir() if file.is_file())
    ):
        shown = output if written.name == output.name else written
        raise OutputError(f"{shown} is part of what this command reads ({given}); choose another output")


def _check_parent(output: Path, parent: Path) -> None:
    """The nearest folder that is there is one, and lets files be made in it."""
    try:
        existing = next(path for path in (parent, *parent.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise OutputError(f"{output} cannot be written: {existing} is not a folder")
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from None
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{output} cannot be written: nothing may be written into {existing}")


def _mode(path: Path, output: Path) -> int | None:
    """Kind and rights of what is there, None when nothing is; a name that no file can have is an error."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from None


def _with_parents(path: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(path))
    yield real
    yield from real.parents


def obey_umask(folder: Path) -> None:
    """Give a folder and all in it the rights that the umask asks for; safetensors and tempfile let only their owner read."""
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def umask() -> int:
    """The rights that new files are not given."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
