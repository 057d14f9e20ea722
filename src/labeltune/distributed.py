"""Several processes that compute one run: rank, world size, collectives and the division of work.

torchrun or `accelerate launch` starts the processes; nothing here starts any or moves weights. With one process every function returns
what it was given. torch is imported late: the command line asks for the rank before anything else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from labeltune.errors import PeerError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Value = TypeVar("Value")


def rank() -> int:
    """The number of this process in the job; rank 0 writes files and prints."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes in the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_distributed() -> bool:
    """Whether the process group is initialized and has other members."""
    import torch

    found = torch.distributed.is_available() and torch.distributed.is_initialized()
    return found and torch.distributed.get_world_size() > 1


def connect(timeout: int) -> None:
    """On CPUs: join the other processes. (accelerate does it on accelerators; here it would forget the time-out, in seconds.)"""
    import datetime

    import torch

    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))


def assign(costs: Sequence[int], processes: int) -> list[int]:
    """The rank that computes each unit of work: units go, largest first, to the rank with the least work so far."""
    loads = [0] * processes
    owners = [0] * len(costs)
    for unit in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[unit] = min(range(processes), key=lambda p: (loads[p], p))
        loads[owners[unit]] += costs[unit]
    return owners


def all_gather(value: Value) -> list[Value]:
    """Every process's value (anything that can be pickled), in their order; the same list everywhere."""
    if not is_distributed():
        return [value]
    import torch

    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def all_reduce(values: Sequence[float], how: str) -> list[float]:
    """The `sum`, `min` or `max` over processes, number by number, in fp64."""
    if not is_distributed():
        return list(values)
    import torch

    found = torch.tensor(values, dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(found, op=getattr(torch.distributed.ReduceOp, how.upper()))
    return [float(value) for value in found.tolist()]


def all_reduce_gradients(model: PreTrainedModel) -> None:
    """Replace every trained weight's gradient by the sum over processes, in one message; none counts as zero."""
    if not is_distributed():
        return
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.nn.utils.parameters_to_vector([p.grad for p in trained])
    torch.distributed.all_reduce(flat)
    at = 0
    for p in trained:
        p.grad.copy_(flat[at : at + p.numel()].view_as(p))
        at += p.numel()


#: What the backends' errors say when the others cannot be reached; most are a bare RuntimeError.
_LOST = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "NCCL",
    "TCPStore",
)


@contextlib.contextmanager
def peer_errors(timeout: int, then: Callable[[], str]) -> Iterator[None]:
    """Inside, a collective that fails is one clear error.

    Args:
        timeout: seconds that this job waits for a process.
        then: how to go on.

    Raises:
        PeerError: another process has ended, or has not answered in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not is_distributed() or not any(sign in text for sign in _LOST):
            raise
        late = "timed out" in text.lower() or "timeout" in text.lower()
        what = (
            f"another process of the job did not answer within training.collective_timeout={timeout} s; it hangs or is stopped"
            if late
            else "another process of the job has ended; its own error stands above or in its log, and torchrun names its exit "
            "code (-9: killed from outside, often for taking too much memory)"
        )
        raise PeerError(f"{what}. {then()}. What the backend said: {first_line(error)}") from error


def _device() -> Any:
    """The device on which this job's backend takes tensors."""
    import torch

    on_gpu = torch.cuda.is_available() and "nccl" in torch.distributed.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether each rank holds only a part of the weights (FSDP2, DeepSpeed ZeRO-3).

    Every forward pass then gathers them, so all ranks have to run it.
    """
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@contextlib.contextmanager
def join_uneven(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ranks may call the model different numbers of times, also when its weights are sharded.

    Ranks that finish early keep running one-token forward passes until all ranks are done, so that sharded weights can still be
    gathered. Only calls of the model itself are counted, not those of its submodules or of `generate`. After an error no rank waits.
    """
    if not is_distributed() or not is_sharded(model):
        yield
        return
    import torch

    def announce(*_: Any) -> None:
        all_reduce([1], "sum")

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    was_training = model.training
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        while all_reduce([0], "sum")[0]:
            model(input_ids=token, use_cache=False)
    model.train(was_training)
