"""Ray, quiet and alone: what all that runs on it has in common."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

# Ray reads these when it is imported: it listens to this machine alone, and nothing is reported anywhere.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import ray

from labeltune.errors import ConfigError, first_line

#: Bytes of the object store of a Ray of our own; Ray would reserve a third of the memory, and what we pass around is small.
OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Shares:
    """What each worker gets.

    Attributes:
        workers: how many there are.
        cpus: cores of each, which are also its threads.
        gpus: GPUs of each; a fraction where workers share one.
    """

    workers: int
    cpus: int
    gpus: float


def local_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def ray_session(
    address: str | None = None, cpus: int | None = None, gpus: int | None = None
) -> Iterator[None]:
    """A Ray of our own on this machine that is shut down afterwards, or with an address the cluster there.

    Where this process is connected to a Ray already, that one is used, and left as it is.

    Args:
        address: `auto`, `host:port` or `ray://host:port`.
        cpus: cores of a Ray of our own.
        gpus: its GPUs; Ray counts them when None.

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
                num_cpus=cpus or local_cores(),
                num_gpus=gpus,
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


def shares(workers: int | None) -> Shares:
    """What each of so many workers gets of the running Ray: all of it, in equal parts that fit its machines.

    Args:
        workers: one a GPU when None, or one a machine where there are none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    wanted = workers or gpus or len(nodes)
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    smallest = int(min((node["CPU"] for node in nodes if node.get("CPU")), default=1))
    cpus = max(1, min(cores // wanted, smallest))
    return Shares(wanted, cpus, 1 / math.ceil(wanted / gpus) if gpus else 0)
