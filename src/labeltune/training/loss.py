"""Cross-entropy on answer tokens only. The output layer runs on their positions alone, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from labeltune.models.own_cache import run_behind
from labeltune.models.precision import fp32_product, replaced_forward
from labeltune.training.collate import ModelCall, PackBatch
from labeltune.training.packing import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Memory of the fp32 logits of answer positions that exist at once; in Qwen2's vocabulary of 151,936 those of 128 positions on a CPU, whose
#: caches hold less, and of 883 on a GPU, which reads all weights of the output layer for every part.
LOGITS_BYTES = {"cuda": 512 * 2**20}
CHUNK = 128


def positions_at_once(vocabulary: int, device: torch.device) -> int:
    """Answer positions whose logits exist at once."""
    return max(CHUNK, LOGITS_BYTES.get(device.type, 0) // (4 * vocabulary))


def answer_loss(model: PreTrainedModel, head: torch.nn.Module | None, batch: PackBatch) -> torch.Tensor:
    """Sum of the cross-entropies (fp32, natural logarithm) of a pack's answer tokens, each multiplied by the weight of its row.

    Args:
        model: may be wrapped (DDP, autocast).
        head: the model's output layer when its result are the logits themselves (`chunkable_head`); it is then run
            here, in chunks. None runs it inside the model.

    Returns:
        A scalar.
    """
    losses = []
    for call, inputs in model_calls(model, batch):
        inputs = {**inputs, "logits_to_keep": call.columns}
        if head is None:
            logits = call.wanted(model(**inputs).logits)
            losses.append(_weighted_cross_entropy(logits, call.targets, call.loss_weights))
        else:
            losses.append(_loss_in_head(model, head, inputs, call))
    return torch.stack(losses).sum()


def _weighted_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    if weights is None:
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def answer_logits(model: PreTrainedModel, batch: PackBatch) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """For every call of a pack its examples, and the logits of their answer tokens, shape [answer tokens, vocabulary]."""
    for call, inputs in model_calls(model, batch):
        yield call.rows, call.wanted(model(**inputs, logits_to_keep=call.columns).logits)


def row_losses(
    model: PreTrainedModel, head: torch.nn.Module | None, batch: PackBatch, rows: Sequence[Row]
) -> Iterator[tuple[int, torch.Tensor]]:
    """For every row of a pack its number, and the sum of the cross-entropies of its answer tokens (fp32, a scalar), without gradients.

    Args:
        head, batch: as in `answer_loss`.
        rows: of the whole step.
    """
    with torch.no_grad():
        for call, inputs in model_calls(model, batch):
            inputs = {**inputs, "logits_to_keep": call.columns}
            if head is None:
                logits = call.wanted(model(**inputs).logits)
                losses = torch.nn.functional.cross_entropy(logits.float(), call.targets, reduction="none")
            else:
                losses = _token_losses_in_head(model, head, inputs, call)
            parts = torch.split(losses, [len(rows[i].answer) for i in call.rows])
            yield from ((i, part.sum()) for i, part in zip(call.rows, parts, strict=True))


def _token_losses_in_head(
    model: PreTrainedModel, head: torch.nn.Module, inputs: dict[str, Any], call: ModelCall
) -> torch.Tensor:
    plain, matrix = head.forward, next(head.parameters())

    def losses(hidden: torch.Tensor) -> torch.Tensor:
        states = call.wanted(hidden)
        chunk = positions_at_once(matrix.shape[0], states.device)
        found = []
        for at in range(0, len(states), chunk):
            part = states[at : at + chunk]
            logits = plain(part.to(matrix.dtype) if matrix.is_floating_point() else part).float()
            found.append(
                torch.nn.functional.cross_entropy(logits, call.targets[at : at + chunk], reduction="none")
            )
        return torch.cat(found).reshape(1, -1, 1)

    with replaced_forward(head, losses):
        return model(**inputs).logits.flatten()  # type: ignore[no-any-return]


def model_calls(model: PreTrainedModel, batch: PackBatch) -> Iterator[tuple[ModelCall, dict[str, Any]]]:
    """The calls of a pack with the keyword arguments of the model; what they follow is computed first."""
    if batch.prefix is None:
        yield from ((call, call.inputs) for call in batch.calls)
        return
    _, prefix = run_behind(model, None, batch.prefix, logits_to_keep=1)
    for call in batch.calls:
        behind = prefix.repeated(batch.prefix.new_zeros(len(call.rows)), last=True)
        yield call, {**call.inputs, behind.name: behind.cache, "use_cache": True}


def _loss_in_head(
    model: PreTrainedModel, head: torch.nn.Module, inputs: dict[str, Any], call: ModelCall
) -> torch.Tensor:
    """Inside the output layer's own call, as that is where its weights are whole when they are shared out over processes."""
    plain = head.forward

    def loss_for_logits(hidden: torch.Tensor) -> torch.Tensor:
        loss = chunked_cross_entropy(
            head, call.wanted(hidden), call.targets, weights=call.loss_weights, layer=plain
        )
        return loss.reshape(1, 1, 1).clone()  # type: ignore[no-any-return]

    with replaced_forward(head, loss_for_logits):
        return model(**inputs).logits.sum()  # type: ignore[no-any-return]


