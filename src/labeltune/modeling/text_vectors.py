"""Texts -> vectors from a model's input embeddings alone: one tensor is read, nothing is computed with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

#: What the tensor of input embeddings is called, by its last parts.
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
#: Directions kept of the vectors.
DIMENSIONS = 256

#: texts -> float32 array of unit vectors, shape [texts, at most DIMENSIONS].
TextVectors = Callable[[list[str]], Any]


def text_vectors(folder: Path, tokenizer: Any) -> TextVectors | None:
    """How to turn texts into vectors with the model in `folder`; None where it holds no readable input embeddings.

    A text is the sum of the embeddings of its different tokens, each centred, of length one, and weighted by how rare
    the token is among the texts. What a model's first layer knows about words is enough to see that a text about
    fractures and a text about surgery belong together, and a few hundred rows do not say.
    """
    place = _find(folder)
    if place is None:
        return None
    file, name = place

    def vectors(texts: list[str]) -> Any:
        from scipy import sparse

        rows = [
            sorted(set(ids)) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        ]
        ends = numpy.cumsum([0, *map(len, rows)])
        used, columns = numpy.unique(
            numpy.array([token for row in rows for token in row], dtype=numpy.int64), return_inverse=True
        )
        if not len(used):
            return numpy.zeros((len(texts), 1), dtype=numpy.float32)
        ones = numpy.ones(len(columns), dtype=numpy.float32)
        holds = sparse.csr_matrix((ones, columns, ends), shape=(len(texts), len(used)))
        rarity = numpy.log(len(texts) / numpy.bincount(columns, minlength=len(used)))
        tokens = _unit(_centred(_read(file, name, used))) * rarity[:, None].astype(numpy.float32)
        return _unit(_main_directions(_centred(holds @ tokens)))

    return vectors


def _find(folder: Path) -> tuple[Path, str] | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.endswith(_NAMES)]  # noqa: SIM118
        except (OSError, SafetensorError):
            # Training will say that the file is damaged; a report can do without.
            continue
        if names:
            return file, names[0]
    return None


def _read(file: Path, name: str, tokens: Any) -> Any:
    """Rows of the embedding matrix, float32, shape [tokens, width]; zero for tokens it has no row for."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        weights = tensors.get_tensor(name)
        inside = tokens < weights.shape[0]
        found = numpy.zeros((len(tokens), weights.shape[1]), dtype=numpy.float32)
        found[inside] = weights[torch.from_numpy(tokens[inside])].float().numpy()
    return found


def _centred(vectors: Any) -> Any:
    return vectors - vectors.mean(axis=0)


def _unit(vectors: Any) -> Any:
    return vectors / (numpy.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9)


def _main_directions(vectors: Any) -> Any:
    """The vectors in the `DIMENSIONS` directions in which they differ most."""
    if vectors.shape[1] <= DIMENSIONS:
        return vectors
    _, directions = numpy.linalg.eigh(vectors.T @ vectors)
    return vectors @ directions[:, -DIMENSIONS:]
