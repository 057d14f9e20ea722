"""What answers count for: soft labels, smoothing and class weights, against PyTorch, scikit-learn and single sequences."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

import labeltune
from helpers.packing import gradients, packed
from helpers.rows import LABELS, classification_rows, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from helpers.training import config_for, logged
from labeltune.commands.preparing import rows_by_label, tokenize_splits, training_weights
from labeltune.config import RunConfig, TrainingConfig, build_config
from labeltune.data.loading import load_splits
from labeltune.errors import ConfigError
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.prompts.weights import AnswerWeights, balanced
from labeltune.training.dataset import content_key, tokenize_rows
from labeltune.training.loss import chunkable_head
from labeltune.training.packing import pack_step, to_rows
from labeltune.training.preflight import MemoryBudget, describe
from labeltune.training.trainer import StepSettings
from labeltune.types import Example

SOFT = (("Space", 0.625), ("Art", 0.25), ("Sports", 0.125))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [{}, {"Sports": 3.0, "Art": 0.5}])
@pytest.mark.parametrize("shares", [{"Space": 1.0}, dict(SOFT), {"Art": 0.5, "Sports": 0.5}])
def test_the_loss_is_that_of_pytorch(
    smoothing: float, classes: dict[str, float], shares: dict[str, float]
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, dtype=torch.float64)
    target = torch.tensor([[shares.get(label, 0.0) for label in LABELS]], dtype=torch.float64)
    weight = torch.tensor([classes.get(label, 1.0) for label in LABELS], dtype=torch.float64)
    right = torch.nn.functional.cross_entropy(
        logits, target, weight=weight, label_smoothing=smoothing, reduction="sum"
    )
    found = AnswerWeights(classes, smoothing).weighed(shares, LABELS)
    assert next(iter(found)) == next(iter(shares))
    assert set(found) == set(LABELS if smoothing else shares)
    logs = logits.log_softmax(1)[0]
    loss = -sum(found[label] * logs[at] for at, label in enumerate(LABELS) if label in found)
    torch.testing.assert_close(loss, right)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = ["Sports"] * 7 + ["Space"] * 2 + ["Art"]
    names = sorted(set(labels))
    expected = compute_class_weight("balanced", classes=np.array(names), y=labels)
    found = balanced({label: labels.count(label) for label in names})
    assert [found[name] for name in names] == pytest.approx(list(expected))


def soft_rows() -> list[dict[str, Any]]:
    rows = classification_rows(6)
    rows[1]["output"], rows[4]["output"] = dict(SOFT), {"Art": 0.5, "Sports": 0.5}
    return rows


def loaded(folder: Path, rows: list[dict[str, Any]], **training: Any) -> tuple[RunConfig, Any, PromptBuilder]:
    data = {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "validation_fraction": 0}
    config = build_config({"data": data, "prompt": {"max_length": 512}, "training": training})
    splits = load_splits(config.task, config.data, config.hub, 0)
    task = make_task(config.task, splits.labels, config.prompt)
    return config, splits, PromptBuilder(task, ChatTemplate(make_tokenizer()))


def test_rows_are_counted_by_their_shares(in_folder: Path) -> None:
    _, splits, _ = loaded(in_folder, soft_rows())
    assert rows_by_label(splits.train) == pytest.approx({"Sports": 2.625, "Space": 0.625, "Art": 2.75})
    weights = training_weights(TrainingConfig(class_weights="balanced"), splits.train)
    assert weights.of("Space") == pytest.approx(6 / (3 * 0.625))
    counts = rows_by_label(splits.train)
    assert sum(weights.of(label) * count for label, count in counts.items()) == pytest.approx(6)
    assert training_weights(TrainingConfig(), splits.train) == AnswerWeights()
    named = TrainingConfig(class_weights={"Art": 3}, label_smoothing=0.2)
    assert training_weights(named, splits.train) == AnswerWeights({"Art": 3.0}, 0.2)


@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded", "shared_cache"])
def test_a_step_is_the_weighted_loss_of_complete_answers(packing: Any, in_folder: Path) -> None:
    """Every candidate of every row as a conversation of its own, through plain transformers."""
    classes, smoothing = {"Art": 2.0, "Space": 0.25}, 0.1
    _, splits, builder = loaded(in_folder, soft_rows())
    weighing = PromptBuilder(builder.task, builder.template, AnswerWeights(classes, smoothing))
    tokens, account = tokenize_rows(splits.train, weighing)
    rows = to_rows(list(tokens))
    assert len(rows) == 6 * 3 and account.answer_tokens == sum(len(row.answer) for row in rows)
    tokenizer = builder.template.tokenizer
    model = make_model(len(tokenizer)).train()
    examples = [Example.from_row(row) for row in splits.train]
    total, answer_tokens = torch.zeros(()), 0.0
    for example in examples:
        shares = dict(example.shares) or {example.label: 1.0}
        asked = builder.task.conversation(example).messages()
        for label in LABELS:
            said = [*asked, {"role": "assistant", "content": label}]
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(said, tokenize=False).removesuffix("\n")
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            ids = torch.tensor([tokenizer(whole, add_special_tokens=False).input_ids])
            weight = ((1 - smoothing) * shares.get(label, 0.0) + smoothing / 3) * classes.get(label, 1.0)
            logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
            total = total + weight * torch.nn.functional.cross_entropy(
                logits, ids[0, start:], reduction="sum"
            )
            answer_tokens += weight * (ids.shape[1] - start)
    loss = total / answer_tokens
    loss.backward()
    expected = gradients(model)
    (packs,) = pack_step(rows, 10_000, packing)
    head = chunkable_head(model, torch.tensor([rows[0].ids]))
    found, found_gradients = packed(model, rows, packs, packing, head)
    assert found == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_smoothing_costs_only_the_answers(in_folder: Path) -> None:
    _, splits, builder = loaded(in_folder, classification_rows(6))
    plain, _ = tokenize_rows(splits.train, builder)
    assert plain["others"][:] == [[]] * 6 and set(plain["weight"][:]) == {1.0}
    smoothed, _ = tokenize_rows(
        splits.train, PromptBuilder(builder.task, builder.template, AnswerWeights({}, 0.1))
    )
    for before, after in zip(plain, smoothed, strict=True):
        assert after["input_ids"] == before["input_ids"]
        assert after["length"] == before["length"] + sum(len(each["ids"]) for each in after["others"])
        assert [after["weight"], *(each["weight"] for each in after["others"])] == pytest.approx(
            [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]
        )


def test_costs_are_told_an_example_not_an_answer(in_folder: Path) -> None:
    _, splits, builder = loaded(in_folder, classification_rows(6))
    weighing = PromptBuilder(builder.task, builder.template, AnswerWeights({}, 0.1))
    rows = to_rows(list(tokenize_rows(splits.train, weighing)[0]))
    settings = StepSettings("shared_prefix", 10_000, 0, None)
    told = describe(settings, MemoryBudget(10_000, False, 1, 1), [rows])
    given = sum(len(row.ids) for row in rows)
    assert f"{settings.computed([rows]) / 6:.0f} tokens computed per example of {given / 6:.0f};" in told


def test_validation_rows_are_neither_weighted_nor_smoothed(in_folder: Path) -> None:
    rows = classification_rows(30)
    for row in rows[:12]:
        row["output"] = "Art"
    data = {"train": str(write_jsonl(in_folder / "rows.jsonl", rows)), "validation_fraction": 0.2}
    training = {"class_weights": "balanced", "label_smoothing": 0.1}
    config = build_config({"data": data, "prompt": {"max_length": 512}, "training": training})
    splits = load_splits(config.task, config.data, config.hub, 0)
    builder = PromptBuilder(
        make_task(config.task, splits.labels, config.prompt), ChatTemplate(make_tokenizer())
    )
    said: list[str] = []
    train, validation = tokenize_splits(config, splits, builder, said.append)
    assert validation is not None
    assert set(validation["weight"][:]) == {1.0} and not any(validation["others"][:])
    assert all(len(others) == 2 for others in train["others"][:])
    labels = splits.train["label"]
    low, high = (len(labels) / (3 * labels.count(name)) for name in ("Art", "Sports"))
    assert said[0] == f"class weights: from {low:.3g} (Art) to {high:.3g} (Sports)"


def test_tokens_follow_from_weights_and_shares(in_folder: Path) -> None:
    _, splits, builder = loaded(in_folder, soft_rows())
    rows = splits.train

    def key(weights: AnswerWeights | None = None) -> str:
        return content_key(rows, PromptBuilder(builder.task, builder.template, weights))

    hard = rows.map(lambda row: {**row, "shares": []})
    keys = [
        key(),
        key(AnswerWeights({"Art": 2.0})),
        key(AnswerWeights({"Art": 3.0})),
        key(AnswerWeights({}, 0.1)),
    ]
    assert len({*keys, content_key(hard, builder)}) == 5
    assert key(AnswerWeights()) == keys[0]


def test_a_run_learns_weighted_smoothed_and_soft_labels(in_folder: Path, model_folder: Path) -> None:
    config = config_for(
        in_folder, model_folder, epochs=2, save_steps=100, class_weights="balanced", label_smoothing=0.1
    )
    rows = classification_rows(48)
    generator = random.Random(0)
    for row in rows:
        if generator.random() < 0.5:
            other = next(label for label in LABELS if label != row["output"])
            row["output"] = {row["output"]: 0.75, other: 0.25}
    write_jsonl(Path(config.data.train), rows)
    result = labeltune.train(config)
    losses = [line["loss"] for line in logged(result.last, "loss")]
    assert losses[-1] < losses[0]
    record = json.loads((result.last / "training.json").read_text(encoding="utf-8"))
    assert record["config"]["training"]["class_weights"] == "balanced"
    for values in ({"class_weights": "none"}, {"class_weights": {"Art": 2.0}}, {"label_smoothing": 0.0}):
        training = config.training.model_copy(update={"max_steps": 99, **values})
        (key,) = values
        with pytest.raises(ConfigError, match=rf"training\.{key}: .* in checkpoint-12, .* now"):
            labeltune.train(config.model_copy(update={"training": training}), resume=True)


def test_a_run_that_knew_no_weights_is_not_resumed_with_some(in_folder: Path, model_folder: Path) -> None:
    from labeltune.training.checkpoints import write_manifest

    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    result = labeltune.train(config)
    file = result.last / "training.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    for key in ("class_weights", "label_smoothing"):
        del record["config"]["training"][key]
    file.write_text(json.dumps(record), encoding="utf-8")
    write_manifest(result.last)
    training = config.training.model_copy(update={"max_steps": 3, "class_weights": "balanced"})
    with pytest.raises(ConfigError, match=r'class_weights: "none" in checkpoint-2, "balanced" now'):
        labeltune.train(config.model_copy(update={"training": training}), resume=True)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"class_weights": "balanced"},
            "training.class_weights weighs the labels of rows, and task=ner has none",
        ),
        ({"class_weights": {"GPE": 2}}, "training.class_weights weighs the labels of rows"),
        ({"label_smoothing": 0.1}, "training.label_smoothing needs candidate labels, and task=ner has none"),
    ],
)
def test_entities_have_no_weights(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"task": "ner", "training": training})


@pytest.mark.parametrize(
    "training", [{"class_weights": {"A": 0}}, {"class_weights": "some"}, {"label_smoothing": 1}]
)
def test_impossible_weights_are_refused(training: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{next(iter(training))}"):
        build_config({"training": training})


def test_weights_of_labels_that_are_not_there(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, class_weights={"art": 2})
    told = (
        "training.class_weights names an unknown label: 'art' is not among the labels of the training rows; "
        "did you mean 'Art'?"
    )
    with pytest.raises(ConfigError) as raised:
        labeltune.train(config)
    assert str(raised.value) == told
