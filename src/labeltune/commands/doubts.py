"""`labeltune data check --run` and `--folds`: what a tuned model makes of the answers in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from labeltune.commands.folds import folds_of
from labeltune.commands.row_hashes import rows_seen
from labeltune.config import RunConfig, is_config
from labeltune.data.formats.write import prediction_of, results, row_of
from labeltune.data.loading import Rows
from labeltune.errors import ConfigError
from labeltune.evaluation.label_doubts import Doubt, Judged
from labeltune.io.lock import scratch_folder
from labeltune.io.outputs import check_file, note_replaced, write_json, write_jsonl
from labeltune.io.progress import note, phase, row_progress
from labeltune.io.run_folder import find_checkpoint
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor


@dataclass(frozen=True)
class Judge:
    """Who judges the answers of a file, and where the rows go that are doubtful: as of the options of `data check`."""

    run: str | None
    folds: int | None
    suspects: Path | None
    to: str | None

    def check(self, file: str, more: bool) -> None:
        """Raise what is wrong with the options, before anything is read.

        Args:
            more: more than one file is checked.
        """
        asked = self.run is not None or self.folds is not None
        if self.run is not None and self.folds is not None:
            raise ConfigError("--run and --folds are two ways; give one of them")
        if more and asked:
            raise ConfigError("--run and --folds judge one file")
        if self.folds is not None and not is_config(file):
            raise ConfigError(
                "--folds trains, so it needs a config: labeltune data check CONFIG.yaml --folds 3"
            )
        if self.to not in (None, "label-studio"):
            raise ConfigError(
                f"--to {self.to}: rows to look at are written for label-studio, or as ours without --to"
            )
        if self.suspects is None:
            if self.to is not None:
                raise ConfigError("--to says how --suspects FILE is written; name the file")
            return
        if not asked:
            raise ConfigError("--suspects needs a judge: --run RUN, or --folds 3")
        check_file(self.suspects, [file])
        note_replaced(self.suspects)

    def judged(self, config: RunConfig, rows: Rows) -> list[Judged] | None:
        """The rows as the judge sees them; None where there is none."""
        if self.run is not None:
            with phase("judging the rows"):
                return judged_by_run(self.run, rows)
        return judged_out_of_fold(config, rows, self.folds) if self.folds is not None else None

    def write(self, judged: Sequence[Judged], found: Sequence[Doubt], report: Path | None) -> None:
        """The doubtful rows, and beside a report the loss of every row."""
        if report is not None:
            write_losses(report.with_suffix(".losses.jsonl"), judged)
        if self.suspects is not None:
            write_suspects(self.suspects, judged, found, self.to, self.run or "folds")


def judge(predictor: Predictor, examples: Sequence[Example]) -> Iterator[Judged]:
    """The rows in order, each with the model's answer and its loss."""
    from labeltune.inference.scoring import LabelTrie, Question

    task = predictor.task.name
    predictions = predictor.stream(examples)
    with row_progress(len(examples), "judging") as advance:
        for example, prediction in zip(examples, predictions, strict=True):
            if task == "ner":
                encoded = predictor.builder.training(example)
                start, end = encoded.answer_span
                question = Question(encoded.ids[:start], LabelTrie.of([encoded.ids[start:end]]))
                loss = -predictor.engine.score([question])[0][0]
            else:
                loss = _loss(example, dict(prediction.ranking))
            advance(1)
            yield Judged(example, prediction, loss)


def _loss(example: Example, probabilities: dict[str, float]) -> float:
    """-ln p of the row's label, or of all decisions about its labels."""
    least = 1e-12
    if example.labels is None:
        return float(-numpy.log(max(probabilities.get(example.label or "", 0.0), least)))
    right = [p if label in example.labels else 1 - p for label, p in probabilities.items()]
    return float(-numpy.log(numpy.clip(right, least, 1.0)).sum())


def judged_by_run(run: str, rows: Rows) -> list[Judged]:
    """All usable rows by one run; it is said how many of them trained it, as it knows their answers.

    Raises:
        ConfigError: the run is for another task, or lacks labels of the rows.
    """
    from labeltune.inference.load import load_predictor

    checkpoint = find_checkpoint(run)
    examples = rows.examples()
    with load_predictor(run, merge=True) as predictor:
        if predictor.task.name != rows.audit.task:
            raise ConfigError(
                f"--run {run} is for task={predictor.task.name}, and the rows are for task={rows.audit.task}"
            )
        known = set(predictor.labels)
        foreign = sorted({name for each in examples for name in each.right_names} - known)
        if foreign and not all(each.candidates for each in examples):
            raise ConfigError(
                f"--run {run} does not know {', '.join(map(repr, foreign[:5]))}; train a run on rows with these labels"
            )
        seen = rows_seen([checkpoint], (each.text for each in examples)).trained
        if seen:
            note(
                f"{seen} of {len(examples)} rows trained this run, and it may know their answers by heart; --folds 3 judges every row by a model that has not seen it"
            )
        return list(judge(predictor, examples))


def judged_out_of_fold(config: RunConfig, rows: Rows, count: int) -> list[Judged]:
    """All usable rows, each by a model that was trained on the other folds; equal texts stand in one fold.

    Raises:
        DataError: there are fewer texts than folds.
        LabeltuneError: as `train`.
    """
    from labeltune.commands.train import train
    from labeltune.inference.load import load_predictor

    examples = rows.examples()
    labels = rows.audit.label_set(config.data.labels)
    found: dict[int, Judged] = {}
    folds = folds_of(config, rows.dataset, labels, count, scratch_folder() / "folds")
    for number, fold in enumerate(folds, 1):
        note(f"fold {number} of {count}: training on {len(fold.learned)} rows, judging {len(fold.asked)}")
        result = train(fold.config, overwrite=True)
        with load_predictor(result.best) as predictor:
            judged = judge(predictor, [examples[each] for each in fold.asked])
            found |= dict(zip(fold.asked, judged, strict=True))
    return [found[number] for number in range(len(examples))]


def write_losses(path: Path, judged: Sequence[Judged]) -> None:
    """A line a row: its id, place and loss."""
    write_jsonl(
        path,
        (
            {"id": each.example.id, "where": each.example.source, "loss": round(each.loss, 6)}
            for each in judged
        ),
    )


def write_suspects(
    path: Path, judged: Sequence[Judged], found: Sequence[Doubt], tool: str | None, version: str
) -> None:
    """The doubtful rows: rows of ours with `suggested` and `loss`, or tasks for Label Studio with the answer that stands there as their
    annotation and the model's as their prediction."""
    if tool is None:
        write_jsonl(path, ({**row_of(judged[each.row].example), **each.to_dict()} for each in found))
        return
    write_json(path, [_task(judged[each.row], each, version) for each in found])


def _task(judged: Judged, doubt: Doubt, version: str) -> dict[str, Any]:
    example, row = judged.example, {**judged.prediction.to_dict(), "text": judged.example.text}
    answer = row_of(example)
    given = answer if "entities" in answer else {"labels": answer.get("labels", [example.label])}
    return {
        "data": {"id": example.id, "text": example.text, "where": doubt.where, "loss": round(doubt.loss, 4)},
        "annotations": [{"result": results(example.text, given)}],
        "predictions": [prediction_of(row, version)],
    }
