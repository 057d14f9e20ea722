"""How far probabilities can be believed, and the temperature that makes them more believable; pure functions.

Rows may have different candidates: every row is an array of unnormalised log-probabilities, shape [candidates], with the
index of the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[np.ndarray[Any, np.dtype[np.float64]]]

#: Bounds of a fitted temperature; rows that are all right would otherwise drive it to 0.
LOWEST, HIGHEST = 0.05, 20.0
#: On fewer validation rows than these no temperature is fitted: it would follow chance.
ENOUGH_ROWS = 50
FOLDS = 5
#: On fewer no weight of another model's scores is fitted.
ENOUGH_FOR_WEIGHT = 20
#: Of another model's scores; less than the least is none.
LEAST_WEIGHT, MOST_WEIGHT = 0.01, 10.0


def softmax(scores: np.ndarray[Any, Any], temperature: float = 1.0) -> np.ndarray[Any, Any]:
    """Probabilities of unnormalised log-probabilities divided by a temperature; shape as given, sums to 1."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum())


def sigmoid(log_odds: np.ndarray[Any, Any] | np.float64) -> np.ndarray[Any, Any]:
    """Probabilities of log-odds; shape as given."""
    from scipy.special import expit

    return np.asarray(expit(log_odds))


def negative_log_likelihood(rows: Rows, right: Sequence[int], temperature: float = 1.0) -> float:
    """Mean of -ln p(right candidate)."""
    losses = []
    for scores, answer in zip(rows, right, strict=True):
        scaled = np.asarray(scores, dtype=np.float64) / temperature
        top = scaled.max()
        losses.append(top + np.log(np.exp(scaled - top).sum()) - scaled[answer])
    return float(np.mean(losses))


def brier_score(rows: Rows, right: Sequence[int], temperature: float = 1.0) -> float:
    """Mean over rows of the squared distance between probabilities and the right answer, 0 to 2 (Brier 1950)."""
    total = 0.0
    for scores, answer in zip(rows, right, strict=True):
        p = softmax(scores, temperature)
        p[answer] -= 1
        total += float((p**2).sum())
    return total / len(rows)


def bin_numbers(confidences: np.ndarray[Any, Any], bins: int) -> np.ndarray[Any, Any]:
    """Which of equally wide bins each confidence lies in; one on a border belongs to the bin below."""
    return np.asarray(np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1))


def expected_calibration_error(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 15
) -> float:
    """Mean distance between confidence and accuracy over equally wide bins, weighted by rows (Guo et al. 2017,
    arXiv:1706.04599, equation 3)."""
    p, hit = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    number = bin_numbers(p, bins)
    error = 0.0
    for each in range(bins):
        inside = number == each
        if inside.any():
            error += inside.mean() * abs(p[inside].mean() - hit[inside].mean())
    return float(error)


