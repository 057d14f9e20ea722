"""`labeltune train`: from a config to checkpoints, the best of them measured and shown."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, ParamSpec, TypeVar

import typer

from labeltune.commands.evaluate import all_metrics, write_evaluation
from labeltune.commands.folds import train_with_folds
from labeltune.commands.learning_curve import figures_of, parts_of_run
from labeltune.commands.options import AsJson, Overrides, OverwriteRun, ResumeTraining
from labeltune.commands.plan import print_costs
from labeltune.commands.preparing import (
    first_rows,
    fixed_handful,
    guess_task,
    load_for_training,
    named_task,
    prepare,
    read_rows,
    reading_config,
    summarize,
    tell_on_main,
    tokenize_splits,
)
from labeltune.commands.row_hashes import Seen, hashes_file, save_selection
from labeltune.config import RunConfig, load_config
from labeltune.data.columns import tells_task
from labeltune.data.loading import Splits
from labeltune.default_prompts import CHINESE_PROMPTS, ENGLISH_PROMPTS
from labeltune.distributed import is_sharded, rank
from labeltune.errors import ConfigError, Interrupted
from labeltune.evaluation.floor import MAX_ROWS, evenly
from labeltune.evaluation.learning_curve import Point, growth, metric_of, point_of, told
from labeltune.evaluation.summary import OUT_OF_FOLD, SELECTION, Evaluation, floor_line, headline
from labeltune.io.lock import alone_with
from labeltune.io.outputs import is_hub_name, remove_leftovers
from labeltune.io.processes import ended_like_ctrl_c
from labeltune.io.progress import Say, begin, no_long_silence, track
from labeltune.io.run_folder import (
    RECORD_FILE,
    TRAINING_FILE,
    VALIDATION_FOLDER,
    base_files,
    check_inputs_kept,
    check_output,
    checkpoints,
    how_to_go_on,
    remove_checkpoints,
    remove_half_checkpoints,
)
from labeltune.models.pocket import check_spec
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.inference.calibration import OutOfFold
    from labeltune.inference.predictor import Predictor
    from labeltune.tracking.base import Tracker
    from labeltune.training.record import TrainResult


P = ParamSpec("P")
T = TypeVar("T")

#: Chinese characters, which Japanese has too.
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
#: Validation rows that a temperature is fitted on, at most.
CALIBRATION_ROWS = 2000
#: Tokens that an entity answer on the board may have, also where the right answers are shorter.
SHORTEST_SHOWN = 32

Config = Annotated[
    str | None,
    typer.Argument(
        help="YAML config; `labeltune init classification` writes one. None is needed with --data."
    ),
]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="Shorthand for data.train=...; enough without a config.")
]
Model = Annotated[str | None, typer.Option(help="Shorthand for model=...")]
License = Annotated[str | None, typer.Option(help="Accept a model's terms by name, e.g. gemma.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what training will cost: time three real steps, and save nothing."),
]
Curve = Annotated[
    bool,
    typer.Option(
        "--learning-curve",
        help="Train on an eighth, a quarter and a half of the rows first, and say what more rows would bring.",
    ),
]
Folds = Annotated[
    int | None,
    typer.Option(
        help="For few rows: train so many times without a part of them first, measure and calibrate on those, then train on all rows.",
        min=2,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(help="Shorthand for task=...; guessed from the columns of --data without a config."),
]


def train_command(
    *,
    config: Config = None,
    overrides: Overrides = None,
    resume: ResumeTraining = False,
    overwrite: OverwriteRun = False,
    dry_run: DryRun = False,
    data: Data = None,
    model: Model = None,
    task: Task = None,
    accept_license: License = None,
    learning_curve: Curve = False,
    folds: Folds = None,
) -> None:
    """Fine-tune a model; checkpoints go to the config's output_dir."""
    loaded, file, command = _config_of(
        config, overrides, data, model=model, task=task, accept_license=accept_license
    )
    if dry_run and (learning_curve or folds):
        raise ConfigError("--dry-run is about one run; leave out --learning-curve and --folds")
    if learning_curve and folds:
        raise ConfigError("--learning-curve and --folds are two things; give one of them")
    if dry_run:
        if resume:
            raise ConfigError("--dry-run is about a whole run; leave out --resume")
        print_costs(loaded, as_json=False)
        return
    check_inputs_kept(loaded, file, overwrite and not resume)
    if learning_curve:
        train_with_curve(loaded, resume=resume, overwrite=overwrite, command=f"{command} --learning-curve")
    elif folds:
        command += f" --folds {folds}"
        train_with_folds(loaded, folds, train, resume=resume, overwrite=overwrite, command=command)
    else:
        train(loaded, resume=resume, overwrite=overwrite, command=command)


