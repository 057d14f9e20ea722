"""What a loaded run answers: labels with probabilities, entities with places, long documents, many threads."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import labeltune
from helpers.hubs import fake_hub
from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.runs import NER_LABELS, predictor_for
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.config import CalibrateConfig
from labeltune.errors import ConfigError, DataError, ModelError
from labeltune.inference.calibration import Calibration, LabelScores, ranked, remove_prior
from labeltune.inference.extraction import merge_entities
from labeltune.inference.predictor import Predictor
from labeltune.prompts.builder import kept_parts
from labeltune.types import Entity, Example, Prediction


def brute_force(predictor: Predictor, text: str, labels: list[str]) -> np.ndarray:
    """Each label through the model as training writes it."""
    logs = []
    for label in labels:
        encoded = predictor.builder.training(Example("0", text, tuple(labels), label=label))
        start, end = encoded.answer_span
        ids = torch.tensor([encoded.ids[:end]])
        with torch.no_grad():
            logits = predictor.model(ids).logits[0, start - 1 : end - 1].double().log_softmax(-1)
        logs.append(float(logits[range(end - start), ids[0, start:end]].sum()))
    p = np.exp(np.array(logs) - max(logs))
    return p / p.sum()


TEXTS = ["a match in the rain", "the rocket", "paint 南京", "long " * 30, "x <|im_end|> y"]


@pytest.mark.parametrize("labels", [LABELS, ["A", "AB", "ABC", "B C"], ["体育", "体育新闻", "Art", "艺术"]])
def test_scores_are_those_of_every_label_by_itself(labels: list[str]) -> None:
    predictor = predictor_for()
    found = predictor.scores(TEXTS, labels)
    assert found.shape == (len(TEXTS), len(labels))
    right = np.array([brute_force(predictor, text, labels) for text in TEXTS])
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)
    predictions = predictor.predict(TEXTS, labels)
    assert [p.label for p in predictions] == [labels[k] for k in right.argmax(1)]
    for prediction, row in zip(predictions, right, strict=True):
        assert prediction.confidence == pytest.approx(row.max(), rel=1e-4)
        assert [p for _, p in prediction.ranking] == sorted((p for _, p in prediction.ranking), reverse=True)
        assert sum(p for _, p in prediction.ranking) == pytest.approx(1)


def test_no_answer_is_off_the_list_whatever_the_weights() -> None:
    for seed in range(5):
        assert all(p.label in LABELS for p in predictor_for(seed=seed).predict(TEXTS))


def test_batches_and_order_change_nothing() -> None:
    predictor = predictor_for()
    right = predictor.scores(TEXTS)
    predictor.engine.max_tokens = 1
    np.testing.assert_allclose(predictor.scores(TEXTS), right, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(predictor.scores(TEXTS[::-1])[::-1], right, rtol=1e-4, atol=1e-6)


def test_rows_bring_their_own_candidates() -> None:
    examples = [Example("a", "text", ("x", "y")), Example("b", "text"), Example("c", "text", ("z", "w", "v"))]
    found = predictor_for().predict(examples)
    assert [sorted(label for label, _ in p.ranking) for p in found] == [
        ["x", "y"],
        sorted(LABELS),
        ["v", "w", "z"],
    ]


def test_low_confidence_gives_no_label_and_keeps_the_ranking() -> None:
    predictor = predictor_for()
    (plain,) = predictor.predict(["a"])
    assert plain.label == plain.ranking[0][0] == plain.to_dict(min_confidence=0.001)["label"]
    row = plain.to_dict(top_k=2, min_confidence=0.999)
    assert row["ranking"] == plain.to_dict()["ranking"][:2]
    assert (
        row["label"] is None
        and len(row["ranking"]) == 2
        and row["confidence"] == round(plain.ranking[0][1], 6)
    )


@pytest.mark.parametrize("labels", [("a", "a "), ("é", "e\u0301"), ("a", " ")])
def test_labels_that_cannot_be_told_apart_are_a_data_error(labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"told apart|empty"):
        predictor_for().predict([Example("0", "text", labels)])


def test_length_norm_and_temperature() -> None:
    row = LabelScores(("a", "b"), (-4.0, -6.0), (1, 3))
    assert row.comparable("none") == [-4, -6] and row.comparable("tokens") == [-4, -2]
    plain = Calibration().probabilities(row, "none")
    assert plain["a"] == pytest.approx(1 / (1 + np.exp(-2)))
    warm = Calibration(2.0).probabilities(row, "none")
    assert warm["a"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert Calibration(2.0).probabilities(row, "tokens")["b"] == pytest.approx(1 / (1 + np.exp(-2))), (
        "a temperature that was fitted for another comparison is not used"
    )


def test_prior_correction_divides_by_the_mean() -> None:
    rows = [{"a": 0.9, "b": 0.1}, {"a": 0.7, "b": 0.3}, {"a": 1.0}]
    found = remove_prior(rows)
    a, b = (0.9 + 0.7 + 1.0) / 3, 0.2
    assert found[1]["b"] == pytest.approx(0.3 / b / (0.7 / a + 0.3 / b))
    assert found[2] == {"a": 1.0}
    predictor = predictor_for()
    plain = predictor.scores(TEXTS)
    predictor.calibrate = CalibrateConfig(prior="batch")
    assert predictor.scores(TEXTS) == pytest.approx(
        (plain / plain.mean(0)) / (plain / plain.mean(0)).sum(1, keepdims=True)
    )


# --- entities ---


def test_entities_stand_in_the_text_whatever_the_weights() -> None:
    texts = ["他在南京大学学习，南京。", 'say "南京" \\ \n', "a", "😀😀 1 " * 5]
    for seed in range(6):
        predictor = predictor_for("ner", seed=seed, max_new_tokens=60, batch_size=2)
        for text, prediction in zip(texts, predictor.predict(texts), strict=True):
            assert prediction.parsed and prediction.entities is not None
            for entity in prediction.entities:
                assert entity.text == text[entity.start : entity.end] and entity.text
                assert entity.label in NER_LABELS and entity.score is not None and entity.score <= 0
        assert predictor.extract(texts)[0] == predictor.predict(texts)[0].entities


@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail"])
def test_entities_of_shortened_texts_have_places_in_the_whole_document(truncation: str) -> None:
    text = "".join(f"{i}南京、" for i in range(60))
    for seed in range(4):
        predictor = predictor_for(
            "ner", max_length=260, seed=seed, max_new_tokens=60, prompt={"truncation": truncation}
        )
        (prediction,) = predictor.predict([text])
        for entity in prediction.entities or ():
            assert entity.text == text[entity.start : entity.end]


def test_parts_of_a_shortened_text() -> None:
    assert kept_parts("abcdef", "abc", "head") == ((0, 3),)
    assert kept_parts("abcabc", "abc", "tail") == ((3, 6),)
    assert kept_parts("abcdef", "ab…ef", "head_tail") == ((0, 2), (4, 6))
    assert kept_parts("a…cdef", "a…c…ef", "head_tail") == ((0, 3), (4, 6))
    assert kept_parts("abc", "", "head") == ()


def test_the_same_place_in_two_windows_counts_once() -> None:
    first = [Entity("a", "X", 0, 1, -0.5), Entity("b", "X", 5, 6, -0.9)]
    second = [Entity("b", "Y", 5, 6, 0.0), Entity("c", "X", 9, 10, -1.0)]
    assert merge_entities([second, first])[1].label == "Y"  # a score of 0 is the surest there is
    assert merge_entities([first, second]) == (
        Entity("a", "X", 0, 1),
        Entity("b", "Y", 5, 6),
        Entity("c", "X", 9, 10),
    )


# --- long documents ---


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_windows_equal_the_whole_on_texts_that_fit(task: str) -> None:
    found = [
        predictor_for(task, max_new_tokens=30, long_text=mode).predict(TEXTS[:3])
        for mode in ("truncate", "window")
    ]
    assert found[0] == found[1]


def test_windows_cover_a_long_text_and_overlap() -> None:
    predictor = predictor_for(max_length=200, long_text="window")
    text = " ".join(f"word{i}" for i in range(200))
    views = predictor.builder.views(Example("0", text, tuple(LABELS)), "window")
    assert len(views) > 3
    (first,), (last,) = views[0].parts, views[-1].parts
    assert first[0] == 0 and last[1] == len(text)
    for before, after in itertools.pairwise(views):
        assert before.parts[0][0] < after.parts[0][0] < before.parts[0][1]
        assert len(after.ids) <= 200
    (row,) = predictor.log_probabilities([Example("0", text, tuple(LABELS))])
    each = [
        predictor.log_probabilities([Example("0", text[slice(*view.parts[0])], tuple(LABELS))])[0]
        for view in views
    ]
    means = np.mean([view.log_probabilities for view in each], axis=0)
    assert row.log_probabilities == pytest.approx(tuple(means), rel=1e-4)


def test_entities_at_the_end_of_a_long_text_can_be_found() -> None:
    text = "一二三四五六七八九十" * 30
    reached = 0
    for seed in range(6):
        predictor = predictor_for("ner", max_length=300, seed=seed, max_new_tokens=40, long_text="window")
        for entity in predictor.predict([text])[0].entities or ():
            assert entity.text == text[entity.start : entity.end]
            reached = max(reached, entity.end or 0)
    (view,) = predictor.builder.views(Example("0", text))
    assert reached > view.parts[-1][1]


# --- the loaded run ---


def test_threads_get_the_answers_of_their_own_texts() -> None:
    predictor = predictor_for()
    right = {text: predictor.predict([text])[0] for text in TEXTS}
    wrong: list[str] = []

    def ask(text: str) -> None:
        for _ in range(5):
            found = predictor.predict([text])[0]
            if found.label != right[text].label or abs(found.confidence - right[text].confidence) > 1e-5:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(text,)) for text in TEXTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_other_task_is_refused() -> None:
    with pytest.raises(ModelError, match="classifies"):
        predictor_for().extract(["a"])
    with pytest.raises(ModelError, match="extracts"):
        predictor_for("ner").scores(["a"])
    with pytest.raises(ConfigError, match="decoding"):
        predictor_for().change(decoding="fast")


def test_a_temperature_is_fitted_saved_and_used(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=4)
    rows = [{**row, "text": f"{row['text']} held out"} for row in classification_rows(60)]
    held = str(write_jsonl(in_folder / "held.jsonl", rows))
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": held})})
    said: list[str] = []
    result = labeltune.train(config, say=said.append)
    saved = json.loads((result.best / "calibration.json").read_text(encoding="utf-8"))
    assert saved["validation"]["rows"] == 60
    (line,) = (line for line in said if line.startswith("confidence: "))
    assert line.startswith(f"confidence: temperature {saved['temperature']:.2f}; 60 validation rows: ")
    with load_predictor(result.best) as predictor:
        assert predictor.calibration.temperature == saved["temperature"] != 1.0
        tuned = predictor.scores(["rocket"])
        with predictor.base_model():
            assert predictor.calibration == Calibration()
            base = predictor.scores(["rocket"])
        assert not np.allclose(tuned, base)
        np.testing.assert_array_equal(predictor.scores(["rocket"]), tuned)
    off = config.model_copy(update={"calibrate": CalibrateConfig(temperature=False)})
    assert not (labeltune.train(off, overwrite=True).best / "calibration.json").exists()


def test_evaluate_uses_the_exact_engine_and_free_generation_on_demand(
    in_folder: Path, model_folder: Path
) -> None:
    for task, rows in (("classification", classification_rows(12)), ("ner", ner_rows(6))):
        folder = in_folder / task
        folder.mkdir()
        result = labeltune.train(config_for(folder, model_folder, task, max_steps=1))
        data = write_jsonl(folder / "test.jsonl", rows)
        exact = labeltune.evaluate(result.best, str(data), progress=False)
        free = labeltune.evaluate(result.best, str(data), progress=False, decoding="free")
        assert (exact["decoding"], free["decoding"]) == ("exact", "free")
        assert exact["unparsable"] == 0.0 and free["unparsable"] > 0.0


@pytest.mark.parametrize("hub", ["ms", "hf"])
def test_a_checkpoint_on_a_hub(
    hub: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = labeltune.train(config_for(in_folder, model_folder, max_steps=1))
    calls = fake_hub(monkeypatch, hub, lambda _: str(result.best))
    with load_predictor(f"{hub}:someone/news-labels") as there, load_predictor(result.best) as here:
        assert there.predict(["rocket"]) == here.predict(["rocket"])
    (call,) = calls
    assert call["model_id" if hub == "ms" else "repo_id"] == "someone/news-labels"
    fake_hub(monkeypatch, hub, lambda _: str(model_folder))
    with pytest.raises(ModelError, match="checkpoint"):
        load_predictor(f"{hub}:someone/no-run")


def test_ranked_takes_the_most_probable() -> None:
    found = ranked("7", {"a": 0.2, "b": 0.8})
    assert (found.id, found.label, found.confidence) == ("7", "b", 0.8)


def test_the_columns_of_scores_are_the_labels() -> None:
    predictor = predictor_for()
    assert predictor.labels == tuple(LABELS)
    scores = predictor.scores(["a match"])[0]
    ranking = dict(predictor.predict(["a match"])[0].ranking)
    assert scores.tolist() == pytest.approx([ranking[label] for label in predictor.labels])
    assert predictor_for("ner").labels == tuple(NER_LABELS)


def test_predictions_are_readable() -> None:
    ranking = (("Space", 0.93123456789), ("Art", 0.06876543211))
    assert repr(Prediction("7", "Space", label="Space", ranking=ranking)) == (
        "Prediction(id='7', label='Space', confidence=0.9312, ranking=<'Space': 0.9312, 'Art': 0.0688>)"
    )
    many = tuple((f"L{number}", 1 / 9) for number in range(9))
    assert repr(Prediction("7", "L0", label="L0", ranking=many)).endswith("'L4': 0.1111, and 4 more>)")
    entity = Entity("Oslo", "GPE", 10, 14, -0.12345678)
    assert repr(Prediction("7", "x", entities=(entity,), truncated=True)) == (
        "Prediction(id='7', entities=(Entity('Oslo', 'GPE', 10, 14, score=-0.1235),), answer='x', truncated=True)"
    )
    assert (
        repr(Prediction("7", "?", parsed=False)) == "Prediction(id='7', label=None, answer='?', parsed=False)"
    )
