"""Where a command may write, known before the work begins (never over what it reads), and writing it whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from labeltune.errors import OutputError, first_line
from labeltune.io.progress import note

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


def note_replaced(*outputs: Path) -> None:
    """Say, before the work begins, which outputs are there already and will be replaced at its end."""
    there = [str(output) for output in outputs if not is_stream(output) and link_target(output).is_file()]
    if there:
        note(f"already there, and replaced at the end: {', '.join(there)}")


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


#: What a system says that does not let a file be written. (A library's OSError without a number means something else.)
_REFUSED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
#: torch.save has no error of its own for a full disk: parts of what its writer says.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_REFUSED = ("StreamWriter", "inline_container", "iostream error")


def why_not_written(error: BaseException) -> str | None:
    """Why a system or a library refused to write, in few words; None when it is another kind of error."""
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = f" ({error.filename2 or error.filename})" if error.filename else ""
        return f"{error.strerror or errno.errorcode[error.errno]}{place}"
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_REFUSED):
        return f"the disk is full, or files may not grow larger ({first_line(error)})"
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    found = _OS_ERROR.search(str(error))  # tokenizers raises plain exceptions
    if found is not None and int(found.group(1)) in _REFUSED:
        return first_line(error)
    return None


@contextlib.contextmanager
def writing(place: Path, way_out: str = "") -> Iterator[None]:
    """What cannot be written inside is one clear error.

    Args:
        place: the file or folder that is written.
        way_out: what to do, behind a semicolon.

    Raises:
        OutputError: no space, no right, a quota, a read-only disk.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise OutputError(f"{place} cannot be written: {reason}{'; ' if way_out else ''}{way_out}") from error


def write_text(path: Path, text: str) -> None:
    r"""Write a file atomically, UTF-8: a reader sees the old one or the new one, never a part.

    File names that are not UTF-8 are written with escapes (`\udcd1`), which JSON reads back.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `open_whole` does; raises what that raises."""
    with open_whole(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is written atomically: a reader sees the old one or, when the context ends well, the new one, never a part.

    A link stays, and what it leads to is replaced; a device or a FIFO is written to.

    Raises:
        OutputError: the folder cannot be written.
    """
    if is_stream(path):
        with open_stream(path) as stream:
            yield stream
        return
    path = link_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def temporary_name(path: Path) -> Path:
    """Beside a path, a name of this process's own that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}-{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what processes that were killed left of files they were writing.

    Only for who holds the lock on these files, so that nobody is writing them now.

    Args:
        name: of a file in the folder; all files, at any depth, when None.
    """
    found = folder.rglob(".*-*.tmp") if name is None else folder.glob(f".{glob.escape(name)}-*.tmp")
    for path in list(found):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, UTF-8, indented."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write JSON atomically, UTF-8, a row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
