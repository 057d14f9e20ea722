"""Work on Ray: actors that hold the model, each of which is given one item after the other.

What an item is, and that doing it twice changes nothing, is `shards.py`. Ray starts actors, starts them again where they die, and
gives them the item again that they died of.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from labeltune.errors import LabeltuneError, ModelError, first_line
from labeltune.inference.predictor import Predictor
from labeltune.inference.ray_session import ray_session, shares
from labeltune.inference.shards import Load, Work

#: How often an item may begin; one that kills its actor would be given to others for ever.
MOST_ATTEMPTS = 5


@dataclass(frozen=True)
class Cluster:
    """Where it runs: `address` of a Ray cluster, this machine when None; `workers` actors, one a GPU or machine when None."""

    workers: int | None = None
    address: str | None = None


class Worker:
    """An actor: loads the predictor when it first needs it, and keeps it."""

    def __init__(self, load: Load, threads: int) -> None:
        self._load = functools.cache(functools.partial(_loaded, load, threads))

    def run(self, function: Callable[[Load, Any], Any], item: Any) -> Any:
        """The function's result for an item."""
        return function(self._load, item)


def _loaded(load: Load, threads: int) -> Predictor:
    import torch

    torch.set_num_threads(threads)
    return load()


@contextlib.contextmanager
def ray_workers(load: Load, cluster: Cluster) -> Iterator[Work]:
    """Workers on Ray as long as the context is open.

    Args:
        load: makes the predictor, in every worker.

    Yields:
        What does work on them: a function with items -> each item with its result, in the order in which they are finished.

    Raises:
        ConfigError: there is no Ray at the address.
    """
    with ray_session(cluster.address):
        given = shares(cluster.workers)
        options: dict[str, Any] = {
            "num_cpus": given.cpus,
            "num_gpus": given.gpus,
            "max_restarts": -1,
            "max_task_retries": MOST_ATTEMPTS - 1,
        }
        actor = ray.remote(**options)(Worker)
        actors = [actor.remote(load, given.cpus) for _ in range(given.workers)]
        try:
            yield functools.partial(_work, actors)
        finally:
            for each in actors:
                ray.kill(each)


def _work(
    actors: list[Any], function: Callable[[Load, Any], Any], items: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    waiting, idle = iter(items), list(actors)
    running: dict[Any, tuple[Any, Any]] = {}
    while True:
        for item in waiting:
            one = idle.pop()
            running[one.run.remote(function, item)] = one, item
            if not idle:
                break
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        one, item = running.pop(done)
        idle.append(one)
        try:
            result = ray.get(done)
        except (ray.exceptions.RayError, LabeltuneError) as error:
            raise _own(error, item) from error
        yield item, result


def _own(error: BaseException, item: Any) -> LabeltuneError:
    """What of ours is behind an error of Ray's."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray makes errors that are of our kind too, with a traceback for a message; the cause is the one that was raised.
        if isinstance(seen, LabeltuneError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    if isinstance(error, ray.exceptions.RayActorError):
        return ModelError(
            f"{item} ended {MOST_ATTEMPTS} workers; is there too little memory? Fewer --workers need less. Go on with --resume"
        )
    return ModelError(f"Ray stopped: {first_line(error)}; what is done is kept, go on with --resume")
