"""Numbers with 95 % intervals, for one model and for two on the same rows; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy
from numpy.typing import NDArray

#: Resamples of every bootstrap interval.
BOOTSTRAP_RESAMPLES = 1000
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Measure:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, rounded to six digits."""
        return {"value": round(self.value, 6), "low": round(self.low, 6), "high": round(self.high, 6)}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, total: int) -> Measure:
    """A share with Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953); usable at 0 and 1."""
    if total == 0:
        return Measure(float("nan"), float("nan"), float("nan"))
    share = successes / total
    centre = (share + _Z95**2 / (2 * total)) / (1 + _Z95**2 / total)
    half = _Z95 * sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2)) / (1 + _Z95**2 / total)
    return Measure(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def bootstrap(statistic: Callable[[Any], float], rows: int, seed: int = 0) -> Measure:
    """A statistic over rows with its percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Args:
        statistic: integer array of row numbers (with repetitions) -> the number.
        rows: how many rows there are.
    """
    if rows == 0:
        return Measure(float("nan"), float("nan"), float("nan"))
    low, high = numpy.percentile(_resampled(statistic, rows, seed), [2.5, 97.5])
    return Measure(statistic(numpy.arange(rows)), float(low), float(high))


def mean_with_interval(values: Sequence[float] | NDArray[numpy.float64], seed: int = 0) -> Measure:
    """The mean of one number a row with its bootstrap interval; `values` has shape [rows]."""
    array = numpy.asarray(values, dtype=numpy.float64)
    return bootstrap(lambda rows: float(array[rows].mean()), len(array), seed)


def paired_bootstrap(
    statistic: Callable[[Any], tuple[float, float]], rows: int, seed: int = 0
) -> tuple[Measure, float]:
    """How much larger the second statistic is than the first on the same rows, and how surely.

    Args:
        statistic: integer array of row numbers (with repetitions) -> (of the first model, of the second).
        rows: how many rows there are.

    Returns:
        The difference with its percentile bootstrap interval, and the two-sided p-value: twice the share of resamples in
        which the difference lies on the other side of 0 or on it (Efron and Tibshirani 1993, chapter 15), at least
        1 / (resamples + 1).
    """
    if rows == 0:
        return Measure(float("nan"), float("nan"), float("nan")), float("nan")

    def difference(chosen: NDArray[numpy.intp]) -> float:
        first, second = statistic(chosen)
        return second - first

    found = numpy.array(_resampled(difference, rows, seed))
    low, high = numpy.percentile(found, [2.5, 97.5])
    below, above = int((found <= 0).sum()), int((found >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(found) + 1))
    return Measure(difference(numpy.arange(rows)), float(low), float(high)), p


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947, doi:10.1007/BF02295996): a binomial test on the rows that one of
    two models answers rightly and the other one does not.

    Args:
        only_first: rows that only the first model has right.
        only_second: rows that only the second one has right.
    """
    from scipy.stats import binomtest

    changed = only_first + only_second
    return float(binomtest(only_first, changed, 0.5).pvalue) if changed else 1.0


def _resampled(statistic: Callable[[Any], float], rows: int, seed: int) -> list[float]:
    generator = numpy.random.default_rng(seed)
    return [statistic(generator.integers(0, rows, rows)) for _ in range(BOOTSTRAP_RESAMPLES)]
