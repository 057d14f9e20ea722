"""Calibration figures against independent references, and the temperature against a grid."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from labeltune.evaluation.confidence import (
    HIGHEST,
    LOWEST,
    brier_score,
    calibration_report,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    softmax,
)


def overconfident(count: int, scale: float, seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    """Rows of 2 to 6 candidates whose right answers follow the probabilities; the scores are `scale` times too sharp."""
    generator = np.random.default_rng(seed)
    rows, right = [], []
    for _ in range(count):
        scores = generator.normal(size=generator.integers(2, 7))
        right.append(int(generator.choice(len(scores), p=softmax(scores))))
        rows.append(scores * scale)
    return rows, right


def test_likelihood_and_brier_agree_with_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    rows = list(generator.normal(size=(200, 2)) * 3)
    right = [int(k) for k in generator.integers(0, 2, 200)]
    p = np.array([softmax(row) for row in rows])
    assert negative_log_likelihood(rows, right) == pytest.approx(log_loss(right, p))
    # scikit-learn counts one class of two, the definition for several classes counts both.
    assert brier_score(rows, right) == pytest.approx(2 * brier_score_loss(right, p[:, 1]))


def test_calibration_error_against_a_loop() -> None:
    generator = random.Random(0)
    p = [generator.random() for _ in range(500)] + [0.0, 1.0, 0.2, 0.4]
    hit = [generator.random() < 0.5 for _ in p]
    total = 0.0
    for k in range(10):
        inside = [i for i, value in enumerate(p) if k / 10 < value <= (k + 1) / 10 or (k == 0 and value == 0)]
        if inside:
            accuracy = sum(hit[i] for i in inside) / len(inside)
            confidence = sum(p[i] for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(accuracy - confidence)
    assert expected_calibration_error(p, hit, bins=10) == pytest.approx(total)
    assert expected_calibration_error([1.0, 1.0], [True, True]) == 0.0


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_made_scores_too_sharp(scale: float) -> None:
    rows, right = overconfident(3000, scale)
    found = fit_temperature(rows, right)
    assert found == pytest.approx(scale, rel=0.15)
    grid = [math.exp(x / 20) for x in range(-40, 41)]
    best = min(grid, key=lambda t: negative_log_likelihood(rows, right, t))
    assert negative_log_likelihood(rows, right, found) <= negative_log_likelihood(rows, right, best) + 1e-9


def test_rows_that_are_all_right_or_all_wrong_stay_within_bounds() -> None:
    rows = [np.array([5.0, 0.0])] * 20
    assert LOWEST <= fit_temperature(rows, [0] * 20) < 1
    assert 1 < fit_temperature(rows, [1] * 20) <= HIGHEST


def test_the_report_measures_on_rows_that_were_not_fitted_on() -> None:
    rows, right = overconfident(400, 4.0)
    temperature, report = calibration_report(rows, right)
    assert temperature == pytest.approx(4.0, rel=0.3)
    assert report["rows"] == 400
    for name in ("nll", "brier", "ece"):
        assert report["after"][name] < report["before"][name]
    assert report["after"]["nll"] >= negative_log_likelihood(rows, right, temperature)
    assert report["temperature"] == report["fitted"] == temperature and report["refused"] is None


def test_no_temperature_is_fitted_on_few_rows() -> None:
    rows, right = overconfident(400, 4.0)
    temperature, report = calibration_report(rows[:49], right[:49])
    assert temperature == report["temperature"] == 1.0 and report["fitted"] is None
    assert report["refused"] == "at least 50 rows are needed to fit one"
    assert report["after"] == report["before"] and report["rows"] == 49
    assert calibration_report(rows[:50], right[:50])[1]["fitted"] is not None
    assert calibration_report(rows[:1], right[:1])[0] == 1.0


def test_a_temperature_that_does_not_help_other_rows_is_refused() -> None:
    """Calibrated rows leave nothing to gain: on some draws of them the fit follows chance, and cross-fitting shows it."""
    found = []
    for seed in range(12):
        temperature, report = calibration_report(*overconfident(60, 1.0, seed))
        worse = any(report["after"][name] > report["before"][name] for name in ("nll", "brier"))
        assert (temperature == 1.0) == worse == (report["refused"] is not None)
        if worse:
            assert report["refused"] == f"{report['fitted']:.2f} does not hold on rows it was not fitted on"
        found.append(worse)
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize(("right", "bound"), [(0, LOWEST), (1, HIGHEST)])
def test_a_fit_on_a_bound_of_its_range_is_refused(right: int, bound: float) -> None:
    temperature, report = calibration_report([np.array([5.0, 0.0])] * 60, [right] * 60)
    assert temperature == report["temperature"] == 1.0
    assert report["refused"] == f"the fit runs into the bound {bound:g} of its range"
