"""The linear model beside a fine-tuned one: saved as it scores, weighed where it helps, and part of every answer from then on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import labeltune
from helpers.rows import LABELS, classification_rows, write_jsonl
from helpers.training import config_for
from labeltune.commands.evaluate import evaluate
from labeltune.commands.export import export
from labeltune.config import RunConfig, build_config
from labeltune.errors import ModelError
from labeltune.evaluation.confidence import (
    ENOUGH_FOR_WEIGHT,
    calibration_report,
    fit_mixture,
    mixture_report,
    negative_log_likelihood,
    softmax,
)
from labeltune.evaluation.linear import LinearModel
from labeltune.inference.calibration import LINEAR_FILE, Calibration, LabelScores
from labeltune.types import Example


def test_a_saved_model_scores_the_same(tmp_path: Path) -> None:
    rows = classification_rows(60)
    for labels in (LABELS, LABELS[:2], LABELS[:1]):
        kept = [row for row in rows if row["output"] in labels]
        texts, right = [row["text"] for row in kept], [row["output"] for row in kept]
        model = LinearModel.fit(texts, right)
        (tmp_path / "m").write_bytes(model.content())
        again = LinearModel.load(tmp_path / "m")
        asked = ["match", "a rocket 😀", "", "今天 paint"]
        assert again.labels == model.labels == tuple(sorted(labels))
        numpy.testing.assert_array_equal(again.scores(asked), model.scores(asked))
        assert again.content() == model.content()
        best = model.scores(texts).argmax(axis=1)
        assert [model.labels[at] for at in best] == right
    assert LinearModel.fit(["一 二三", "四五六"], ["a", "b"]).among(numpy.array([1.0, 2.0]), ("b", "a")) == [
        2.0,
        1.0,
    ]
    assert model.among(numpy.array([1.0]), ("Sports", "New")) is None
    (tmp_path / "m").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="m is missing or damaged"):
        LinearModel.load(tmp_path / "m")


def scored(rows: int, strength: float, seed: int = 0) -> tuple[list[numpy.ndarray], list[int]]:
    drawn = numpy.random.default_rng(seed)
    right = [int(each) for each in drawn.integers(3, size=rows)]
    found = []
    for answer in right:
        scores = drawn.normal(size=3)
        scores[answer] += strength
        found.append(scores)
    return found, right


def test_weights_have_the_least_loss() -> None:
    one, right = scored(300, 1.0)
    drawn = numpy.random.default_rng(5)
    other = [drawn.normal(size=3) + 1.5 * (numpy.arange(3) == answer) for answer in right]
    inverse, weight = fit_mixture(one, other, right)

    def loss(a: float, b: float) -> float:
        sums = [a * x + b * y for x, y in zip(one, other, strict=True)]
        return len(right) * negative_log_likelihood(sums, right) + ((a - 1) ** 2 + b**2) / 2

    least = loss(inverse, weight)
    for step in (-0.05, 0.05):
        assert loss(inverse + step, weight) > least and loss(inverse, weight + step) > least


def test_rows_that_are_all_right_have_weights_of_this_world() -> None:
    """Without the prior a fold without an error takes weights without end, and the rows that it is measured on pay for them."""
    one, right = scored(100, 4.0)
    other, _ = scored(100, 0.0)
    other = [scores + 6.0 * (numpy.arange(3) == answer) for scores, answer in zip(other, right, strict=True)]
    inverse, weight = fit_mixture(one, other, right)
    assert 0.3 < inverse < 2 and 0.3 < weight < 2


def test_a_weight_is_kept_where_it_helps() -> None:
    one, right = scored(200, 1.0)
    alone = calibration_report(one, right)[1]["after"]
    drawn = numpy.random.default_rng(5)
    knows = [drawn.normal(size=3) + 2.0 * (numpy.arange(3) == answer) for answer in right]
    weights, report = mixture_report(one, knows, right, alone)
    assert weights is not None and report["refused"] is None and weights[1] == report["weight"] > 0.5
    assert report["after"]["nll"] < report["before"]["nll"]
    drawn = numpy.random.default_rng(0)
    noise = [drawn.normal(size=3) for _ in right]
    weights, report = mixture_report(one, noise, right, alone)
    assert weights is None and report["refused"] == "it does not help on rows that it was not weighed on"
    few = ENOUGH_FOR_WEIGHT - 1
    weights, report = mixture_report(one[:few], knows[:few], right[:few], alone)
    assert weights is None and "at least 20 rows" in report["refused"]


def test_scores_are_added_to_those_of_the_model() -> None:
    row = LabelScores(("a", "b"), (-1.0, -2.0), (1, 1))
    calibration = Calibration(2.0, "none", linear=0.5)
    found = calibration.probabilities(row, "none", [0.0, 4.0])
    assert list(found.values()) == pytest.approx(list(softmax(numpy.array([-0.5, -1.0 + 2.0]))))
    assert calibration.probabilities(row, "none") == Calibration(2.0).probabilities(row, "none")
    # Another comparison is not calibrated.
    assert calibration.probabilities(row, "tokens", [0.0, 4.0]) == Calibration().probabilities(row, "tokens")


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, list[str]]:
    """A model that has learned nothing, and a linear one that knows."""
    folder = tmp_path_factory.mktemp("linear")
    values = config_for(folder, model_folder, max_steps=1, learning_rate=1e-6).model_dump(mode="json")
    values["data"] |= {"train": str(write_jsonl(folder / "rows.jsonl", classification_rows(120)))}
    values["data"]["validation_fraction"] = 0.3
    values["calibrate"]["linear"] = True
    config = build_config(values)
    said: list[str] = []
    return labeltune.train(config, say=said.append).best.resolve(), config, said


def test_a_run_answers_with_it(run: tuple[Path, RunConfig, list[str]], tmp_path: Path) -> None:
    best, config, said = run
    assert [line for line in said if line.startswith("linear model: added with weight")]
    metrics = json.loads(
        (Path(config.output_dir) / "validation" / "metrics.json").read_text(encoding="utf-8")
    )
    assert metrics["accuracy"]["value"] == 1.0, "the report is of the answers with it"
    rows = classification_rows(150)[120:]
    test = str(write_jsonl(tmp_path / "test.jsonl", rows))
    assert evaluate(best, test, progress=False)["accuracy"]["value"] == 1.0
    with labeltune.load_predictor(best) as predictor:
        (answer,) = predictor.predict([rows[0]["text"]])
        scores = predictor.log_probabilities([Example("1", rows[0]["text"])])[0]
        assert predictor.linear is not None
        other = predictor.linear.among(predictor.linear.scores([rows[0]["text"]])[0], scores.labels)
        expected = predictor.calibration.probabilities(scores, "none", other)
        assert dict(answer.ranking) == pytest.approx(expected)
        # A candidate that training did not have: the model answers alone.
        (unseen,) = predictor.predict([Example("1", rows[0]["text"], ("Art", "New"))])
        mark = predictor.fingerprint()
        with predictor.base_model():
            (plain,) = predictor.predict([rows[0]["text"]])
        predictor.linear = None
        assert predictor.predict([Example("1", rows[0]["text"], ("Art", "New"))])[0] == unseen
        assert dict(plain.ranking) != pytest.approx(dict(answer.ranking))
        predictor.calibration = replace(predictor.calibration, linear_hash="")
        assert predictor.fingerprint() != mark


def test_an_export_keeps_it_and_warns(run: tuple[Path, RunConfig, list[str]], tmp_path: Path) -> None:
    said: list[str] = []
    export(run[0], tmp_path / "merged", merged=True, say=said.append, progress=False)
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "which other engines do not: without them" in warning and "rows are answered the same" in warning
    with labeltune.load_predictor(tmp_path / "merged") as merged, labeltune.load_predictor(run[0]) as tuned:
        texts = [row["text"] for row in classification_rows(3)]
        for one, other in zip(merged.predict(texts), tuned.predict(texts), strict=True):
            assert one.label == other.label and dict(one.ranking) == pytest.approx(
                dict(other.ranking), abs=1e-4
            )


def test_a_checkpoint_without_its_linear_model_is_damaged(
    run: tuple[Path, RunConfig, list[str]], tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(run[0], copy)
    (copy / LINEAR_FILE).unlink()
    with pytest.raises(ModelError, match=f"{LINEAR_FILE} is missing or damaged"):
        labeltune.load_predictor(copy)
    assert torch.is_grad_enabled()
