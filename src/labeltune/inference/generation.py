"""Plain batched greedy generation: prompts in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from labeltune.prompts.template import ChatTemplate


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """Greedy continuations, without the end of turn, in the order of the prompts.

    Prompts are sorted by length and padded on the left; position ids follow the attention mask, so padding does not
    change an answer (up to rounding).

    Args:
        prompts: token ids, one sequence a prompt.
        stop_ids: ids that end an answer; padding may be one of them.
        max_new_tokens: longest answer in tokens.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), width), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            with torch.inference_mode():
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=list(stop_ids),
                    pad_token_id=pad,
                )
            for row, index in enumerate(chosen):
                answers[index] = _until_stop(output[row, width:].tolist(), stop_ids)
    finally:
        model.train(was_training)
    return answers


def stop_ids(model: PreTrainedModel, template: ChatTemplate) -> list[int]:
    """Ids that end an answer: those of the chat template first, then those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    known = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return list(dict.fromkeys([*template.stop_ids, *known]))


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[:position]
    return ids
