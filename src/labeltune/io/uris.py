"""Files and folders on this machine, or anywhere pyarrow or fsspec reaches: `s3://`, `gs://`, `hdfs://`, `abfs://`, `https://` ..."""

from __future__ import annotations

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast
from uuid import uuid4

from pyarrow import fs

from labeltune.errors import DataError, OutputError, first_line
from labeltune.io.outputs import write_bytes


@dataclass(frozen=True)
class Place:
    """A file or folder.

    Attributes:
        name: as it was given; messages show it.
        where: an absolute path, or the same address.
    """

    name: str
    where: str

    @staticmethod
    def of(spec: str) -> Place:
        """From a path or an address with `://`. Nothing is opened."""
        if "://" in spec:
            return Place(spec, spec)
        path = Path(spec).expanduser()
        return Place(str(path), str(path.absolute()))

    def __str__(self) -> str:
        """For messages."""
        return self.name

    @property
    def remote(self) -> bool:
        """Whether it is an address."""
        return "://" in self.where

    def system(self) -> tuple[Any, str]:
        """(a pyarrow file system, the path in it).

        Raises:
            DataError: neither pyarrow nor fsspec knows such addresses, or a package for them is missing.
        """
        if not self.remote:
            return fs.LocalFileSystem(), self.where
        try:
            system, path = fs.FileSystem.from_uri(self.where)
            return system, str(path)
        except (
            Exception
        ) as error:  # an address pyarrow does not know; fsspec knows more, and says what it lacks
            import fsspec

            try:
                other, path = fsspec.core.url_to_fs(self.where)
            except Exception as reason:
                raise DataError(
                    f"{self.name} cannot be opened: {first_line(reason)} (pyarrow: {first_line(error)})"
                ) from reason
            return fs.PyFileSystem(fs.FSSpecHandler(other)), str(path)

    def open(self) -> BinaryIO:
        """Open for reading, positioned at will.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            if not self.remote:
                return Path(self.where).open("rb")
            system, path = self.system()
            return cast(BinaryIO, BufferedReader(system.open_input_file(path), 1 << 20))
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {first_line(error)}") from error

    def inside(self, name: str) -> Place:
        """A file in this folder."""
        return Place(*(f"{base.rstrip('/')}/{name}" for base in (self.name, self.where)))

    def files(self, hidden: bool = False) -> dict[str, dict[str, Any]]:
        """Files of a folder by name, or the file itself, each with `size` in bytes and `mtime` in nanoseconds (0 when unknown).

        What begins with a point or an underscore is left out, as Spark, Hive and Ray do, unless `hidden`. A folder that is not
        there is empty.
        """
        system, path = self.system()
        try:
            found = system.get_file_info(path)
            if found.type == fs.FileType.File:
                infos = [found]
            else:
                infos = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        except OSError as error:
            raise DataError(f"{self.name} cannot be listed: {first_line(error)}") from error
        return {
            info.base_name: {"size": info.size, "mtime": info.mtime_ns or 0}
            for info in sorted(infos, key=lambda info: str(info.base_name))
            if info.type == fs.FileType.File and (hidden or not info.base_name.startswith((".", "_")))
        }

    def is_file(self) -> bool:
        """Whether it is a file that is there."""
        system, path = self.system()
        return bool(system.get_file_info(path).type == fs.FileType.File)

    def read(self) -> bytes:
        """The content of a file.

        Raises:
            DataError: it cannot be read.
        """
        with self.open() as file:
            return file.read()

    def write(self, content: bytes) -> None:
        """Write a file that appears whole or not at all.

        On this machine it is brought to the disk and renamed; elsewhere it is written under another name and moved, which
        object stores do when the copy is whole.

        Raises:
            OutputError: it cannot be written.
        """
        if not self.remote:
            write_bytes(Path(self.where), content)
            return
        system, path = self.system()
        folder, _, name = path.rpartition("/")
        aside = f"{folder}/.{name}-{uuid4().hex}"
        try:
            system.create_dir(folder, recursive=True)
            with system.open_output_stream(aside) as file:
                file.write(content)
            system.move(aside, path)
        except OSError as error:
            raise OutputError(f"{self.name} cannot be written: {first_line(error)}") from error

    def remove(self) -> None:
        """Remove a file."""
        system, path = self.system()
        system.delete_file(path)
