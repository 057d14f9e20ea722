"""Training on the softmax of complete answers: the gradients of its plain twin, however rows are packed, and the same dropout in both passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers.packing import gradients
from helpers.rows import LABELS, classification_rows, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from helpers.training import adapter_weights, config_for, logged
from labeltune.config import build_config
from labeltune.data.loading import load_splits
from labeltune.errors import ConfigError
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.prompts.weights import AnswerWeights
from labeltune.training import trainer
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.dataset import tokenize_rows
from labeltune.training.loss import answer_loss, chunkable_head, row_losses
from labeltune.training.objective import weighed
from labeltune.training.packing import Row, pack_step, to_rows
from labeltune.types import Example

CLASSES = {"Art": 2.0, "Space": 0.25}


def prepared(folder: Path, weights: AnswerWeights) -> tuple[list[Example], PromptBuilder, list[Row]]:
    raw = classification_rows(6)
    raw[1]["output"], raw[4]["output"] = {"Sports": 0.2, "Space": 0.8}, {"Art": 0.5, "Sports": 0.5}
    data = {"train": str(write_jsonl(folder / "rows.jsonl", raw)), "validation_fraction": 0}
    config = build_config({"data": data, "prompt": {"max_length": 512}})
    splits = load_splits(config.task, config.data, config.hub, 0)
    task = make_task(config.task, splits.labels, config.prompt)
    builder = PromptBuilder(task, ChatTemplate(make_tokenizer()), weights)
    rows = to_rows(list(tokenize_rows(splits.train, builder)[0]))
    return [Example.from_row(row) for row in splits.train], builder, rows


def plain(
    model: Any, examples: list[Example], builder: PromptBuilder, smoothing: float, tokens_too: bool
) -> torch.Tensor:
    """The twin: every answer of every example as a conversation of its own; PyTorch's `cross_entropy` of their log-probabilities."""
    tokenizer = builder.template.tokenizer
    scores, wanted, token_loss, answer_tokens = [], [], torch.zeros(()), 0.0
    weights = torch.tensor([CLASSES.get(label, 1.0) for label in LABELS])
    for example in examples:
        shares = dict(example.shares) or {example.label: 1.0}
        asked = builder.task.conversation(example).messages()
        found = []
        for label in LABELS:
            said = [*asked, {"role": "assistant", "content": label}]
            ids = torch.tensor([tokenizer.apply_chat_template(said, return_dict=False)])
            start = len(tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False))
            end = start + len(builder.answer_ids(label))
            logits = model(input_ids=ids[:, :end], use_cache=False).logits[0, start - 1 : end - 1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, start:end], reduction="none")
            found.append(-losses.sum())
            share = (1 - smoothing) * shares.get(label, 0.0) + smoothing / len(LABELS)
            weight = share * CLASSES.get(label, 1.0)
            token_loss = token_loss + weight * losses.sum()
            answer_tokens += weight * len(losses)
        scores.append(torch.stack(found))
        wanted.append(
            torch.tensor(
                [(1 - smoothing) * shares.get(label, 0.0) + smoothing / len(LABELS) for label in LABELS]
            )
        )
    each = torch.stack(wanted) * weights
    labels = -(each * torch.log_softmax(torch.stack(scores), 1)).sum() / each.sum()
    return labels + token_loss / answer_tokens if tokens_too else labels


@pytest.mark.parametrize("most", [10_000, 150])
@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded", "shared_cache"])
def test_gradients_are_those_of_the_plain_twin(packing: Any, most: int, in_folder: Path) -> None:
    smoothing = 0.1 if packing == "padded" else 0.0
    objective: Any = "both" if packing == "packed" else "labels"
    examples, builder, rows = prepared(in_folder, AnswerWeights(CLASSES, smoothing, every=True))
    assert len(rows) == 6 * 3
    model = make_model(len(builder.template.tokenizer)).train()
    loss = plain(model, examples, builder, smoothing, objective == "both")
    loss.backward()
    expected = gradients(model)
    (packs,) = pack_step(rows, most, packing)
    assert len(packs) > 1 or most == 10_000, "the answers of an example stand in several packs"
    head = chunkable_head(model, torch.tensor([rows[0].ids])) if packing != "packed" else None
    batches = [make_batch(rows, pack, packing, pad_id=0) for pack in packs]
    losses = torch.zeros(len(rows), dtype=torch.float64)
    with attention_for(model, packing):
        for batch in batches:
            for number, each in row_losses(model, head, batch, rows):
                losses[number] = each
        found = weighed(objective, rows, losses)
        for batch in batches:
            answer_loss(model, head, batch.weighed(rows, found.weights)).backward()
    assert found.value == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_both_passes_drop_the_same(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[dict[int, float]] = []
    second: list[float] = []
    weights: list[tuple[float, ...]] = []
    plain_losses, plain_loss, plain_weighed = trainer.row_losses, trainer.answer_loss, trainer.weighed

    def row_losses_seen(*given: Any) -> Any:
        found = list(plain_losses(*given))
        first.append({number: float(each) for number, each in found})
        return found

    def loss_seen(*given: Any) -> Any:
        loss = plain_loss(*given)
        if loss.requires_grad:
            second.append(float(loss.detach()))
        return loss

    def weighed_seen(*given: Any) -> Any:
        found = plain_weighed(*given)
        weights.append(found.weights)
        return found

    config = config_for(in_folder, model_folder, max_steps=1, objective="labels", max_tokens_per_pack=300)
    lora = config.lora.model_copy(update={"dropout": 0.5})
    monkeypatch.setattr(trainer, "row_losses", row_losses_seen)
    monkeypatch.setattr(trainer, "weighed", weighed_seen)
    monkeypatch.setattr(trainer, "answer_loss", loss_seen)
    labeltune.train(config.model_copy(update={"lora": lora}), say=lambda _: None)
    (each,) = weights
    assert len(first) == len(second) > 1
    expected = [sum(each[number] * loss for number, loss in pack.items()) for pack in first]
    assert second == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_objectives_train_from_end_to_end(in_folder: Path, model_folder: Path) -> None:
    found = {}
    for objective in ("tokens", "labels", "both"):
        config = config_for(in_folder, model_folder, max_steps=6, save_steps=1000, objective=objective)
        result = labeltune.train(config, overwrite=True, say=lambda _: None)
        found[objective] = (
            adapter_weights(result.last),
            [entry["loss"] for entry in logged(result.last, "loss")],
        )
    (_, tokens), (_, labels), (_, both) = found.values()
    # A model that knows nothing: of three answers one is right.
    assert labels[0] == pytest.approx(1.0986, abs=0.3) and both[0] == pytest.approx(
        tokens[0] + labels[0], rel=0.05
    )
    assert any(
        not torch.equal(tensor, found["labels"][0][name]) for name, tensor in found["tokens"][0].items()
    )


def test_other_tasks_have_no_such_objective() -> None:
    for task in ("ner", "multilabel"):
        with pytest.raises(
            ConfigError, match=f"training.objective=labels needs one right label.*task={task}"
        ):
            build_config({"task": task, "training": {"objective": "labels"}})
