"""A bar over rows with rate and time left; plain lines where there is no terminal; no phase that says nothing for long."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from labeltune.distributed import rank
from labeltune.errors import printable
from labeltune.messages import localize

_SECONDS_BETWEEN_LINES = 5.0
#: Fewer rows say nothing about the time that is left.
_ROWS_FOR_A_RATE = 10
#: Seconds between rows that were not answered together, and after which a burst without an end is counted.
_PAUSE, _BURST = 0.1, 1.0
#: Nothing is said for longer than this, without a bar.
SILENCE = 15.0
#: A phase of fewer seconds says nothing by itself: what it is a part of does, such as the step that has ended.
SLOW = 2 * SILENCE / 3
_noted: set[str] = set()

Row = TypeVar("Row")
#: Tells the user a line.
Say = Callable[[str], None]


class _Now:
    """What this process is doing, and when it last said something."""

    phase = ""
    begun = spoke = 0.0
    bars = 0
    #: Where lines go while other libraries are silenced.
    stream: TextIO | None = None


def spoke() -> None:
    """Note that a line was printed just now."""
    _Now.spoke = time.monotonic()


def tell(line: str) -> None:
    """A finished line on standard error, in the user's language."""
    print(localize(line), file=_Now.stream or sys.stderr, flush=True)
    spoke()


@contextlib.contextmanager
def others_silent() -> Iterator[None]:
    """What other code writes to standard error while the context is open is dropped; `tell` still speaks."""
    _Now.stream = sys.stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        _Now.stream = None


def silent_for() -> float:
    """Seconds since the last line."""
    return time.monotonic() - _Now.spoke


def begin(phase: str, say: Callable[[str], None] | None = None) -> None:
    """A phase of the work begins: said at once with `say`, and again by `no_long_silence` while it lasts."""
    _Now.phase, _Now.begun = phase, time.monotonic()
    if say is not None:
        say(phase)
        spoke()


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """A phase within another one, which goes on behind it."""
    before = _Now.phase
    begin(phase, tell)
    try:
        yield
    finally:
        begin(before)


@contextlib.contextmanager
def bar_shown() -> Iterator[None]:
    """A bar moves on the terminal while the context is open, so nothing else has to be said."""
    _Now.bars += 1
    try:
        yield
    finally:
        _Now.bars -= 1
        spoke()


@contextlib.contextmanager
def no_long_silence(say: Callable[[str], None]) -> Iterator[None]:
    """While the context is open, whatever phase takes long is named every `SILENCE` seconds in which nothing else was said."""
    ended = threading.Event()
    _Now.phase = ""
    spoke()

    def watch() -> None:
        while not ended.wait(min(1.0, SILENCE / 4)):
            lasted = time.monotonic() - _Now.begun
            if _Now.phase and not _Now.bars and silent_for() >= SILENCE and lasted >= SLOW:
                say(f"... {_Now.phase} ({lasted:.0f} s)")
                spoke()

    thread = threading.Thread(target=watch, name="labeltune-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _Now.phase = ""


def note(line: str) -> None:
    """Say something once on standard error, by the first process of a job alone."""
    if rank() == 0 and line not in _noted:
        _noted.add(line)
        tell(f"note: {printable(line)}")


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What a command does while the context is open, named on standard error whenever nothing else was said for long."""
    with no_long_silence(tell):
        begin(name)
        yield


@contextlib.contextmanager
def row_progress(
    total: int | None, what: str, shown: bool = True, last_line: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more rows are done.

    Args:
        last_line: without a terminal, say when all are done, however quickly that was.
    """
    what = localize(what)
    if not shown or total == 0:
        yield lambda _: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(total, what, last_line)
        return
    rate, done = _Rate(), 0
    columns = (
        TextColumn(f"[bold]{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn(localize("left")),
        TimeRemainingColumn(),
    )
    with bar_shown(), Progress(*columns, console=console, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            per_second = rate(done, total)
            bar.update(
                task, advance=rows, rate="" if per_second is None else localize(f"{per_second:.1f} rows/s")
            )

        yield advance


def track(
    rows: Iterable[Row],
    total: int | None,
    what: str = "predict",
    shown: bool = True,
    last_line: bool = True,
    done: int = 0,
) -> Iterator[Row]:
    """The rows, with a bar around them that counts each as it comes.

    Args:
        total, what, shown, last_line: as of `row_progress`.
        done: rows that were finished before.
    """
    with row_progress(total, what, shown, last_line) as advance:
        if done:
            advance(done)
        for row in rows:
            advance(1)
            yield row


class _Rate:
    """Rows a second: of the whole work once it is done, before that without the first rows, which wait for what a model does once.

    Many rows come at once, and then none for a while: only whole bursts are counted.
    """

    def __init__(self) -> None:
        self._started = self._last = self._begun = time.monotonic()
        self._done = 0
        self._first: tuple[int, float] | None = None
        self._end = (0, self._started)

    def __call__(self, done: int, total: int | None) -> float | None:
        """None while it cannot be told.

        Args:
            done: rows until now.
        """
        now = time.monotonic()
        if done == total:
            return done / max(now - self._started, 1e-9)
        if not self._done:
            self._begun = now
        elif now - self._last > _PAUSE or now - self._begun > _BURST:
            self._begun = now
            self._end = self._done, self._last
            self._first = self._first or self._end
        self._done, self._last = done, now
        if self._first is None or self._first == self._end:
            return None
        return (self._end[0] - self._first[0]) / (self._end[1] - self._first[1])


def _plain_lines(total: int | None, what: str, last_line: bool) -> Callable[[int], None]:
    last = time.monotonic()
    rate, done = _Rate(), 0
    if _Now.phase:
        begin(f"{what}: first rows, and which way is exact for this model")

    def advance(rows: int) -> None:
        nonlocal done, last
        done += rows
        now, per_second = time.monotonic(), rate(done, total)
        if per_second is None:
            return
        if now - last < _SECONDS_BETWEEN_LINES and not (last_line and done == total):
            return
        last = now
        _Now.phase = ""
        known = total and (done >= _ROWS_FOR_A_RATE or done == total)
        left = f", {(total - done) / per_second:.0f} s left" if total and known else ""
        print(
            f"{what}: {done}{f'/{total}' if total else ''} rows, {per_second:.2f} rows/s{left}",
            file=sys.stderr,
            flush=True,
        )
        spoke()

    return advance
