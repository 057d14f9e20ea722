"""Labels as people write them: lists as text, and labels that only look different."""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from labeltune.errors import DataError, clipped

#: Characters of candidates that are written as one string; beyond it Python's own reader takes minutes and gigabytes.
_MAX_WRITTEN_LIST = 2**20
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
#: Of a misspelt label: its rows at most, how many times as many the usual one has, and the lengths that are looked at.
_RARE, _USUAL = 2, 10
_SHORTEST, _LONGEST = 4, 60
#: Characters of other categories that show nothing: fillers and joiners.
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def parse_candidates(value: str) -> list[str]:
    """Candidates written as text: a JSON or Python list, or labels between commas (`,` `，` `、`).

    >>> parse_candidates("['Military', 'Space']")
    ['Military', 'Space']
    >>> parse_candidates("Military,Space")
    ['Military', 'Space']

    Raises:
        DataError: it stands in brackets and is no list of strings, a comma is missing between two strings, or it is longer
            than any list of labels.
    """
    if len(value) > _MAX_WRITTEN_LIST:
        raise DataError(f"has more than {_MAX_WRITTEN_LIST} characters; write it as a list, not as a string")
    stripped = value.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        parsed = _json_list(stripped)
        if parsed is None:
            parsed = _python_list(stripped)
        if parsed is None:
            raise DataError(
                f"stands in brackets but is no JSON or Python list of strings: {clipped(stripped, 100)!r}; write it "
                'as ["a", "b"], or between commas without brackets'
            )
        return [label.strip() for label in parsed]
    if re.search(r"\[\s*['\"]", stripped) and re.search(r"['\"]\s*\]", stripped):
        raise DataError(
            f"holds a list in brackets and more around it: {clipped(stripped, 100)!r}; write the list alone, as "
            '["a", "b"]'
        )
    # A tuple, a set, or strings in quotes without brackets; what only begins like them is plain text.
    if _BRACKETS.get(stripped[:1]) == stripped[-1:] or (stripped[:1] in "'\"" and stripped[-1:] in "'\""):
        inside = stripped[1:-1] if stripped[:1] in _BRACKETS else stripped
        parsed = _python_list(f"[{inside}]") if stripped else None
        if parsed is not None and len(parsed) > 1:
            return [label.strip() for label in parsed]
    for separator in "，、":
        stripped = stripped.replace(separator, ",")
    return [label.strip() for label in stripped.split(",")]


#: Shares may miss 1 by this much, as they are often rounded.
_ROUNDED = 1e-3


def parse_shares(value: object) -> tuple[tuple[str, float], ...]:
    """A soft label: labels with their shares, the largest first, those of one share by name; nothing where the value is another one.

    Written as an object, or as the JSON or Python text of one. Shares are divided by their sum; a share of 0 or null is none.

    >>> parse_shares({"Economy": 0.25, "Sports": 0.75, "Farm": None})
    (('Sports', 0.75), ('Economy', 0.25))
    >>> parse_shares("Sports")
    ()

    Raises:
        DataError: it is an object that holds no distribution over labels.
    """
    if isinstance(value, str):
        value = _written_shares(value.strip())
    if not isinstance(value, dict):
        return ()
    found: dict[str, float] = {}
    for name, given in value.items():
        share = 0 if given is None else given
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1 + _ROUNDED:
            raise DataError(f"the share of {name!r} is {given!r}; shares are numbers from 0 to 1")
        if not share:
            continue
        label = name.strip()
        if not label:
            raise DataError("a label is empty")
        if label in found:
            raise DataError(f"{label!r} has more than one share")
        found[label] = float(share)
    total = math.fsum(found.values())
    if abs(total - 1) > _ROUNDED:
        raise DataError(f"the shares sum to {total:.6g}; they must sum to 1")
    ordered = sorted(found.items(), key=lambda each: (-each[1], each[0]))
    return tuple((label, share / total) for label, share in ordered)


def _written_shares(text: str) -> object:
    """An object with numbers that stands in a text, as in the cell of a table; None where it is no such text."""
    if not (text.startswith("{") and text.endswith("}")) or len(text) > _MAX_WRITTEN_LIST:
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(found, dict) and found and all(map(_is_share, found.items())):
            return found
    return None


def _is_share(pair: tuple[object, object]) -> bool:
    return isinstance(pair[0], str) and (pair[1] is None or isinstance(pair[1], int | float))


def named_labels(option: str, value: str) -> tuple[str, ...]:
    """Labels that were given on the command line.

    Raises:
        DataError: it cannot be read, or names no label.
    """
    try:
        labels = tuple(label for label in parse_candidates(value) if label)
    except DataError as error:
        raise DataError(f"{option} {error}") from None
    if not labels:
        raise DataError(f"{option} {value!r} names no label; write it as {option} 'a,b', or leave it out")
    return labels