def plan_command(
    *,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    data: Data = None,
    model: Model = None,
    task: Task = None,
    accept_license: License = None,
) -> None:
    """Say what training will cost: tokens, memory, hours.

    The same as `labeltune train --dry-run`: everything up to the first step is done, three real steps are timed, and nothing is
    saved.
    """
    loaded, *_ = _config_of(config, overrides, data, model=model, task=task, accept_license=accept_license)
    print_costs(loaded, as_json)


def _config_of(
    config: str | None,
    overrides: Sequence[str] | None,
    data: str | None,
    *,
    model: str | None,
    task: str | None,
    accept_license: str | None,
) -> tuple[RunConfig, str | None, str]:
    """The config that a command line means, its file, and the command that trains with it."""
    changes = list(overrides or [])
    if config is not None and "=" in config and not Path(config).exists():
        changes.insert(0, config)
        config = None
    defaults: list[str] = []
    prompt = how = ""
    if config is None:
        if data is None:
            raise ConfigError(
                "name a config (`labeltune init classification` writes one) or rows: --data FILE"
            )
        defaults, prompt, how = _defaults(data, task, changes)
    elif data is not None:
        changes.append(_change("data.train", data))
    for key, value in (("task", task), ("model", model), ("hub.accept_license", accept_license)):
        if value is not None:
            changes.append(f"{key}={value}")
    loaded = load_config(config, [*defaults, *changes])
    if config is None and rank() == 0:
        print(
            f"no config: task={loaded.task} ({how}), {prompt}, model={loaded.model}, output_dir={loaded.output_dir}",
            file=sys.stderr,
        )
    begins = ["--data", str(data)] if config is None else [config]
    return loaded, config, shlex.join(["labeltune", "train", *begins, *changes])


def _defaults(data: str, task: str | None, changes: list[str]) -> tuple[list[str], str, str]:
    """What stands in for a config: the task, the rows, places named after the file, and a prompt in the language of the rows.

    Returns:
        Changes of config keys; and, for a message, what the prompt is and how the task is known.
    """
    name = Path(data.partition(":")[2] if is_hub_name(data) else data).name.partition(".")[0] or "run"
    reading = reading_config(changes)
    rows = first_rows(data, reading)
    guessed = task or named_task(changes) or guess_task(rows, reading)
    told = any(tells_task(row, reading.data.columns) for row in rows)
    how = "by its columns" if told else "assumed, as no column tells"
    if task is not None or named_task(changes) is not None:
        how = "as --task says" if task is not None else "as task= says"
    found = [
        f"task={guessed}",
        _change("data.train", data),
        _change("output_dir", f"output/{name}"),
        "swanlab.project=labeltune",
    ]
    found += ["training.epochs=auto", "training.learning_rate=auto"]

    def asked(pattern: str) -> bool:
        return any(re.match(rf"\s*{pattern}", change) for change in changes)

    if asked(r"prompt\s*[.=]\s*(system|user|no_entities|\{|$)"):
        return found, "your own prompt", how
    kind: str = guessed
    if guessed == "ner" and asked(r"prompt\.answer\s*=\s*marks\s*$"):
        kind = "ner_marks"
    if guessed == "classification" and asked(r"(prompt\.descriptions|data\.labels\s*=\s*\{)"):
        kind = "candidates"
    if guessed == "classification" and asked(r"prompt\.layout\s*=\s*labels_first"):
        kind = "labels_first"
    if kind == "classification" and len({str(row.get(reading.data.columns.category)) for row in rows}) > 1:
        kind = "candidates"
    chinese = any(_CHINESE.search(str([*row.values()])) for row in rows)
    prompts = (CHINESE_PROMPTS if chinese else ENGLISH_PROMPTS).get(kind, {})
    found += [_change(f"prompt.{key}", text) for key, text in prompts.items()]
    return found, "a Chinese prompt" if chinese else "an English prompt", how


