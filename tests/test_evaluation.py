"""Figures of evaluation against independent references: scikit-learn, nervaluate, scipy and brute force."""

from __future__ import annotations

import json
import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.rows import answered_rows
from labeltune.commands.compare import _print_differences
from labeltune.evaluation.compare import compare_predictions, comparison_page, point_apart
from labeltune.evaluation.confidence import expected_calibration_error
from labeltune.evaluation.intervals import BOOTSTRAP_RESAMPLES, mcnemar, paired_bootstrap
from labeltune.evaluation.metrics import (
    classification_metrics,
    confidence_metrics,
    label_numbers,
    matthews,
    reliability_bins,
)
from labeltune.evaluation.report import report_page
from labeltune.evaluation.spans import (
    ERRORS,
    match_entities,
    ner_metrics,
    nesting_figures,
    partial_span_f1,
)
from labeltune.evaluation.summary import headline, shown_headline, slices
from labeltune.types import Entity, Example, Prediction

LABELS = "ABCD"
PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1, max_size=40
)
thorough = settings.get_profile("thorough")


def test_a_bootstrap_of_right_answers_alone_is_shown_without_an_interval() -> None:
    found = classification_metrics(*answered_rows([("A", "A"), ("B", "B")] * 8))
    assert (found["macro_f1"]["low"], found["macro_f1"]["high"]) == (1.0, 1.0), "JSON keeps both ends"
    assert shown_headline({**found, "task": "classification"}) == [
        ("accuracy", "1.000  (95 % interval 0.806 to 1.000)"),
        ("macro_f1", "1.000  (no interval: on these rows all resamples come out the same)"),
    ]


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning:sklearn")
@thorough
@given(PAIRS)
def test_figures_of_labels_are_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    from labeltune.evaluation.metrics import _weighted_f1, macro_f1_of

    truth, filled = [right for right, _ in pairs], [answer or "-" for _, answer in pairs]
    right, answered, count = label_numbers(truth, [p for _, p in pairs])
    names = sorted({*truth, *(p for _, p in pairs if p is not None)})

    def f1(average: str) -> float:
        return float(f1_score(truth, filled, labels=names, average=average, zero_division=0))

    assert matthews(right, answered, count) == pytest.approx(matthews_corrcoef(truth, filled), abs=1e-9)
    assert macro_f1_of(right, answered, count) == pytest.approx(f1("macro"))
    assert _weighted_f1(right, answered, count) == pytest.approx(f1("weighted"))
    found = headline(*answered_rows(pairs))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, filled), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1("macro"), abs=1e-6)
    given_rows = sum(p is not None for _, p in pairs)
    hits = sum(t == p for t, p in pairs)
    assert 2 * hits / (len(pairs) + given_rows) == pytest.approx(f1("micro"))


RANKED = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.floats(0.001, 1), min_size=4, max_size=4)),
    min_size=1,
    max_size=30,
)


def with_rankings(rows: list[tuple[int, list[float]]]) -> tuple[list[str], list[Prediction], np.ndarray]:
    table = np.array([weights for _, weights in rows])
    table = table / table.sum(axis=1, keepdims=True)
    predictions = []
    for i, p in enumerate(table):
        ranking = tuple(sorted(zip(LABELS, map(float, p), strict=True), key=lambda pair: -pair[1]))
        predictions.append(Prediction(str(i), ranking[0][0], label=ranking[0][0], ranking=ranking))
    return [LABELS[right] for right, _ in rows], predictions, table


