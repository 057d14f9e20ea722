"""Texts that are nearly the same, inside a file and across files: MinHash finds candidates, n-grams decide."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy

from labeltune.data.loading import Rows
from labeltune.io.progress import row_progress

if TYPE_CHECKING:
    from datasketch import MinHash

#: Characters of an n-gram. Three would make long English texts alike that share no sentence; five would part Chinese
#: headlines that differ in one character.
NGRAM = 4
#: Jaccard similarity of the n-gram sets from which on two texts are near-duplicates.
THRESHOLD = 0.7
#: Texts that are compared; a file beyond its part is compared up to there, and the report says so.
MAX_ROWS = 100_000
#: Characters of a text that are compared.
MAX_CHARACTERS = 20_000

_PERMUTATIONS = 128
#: Bands, and rows of a band. A pair at the threshold is a candidate with probability 1 - (1 - 0.7^5)^25 = 0.99.
_BANDS = (25, 5)
#: A text this similar to one that is kept as a candidate is not kept itself, so that ten thousand rows of one template
#: are compared with one of them each, not with each other.
_KEPT_BELOW = 0.9
#: Candidates of a text that are verified, the most similar by their MinHashes first.
_VERIFIED = 32
_BATCH = 1000
_HASHED_AT_ONCE = 4096


@dataclass(frozen=True)
class NearDuplicate:
    """A row and the most similar row before it.

    Attributes:
        where: `file:line` of the row.
        like: `file:line` of the other row; it stands in the same file, or in one given before (train, validation, test).
        similarity: Jaccard similarity of their n-gram sets, from `THRESHOLD` to 1.
        text: beginning of the row's text.
        like_text: beginning of the other text.
        files: numbers of the two files, the row's first.
        rows: numbers of the two usable rows, the row's first.
    """

    where: str
    like: str
    similarity: float
    text: str
    like_text: str
    files: tuple[int, int]
    rows: tuple[int, int]

    @property
    def across(self) -> bool:
        """Whether the two stand in different files."""
        return self.files[0] != self.files[1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = asdict(self)
        del values["files"], values["rows"]
        return {**values, "similarity": round(self.similarity, 4), "across": self.across}


@dataclass(frozen=True)
class NearDuplicates:
    """What the comparison found.

    Attributes:
        pairs: verified pairs, the most similar first; those across files before those inside one.
        compared: rows of each file that were compared, from its beginning.
    """

    pairs: tuple[NearDuplicate, ...]
    compared: tuple[int, ...]

    @property
    def across(self) -> int:
        """Number of pairs whose rows stand in different files."""
        return sum(pair.across for pair in self.pairs)

    def to_dict(self, limit: int) -> dict[str, Any]:
        """JSON-ready, with at most `limit` pairs."""
        return {
            "threshold": THRESHOLD,
            "ngram": NGRAM,
            "compared_rows": list(self.compared),
            "pairs": len(self.pairs),
            "across_files": self.across,
            "inside_files": len(self.pairs) - self.across,
            "listed": [pair.to_dict() for pair in self.pairs[:limit]],
        }


def ngrams(text: str) -> frozenset[str]:
    """The character n-grams of a text; a text shorter than `NGRAM` is its own.

    Case, width of letters and digits, and runs of blanks do not count: NFKC, lower case, single spaces.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).lower().split())
    return frozenset(folded[at : at + NGRAM] for at in range(max(1, len(folded) - NGRAM + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Elements that both have, divided by those that either has."""
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def share_of(counts: Sequence[int], limit: int) -> tuple[int, ...]:
    """How many rows of each file are taken for at most `limit` in all: small files whole, large ones in equal parts."""
    taken = [0] * len(counts)
    left = limit
    by_size = sorted(range(len(counts)), key=lambda file: counts[file])
    for position, file in enumerate(by_size):
        taken[file] = min(counts[file], left // (len(counts) - position))
        left -= taken[file]
    return tuple(taken)


def iter_texts(rows: Rows, count: int) -> Iterator[str]:
    """The texts of the first `count` usable rows, read in batches."""
    columns = rows.dataset.select_columns(["text"]).select(range(count))
    for batch in columns.iter(batch_size=_BATCH):
        yield from batch["text"]


def find_near_duplicates(files: Sequence[Rows], progress: bool = False) -> NearDuplicates:
    """For every row the most similar row before it in its file, and in each file before, where that is a near-duplicate.

    Candidates come from MinHash signatures in locality-sensitive bands (Broder 1997, "On the resemblance and containment
    of documents"; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). Each is then verified: the
    similarity given is that of the n-gram sets themselves, so no pair is listed by chance. Equal texts are no
    near-duplicates; the audit reports them.

    Some 10 kB a text are held (measured), of at most `MAX_ROWS` texts: 1 GB. The texts themselves stay on disk.

    Args:
        files: in the order train, validation, test.
    """
    compared = share_of([len(rows.dataset) for rows in files], MAX_ROWS)
    pairs: list[NearDuplicate] = []
    indexes: list[_Index] = []
    seen: list[set[int]] = []
    make = _minhash_maker()
    with row_progress(sum(compared), "near-duplicates", progress) as advance:
        for file, (rows, count) in enumerate(zip(files, compared, strict=True)):
            index = _Index(rows)
            indexes.append(index)
            seen.append(set())
            hashes = rows.audit.text_hashes
            for row, text in enumerate(iter_texts(rows, count)):
                if row and row % _BATCH == 0:
                    advance(_BATCH)
                if hashes[row] in seen[file]:
                    continue
                seen[file].add(hashes[row])
                grams = ngrams(text)
                minhash = make(grams)
                for other in range(file):
                    if hashes[row] not in seen[other]:
                        found = indexes[other].nearest(grams, minhash)
                        if found is not None:
                            pairs.append(_pair(files, (file, other), (row, found[0]), found[1]))
                found = index.nearest(grams, minhash)
                if found is not None:
                    pairs.append(_pair(files, (file, file), (row, found[0]), found[1]))
                if found is None or found[1] < _KEPT_BELOW:
                    index.add(row, minhash)
            advance((count - 1) % _BATCH + 1 if count else 0)
    pairs.sort(key=lambda pair: (not pair.across, -pair.similarity, pair.files, pair.rows))
    return NearDuplicates(tuple(pairs), compared)


class _Index:
    """The texts of one file that later ones are compared with."""

    def __init__(self, rows: Rows) -> None:
        from datasketch import MinHashLSH

        self._lsh: Any = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
        self._signatures: dict[int, Any] = {}
        texts = rows.dataset.select_columns(["text"])
        self._grams = lru_cache(maxsize=256)(lambda row: ngrams(texts[row]["text"]))

    def add(self, row: int, minhash: MinHash) -> None:
        self._lsh.insert(row, minhash, check_duplication=False)
        self._signatures[row] = minhash.hashvalues

    def nearest(self, grams: frozenset[str], minhash: MinHash) -> tuple[int, float] | None:
        """(row, similarity) of the most similar text, the first of equals; None below the threshold."""
        candidates = sorted(self._lsh.query(minhash))
        if not candidates:
            return None
        signatures = numpy.stack([self._signatures[row] for row in candidates])
        estimates = (signatures == minhash.hashvalues).mean(axis=1)
        best: tuple[int, float] | None = None
        for at in numpy.argsort(-estimates, kind="stable")[:_VERIFIED]:
            similarity = jaccard(grams, self._grams(candidates[at]))
            if similarity >= THRESHOLD and (best is None or similarity > best[1]):
                best = (candidates[at], similarity)
        return best


def _minhash_maker() -> Callable[[frozenset[str]], Any]:
    """n-grams -> datasketch MinHash, the same on every machine: its permutations follow from a seed, crc32 from the bytes."""
    from datasketch import MinHash

    empty = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)

    def make(grams: frozenset[str]) -> Any:
        minhash = empty.copy()
        encoded = [gram.encode("utf-8") for gram in grams]
        # In pieces: the permutations of all n-grams of a long text at once would take 10 MB.
        for start in range(0, len(encoded), _HASHED_AT_ONCE):
            minhash.update_batch(encoded[start : start + _HASHED_AT_ONCE])
        return minhash

    return make


def _pair(
    files: Sequence[Rows], pair: tuple[int, int], rows: tuple[int, int], similarity: float
) -> NearDuplicate:
    row, like = (files[file].dataset[number] for file, number in zip(pair, rows, strict=True))
    return NearDuplicate(
        row["source"], like["source"], similarity, excerpt(row["text"]), excerpt(like["text"]), pair, rows
    )


def excerpt(text: str, characters: int = 100) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 4 * characters].split())
    return line if len(line) <= characters and len(text) <= 4 * characters else f"{line[:characters]}…"
