"""The three values that travel through the package: what comes in, what is in it, what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entity:
    """A named entity: `text` stands at `example.text[start:end]` (characters, end exclusive).

    `start` and `end` are None for a predicted entity whose text does not occur in the document. `score` is the mean
    log-probability of the tokens with which a model chose it (of marks in the text: the sum over its marks), None where there is none.
    """

    text: str
    label: str
    start: int | None = None
    end: int | None = None
    score: float | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score={self.score:.4f}"
        return f"Entity({self.text!r}, {self.label!r}, {self.start}, {self.end}{score})"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a prediction row; the names are those of the input schema."""
        row: dict[str, Any] = {
            "start_idx": self.start,
            "end_idx": self.end,
            "entity_text": self.text,
            "entity_label": self.label,
        }
        return row if self.score is None else {**row, "score": round(self.score, 6)}


@dataclass(frozen=True)
class Example:
    """One row of data.

    Attributes:
        id: the row's own `id`, else its number in the file as text.
        text: the document, never changed.
        candidates: the labels this row chooses from; empty means the task's label set.
        label: the right label (classification), None when unknown.
        entities: the right entities in order of appearance (NER), None when unknown.
        labels: the right labels (multilabel), None when unknown.
        source: `file:line`, for messages.
        shares: a soft label: labels with their shares, which are positive and sum to 1, the largest first; `label` is the
            first. Empty when `label` is certain.
    """

    id: str
    text: str
    candidates: tuple[str, ...] = ()
    label: str | None = None
    entities: tuple[Entity, ...] | None = None
    source: str = ""
    shares: tuple[tuple[str, float], ...] = ()
    labels: tuple[str, ...] | None = None

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return self.source or f"row {self.id}"

    @property
    def right_names(self) -> list[str]:
        """Its right label, all of its right labels, or the types of its entities."""
        if self.labels is not None:
            return list(self.labels)
        return [self.label or ""] if self.entities is None else [entity.label for entity in self.entities]

    def to_row(self) -> dict[str, Any]:
        """Flat form for Arrow files."""
        entities = self.entities
        return {
            "id": self.id,
            "text": self.text,
            "candidates": list(self.candidates),
            "label": self.label,
            "entities": None
            if entities is None
            else [{"text": e.text, "label": e.label, "start": e.start, "end": e.end} for e in entities],
            "source": self.source,
            "shares": [{"label": label, "share": share} for label, share in self.shares],
            "labels": None if self.labels is None else list(self.labels),
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Example:
        """Inverse of `to_row`."""
        entities = row["entities"]
        return Example(
            id=row["id"],
            text=row["text"],
            candidates=tuple(row["candidates"] or ()),
            label=row["label"],
            entities=None
            if entities is None
            else tuple(Entity(e["text"], e["label"], e["start"], e["end"]) for e in entities),
            source=row["source"],
            shares=tuple((each["label"], each["share"]) for each in row["shares"]),
            labels=None if row["labels"] is None else tuple(row["labels"]),
        )


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        id: the id of the row it answers.
        answer: what the model wrote, without the end of turn.
        label: the predicted label, None when the answer is not one of the candidates (classification).
        entities: the predicted entities (NER), None for classification.
        labels: the labels that apply (multilabel), None for the other tasks.
        parsed: False when the answer, or a part of it, did not have the form the prompt asks for.
        ranking: all candidates with their probabilities, the most probable first (scored labels); those of `multilabel` are of each label
            by itself, and do not sum to 1.
        truncated: the answer was longer than its limit, and entities may be missing.
        certainty: probability of the least sure part of the answer (NER), None where it is not known; that of the best label is
            `confidence`.
    """

    id: str
    answer: str
    label: str | None = None
    entities: tuple[Entity, ...] | None = None
    parsed: bool = True
    ranking: tuple[tuple[str, float], ...] = ()
    truncated: bool = False
    labels: tuple[str, ...] | None = None
    certainty: float | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        """For people: four digits, five candidates; what `ranking` holds is exact."""
        shown = [f"id={self.id!r}"]
        if self.entities is not None:
            shown.append(f"entities={self.entities!r}")
        elif self.labels is not None:
            shown += [f"labels={list(self.labels)!r}", *self._shown_ranking()]
        else:
            confidence = [f"confidence={self.ranking[0][1]:.4f}"] if self.ranking else []
            shown += [f"label={self.label!r}", *confidence, *self._shown_ranking()]
        if self.labels is None and (self.label is None or self.answer != self.label):
            shown.append(f"answer={self.answer!r}")
        if not self.parsed:
            shown.append("parsed=False")
        return f"Prediction({', '.join(shown)}{', truncated=True' if self.truncated else ''})"

    def _shown_ranking(self) -> list[str]:
        best = [f"{label!r}: {probability:.4f}" for label, probability in self.ranking[:5]]
        more = f", and {len(self.ranking) - 5} more" if len(self.ranking) > 5 else ""
        return [f"ranking=<{', '.join(best)}{more}>"] if best else []

    def labels_from(self, threshold: float | None) -> tuple[str, ...]:
        """The labels from this probability on, the surest first; the predicted ones when None."""
        if threshold is None:
            return self.labels or ()
        return tuple(label for label, p in self.ranking if p >= threshold)

    @property
    def confidence(self) -> float | None:
        """Probability of the most probable candidate, None without scores or with several labels a row."""
        return self.ranking[0][1] if self.ranking and self.labels is None else None

    def to_dict(
        self,
        top_k: int | None = None,
        min_confidence: float | None = None,
        threshold: float | None = None,
    ) -> dict[str, Any]:
        """A JSON-ready row: `id`; `label` with `confidence` and `ranking`, `labels` with `ranking`, or `entities`; then `answer`, `parsed`.

        Args:
            top_k: candidates of the ranking to show; all when None.
            min_confidence: probability of the best candidate below which `label` is None; `ranking` and `answer` are kept.
            threshold: probability from which on a label is among `labels`; the run's own when None.
        """
        row: dict[str, Any] = {"id": self.id}
        ranking = [{"label": label, "probability": round(p, 6)} for label, p in self.ranking[:top_k]]
        if self.entities is not None:
            row["entities"] = [entity.to_dict() for entity in self.entities]
        elif self.labels is not None:
            given = self.labels_from(threshold)
            row |= {"labels": list(given), "ranking": ranking, "answer": "\n".join(given)}
        else:
            unsure = min_confidence is not None and self.ranking and self.ranking[0][1] < min_confidence
            row["label"] = None if unsure else self.label
            if self.ranking:
                row |= {"confidence": round(self.ranking[0][1], 6), "ranking": ranking}
        row.setdefault("answer", self.answer)
        row["parsed"] = self.parsed
        if self.truncated:
            row["truncated"] = True
        return row
