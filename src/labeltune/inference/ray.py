"""Work on Ray: actors that hold the model, each of which is given one item after the other.

What an item is, and that doing it twice changes nothing, is in `shards.py`. Ray starts the actors, restarts those that die, and
gives them the item again during which they died.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from labeltune.errors import ConfigError, LabeltuneError, ModelError, first_line
from labeltune.inference.predictor import Predictor
from labeltune.inference.shards import Load, Work
from labeltune.io.processes import usable_cores

# Ray reads these when it is imported: it listens to this machine alone, and reports nothing anywhere.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray
import ray.exceptions

#: How often an item may begin; one that kills its actor would be given to others for ever.
MOST_ATTEMPTS = 5
#: Bytes of the object store of a Ray of our own; Ray would reserve a third of the memory, and what we pass around is small.
OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Cluster:
    """Where it runs: `address` of a Ray cluster, this machine when None; `workers` actors, one a GPU or machine when None."""

    workers: int | None = None
    address: str | None = None


@contextlib.contextmanager
def ray_workers(load: Load, cluster: Cluster) -> Iterator[Work]:
    """Workers on Ray as long as the context is open.

    Args:
        load: makes the predictor, in every worker.

    Yields:
        A function that takes a function and items, and yields each item with its result, in the order in which they finish.

    Raises:
        ConfigError: there is no Ray at the address.
    """
    with ray_session(cluster.address):
        workers, cpus, gpus = _resources(cluster.workers)
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": -1,
            "max_task_retries": MOST_ATTEMPTS - 1,
        }
        actor = ray.remote(**options)(Worker)
        actors = [actor.remote(load, cpus) for _ in range(workers)]
        try:
            yield functools.partial(_work, actors)
        finally:
            for each in actors:
                ray.kill(each)


class Worker:
    """An actor: loads the predictor when it first needs it, and keeps it."""

    def __init__(self, load: Load, threads: int) -> None:
        self._load = functools.cache(functools.partial(_loaded, load, threads))

    def run(self, function: Callable[[Load, Any], Any], item: object) -> Any:
        """The function's result for an item."""
        return function(self._load, item)


def _loaded(load: Load, threads: int) -> Predictor:
    torch.set_num_threads(threads)
    return load()


def _work(
    actors: list[Any], function: Callable[[Load, Any], Any], items: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    waiting, idle = iter(items), list(actors)
    running: dict[Any, tuple[Any, Any]] = {}
    while True:
        for item in waiting:
            actor = idle.pop()
            running[actor.run.remote(function, item)] = actor, item
            if not idle:
                break
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        actor, item = running.pop(done)
        idle.append(actor)
        try:
            result = ray.get(done)
        except (ray.exceptions.RayError, LabeltuneError) as error:
            raise _own_error(error, item) from error
        yield item, result


def _own_error(error: BaseException, item: object) -> LabeltuneError:
    """The error of ours that caused an error of Ray's, or one that says what happened."""
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


@contextlib.contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[None]:
    """A Ray of our own on this machine that is shut down afterwards, or with an address the cluster there.

    Where this process is connected to a Ray already, that one is used, and left as it is.

    Args:
        address: `auto`, `host:port` or `ray://host:port`.
        cpus: cores of a Ray of our own; those that this process may use when None.

    Raises:
        ConfigError: there is no Ray at the address.
    """
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address is not None and address != "local":
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            ray.init(
                address="local",
                num_cpus=cpus or usable_cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=OBJECT_STORE,
            )
    except (ConnectionError, ValueError) as error:
        ray.shutdown()
        raise ConfigError(
            f"no Ray cluster at address={address}: {first_line(error)}; start one with `ray start --head`, or leave "
            "--address out to use this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _resources(workers: int | None) -> tuple[int, int, float]:
    """Workers on the running Ray, and the cores (also threads) and GPUs of each: all of it, in equal parts that fit its machines.

    Args:
        workers: one a GPU when None, or one a machine where there are none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    wanted = workers or gpus or len(nodes)
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    smallest = int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1))
    cpus = max(1, min(cores // wanted, smallest))
    return wanted, cpus, 1 / math.ceil(wanted / gpus) if gpus else 0
