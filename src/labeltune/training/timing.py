"""How long a run's steps take on this machine: measured on a few of the model's layers, its output layer and its optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from labeltune.training.costs import Flops, ModelShape, SmallModel, seconds_of, small_ids
from labeltune.training.loss import chunked_cross_entropy
from labeltune.training.memory import random_state_kept

if TYPE_CHECKING:
    from labeltune.training.planner import Pack, Packing, Row

Found = TypeVar("Found")

#: Layers of the deeper one of the two models that are timed. They divide the error of a layer's time.
MANY = 4
#: Rounds over the sampled steps: as many as fit into these seconds, but so many at least and at most.
SECONDS, LEAST, MOST = 8.0, 4, 20


def layer_seconds(
    few: SmallModel,
    many: SmallModel,
    steps: Sequence[tuple[Sequence[Row], Sequence[Pack]]],
    packing: Packing,
    checkpointing: bool,
) -> tuple[float, float]:
    """Seconds of all packs, forward and backward: (what a model without layers would take, one layer).

    Both models take turns, so that a machine that is slow for a while is slow for both.
    """
    small = [(small_ids(rows), packs) for rows, packs in steps]
    for model in (few, many):
        model.prepare(checkpointing)

    def passes(model: SmallModel) -> float:
        return sum(model.step(rows, pack, packing) for rows, packs in small for pack in packs)

    with random_state_kept():
        found = _rounds(lambda: (passes(few), passes(many)))
    layer = statistics.median(b - a for a, b in found) / (many.layers - few.layers)
    return max(0.0, statistics.median(a for a, _ in found) - few.layers * layer), max(layer, 0.0)


def output_seconds(shape: ModelShape, answers: int, dtype: Any, device: Any) -> float:
    """Seconds of the output layer, its gradient and the loss for so many positions, of random weights of its real size."""
    import torch

    with random_state_kept():
        head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, device=device, dtype=dtype)
        head.weight.requires_grad_(shape.head_trained)
        hidden = torch.randn(answers, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.zeros(answers, dtype=torch.long, device=device)

    def once() -> float:
        return seconds_of(lambda: chunked_cross_entropy(head, hidden, targets).backward(), device)

    return statistics.median(_rounds(once, SECONDS / 4))


def optimizer_seconds(model: SmallModel, trained: int) -> float:
    """Seconds of a step of AdamW over so many weights, from those of a small model."""
    import torch

    weights = [p for p in model.model.parameters() if p.requires_grad]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in weights]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)

    def work() -> None:
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()

    seconds = statistics.median(_rounds(lambda: seconds_of(work, copies[0].device), SECONDS / 8))
    return seconds * trained / sum(p.numel() for p in copies)


def run_seconds(
    shape: ModelShape,
    sample: Flops,
    whole: Flops,
    steps: int,
    sampled_steps: int,
    layers: tuple[float, float],
    output: float,
    optimizer: float,
) -> float:
    """Seconds of a run's optimizer steps.

    Args:
        sample: operations of the steps that were timed; `whole`: of all steps.
        steps: of the run; `sampled_steps`: that were timed.
        layers: what `layer_seconds` found for the sample.
        output: what `output_seconds` found for the sample's answers.
        optimizer: what `optimizer_seconds` found, of one step.
    """
    rest, layer = layers
    inside = layer * shape.layers * (whole.layers + whole.attention) / (sample.layers + sample.attention)
    return inside + output * whole.output / sample.output + (rest / sampled_steps + optimizer) * steps


def _rounds(once: Callable[[], Found], seconds: float = SECONDS) -> list[Found]:
    """What `once` finds, again and again, without the first time, which warms up."""
    once()
    found: list[Found] = []
    began = time.perf_counter()
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - began < seconds):
        found.append(once())
    return found