def _change(key: str, text: str) -> str:
    """An override whose value stays this text, whatever YAML would make of it."""
    return f"{key}={json.dumps(text)}"


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = tell_on_main,
    command: str | None = None,
    parts: Sequence[Point] = (),
    unseen: OutOfFold | None = None,
) -> TrainResult:
    """Fine-tune a model as the config says; checkpoints appear under `config.output_dir`.

    Args:
        resume: go on from the last complete checkpoint, with the same rows and config; what may differ (epochs, logging,
            patience ...) is listed in training/record.py. A finished run is left as it is.
        overwrite: delete the checkpoints of an earlier run, once data and model are known to be usable.
        command: the command line that trains, for messages on how to go on; nothing is said about commands when None.
        parts: figures of runs on parts of the rows, for the learning curve in the report.
        unseen: the training rows as models answer them that were not trained on them, in place of validation rows.

    Raises:
        LabeltuneError: any of its kinds; config, data and output folder are checked before weights are loaded.
        Interrupted: Ctrl-C; the message names the checkpoint that was saved.
    """
    if rank() != 0:
        return _train(config, resume, overwrite, say=say, command=command, parts=parts, unseen=unseen)
    folder, writing = Path(config.output_dir), f"another training writes into {config.output_dir}"
    with (
        alone_with(folder / ".lock", writing, "wait for it, or choose another output_dir", tidy=True),
        ended_like_ctrl_c(),
        no_long_silence(say),
    ):
        try:
            return _train(config, resume, overwrite, say=say, command=command, parts=parts, unseen=unseen)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {how_to_go_on(folder, command)}") from None


def train_with_curve(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = tell_on_main,
    command: str | None = None,
) -> TrainResult:
    """Train on an eighth, a quarter, a half and all of the rows, each a run of its own, all validated on the same rows.

    Args:
        config: of the run on all rows; the others are the same but for their rows and their folders.
        resume: parts that are finished are kept, and the one that was stopped goes on.
        overwrite, say, command: as of `train`.

    Raises:
        ConfigError: there are no validation rows, or too few others to cut.
        LabeltuneError: as `train`.
    """
    goes_on = resume and bool(checkpoints(Path(config.output_dir)))
    check_output(config, goes_on, overwrite, say)
    points = []
    for part, size, rows in parts_of_run(config):
        say(f"learning curve: {size} of {rows} rows")
        train(part, resume=resume and bool(checkpoints(Path(part.output_dir))), overwrite=overwrite, say=say)
        points.append(point_of(figures_of(part), metric_of(config), size))
    say("learning curve: all rows")
    return train(config, resume=goes_on, overwrite=overwrite, say=say, command=command, parts=points)


def _train(
    config: RunConfig,
    resume: bool,
    overwrite: bool,
    *,
    say: Say,
    command: str | None,
    parts: Sequence[Point],
    unseen: OutOfFold | None,
) -> TrainResult:
    started, folder = time.monotonic(), Path(config.output_dir)
    check_spec(config.model, config.hub.accept_license)
    resume_from = _checked_folder(config, resume, overwrite, say)
    all_rows = read_rows(config, say)
    from labeltune.training import record

    if resume_from is not None:
        record.check_unchanged(resume_from, config, all_rows, summarize(config, all_rows))
    prepared = prepare(config, all_rows, say, resume_from)
    given, config = config, prepared.config
    splits, builder, selection = prepared.splits, prepared.builder, prepared.selection
    if resume_from is not None:
        rows = len(splits.train)
        reported = splits.validation is not None or unseen is not None
        ended = record.finished_run(resume_from, config, rows, reported)
        if ended is not None:
            say(record.nothing_left(ended, config, rows))
            return ended.result(folder)
    from labeltune.inference.load import predictor_as
    from labeltune.tracking.base import start_tracker
    from labeltune.training.run import run_training

    whole = config.training.method == "full"
    train_tokens, validation_tokens = tokenize_splits(config, splits, builder, say)
    model, tokenizer = load_for_training(prepared, say), builder.template.tokenizer
    predictor = predictor_as(config, model, builder)
    predictor.shares_rows = True
    if prepared.precision.weights != prepared.precision.dtype:
        predictor.engine.weights = prepared.precision.dtype

    tracker = start_tracker(config, splits, resume_from, say)
    shown = fixed_handful(splits, config.swanlab.prediction_rows) if config.tracking != "none" else []
    if rank() == 0:
        if overwrite and not resume:
            remove_checkpoints(config.output_dir)
        (folder / record.FINISHED_FILE).unlink(missing_ok=True)
    validate = _Timed(Validate(predictor, selection))
    show = _Timed(ShowOnBoard(predictor, shown, tracker, say))
    try:
        result = run_training(
            model,
            tokenizer,
            config,
            prepared.precision,
            prepared.info,
            train=train_tokens,
            validation=validation_tokens,
            callbacks=tracker.callbacks(),
            resume_from=resume_from,
            say=say,
            where=prepared.where,
            validate=validate if selection else None,
            files={
                RECORD_FILE: record.run_record(given, all_rows),
                TRAINING_FILE: hashes_file(splits.train_texts),
                **({p.name: p.read_bytes() for p in base_files(prepared.base)} if whole else {}),
            },
            command=command,
            show=show if shown else None,
        )
        finishing = time.monotonic()
        if selection or unseen is not None:
            asked = selection if unseen is None else unseen.examples
            _finish(
                predictor, result, config, splits, asked, tracker=tracker, say=say, parts=parts, unseen=unseen
            )
    except BaseException as error:
        tracker.finish(error)
        raise
    if rank() == 0:
        record.Finished.of(result).save(folder)
    tracker.finish()
    took, best = time.monotonic() - started, result.best
    spent = where_time_went(took, finishing - started, result.seconds, validate.seconds + show.seconds)
    say(f"done in {took:.0f} s ({spent}): {best} -> {best.resolve().name}")
    for line in _next_steps(config) if command is not None else ():
        say(line)
    return result