@thorough
@given(RANKED)
def test_figures_of_confidence_are_scikit_learns_and_brute_force(rows: list[tuple[int, list[float]]]) -> None:
    from sklearn.metrics import log_loss

    from labeltune.evaluation import intervals, metrics

    truth, predictions, table = with_rankings(rows)
    few, intervals.BOOTSTRAP_RESAMPLES = intervals.BOOTSTRAP_RESAMPLES, 2
    try:
        found = confidence_metrics(truth, predictions)
    finally:
        intervals.BOOTSTRAP_RESAMPLES = few
    right = np.array([number for number, _ in rows])
    assert metrics.TOP == (2, 3, 5)
    assert found["confidence"]["nll"]["value"] == pytest.approx(
        log_loss(right, table, labels=range(4)), abs=1e-6
    )
    onehot = np.eye(4)[right]
    assert found["confidence"]["brier"]["value"] == pytest.approx(
        ((table - onehot) ** 2).sum(1).mean(), abs=1e-6
    )
    for k in (2, 3):
        places = [sorted(LABELS, key=lambda name, p=p: -p[LABELS.index(name)])[:k] for p in table]
        share = np.mean([t in place for t, place in zip(truth, places, strict=True)])
        assert found["top_k"][str(k)]["value"] == pytest.approx(share, abs=1e-6)
    assert "5" not in found["top_k"]
    tops, hits = table.max(1), [p.label == t for p, t in zip(predictions, truth, strict=True)]
    error = 0.0
    for low in range(15):
        inside = [i for i, p in enumerate(tops) if low / 15 < p <= (low + 1) / 15]
        if inside:
            error += len(inside) / len(tops) * abs(np.mean(tops[inside]) - np.mean([hits[i] for i in inside]))
    assert expected_calibration_error(tops, hits) == pytest.approx(error, abs=1e-9)
    assert sum(each["rows"] for each in reliability_bins(tops, hits)) == len(rows)


def test_without_probabilities_there_are_no_figures_of_confidence() -> None:
    assert confidence_metrics(["A"], [Prediction("0", "A", label="A")]) == {}
    found = classification_metrics(*answered_rows([("A", "A"), ("B", None)]))
    assert "confidence" not in found and found["confusion"] == {"A": {"A": 1}, "B": {"": 1}}


def entities_of(numbers: list[tuple[int, int, str]]) -> tuple[Entity, ...]:
    """Gaps and lengths -> entities that do not overlap."""
    found, at = [], 0
    for gap, length, label in numbers:
        start = at + gap
        at = start + length
        found.append(Entity("x" * length, label, start, at))
    return tuple(found)


SIDE = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("XY")), max_size=4).map(
    entities_of
)


@thorough
@given(SIDE, SIDE)
def test_figures_of_entities_are_nervaluates_and_brute_force(
    truth: tuple[Entity, ...], answers: tuple[Entity, ...]
) -> None:
    from nervaluate import Evaluator

    matched = match_entities(truth, answers)
    counts = {kind: len(matched.errors[kind]) for kind in ERRORS}
    both = (
        len(matched.right)
        + counts["wrong_type"]
        + counts["wrong_boundary"]
        + counts["wrong_type_and_boundary"]
    )
    assert both + counts["missed"] == len(truth) and both + counts["spurious"] == len(answers)
    same = sum((a.start, a.end) == (b.start, b.end) for a in truth for b in answers)
    assert len(matched.right) + counts["wrong_type"] == same
    assert both == same + most_overlaps(
        [e for e in truth if not any((e.start, e.end) == (b.start, b.end) for b in answers)],
        [e for e in answers if not any((e.start, e.end) == (b.start, b.end) for b in truth)],
    )

    def spans_of(entities: tuple[Entity, ...]) -> list[dict[str, object]]:
        return [{"label": e.label, "start": e.start, "end": (e.end or 1) - 1} for e in entities]

    if not truth or not answers:
        return
    theirs = Evaluator([spans_of(truth)], [spans_of(answers)], tags=["X", "Y"], loader="dict").evaluate()
    strict = theirs["overall"]["strict"]
    assert strict.correct == len(matched.right)
    crowded = any(
        sum(_touch(a, b) for b in answers) > 1 or sum(_touch(b, other) for other in truth) > 1
        for a in truth
        for b in answers
        if _touch(a, b)
    )
    if (
        not crowded
    ):  # where one entity touches several, nervaluate's pairing depends on the order it reads them in
        partial = theirs["overall"]["partial"]
        ours = partial_span_f1([matched])
        assert ours.value == pytest.approx(partial.f1)
        assert (partial.missed, partial.spurious) == (counts["missed"], counts["spurious"])


def _touch(a: Entity, b: Entity) -> bool:
    return bool(a.start < b.end and b.start < a.end)  # type: ignore[operator]


def most_overlaps(truth: list[Entity], answers: list[Entity]) -> int:
    """The largest number of overlapping pairs, one to one, by trying all."""
    if len(truth) > len(answers):
        truth, answers = answers, truth
    return max(
        (
            sum(_touch(a, b) for a, b in zip(truth, order, strict=False))
            for order in permutations(answers, len(truth))
        ),
        default=0,
    )


