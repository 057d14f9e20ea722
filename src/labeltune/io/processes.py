"""Work spread over processes of this machine, with results in order and few of them in memory."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items for each worker that are handed out before the oldest is done.
_AHEAD = 2
_work: Any = None


def worker_count(wanted: int | Literal["auto"], enough: bool = True) -> int:
    """Processes to use.

    Args:
        wanted: a number, or `auto`: one a core that this process may use, shared with the other ranks on this machine.
        enough: with `auto`, whether there is so much to do that starting them pays.
    """
    if wanted != "auto":
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if enough else 1


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
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(work,))
    _tidy()
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


def _tidy() -> None:
    """Before children are born: what is free goes back to the system, and what is not stays shared.

    A collection in a child writes a mark into every object that was there at its birth, and so copies the parent's memory;
    frozen objects are not marked.
    """
    import ctypes

    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it, musl does not
        trim(0)


def _begin(work: Any) -> None:
    """In a new process: Ctrl-C is the parent's to handle, and a parent that dies takes it along."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import ctypes

    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _do(item: Any) -> Any:
    return _work(item)
