"""Fine-tuning: from a config to checkpoints, the best of them measured and shown."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.data.loading import Splits, load_splits, stratum
from labeltune.errors import MissingExtraError
from labeltune.evaluation.headline import SELECTION, headline
from labeltune.folder_lock import alone_with
from labeltune.progress import row_progress
from labeltune.ranks import is_sharded, rank
from labeltune.recipes.data import without_too_long
from labeltune.recipes.evaluation import all_metrics, write_evaluation
from labeltune.recipes.selection import save_selection
from labeltune.run_folder import check_output, public_name, remove_checkpoints, remove_leftovers
from labeltune.tasks import make_task
from labeltune.tasks.builder import PromptBuilder
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor
    from labeltune.tracking.swanlab import SwanlabTracker
    from labeltune.training.trainer import TrainResult

Say = Callable[[str], None]

#: Validation rows that a temperature is fitted on, at most.
CALIBRATION_ROWS = 2000


def _say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def train(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, say: Say = _say
) -> TrainResult:
    """Fine-tune a model as the config says; checkpoints appear under `config.output_dir`.

    Args:
        resume: go on from the last complete checkpoint.
        overwrite: delete the checkpoints of an earlier run, once data and model are known to be usable.

    Raises:
        LabeltuneError: any of its kinds; config, data and output folder are checked before weights are loaded.
        Interrupted: Ctrl-C; the message names the checkpoint that was saved.
    """
    if rank() != 0:
        return _train(config, resume, overwrite, say)
    writing = f"another training writes into {config.output_dir}"
    with alone_with(Path(config.output_dir) / ".lock", writing, "wait for it, or choose another output_dir"):
        return _train(config, resume, overwrite, say)


def _train(config: RunConfig, resume: bool, overwrite: bool, say: Say) -> TrainResult:
    _check_tracker(config)
    resume_from = check_output(config, resume, overwrite, say)
    if rank() == 0:
        remove_leftovers(Path(config.output_dir))
    splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    _report_splits(splits, say)

    from transformers import set_seed

    from labeltune.inference.predictor import Predictor
    from labeltune.modeling.hub import load_model, load_tokenizer, resolve_model
    from labeltune.modeling.lora import attach_adapter
    from labeltune.modeling.precision import pick_precision
    from labeltune.prompts.template import ChatTemplate
    from labeltune.run_folder import RunInfo
    from labeltune.training.callbacks import ShowPredictions
    from labeltune.training.dataset import tokenize_rows
    from labeltune.training.feasible import check_feasible
    from labeltune.training.trainer import run_training

    full = config.training.method == "full"
    main_process = rank() == 0
    local = resolve_model(config.model, config.hub)
    trust = config.hub.trust_remote_code
    tokenizer = load_tokenizer(local.folder, trust)
    template = ChatTemplate(tokenizer)
    task = make_task(config.task, splits.labels, config.prompt)
    builder = PromptBuilder(task, template)
    splits = without_too_long(splits, builder, config, say)
    workers = config.data.workers
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
    measured = validation_rows(splits, config.eval.max_rows)

    def measure() -> dict[str, float]:
        # A terminal shows the bar over steps already, and cannot show two.
        alone = main_process and not sys.stderr.isatty()
        with row_progress(len(measured), "validation", alone, last_line=False) as advance:
            return headline(measured, predictor.predict(measured, on_batch=advance))

    shown = _fixed_handful(splits, config.swanlab.prediction_rows)
    if config.tracking == "swanlab" and shown:

        def show(step: int, when: str) -> None:
            predictions = predictor.predict(shown)
            if tracker is None:
                return
            tracker.log_predictions(
                step,
                [
                    (_prediction_text(e, p, task.target(e)), f"{when}, row {e.id}")
                    for e, p in zip(shown, predictions, strict=True)
                ],
            )

        callbacks.append(ShowPredictions(show))
    if overwrite and not resume and main_process:
        remove_checkpoints(config.output_dir)
    try:
        result = run_training(
            model,
            tokenizer,
            config,
            precision,
            info,
            train_tokens,
            validation_tokens,
            callbacks,
            resume_from,
            say,
            lambda number: str(splits.train[number]["source"]),
            measure if measured else None,
        )
        if measured:
            _finish(predictor, result, config, splits, measured, tracker, say)
    except BaseException as error:
        if tracker is not None:
            tracker.finish(error)
        raise
    if tracker is not None:
        tracker.finish()
    say(f"done in {result.seconds:.0f} s: {result.best} -> {result.best.resolve().name}")
    return result


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

    best = result.best.resolve()
    if is_sharded(predictor.model):
        load_weights(predictor.model, best)
    elif config.training.method == "full":
        predictor = load_predictor(best, trust_remote_code=config.hub.trust_remote_code)
        predictor.share = True
    else:
        restore_adapter(predictor.model, best)
    if config.calibrate.temperature and config.task == "classification":
        calibration, report = calibrate(predictor, _fixed_handful(splits, CALIBRATION_ROWS), best, say)
        predictor.calibration = calibration
        if tracker is not None:
            tracker.log(calibration_figures(report), result.steps)
    assert splits.validation is not None
    predictions = predictor.predict(measured)
    if rank() != 0:
        return
    save_selection(best, splits.validation["text"])
    where = "validation rows of the training run"
    about = {"run": str(result.best), "base": False, "decoding": predictor.generation.decoding, "data": where}
    about |= {"rows_are": SELECTION, "selection_rows": len(measured)}
    metrics = all_metrics(about, measured, predictions, predictor.task.labels)
    folder = Path(config.output_dir) / "validation"
    write_evaluation(folder, metrics, measured, predictions)
    say(f"report on {SELECTION} rows: {folder / 'report.html'}")
    if tracker is not None:
        tracker.log_charts(metrics, measured, predictions, result.steps)


def _check_tracker(config: RunConfig) -> None:
    if config.tracking in ("wandb", "tensorboard") and importlib.util.find_spec(config.tracking) is None:
        raise MissingExtraError(f"tracking={config.tracking}", config.tracking)


def summarize(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """What a run is trained on, for its model card: names without folders, rows, and training rows (entities) by label."""
    counts: Counter[str] = Counter()
    if config.task == "classification":
        counts.update(splits.train["label"])
    else:
        counts.update(e["label"] for row in splits.train["entities"] for e in row)
    validation = config.data.validation
    return {
        "train": public_name(config.data.train),
        "validation": None if validation is None else public_name(validation),
        "train_rows": len(splits.train),
        "validation_rows": 0 if splits.validation is None else len(splits.validation),
        "labels": dict(counts.most_common()),
    }


def _report_splits(splits: Splits, say: Say) -> None:
    held_out = 0 if splits.validation is None else len(splits.validation)
    say(f"data: {len(splits.train)} training rows, {held_out} validation rows, {len(splits.labels)} labels")
    if held_out > len(splits.train):
        say("warning: there are more validation rows than training rows; are the two files swapped?")
    if splits.skipped:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(splits.skipped.items()))
        say(f"data: {splits.skipped_rows} faulty rows were skipped (data.on_error=skip): {reasons}")


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


def _fixed_handful(splits: Splits, count: int) -> list[Example]:
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


def _prediction_text(example: Example, prediction: Prediction, target: str) -> str:
    # The board shows the beginning of a text in its table: what was predicted, not the document.
    return f"Prediction:\n{prediction.answer}\n\nGround truth:\n{target}\n\nDocument:\n{example.text}"
