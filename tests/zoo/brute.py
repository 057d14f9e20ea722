"""What transformers and peft alone compute: one plain forward pass after the other, with nothing of labeltune's in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


@dataclass(frozen=True)
class PlainRow:
    """A prompt and the answer behind it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def plain_model(base: Path, adapter: Path | None, kind: str | None, dtype: torch.dtype) -> Any:
    """A base model with an adapter around it.

    Args:
        kind: the model's class; None for the causal language model.
    """
    loader = transformers.AutoModelForCausalLM if kind is None else getattr(transformers, kind)
    model = loader.from_pretrained(base, dtype=dtype, local_files_only=True)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    return model.eval()


def answer_scores(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every answer behind a prompt, each by a forward pass of its own."""
    found = []
    with torch.inference_mode():
        for answer in answers:
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].float()
            steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
            found.append(math.fsum(float(steps[at, token]) for at, token in enumerate(answer)))
    return found


def loss_and_gradients(
    model: Any, rows: Sequence[PlainRow], mixed: torch.dtype | None = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean cross-entropy of all answer tokens, and the gradients of what is trained, from one pass a row.

    Args:
        mixed: number format of autocast.
    """
    model.zero_grad(set_to_none=True)
    count, total = sum(len(row.answer) for row in rows), 0.0
    for row in rows:
        around = torch.autocast("cpu", dtype=mixed) if mixed else contextlib.nullcontext()
        with around:
            logits = model(input_ids=torch.tensor([[*row.prompt, *row.answer]]), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits[len(row.prompt) - 1 : -1].float(), torch.tensor(row.answer), reduction="sum"
        )
        (loss / count).backward()
        total += float(loss.detach()) / count
    found = {
        name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return total, found


def distance(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Relative difference of gradients, taken as one vector (2-norm)."""
    difference = sum(float((found[name].float() - right[name].float()).square().sum()) for name in right)
    size = sum(float(tensor.float().square().sum()) for tensor in right.values())
    return math.sqrt(difference / max(size, 1e-30))
