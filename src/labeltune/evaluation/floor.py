"""The floor: what a linear model makes of the same training rows in seconds, to be beaten by any model that is fine-tuned on them."""

from __future__ import annotations

import importlib.util
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from labeltune.data.formats.base import is_cjk
from labeltune.data.label_issues import one_against_the_rest
from labeltune.evaluation.compare import compare_predictions
from labeltune.evaluation.linear import MAX_CHARACTERS, LinearModel, vectorizer_for
from labeltune.evaluation.summary import SHOWN_FIRST
from labeltune.io.progress import note
from labeltune.types import Entity, Example, Prediction

#: Training rows that it learns from at most, spread over all, so that it stays a matter of seconds; and of entities, which take longer.
MAX_ROWS, MAX_CRF_ROWS = 10_000, 3000
#: Training rows times labels: more would take minutes.
MAX_WORK = 1_000_000
#: Probabilities from which one of several labels may apply, the folds that one is chosen by, and the rows in them.
_THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
_FOLDS, _JUDGED = 5, 2000
#: Penalties and passes of the CRF (L-BFGS), as python-crfsuite calls them.
_CRF = {"c1": 0.1, "c2": 0.01, "max_iterations": 60, "feature.possible_transitions": True}
_WORDS = re.compile(r"\w+|\S")
_REPEATED = re.compile(r"(.)\1+")
_OUTSIDE = "O"


@dataclass(frozen=True)
class Floor:
    """A linear model's answers to some rows.

    Attributes:
        kind: `linear` (TF-IDF of character n-grams and logistic regression) or `crf` (a linear-chain conditional random field on words
            and Chinese characters).
        rows: training rows that it learned from.
    """

    kind: str
    rows: int
    predictions: tuple[Prediction, ...]


def floor_of(train: Sequence[Example], examples: Sequence[Example]) -> Floor | None:
    """Train on labelled rows, and answer others of the same task; None where there is nothing to learn from, where labels are so many that it
    would take minutes, which is said, or, for entities, where python-crfsuite is not installed."""
    if not train or not examples:
        return None
    if examples[0].entities is not None:
        known = [train[row] for row in evenly(len(train), MAX_CRF_ROWS)]
        return _crf(known, examples) if importlib.util.find_spec("pycrfsuite") is not None else None
    known = [train[row] for row in evenly(len(train), MAX_ROWS)]
    labels = {name for each in known for name in each.right_names}
    if len(labels) * len(known) > MAX_WORK:
        note(f"no linear model beside it: with {len(labels):,} labels it would take minutes")
        return None
    answers = _label_sets if examples[0].labels is not None else _labels
    return Floor("linear", len(known), tuple(answers(known, examples)))


def evenly(rows: int, most: int) -> list[int]:
    """Numbers of at most `most` of the rows, as far from each other."""
    return list(map(int, numpy.linspace(0, rows - 1, min(rows, most))))


def floor_figures(
    floor: Floor, examples: Sequence[Example], predictions: Sequence[Prediction], task: str
) -> dict[str, Any]:
    """How far a model is above the floor on the same rows, JSON-ready: the floor's `kind`, the training `rows`, the `figure` that is shown
    first, and of it `first` (the floor's), `second` (the model's), `difference` with its paired interval, and `p_value`."""
    figure = SHOWN_FIRST[task][0]
    found = compare_predictions(examples, floor.predictions, predictions)["differences"][figure]
    return {"kind": floor.kind, "rows": floor.rows, "figure": figure, **found}


def _labels(train: Sequence[Example], examples: Sequence[Example]) -> Iterator[Prediction]:
    """The most probable of each row's candidates; of candidates that training does not have, the first."""
    model = LinearModel.fit([each.text for each in train], [each.label or "" for each in train])
    scores = model.scores([each.text for each in examples])
    for example, row in zip(examples, scores, strict=True):
        known = dict(zip(model.labels, row, strict=True))
        label = max(example.candidates or model.labels, key=lambda name: known.get(name, -numpy.inf))
        yield Prediction(example.id, label, label)


def _label_sets(train: Sequence[Example], examples: Sequence[Example]) -> Iterator[Prediction]:
    """The labels from a probability on that cross-validation of the training rows chooses for its micro-F1."""
    names = sorted({label for each in train for label in each.labels or ()})
    wanted = numpy.array([[name in (each.labels or ()) for name in names] for each in train], dtype=int)
    told = [at for at in range(len(names)) if not wanted[:, at].all()]
    applies = numpy.ones((len(examples), len(names)), dtype=bool)
    if told:
        vectorizer = vectorizer_for([each.text for each in train])
        known = vectorizer.fit_transform([each.text[:MAX_CHARACTERS] or " " for each in train])
        asked = vectorizer.transform([each.text[:MAX_CHARACTERS] for each in examples])
        model = one_against_the_rest()
        least = _threshold(model, known[:_JUDGED], wanted[:_JUDGED, told])
        applies[:, told] = model.fit(known, wanted[:, told]).predict_proba(asked)[:, -len(told) :] >= least
    for example, row in zip(examples, applies, strict=True):
        labels = tuple(name for name, given in zip(names, row, strict=True) if given)
        yield Prediction(example.id, ", ".join(labels), labels=labels)


