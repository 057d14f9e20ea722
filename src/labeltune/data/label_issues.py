"""Rows to look at for their label: what a quick model, trained on the other rows, would surely not have said."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from labeltune.data.loading import Rows
from labeltune.data.near_duplicates import excerpt, share_of
from labeltune.io.progress import row_progress

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from sklearn.multiclass import OneVsRestClassifier

#: Rows that are judged, and the characters read of each: the n-grams of 20,000 long rows take some 0.6 GB.
MAX_ROWS = 20_000
MAX_CHARACTERS = 1000
#: Texts that a label must have, to be learned from the other folds; with fewer the model's doubts are mostly its own faults.
MIN_TEXTS = 30
#: Probability that another label must have at least, and how many times the given label's that must be.
SURE = 0.7
CLEARLY = 3.0
FOLDS = 10
_LONGEST_NGRAM = 3
_FEATURES = 2**16
#: Inverse strength of the L2 penalty, as scikit-learn counts it, and the length of text vectors beside n-gram vectors of
#: length one. Chosen on the example data of this project, with labels flipped.
_C = 10.0
_VECTOR_LENGTH = 2.0

_Folds = list[tuple[NDArray[numpy.intp], NDArray[numpy.intp]]]
#: What a text is judged by.
NGRAMS = "character n-grams"
NGRAMS_AND_VECTORS = "character n-grams and the model's token embeddings"


@dataclass(frozen=True)
class LabelIssue:
    """A row whose label looks wrong.

    Attributes:
        where: `file:line`.
        given: the label that stands in the row.
        suggested: the most probable label among the row's candidates.
        given_probability: out-of-fold probability of the given label.
        suggested_probability: of the suggested one.
        text: beginning of the text.
    """

    where: str
    given: str
    suggested: str
    given_probability: float
    suggested_probability: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self),
            "given_probability": round(self.given_probability, 4),
            "suggested_probability": round(self.suggested_probability, 4),
        }


@dataclass(frozen=True)
class LabelIssues:
    """What the model makes of the labels.

    Attributes:
        issues: the most suspicious first.
        judged: rows that were judged.
        rare: labels with too few texts to be judged, with their rows.
        agreement: share of the judged rows whose label the model gives as well; the lower, the less its doubts mean.
        features: `NGRAMS` or `NGRAMS_AND_VECTORS`.
    """

    issues: tuple[LabelIssue, ...]
    judged: int
    rare: dict[str, int]
    agreement: float
    features: str = NGRAMS

    def to_dict(self, limit: int) -> dict[str, Any]:
        """JSON-ready, with at most `limit` issues."""
        return {
            "judged_rows": self.judged,
            "labels_too_rare": self.rare,
            "agreement": round(self.agreement, 4),
            "features": self.features,
            "suspects": len(self.issues),
            "listed": [issue.to_dict() for issue in self.issues[:limit]],
        }


def find_label_issues(
    files: Sequence[Rows], vectors: Callable[[list[str]], Any] | None = None, progress: bool = False
) -> LabelIssues:
    """Rows whose label looks wrong, by confident learning (Northcutt, Jiang and Chuang 2021, arXiv:1911.00068).

    Every row is judged by logistic regressions, one a label, on the character n-grams of the rows in the other folds, all
    files together; equal texts stand in one fold. Labels that are no candidate of a row have probability 0 there.
    cleanlab says how many labels are wrong and which; they are ranked by the probability of the given label. Of those only
    the rows are kept for which the model is sure of another label (`SURE`, `CLEARLY`): few rows make it doubt right ones.

    At most `MAX_ROWS` rows are judged, each by its first `MAX_CHARACTERS` characters.

    Args:
        vectors: texts -> unit vectors, shape [texts, dimensions]; they join the n-grams where that makes the model
            agree with more labels.
    """
    taken = share_of([len(rows.dataset) for rows in files], MAX_ROWS)
    texts, given, groups = list[str](), list[str](), list[int]()
    candidates, places = list[tuple[str, ...]](), list[tuple[int, int]]()
    for file, (rows, count) in enumerate(zip(files, taken, strict=True)):
        columns = rows.dataset.select_columns(["text", "label", "candidates"]).select(range(count))
        for number, row in enumerate(columns):
            texts.append(row["text"][:MAX_CHARACTERS])
            given.append(row["label"])
            candidates.append(tuple(row["candidates"]))
            groups.append(rows.audit.text_hashes[number])
            places.append((file, number))
    counts = Counter(label for label, _ in set(zip(given, groups, strict=True)))
    labels = sorted(label for label, count in counts.items() if count >= MIN_TEXTS)
    rare = {label: given.count(label) for label in sorted(counts) if counts[label] < MIN_TEXTS}
    judged = [i for i, label in enumerate(given) if counts[label] >= MIN_TEXTS]
    if len(labels) < 2:
        return LabelIssues((), 0, rare, 0.0)
    number_of = {label: number for number, label in enumerate(labels)}
    targets = numpy.array([number_of[given[i]] for i in judged])
    kept = [texts[i] for i in judged]
    folds = _folds(targets, numpy.array([groups[i] for i in judged]))
    ways = {NGRAMS: _ngram_counts(kept)}
    if vectors is not None:
        ways[NGRAMS_AND_VECTORS] = _beside(ways[NGRAMS], vectors(kept))
    outcomes: list[tuple[float, str, NDArray[numpy.float64]]] = []
    with row_progress(len(judged) * len(ways), "labels", progress) as advance:
        for name, features in ways.items():
            probabilities = _out_of_fold(features, targets, folds, len(labels), advance)
            _keep_candidates(probabilities, [candidates[i] for i in judged], number_of)
            outcomes.append((float((probabilities.argmax(axis=1) == targets).mean()), name, probabilities))
    agreement, name, probabilities = max(outcomes, key=lambda outcome: outcome[0])
    found = []
    for at in _ranked(targets, probabilities):
        most, own = probabilities[at].max(), probabilities[at, targets[at]]
        if most >= max(SURE, CLEARLY * own):
            file, number = places[judged[at]]
            row = files[file].dataset[number]
            suggested = labels[int(probabilities[at].argmax())]
            shown = excerpt(row["text"])
            found.append(LabelIssue(row["source"], row["label"], suggested, float(own), float(most), shown))
    return LabelIssues(tuple(found), len(judged), rare, agreement, name)


def _ngram_counts(texts: list[str]) -> Any:
    """Hashed character n-grams weighted by how rare they are; sparse, shape [texts, n-grams that occur]."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    vectorizer = HashingVectorizer(
        analyzer="char",
        ngram_range=(1, _LONGEST_NGRAM),
        n_features=_FEATURES,
        alternate_sign=False,
        norm=None,
    )
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(vectorizer.transform(texts))
    return weighted[:, numpy.flatnonzero(weighted.getnnz(axis=0))]


