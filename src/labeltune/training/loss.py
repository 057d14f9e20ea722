"""Cross-entropy on answer tokens only; the output layer runs on the columns that hold answers and on no others."""

from __future__ import annotations

from typing import Any


def answer_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Sum of the answer tokens' cross-entropies, divided by the answer tokens of the whole optimizer step.

    Args:
        outputs: the model's output, `logits` of shape [rows, columns, vocabulary] for the last columns of a batch.
        labels: shape [rows, columns], the tokens of these columns; -100 where nothing is to be learnt. The logits of
            a column predict the next column's token.
        num_items_in_batch: answer tokens of the step over all micro-batches and processes; those of this batch when None.

    Returns:
        A scalar in fp32.
    """
    import torch

    targets = labels[:, 1:].reshape(-1).to(outputs.logits.device)
    wanted = targets != -100
    logits = outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1])[wanted]
    total = torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="sum")
    count = wanted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if torch.is_tensor(count) else count)
