"""What can go wrong, by name. Every message says what, where, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path


def first_line(error: BaseException) -> str:
    """Kind and first line of an error that is not ours."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def message_of(error: BaseException) -> str:
    """First line of what an error that is not ours says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def clipped(text: str, length: int) -> str:
    """A text for a message, its middle left out when it is longer than `length` characters."""
    if len(text) <= length:
        return text
    kept = length // 2
    return f"{text[:kept]} ... {len(text) - 2 * kept} more characters ... {text[-kept:]}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun, for messages.

    >>> counted(1, "row"), counted(2000, "row"), counted(2, "entity", "entities")
    ('1 row', '2000 rows', '2 entities')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listed(found: Sequence[object], count: int, most: int = 10) -> str:
    """What an error lists, a line each: the first `most`, and how many more there are.

    Args:
        count: of all that there are; `found` may be only the first of them.
    """
    more = [f"... and {count - most} more"] if count > most else []
    return "\n  ".join([*map(str, found[:most]), *more])


def printable(text: str, keep: str = "") -> str:
    """A text that does nothing to a terminal or a table: what cannot be seen is written as Python's escapes.

    Those are control and formatting characters (escape sequences, line breaks, zero-width and right-to-left marks), and bytes
    of file names that are not UTF-8.

    Args:
        keep: characters that stay as they are all the same, e.g. line breaks.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name
        return f"\\x{code - 0xDC00:02x}"
    return character if character == "\u3000" else character.encode("unicode_escape").decode("ascii")


def near_it(path: Path, wanted: Callable[[Path], bool]) -> str:
    """What in the folder of a missing file or folder may have been meant, to end a message with; empty where nothing is there.
    Hidden entries are named only where a hidden one is missing.

    Args:
        wanted: whether an entry is of the right kind.
    """
    try:
        there = sorted(each.name for each in path.parent.iterdir() if wanted(each))
        if not path.name.startswith("."):
            there = [name for name in there if not name.startswith(".")]
    except (OSError, ValueError):
        return ""
    if not there:
        return ""
    folded = {name.lower(): name for name in there}
    close = [folded[name] for name in get_close_matches(path.name.lower(), folded, n=3, cutoff=0.75)]
    names = ", ".join(printable(str(path.parent / name)) for name in close or there[:4])
    names += ", ..." if not close and len(there) > 4 else ""
    return f"; near it are: {names}" if close else f"; the folder holds: {names}"


class LabeltuneError(Exception):
    """Base of every error a user can cause or repair.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class ConfigError(LabeltuneError):
    """A config file, an override or a combination of keys is wrong."""


class DataError(LabeltuneError):
    """A data file cannot be used as it is."""


class PromptError(LabeltuneError):
    """A prompt cannot be rendered, or does not fit the length budget."""


class ModelError(LabeltuneError):
    """A model, tokenizer, adapter or checkpoint cannot be found or used."""


class DivergedError(LabeltuneError):
    """A loss or gradient became infinite or no number; the message names the rows of the step."""


class HubError(ModelError):
    """A model hub or data hub could not be reached, or has no such repository."""


class LicenseError(ModelError):
    """Weights stand under terms that have to be accepted first."""


class MissingExtraError(LabeltuneError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an extra package; install it from the folder of the clone: "
            f"pip install -c constraints.txt '.[{extra}]'"
        )


class OutputError(LabeltuneError):
    """An output file or folder cannot be written, or is not what the command expects."""


class ParityError(LabeltuneError):
    """An exported model does not answer as the run it was made from."""

    exit_code = 1


class PeerError(LabeltuneError):
    """Another process of the job ended or did not answer in time, so that this one cannot go on."""


class SweepError(LabeltuneError):
    """A trial cannot be compared with the others, or no trial of a sweep succeeded."""


class Interrupted(LabeltuneError):
    """The user pressed Ctrl-C; the message says what was saved and how to go on."""

    exit_code = 130
