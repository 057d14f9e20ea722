"""Labels that are decided each by itself: the scales that make their probabilities believable, and from what probability on a label
is given. Both are fitted on validation rows and kept only where they are better on rows they were not fitted on; pure functions.

Arrays have the shape [rows, labels]; log-odds are NaN where a row does not offer a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.confidence import (
    ENOUGH_ROWS,
    FOLDS,
    HIGHEST,
    LOWEST,
    expected_calibration_error,
    sigmoid,
)
from labeltune.evaluation.multilabel import Flags, label_counts, macro_f1, micro_f1

Array = NDArray[numpy.float64]
#: A label has a scale of its own where so many rows have it and so many do not.
ENOUGH_OF_LABEL = 20
#: How strongly the scale of a label is held to that of all labels: as by one row more on either side.
RIDGE = 1.0
#: Passes over the labels when their thresholds are chosen for a figure of all of them.
SWEEPS = 4
#: Thresholds that are tried; probabilities lie near 0 and 1.
GRID: Array = numpy.asarray(sigmoid(numpy.linspace(-6, 6, 97)))
#: What figure a threshold may be chosen for.
OBJECTIVES: dict[str, Callable[[NDArray[Any]], float]] = {"micro_f1": micro_f1, "macro_f1": macro_f1}


@dataclass(frozen=True)
class Scales:
    """log-odds -> slope * log-odds + intercept; arrays of shape [labels]."""

    slopes: Array
    intercepts: Array

    def apply(self, odds: Array) -> Array:
        """Probabilities."""
        return numpy.asarray(sigmoid(odds * self.slopes + self.intercepts))


def fit_scales(odds: Array, right: Flags) -> Scales:
    """One slope for all labels, with the least negative log-likelihood; where a label has `ENOUGH_OF_LABEL` rows of either kind, a slope
    and an intercept of its own (Platt scaling), drawn to the common ones."""
    labels = odds.shape[1]
    asked = ~numpy.isnan(odds)
    slope = 1 / _temperature(odds[asked], right[asked])
    slopes, intercepts = numpy.full(labels, slope), numpy.zeros(labels)
    for column in range(labels):
        mine = asked[:, column]
        positive = int(right[mine, column].sum())
        if min(positive, int(mine.sum()) - positive) >= ENOUGH_OF_LABEL:
            found = _platt(odds[mine, column], right[mine, column], slope)
            slopes[column], intercepts[column] = found
    return Scales(slopes, intercepts)


def _losses(odds: Array, right: Flags) -> Array:
    """-ln of the probability of what is right."""
    return numpy.logaddexp(0, numpy.where(right, -odds, odds))


def _temperature(odds: Array, right: Flags) -> float:
    from scipy.optimize import minimize_scalar

    def loss(logarithm: float) -> float:
        return float(_losses(odds * numpy.exp(-logarithm), right).mean())

    bounds = numpy.log((LOWEST, HIGHEST))
    return float(numpy.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _platt(odds: Array, right: Flags, slope: float) -> tuple[float, float]:
    from scipy.optimize import minimize

    def loss(values: Array) -> float:
        factor, shift = values
        held = RIDGE * ((factor / slope - 1) ** 2 + shift**2)
        return float(_losses(odds * factor + shift, right).sum() + held)

    factor, shift = minimize(loss, numpy.array([slope, 0.0]), method="L-BFGS-B").x
    return float(max(factor, slope / HIGHEST)), float(shift)


def cross_fitted(odds: Array, right: Flags) -> Array:
    """Probabilities by scales that were fitted on the other folds."""
    found = numpy.full_like(odds, numpy.nan)
    for fold, rest in _folds(len(odds)):
        found[fold] = fit_scales(odds[rest], right[rest]).apply(odds[fold])
    return found


def _folds(rows: int) -> list[tuple[NDArray[numpy.intp], NDArray[numpy.intp]]]:
    numbers = numpy.arange(rows)
    return [(numbers[numbers % FOLDS == k], numbers[numbers % FOLDS != k]) for k in range(FOLDS)]


def decision_figures(probabilities: Array, right: Flags) -> dict[str, float]:
    """NLL, Brier score and ECE of single decisions."""
    asked = ~numpy.isnan(probabilities)
    p, hit = numpy.clip(probabilities[asked], 1e-12, 1 - 1e-12), right[asked]
    return {
        "nll": float(-numpy.log(numpy.where(hit, p, 1 - p)).mean()),
        "brier": float(((p - hit) ** 2).mean()),
        "ece": expected_calibration_error(p.tolist(), hit.tolist()),
    }


def scales_report(odds: Array, right: Flags) -> tuple[Scales | None, dict[str, Any]]:
    """The scales of these rows, None where there are too few rows or probabilities do not get better on rows they were not fitted on; and
    `rows`, `own` (labels with a scale of their own), `refused` (why there are none, or None), `before` and `after` (cross-fitted)."""
    before = decision_figures(sigmoid(odds), right)
    report: dict[str, Any] = {"rows": len(odds), "own": 0, "refused": None, "before": before, "after": before}
    if len(odds) < ENOUGH_ROWS:
        return None, report | {"refused": f"at least {ENOUGH_ROWS} rows are needed for that"}
    scales = fit_scales(odds, right)
    after = decision_figures(cross_fitted(odds, right), right)
    report |= {"after": after, "own": int((scales.intercepts != 0).sum())}
    if any(after[name] > before[name] for name in ("nll", "brier")):
        return None, report | {"refused": "what fits does not hold on rows it was not fitted on"}
    return scales, report


def one_threshold(probabilities: Array, right: Flags, objective: str) -> float:
    """The threshold for all labels with the best figure; of equals the one nearest to 0.5."""
    measure = OBJECTIVES[objective]
    found = [(round(measure(_sums(probabilities, right, at)), 9), -abs(at - 0.5), at) for at in GRID]
    return float(max(found)[2])


def label_thresholds(probabilities: Array, right: Flags, objective: str) -> Array:
    """A threshold a label, shape [labels], with the best figure: labels take turns, beginning with one threshold for all.

    For macro-F1 labels do not depend on each other, and one pass is exact. A label that no row has keeps the common one.
    """
    start = one_threshold(probabilities, right, objective)
    found = numpy.full(probabilities.shape[1], start)
    # [thresholds, 3, labels]: what each threshold gives for each label by itself.
    table = numpy.stack([_sums(probabilities, right, at).reshape(3, -1) for at in GRID])
    sums = _sums(probabilities, right, start).reshape(3, -1)
    nearness = -numpy.abs(GRID - start)
    for _ in range(SWEEPS):
        before = found.copy()
        for column in numpy.flatnonzero(right.any(axis=0)):
            if objective == "macro_f1":
                hits, given, wanted = table[:, :, column].T
            else:
                others = sums.sum(axis=1) - sums[:, column]
                hits, given, wanted = (table[:, :, column] + others).T
            score = numpy.round(2 * hits / numpy.maximum(given + wanted, 1), 9)
            best = max(range(len(GRID)), key=lambda at: (score[at], nearness[at]))
            found[column], sums[:, column] = GRID[best], table[best, :, column]
        if (before == found).all():
            break
    return found


def _sums(probabilities: Array, right: Flags, at: float | Array) -> NDArray[Any]:
    """Sums of `label_counts`, shape [3 * labels]; NaN is below every threshold."""
    with numpy.errstate(invalid="ignore"):
        return numpy.asarray(label_counts(right, probabilities >= at).sum(axis=0))


def threshold_report(
    probabilities: Array, right: Flags, objective: str, allowed: str
) -> tuple[float, Array | None, dict[str, Any]]:
    """Thresholds that are better than 0.5 on rows they were not chosen on.

    Args:
        objective: of `OBJECTIVES`.
        allowed: `none`, `one` for all labels, or `label`: also one a label.

    Returns:
        That of all labels; one a label, or None; and `objective`, `chosen`, and cross-fitted figures of each way.
    """
    ways: Sequence[str] = ("none", "one", "label")[: ("none", "one", "label").index(allowed) + 1]
    figures = {way: _cross_fitted_figure(probabilities, right, objective, way) for way in ways}
    # The simplest one of equals; on few rows thresholds would follow chance.
    chosen = max(ways, key=lambda way: figures[way]) if len(right) >= ENOUGH_ROWS else "none"
    report = {"objective": objective, "chosen": chosen, "cross_fitted": figures}
    threshold = 0.5 if chosen == "none" else one_threshold(probabilities, right, objective)
    own = label_thresholds(probabilities, right, objective) if chosen == "label" else None
    return threshold, own, report


def _cross_fitted_figure(probabilities: Array, right: Flags, objective: str, way: str) -> float:
    sums = numpy.zeros(3 * right.shape[1])
    for fold, rest in _folds(len(right)):
        at: float | Array = 0.5
        if way == "one":
            at = one_threshold(probabilities[rest], right[rest], objective)
        elif way == "label":
            at = label_thresholds(probabilities[rest], right[rest], objective)
        sums += _sums(probabilities[fold], right[fold], at)
    return round(OBJECTIVES[objective](sums), 6)
