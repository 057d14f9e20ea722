"""Is the fast way of computing a step right for this model, on this machine, today? Computed both ways and compared.

A model may ignore the layout (its attention is written out, its forward drops unknown arguments), cap its attention, or
keep a state across positions. Every run therefore begins with a few real rows, each by itself through the plain model,
against the same rows in one pack: loss, and the gradient of every trained weight, with dropout off.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labeltune.errors import first_line
from labeltune.modeling.precision import Precision
from labeltune.ranks import is_sharded, reduced
from labeltune.training.loss import answer_loss
from labeltune.training.packs import attention_for, make_batch
from labeltune.training.planner import Group, Pack, Packing, Row, plan_step
from labeltune.training.sharded import whole

#: Relative difference of loss and gradients in fp32 that needs no second look.
TOLERANCE = 1e-4
#: A larger one is compared with the rounding of the plain way itself: this many times its distance from fp64 is allowed.
ROUNDING = 4
#: Allowed in fp32 where the model does not fit into memory in fp64 for that.
UNKNOWN_ROUNDING = 1e-3
#: The same in bf16 and fp16 where the model does not fit into memory in fp32 for comparison.
LOOSE_TOLERANCE = 5e-2
ROWS = 3
#: From the fastest way to the one that asks least of a model.
PLAINER: tuple[Packing, ...] = ("shared_prefix", "packed", "padded")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Gradients:
    """A loss, and the gradients of the trained weights by name."""

    loss: float
    weights: dict[str, Any]

    def error(self, exact: Gradients) -> float:
        """The larger of two relative differences: of the losses, and of all gradients taken as one vector (2-norm)."""
        differences = sum(_square(g - exact.weights[n]) for n, g in self.weights.items())
        size = sum(_square(g) for g in exact.weights.values())
        of_loss = abs(self.loss - exact.loss) / max(abs(exact.loss), 1e-12)
        of_weights = (differences / max(size, 1e-30)) ** 0.5
        # A NaN on either side is an error, whatever `max` makes of it.
        return max(of_loss, of_weights) if of_loss == of_loss and of_weights == of_weights else float("inf")


def _square(tensor: Any) -> float:
    """Squared 2-norm, over all processes where they hold parts of it."""
    return float(whole(tensor.square().sum()))


@dataclass(frozen=True)
class Choice:
    """A way of computing that agrees with rows computed one by one.

    Attributes:
        one_by_one: not even a batch is exact with this model; every example must be a pack of its own.
    """

    packing: Packing
    one_by_one: bool = False


def sample_rows(rows: Sequence[Row], count: int = ROWS) -> list[Row]:
    """A few different rows: the shortest ones, so that checking costs little."""
    return sorted(dict.fromkeys(rows), key=lambda row: (len(row.ids), row.ids))[:count]


def choose_packing(
    model: Any, rows: Sequence[Row], wanted: Packing, precision: Precision, pad_id: int, head: Any, say: Say
) -> Choice:
    """The wanted way, or the next plainer one that agrees with rows computed one by one; a change is said once.

    The random state is as before, gradients are none.
    """
    import torch

    with _undisturbed(model):
        plain = _gradients(model, rows, _one_by_one(rows), "padded", precision, pad_id, head)
        exact, limit = plain, TOLERANCE
        if precision.name != "fp32":
            in_fp32 = _in_format(model, torch.float32, rows, precision, pad_id, head)
            limit = LOOSE_TOLERANCE if in_fp32 is None else max(2 * plain.error(in_fp32), TOLERANCE)
            exact = in_fp32 or plain
        reasons: list[str] = []
        second_look = precision.name == "fp32"
        for packing in PLAINER[PLAINER.index(wanted) :]:
            reason = _disagreement(model, rows, packing, precision, pad_id, head, exact, limit)
            agreed = _everywhere(reason is None)
            if not agreed and second_look:
                second_look = False
                exact, limit = _rounding(model, rows, precision, pad_id, head, plain)
                reason = _disagreement(model, rows, packing, precision, pad_id, head, exact, limit)
                agreed = _everywhere(reason is None)
            if agreed:
                chosen = Choice(packing)
                break
            reasons.append(f"{packing}: {reason or 'another process disagrees'}")
        else:
            chosen = Choice("padded", one_by_one=True)
    if reasons:
        then = "one example at a time" if chosen.one_by_one else f"packing={chosen.packing}"
        say(
            f"warning: training.packing={wanted} does not compute what this model computes row by row "
            f"({'; '.join(reasons)}); training goes on with {then}, slower and exact"
        )
    return chosen


def _disagreement(
    model: Any,
    rows: Sequence[Row],
    packing: Packing,
    precision: Precision,
    pad_id: int,
    head: Any,
    exact: Gradients,
    limit: float,
) -> str | None:
    """Why this way cannot be used, or None."""
    import torch

    packs = plan_step(rows, sum(len(row.ids) for row in rows), packing)[0]
    try:
        found = _gradients(model, rows, packs, packing, precision, pad_id, head)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign model does with a layout it does not know
        return first_line(error)
    difference = found.error(exact)
    return None if difference <= limit else f"relative difference {difference:.1e}, allowed {limit:.1e}"


def _one_by_one(rows: Sequence[Row]) -> list[Pack]:
    return [Pack((Group(0, (i,)),)) for i in range(len(rows))]


def _gradients(
    model: Any,
    rows: Sequence[Row],
    packs: Sequence[Pack],
    packing: Packing,
    precision: Precision,
    pad_id: int,
    head: Any,
    autocast: bool = True,
) -> Gradients:
    import torch

    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.name)
    mixed = torch.autocast(device.type, dtype=dtype) if dtype and autocast else contextlib.nullcontext()
    count = sum(len(row.answer) for row in rows)
    total = 0.0
    with attention_for(model, packing):
        for pack in packs:
            batch = make_batch(rows, pack, packing, pad_id).to(device)
            with mixed:
                loss = answer_loss(model, head, batch.inputs, batch.index, batch.targets) / count
            loss.backward()
            total += float(loss.detach())
    found = {
        name: p.grad.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
        if p.grad is not None
        else torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return Gradients(total, found)


def _rounding(
    model: Any, rows: Sequence[Row], precision: Precision, pad_id: int, head: Any, plain: Gradients
) -> tuple[Gradients, float]:
    """What to compare with, and how far a right computation in fp32 may be from it, for this model and these rows.

    How far fp32 sums in another order come apart depends on the model, the rows and the processor's own kernels.
    """
    import torch

    exact = _in_format(model, torch.float64, rows, precision, pad_id, head)
    if exact is None:
        return plain, UNKNOWN_ROUNDING
    return exact, max(TOLERANCE, ROUNDING * plain.error(exact))


def _in_format(
    model: Any, dtype: Any, rows: Sequence[Row], precision: Precision, pad_id: int, head: Any
) -> Gradients | None:
    """Rows one by one with the weights in a wider number format; None where they are quantized or do not fit."""
    from labeltune.training.memory import free_memory

    parameters = list(model.parameters())
    needed = dtype.itemsize * sum(p.numel() for p in parameters if p.dtype != dtype)
    quantized = any(not p.is_floating_point() for p in parameters)
    possible = not quantized and not is_sharded(model) and needed < 0.8 * free_memory(parameters[0].device)
    if not _everywhere(possible):
        return None
    kept = [(t, t.data) for t in [*parameters, *model.buffers()] if t.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        return _gradients(model, rows, _one_by_one(rows), "padded", precision, pad_id, head, autocast=False)
    finally:
        for tensor, data in kept:
            tensor.data = data


def _everywhere(verdict: bool) -> bool:
    """Whether all processes say so; they must take the same way."""
    return bool(reduced([float(verdict)], "min")[0])


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Training mode with every dropout off; random state, modes and gradients are put back."""
    import numpy as np
    import torch

    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    modes = [(module, module.training) for module in model.modules()]
    rates = [
        (module, module.attention_dropout)
        for module in model.modules()
        if isinstance(getattr(module, "attention_dropout", None), float)
    ]
    try:
        model.train()
        for module, _ in modes:
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.eval()
        for module, _ in rates:
            module.attention_dropout = 0.0
        yield
    finally:
        for module, rate in rates:
            module.attention_dropout = rate
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)
