"""A linear model of labelled texts: TF-IDF of character n-grams, and a logistic regression a label. What everything else is compared with, and,
with `calibrate.linear`, what is added to a fine-tuned model's scores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from labeltune.data.formats.base import is_cjk
from labeltune.data.label_issues import one_against_the_rest
from labeltune.errors import ModelError, first_line

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

#: Characters of a text that are read.
MAX_CHARACTERS = 2000
#: Longest character n-grams: of texts that are mostly Chinese or Japanese, and of others. On titles, Banking77 and Fudan longer ones were no
#: better.
_CJK_NGRAM, _NGRAM = 2, 4
_MOST_NGRAMS = 200_000
#: The entry of a file's metadata that holds labels and n-grams.
_TOLD = "labeltune"
#: Texts that are looked at to tell which.
_LOOKED_AT = 100


def vectorizer_for(texts: Sequence[str]) -> TfidfVectorizer:
    """TF-IDF of character n-grams as they suit these texts, not fitted."""
    characters = "".join(text[:MAX_CHARACTERS] for text in texts[:_LOOKED_AT])
    return _vectorizer(_CJK_NGRAM if 2 * sum(map(is_cjk, characters)) > len(characters) else _NGRAM)


def _vectorizer(longest: int, vocabulary: Sequence[str] | None = None) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="char",
        ngram_range=(1, longest),
        sublinear_tf=True,
        max_features=_MOST_NGRAMS,
        vocabulary=vocabulary,
    )


class LinearModel:
    """Log-odds of labels.

    Args:
        labels: in the order of the rows of `coefficients`.
        coefficients: float32, shape [labels, n-grams]; they are kept in 16 bits.
        intercepts: float32, shape [labels].
    """

    def __init__(
        self,
        labels: Sequence[str],
        vectorizer: TfidfVectorizer,
        coefficients: NDArray[numpy.float32],
        intercepts: NDArray[numpy.float32],
    ) -> None:
        self.labels = tuple(labels)
        self._vectorizer, self._intercepts = vectorizer, intercepts
        # As they are saved, so that a model that is loaded gives the same scores.
        self._coefficients = coefficients.astype(numpy.float16).astype(numpy.float32)
        vectorizer.idf_ = vectorizer.idf_.astype(numpy.float32)
        self._number = {label: at for at, label in enumerate(self.labels)}

    @classmethod
    def fit(cls, texts: Sequence[str], right: Sequence[str]) -> LinearModel:
        """Learn from texts and their labels; there is at least one."""
        labels = sorted(set(right))
        vectorizer = vectorizer_for(texts)
        known = vectorizer.fit_transform([text[:MAX_CHARACTERS] or " " for text in texts])
        if len(labels) == 1:
            return cls(labels, vectorizer, numpy.zeros((1, known.shape[1]), "f4"), numpy.zeros(1, "f4"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not quite converged is good enough
            fitted = one_against_the_rest().fit(known, numpy.searchsorted(labels, right))
        coefficients = numpy.concatenate([each.coef_ for each in fitted.estimators_])
        intercepts = numpy.concatenate([each.intercept_ for each in fitted.estimators_])
        if len(labels) == 2:  # one regression tells them apart
            coefficients, intercepts = (
                numpy.vstack([-coefficients, coefficients]),
                numpy.concatenate([-intercepts, intercepts]),
            )
        return cls(labels, vectorizer, coefficients.astype("f4"), intercepts.astype("f4"))

    def scores(self, texts: Sequence[str]) -> NDArray[numpy.float64]:
        """The log-odds of every label, shape [texts, labels]."""
        asked = self._vectorizer.transform([text[:MAX_CHARACTERS] for text in texts])
        return numpy.asarray(asked @ self._coefficients.T, dtype=numpy.float64) + self._intercepts

    def among(self, scores: NDArray[numpy.float64], candidates: Sequence[str]) -> list[float] | None:
        """The log-odds of a row's candidates; None where it has one that was not learned."""
        if any(label not in self._number for label in candidates):
            return None
        return [float(scores[self._number[label]]) for label in candidates]

    def content(self) -> bytes:
        """A safetensors file of it; the labels and n-grams stand in its metadata."""
        from safetensors.numpy import save

        ngrams = sorted(self._vectorizer.vocabulary_, key=self._vectorizer.vocabulary_.__getitem__)
        told: dict[str, Any] = {
            "labels": self.labels,
            "ngrams": ngrams,
            "longest": self._vectorizer.ngram_range[1],
        }
        tensors = {
            "coefficients": self._coefficients.astype(numpy.float16),
            "intercepts": self._intercepts,
            "idf": self._vectorizer.idf_.astype(numpy.float32),
        }
        # One entry: several come in any order.
        metadata = {_TOLD: json.dumps(told, ensure_ascii=False)}
        content: bytes = save(tensors, metadata)
        return content

    @classmethod
    def load(cls, file: Path) -> LinearModel:
        """Read a file of `content`.

        Raises:
            ModelError: it is not there, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "numpy") as opened:
                told = json.loads(opened.metadata()[_TOLD])
                tensors = {name: opened.get_tensor(name) for name in ("coefficients", "intercepts", "idf")}
            vectorizer = _vectorizer(int(told["longest"]), told["ngrams"])
            vectorizer.idf_ = tensors["idf"]
            return cls(
                told["labels"], vectorizer, tensors["coefficients"].astype("f4"), tensors["intercepts"]
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is missing or damaged: {first_line(error)}") from error
