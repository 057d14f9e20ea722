"""Words with tags: CoNLL files in BIO, BIOES and BMES, Hugging Face's `tokens` with `ner_tags`, GLiNER's word positions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from labeltune.data.formats.base import (
    LeftOut,
    Reader,
    Reading,
    Unreadable,
    each,
    entity,
    every,
    id_of,
    integer,
    joined,
)
from labeltune.data.records import Record

#: A word's tag: outside, or its place in an entity (begin, inside, middle, end, last, single, unit) and the type.
TAG = re.compile(r"O|([BIMESLU])[-_](.+)", re.DOTALL)
_BEGINS, _GOES_ON, _ENDS = frozenset("BSU"), frozenset("IMEL"), frozenset("SUEL")
#: A comment with the sentence as it was before it was cut into words: as it is, or as a JSON string.
_TEXT = re.compile(r"#\s*text(_json)? = (.*)", re.DOTALL)
_TAG_COLUMNS = ("ner_tags", "tags", "labels", "ner")


def spans_of_tags(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Entities by their words, (first, last exclusive, type); in IOB1 an entity may begin with I.

    >>> spans_of_tags(["B-PER", "E-PER", "O", "I-LOC", "S-LOC"])
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC')]

    Raises:
        Unreadable: a tag is none.
    """
    found: list[tuple[int, int, str]] = []
    begun, kind = -1, ""
    for at, tag in enumerate(tags):
        match = TAG.fullmatch(tag)
        if match is None:
            raise Unreadable("wrong_type", f"{tag!r} (word {at + 1}) is no tag such as O, B-PER or I-PER")
        place, name = match[1], match[2]
        if begun >= 0 and (place is None or place in _BEGINS or name != kind):
            found.append((begun, at, kind))
            begun = -1
        if place is None:
            continue
        if begun < 0:
            begun, kind = at, name
        if place in _ENDS:
            found.append((begun, at + 1, kind))
            begun = -1
    if begun >= 0:
        found.append((begun, len(tags), kind))
    return found


def _entities(words: Sequence[str], spans: Iterable[tuple[int, int, str]], text: str) -> dict[str, Any]:
    """Entities by their words, in the text that was cut into them or put together from them."""
    whole, places = joined(words)
    if whole != text:
        places = _aligned(words, text)
    return {
        "entities": [entity(text, places[first][0], places[last - 1][1], kind) for first, last, kind in spans]
    }


