"""From scores to probabilities: normalisation, temperature, prior correction; and the temperature that validation rows ask for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labeltune.distributed import rank
from labeltune.errors import ModelError
from labeltune.evaluation.confidence import calibration_report, mixture_report, sigmoid, softmax
from labeltune.evaluation.decisions import scales_report, threshold_report
from labeltune.evaluation.floor import MAX_ROWS, Floor, evenly, floor_of
from labeltune.evaluation.linear import LinearModel
from labeltune.evaluation.summary import SELECTION
from labeltune.io.outputs import file_hash, write_bytes, write_json
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

CALIBRATION_FILE = "calibration.json"
#: The linear model whose scores are added, in a checkpoint.
LINEAR_FILE = "linear.safetensors"


@dataclass(frozen=True)
class LabelScores:
    """Exact log-probabilities of a row's candidates.

    Attributes:
        labels: the candidates.
        log_probabilities: natural logarithm of each complete answer's probability, shape [candidates].
        lengths: tokens of each answer, its end of turn included.
    """

    labels: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    lengths: tuple[int, ...]

    def comparable(self, length_norm: str) -> list[float]:
        """What is compared: log-probabilities, or with `tokens` their means over each answer's tokens."""
        if length_norm == "tokens":
            return [p / n for p, n in zip(self.log_probabilities, self.lengths, strict=True)]
        return list(self.log_probabilities)