def test_every_kind_of_error_has_its_name() -> None:
    right = (
        Entity("a", "X", 0, 2),
        Entity("b", "X", 3, 5),
        Entity("c", "X", 6, 8),
        Entity("d", "X", 9, 11),
        Entity("e", "X", 12, 14),
    )
    answers = (
        Entity("a", "X", 0, 2),
        Entity("b", "Y", 3, 5),
        Entity("c", "X", 6, 7),
        Entity("d", "Y", 9, 12),
        Entity("z", "X", 20, 22),
        Entity("lost", "X"),
    )
    matched = match_entities(right, answers)
    assert matched.right == right[:1]
    assert {kind: len(found) for kind, found in matched.errors.items()} == {
        "wrong_type": 1,
        "wrong_boundary": 1,
        "wrong_type_and_boundary": 1,
        "missed": 1,
        "spurious": 2,
    }
    text = "x" * 30
    found = ner_metrics([Example("0", text, entities=right)], [Prediction("0", "", entities=answers)])
    assert found["errors"]["spurious"] == 2 and found["exact_rows"] == 0
    assert found["partial_span_f1"]["value"] == pytest.approx(2 * 3 / 11, abs=1e-6)
    assert found["labels"]["Y"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    json.dumps(found, allow_nan=False)


SPANS = st.sets(
    st.tuples(st.integers(0, 6), st.integers(1, 4), st.sampled_from("AB")).map(
        lambda t: (t[0], t[0] + t[1], t[2])
    ),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SPANS, SPANS), min_size=1, max_size=3))
def test_figures_of_nested_entities_are_counted_one_by_one(rows: list[Any]) -> None:
    def kind(span: Any, among: Any) -> str:
        others = [other for other in among if other[:2] != span[:2]]
        if any(other[0] <= span[0] and span[1] <= other[1] for other in others):
            return "inner"
        return "outer" if any(span[0] <= other[0] and other[1] <= span[1] for other in others) else "flat"

    found = nesting_figures([truth for truth, _ in rows], [given for _, given in rows])
    kinds = [kind(span, side) for row in rows for side in row for span in side]
    if "inner" not in kinds:
        assert found == {}
        return
    assert list(found) == ["flat", "outer", "inner"]
    for name, figures in found.items():
        right = sum(kind(s, truth) == name for truth, given in rows for s in truth & given)
        wanted = sum(kind(s, truth) == name for truth, _ in rows for s in truth)
        given = right + sum(kind(s, side) == name for truth, side in rows for s in side - truth)
        expected = 2 * right / (wanted + given) if wanted + given else 1.0
        assert figures["support"] == wanted
        assert figures["span_f1"]["value"] == pytest.approx(expected, abs=1e-6)


def test_a_report_tells_inner_and_outer_entities() -> None:
    right = (Entity("ab", "X", 0, 2), Entity("a", "Y", 0, 1), Entity("d", "X", 3, 4))
    examples = [Example("0", "ab d", entities=right)]
    predictions = [Prediction("0", "", entities=right[:2])]
    found = slices(examples, predictions)["by_nesting"]
    assert [(part["slice"], part["rows"], part["recall"]) for part in found] == [
        ("flat", 1, 0.0),
        ("outer", 1, 1.0),
        ("inner", 1, 1.0),
    ]
    metrics = {"task": "ner", "run": "r", "data": "d", **ner_metrics(examples, predictions)}
    page = report_page({**metrics, "slices": {"by_nesting": found}}, examples, predictions)
    assert "Entities inside entities" in page and "嵌套实体" in page and "内层" in page
    flat = slices([Example("0", "ab d", entities=right[2:])], [Prediction("0", "", entities=())])
    assert "by_nesting" not in flat


def test_mcnemar_is_the_binomial_test() -> None:
    # 10 of 12 changed rows on one side: twice the upper tail of a fair coin
    assert mcnemar(2, 10) == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0


