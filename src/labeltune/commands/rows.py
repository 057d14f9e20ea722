"""The rows of a run: what is said of them before training, and which are measured and shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from labeltune.config import RunConfig
from labeltune.data.loading import Splits, stratum
from labeltune.io.run_folder import public_name
from labeltune.types import Example, Prediction

Say = Callable[[str], None]

#: Training rows that are looked at to tell what script they are written in.
SCRIPT_ROWS = 200


def summarize(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """What a run is trained on, for its model card: names without folders, rows, and training rows (entities) by label.

    `test` is the path as it was given: `labeltune evaluate` reads it when no other is named.
    """
    counts: Counter[str] = Counter()
    if config.task == "classification":
        counts.update(splits.train["label"])
    else:
        counts.update(e["label"] for row in splits.train["entities"] for e in row)
    validation = config.data.validation
    return {
        "train": public_name(config.data.train),
        "validation": None if validation is None else public_name(validation),
        "test": config.data.test,
        "train_rows": len(splits.train),
        "validation_rows": 0 if splits.validation is None else len(splits.validation),
        "labels": dict(counts.most_common()),
    }


def report_splits(splits: Splits, say: Say) -> None:
    """Say how many rows there are, and how many were left out."""
    held_out = 0 if splits.validation is None else len(splits.validation)
    say(f"data: {len(splits.train)} training rows, {held_out} validation rows, {len(splits.labels)} labels")
    if held_out > len(splits.train):
        say("warning: there are more validation rows than training rows; are the two files swapped?")
    if splits.skipped:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(splits.skipped.items()))
        say(f"data: {splits.skipped_rows} faulty rows were skipped (data.on_error=skip): {reasons}")


def warn_of_rows(config: RunConfig, splits: Splits, measured: Sequence[Example], say: Say) -> None:
    """Say what is allowed and will disappoint."""
    if config.metric == "span_f1" and measured and not any(example.entities for example in measured):
        say(
            f"warning: none of the {len(measured)} validation rows holds an entity, and span_f1 on them picks `best`; "
            "name rows with entities as data.validation, or set eval.metric=loss"
        )
    if config.model != "pocket":
        return
    texts = splits.train.select(range(min(SCRIPT_ROWS, len(splits.train))))["text"]
    foreign, total = sum(not c.isascii() for text in texts for c in text), sum(map(len, texts))
    if 2 * foreign > total:
        say(
            "warning: pocket reads Chinese, and most other scripts, byte by byte, and learns little of them; use pocket-zh or a "
            "Qwen model"
        )


def fixed_handful(splits: Splits, count: int) -> list[Example]:
    """Rows spread evenly over the validation rows (the training rows when there are none); the same in every run."""
    source = splits.validation if splits.validation is not None else splits.train
    count = min(count, len(source))
    return [Example.from_row(source[i * len(source) // count]) for i in range(count)]


def validation_rows(splits: Splits, count: int) -> list[Example]:
    """At most `count` validation rows, the same in every run of a config: every stratum in proportion (a label, or a set of
    entity types), spread evenly over the file. All of them in file order when they are no more."""
    source = splits.validation
    if source is None:
        return []
    if len(source) <= count:
        return [Example.from_row(row) for row in source]

    names = [stratum(row) for row in source.select_columns(["label", "entities"])]
    order = sorted(range(len(source)), key=lambda i: (names[i], i))
    chosen = sorted(order[i * len(order) // count] for i in range(count))
    return [Example.from_row(source[i]) for i in chosen]


def prediction_text(example: Example, prediction: Prediction, target: str) -> str:
    """A row as the board shows it, whose table shows the beginning of a text: what was predicted, not the document."""
    return f"Prediction:\n{prediction.answer}\n\nGround truth:\n{target}\n\nDocument:\n{example.text}"
