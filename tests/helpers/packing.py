"""A training step on random rows: packed, and its plain twin, every row by itself."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from helpers.tiny_models import CACHE_KINDS, make_model
from labeltune.models.precision import Precision
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import answer_loss
from labeltune.training.packing import Pack, Row

FP32 = Precision("fp32", torch.float32, "cpu")


VOCABULARY = 300


def lora_model(kind: str = "qwen2", layers: int = 2, **options: Any) -> Any:
    """Few layers with a LoRA adapter that is not zero, so that every matrix has a gradient; no dropout."""
    import peft

    model = make_model(VOCABULARY, kind, layers=layers)
    for key, value in options.items():
        setattr(model.config, key, value)
    torch.manual_seed(1)
    targets: Any = adaptable(model) if kind in CACHE_KINDS else "all-linear"
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
    ).train()


def adaptable(model: Any) -> list[str]:
    """Linear layers but the output layer, routers, what stands beside experts, and those of Mamba that peft refuses."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = {name.rsplit(".", 1)[-1] for name in linear if "expert" not in name}
    return sorted(names - {"lm_head", "out_proj", "gate", "layer"})


def random_rows(
    seed: int = 0, prefixes: tuple[int, ...] = (20, 9), each: int = 4, **limits: int
) -> list[Row]:
    """`each` rows behind each of several prefixes; texts of any length including none, answers of 1 to 6 tokens."""
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(count)]

    rows = []
    for length in prefixes:
        prefix = tokens(length)
        for _ in range(each):
            prompt = prefix + tokens(generator.randrange(0, limits.get("text", 12)))
            answer = tokens(generator.choice([1, 1, 3, limits.get("answer", 6)]))
            rows.append(Row.of([*prompt, *answer, 2], len(prompt), len(prompt) + len(answer)))
    return rows


def gradients(model: Any) -> dict[str, Any]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def plain(model: Any, rows: list[Row]) -> tuple[float, dict[str, Any]]:
    """The twin: nothing of labeltune but the row."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([[*row.ids, row.answer[-1]]])
        labels = torch.full_like(ids, -100)
        labels[0, row.answer_start :] = ids[0, row.answer_start :]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
        total = total + row.weight * loss
    loss = total / sum(row.weight * len(row.answer) for row in rows)
    loss.backward()
    return float(loss.detach()), gradients(model)


def packed(
    model: Any, rows: list[Row], packs: list[Pack], packing: Any, head: Any
) -> tuple[float, dict[str, Any]]:
    count = sum(row.weight * len(row.answer) for row in rows)
    total = 0.0
    with attention_for(model, packing):
        for pack in packs:
            batch = make_batch(rows, pack, packing, pad_id=0)
            loss = answer_loss(model, head, batch) / count
            loss.backward()
            total += float(loss.detach())
    return total, gradients(model)


def assert_equal(
    found: tuple[float, dict[str, Any]], right: tuple[float, dict[str, Any]], rtol: float = 1e-5
) -> None:
    assert found[0] == pytest.approx(right[0], rel=rtol)
    assert set(found[1]) == set(right[1]) and right[1]
    for name, gradient in right[1].items():
        size = gradient.norm()
        assert size > 0, f"{name} has a gradient to compare"
        assert (found[1][name] - gradient).norm() <= rtol * size, name
