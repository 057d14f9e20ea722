"""Is the fast way of computing a step right for this model, on this machine, today? Computed both ways and compared.

A model may ignore the layout (its attention is written out, its forward drops unknown arguments), cap its attention, or
keep a state across positions. Every run therefore begins with a few real rows, each by itself through the plain model,
against the same rows in one pack: loss, and the gradient of every trained weight, with dropout off.

Rounding must not hide a wrong result. No row of a pack may feel what stands in another one, which needs no tolerance, and a run
in bf16 or fp16 is compared in fp32 first, with its own weights, unless they are quantized, spread over processes or too large.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from labeltune.distributed import all_reduce, is_sharded
from labeltune.errors import first_line
from labeltune.io.progress import Say
from labeltune.models.precision import (
    FELT,
    Precision,
    has_experts,
    moved_by,
    other_tokens,
    spread,
    weights_in,
)
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import answer_logits, answer_loss
from labeltune.training.packing import SHARING, Group, Pack, Packing, Row, pack_step
from labeltune.training.sharded import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Relative difference of loss and gradients in fp32 that needs no second look.
TOLERANCE = 1e-4
#: A larger one is compared with the rounding of the plain way itself: this many times its distance from fp64 is allowed.
ROUNDING = 4
#: Allowed in fp32 where the model does not fit into memory in fp64 for that.
UNKNOWN_ROUNDING = 1e-3
#: In bf16 and fp16 the plain way's own distance from fp32 is allowed this many times ...
OWN_ROUNDING = 2
#: ... but never more than this.
MIXED_TOLERANCE = 0.2
#: Allowed in bf16 and fp16 between the two ways where the weights cannot be had in fp32.
LOOSE_TOLERANCE = 5e-2
ROWS = 3
#: Longer rows are left out of the check while there are shorter ones, as it computes its rows about twenty times.
MOST_TOKENS = 1024
#: From the fastest way to the one that asks least of a model.
PLAINER: tuple[Packing, ...] = ("shared_prefix", "shared_cache", "packed", "padded")


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


def _square(tensor: torch.Tensor) -> float:
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
    """A few different rows: the shortest, the longest that `MOST_TOKENS` allows, and evenly spread ones between them."""
    different = sorted(dict.fromkeys(rows), key=lambda row: (len(row.ids), row.ids))
    short = [row for row in different if len(row.ids) <= MOST_TOKENS]
    if len(short) <= count:
        return different[:count]
    return spread(short, count)


def choose_packing(
    model: PreTrainedModel,
    rows: Sequence[Row],
    wanted: Packing,
    precision: Precision,
    pad_id: int,
    *,
    head: torch.nn.Module | None,
    say: Say,
    checkpointing: bool = False,
) -> Choice:
    """The wanted way, or the next plainer one that agrees with rows computed one by one; a change is said once.

    The random state is as before, gradients are none.

    Args:
        checkpointing: activations will be recomputed, for which transformers gives up the model's cache.
    """
    with _undisturbed(model):
        check = _Check(model, rows, precision, pad_id, head)
        reasons: list[str] = []
        for packing in PLAINER[PLAINER.index(wanted) :]:
            reason = _no_cache(model, checkpointing) if packing == "shared_cache" else None
            reason = reason or check.disagreement(packing)
            if _everywhere(reason is None):
                chosen = Choice(packing)
                break
            reasons.append(f"{packing}: {reason or 'another process disagrees'}")
        else:
            chosen = Choice("padded", one_by_one=True)
    if check.own_dropout:
        say(
            "this model has dropout of its own, which was off while packing was checked; in training, what a pack shares is "
            "dropped once a pack instead of once a row"
        )
    if chosen.packing == "shared_cache" and reasons:
        say(
            f"the shared prefix goes through the model's own cache, as labeltune's attention does not compute what this model "
            f"computes row by row ({reasons[0]})"
        )
    elif reasons:
        wanted = "shared_prefix" if wanted in SHARING else wanted
        then = "one example at a time" if chosen.one_by_one else f"packing={chosen.packing}"
        say(
            f"warning: training.packing={wanted} does not compute what this model computes row by row "
            f"({'; '.join(reasons)}); training goes on with {then}, slower and exact"
        )
    return chosen


def _no_cache(model: PreTrainedModel, checkpointing: bool) -> str | None:
    """Why the model's cache cannot be used in this run, whatever the model computes."""
    if checkpointing:
        return "gradient checkpointing gives up the model's cache"
    # A forward pass gathers the weights of all processes, which do not call the model equally often this way.
    return "the weights are spread over processes" if is_sharded(model) else None


