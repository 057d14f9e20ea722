"""Cross-validation: every row is answered by a model that was trained on the others, for `train --folds` and `data check --folds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labeltune.commands.preparing import prepare, read_rows, tell_on_main
from labeltune.config import RunConfig, build_config
from labeltune.data.formats.write import write_rows
from labeltune.data.loading import stratum
from labeltune.distributed import world_size
from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.learning_curve import stratified_order
from labeltune.io.lock import alone_with
from labeltune.io.outputs import write_text
from labeltune.io.progress import Say, begin
from labeltune.io.run_folder import check_output, checkpoints, remove_checkpoints
from labeltune.types import Example

if TYPE_CHECKING:
    from datasets import Dataset

    from labeltune.training.record import TrainResult


@dataclass(frozen=True)
class Fold:
    """A run on all rows but some.

    Attributes:
        config: of the run; its rows are written.
        learned: the rows that it trains on.
        asked: numbers of the others.
    """

    config: RunConfig
    learned: list[Example]
    asked: list[int]


def train_with_folds(
    config: RunConfig,
    count: int,
    train: Callable[..., TrainResult],
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = tell_on_main,
    command: str | None = None,
) -> TrainResult:
    """Train on all rows but a part, for every part, then on all rows; what the first ones say of the rows that they have not seen makes the
    report, and is what confidence is fitted on.

    Args:
        config: of the run on all rows, none of which are held out; the others are the same but for their rows and their folders.
        count: how many parts there are.
        train: of this package.
        resume: folds that are finished are kept, and the one that was stopped goes on.
        overwrite, say, command: as of `train`.

    Raises:
        ConfigError: there are validation rows already, or several processes train.
        DataError: there are too few texts.
        LabeltuneError: as `train`.
    """
    if config.data.validation is not None:
        raise ConfigError(
            "--folds is for runs without validation rows; leave out data.validation, or --folds"
        )
    if world_size() > 1:
        raise ConfigError("--folds trains in one process; start it without torchrun")
    output = Path(config.output_dir)
    goes_on = resume and bool(checkpoints(output))
    check_output(config, goes_on, overwrite, say)
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.0})})
    prepared = prepare(config, read_rows(config, say), say)
    splits = prepared.splits
    folds = folds_of(prepared.config, splits.train, splits.labels, count, output / "folds")
    from labeltune.inference.calibration import OutOfFold
    from labeltune.inference.load import load_predictor
    from labeltune.training.record import FINISHED_FILE, finished_run

    if goes_on and finished_run(checkpoints(output)[-1], prepared.config, len(splits.train), True):
        return train(config, resume=True, say=say, command=command)
    unseen = OutOfFold(count, config.calibrate.linear)
    writing = f"another training writes into {config.output_dir}"
    with alone_with(output / ".lock", writing, "wait for it, or choose another output_dir", tidy=True):
        if overwrite and not resume:
            remove_checkpoints(config.output_dir)
            (output / FINISHED_FILE).unlink(missing_ok=True)
        for number, fold in enumerate(folds, 1):
            say(
                f"fold {number} of {count}: training on {len(fold.learned)} rows, answering {len(fold.asked)}"
            )
            part_goes_on = resume and bool(checkpoints(Path(fold.config.output_dir)))
            part = train(fold.config, resume=part_goes_on, overwrite=overwrite, say=say)
            begin(f"answering {len(fold.asked)} rows", say)
            with load_predictor(part.best, trust_remote_code=config.hub.trust_remote_code) as predictor:
                unseen.add(
                    predictor, fold.learned, [Example.from_row(splits.train[each]) for each in fold.asked]
                )
    say(f"all {len(splits.train)} rows")
    return train(config, resume=goes_on, overwrite=overwrite, say=say, command=command, unseen=unseen)


def folds_of(config: RunConfig, rows: Dataset, labels: Sequence[str], count: int, folder: Path) -> list[Fold]:
    """Runs that leave out a part of the rows each; strata are alike in all, and equal texts stand in one.

    Args:
        config: of a run on all rows.
        rows: as `Example.to_row` has them.
        folder: for the runs, and the files of their rows.

    Raises:
        DataError: there are too few texts, or too few of all labels but one.
    """
    examples = [Example.from_row(row) for row in rows]
    own = _folds([stratum(row) for row in rows.remove_columns("text")], [e.text for e in examples], count)
    found = []
    for fold in range(count):
        learned = [example for example, number in zip(examples, own, strict=True) if number != fold]
        asked = [number for number, each in enumerate(own) if each == fold]
        if not asked or len({each.label for each in learned}) < min(
            2, len({each.label for each in examples})
        ):
            raise DataError(f"{config.data.train} has too few texts for {count} folds; lower --folds")
        found.append(Fold(_part(config, folder / f"fold-{fold + 1}", learned, labels), learned, asked))
    return found


def _folds(strata: Sequence[str], texts: Sequence[str], folds: int) -> list[int]:
    """The fold of each row: strata alike in each, equal texts together."""
    order = stratified_order(strata, 0)
    own = [0] * len(texts)
    for place, number in enumerate(order):
        own[int(number)] = place % folds
    first: dict[str, int] = {}
    return [first.setdefault(text, own[number]) for number, text in enumerate(texts)]


def _part(config: RunConfig, folder: Path, learned: Sequence[Example], labels: Sequence[str]) -> RunConfig:
    """The config of a run on these rows alone."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "train.jsonl", "".join(write_rows(learned)))
    values = config.model_dump()
    values["data"] = {
        "train": str(folder / "train.jsonl"),
        "validation_fraction": 0.0,
        "labels": list(labels),
        "entities": config.data.entities,
        "format": "rows",
        "workers": config.data.workers,
    }
    values["eval"] = {**values["eval"], "metric": "auto", "patience": None}
    return build_config({**values, "output_dir": str(folder / "run"), "tracking": "none"})
