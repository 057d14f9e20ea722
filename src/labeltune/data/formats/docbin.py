"""spaCy's DocBin: texts with entities, and categories with scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from labeltune.data.formats.base import LeftOut, Reader, Reading, answer_of, each, entity
from labeltune.data.records import Record
from labeltune.errors import MissingExtraError, first_line

#: Score from which on a category applies.
_APPLIES = 0.5


def docbin_records(name: str, file: BinaryIO) -> Iterator[Record]:
    """A record a document: `text`, `ents` and `cats`.

    Raises:
        MissingExtraError: spaCy is not installed.
    """
    if importlib.util.find_spec("spacy") is None:
        raise MissingExtraError(f"reading {name}", "spacy")
    import spacy
    from spacy.tokens import DocBin

    try:
        found = DocBin().from_bytes(file.read())
        vocabulary = spacy.blank("xx").vocab
        for number, doc in enumerate(found.get_docs(vocabulary), start=1):
            ents = [(ent.start_char, ent.end_char, ent.label_) for ent in doc.ents]
            others = sum(len(group) for group in doc.spans.values())
            yield Record(
                f"{name}:row {number}",
                {"text": doc.text, "ents": ents, "cats": dict(doc.cats), "spans": others},
            )
    except Exception as error:  # whatever a damaged file makes msgpack, zlib and spaCy say
        yield Record(
            f"{name}:1", None, "unparsable_line", f"not a readable DocBin: {first_line(error)}", whole=True
        )


def _text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return {"text": str(row["text"])}


def _answer(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    text = str(found["text"])
    cats = {label: score for label, score in row["cats"].items() if score >= _APPLIES}
    if row["spans"]:
        left_out["spans of groups"] += row["spans"]
    if not reading.answers and not row["ents"] and not row["cats"]:
        return None
    if reading.task == "ner" or (reading.task is None and (row["ents"] or not row["cats"])):
        if row["cats"]:
            left_out["categories of texts"] += 1
        return {"entities": [entity(text, *each) for each in row["ents"]]}
    if row["ents"]:
        left_out["labelled spans"] += len(row["ents"])
    if not cats and reading.task != "multilabel":
        left_out["texts without a label"] += 1
        return None
    best = sorted(cats, key=lambda label: -cats[label])
    return answer_of(best, reading.task, "categories")


READERS = (Reader("spacy", "spaCy DocBin", lambda rows: False, each(_text, _answer)),)
