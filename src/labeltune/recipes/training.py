"""Fine-tuning: from a config to checkpoints, the best of them measured and shown."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.data.loading import Splits, load_splits
from labeltune.errors import Interrupted, MissingExtraError
from labeltune.evaluation.headline import SELECTION, headline
from labeltune.folder_lock import alone_with
from labeltune.progress import begin, no_long_silence, row_progress, tell
from labeltune.ranks import is_sharded, rank
from labeltune.recipes.data import without_too_long
from labeltune.recipes.evaluation import all_metrics, write_evaluation
from labeltune.recipes.rows import (
    fixed_handful,
    prediction_text,
    report_splits,
    summarize,
    validation_rows,
    warn_of_rows,
)
from labeltune.recipes.selection import TRAINING_FILE, hashes_file, save_selection
from labeltune.run_files import remove_half_checkpoints
from labeltune.run_folder import check_output, remove_checkpoints, remove_leftovers
from labeltune.tasks import make_task
from labeltune.tasks.builder import PromptBuilder
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
    from labeltune.tracking.swanlab import SwanlabTracker
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
    _check_tracker(config)
    if rank() == 0:
        remove_half_checkpoints(Path(config.output_dir))
    resume_from = check_output(config, resume, overwrite, say)
    if rank() == 0:
        remove_leftovers(Path(config.output_dir))
    begin("checking the rows")
    loaded = load_splits(config.task, config.data, config.hub, config.training.seed)
    report_splits(loaded, say)
    if resume_from is not None:
        check_unchanged(resume_from, config, loaded, summarize(config, loaded))

    begin("loading libraries and the tokenizer")
    from transformers import set_seed

    from labeltune.inference.predictor import Predictor
    from labeltune.modeling.hub import load_model, load_tokenizer, resolve_model
    from labeltune.modeling.lora import attach_adapter
    from labeltune.modeling.precision import pick_precision
    from labeltune.prompts.template import ChatTemplate
    from labeltune.run_folder import RunInfo
    from labeltune.training.callbacks import ShowPredictions
    from labeltune.training.dataset import tokenize_rows
    from labeltune.training.preflight import check_feasible
    from labeltune.training.run import run_training

    full = config.training.method == "full"
    main_process = rank() == 0
    local = resolve_model(config.model, config.hub)
    trust = config.hub.trust_remote_code
    tokenizer = load_tokenizer(local.folder, trust)
    template = ChatTemplate(tokenizer)
    task = make_task(config.task, loaded.labels, config.prompt)
    builder = PromptBuilder(task, template)
    splits = without_too_long(loaded, builder, config, say)
    measured = validation_rows(splits, config.eval.max_rows)
    warn_of_rows(config, splits, measured, say)
    if resume_from is not None:
        rows = len(splits.train)
        ended = finished_run(resume_from, config, rows, splits.validation is not None)
        if ended is not None:
            say(nothing_left(ended, config, rows))
            return _result_of(ended, Path(config.output_dir))
    workers = config.data.workers
    begin("tokenizing the rows")
    train_tokens, account = tokenize_rows(splits.train, builder, workers)
    validation_tokens = (
        tokenize_rows(splits.validation, builder, workers)[0] if splits.validation is not None else None
    )
    say(
        f"tokens: {account.tokens} in {account.rows} rows, {account.answer_tokens} of them answers; "
        f"{account.shortened} texts were shortened to fit prompt.max_length={config.prompt.max_length}"
    )
    if account.cut_entities:
        say(
            f"warning: {account.cut_entities} entities stand in text that was cut away but are still asked for; "
            "raise prompt.max_length"
        )

    set_seed(config.training.seed)
    precision = pick_precision(config.training.precision, full=full)
    check_feasible(config, precision, local.folder, len(train_tokens), validation_tokens is not None)
    begin("loading the model", say)
    quantized = config.training.method == "qlora"
    model = load_model(local.folder, precision.weights, trust_remote_code=trust, four_bit=quantized)
    if not full:
        model = attach_adapter(model, config.lora, quantized=quantized)
    trained, total = _count_parameters(model)
    say(
        f"model: {config.model}, {total:,} weights, {trained:,} trained ({precision.name} on {precision.device})"
    )

    info = RunInfo.of(config, splits.labels, tokenizer.chat_template, summarize(config, splits))
    tracker = _start_tracker(config, splits, main_process, resume_from, say)
    callbacks: list[Any] = [tracker.callback()] if tracker is not None else []
    predictor = Predictor(
        model, task, template, config.generation, calibrate=config.calibrate, source=config.model
    )
    predictor.share = True

    shown = fixed_handful(splits, config.swanlab.prediction_rows)
    if config.tracking == "swanlab" and shown:

        def show(step: int, when: str) -> None:
            begin(f"predicting {len(shown)} rows for the board: {when}", say)
            predictions = predictor.predict(shown)
            if tracker is None:
                return
            tracker.log_predictions(
                step,
                [
                    (prediction_text(e, p, task.target(e)), f"{when}, row {e.id}")
                    for e, p in zip(shown, predictions, strict=True)
                ],
            )

        callbacks.append(ShowPredictions(show))
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
            callbacks=callbacks,
            resume_from=resume_from,
            say=say,
            where=lambda number: str(splits.train[number]["source"]),
            validate=Validate(predictor, measured) if measured else None,
            files=files,
            go_on=f"{command} --resume" if command is not None else None,
        )
        if measured:
            _finish(predictor, result, config, splits, measured, tracker, say)
    except BaseException as error:
        if tracker is not None:
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
    if tracker is not None:
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
        with row_progress(len(self.rows), "validation", alone, last_line=False) as advance:
            return headline(self.rows, self.predictor.predict(self.rows, on_batch=advance))


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
        f"next: labeltune evaluate {run} --data {rows}",
        f'      labeltune predict {run} --text "..."',
        f"      labeltune serve {run}",
    ]


def _finish(
    predictor: Predictor,
    result: TrainResult,
    config: RunConfig,
    splits: Splits,
    measured: Sequence[Example],
    tracker: SwanlabTracker | None,
    say: Say,
) -> None:
    """With the best checkpoint's weights: fit a temperature, remember the rows that chose, and report on them."""
    from labeltune.inference.calibrate import calibrate, calibration_figures
    from labeltune.inference.load import load_predictor
    from labeltune.modeling.lora import restore_adapter
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
        if tracker is not None:
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
    if tracker is not None:
        tracker.log_charts(metrics, measured, predictions, result.steps)


def _check_tracker(config: RunConfig) -> None:
    if config.tracking in ("wandb", "tensorboard") and importlib.util.find_spec(config.tracking) is None:
        raise MissingExtraError(f"tracking={config.tracking}", config.tracking)


def _count_parameters(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _start_tracker(
    config: RunConfig, splits: Splits, main_process: bool, resumed: Path | None, say: Say
) -> SwanlabTracker | None:
    if config.tracking != "swanlab" or not main_process:
        return None
    from labeltune.tracking.swanlab import SwanlabTracker

    run_config = {
        "labeltune": config.model_dump(mode="json"),
        "labels": list(splits.labels),
        "train_rows": len(splits.train),
        "validation_rows": 0 if splits.validation is None else len(splits.validation),
    }
    tracker = SwanlabTracker(config.swanlab, run_config, Path(config.output_dir), resumed)
    tracker.start()
    if tracker.started and tracker.mode == "local":
        say(
            f"SwanLab: local run in {config.swanlab.log_dir}; watch it with: labeltune board {config.swanlab.log_dir}"
        )
    elif tracker.started:
        say(f"SwanLab: {tracker.mode} run in project {config.swanlab.project}")
    return tracker
