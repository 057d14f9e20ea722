"""`labeltune next`: the rows of a pool whose labels are worth most."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from labeltune.commands.options import Encoding, To
from labeltune.commands.row_hashes import known_texts
from labeltune.data.check import text_hash
from labeltune.data.columns import ANSWERS
from labeltune.data.containers import ALIASES
from labeltune.data.formats.write import PREDICTED
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records, resolve_data
from labeltune.errors import ConfigError, DataError, counted, printable
from labeltune.io.outputs import check_file, note_replaced, write_jsonl, write_text
from labeltune.io.progress import begin, phase, row_progress, tell
from labeltune.io.run_folder import files_read, find_checkpoint, validation_file
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.inference.acquisition import By, Candidate
    from labeltune.inference.predictor import Predictor

WAYS = ("margin", "entropy", "metric")


def _known_way(given: str) -> str:
    if given not in WAYS:
        raise ConfigError(f"--by {given}: it is one of {', '.join(WAYS)}")
    return given


def next_command(
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    *,
    pool: Annotated[str, typer.Option(help="Rows without labels, of any format that is read.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="jsonl to write, or JSON with --to.")],
    count: Annotated[int, typer.Option(help="Rows to choose.", min=1)] = 50,
    by: Annotated[
        str,
        typer.Option(
            help="margin: the two best answers are close; entropy: of all answers; metric: margin, times what F1 leaves to gain.",
            callback=_known_way,
        ),
    ] = "margin",
    tell_why: Annotated[bool, typer.Option("--why", help="A line about each row.")] = False,
    to: To = None,
    encoding: Encoding = None,
) -> None:
    """Choose the rows whose labels are worth most.

    Rows that are labelled, or that the run was trained or chosen on, are passed over; so are near-duplicates of a chosen row.
    """
    path = resolve_data(pool)
    check_file(output, [path, *files_read(run)])
    note_replaced(output)
    checkpoint = find_checkpoint(run)
    from labeltune.inference.acquisition import spread, why
    from labeltune.inference.files import version_of
    from labeltune.inference.load import load_predictor
    from labeltune.models.text_vectors import vectors_by

    with phase("loading the model"), load_predictor(run, merge=True) as predictor:
        rows = Pool(path, predictor, known_texts(checkpoint), encoding or predictor.encoding)
        begin("predicting the pool")
        best = _candidates(predictor, rows, count, by, _gains(checkpoint))
        if not best:
            raise DataError(f"{printable(str(path))} holds no row to label; {rows.told()}")
        begin("choosing rows that are unlike each other")
        weights = predictor.model.get_input_embeddings().weight
        vectors = vectors_by(
            lambda ids: weights[ids.tolist()].float().cpu().numpy(), predictor.template.tokenizer
        )
        chosen = spread(best, count, vectors)
        lines = [
            {**each.prediction.to_dict(), "text": each.example.text, "informativeness": round(each.score, 6)}
            for each, _ in chosen
        ]
        if to is not None:
            write_text(output, "".join(PREDICTED[to](lines, version_of(predictor))))
        else:
            write_jsonl(output, lines)
    for each, distance in chosen if tell_why else ():
        print(printable(why(each, distance)))
    tell(f"{printable(str(output))}: {counted(len(chosen), 'row')} to label next; {rows.told()}")


class Pool:
    """The rows of a file that are worth a look.

    Args:
        known: hashes of texts that need no label any more.

    Attributes:
        passed: reason -> rows that were passed over.
        offered: rows that were not.
    """

    def __init__(self, path: Path, predictor: Predictor, known: frozenset[int], encoding: str) -> None:
        self.path, self.predictor, self.known, self.encoding = path, predictor, known, encoding
        self.passed: Counter[str] = Counter()
        self.offered = 0

    def __iter__(self) -> Iterator[Example]:
        from labeltune.inference.files import reading_for, text_columns

        task, predictor = self.predictor.task, self.predictor
        columns = text_columns(
            self.path, task.name, predictor.columns, self.encoding, "--encoding", predictor.format_name
        )
        role = ANSWERS[task.name]
        answers = {getattr(columns, role), *ALIASES[role]} - {columns.text}
        seen = set(self.known)
        for number, record in enumerate(iter_records(self.path, self.encoding, reading_for(predictor))):
            example, _ = parse_record(record, number, task.name, columns, task.labels, answers_required=False)
            if example is None or predictor.fault(example) is not None:
                self.passed["cannot be predicted"] += 1
            elif any((record.values or {}).get(name) not in (None, "") for name in answers):
                self.passed["labelled"] += 1
            elif (text := text_hash(example.text)) in seen:
                self.passed["known to the run, or repeated"] += 1
            else:
                seen.add(text)
                self.offered += 1
                yield example

    def told(self) -> str:
        """What was in the file."""
        passed = "".join(f", {number} passed over: {why}" for why, number in self.passed.items())
        return f"{counted(self.offered, 'row')} in the pool{passed}"


def _candidates(
    predictor: Predictor, rows: Pool, count: int, by: str, gains: dict[str, float]
) -> list[Candidate]:
    from labeltune.inference.acquisition import Candidate, informativeness, most_informative

    def found() -> Iterator[Candidate]:
        asked: deque[Example] = deque()

        def asking() -> Iterator[Example]:
            for example in rows:
                asked.append(example)
                yield example

        with row_progress(None, "predict") as advance:
            for prediction in predictor.stream(asking()):
                advance(1)
                yield Candidate(
                    asked.popleft(), prediction, informativeness(prediction, cast("By", by), gains)
                )

    return most_informative(found(), count)


def _gains(checkpoint: Path) -> dict[str, float]:
    """Label -> 1 - its F1 on the run's validation rows; empty where there are none."""
    file = validation_file(checkpoint, "metrics.json")
    figures = json.loads(file.read_text(encoding="utf-8")).get("labels", {}) if file is not None else {}
    return {label: 1 - each["f1"] for label, each in figures.items()}