def _beside(counts: csr_matrix, vectors: NDArray[numpy.float32]) -> csr_matrix:
    from scipy import sparse

    return sparse.hstack([counts, sparse.csr_matrix(_VECTOR_LENGTH * vectors)]).tocsr()


def _folds(targets: NDArray[numpy.intp], groups: NDArray[numpy.intp]) -> _Folds:
    """(rows to learn from, rows to judge), all labels alike in each, a group on one side."""
    from sklearn.model_selection import StratifiedGroupKFold

    # No more folds than the texts of the most frequent label, so that it is in each of them.
    largest = max(len(numpy.unique(groups[targets == label])) for label in numpy.unique(targets))
    folds = StratifiedGroupKFold(n_splits=min(FOLDS, largest), shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # That a rare label is missing from a fold: nothing is judged by it there.
        warnings.simplefilter("ignore")
        return list(folds.split(numpy.zeros(len(targets)), targets, groups))


def _out_of_fold(
    features: csr_matrix,
    targets: NDArray[numpy.intp],
    folds: _Folds,
    labels: int,
    advance: Callable[[int], None],
) -> Any:
    """Probabilities from models that have not seen the text; float64, shape [texts, labels]."""
    probabilities = numpy.zeros((features.shape[0], labels))
    for train, held_out in folds:
        with warnings.catch_warnings():
            # Not quite converged is good enough for a second opinion.
            warnings.simplefilter("ignore")
            model = one_against_the_rest().fit(features[train], targets[train])
            probabilities[numpy.ix_(held_out, model.classes_)] = model.predict_proba(features[held_out])
        advance(len(held_out))
    return probabilities


def one_against_the_rest() -> OneVsRestClassifier:
    """A logistic regression a label, untrained."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    # The dual solver takes a second where the multinomial one takes a minute.
    return OneVsRestClassifier(LogisticRegression(C=_C, solver="liblinear", dual=True, random_state=0))


def _keep_candidates(
    probabilities: NDArray[numpy.float64], candidates: list[tuple[str, ...]], number_of: dict[str, int]
) -> None:
    """Share each row's probability out among its candidates, in place."""
    masks: dict[tuple[str, ...], Any] = {}
    for row, names in enumerate(candidates):
        if not names:
            continue
        if names not in masks:
            masks[names] = numpy.isin(
                numpy.arange(len(number_of)), [number_of[n] for n in names if n in number_of]
            )
        # A little for each, so that the shares exist where the model gave all to labels outside.
        kept = (probabilities[row] + 1e-9) * masks[names]
        probabilities[row] = kept / kept.sum()


def _ranked(targets: NDArray[numpy.intp], probabilities: NDArray[numpy.float64]) -> list[int]:
    """Numbers of the rows whose label cleanlab finds wrong, the most suspicious first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cleanlab.filter import find_label_issues

        # One process: more of them are started anew and would import everything again.
        ranked = find_label_issues(
            targets, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
        )
    return [int(row) for row in ranked]
