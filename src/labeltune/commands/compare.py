"""`labeltune compare`: two models answer the same rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from labeltune.commands.evaluate import (
    RunDescription,
    data_to_measure,
    describe_run,
    files_of,
    labelled_rows,
    opened,
    print_figures,
    right_answer,
    rows_of_training,
)
from labeltune.commands.options import FiguresAsJson, MaxRows, OnError
from labeltune.commands.row_hashes import rows_seen
from labeltune.config import is_config
from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.compare import BARE, compare_predictions, comparison_page, point_apart
from labeltune.evaluation.floor import floor_figures, floor_of
from labeltune.evaluation.summary import floor_line, headline, rows_line
from labeltune.io.outputs import check_folder, note_replaced, write_json, write_jsonl, write_text
from labeltune.io.progress import phase, track
from labeltune.models.pocket import POCKET_MODELS
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

#: Stands for the second run's model with its adapter switched off.
BASE = "base"
COMPARISON_FILES = ("comparison.json", "changed.jsonl", "comparison.html")


def compare_command(
    *,
    first: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint, config.yaml, or `base`: SECOND without its adapter."),
    ],
    second: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Labelled rows; the data.test of SECOND when missing."),
    ] = None,
    on_error: OnError = "stop",
    max_rows: MaxRows = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for comparison.json, changed.jsonl and comparison.html."),
    ] = None,
    as_json: FiguresAsJson = False,
) -> None:
    """Compare two models on the same rows.

    A summary goes to standard error. All figures go as JSON to comparison.json with --output, else to standard output unless
    that is a terminal.
    """
    _check_names(first, second)
    read = [*(files_of(first) if first != BASE else []), *files_of(second)]
    data = data_to_measure(second, data)
    if output is not None:
        check_folder(output, [*read, data], COMPARISON_FILES)
        note_replaced(*(output / name for name in COMPARISON_FILES))
    with phase("loading the model"):
        found = compare(first, second, data, on_error=on_error, max_rows=max_rows, output=output)
    _print_differences(found)
    print_figures(found, output and output / "comparison.html", as_json)


def compare(
    first: str | os.PathLike[str] | Predictor,
    second: str | os.PathLike[str] | Predictor,
    data: str,
    *,
    on_error: str = "stop",
    max_rows: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    predictions: Sequence[Prediction] | None = None,
) -> dict[str, Any]:
    """What the second model answers better or worse than the first, paired row by row.

    Args:
        first: a run folder, a checkpoint, a config file (its untuned model), `base`: the second run without its adapter; or a
            predictor, which is left open.
        second: the same, but for `base`.
        data: labelled file or hub data set, read with the columns of `second`.
        output: folder for `comparison.json`, `changed.jsonl` and `comparison.html`.
        predictions: what `second` answered to these rows, in their order; it is not asked again.

    Raises:
        ConfigError: the two do different tasks, or both are `base`.
        DataError: as `evaluate`.
        ModelError: there is no such run, or `base` of a run without an adapter.
    """
    _check_names(first, second)
    about = describe_run(second)
    others = [] if str(first) == BASE else [describe_run(first)]
    for other in others:
        _check_comparable(other, about)
    rows = labelled_rows(about, data, on_error, max_rows, *others)
    examples = rows.examples()
    with opened(second, labels=about.labels) as predictor:
        if predictions is None:
            predictions = _answers(predictor, examples, progress)
        if str(first) == BASE:
            with predictor.base_model():
                answers_of_first = _answers(predictor, examples, progress)
    for each in others:
        with opened(first, labels=each.labels) as predictor:
            answers_of_first = _answers(predictor, examples, progress)
    found = {
        "first": others[0].name if others else f"{about.name}{BARE}",
        "second": about.name,
        "base": _untuned(first) and not _untuned(second),
        "data": data,
        "task": about.task,
        **rows_seen([each.folder for each in (about, *others)], [e.text for e in examples]).to_dict(),
        "headline": {
            "first": headline(examples, answers_of_first),
            "second": headline(examples, predictions),
        },
        **compare_predictions(examples, answers_of_first, predictions),
    }
    if (floor := floor_of(rows_of_training(about), examples)) is not None:
        found["floor"] = floor_figures(floor, examples, predictions, about.task)
    if output is not None:
        _write(Path(output), found, examples, answers_of_first, predictions)
    return found


def _answers(predictor: Predictor, examples: Sequence[Example], progress: bool) -> list[Prediction]:
    return list(track(predictor.stream(examples), len(examples), shown=progress))


def _check_names(
    first: str | os.PathLike[str] | Predictor, second: str | os.PathLike[str] | Predictor
) -> None:
    if str(second) == BASE:
        raise ConfigError("the second model cannot be `base`; write: labeltune compare base RUN --data FILE")
    for name in (first, second):
        if str(name) in POCKET_MODELS and not Path(str(name)).exists():
            raise ConfigError(
                f"{name} is a model, not a run; `base` stands for the model of the second run without its adapter: "
                "labeltune compare base RUN --data FILE"
            )


def _check_comparable(first: RunDescription, second: RunDescription) -> None:
    if first.task != second.task:
        raise ConfigError(
            f"{first.name} does {first.task}, {second.name} does {second.task}; they cannot be compared"
        )
    if first.labels and second.labels and not set(first.labels) & set(second.labels):
        some, others = (", ".join(run.labels[:8]) for run in (first, second))
        raise DataError(
            f"{first.name} and {second.name} have no label in common ({some}; {others}); they cannot be compared on the same rows"
        )
    if first.task == "ner" and set(first.labels) != set(second.labels):
        raise DataError(
            f"{first.name} knows the types {', '.join(first.labels)}, {second.name} {', '.join(second.labels)}; they cannot "
            "be compared on the same rows"
        )


def _untuned(model: str | os.PathLike[str] | Predictor) -> bool:
    return str(model) == BASE or is_config(str(model))


def _write(
    folder: Path,
    found: dict[str, Any],
    examples: list[Example],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
) -> None:
    write_json(folder / "comparison.json", found)
    changed = [(how, i) for how in ("gained", "lost") for i in found["changed"][how]]
    rows = [
        {
            "change": how,
            "id": examples[i].id,
            "source": examples[i].source,
            "text": examples[i].text,
            "right": right_answer(examples[i]),
            "first": first[i].to_dict(),
            "second": second[i].to_dict(),
        }
        for how, i in changed
    ]
    write_jsonl(folder / "changed.jsonl", rows)
    write_text(folder / "comparison.html", comparison_page(found, examples, first, second))


def _print_differences(found: dict[str, Any]) -> None:
    """One line a figure on standard error, for people."""
    print(f"rows: {rows_line(found)}", file=sys.stderr)
    for name, d in found["differences"].items():
        change = d["difference"]
        if change["low"] == change["high"] == 0:
            print(
                f"{name}: {d['first']:.3f} -> {d['second']:.3f}, no row makes a difference", file=sys.stderr
            )
            continue
        print(
            f"{name}: {d['first']:.3f} -> {d['second']:.3f}, {change['value']:+.3f} "
            f"(95 % interval {change['low']:+.3f} to {change['high']:+.3f}, p = {d['p_value']:.2g})",
            file=sys.stderr,
        )
        if point_apart(d):
            print(
                f"{name}: interval (bootstrap) and p (McNemar's test) disagree here; more rows would tell",
                file=sys.stderr,
            )
    if (floor := floor_line(found)) is not None:
        print(f"floor: {floor}", file=sys.stderr)
    changed = found["changed"]
    print(
        f"rows that only the second model has right: {len(changed['gained'])}, only the first: {len(changed['lost'])}",
        file=sys.stderr,
    )