class _Timed(Generic[P, T]):
    """A function that remembers how long its calls took."""

    def __init__(self, call: Callable[P, T]) -> None:
        self._call, self.seconds = call, 0.0

    def __call__(self, *given: P.args, **named: P.kwargs) -> T:
        """Call it."""
        began = time.monotonic()
        try:
            return self._call(*given, **named)
        finally:
            self.seconds += time.monotonic() - began


def where_time_went(took: float, trained: float, loop: float, validation: float) -> str:
    """Seconds of training, and of each other part that took one at least.

    Args:
        took: the whole run.
        trained: until the best checkpoint was known.
        loop: the training loop.
        validation: the part of the loop in which rows were predicted.

    >>> where_time_went(100.0, 90.0, 50.0, 8.0)
    'training 42 s, loading and checks 40 s, validation 8 s, confidence and report 10 s'
    """
    parts = {
        "loading and checks": trained - loop,
        "validation": validation,
        "confidence and report": took - trained,
    }
    others = [f"{name} {seconds:.0f} s" for name, seconds in parts.items() if seconds >= 1]
    return ", ".join([f"training {loop - validation:.0f} s", *others])


def _checked_folder(config: RunConfig, resume: bool, overwrite: bool, say: Say) -> Path | None:
    """Clear the run folder of what a killed run left; returns the checkpoint to resume from."""
    if rank() == 0:
        remove_half_checkpoints(Path(config.output_dir))
    resume_from = check_output(config, resume, overwrite, say)
    if rank() == 0:
        remove_leftovers(Path(config.output_dir))
    return resume_from


@dataclass(frozen=True)
class Validate:
    """The figures of a validation: the rows are predicted as they are when the model is served."""

    predictor: Predictor
    rows: Sequence[Example]

    def __call__(self) -> dict[str, float]:
        """Figures by name, the same on all processes; all have to ask."""
        # A terminal shows the bar over steps already, and cannot show two.
        alone = rank() == 0 and not sys.stderr.isatty()
        begin(f"predicting {len(self.rows)} validation rows")
        answers = track(
            self.predictor.stream(self.rows), len(self.rows), "validation", alone, last_line=False
        )
        return headline(self.rows, list(answers))


@dataclass(frozen=True)
class ShowOnBoard:
    """The same few rows, predicted again as training goes on; boards cut long texts, so the answer stands first.

    An untrained extractor names entities until it is stopped: here at twice the tokens of the longest right answer.
    """

    predictor: Predictor
    rows: Sequence[Example]
    tracker: Tracker
    say: Say

    def __call__(self, step: int, when: str) -> None:
        """Predict them on all processes; the first one's tracker shows them."""
        begin(f"predicting {len(self.rows)} rows for the board: {when}", self.say)
        kept, target = self.predictor.generation, self.predictor.task.target
        right = (len(self.predictor.template.plain_ids(target(row))) for row in self.rows)
        self.predictor.change(max_new_tokens=min(kept.max_new_tokens, max(SHORTEST_SHOWN, 2 * max(right))))
        try:
            predictions = self.predictor.predict(self.rows)
        finally:
            self.predictor.generation = kept
        texts = [
            f"Prediction:\n{p.answer}\n\nGround truth:\n{target(e)}\n\nDocument:\n{e.text}"
            for e, p in zip(self.rows, predictions, strict=True)
        ]
        captions = [f"{when}, row {example.id}" for example in self.rows]
        self.tracker.log_predictions(step, list(zip(captions, texts, strict=True)))


