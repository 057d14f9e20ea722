"""A temperature for a trained classifier, from its validation rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labeltune.distributed import rank
from labeltune.evaluation.confidence import calibration_report
from labeltune.evaluation.headline import SELECTION
from labeltune.inference.answers import Calibration
from labeltune.inference.predictor import Predictor
from labeltune.types import Example


def calibrate(
    predictor: Predictor, examples: Sequence[Example], folder: Path, say: Callable[[str], None]
) -> tuple[Calibration, dict[str, Any]]:
    """Fit on labelled examples, save `calibration.json` in a checkpoint, and say what it brought, or why 1 is kept.

    Returns:
        The calibration, and the report of `calibration_report`.
    """
    rows = predictor.log_probabilities(examples)
    norm = predictor.generation.length_norm
    right = [row.labels.index(example.label or "") for row, example in zip(rows, examples, strict=True)]
    temperature, report = calibration_report([np.array(row.comparable(norm)) for row in rows], right)
    calibration = Calibration(temperature, norm)
    if rank() == 0:
        calibration.save(folder, report)
    before, after = report["before"], report["after"]
    figures = f"ECE {before['ece']:.3f}, NLL {before['nll']:.3f}, Brier {before['brier']:.3f}"
    if report["fitted"] is not None:
        figures = (
            f"ECE {before['ece']:.3f} -> {after['ece']:.3f}, NLL {before['nll']:.3f} -> {after['nll']:.3f}, "
            f"Brier {before['brier']:.3f} -> {after['brier']:.3f} (after: cross-fitted)"
        )
    kept = f" is kept, {report['refused']}" if report["refused"] is not None else ""
    say(f"confidence: temperature {temperature:.2f}{kept}; {len(rows)} validation rows: {figures}")
    return calibration, report


def calibration_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """A report as flat numbers for a tracker."""
    figures = {
        f"{SELECTION}/calibration_{name}_{when}": float(report[when][name])
        for when in (("before", "after") if report["fitted"] is not None else ("before",))
        for name in ("nll", "brier", "ece")
    }
    return {**figures, f"{SELECTION}/calibration_temperature": float(report["temperature"])}
