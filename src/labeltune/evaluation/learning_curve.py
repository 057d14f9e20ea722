"""How a metric grows with training rows, and what twice as many would bring: a power law through runs on parts of the rows.

The error 1 - metric of n rows is taken as a * n ** -b with b >= 0 (Cortes et al. 1993, Learning Curves: Asymptotic Values and Rate of
Convergence, without their asymptote, which four points cannot tell), fitted by least squares in logarithms, each point weighted by the
width of its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.config import METRICS, RunConfig

_DRAWS = 2000
#: An error below it is not told from none.
_SMALLEST = 1e-3
#: Half the width of a 95 % interval in standard deviations.
_Z = 1.96


@dataclass(frozen=True)
class Point:
    """A metric with its 95 % interval, of a run on so many training rows; `measured` is False where it is foretold."""

    rows: int
    value: float
    low: float
    high: float
    measured: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, four digits."""
        return {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(self).items()}


def foretell(points: Sequence[Point], rows: int, seed: int = 0) -> Point:
    """What so many rows would bring: the fitted value, and the 95 % interval over points drawn from their own intervals.

    Args:
        points: two or more, of different numbers of rows.
    """
    sizes = numpy.log([point.rows for point in points])
    values = numpy.array([point.value for point in points])
    spread = numpy.array([max((point.high - point.low) / (2 * _Z), _SMALLEST) for point in points])
    drawn = numpy.random.default_rng(seed).normal(values, spread, size=(_DRAWS, len(points)))
    found = _fitted(sizes, numpy.vstack([values, drawn]), spread, numpy.log(rows))
    low, high = numpy.quantile(found[1:], [0.025, 0.975])
    return Point(rows, float(found[0]), float(min(low, found[0])), float(max(high, found[0])), measured=False)


def _fitted(
    sizes: NDArray[numpy.float64],
    values: NDArray[numpy.float64],
    spread: NDArray[numpy.float64],
    at: numpy.float64,
) -> NDArray[numpy.float64]:
    """Of each row of values, shape [draws, points], the fitted value at a logarithm of rows, shape [draws]."""
    errors = numpy.clip(1 - values, _SMALLEST, 1.0)
    logs = numpy.log(errors)
    # The spread of a logarithm is about that of the error, divided by the error.
    weights = (errors / spread) ** 2
    total = weights.sum(axis=1)
    middle = (weights * sizes).sum(axis=1) / total
    height = (weights * logs).sum(axis=1) / total
    away = sizes[None, :] - middle[:, None]
    slope = (weights * away * logs).sum(axis=1) / (weights * away**2).sum(axis=1)
    slope = numpy.minimum(slope, 0.0)  # more rows do not make it worse
    found: NDArray[numpy.float64] = 1 - numpy.exp(height + slope * (at - middle))
    return found


def metric_of(config: RunConfig) -> str:
    """The figure that a curve is drawn of: the one that picks a checkpoint, or the task's usual one."""
    return config.metric if config.metric in METRICS[config.task] else METRICS[config.task][0]


def point_of(figures: Mapping[str, Any], metric: str, rows: int) -> Point:
    """What the validation report of a run on so many rows says."""
    figure = figures[metric]
    return Point(rows, figure["value"], figure["low"], figure["high"])


def growth(figures: Mapping[str, Any], metric: str, parts: Sequence[Point], rows: int) -> dict[str, Any]:
    """The learning curve of a report: the runs on parts, the run on all rows, and what twice as many would bring."""
    points = [*parts, point_of(figures, metric, rows)]
    points.append(foretell(points, 2 * rows))
    return {"metric": metric, "points": [point.to_dict() for point in points]}


def told(curve: Mapping[str, Any]) -> str:
    """A line for people.

    >>> points = [Point(200, 0.81, 0.78, 0.84), Point(400, 0.86, 0.84, 0.88, measured=False)]
    >>> told({"metric": "macro_f1", "points": [point.to_dict() for point in points]})
    'macro_f1 by training rows: 200: 0.810 [0.780, 0.840]; 400: about 0.860 [0.840, 0.880]'
    """
    parts = [
        f"{p['rows']}: {'' if p['measured'] else 'about '}{p['value']:.3f} [{p['low']:.3f}, {p['high']:.3f}]"
        for p in curve["points"]
    ]
    return f"{curve['metric']} by training rows: {'; '.join(parts)}"


def parts_of(rows: int, smallest: int) -> list[int]:
    """Sizes of the parts that are trained before all rows: an eighth, a quarter and a half, none below `smallest`."""
    return [size for size in (rows // 8, rows // 4, rows // 2) if size >= smallest]


def stratified_order(strata: Sequence[str], seed: int) -> NDArray[numpy.intp]:
    """An order of rows of which every beginning has about the shares of strata that all rows have."""
    generator = numpy.random.default_rng(seed)
    names, codes, counts = numpy.unique(
        numpy.array(strata, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    place = numpy.empty(len(codes))
    for code in range(len(names)):
        own = numpy.flatnonzero(codes == code)
        place[own[generator.permutation(len(own))]] = (numpy.arange(len(own)) + generator.random()) / counts[
            code
        ]
    return numpy.argsort(place, kind="stable")