class _Check:
    """Compares ways of computing some rows with the rows one by one; what the rows one by one give is computed once."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        precision: Precision,
        pad_id: int,
        head: torch.nn.Module | None,
    ) -> None:
        self.model, self.rows, self.precision, self.pad_id, self.head = model, rows, precision, pad_id, head
        self.alone = _one_by_one(rows)
        self.own_dropout = self._leave_training_mode_if_random()
        self.plain = self._gradients(self.alone, "padded")
        self.exact: Gradients | None = None
        self.limit = TOLERANCE
        if precision.name != "fp32":
            self.exact = self._in_format(torch.float32, self.alone, "padded")

    def _leave_training_mode_if_random(self) -> bool:
        """Whether the model draws random numbers that no dropout layer stands for: it is then compared in evaluation mode.

        Found by computing a row again: a rate may be an attribute of any name, or stand in the code.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        if self._repeats():
            return False
        self.model.eval()
        if self._repeats():
            return True
        # This device does not add in the same order twice.
        for module, mode in modes:
            module.training = mode
        return False

    def _repeats(self) -> bool:
        """Whether a row that is computed again has the same logits, to the last bit."""
        first, second = (self._logits(self.rows, self.alone[:1], "padded", True) for _ in range(2))
        return _everywhere(all(torch.equal(first[k], second[k]) for k in first))

    def disagreement(self, packing: Packing) -> str | None:
        """Why this way cannot be used, or None."""
        reason = self._compared(packing)
        if self.precision.name == "fp32" and self.exact is None and not _everywhere(reason is None):
            self._look_twice()
            reason = self._compared(packing)
        return reason

    def _compared(self, packing: Packing) -> str | None:
        packs = pack_step(self.rows, sum(len(row.ids) for row in self.rows), packing)[0]
        try:
            felt = None if packing == "padded" else self._rows_felt(packs, packing)
            return self._gradients_differ(packs, packing) or felt
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a foreign model does with a layout it does not know
            return first_line(error)

    def _look_twice(self) -> None:
        """In fp32: what to compare with, and how far a right computation may be from it, for this model and these rows.

        How far fp32 sums in another order come apart depends on the model, the rows and the processor's own kernels.
        """
        try:
            exact = self._in_format(torch.float64, self.alone, "padded")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operator that fp64 is unknown to, as that of grouped experts
            exact = None
        own = UNKNOWN_ROUNDING if exact is None else ROUNDING * self.plain.error(exact)
        self.exact, self.limit = exact or self.plain, max(TOLERANCE, own)

    def _gradients_differ(self, packs: Sequence[Pack], packing: Packing) -> str | None:
        """Loss and gradients against those of rows one by one: with rounding out of the way, then in the format of the run."""
        if self.precision.name == "fp32":
            return _too_far(self._gradients(packs, packing).error(self.exact or self.plain), self.limit)
        if self.exact is None:
            return _too_far(self._gradients(packs, packing).error(self.plain), LOOSE_TOLERANCE)
        in_fp32 = self._in_format(torch.float32, packs, packing)
        assert in_fp32 is not None
        own = OWN_ROUNDING * self.plain.error(self.exact)
        return _too_far(in_fp32.error(self.exact), UNKNOWN_ROUNDING) or _too_far(
            self._gradients(packs, packing).error(self.exact), min(max(own, TOLERANCE), MIXED_TOLERANCE)
        )

    def _rows_felt(self, packs: Sequence[Pack], packing: Packing) -> str | None:
        """How the tokens of one row change the logits of another, in words; None if they do not.

        Shapes and places stay the same, so rounding does too, to the last bit. Only for experts, whose shapes follow the tokens,
        a little is allowed in fp32.
        """
        found: str | None = None
        with weights_in(self.model, torch.float32, _everywhere) as in_fp32:
            slack = FELT if in_fp32 and has_experts(self.model) else 0.0
            before, again = (self._logits(self.rows, packs, packing, not in_fp32) for _ in range(2))
            for changed in range(len(self.rows)):
                rows = [*self.rows]
                rows[changed] = _other_tokens(rows[changed], packs, changed)
                after = self._logits(rows, packs, packing, not in_fp32)
                # Every process makes all passes, as those whose weights are spread wait for each other.
                for k in after.keys() - {changed}:
                    found = found or moved_by("row", before[k], again[k], after[k], slack)
        return found

    def _logits(
        self, rows: Sequence[Row], packs: Sequence[Pack], packing: Packing, autocast: bool
    ) -> dict[int, Any]:
        """Logits at each row's answer tokens, shape [answer tokens, vocabulary], when all are computed together."""
        found: dict[int, Any] = {}
        with torch.no_grad(), attention_for(self.model, packing):
            for pack in packs:
                batch = make_batch(rows, pack, packing, self.pad_id).to(self.device)
                with self._mixed(autocast):
                    for numbers, logits in answer_logits(self.model, batch):
                        sizes = [len(rows[k].answer) for k in numbers]
                        found |= dict(zip(numbers, torch.split(logits, sizes), strict=True))
        return found

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    def _mixed(self, autocast: bool = True) -> contextlib.AbstractContextManager[Any]:
        return self.precision.mixed() if autocast else contextlib.nullcontext()

    def _in_format(self, dtype: torch.dtype, packs: Sequence[Pack], packing: Packing) -> Gradients | None:
        """With the weights in a wider number format; None where that is impossible."""
        with weights_in(self.model, dtype, _everywhere) as possible:
            return self._gradients(packs, packing, autocast=False) if possible else None

    def _gradients(self, packs: Sequence[Pack], packing: Packing, autocast: bool = True) -> Gradients:
        self.model.zero_grad(set_to_none=True)
        count = sum(len(row.answer) for row in self.rows)
        total = 0.0
        with attention_for(self.model, packing):
            for pack in packs:
                batch = make_batch(self.rows, pack, packing, self.pad_id).to(self.device)
                with self._mixed(autocast):
                    loss = answer_loss(self.model, self.head, batch)
                (loss / count).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach()) / count
        found = {
            name: p.grad.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
            if p.grad is not None
            else torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }
        self.model.zero_grad(set_to_none=True)
        return Gradients(total, found)


def _too_far(difference: float, limit: float) -> str | None:
    return None if difference <= limit else f"relative difference {difference:.1e}, allowed {limit:.1e}"


def _other_tokens(row: Row, packs: Sequence[Pack], number: int) -> Row:
    """The row with other tokens behind the prefix that it shares."""
    prefix = next(group.prefix for pack in packs for group in pack.groups if number in group.rows)
    return replace(row, ids=(*row.ids[:prefix], *other_tokens(row.ids[prefix:])))


def _one_by_one(rows: Sequence[Row]) -> list[Pack]:
    return [Pack((Group(0, (i,)),)) for i in range(len(rows))]


def _everywhere(verdict: bool) -> bool:
    """Whether all processes say so; they must take the same way."""
    return bool(all_reduce([float(verdict)], "min")[0])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put all random states back, so that what is measured before a run does not change the run."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Training mode with every dropout layer off; random state, modes and gradients are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for module, _ in modes:
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.eval()
        with random_state_kept():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)
