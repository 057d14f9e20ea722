"""A bar over rows with rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from labeltune.errors import printable
from labeltune.ranks import rank

_SECONDS_BETWEEN_LINES = 5.0
_noted: set[str] = set()


def note(line: str) -> None:
    """Say something once on standard error, by the first process of a job alone."""
    if rank() == 0 and line not in _noted:
        _noted.add(line)
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def row_progress(
    total: int | None, what: str, shown: bool = True, last_line: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many more rows are done.

    Args:
        last_line: without a terminal, say when all are done, however quickly that was.
    """
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(total, what, last_line)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started, done = time.monotonic(), 0
    columns = (
        TextColumn(f"[bold]{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            bar.update(task, advance=rows, rate=f"{done / max(time.monotonic() - started, 1e-9):.1f} rows/s")

        yield advance


def _plain_lines(total: int | None, what: str, last_line: bool) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(rows: int) -> None:
        nonlocal done, last
        done += rows
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and not (last_line and done == total):
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if total else ""
        print(
            f"{what}: {done}{f'/{total}' if total else ''} rows, {rate:.2f} rows/s{left}",
            file=sys.stderr,
            flush=True,
        )

    return advance