def fit_temperature(rows: Rows, right: Sequence[int]) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017), within bounds; its logarithm is searched."""
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    padded = np.full(
        (len(rows), max(map(len, rows))), -np.inf
    )  # minus infinity: a candidate that a row does not have
    for i, scores in enumerate(rows):
        padded[i, : len(scores)] = scores
    chosen = padded[np.arange(len(rows)), right]

    def loss(logarithm: float) -> float:
        inverse = np.exp(-logarithm)
        return float(np.mean(logsumexp(padded * inverse, axis=1) - chosen * inverse))

    found = minimize_scalar(loss, bounds=np.log((LOWEST, HIGHEST)), method="bounded", options={"xatol": 1e-8})
    return float(np.exp(found.x))


def calibration_report(rows: Rows, right: Sequence[int]) -> tuple[float, dict[str, Any]]:
    """A temperature fitted on all rows, if it helps on rows it was not fitted on (five-fold cross-fitting); else 1.

    It is kept where there are at least `ENOUGH_ROWS` rows, it does not lie on a bound of the search, and neither the
    negative log-likelihood nor the Brier score of the cross-fitted probabilities is worse than before.

    Returns:
        The temperature; `rows`, `temperature`, `fitted` (None on too few rows), `refused` (why it is 1, or None), and for
        `before` and `after` (cross-fitted) `nll`, `brier` and `ece`. Without a fit `after` is `before`.
    """
    before = _figures(rows, right, np.ones(len(rows)))
    report: dict[str, Any] = {"rows": len(rows), "temperature": 1.0, "fitted": None, "refused": None}
    report |= {"before": before, "after": before}
    if len(rows) < ENOUGH_ROWS:
        return 1.0, report | {"refused": f"at least {ENOUGH_ROWS} rows are needed to fit one"}
    fitted = fit_temperature(rows, right)
    each = np.ones(len(rows))
    for k in range(FOLDS):
        fold = list(range(k, len(rows), FOLDS))
        rest = [i for i in range(len(rows)) if i % FOLDS != k]
        each[fold] = fit_temperature([rows[i] for i in rest], [right[i] for i in rest])
    after = _figures(rows, right, each)
    report |= {"fitted": fitted, "after": after}
    worse = [name for name in ("nll", "brier") if after[name] > before[name]]
    reached = negative_log_likelihood(rows, right, fitted)
    bound = next((t for t in (LOWEST, HIGHEST) if negative_log_likelihood(rows, right, t) <= reached), None)
    if bound is not None:
        report["refused"] = f"the fit runs into the bound {bound:g} of its range"
    elif worse:
        report["refused"] = f"{fitted:.2f} does not hold on rows it was not fitted on"
    else:
        report["temperature"] = fitted
    return report["temperature"], report


def fit_mixture(rows: Rows, others: Rows, right: Sequence[int]) -> tuple[float, float]:
    """(inverse temperature, weight): what `rows` and `others` are multiplied by so that their sums have the least negative log-likelihood.

    Rows that are all answered rightly would have weights without end; normal distributions around 1 and around 0, both of deviation 1, hold
    them (maximum a posteriori).
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    width = max(map(len, rows))
    both = np.full((2, len(rows), width), 0.0)
    missing = np.zeros((len(rows), width))
    for i, (one, other) in enumerate(zip(rows, others, strict=True)):
        both[0, i, : len(one)], both[1, i, : len(one)] = one, other
        missing[i, len(one) :] = -np.inf  # a candidate that a row does not have
    chosen = both[:, np.arange(len(rows)), right]

    def loss(weights: np.ndarray[Any, Any]) -> float:
        sums = np.tensordot(weights, both, 1) + missing
        held = ((weights[0] - 1) ** 2 + weights[1] ** 2) / 2
        return float(np.sum(logsumexp(sums, axis=1) - weights @ chosen) + held)

    bounds = [(1 / HIGHEST, 1 / LOWEST), (0.0, MOST_WEIGHT)]
    found = minimize(loss, np.array([1.0, 0.5]), bounds=bounds, method="L-BFGS-B")
    return float(found.x[0]), float(found.x[1])


def mixture_report(
    rows: Rows, others: Rows, right: Sequence[int], alone: Mapping[str, float]
) -> tuple[tuple[float, float] | None, dict[str, Any]]:
    """What another model's scores bring when they are added: fitted on all rows, and kept where both the negative log-likelihood and the Brier
    score of cross-fitted probabilities are better than without.

    Args:
        others: the other model's scores of the same candidates.
        alone: figures without them (`after` of `calibration_report`).

    Returns:
        (inverse temperature, weight), or None where it is not kept; `weight`, `refused` (why, or None), and figures `before` and `after`
        (cross-fitted).
    """
    report: dict[str, Any] = {"weight": 0.0, "refused": None, "before": dict(alone), "after": dict(alone)}
    if len(rows) < ENOUGH_FOR_WEIGHT:
        return None, report | {"refused": f"at least {ENOUGH_FOR_WEIGHT} rows are needed to weigh it"}
    sums: list[Any] = [None] * len(rows)
    for k in range(FOLDS):
        rest = [i for i in range(len(rows)) if i % FOLDS != k]
        learned = [rows[i] for i in rest], [others[i] for i in rest], [right[i] for i in rest]
        inverse, weight = fit_mixture(*learned)
        for i in range(k, len(rows), FOLDS):
            sums[i] = inverse * np.asarray(rows[i]) + weight * np.asarray(others[i])
    after = _figures(sums, right, np.ones(len(rows)))
    found = fit_mixture(rows, others, right)
    report |= {"weight": found[1], "after": after}
    if found[1] < LEAST_WEIGHT or after["nll"] >= alone["nll"] or after["brier"] > alone["brier"]:
        return None, report | {
            "weight": 0.0,
            "refused": "it does not help on rows that it was not weighed on",
        }
    return found, report


def _figures(rows: Rows, right: Sequence[int], temperatures: np.ndarray[Any, Any]) -> dict[str, float]:
    scaled = [np.asarray(scores) / t for scores, t in zip(rows, temperatures, strict=True)]
    probabilities = [softmax(scores) for scores in scaled]
    return {
        "nll": negative_log_likelihood(scaled, right),
        "brier": brier_score(scaled, right),
        "ece": expected_calibration_error(
            [float(p.max()) for p in probabilities],
            [int(p.argmax()) == answer for p, answer in zip(probabilities, right, strict=True)],
        ),
    }