def _next_steps(config: RunConfig) -> list[str]:
    """Commands for the run that was just trained."""
    run = shlex.quote(config.output_dir)
    rows = shlex.quote(config.data.test) if config.data.test is not None else "FILE"
    return [
        "go on with:",
        f"  labeltune evaluate {run} --data {rows}",
        f'  labeltune predict {run} --text "..."',
        f"  labeltune serve {run}",
    ]


def _finish(
    predictor: Predictor,
    result: TrainResult,
    config: RunConfig,
    splits: Splits,
    selection: Sequence[Example],
    *,
    tracker: Tracker,
    say: Say,
    parts: Sequence[Point],
    unseen: OutOfFold | None,
) -> None:
    """With the best checkpoint's weights: fit a temperature, save hashes of the validation rows, and report on them.

    `evaluate` tells by the hashes which of its rows were used for selection.

    Args:
        selection: the rows that are reported on: the validation rows, or those of `unseen`.
        unseen: what models say of the training rows that were not trained on them, where there are no validation rows.
    """
    from labeltune.inference.calibration import calibrate, calibrate_labels, calibration_figures
    from labeltune.inference.load import load_predictor
    from labeltune.models.lora import restore_adapter
    from labeltune.training.sharded import load_weights

    begin("loading the best checkpoint")
    best = result.best.resolve()
    if is_sharded(predictor.model):
        load_weights(predictor.model, best)
    elif config.training.method == "full":
        predictor = load_predictor(best, trust_remote_code=config.hub.trust_remote_code)
        predictor.shares_rows = True
    else:
        restore_adapter(predictor.model, best)
    train = splits.train.select(evenly(len(splits.train), MAX_ROWS))
    known = [Example.from_row(row) for row in train]
    if config.task == "multilabel":
        begin("measuring confidence on the validation rows")
        handful = selection if unseen is not None else fixed_handful(splits, CALIBRATION_ROWS)
        predictor.calibration, _ = calibrate_labels(predictor, handful, best, metric_of(config), say, unseen)
    elif (config.calibrate.temperature or config.calibrate.linear) and config.task == "classification":
        begin("measuring confidence on the validation rows")
        handful = selection if unseen is not None else fixed_handful(splits, CALIBRATION_ROWS)
        beside = known if config.calibrate.linear else []
        calibration, report = calibrate(predictor, handful, best, say, beside, unseen)
        predictor.calibration = calibration
        rows_are = SELECTION if unseen is None else OUT_OF_FOLD
        tracker.log(calibration_figures(report, rows_are), result.steps)
    about = {"run": str(result.best), "base": False, "decoding": predictor.generation.decoding}
    if unseen is not None:
        predictions, known = unseen.answers(predictor), []
        about["data"] = (
            f"training rows, each answered by a model that was not trained on it ({unseen.folds} folds)"
        )
        about |= {"rows_are": OUT_OF_FOLD, "training_rows": 0}
    else:
        begin(f"predicting {len(selection)} validation rows with the best checkpoint", say)
        predictions = predictor.predict(selection)
        about["data"] = "validation rows of the training run"
        about |= Seen(trained=0, selected=len(selection)).to_dict()
    if rank() != 0:
        return
    if splits.validation is not None:
        save_selection(best, splits.validation["text"])
    begin("fitting a linear model on the same rows")
    floor = unseen.floor if unseen is not None else None
    metrics = all_metrics(about, selection, predictions, predictor.task.labels, known, floor)
    if (line := floor_line(metrics)) is not None:
        say(f"floor: {line}")
    if parts:
        metrics["learning_curve"] = growth(metrics, metric_of(config), parts, len(splits.train))
        say(told(metrics["learning_curve"]))
    folder = Path(config.output_dir) / VALIDATION_FOLDER
    write_evaluation(folder, metrics, selection, predictions)
    say(f"report on {about['rows_are']} rows: {folder / 'report.html'}")
    tracker.log_charts(Evaluation(metrics, selection, predictions), result.steps)
