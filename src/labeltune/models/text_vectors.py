"""Texts -> vectors from a model's input embeddings alone: one tensor is read, nothing is computed with the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from sklearn.decomposition import PCA
from sklearn.preprocessing import MultiLabelBinarizer, normalize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What the tensor of input embeddings is called, by its last parts.
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
#: Directions kept of the vectors.
DIMENSIONS = 256

#: texts -> float32 array of unit vectors, shape [texts, at most DIMENSIONS].
TextVectors = Callable[[list[str]], NDArray[numpy.float32]]


def text_vectors(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TextVectors | None:
    """`vectors_by` with the model in `folder`; None where it holds no readable input embeddings."""
    place = _find(folder)
    return None if place is None else vectors_by(partial(_read, *place), tokenizer)


def vectors_by(
    embeddings_of: Callable[[NDArray[numpy.int64]], NDArray[numpy.float32]],
    tokenizer: PreTrainedTokenizerBase,
) -> TextVectors:
    """How to turn texts into vectors with input embeddings.

    A text is the sum of the embeddings of its different tokens, each centred, of length one, and weighted by how rare
    the token is among the texts. What a model's first layer knows about words is enough to see that a text about
    fractures and a text about surgery belong together, and a few hundred rows do not say.

    Args:
        embeddings_of: token ids -> their rows of the embedding matrix, shape [tokens, width].
    """

    def vectors(texts: list[str]) -> NDArray[numpy.float32]:
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        tokens = MultiLabelBinarizer(sparse_output=True)
        holds = tokens.fit_transform(ids).astype(numpy.float32)
        if not len(tokens.classes_):
            return numpy.zeros((len(texts), 1), dtype=numpy.float32)
        rarity = numpy.log(len(texts) / numpy.asarray(holds.sum(axis=0), dtype=numpy.float32).ravel())
        embeddings = embeddings_of(numpy.array(tokens.classes_))
        embeddings = normalize(embeddings - embeddings.mean(axis=0)) * rarity[:, None]
        sums = holds @ embeddings
        found = PCA(min(DIMENSIONS, *sums.shape), random_state=0).fit_transform(sums)
        return numpy.asarray(normalize(found), dtype=numpy.float32)

    return vectors


def _find(folder: Path) -> tuple[Path, str] | None:
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


def _read(file: Path, name: str, tokens: NDArray[numpy.int64]) -> NDArray[numpy.float32]:
    """Rows of the embedding matrix, float32, shape [tokens, width]; zero for tokens it has no row for."""
    with safe_open(file, "pt") as tensors:
        weights = tensors.get_tensor(name)
        inside = tokens < weights.shape[0]
        found = numpy.zeros((len(tokens), weights.shape[1]), dtype=numpy.float32)
        found[inside] = weights[torch.from_numpy(tokens[inside])].float().numpy()
    return found
