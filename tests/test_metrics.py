"""Metrics against scikit-learn, brute force and known values; places of entities; baselines."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rows import answered_rows
from labeltune.config import load_config
from labeltune.evaluation.intervals import bootstrap, wilson
from labeltune.evaluation.metrics import (
    classification_metrics,
    label_numbers,
    macro_f1_of,
    majority_baseline,
    uniform_baseline,
)
from labeltune.evaluation.spans import (
    dictionary_entities,
    entity_dictionary,
    ner_metrics,
    precision_and_recall,
    spans,
    strict_span_f1,
)
from labeltune.evaluation.summary import headline, worse_than_constant
from labeltune.prompts import make_task
from labeltune.prompts.ner import locate
from labeltune.types import Entity, Example, Prediction

LABELS = "ABCD"
PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1, max_size=40
)
few = settings(max_examples=40, deadline=None)


@few
@given(PAIRS)
def test_macro_f1_is_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    from sklearn.metrics import f1_score

    truth = [right for right, _ in pairs]
    predicted = [answer for _, answer in pairs]
    names = sorted({*truth, *(p for p in predicted if p is not None)})
    expected = f1_score(truth, [p or "-" for p in predicted], labels=names, average="macro", zero_division=0)
    assert macro_f1_of(*label_numbers(truth, predicted)) == pytest.approx(expected)


@settings(max_examples=10, deadline=None)
@given(PAIRS)
def test_classification_metrics_are_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    from sklearn.metrics import accuracy_score, classification_report

    examples, predictions = answered_rows(pairs)
    found = classification_metrics(examples, predictions)
    truth, filled = [right for right, _ in pairs], [answer or "-" for _, answer in pairs]
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(truth, filled), abs=1e-6)
    assert found["macro_f1"]["value"] == pytest.approx(
        macro_f1_of(*label_numbers(truth, [p for _, p in pairs])), abs=1e-6
    )
    report = classification_report(truth, filled, output_dict=True, zero_division=0)
    for name, figures in found["labels"].items():
        assert figures["support"] == report[name]["support"]
        assert [figures[k] for k in ("precision", "recall", "f1")] == pytest.approx(
            [report[name][k] for k in ("precision", "recall", "f1-score")]
        )
    assert found["unparsable"] == pytest.approx(sum(p is None for _, p in pairs) / len(pairs), abs=1e-6)
    for measure in (found["accuracy"], found["macro_f1"], *found["baselines"].values()):
        assert 0 <= measure["low"] <= measure["high"] <= 1
    json.dumps(found, allow_nan=False)


def test_baselines() -> None:
    assert majority_baseline(["A", "A", "B"]).value == pytest.approx(2 / 3)
    examples = [Example("0", "t", ("A", "B"), "A"), Example("1", "t", (), "A")]
    assert uniform_baseline(examples, ["A", "B", "C", "D"]).value == pytest.approx((1 / 2 + 1 / 4) / 2)
    found = classification_metrics(*answered_rows([("A", "A"), ("A", "B"), ("B", "A"), ("A", None)]))
    assert found["baselines"]["majority"]["value"] == 0.75
    assert found["baselines"]["uniform_guess"]["value"] == 0.25


def test_wilson_has_its_known_values() -> None:
    # 15 of 50, from Newcombe 1998 and statsmodels.stats.proportion.proportion_confint(15, 50, method="wilson")
    measure = wilson(15, 50)
    assert (round(measure.low, 4), measure.value, round(measure.high, 4)) == (0.191, 0.3, 0.4375)
    assert (wilson(0, 20).low, round(wilson(0, 20).high, 4)) == (0.0, 0.1611)
    assert (round(wilson(20, 20).low, 4), wilson(20, 20).high) == (0.8389, 1.0)
    assert all(math.isnan(value) for value in wilson(0, 0).to_dict().values())
    assert str(measure) == "0.300 [0.191, 0.438]"


def test_the_bootstrap_covers_what_it_should() -> None:
    values = numpy.random.default_rng(1).normal(5, 2, 400)
    found = bootstrap(lambda chosen: float(values[chosen].mean()), len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert found == bootstrap(lambda chosen: float(values[chosen].mean()), len(values))
    assert math.isnan(bootstrap(lambda _: 1.0, 0).value)


SPAN = st.tuples(st.integers(0, 3), st.integers(4, 6), st.sampled_from("XY"))
SIDE = st.lists(st.sets(SPAN, max_size=4), min_size=6, max_size=6)


@settings(max_examples=15, deadline=None)
@given(SIDE, SIDE)
def test_strict_span_f1_is_brute_force(truth: list[set[object]], predicted: list[set[object]]) -> None:
    hits = sum(a == b for t, p in zip(truth, predicted, strict=True) for a, b in product(t, p))
    given_, wanted = sum(map(len, predicted)), sum(map(len, truth))
    nothing = float(given_ + wanted == 0)  # nothing to find, and nothing found
    precision, recall = hits / given_ if given_ else nothing, hits / wanted if wanted else nothing
    f1 = 2 * precision * recall / (precision + recall) if hits else nothing
    found = strict_span_f1(truth, predicted)
    assert found["span_f1"]["value"] == pytest.approx(f1, abs=1e-6)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=1e-6)


def example(text: str, *entities: Entity) -> Example:
    return Example("0", text, entities=entities)


def test_an_entity_counts_when_place_and_label_are_right() -> None:
    right = example("张三在南京见张三", Entity("张三", "人名", 0, 2), Entity("南京", "地点", 3, 5))
    answers = (
        Entity("张三", "人名", 6, 8),  # the other place
        Entity("南京", "组织", 3, 5),  # the other label
        Entity("北京", "地点"),  # no place at all
    )
    found = ner_metrics([right], [Prediction("0", "", entities=answers, parsed=False)], {"南京": "地点"})
    assert found["span_f1"]["value"] == found["precision"] == found["recall"] == 0
    assert found["unparsable"] == 1 and found["rows"] == 1
    assert found["baselines"]["dictionary"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert {name: figures["support"] for name, figures in found["labels"].items()} == {
        "人名": 1,
        "地点": 1,
        "组织": 0,
    }
    found = ner_metrics([right], [Prediction("0", "", entities=(right.entities or ())[:1])])
    assert (found["precision"], found["recall"]) == (1, 0.5)
    assert found["labels"]["人名"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}
    json.dumps(found, allow_nan=False)


def test_entities_without_a_place_match_nothing() -> None:
    lost = [Entity("a", "X"), Entity("a", "X")]
    assert len(spans(lost)) == 2 and not spans(lost) & spans(lost)
    assert spans(None) == spans([]) == set()


def test_nothing_to_find_and_nothing_found_is_right() -> None:
    found = ner_metrics([example("t")], [Prediction("0", "none", entities=())])
    assert found["span_f1"]["value"] == 1 and found["labels"] == {}
    assert found["precision"] == found["recall"] == 1.0
    assert headline([example("t")], [Prediction("0", "none", entities=())]) == {
        "span_f1": 1.0,
        "precision": 1.0,
        "recall": 1.0,
    }


@pytest.mark.parametrize(
    ("counts", "precision", "recall"), [((0, 0, 2), 0.0, 0.0), ((0, 3, 0), 0.0, 0.0), ((1, 2, 4), 0.5, 0.25)]
)
def test_precision_and_recall_of_one_sided_rows_agree_with_f1(
    counts: tuple[int, int, int], precision: float, recall: float
) -> None:
    assert precision_and_recall(*counts) == {"precision": precision, "recall": recall}


def test_worse_than_a_constant_answer_is_said() -> None:
    examples = [Example(str(n), "t", ("A", "B"), "AAAB"[n]) for n in range(4)]
    answers = lambda labels: [Prediction(str(n), x, label=x) for n, x in enumerate(labels)]  # noqa: E731
    metrics = {"task": "classification", **classification_metrics(examples, answers("BBAB"))}
    assert worse_than_constant(metrics) == "worse than always answering 'A' (0.750)"
    metrics = {"task": "classification", **classification_metrics(examples, answers("AAAA"))}
    assert worse_than_constant(metrics) is None


def test_mentions_take_their_occurrences_in_order() -> None:
    text = "张三和李四，张三和张三"
    found = locate(
        text, [("张三", "A"), ("李四", "B"), ("张三", "C"), ("张三", "D"), ("张三", "E"), ("王五", "F")]
    )
    places = [(e.label, e.start, e.end) for e in found]
    assert places[:4] == [("A", 0, 2), ("B", 3, 5), ("C", 6, 8), ("D", 9, 11)]
    assert places[4:] == [("E", None, None), ("F", None, None)]
    assert [(e.start, e.end) for e in locate("aaa", [("aa", "X"), ("aa", "X")])] == [(0, 2), (None, None)]


@few
@given(
    st.text(alphabet="ab ", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=3), max_size=6)
)
def test_located_entities_stand_where_they_say(text: str, names: list[str]) -> None:
    found = locate(text, [(name, "X") for name in names])
    assert [entity.text for entity in found] == names
    for entity in found:
        if entity.start is not None:
            assert text[entity.start : entity.end] == entity.text
        else:
            assert entity.end is None and (entity.text not in text or len(names) > 1)


def test_right_answers_are_found_again() -> None:
    config = load_config(None, ["task=ner"])
    task = make_task("ner", ["地点", "人名"], config.prompt)
    right = example(
        '"上海"的南京\\',
        Entity('"上海"', "地点", 0, 4),
        Entity("南京", "地点", 5, 7),
        Entity("\\", "人名", 7, 8),
    )
    empty = example("无")
    for truth in (right, empty):
        parsed = task.parse(truth, task.target(truth))
        assert parsed.parsed and parsed.entities == truth.entities


def test_the_dictionary_baseline_takes_the_longest_first() -> None:
    train = [
        example("南京大学", Entity("南京大学", "组织", 0, 4)),
        example("南京", Entity("南京", "地点", 0, 2)),
        example("南京", Entity("南京", "地点", 0, 2)),
        example("南京", Entity("南京", "组织", 0, 2)),
        example("无"),
    ]
    dictionary = entity_dictionary(train)
    assert dictionary == {"南京大学": "组织", "南京": "地点"}
    assert dictionary_entities("南京的南京大学，南京", dictionary) == (
        Entity("南京", "地点", 0, 2),
        Entity("南京大学", "组织", 3, 7),
        Entity("南京", "地点", 8, 10),
    )
    assert dictionary_entities("北京", dictionary) == dictionary_entities("", dictionary) == ()
    assert dictionary_entities("aaaa", {"aa": "X"}) == (Entity("aa", "X", 0, 2), Entity("aa", "X", 2, 4))
