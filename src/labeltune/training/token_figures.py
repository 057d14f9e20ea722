"""Where the tokens of a data set go, what the length budget costs, and what sharing the prefix will save."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy

from labeltune.config import TrainingConfig
from labeltune.data.loading import evenly
from labeltune.prompts.builder import PromptBuilder, common_prefix
from labeltune.training.dataset import token_columns
from labeltune.training.packing import (
    ENOUGH,
    SAMPLED_STEPS,
    Packing,
    pack_step,
    rows_of_steps,
    step_order,
    useful_tokens,
)

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows that are tokenized, spread evenly over the file; training tokenizes all.
MAX_ROWS = 20_000
#: Steps of the first epoch that are planned.
MAX_STEPS = 200
_BATCH = 1000


@dataclass(frozen=True)
class TokenFigures:
    """Counts of tokens, as training would have them; of `rows` rows, all but the planned ones.

    Attributes:
        rows: rows that were tokenized.
        of_rows: usable rows of the file.
        tokens: all tokens; the sum of the next four.
        prefix_tokens: what every row begins with.
        text_tokens: the documents, as far as they are kept.
        other_tokens: the rest of the prompts: candidates, and what the template puts around the messages.
        answer_tokens: answers with their end of turn.
        prefix_length: tokens of the common beginning.
        max_length: the budget, `prompt.max_length`.
        shortened: rows whose text was shortened to fit.
        cut_entities: NER entities in text that was cut away.
        cut_characters: characters of all documents that were cut away.
        cut_shares: rows by the share of their text that was cut: up to 10 %, up to 20 %, ... up to 100 %.
        needed: budget that would keep this share of the texts whole: `p50`, `p90`, `p99`, `max`.
        batch_size: rows of a step.
        max_tokens: tokens of a pack.
        planned_rows: rows of the steps that were planned.
        computed: tokens that the model computes for these: `shared_prefix`, `shared_cache`, `packed` (each row once, end to end)
            and `padded`.
    """

    rows: int
    of_rows: int
    tokens: int
    prefix_tokens: int
    text_tokens: int
    other_tokens: int
    answer_tokens: int
    prefix_length: int
    max_length: int
    shortened: int
    cut_entities: int
    cut_characters: int
    cut_shares: tuple[int, ...]
    needed: dict[str, int]
    batch_size: int
    max_tokens: int
    planned_rows: int
    computed: dict[str, int]

    @property
    def speed_up(self) -> float:
        """How many times fewer tokens are computed than without sharing; steps get faster by no more than that."""
        return self.computed["packed"] / self.computed["shared_prefix"]

    @property
    def shortened_share(self) -> float:
        """Share of the rows whose text was shortened."""
        return self.shortened / self.rows

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self),
            "shortened_share": round(self.shortened_share, 4),
            "speed_up": round(self.speed_up, 3),
        }


def token_figures(dataset: Dataset, builder: PromptBuilder, training: TrainingConfig) -> TokenFigures:
    """Tokenize rows and plan steps as a training run does, and count.

    At most `MAX_ROWS` rows are tokenized; their tokens go to the cache folder.

    Args:
        dataset: at least one row, in the columns of `Example.to_row`.

    Raises:
        PromptError: a row's instruction, candidates and answer do not fit the budget.
        OutputError: the cache folder cannot be written.
    """
    chosen = dataset.select(evenly(len(dataset), MAX_ROWS))
    count = len(chosen)
    tokens = token_columns(chosen, builder)
    column = {
        name: numpy.asarray(tokens.with_format("numpy")[name][:], dtype=numpy.int64)
        for name in tokens.column_names
        if name not in ("input_ids", "others", "weight")
    }
    prefix = _common_beginning(tokens)
    text = column["text_end"] - numpy.maximum(column["text_start"], prefix)
    answers = int(column["answer_tokens"].sum())
    total, texts = int(column["length"].sum()), int(numpy.maximum(text, 0).sum())
    shortened = column["shortened"].astype(bool)
    characters = _characters(chosen)
    shares = column["cut_characters"][shortened] / numpy.maximum(characters[shortened], 1)
    # A row that fits is as long as it needs; of a shortened one the budget is all used, and the excess stands beside it.
    limit = builder.task.prompt.max_length
    needed = numpy.where(column["excess"] > 0, limit + column["excess"], column["length"])
    planned, max_tokens, computed = _packed(tokens, training)
    return TokenFigures(
        rows=count,
        of_rows=len(dataset),
        tokens=total,
        prefix_tokens=prefix * count,
        text_tokens=texts,
        other_tokens=total - prefix * count - texts - answers,
        answer_tokens=answers,
        prefix_length=prefix,
        max_length=limit,
        shortened=int(shortened.sum()),
        cut_entities=int(column["cut_entities"].sum()),
        cut_characters=int(column["cut_characters"].sum()),
        cut_shares=tuple(int(n) for n in numpy.histogram(shares, bins=10, range=(0.0, 1.0))[0]),
        needed={
            **{f"p{q}": int(numpy.percentile(needed, q, method="higher")) for q in (50, 90, 99)},
            "max": int(needed.max()),
        },
        batch_size=training.batch_size,
        max_tokens=max_tokens,
        planned_rows=planned,
        computed=computed,
    )


def _characters(dataset: Dataset) -> Any:
    """Lengths of the documents in characters, shape [rows]; blanks around them do not count, as in `shortened`."""
    found: list[int] = []
    for batch in dataset.select_columns(["text"]).iter(batch_size=_BATCH):
        found += [len(text.strip()) for text in batch["text"]]
    return numpy.array(found, dtype=numpy.int64)


def _common_beginning(tokens: Dataset) -> int:
    """Tokens that all prompts begin with."""
    first: list[int] | None = None
    for batch in tokens.select_columns(["input_ids", "answer_start"]).iter(batch_size=_BATCH):
        for ids, answer_start in zip(batch["input_ids"], batch["answer_start"], strict=True):
            prompt = ids[:answer_start]
            first = prompt if first is None else first[: common_prefix(first, prompt)]
    return len(first or ())


def _packed(tokens: Dataset, training: TrainingConfig) -> tuple[int, int, dict[str, int]]:
    """(rows planned, tokens of a pack, tokens computed in each way), on one process with memory to spare."""
    order = step_order(len(tokens), training.batch_size, training.seed, 0)
    steps = rows_of_steps(tokens, order, MAX_STEPS)
    if training.max_tokens_per_pack == "auto":
        max_tokens = useful_tokens(steps[:SAMPLED_STEPS], "shared_prefix", 1, ENOUGH["cuda"])
    else:
        max_tokens = training.max_tokens_per_pack
    computed = {
        way: sum(pack.tokens(step, way) for step in steps for pack in pack_step(step, max_tokens, way)[0])
        for way in get_args(Packing)
    }
    return sum(len({row.record for row in step}) for step in steps), max_tokens, computed