@dataclass(frozen=True)
class Calibration:
    """What was fitted on validation rows, saved beside the adapter.

    Attributes:
        temperature: divides the compared scores before they are made probabilities.
        length_norm: the comparison it was fitted for; another one is not calibrated.
        scales: of labels that are decided each by itself, (slope, intercept): their log-odds become slope * log-odds + intercept.
        threshold: a label is given from this probability on,
        thresholds: unless it has one of its own.
        linear: weight of a linear model's scores, which are added to the model's own (`LINEAR_FILE`); 0 without one.
        linear_hash: SHA-256 of its file.
    """

    temperature: float = 1.0
    length_norm: str = "none"
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    threshold: float = 0.5
    thresholds: Mapping[str, float] = field(default_factory=dict)
    linear: float = 0.0
    linear_hash: str = ""

    def each(self, odds: Mapping[str, float]) -> dict[str, float]:
        """Probabilities of labels that are decided each by itself.

        Args:
            odds: label -> ln p(applies) - ln p(does not).
        """
        plain = (1 / self.temperature, 0.0)
        scaled = {}
        for label, value in odds.items():
            slope, intercept = self.scales.get(label, plain)
            scaled[label] = slope * value + intercept
        return {label: float(sigmoid(np.float64(value))) for label, value in scaled.items()}

    def threshold_of(self, label: str) -> float:
        """The probability from which on a label is given."""
        return self.thresholds.get(label, self.threshold)

    def given(self, number: str, probabilities: Mapping[str, float]) -> Prediction:
        """The labels of a row that are probable enough, and the whole ranking."""
        ranking = tuple(sorted(probabilities.items(), key=lambda pair: -pair[1]))
        labels = tuple(label for label, p in ranking if p >= self.threshold_of(label))
        return Prediction(number, "\n".join(labels), labels=labels, ranking=ranking)

    def probabilities(
        self, row: LabelScores, length_norm: str, linear: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Probabilities of the candidates; they sum to 1.

        Args:
            linear: the linear model's scores of the candidates, where there is one and it knows all of them.
        """
        temperature = self.temperature if length_norm == self.length_norm else 1.0
        scores = np.array(row.comparable(length_norm)) / temperature
        if linear is not None and length_norm == self.length_norm:
            scores = scores + self.linear * np.array(linear)
        values = softmax(scores)
        return dict(zip(row.labels, map(float, values), strict=True))

    def save(self, folder: Path, report: Mapping[str, Any]) -> None:
        """Write `calibration.json` into a checkpoint, with what it brings on the validation rows."""
        write_json(folder / CALIBRATION_FILE, {**asdict(self), "validation": dict(report)})

    @staticmethod
    def load(folder: Path) -> Calibration:
        """The one of a checkpoint; neutral where none was fitted.

        Raises:
            ModelError: the file is damaged.
        """
        file = folder / CALIBRATION_FILE
        if not file.exists():
            return Calibration()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return Calibration(
                float(values["temperature"]),
                str(values["length_norm"]),
                {label: (float(a), float(b)) for label, (a, b) in values.get("scales", {}).items()},
                float(values.get("threshold", 0.5)),
                {label: float(at) for label, at in values.get("thresholds", {}).items()},
                float(values.get("linear", 0.0)),
                str(values.get("linear_hash", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is damaged: {error}; remove it to predict uncalibrated") from error


def remove_prior(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Divide every label's probability by its mean over the rows that offer it, and normalise again.

    Batch calibration (Zhou et al. 2023, arXiv:2309.17249): takes away what the model likes whatever the text says. It
    assumes that labels are about equally frequent in these rows.
    """
    totals: dict[str, list[float]] = {}
    for row in rows:
        for label, p in row.items():
            totals.setdefault(label, []).append(p)
    means = {label: max(math.fsum(values) / len(values), 1e-12) for label, values in totals.items()}
    corrected = []
    for row in rows:
        raw = {label: p / means[label] for label, p in row.items()}
        whole = math.fsum(raw.values())
        corrected.append({label: value / whole for label, value in raw.items()})
    return corrected


def ranked(number: str, probabilities: Mapping[str, float]) -> Prediction:
    """The most probable label, and the whole ranking."""
    ranking = tuple(sorted(probabilities.items(), key=lambda pair: -pair[1]))
    return Prediction(number, ranking[0][0], label=ranking[0][0], ranking=ranking)


def mean_scores(views: Sequence[LabelScores]) -> LabelScores:
    """Log-probabilities averaged over the windows of a document."""
    if len(views) == 1:
        return views[0]
    columns = zip(*(view.log_probabilities for view in views), strict=True)
    means = tuple(math.fsum(column) / len(views) for column in columns)
    return LabelScores(views[0].labels, means, views[0].lengths)


def linear_scores(
    model: LinearModel, examples: Sequence[Example], rows: Sequence[LabelScores]
) -> list[list[float] | None]:
    """A linear model's log-odds of every row's candidates; None where it does not know all of them."""
    found = model.scores([each.text for each in examples])
    return [model.among(each, row.labels) for each, row in zip(found, rows, strict=True)]


@dataclass(frozen=True)
class OutOfFold:
    """Rows, each with what a model says that was not trained on it.

    Attributes:
        add_linear: a linear model's scores are wanted, too.
        predictions: of entities, and of free generation.
        scores: of a label a row, before calibration; `odds` of several.
        linear: log-odds of the row's candidates by a linear model that was not trained on it either, None for candidates it does not know.
        floors: linear models' answers, of a fold each.
    """

    folds: int
    add_linear: bool = False
    examples: list[Example] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    scores: list[LabelScores] = field(default_factory=list)
    odds: list[dict[str, float]] = field(default_factory=list)
    linear: list[list[float] | None] = field(default_factory=list)
    floors: list[Floor | None] = field(default_factory=list)

    def add(self, predictor: Predictor, learned: Sequence[Example], asked: Sequence[Example]) -> None:
        """What a fold's model says of the rows that it has not seen."""
        self.examples.extend(asked)
        self.floors.append(floor_of(learned, asked))
        if predictor.task.name == "ner" or predictor.generation.decoding == "free":
            self.predictions.extend(predictor.predict(asked))
        if predictor.task.name == "multilabel":
            self.odds.extend(predictor.log_odds(asked))
        elif predictor.task.name == "classification":
            self.scores.extend(rows := predictor.log_probabilities(asked))
            if self.add_linear:
                known = [learned[row] for row in evenly(len(learned), MAX_ROWS)]
                model = LinearModel.fit([each.text for each in known], [each.label or "" for each in known])
                self.linear.extend(linear_scores(model, asked, rows))

    def answers(self, predictor: Predictor) -> list[Prediction]:
        """What they say, weighed as this predictor weighs its own scores."""
        if self.predictions:
            return self.predictions
        numbers = [example.id for example in self.examples]
        calibration, norm = predictor.calibration, predictor.generation.length_norm
        if self.odds:
            return list(map(calibration.given, numbers, map(calibration.each, self.odds)))
        linear = self.linear if calibration.linear else [None] * len(numbers)
        rows = [
            calibration.probabilities(row, norm, other)
            for row, other in zip(self.scores, linear, strict=True)
        ]
        rows = remove_prior(rows) if predictor.calibrate.prior == "batch" else rows
        return list(map(ranked, numbers, rows))

    @property
    def floor(self) -> Floor | None:
        """The linear models' answers to all rows; None where a fold has none."""
        known = [floor for floor in self.floors if floor is not None]
        if len(known) < len(self.floors):
            return None
        answers = tuple(answer for floor in known for answer in floor.predictions)
        return Floor(known[0].kind, min(floor.rows for floor in known), answers)


def linear_of(folder: Path, calibration: Calibration) -> LinearModel | None:
    """The linear model of a checkpoint, where its calibration gives it a weight.

    Raises:
        ModelError: it is missing or damaged.
    """
    if not calibration.linear:
        return None
    file = folder / LINEAR_FILE
    if not file.is_file() or file_hash(file) != calibration.linear_hash:
        raise ModelError(f"{file} is missing or damaged, and {CALIBRATION_FILE} beside it needs it")
    return LinearModel.load(file)


def calibrate(
    predictor: Predictor,
    examples: Sequence[Example],
    folder: Path,
    say: Callable[[str], None],
    train: Sequence[Example] = (),
    unseen: OutOfFold | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Fit on labelled examples, save `calibration.json` in a checkpoint, and say what it brought, or why 1 is kept.

    Args:
        train: rows for a linear model whose scores are added, where that helps; it becomes the predictor's.
        unseen: what models say of these examples that were not trained on them, where this one was.

    Returns:
        The calibration, and the report of `calibration_report`.
    """
    rows = predictor.log_probabilities(examples) if unseen is None else unseen.scores
    norm = predictor.generation.length_norm
    right = [row.labels.index(example.label or "") for row, example in zip(rows, examples, strict=True)]
    scores = [np.array(row.comparable(norm)) for row in rows]
    temperature, report = calibration_report(scores, right)
    if not predictor.calibrate.temperature:
        temperature, report = 1.0, report | {"temperature": 1.0, "fitted": None, "after": report["before"]}
    calibration, content = Calibration(temperature, norm), b""
    if train:
        model = LinearModel.fit([each.text for each in train], [each.label or "" for each in train])
        found = linear_scores(model, examples, rows) if unseen is None else unseen.linear
        others = [np.array(each or np.zeros(len(row.labels))) for each, row in zip(found, rows, strict=True)]
        weights, report["linear"] = mixture_report(scores, others, right, report["after"])
        if weights is not None:
            predictor.linear, content = model, model.content()
            digest = hashlib.sha256(content).hexdigest()
            calibration = Calibration(1 / weights[0], norm, linear=weights[1], linear_hash=digest)
    if rank() == 0:
        if content:
            write_bytes(folder / LINEAR_FILE, content)
        calibration.save(folder, report)
    if predictor.calibrate.temperature:
        say(_confidence(temperature, report))
    if train:
        say(_mixture(report["linear"]))
    return calibration, report


def _confidence(temperature: float, report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    figures = f"ECE {before['ece']:.3f}, NLL {before['nll']:.3f}, Brier {before['brier']:.3f}"
    if report["fitted"] is not None:
        figures = (
            f"ECE {before['ece']:.3f} -> {after['ece']:.3f}, NLL {before['nll']:.3f} -> {after['nll']:.3f}, "
            f"Brier {before['brier']:.3f} -> {after['brier']:.3f} (after: cross-fitted)"
        )
    kept = f" is kept, {report['refused']}" if report["refused"] is not None else ""
    return f"confidence: temperature {temperature:.2f}{kept}; {report['rows']} validation rows: {figures}"


def _mixture(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    if report["refused"] is not None:
        return f"linear model: not added, {report['refused']}"
    return (
        f"linear model: added with weight {report['weight']:.2f}; NLL {before['nll']:.3f} -> {after['nll']:.3f}, "
        f"Brier {before['brier']:.3f} -> {after['brier']:.3f} (after: cross-fitted)"
    )


def calibrate_labels(
    predictor: Predictor,
    examples: Sequence[Example],
    folder: Path,
    objective: str,
    say: Callable[[str], None],
    unseen: OutOfFold | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """The same for labels that are decided each by itself: scales of their log-odds, and thresholds for `objective`, as far as
    `predictor.calibrate` allows.

    Returns:
        The calibration, and the reports of `scales_report` (None when it was not asked for) and `threshold_report`.
    """
    rows = predictor.log_odds(examples) if unseen is None else unseen.odds
    names = sorted({label for row in rows for label in row})
    odds = np.array([[row.get(label, np.nan) for label in names] for row in rows])
    right = np.array([[label in (example.labels or ()) for label in names] for example in examples])
    scales, of_scales = None, None
    if predictor.calibrate.temperature:
        scales, of_scales = scales_report(odds, right)
        before, after, refused = (of_scales[name] for name in ("before", "after", "refused"))
        if refused is not None:
            figures = f"NLL {before['nll']:.3f}, ECE {before['ece']:.3f}"
            say(
                f"confidence: probabilities are not scaled, {refused}; {len(rows)} validation rows: {figures}"
            )
        else:
            say(
                f"confidence: probabilities are scaled ({of_scales['own']} labels by themselves); {len(rows)} validation rows: "
                f"NLL {before['nll']:.3f} -> {after['nll']:.3f}, ECE {before['ece']:.3f} -> {after['ece']:.3f} (after: cross-fitted)"
            )
    probabilities = sigmoid(odds) if scales is None else scales.apply(odds)
    threshold, own, of_thresholds = threshold_report(
        probabilities, right, objective, predictor.calibrate.thresholds
    )
    found = ", ".join(f"{way} {value:.3f}" for way, value in of_thresholds["cross_fitted"].items())
    say(f"thresholds: {of_thresholds['chosen']}; {objective} on rows they were not chosen on: {found}")
    calibration = Calibration(
        scales={}
        if scales is None
        else {
            name: (float(a), float(b))
            for name, a, b in zip(names, scales.slopes, scales.intercepts, strict=True)
        },
        threshold=threshold,
        thresholds={} if own is None else dict(zip(names, map(float, own), strict=True)),
    )
    if rank() == 0:
        calibration.save(folder, {"scales": of_scales, "thresholds": of_thresholds})
    return calibration, {"scales": of_scales, "thresholds": of_thresholds}


def calibration_figures(report: Mapping[str, Any], rows_are: str = SELECTION) -> dict[str, float]:
    """A report as flat numbers for a tracker.

    Args:
        rows_are: heads their names.
    """
    figures = {
        f"{rows_are}/calibration_{name}_{when}": float(report[when][name])
        for when in (("before", "after") if report["fitted"] is not None else ("before",))
        for name in ("nll", "brier", "ece")
    }
    return {**figures, f"{rows_are}/calibration_temperature": float(report["temperature"])}