def test_the_paired_bootstrap_sees_what_single_intervals_cannot() -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 5, 300)  # rows differ far more than models do
    first, second = hard + generator.normal(0, 0.1, 300), hard + 0.05 + generator.normal(0, 0.1, 300)
    measure, p = paired_bootstrap(lambda rows: (float(first[rows].mean()), float(second[rows].mean())), 300)
    assert measure.low > 0 and measure.value == pytest.approx(float((second - first).mean()))
    assert p == pytest.approx(2 / (BOOTSTRAP_RESAMPLES + 1))
    _, same = paired_bootstrap(lambda rows: (float(first[rows].mean()),) * 2, 300)
    assert same == 1.0
    under_null = []
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 1, (2, 100))
        under_null.append(
            paired_bootstrap(lambda r, n=noise: (float(n[0][r].mean()), float(n[1][r].mean())), 100)[1]
        )
    assert 0 < np.mean(np.array(under_null) < 0.05) < 0.15


def test_a_comparison_finds_the_rows_that_changed() -> None:
    examples, first = answered_rows([("A", "A"), ("A", "B"), ("B", "A"), ("B", None)])
    _, second = answered_rows([("A", "B"), ("A", "A"), ("B", "B"), ("B", "A")])
    found = compare_predictions(examples, first, second)
    assert found["changed"] == {"gained": [1, 2], "lost": [0]}
    assert (found["both_right"], found["both_wrong"]) == (0, 1)
    accuracy = found["differences"]["accuracy"]
    assert (accuracy["first"], accuracy["second"], accuracy["p_value"]) == (0.25, 0.5, mcnemar(1, 2))
    assert found["differences"]["macro_f1"]["first"] == headline(examples, first)["macro_f1"]
    texts = [Example("0", "abcdef", entities=(Entity("a", "X", 0, 1),)), Example("1", "abc", entities=())]
    nothing = [Prediction("0", "", entities=()), Prediction("1", "", entities=())]
    right = [Prediction("0", "", entities=(Entity("a", "X", 0, 1),)), nothing[1]]
    found = compare_predictions(texts, nothing, right)
    assert found["changed"] == {"gained": [0], "lost": []}
    assert (found["differences"]["span_f1"]["first"], found["differences"]["span_f1"]["second"]) == (0.0, 1.0)
    json.dumps(found, allow_nan=False)


def test_interval_and_p_that_point_apart_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """12 rows won and 3 lost: p = 0.035; 6 won and none lost of 40: an interval above 0, and p = 0.031; 5 and none: 0.0625."""
    for won, lost, apart in ((12, 3, False), (6, 0, False), (5, 0, True), (3, 3, False)):
        examples, first = answered_rows([("A", "B")] * won + [("A", "A")] * (40 - won))
        _, second = answered_rows([("A", "A")] * (40 - lost) + [("A", "B")] * lost)
        found = compare_predictions(examples, first, second)
        assert point_apart(found["differences"]["accuracy"]) is apart
        found = {**found, "first": "a", "second": "b", "data": "rows.jsonl", "base": False, "seen": {}}
        _print_differences(found)
        assert ("accuracy: interval (bootstrap) and p" in capsys.readouterr().err) is apart
        page = comparison_page({**found, "headline": {}, "task": "classification"}, examples, first, second)
        assert ("McNemar&#39;s test) disagree here" in page) is apart


def test_slices_cover_every_row_once() -> None:
    examples, predictions = answered_rows([("A", "A")] * 30 + [("B", "A")] * 6 + [("C", "C")] * 2)
    found = slices(examples, predictions)
    assert sum(part["rows"] for part in found["by_length"]) == 38 and len(found["by_length"]) == 4
    assert [
        (part["labels"], part["rows"], part["accuracy"]["value"]) for part in found["by_label_frequency"]
    ] == [
        (["C"], 2, 1.0),
        (["B"], 6, 0.0),
        (["A"], 30, 1.0),
    ]
    same = slices(*answered_rows([("A", "A")]))
    assert [part["rows"] for part in same["by_length"]] == [1]
    texts = [Example("0", "abcdef", entities=(Entity("a", "X", 0, 1),)), Example("1", "abc", entities=())]
    found = slices(texts, [Prediction("0", "", entities=()), Prediction("1", "", entities=())])
    assert found["by_label_frequency"][-1]["span_f1"]["value"] == 0.0
    json.dumps(found, allow_nan=False)