def _aligned(words: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Where words stand in their text, one behind the other.

    Raises:
        Unreadable: one does not.
    """
    places = []
    at = 0
    for word in words:
        found = text.find(word, at)
        if found < 0 or text[at:found].strip():
            raise Unreadable(
                "span_mismatch",
                f"the word {word!r} is not what comes next in its text: {text[at : at + 20]!r}",
            )
        at = found + len(word)
        places.append((found, at))
    return places


def looks_tagged(text: str) -> bool:
    """Whether the lines of a text are words with tags."""
    lines = [line for line in text.splitlines()[:200] if line.strip() and not _aside(line)]
    last = [cells[-1] if len(cells := _cells(line)) > 1 else "" for line in lines]
    return len(last) > 1 and sum(TAG.fullmatch(tag) is not None for tag in last) >= 0.6 * len(last)


def _aside(line: str) -> bool:
    """A line that is no word: the beginning of a document, or a comment, behind which no tag stands."""
    comment = line.startswith("#") and not TAG.fullmatch(_cells(line)[-1])
    return line.startswith("-DOCSTART-") or comment or bool(_TEXT.match(line))


def _cells(line: str) -> list[str]:
    """The word, whatever stands between, and the tag; a type may have blanks where tabs separate, or behind Label Studio's columns."""
    line = line.rstrip("\r\n")
    if " -X- _ " in line:
        word, tag = line.split(" -X- _ ", 1)
        return [word, "-X-", "_", tag]
    cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
    if len(cells) == 1 and TAG.fullmatch(cells[0]) and line[:1].isspace():
        return [" ", cells[0]]  # the word is a blank
    return cells


def tagged_records(name: str, lines: Iterable[tuple[int, str | Record]]) -> Iterator[Record]:
    """Sentences of decoded lines -> records with `words`, `tags` and `text`; blank lines are between sentences."""
    words: list[str] = []
    tags: list[str] = []
    text: str | None = None
    first, fault = 0, ""

    def sentence() -> Iterator[Record]:
        nonlocal words, tags, text, fault
        if fault:
            yield Record(f"{name}:{first}", None, "unparsable_line", fault)
        elif words:
            yield Record(f"{name}:{first}", {"words": words, "ner_tags": tags, "text": text})
        words, tags, text, fault = [], [], None, ""

    for number, line in lines:
        if isinstance(line, Record):
            yield from sentence()
            yield line
            continue
        if not line.strip() or (line.startswith("-DOCSTART-") and text is None):
            yield from sentence()
            continue
        if not (words or fault or text):
            first = number
        if (told := _TEXT.match(line.rstrip("\r\n"))) and not words:
            text, fault = _told(told, number)
            continue
        if _aside(line) and not (text is not None and line.startswith("-DOCSTART-")):
            continue
        cells = _cells(line)
        if len(cells) < 2:
            fault = fault or f"line {number} has a word and no tag: {line.strip()[:50]!r}"
            continue
        words.append(cells[0])
        tags.append(cells[-1])
    yield from sentence()


def _told(comment: re.Match[str], number: int) -> tuple[str | None, str]:
    """(the text that a comment tells, why it cannot be read)."""
    if comment[1] is None:
        return comment[2], ""
    try:
        return str(json.loads(comment[2])), ""
    except ValueError:
        return None, f"line {number}: not valid JSON behind text_json"


def _tagged_text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return {"text": joined(row["words"])[0] if row["text"] is None else row["text"]}


def _tagged(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any]:
    return _entities(row["words"], spans_of_tags(row["ner_tags"]), found["text"])


def _tags_of(row: Mapping[str, Any]) -> str | None:
    """The column with a tag a word."""
    words = row.get("tokens", row.get("words"))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    for name in _TAG_COLUMNS:
        tags = row.get(name)
        if isinstance(tags, list) and len(tags) == len(words) and all(isinstance(t, str | int) for t in tags):
            return name
    return None


def _is_tokens(row: Mapping[str, Any]) -> bool:
    name = _tags_of(row)
    return name is not None and all(isinstance(t, int) or TAG.fullmatch(t) for t in row[name])


def _are_tokens(rows: Sequence[Mapping[str, Any]]) -> bool:
    return every(rows, _is_tokens) and any(row.get("tokens", row.get("words")) for row in rows)


def _words_of(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The words, under one of these names.

    Raises:
        Unreadable: they are no strings.
    """
    name = next((name for name in names if name in row), names[0])
    words = row.get(name)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Unreadable("wrong_type", f"{name} must be a list of strings")
    return words


def _tokens_text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    own, words = row.get("text"), _words_of(row, ("tokens", "words"))
    return id_of(row) | {"text": own if isinstance(own, str) and own.strip() else joined(words)[0]}


def _tokens(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any]:
    words = _words_of(row, ("tokens", "words"))
    name = _tags_of(row)
    if name is None:
        there = next((name for name in _TAG_COLUMNS if isinstance(row.get(name), list)), None)
        if there is None:
            names = ", ".join(_TAG_COLUMNS)
            raise Unreadable(
                "missing_field", f"the row has tokens and none of {names}; every token needs a tag"
            )
        raise Unreadable(
            "wrong_type",
            f"the row has {len(words)} tokens and {len(row[there])} {there}; every token needs a tag",
        )
    tags = row[name]
    if any(isinstance(tag, int) for tag in tags):
        raise Unreadable(
            "wrong_type",
            f"{name} holds numbers, and the file does not say what they stand for; write names such as B-PER "
            "(dataset.features[...].feature.int2str), or parquet by Dataset.to_parquet, which keeps them",
        )
    return _entities(words, spans_of_tags(tags), found["text"])


def _is_words(row: Mapping[str, Any]) -> bool:
    words, spans = row.get("tokenized_text"), row.get("ner")
    return isinstance(words, list) and isinstance(spans, list)


def _positions_text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return {"text": joined(_words_of(row, ("tokenized_text",)))[0]}


def _positions(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any]:
    words, spans = _words_of(row, ("tokenized_text",)), row.get("ner")
    if not isinstance(spans, list) or not all(isinstance(one, list) and len(one) == 3 for one in spans):
        raise Unreadable("wrong_type", "ner must be a list of [first word, last word, type]")
    placed = []
    for number, (first, last, kind) in enumerate(spans):
        first, last = integer(first, f"ner[{number}]"), integer(last, f"ner[{number}]")
        if not isinstance(kind, str):
            raise Unreadable("wrong_type", f"ner[{number}]: the type must be a string")
        if not 0 <= first <= last < len(words):
            raise Unreadable(
                "span_mismatch", f"ner[{number}]: there are {len(words)} words, and it says {first} to {last}"
            )
        placed.append((first, last + 1, kind))
    if row.get("relations"):
        left_out["relations"] += len(row["relations"])
    return _entities(words, placed, found["text"])


READERS = (
    Reader("conll", "CoNLL", lambda rows: False, each(_tagged_text, _tagged)),
    Reader("tokens", "tokens with tags", _are_tokens, each(_tokens_text, _tokens)),
    Reader("gliner", "GLiNER", lambda rows: every(rows, _is_words), each(_positions_text, _positions)),
)
