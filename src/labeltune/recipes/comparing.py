"""Two models on the same rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.compare import compare_predictions
from labeltune.evaluation.comparison_page import BARE, comparison_page
from labeltune.evaluation.headline import headline
from labeltune.recipes.evaluation import labelled_rows, predictor_of, right_answer, row_bar
from labeltune.run_folder import write_json, write_text
from labeltune.types import Example, Prediction

#: Stands for the second run's model with its adapter switched off.
BASE = "base"


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    data: str,
    *,
    on_error: str = "stop",
    max_rows: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """What the second model answers better or worse than the first, paired row by row.

    Args:
        first: a run folder, a checkpoint, a config file (its untuned model), or `base`: the second run without its adapter.
        second: the same, but for `base`.
        data: labelled file or hub data set, read with the columns of `second`.
        output: folder for `comparison.json`, `changed.jsonl` and `comparison.html`.

    Raises:
        ConfigError: the two do different tasks, or both are `base`.
        DataError: as `evaluate`.
        ModelError: there is no such run, or `base` of a run without an adapter.
    """
    if str(second) == BASE:
        raise ConfigError("the second model cannot be `base`; write: labeltune compare base RUN --data FILE")
    predictor, data_config, hub = predictor_of(second)
    with predictor:
        rows = labelled_rows(predictor.task.name, data, data_config, hub, on_error, max_rows)
        examples = [rows.example(i) for i in range(len(rows.dataset))]
        task, labels = predictor.task.name, predictor.task.labels
        with row_bar(len(examples), progress) as advance:
            answers_of_second = predictor.predict(examples, on_batch=advance)
        if str(first) == BASE:
            with predictor.base_model(), row_bar(len(examples), progress) as advance:
                answers_of_first = predictor.predict(examples, on_batch=advance)
    if str(first) != BASE:
        other, _, _ = predictor_of(first)
        with other:
            if other.task.name != task:
                raise ConfigError(
                    f"{first} does {other.task.name}, {second} does {task}; they cannot be compared"
                )
            if task == "ner" and set(other.task.labels) != set(labels):
                raise DataError(
                    f"{first} knows the types {', '.join(other.task.labels)}, {second} {', '.join(labels)}; they cannot be "
                    "compared on the same rows"
                )
            with row_bar(len(examples), progress) as advance:
                answers_of_first = other.predict(examples, on_batch=advance)
    found = {
        "first": str(first) if str(first) != BASE else f"{second}{BARE}",
        "second": str(second),
        "base": _untuned(first) and not _untuned(second),
        "data": data,
        "task": task,
        "headline": {
            "first": headline(examples, answers_of_first),
            "second": headline(examples, answers_of_second),
        },
        **compare_predictions(examples, answers_of_first, answers_of_second),
    }
    if output is not None:
        _write(Path(output), found, examples, answers_of_first, answers_of_second)
    return found


def _untuned(model: str | os.PathLike[str]) -> bool:
    return str(model) == BASE or Path(model).suffix in {".yaml", ".yml"}


def _write(
    folder: Path,
    found: dict[str, Any],
    examples: list[Example],
    first: list[Prediction],
    second: list[Prediction],
) -> None:
    write_json(folder / "comparison.json", found)
    lines = []
    for how in ("gained", "lost"):
        for i in found["changed"][how]:
            row = {
                "change": how,
                "id": examples[i].id,
                "source": examples[i].source,
                "text": examples[i].text,
            }
            row |= {
                "right": right_answer(examples[i]),
                "first": first[i].to_dict(),
                "second": second[i].to_dict(),
            }
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(folder / "changed.jsonl", "".join(lines))
    write_text(folder / "comparison.html", comparison_page(found, examples, first, second))
