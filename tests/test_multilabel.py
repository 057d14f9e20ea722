"""Several labels a row: each decided by itself behind one shared prompt, against plain forward passes and scikit-learn's figures."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from helpers.packing import assert_equal, lora_model, packed, plain
from helpers.rows import read_jsonl, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from labeltune import evaluate, train
from labeltune.config import ColumnsConfig, TrainingConfig, build_config
from labeltune.data.loading import iterative_split, load_splits
from labeltune.data.records import Record
from labeltune.data.schemas import parse_record
from labeltune.errors import ConfigError, DataError, PromptError
from labeltune.evaluation.compare import compare_predictions
from labeltune.evaluation.decisions import (
    ENOUGH_OF_LABEL,
    fit_scales,
    label_thresholds,
    one_threshold,
    scales_report,
    threshold_report,
)
from labeltune.evaluation.multilabel import multilabel_metrics
from labeltune.inference.calibration import Calibration
from labeltune.inference.predictor import VERDICTS, Predictor
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.prompts.weights import AnswerWeights, balanced_each
from labeltune.training.dataset import token_columns
from labeltune.training.packing import pack_step, to_rows
from labeltune.training.token_figures import token_figures
from labeltune.types import Example, Prediction

NAMES = ("billing", "bill", "delivery", "praise", "account", "取消")
WORDS = {"billing": "money", "bill": "paper", "delivery": "parcel", "praise": "lovely", "account": "login"}
ENGLISH = {
    "system": "Does it apply? {positive} or {negative}",
    "user": "{text}",
    "positive": ": yes",
    "negative": ": no",
    "max_length": 256,
}


def predictor_with(labels: tuple[str, ...] = NAMES, kind: str = "qwen2", **prompt: Any) -> Predictor:
    tokenizer = make_tokenizer()
    config = build_config({"task": "multilabel", "prompt": {**ENGLISH, **prompt}})
    model = make_model(len(tokenizer), kind).eval()
    return Predictor(
        model, make_task("multilabel", labels, config.prompt), ChatTemplate(tokenizer, config.prompt)
    )


def rows_with_labels(count: int) -> list[dict[str, Any]]:
    """Each word of a text stands for a label; every seventh text has none."""
    generator = np.random.default_rng(0)
    names, rows = list(WORDS), []
    for number in range(count):
        chosen = [] if number % 7 == 6 else sorted(generator.choice(names, 1 + number % 3, replace=False))
        rows.append({"text": " ".join(WORDS[name] for name in chosen) + f" {number}", "labels": chosen})
    return rows


def plain_log_odds(predictor: Predictor, text: str, label: str) -> float:
    """The twin: nothing of labeltune but the conversation; one forward pass over the prompt and the whole answer."""
    example = Example("0", text, predictor.task.labels)
    found = []
    encoded = [
        predictor.template.encode(predictor.task.conversation(example), f"{label}{word}")
        for word in (predictor.task.prompt.positive, predictor.task.prompt.negative)
    ]
    same = next(at for at, (a, b) in enumerate(zip(*(each.ids for each in encoded), strict=False)) if a != b)
    for each in encoded:
        end = each.answer_span[1] - len(predictor.template.end_of_turn_ids)
        logits = predictor.model(input_ids=torch.tensor([each.ids]), use_cache=False).logits[0].double()
        chances = logits.log_softmax(-1)
        found.append(sum(float(chances[at - 1, each.ids[at]]) for at in range(same, end)))
    return found[0] - found[1]


# Probabilities


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "lfm2"])
def test_every_label_has_the_probability_of_a_plain_forward_pass(kind: str) -> None:
    predictor = predictor_with(kind=kind)
    texts = ["the money is gone", "lovely", "a parcel " * 9, "账单 😀"]
    with torch.no_grad():
        right = [[plain_log_odds(predictor, text, name) for name in NAMES] for text in texts]
    # A hybrid says that it goes through its own cache.
    with pytest.warns(UserWarning, match="own cache") if kind == "lfm2" else contextlib.nullcontext():
        found = predictor.log_odds([Example(str(n), text) for n, text in enumerate(texts)])
    assert [list(row) for row in found] == [list(NAMES)] * 4
    np.testing.assert_allclose([list(row.values()) for row in found], right, rtol=1e-4, atol=2e-5)
    chances = predictor.scores(texts)
    np.testing.assert_allclose(chances, 1 / (1 + np.exp(-np.array(right))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 500])
def test_one_label_and_five_hundred_that_begin_alike(count: int) -> None:
    labels = tuple(f"order problem {number}" for number in range(count))
    assert count == 1 or count > VERDICTS
    predictor = predictor_with(labels)
    (found,) = predictor.log_odds([Example("0", "the money is gone")])
    assert list(found) == list(labels)
    for name in (labels[0], labels[-1], labels[count // 2]):
        with torch.no_grad():
            assert found[name] == pytest.approx(
                plain_log_odds(predictor, "the money is gone", name), abs=1e-4
            )


def test_candidates_of_a_row_and_thresholds() -> None:
    predictor = predictor_with()
    odds = predictor.log_odds([Example("0", "money", ("praise", "bill"))])[0]
    assert set(odds) == {"praise", "bill"}
    p = {name: 1 / (1 + np.exp(-value)) for name, value in odds.items()}
    surest, other = sorted(p, key=lambda name: -p[name])
    predictor.calibration = Calibration(threshold=(p[surest] + p[other]) / 2)
    (found,) = predictor.predict([Example("0", "money", ("praise", "bill"))])
    assert found.labels == (surest,) and found.answer == surest and found.confidence is None
    assert [name for name, _ in found.ranking] == [surest, other]
    assert found.to_dict(threshold=0.0)["labels"] == [surest, other]
    assert found.to_dict(threshold=1.0)["labels"] == []
    predictor.calibration = Calibration(thresholds={surest: 1.0, other: 0.0}, scales={"bill": (1.0, 0.0)})
    assert predictor.predict([Example("0", "money", ("praise", "bill"))])[0].labels == (other,)


def test_scales_move_probabilities() -> None:
    calibration = Calibration(temperature=2.0, scales={"a": (0.5, 1.0)})
    assert calibration.each({"a": 2.0, "b": 2.0}) == pytest.approx(
        {"a": 1 / (1 + np.exp(-2)), "b": 1 / (1 + np.exp(-1))}
    )


def test_words_that_begin_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompt\.positive and prompt\.negative must differ"):
        build_config({"task": "multilabel", "prompt": {"positive": ": no", "negative": ": no"}})
    with pytest.raises(PromptError, match="begin alike to this model; name other words"):
        predictor_with(positive=": no no", negative=": no").log_odds([Example("0", "a")])
    with pytest.raises(ConfigError, match="never sees the descriptions"):
        build_config({"task": "multilabel", "data": {"labels": {"a": "the first"}}})
    with pytest.raises(ConfigError, match="multilabel asks about every label"):
        build_config({"task": "multilabel", "generation": {"decoding": "free"}})


def test_labels_are_read_off_lines() -> None:
    task = make_task("multilabel", ("a", "b c"), build_config({"task": "multilabel"}).prompt)
    example = Example("0", "t", labels=("a", "b c"))
    assert task.target(example) == "a\nb c"
    assert task.parse(example, "b c\na\n").labels == ("a", "b c")
    assert task.parse(example, "").labels == () and task.parse(example, "").parsed
    assert task.parse(example, "a\nother").labels == ("a",) and not task.parse(example, "a\nother").parsed


# Training


def dataset_of(rows: list[dict[str, Any]], folder: Path) -> Any:
    path = write_jsonl(folder / "rows.jsonl", rows)
    config = build_config({"task": "multilabel", "data": {"train": str(path), "validation_fraction": 0}})
    return load_splits("multilabel", config.data, None, 0).train


@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded", "shared_cache"])
def test_a_step_is_that_of_one_row_a_question(packing: Any, in_folder: Path) -> None:
    predictor = predictor_with(tuple(WORDS))
    data = dataset_of(rows_with_labels(6), in_folder)
    rows = to_rows(list(token_columns(data, predictor.builder)))
    assert len(rows) == 6 * len(WORDS)
    template, task = predictor.template, predictor.task
    for row, (example, label) in zip(
        rows, [(Example.from_row(r), name) for r in data for name in WORDS], strict=True
    ):
        word = task.prompt.positive if label in (example.labels or ()) else task.prompt.negative
        encoded = template.encode(task.conversation(example), f"{label}{word}")
        assert [*row.ids, row.answer[-1]] == encoded.ids[: len(row.ids) + 1]
        assert template.tokenizer.decode(row.answer).strip(": ") in ("yes", "no", "y", "n")
    model = lora_model()
    limited = [row for row in rows if max(*row.ids, *row.answer) < model.config.vocab_size]
    if len(limited) == len(rows):
        (packs,) = pack_step(rows, 10_000, packing)
        assert_equal(packed(model, rows, packs, packing, None), plain(model, rows), rtol=5e-5)
    shared = sum(pack.tokens(rows) for pack in pack_step(rows, 10_000)[0])
    assert 3 * shared < sum(len(row.ids) for row in rows)


def test_negatives_are_drawn_and_weighted(in_folder: Path) -> None:
    predictor = predictor_with(tuple(WORDS))
    builder = PromptBuilder(predictor.task, predictor.template, AnswerWeights(negatives=2, seed=1))
    data = dataset_of(rows_with_labels(14), in_folder)
    records = list(token_columns(data, builder))
    assert records == list(token_columns(data, builder))
    other = PromptBuilder(predictor.task, predictor.template, AnswerWeights(negatives=2, seed=2))
    assert records != list(token_columns(data, other))
    for record, row in zip(records, data, strict=True):
        weights = [record["weight"], *(each["weight"] for each in record["others"])]
        right, wrong = len(row["labels"]), len(WORDS) - len(row["labels"])
        assert len(weights) == right + min(2, wrong)
        assert sum(weights) == pytest.approx(len(WORDS)) and weights.count(1.0) >= right


def test_tokens_of_several_questions_are_counted(in_folder: Path) -> None:
    predictor = predictor_with(tuple(WORDS))
    found = token_figures(dataset_of(rows_with_labels(12), in_folder), predictor.builder, TrainingConfig())
    assert found.rows == 12 and found.answer_tokens >= 12 * len(WORDS)
    assert found.planned_rows == 12
    assert found.computed["shared_prefix"] < found.computed["packed"] / 2


def test_class_weights_and_smoothing_of_several_labels() -> None:
    weights = AnswerWeights({"a": 3.0}, smoothing=0.2)
    found = weights.decided("t", {"a": True, "b": True, "c": False})
    assert {name: pytest.approx(pair) for name, pair in found.items()} == {
        "a": (2.7, 0.3),
        "b": (0.9, 0.1),
        "c": (0.9, 0.1),
    }
    assert balanced_each({"a": 10, "b": 1}, 100) == {"a": 9.0, "b": 99.0}
    predictor = predictor_with(("a", "b"))
    predictor.builder.weights = weights
    example = Example("0", "t", labels=("a",))
    answers = predictor.builder.answers(example, predictor.builder.training(example))
    assert [round(answer.weight, 6) for answer in answers] == [2.7, 0.3, 0.9, 0.1]
    yes, no = (predictor.builder.verdict("a").yes, predictor.builder.verdict("a").no)
    assert [tuple(answer.ids) for answer in answers[:2]] == [yes, no]


def test_a_run_learns_and_its_commands_know_the_task(
    labeltune: Any, in_folder: Path, model_folder: Path
) -> None:
    rows = rows_with_labels(170)
    write_jsonl(in_folder / "train.jsonl", rows[:90])
    write_jsonl(in_folder / "validation.jsonl", rows[90:150])
    write_jsonl(in_folder / "test.jsonl", rows[150:])
    config = build_config(
        {
            "task": "multilabel",
            "model": str(model_folder),
            "output_dir": "out",
            "tracking": "none",
            "data": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
            "prompt": ENGLISH,
            "lora": {"r": 16, "dropout": 0.0},
            "training": {"epochs": 20, "batch_size": 8, "learning_rate": 5e-3, "save_steps": 1000},
        }
    )
    said: list[str] = []
    result = train(config, say=said.append)
    assert result.metric_name == "micro_f1"
    assert any(line.startswith("thresholds: ") and "; micro_f1 on rows they were" in line for line in said)
    assert any(
        line.startswith("confidence: probabilities are ") and "; 60 validation rows: NLL" in line
        for line in said
    )
    figures = evaluate("out", "test.jsonl", output="report")
    assert figures["task"] == "multilabel" and figures["map"] > 0.7
    assert figures["micro_f1"]["value"] > figures["baselines"]["constant_set"]["value"]
    page = (in_folder / "report" / "report.html").read_text("utf-8")
    assert 'id="together"' in page and 'class="curve"' in page
    answers = read_jsonl(in_folder / "report" / "predictions.jsonl")
    assert set(answers[0]) >= {"labels", "ranking", "right"} and len(answers[0]["ranking"]) == len(WORDS)

    found = labeltune("predict", "out", "test.jsonl", "-o", "all.jsonl", "--threshold", "0")
    assert found.code == 0 and all(
        len(row["labels"]) == len(WORDS) for row in read_jsonl(in_folder / "all.jsonl")
    )
    found = labeltune("predict", "out", "test.jsonl", "-o", "out.csv")
    assert (in_folder / "out.csv").read_text("utf-8-sig").startswith("id,labels,ranking,answer,parsed\n")
    found = labeltune("predict", "out", "-t", "a", "--min-confidence", "0.5")
    assert found.code == 2 and "--min-confidence is for one label a row" in found.err
    found = labeltune("compare", "base", "out", "--data", "test.jsonl", "-o", "compared")
    assert found.code == 0 and "micro_f1: " in found.err and "subset_accuracy: " in found.err
    found = labeltune("export", "out", "merged", "--merged")
    assert found.code == 0, found.err
    request = json.loads((in_folder / "merged" / "vllm_request.json").read_text("utf-8"))
    assert request["structured_outputs"]["choice"] == ["account: yes", "account: no"]
    assert "any number of which may apply" in (in_folder / "merged" / "README.md").read_text("utf-8")


# Data


@pytest.mark.parametrize(
    ("value", "right"),
    [
        (["a", "b"], ("a", "b")),
        ([], ()),
        ("", ()),
        ("a, b", ("a", "b")),
        ('["a", "b"]', ("a", "b")),
        ("[]", ()),
    ],
)
def test_labels_are_read(value: Any, right: tuple[str, ...]) -> None:
    record = Record("f:1", {"text": "t", "labels": value})
    example, faults = parse_record(record, 0, "multilabel", ColumnsConfig(), ("a", "b"))
    assert not faults and example is not None and example.labels == right


@pytest.mark.parametrize(
    ("values", "kind", "part"),
    [
        ({}, "missing_field", "labels is missing; write [] for a text"),
        ({"labels": None}, "empty_field", "labels is null; write [] for a text"),
        ({"labels": ["a", "a"]}, "duplicate_label", "labels holds 'a' more than once"),
        ({"labels": ["a", ""]}, "empty_field", "labels holds an empty label"),
        ({"labels": ["A"]}, "unknown_label", "did you mean 'a'?"),
        ({"labels": ["b"], "category": ["a"]}, "unknown_label", "'b' is not among category"),
        ({"labels": [1]}, "wrong_type", "labels must be a list of strings"),
        ({"labels": {"a": 1}}, "wrong_type", "labels must be a list of strings"),
    ],
)
def test_labels_that_cannot_be_used(values: dict[str, Any], kind: str, part: str) -> None:
    record = Record("f:1", {"text": "t", **values})
    example, faults = parse_record(record, 0, "multilabel", ColumnsConfig(), ("a", "b"))
    assert example is None and [fault.kind for fault in faults] == [kind] and part in faults[0].message


def test_data_check_knows_rows_with_several_labels(labeltune: Any, in_folder: Path) -> None:
    rows = [
        *rows_with_labels(8),
        {"text": "money 0", "labels": ["praise"]},
        {"text": "money 0", "labels": []},
    ]
    write_jsonl(in_folder / "rows.jsonl", rows)
    found = labeltune("data", "check", "rows.jsonl")
    assert found.code == 0 and "conflicting_duplicate" in found.out and "labels (5)" in found.out
    write_jsonl(in_folder / "none.jsonl", [{"text": str(n), "labels": []} for n in range(5)])
    found = labeltune("train", "--data", "none.jsonl", "--model", "pocket", "task=multilabel")
    assert found.code == 2 and "no label applies to any of the training rows" in found.err
    write_jsonl(in_folder / "one.jsonl", [{"text": "a", "output": "b"}])
    found = labeltune("data", "check", "one.jsonl", "--task", "multilabel")
    assert found.code == 1 and "these are rows for task=classification" in found.out


def test_a_text_that_no_run_can_answer_is_named() -> None:
    with pytest.raises(DataError, match="no candidate labels"):
        predictor_with(()).log_odds([Example("0", "a")])


def test_every_label_has_its_share_on_both_sides() -> None:
    generator = np.random.default_rng(3)
    labels = generator.random((400, 12)) < np.linspace(0.01, 0.5, 12)
    held = iterative_split(labels, 0.2, seed=5)
    assert len(held) == 80 and sorted(held) == list(held)
    counts = labels.sum(axis=0)
    assert (abs(labels[held].sum(axis=0) - 0.2 * counts) <= 1.5).all()
    assert (iterative_split(labels, 0.2, seed=5) == held).all()
    assert len(iterative_split(np.zeros((10, 0), dtype=bool), 0.3, 0)) == 3


# Figures


def table(right: Any, chances: Any, at: float = 0.5) -> tuple[list[Example], list[Prediction]]:
    names = [f"l{column}" for column in range(right.shape[1])]
    examples, predictions = [], []
    for number, (wanted, row) in enumerate(zip(right, chances, strict=True)):
        examples.append(
            Example(
                str(number),
                "t" * (number + 1),
                labels=tuple(n for n, r in zip(names, wanted, strict=True) if r),
            )
        )
        ranking = tuple(sorted(zip(names, map(float, row), strict=True), key=lambda pair: -pair[1]))
        labels = tuple(name for name, p in ranking if p >= at)
        predictions.append(Prediction(str(number), "", labels=labels, ranking=ranking))
    return examples, predictions


def random_table(seed: int, rows: int = 60, labels: int = 5) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    right = generator.random((rows, labels)) < np.linspace(0.05, 0.6, labels)
    chances = np.clip(0.25 + 0.4 * right + generator.normal(0, 0.2, right.shape), 0.001, 0.999)
    return right, chances


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    right, chances = random_table(seed, rows=30)
    given_labels = chances >= 0.5
    found = multilabel_metrics(*table(right, chances))
    present = (right | given_labels).any(axis=0)
    for average, name in (("micro", "micro_f1"), ("macro", "macro_f1"), ("weighted", "weighted_f1")):
        value = sk.f1_score(right[:, present], given_labels[:, present], average=average, zero_division=0)
        assert found[name]["value"] == pytest.approx(value, abs=1e-6), name
    assert found["hamming_loss"]["value"] == pytest.approx(sk.hamming_loss(right, given_labels), abs=1e-6)
    assert found["subset_accuracy"]["value"] == pytest.approx(
        sk.accuracy_score(right, given_labels), abs=1e-6
    )
    both = np.where(right.any(axis=1) | given_labels.any(axis=1), 0.0, 1.0)
    each = [
        2 * (r & g).sum() / max((r.sum() + g.sum()), 1) + b
        for r, g, b in zip(right, given_labels, both, strict=True)
    ]
    assert found["sample_f1"]["value"] == pytest.approx(np.mean(each), abs=1e-6)
    known = right.any(axis=0)
    assert found["map"] == pytest.approx(
        sk.average_precision_score(right[:, known], chances[:, known], average="macro"), abs=1e-6
    )
    json.dumps(found, allow_nan=False)


def test_baseline_curve_and_labels_together() -> None:
    right = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=bool)
    chances = np.array([[0.9, 0.2, 0.1], [0.7, 0.6, 0.1], [0.4, 0.1, 0.8], [0.1, 0.1, 0.1]])
    found = multilabel_metrics(*table(right, chances))
    assert found["baselines"]["constant_set"]["value"] == pytest.approx(2 * 3 / (4 + 5), abs=1e-6)
    assert found["together"] == {
        "l0": {"l0": 3, "l1": 1, "l2": 1},
        "l1": {"l0": 1, "l1": 1},
        "l2": {"l0": 1, "l2": 1},
    }
    curve = dict(map(tuple, found["labels"]["l0"]["curve"]))
    assert curve[0.4] == 1.0 and curve[0.05] == pytest.approx(2 * 3 / 7, abs=1e-4) and curve[0.75] == 0.5
    assert found["labels"]["l1"]["support"] == 1 and found["labels"]["l1"]["f1"] == 0.0


def test_a_comparison_counts_sets() -> None:
    right = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] * 5, dtype=bool)
    examples, first = table(right, np.where(right, 0.4, 0.1))
    _, second = table(right, np.where(right, 0.9, 0.1))
    found = compare_predictions(examples, first, second)
    assert list(found["differences"]) == ["micro_f1", "macro_f1", "subset_accuracy"]
    assert (found["differences"]["micro_f1"]["first"], found["differences"]["micro_f1"]["second"]) == (
        0.0,
        1.0,
    )
    assert len(found["changed"]["gained"]) == 15 and not found["changed"]["lost"]


# What is fitted on validation rows


def odds_of(chances: Any) -> Any:
    return np.log(chances) - np.log1p(-chances)


def test_scales_find_a_slope_and_an_intercept_again() -> None:
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 2, (4000, 3))
    true = odds * np.array([0.5, 0.5, 0.5]) + np.array([0.0, 1.0, -1.0])
    right = generator.random(true.shape) < 1 / (1 + np.exp(-true))
    scales = fit_scales(odds, right)
    np.testing.assert_allclose(scales.slopes, 0.5, atol=0.06)
    np.testing.assert_allclose(scales.intercepts, [0.0, 1.0, -1.0], atol=0.15)
    found, report = scales_report(odds, right)
    assert (
        found is not None and report["refused"] is None and report["after"]["nll"] < report["before"]["nll"]
    )
    few = right.copy()
    few[:, 0] = False
    few[: ENOUGH_OF_LABEL - 1, 0] = True
    assert fit_scales(odds, few).intercepts[0] == 0.0, "too few rows for a scale of its own"
    none, report = scales_report(odds[:40], right[:40])
    assert none is None and "at least 50 rows" in report["refused"]


@pytest.mark.parametrize("objective", ["micro_f1", "macro_f1"])
def test_thresholds_have_the_best_figure(objective: str) -> None:
    right, chances = random_table(7, rows=200)
    chances = chances**3  # so that 0.5 is far too high
    average = objective.removesuffix("_f1")

    def figure(at: Any) -> float:
        return float(sk.f1_score(right, chances >= at, average=average, zero_division=0))

    one = one_threshold(chances, right, objective)
    assert figure(one) >= max(figure(at) for at in np.linspace(0.02, 0.98, 49)) - 0.01 > figure(0.5)
    own = label_thresholds(chances, right, objective)
    assert figure(own) >= figure(one)
    threshold, labels, report = threshold_report(chances, right, objective, "one")
    assert labels is None and report["chosen"] == "one" and threshold == one
    threshold, labels, report = threshold_report(chances, right, objective, "none")
    assert (threshold, labels, report["chosen"]) == (0.5, None, "none")
    assert threshold_report(chances[:30], right[:30], objective, "label")[2]["chosen"] == "none"


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = Calibration(scales={"a": (0.5, -1.0)}, threshold=0.3, thresholds={"a": 0.7})
    made.save(tmp_path, {})
    assert Calibration.load(tmp_path) == made
