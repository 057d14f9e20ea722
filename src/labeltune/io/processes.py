"""Work spread over processes of this machine, with results in order and few of them in memory; how a process ends."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import FrameType
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items for each worker that are handed out before the oldest is done.
_AHEAD = 2
_work: Callable[[Any], Any] | None = None


def worker_count(wanted: int | Literal["auto"], enough: bool = True) -> int:
    """Processes to use.

    Args:
        wanted: a number, or `auto`: one a core that this process may use, shared with the other ranks on this machine.
        enough: with `auto`, whether there is so much to do that starting them pays.
    """
    if wanted != "auto":
        return wanted
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if enough else 1


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """See to it that this process does not outlive the one that made it."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def mapped(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`map(work, items)` in processes: the same results in the same order, whatever their number.

    Processes are forked, so `work` and what it holds (tokenizers, memory-mapped tables) are shared, not copied; items and results
    are pickled. Where there is no safe fork (macOS, Windows), it is plain `map`. The processes die with this one.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died, e.g. for want of memory.
    """
    if workers <= 1 or not sys.platform.startswith("linux"):
        yield from map(work, items)
        return
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,)
    )
    # A collection in a child would mark, and so copy, every object that was there at its birth; frozen ones are not marked.
    gc.collect()
    gc.freeze()
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        gc.unfreeze()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """In a new process: Ctrl-C is the parent's to handle, and a parent that dies takes it along."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _do(item: object) -> Any:
    assert _work is not None
    return _work(item)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM is Ctrl-C to this process while the context is open, so that it leaves nothing behind; its children die of it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) not in (
        signal.SIG_DFL,
        None,
    ):
        yield
        return
    mine = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:
            os._exit(128 + number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