def chunked_cross_entropy(
    head: Any,
    hidden: torch.Tensor,
    targets: Any,
    chunk: int | None = None,
    *,
    weights: torch.Tensor | None = None,
    layer: Callable[[Any], Any] | None = None,
) -> Any:
    """Sum of (weighted) cross-entropies of `head(hidden)`, with the logits of at most `chunk` positions in memory.

    A frozen output layer gets the gradient for `hidden` in the same pass as the loss, so its logits are neither kept nor
    computed twice. A trained one is run again in the backward pass.

    Args:
        hidden: shape [positions, hidden size].
        targets: shape [positions].
        weights: fp32, shape [positions]; all 1 when None.
        chunk: `positions_at_once` when None.
        layer: what computes logits in place of `head(...)`: its plain `forward` when this runs inside the call of `head`.
    """
    apply = layer or head

    matrices = list(head.parameters())
    chunk = chunk or positions_at_once(matrices[0].shape[0], hidden.device)
    if type(head) is torch.nn.Linear and not any(w.requires_grad for w in matrices) and hidden.requires_grad:
        return FrozenHeadCrossEntropy.apply(hidden, head.weight, head.bias, (targets, weights), chunk)  # type: ignore[no-untyped-call]

    def part(states: torch.Tensor, right: torch.Tensor, each: torch.Tensor | None) -> torch.Tensor:
        logits = apply(states.to(matrices[0].dtype) if matrices[0].is_floating_point() else states)
        return _weighted_cross_entropy(logits, right, each)

    total = hidden.new_zeros((), dtype=torch.float32)
    for at in range(0, len(targets), chunk):
        here = slice(at, at + chunk)
        given = hidden[here], targets[here], None if weights is None else weights[here]
        total = total + (
            checkpoint(part, *given, use_reentrant=False) if torch.is_grad_enabled() else part(*given)
        )
    return total


_WORKSPACE: dict[int, torch.Tensor] = {}


def _workspace(rows: int, columns: int, device: torch.device) -> torch.Tensor | None:
    """An fp32 buffer of at least this many rows that is kept on the CPU, where touching fresh memory costs as much as computing
    in it; None elsewhere."""
    if device.type != "cpu":
        return None
    if columns not in _WORKSPACE or len(_WORKSPACE[columns]) < rows:
        _WORKSPACE[columns] = torch.empty(rows, columns)
    return _WORKSPACE[columns]


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """The function for a frozen linear output layer: d loss / d hidden = (softmax(logits) - onehot(target)) W, computed beside the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        right_and_weights: tuple[torch.Tensor, torch.Tensor | None],
        chunk: int,
    ) -> torch.Tensor:
        """Sum of the weighted losses; keeps the gradient for `hidden` that it computed on the way."""
        targets, weights = right_and_weights
        gradient = torch.empty_like(hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        buffer = _workspace(min(chunk, len(targets)), weight.shape[0], hidden.device)
        for start in range(0, len(targets), chunk):
            right = targets[start : start + chunk, None]
            states = hidden[start : start + chunk].to(weight.dtype)
            if buffer is None:
                logits = fp32_product(states, weight)
            elif weight.dtype == torch.float32:
                logits = torch.mm(states, weight.t(), out=buffer[: len(states)])
            else:
                logits = buffer[: len(states)].copy_(states @ weight.t())
            if bias is not None:
                logits += bias
            torch.log_softmax(logits, 1, out=logits)
            known = logits.gather(1, right)
            logits.exp_().scatter_add_(1, right, -torch.ones_like(right, dtype=torch.float32))
            if weights is not None:
                factors = weights[start : start + chunk, None]
                known, logits = known * factors, logits.mul_(factors)
            total -= known.sum()
            gradient[start : start + chunk] = (logits.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The kept gradient, scaled."""
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream).to(gradient.dtype), None, None, None, None


def chunkable_head(model: PreTrainedModel, ids: torch.Tensor) -> torch.nn.Module | None:
    """The model's output layer if the model returns its result unchanged, else None.

    Some models cap or scale what the output layer gives (Gemma 2, Cohere, Granite). Found out on `ids` of shape [1, tokens] with
    large numbers in place of logits, as a cap leaves small ones nearly as they are, and would cap the loss.
    """
    head = model.get_output_embeddings()
    if head is None or "forward" in vars(head):
        return None
    plain, given = head.forward, []

    def remembered(hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(hidden)
        numbers = torch.linspace(-1000, 1000, logits.numel(), device=logits.device)
        given.append(numbers.reshape(logits.shape).to(logits.dtype))
        return given[-1]

    with torch.no_grad(), replaced_forward(head, remembered):
        logits = model(input_ids=ids, use_cache=False).logits
    if len(given) != 1 or given[0].shape != logits.shape or logits.shape[:2] != ids.shape:
        return None
    return head if torch.equal(given[0].to(logits.dtype), logits) else None
