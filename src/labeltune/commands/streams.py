"""Standard input and output: in UTF-8 whatever the locale says, and one clear error where they are closed."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NoReturn

from labeltune.errors import DataError, LabeltuneError, OutputError


class Closed(io.TextIOBase):
    """Stands for a stream that was closed before the program began: whoever uses it gets the error."""

    def __init__(self, error: LabeltuneError) -> None:
        self._error = error

    def _refuse(self, *_: Any) -> NoReturn:
        raise self._error

    write = read = readline = __next__ = _refuse

    @property
    def buffer(self) -> NoReturn:
        """The bytes below; not there either."""
        raise self._error

    def isatty(self) -> bool:
        """No terminal."""
        return False


def prepare_streams() -> None:
    """Call before anything is opened or printed.

    A closed descriptor is given to the null device, so that no file that is opened later takes its number and what a library
    prints. Names of files that are not UTF-8 are printed with escapes.
    """
    try:
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
    except OSError as error:  # no null device here
        raise OutputError(f"{os.devnull} cannot be opened: {error.strerror}") from None
    if sys.stdin is None:
        sys.stdin = Closed(DataError("standard input is closed; name a file, or give --text"))  # type: ignore[assignment]
    if sys.stdout is None:
        sys.stdout = Closed(  # type: ignore[assignment]
            OutputError("standard output is closed; send it to a file, or to /dev/null to drop it")
        )
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def drop_output() -> None:
    """What is left in the buffers goes nowhere, without a second error at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
