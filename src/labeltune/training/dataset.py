"""Checked rows -> token ids on disk, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labeltune.tasks.builder import PromptBuilder
from labeltune.types import Example

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TokenAccount:
    """Where the tokens of a data set go.

    Attributes:
        rows: number of rows.
        tokens: all tokens.
        answer_tokens: tokens that are trained on.
        shortened: rows whose text was shortened to fit.
        cut_entities: NER entities that lie in the part that was cut away.
    """

    rows: int
    tokens: int
    answer_tokens: int
    shortened: int
    cut_entities: int


def tokenize_rows(dataset: Dataset, builder: PromptBuilder) -> tuple[Dataset, TokenAccount]:
    """Token ids and answer positions of every row, in an Arrow file.

    Columns of the result: `input_ids` list of int32, `answer_start` and `answer_end` int32 (end exclusive), `length`.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        example = Example.from_row(row)
        encoded = builder.training(example)
        return {
            "input_ids": encoded.ids,
            "answer_start": encoded.answer_span[0],
            "answer_end": encoded.answer_span[1],
            "length": len(encoded.ids),
            "shortened": encoded.text.strip() != example.text.strip(),
            "cut_entities": sum(entity.text not in encoded.text for entity in example.entities or ()),
        }

    import datasets

    integer = datasets.Value("int32")
    columns = datasets.Features(
        {
            "input_ids": datasets.List(integer),
            "answer_start": integer,
            "answer_end": integer,
            "length": integer,
            "shortened": datasets.Value("bool"),
            "cut_entities": integer,
        }
    )
    was_enabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        tokens = dataset.map(
            encode, remove_columns=dataset.column_names, features=columns, load_from_cache_file=False
        )
    finally:
        if not was_enabled:
            datasets.enable_progress_bars()
    spans = tokens.with_format("numpy")
    account = TokenAccount(
        rows=len(tokens),
        tokens=int(spans["length"][:].sum()) if len(tokens) else 0,
        answer_tokens=int((spans["answer_end"][:] - spans["answer_start"][:]).sum()) if len(tokens) else 0,
        shortened=int(spans["shortened"][:].sum()) if len(tokens) else 0,
        cut_entities=int(spans["cut_entities"][:].sum()) if len(tokens) else 0,
    )
    return tokens.remove_columns(["shortened", "cut_entities"]), account


class PaddingCollator:
    """Rows of `tokenize_rows` -> padded tensors; padding stands on the left, so all answers are in the last columns.

    The result holds `input_ids`, `attention_mask` and `position_ids` of shape [rows, longest], and for the last
    `logits_to_keep` columns `labels` of shape [rows, logits_to_keep]. Labels are the answer span by position, -100
    elsewhere, so a pad token that equals the end of turn is never mistaken for it.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        # One column before the longest answer: its logits predict the answer's first token.
        keep = max(len(row["input_ids"]) - int(row["answer_start"]) for row in rows) + 1
        keep = min(keep, width)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for index, row in enumerate(rows):
            tokens = torch.as_tensor(row["input_ids"], dtype=torch.long)
            start, end = int(row["answer_start"]), int(row["answer_end"])
            left = width - len(tokens)
            ids[index, left:] = tokens
            mask[index, left:] = 1
            labels[index, left + start : left + end] = tokens[start:end]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels[:, width - keep :],
            "logits_to_keep": keep,
            "use_cache": False,
        }