def _threshold(model: Any, known: Any, wanted: Any) -> float:
    from sklearn.metrics import f1_score
    from sklearn.model_selection import KFold

    folds = min(_FOLDS, len(wanted))
    if folds < 2:
        return _THRESHOLDS[-1]
    chances = numpy.zeros(wanted.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label that no row of a fold has
        for learned, judged in KFold(folds, shuffle=True, random_state=0).split(wanted):
            found = model.fit(known[learned], wanted[learned]).predict_proba(known[judged])
            chances[judged] = found[:, -wanted.shape[1] :]  # of a single label, its absence stands before it
    return max(
        _THRESHOLDS, key=lambda least: f1_score(wanted, chances >= least, average="micro", zero_division=0)
    )


def _crf(train: Sequence[Example], examples: Sequence[Example]) -> Floor:
    import pycrfsuite

    trainer = pycrfsuite.Trainer(verbose=False, params=_CRF)
    for each in train:
        words = _words(each.text)
        if words:
            trainer.append(_features(words), _tags(words, each.entities or ()))
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "crf")
        trainer.train(file)
        tagger = pycrfsuite.Tagger()
        tagger.open(file)
        found = tuple(
            Prediction(each.id, "", entities=tuple(_entities(each.text, tagger))) for each in examples
        )
        tagger.close()
    return Floor("crf", len(train), found)


def _words(text: str) -> list[tuple[str, int]]:
    """Words, single Chinese or Japanese characters and signs, each with its place.

    >>> _words("Mara 2011年 left.")
    [('Mara', 0), ('2011', 5), ('年', 9), ('left', 11), ('.', 15)]
    """
    found = []
    for match in _WORDS.finditer(text):
        at = match.start()
        for cjk, group in groupby(match[0], key=is_cjk):
            characters = list(group)
            for part in characters if cjk else ["".join(characters)]:
                found.append((part, at))
                at += len(part)
    return found


def _features(words: Sequence[tuple[str, int]]) -> list[list[str]]:
    """Of each word: itself, two words on either side, pairs of neighbours, its shape, beginning and end."""
    lower = ["<<", "<", *(word.lower() for word, _ in words), ">", ">>"]
    found = []
    for i, (word, _) in enumerate(words, start=2):
        before2, before, own, after, after2 = lower[i - 2 : i + 3]
        shape = re.sub(r"[^\W\d_A-Z]", "x", re.sub("[A-Z]", "X", re.sub(r"\d", "0", word)))
        shape = _REPEATED.sub(r"\1", shape)
        found.append(
            [
                "bias",
                f"w={own}",
                f"-1={before}",
                f"+1={after}",
                f"-2={before2}",
                f"+2={after2}",
                f"-1w={before}|{own}",
                f"w+1={own}|{after}",
                f"-2-1={before2}|{before}",
                f"+1+2={after}|{after2}",
                f"-1w+1={before}|{own}|{after}",
                f"shape={shape}",
                f"begins={own[:3]}",
                f"ends={own[-3:]}",
            ]
        )
    return found


def _tags(words: Sequence[tuple[str, int]], entities: Sequence[Entity]) -> list[str]:
    """B-, I- and O; of entities that overlap the outer one."""
    tags = [_OUTSIDE] * len(words)
    end = 0
    placed = [each for each in entities if each.start is not None and each.end is not None]
    for each in sorted(placed, key=lambda e: (e.start or 0, -(e.end or 0))):
        if (each.start or 0) < end:
            continue
        end = each.end or 0
        inside = [i for i, (word, at) in enumerate(words) if at < end and at + len(word) > (each.start or 0)]
        for number, i in enumerate(inside):
            tags[i] = f"{'I' if number else 'B'}-{each.label}"
    return tags


def _entities(text: str, tagger: Any) -> Iterator[Entity]:
    words = _words(text)
    tags = [*(tagger.tag(_features(words)) if words else ()), _OUTSIDE]
    start, label = 0, ""
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if label and (prefix != "I" or kind != label):
            end = words[i - 1][1] + len(words[i - 1][0])
            yield Entity(text[start:end], label, start, end)
            label = ""
        if prefix != _OUTSIDE and not label:
            start, label = words[i][1], kind