def _json_list(text: str) -> list[str] | None:
    try:
        return _strings(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _python_list(text: str) -> list[str] | None:
    """The strings of a Python list.

    Raises:
        DataError: two strings stand beside each other, which Python reads as one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash in a label is not ours to warn about
            parsed = _strings(ast.literal_eval(text))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if parsed is None or len(parsed) == len(_STRING.findall(text)):
        return parsed
    pair = _neighbours(text)
    if pair is None:
        return parsed
    raise DataError(
        f"has no comma between {clipped(pair[0], 40)} and {clipped(pair[1], 40)}; numpy prints lists like that, and Python would "
        'read one label; write it as ["a", "b"]'
    )


def _neighbours(text: str) -> tuple[str, str] | None:
    """Two strings of a list with nothing between them."""
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            if before:
                return before, token.string
            before = token.string
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
            before = ""
    return None


def _strings(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(label, str) for label in value) else None


def by_count(counts: Mapping[str, int]) -> dict[str, int]:
    """Labels with their number, the most frequent first, those of one number by name.

    >>> by_count({"b": 1, "a": 1, "c": 2})
    {'c': 2, 'a': 1, 'b': 1}
    """
    return dict(sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def seen_as(label: str) -> str:
    """What is left of a label when case, width, blanks and characters that cannot be seen do not count.

    >>> seen_as("Ｓport\\u200b ") == seen_as("sport")
    True
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold())
    return "".join(c for c in folded if not _is_unseen(c))


def _is_unseen(character: str) -> bool:
    if character.isascii():
        return not character.isprintable() or character == " "
    code = ord(character)
    return (
        unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp")
        or character in _UNSEEN
        or 0xFE00 <= code <= 0xFE0F
        or 0xE0100 <= code <= 0xE01EF
    )


def twins(labels: Iterable[str]) -> list[list[str]]:
    """Groups of different labels that look the same (`seen_as`), sorted."""
    groups: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        groups.setdefault(seen_as(label), []).append(label)
    return [group for seen, group in groups.items() if len(group) > 1 and seen]


def misspelt(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Rare labels that are one character away from a usual one, with that one: `_RARE` times at most, beside `_USUAL` times as many.

    >>> misspelt({"sports": 60, "sport": 2, "arts": 40, "art_1": 1, "art_2": 90})
    [('sport', 'sports')]
    """
    near: dict[str, list[str]] = {}
    for label in counts:
        if _SHORTEST <= len(label) <= _LONGEST:
            for spelling in (label, *(label[:at] + label[at + 1 :] for at in range(len(label)))):
                near.setdefault(spelling, []).append(label)
    found = {
        rare: usual
        for group in near.values()
        for rare in group
        for usual in group
        if 0 < counts[rare] <= _RARE
        and counts[usual] >= _USUAL * counts[rare]
        and _one_letter_apart(rare, usual)
        and seen_as(rare) != seen_as(usual)
    }
    return sorted(found.items())


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether one character is too many, missing or another; a digit or a sign makes a name of its own."""
    if len(one) > len(other):
        one, other = other, one
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    same_length = len(one) == len(other)
    changed = one[at : at + 1] * same_length + other[at : at + 1]
    if same_length and not changed.isascii():  # another Chinese character is another word
        return False
    return one[at + same_length :] == other[at + 1 :] and changed.isalpha()


def like(label: str, others: Sequence[str]) -> str:
    """A hint at the label that was probably meant; empty when none looks the same."""
    seen = seen_as(label)
    other = next((other for other in others if other != label and seen_as(other) == seen), None)
    if other is None:
        return ""
    return f"; it differs from {other!r} only in case, width, blanks or characters that cannot be seen"


def not_among(label: str, known: Sequence[str], whose: str) -> str:
    """A message about a label that is not in a label set: with the label that was probably meant, else with the set.

    >>> not_among("sport", ["Sport", "Farm"], "the labels of the training rows")
    "'sport' is not among the labels of the training rows; did you mean 'Sport'?"
    """
    return f"{label!r} is not among {whose}{meant(label, tuple(known))}"


@lru_cache(maxsize=1024)
def meant(label: str, known: tuple[str, ...]) -> str:
    """The end of a message about a label that is not in a label set: as of `not_among`."""
    seen = {seen_as(name): name for name in reversed(known)}
    close = difflib.get_close_matches(seen_as(label), list(seen), n=1, cutoff=0.75)
    return f"; did you mean {seen[close[0]]!r}?" if close else f" ({clipped(', '.join(known), 200)})"
