"""Fine-tuning: from a config to checkpoints, the best of them measured and shown."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from labeltune.commands.checking import without_too_long
from labeltune.commands.evaluation import all_metrics, write_evaluation
from labeltune.commands.preparing import (
    check_tracker,
    load_for_training,
    load_prompts,
    read_rows,
    tokenize_splits,
)
from labeltune.commands.row_hashes import TRAINING_FILE, hashes_file, save_selection
from labeltune.commands.rows import (
    fixed_handful,
    prediction_text,
    summarize,
    validation_rows,
    warn_of_rows,
)
from labeltune.config import RunConfig
from labeltune.data.loading import Splits
from labeltune.distributed import is_sharded, rank
from labeltune.errors import Interrupted
from labeltune.evaluation.headline import SELECTION, headline
from labeltune.io.lock import alone_with
from labeltune.io.progress import begin, no_long_silence, tell, track
from labeltune.io.run_files import remove_half_checkpoints
from labeltune.io.run_folder import check_output, remove_checkpoints, remove_leftovers
from labeltune.training.record import (
    FINISHED_FILE,
    RECORD_FILE,
    Finished,
    check_unchanged,
    finished_run,
    nothing_left,
    run_record,
)
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor
    from labeltune.tracking.base import Tracker
    from labeltune.training.run import TrainResult

Say = Callable[[str], None]

#: Validation rows that a temperature is fitted on, at most.
CALIBRATION_ROWS = 2000


def _say(line: str) -> None:
    if rank() == 0:
        tell(line)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = _say,
    command: str | None = None,
) -> TrainResult:
    """Fine-tune a model as the config says; checkpoints appear under `config.output_dir`.

    Args:
        resume: go on from the last complete checkpoint, with the same rows and, but for how long to train and what to show,
            the same config. A finished run is left as it is.
        overwrite: delete the checkpoints of an earlier run, once data and model are known to be usable.
        command: the command line that trains, for messages on how to go on; nothing is said about commands when None.

    Raises:
        LabeltuneError: any of its kinds; config, data and output folder are checked before weights are loaded.
        Interrupted: Ctrl-C; the message names the checkpoint that was saved.
    """
    if rank() != 0:
        return _train(config, resume, overwrite, say, command)
    writing = f"another training writes into {config.output_dir}"
    with (
        alone_with(Path(config.output_dir) / ".lock", writing, "wait for it, or choose another output_dir"),
        no_long_silence(say),
    ):
        try:
            return _train(config, resume, overwrite, say, command)
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped outside the training steps; checkpoints saved before are kept"
            ) from None


def _train(config: RunConfig, resume: bool, overwrite: bool, say: Say, command: str | None) -> TrainResult:
    started = time.monotonic()
    check_tracker(config)
    if rank() == 0:
        remove_half_checkpoints(Path(config.output_dir))
    resume_from = check_output(config, resume, overwrite, say)
    if rank() == 0:
        remove_leftovers(Path(config.output_dir))
    loaded = read_rows(config, say)
    if resume_from is not None:
        check_unchanged(resume_from, config, loaded, summarize(config, loaded))

    base, builder = load_prompts(config, loaded.labels)
    from labeltune.inference.predictor import Predictor
    from labeltune.io.run_folder import RunInfo
    from labeltune.models.precision import pick_precision
    from labeltune.tracking.base import start_tracker
    from labeltune.training.preflight import check_feasible
    from labeltune.training.run import run_training

    splits = without_too_long(loaded, builder, config, say)
    measured = validation_rows(splits, config.eval.max_rows)
    warn_of_rows(config, splits, measured, say)
    if resume_from is not None:
        rows = len(splits.train)
        ended = finished_run(resume_from, config, rows, splits.validation is not None)
        if ended is not None:
            say(nothing_left(ended, config, rows))
            return _result_of(ended, Path(config.output_dir))
    train_tokens, validation_tokens = tokenize_splits(config, splits, builder, say)
    main_process = rank() == 0
    task, tokenizer = builder.task, builder.template.tokenizer
    precision = pick_precision(config.training.precision, full=config.training.method == "full")
    check_feasible(config, precision, base, len(train_tokens), validation_tokens is not None)
    model = load_for_training(config, base, precision, say)

    info = RunInfo.of(config, splits.labels, tokenizer.chat_template, summarize(config, splits))
    tracker = start_tracker(config, splits, resume_from, say)
    predictor = Predictor(
        model, task, builder.template, config.generation, calibrate=config.calibrate, source=config.model
    )
    predictor.share = True

    shown = fixed_handful(splits, config.swanlab.prediction_rows)

    def show(step: int, when: str) -> None:
        begin(f"predicting {len(shown)} rows for the board: {when}", say)
        predictions = predictor.predict(shown)
        tracker.log_predictions(
            step,
            [
                (prediction_text(e, p, task.target(e)), f"{when}, row {e.id}")
                for e, p in zip(shown, predictions, strict=True)
            ],
        )

    if main_process:
        if overwrite and not resume:
            remove_checkpoints(config.output_dir)
        (Path(config.output_dir) / FINISHED_FILE).unlink(missing_ok=True)
    files = {RECORD_FILE: run_record(config, loaded), TRAINING_FILE: hashes_file(splits.train_texts)}
    try:
        result = run_training(
            model,
            tokenizer,
            config,
            precision,
            info,
            train=train_tokens,
            validation=validation_tokens,
            callbacks=tracker.callbacks(),
            resume_from=resume_from,
            say=say,
            where=lambda number: str(splits.train[number]["source"]),
            validate=Validate(predictor, measured) if measured else None,
            files=files,
            go_on=f"{command} --resume" if command is not None else None,
            show=show if config.tracking != "none" and shown else None,
        )
        if measured:
            _finish(predictor, result, config, splits, measured, tracker, say)
    except BaseException as error:
        tracker.finish(error)
        raise
    if main_process:
        Finished(
            result.steps,
            result.last.name,
            result.train_loss,
            result.metric_name,
            result.metric,
            result.validation_loss,
            result.unimproved,
        ).save(Path(config.output_dir))
    tracker.finish()
    say(
        f"done in {time.monotonic() - started:.0f} s, {result.seconds:.0f} s of them training: "
        f"{result.best} -> {result.best.resolve().name}"
    )
    if command is not None:
        for line in _next_steps(config):
            say(line)
    return result


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


def _result_of(ended: Finished, output_dir: Path) -> TrainResult:
    """The result of a run that was finished before."""
    from labeltune.training.run import TrainResult

    return TrainResult(
        output_dir / ended.last,
        output_dir / "best",
        ended.steps,
        ended.train_loss,
        ended.metric_name,
        ended.metric,
        ended.validation_loss,
        0.0,
        ended.unimproved,
    )


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
    measured: Sequence[Example],
    tracker: Tracker,
    say: Say,
) -> None:
    """With the best checkpoint's weights: fit a temperature, remember the rows that chose, and report on them."""
    from labeltune.inference.calibrate import calibrate, calibration_figures
    from labeltune.inference.load import load_predictor
    from labeltune.models.lora import restore_adapter
    from labeltune.training.sharded import load_weights

    begin("loading the best checkpoint")
    best = result.best.resolve()
    if is_sharded(predictor.model):
        load_weights(predictor.model, best)
    elif config.training.method == "full":
        predictor = load_predictor(best, trust_remote_code=config.hub.trust_remote_code)
        predictor.share = True
    else:
        restore_adapter(predictor.model, best)
    if config.calibrate.temperature and config.task == "classification":
        begin("measuring confidence on the validation rows")
        calibration, report = calibrate(predictor, fixed_handful(splits, CALIBRATION_ROWS), best, say)
        predictor.calibration = calibration
        tracker.log(calibration_figures(report), result.steps)
    assert splits.validation is not None
    begin(f"predicting {len(measured)} validation rows with the best checkpoint", say)
    predictions = predictor.predict(measured)
    if rank() != 0:
        return
    save_selection(best, splits.validation["text"])
    where = "validation rows of the training run"
    about = {"run": str(result.best), "base": False, "decoding": predictor.generation.decoding, "data": where}
    about |= {"rows_are": SELECTION, "training_rows": 0, "selection_rows": len(measured)}
    metrics = all_metrics(about, measured, predictions, predictor.task.labels)
    folder = Path(config.output_dir) / "validation"
    write_evaluation(folder, metrics, measured, predictions)
    say(f"report on {SELECTION} rows: {folder / 'report.html'}")
    tracker.log_charts(metrics, measured, predictions, result.steps)
