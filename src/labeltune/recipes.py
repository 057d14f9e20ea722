"""Composition root: train, evaluate and predict, each wired in one function that reads from top to bottom."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import DataConfig, RunConfig, load_config
from labeltune.data.loading import Rows, Splits, load_rows, load_splits
from labeltune.errors import DataError, MissingExtraError
from labeltune.evaluation.metrics import classification_metrics, entity_dictionary, ner_metrics
from labeltune.run_folder import check_output, remove_checkpoints, write_json, write_text
from labeltune.tasks import make_task
from labeltune.tasks.builder import PromptBuilder
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor
    from labeltune.prompts.template import ChatTemplate
    from labeltune.tasks.base import Task
    from labeltune.tracking.swanlab import SwanlabTracker
    from labeltune.training.trainer import TrainResult

Say = Callable[[str], None]

#: Validation rows that a temperature is fitted on, at most.
CALIBRATION_ROWS = 2000


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
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
    _check_tracker(config)
    resume_from = check_output(config, resume, overwrite)
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
    from labeltune.training.trainer import run_training

    full = config.training.method == "full"
    main_process = os.environ.get("RANK", "0") == "0"
    local = resolve_model(config.model, config.hub)
    trust = config.hub.trust_remote_code
    tokenizer = load_tokenizer(local.folder, trust)
    template = ChatTemplate(tokenizer)
    task = make_task(config.task, splits.labels, config.prompt)
    builder = PromptBuilder(task, template)
    train_tokens, account = tokenize_rows(splits.train, builder)
    validation_tokens = (
        tokenize_rows(splits.validation, builder)[0] if splits.validation is not None else None
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
    quantized = config.training.method == "qlora"
    model = load_model(local.folder, precision.weights, trust_remote_code=trust, four_bit=quantized)
    if not full:
        model = attach_adapter(model, config.lora, quantized=quantized)
    trained, total = _count_parameters(model)
    say(
        f"model: {config.model}, {total:,} weights, {trained:,} trained ({precision.name} on {precision.device})"
    )

    info = RunInfo.of(config, splits.labels, tokenizer.chat_template)
    tracker = _start_tracker(config, splits, main_process, say)
    callbacks: list[Any] = [tracker.callback()] if tracker is not None else []
    shown = _fixed_handful(splits, config.swanlab.prediction_rows)
    if tracker is not None and shown:
        predictor = Predictor(model, task, template, config.generation, calibrate=config.calibrate)

        def show(step: int, when: str) -> None:
            predictor.engine.forget()
            predictions = predictor.predict(shown)
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
        )
    except BaseException as error:
        if tracker is not None:
            tracker.finish(error)
        raise
    if main_process and config.calibrate.temperature and config.task == "classification":
        from labeltune.inference.calibrate import calibration_figures

        report = _calibrate(model, result.best, task, template, config, splits, say)
        if tracker is not None and report is not None:
            tracker.log(calibration_figures(report), result.steps)
    if tracker is not None:
        tracker.finish()
    say(f"done in {result.seconds:.0f} s: {result.best} -> {result.best.resolve().name}")
    return result


def _calibrate(
    model: Any, best: Path, task: Task, template: ChatTemplate, config: RunConfig, splits: Splits, say: Say
) -> dict[str, Any] | None:
    """Fit a temperature on validation rows with the best checkpoint's weights, and save it there."""
    from labeltune.inference.calibrate import calibrate
    from labeltune.inference.load import load_predictor
    from labeltune.inference.predictor import Predictor
    from labeltune.modeling.lora import restore_adapter

    if splits.validation is None:
        return None
    if config.training.method == "full":
        predictor = load_predictor(best)
    else:
        restore_adapter(model, best)
        predictor = Predictor(model, task, template, config.generation)
    return calibrate(predictor, _fixed_handful(splits, CALIBRATION_ROWS), best.resolve(), say)


def _check_tracker(config: RunConfig) -> None:
    if config.tracking in ("wandb", "tensorboard") and importlib.util.find_spec(config.tracking) is None:
        raise MissingExtraError(f"tracking={config.tracking}", config.tracking)


def _report_splits(splits: Splits, say: Say) -> None:
    held_out = 0 if splits.validation is None else len(splits.validation)
    say(f"data: {len(splits.train)} training rows, {held_out} validation rows, {len(splits.labels)} labels")
    if splits.skipped:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(splits.skipped.items()))
        say(f"data: {splits.skipped_rows} faulty rows were skipped (data.on_error=skip): {reasons}")


def _count_parameters(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _start_tracker(config: RunConfig, splits: Splits, main_process: bool, say: Say) -> SwanlabTracker | None:
    if config.tracking != "swanlab" or not main_process:
        return None
    from labeltune.tracking.swanlab import SwanlabTracker

    run_config = {
        "labeltune": config.model_dump(mode="json"),
        "labels": list(splits.labels),
        "train_rows": len(splits.train),
        "validation_rows": 0 if splits.validation is None else len(splits.validation),
    }
    tracker = SwanlabTracker(config.swanlab, run_config)
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


def _prediction_text(example: Example, prediction: Prediction, target: str) -> str:
    # The board shows the beginning of a text in its table: what was predicted, not the document.
    return f"Prediction:\n{prediction.answer}\n\nGround truth:\n{target}\n\nDocument:\n{example.text}"


def evaluate(
    run: str | os.PathLike[str],
    data: str,
    *,
    base: bool = False,
    on_error: str = "stop",
    max_rows: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    train_data: str | None = None,
    progress: bool = True,
    decoding: str | None = None,
) -> dict[str, Any]:
    """Measure a run on labelled rows.

    Args:
        run: a run folder, a checkpoint, or a config file (`.yaml`): the untuned model with that prompt.
        data: labelled file or hub data set.
        base: switch the run's adapter off and measure the untuned model.
        on_error: `stop` or `skip` faulty rows.
        output: folder for `metrics.json` and `predictions.jsonl`.
        overrides: `key=value` changes when `run` is a config file.
        train_data: training rows for the dictionary baseline of NER.
        decoding: `exact` or `free`; the run's own when None.

    Raises:
        DataError: the rows have faults (with `on_error="stop"`), or none is usable.
        ModelError: there is no such run.
    """
    predictor, data_config, hub = _predictor_of(run, overrides)
    with predictor:
        if decoding is not None:
            predictor.change(decoding=decoding)
        task = predictor.task
        rows = load_rows(data, task.name, data_config, hub, max_rows=max_rows)
        if rows.audit.errors and on_error != "skip":
            shown = "\n  ".join(str(f) for f in rows.audit.faults if f.severity == "error")
            raise DataError(
                f"the data holds {rows.audit.errors} errors:\n  {shown[:2000]}\nRepair them, or evaluate with --on-error skip"
            )
        if not rows.audit.usable:
            raise DataError(f"{rows.audit.path} holds no usable row")
        examples = [rows.example(i) for i in range(len(rows.dataset))]
        with (
            predictor.base_model() if base else contextlib.nullcontext(),
            _bar(len(examples), progress) as advance,
        ):
            predictions = predictor.predict(examples, on_batch=advance)
    if task.name == "classification":
        metrics = classification_metrics(examples, predictions, task.labels)
    else:
        dictionary = None
        if train_data is not None:
            known = load_rows(train_data, task.name, data_config, hub)
            dictionary = entity_dictionary([known.example(i) for i in range(len(known.dataset))])
        metrics = ner_metrics(examples, predictions, dictionary)
    metrics = {
        "run": str(run),
        "base": base,
        "decoding": predictor.generation.decoding,
        "data": data,
        "task": task.name,
        **metrics,
    }
    if rows.audit.errors:
        metrics["skipped"] = dict(rows.audit.counts)
    if output is not None:
        write_json(Path(output) / "metrics.json", metrics)
        lines = [
            json.dumps(_evaluated_row(e, p), ensure_ascii=False)
            for e, p in zip(examples, predictions, strict=True)
        ]
        write_text(Path(output) / "predictions.jsonl", "\n".join(lines) + "\n")
    return metrics


def _predictor_of(run: str | os.PathLike[str], overrides: Sequence[str]) -> tuple[Predictor, DataConfig, Any]:
    """The predictor of a run, or of the untuned model of a config file, with how its data is read."""
    from labeltune.inference.load import base_predictor, load_predictor

    if Path(run).suffix in {".yaml", ".yml"}:
        config = load_config(run, overrides)
        labels = config.data.labels
        if labels is None:
            labels = load_splits(config.task, config.data, config.hub, config.training.seed).labels
        return base_predictor(config, labels), config.data, config.hub
    predictor = load_predictor(run)
    labels = predictor.task.labels if predictor.task.name == "ner" else None
    return predictor, DataConfig(labels=labels, columns=predictor.columns), None


def _evaluated_row(example: Example, prediction: Prediction) -> dict[str, Any]:
    right: Any = example.label
    if example.entities is not None:
        right = [entity.to_dict() for entity in example.entities]
    return {**prediction.to_dict(), "text": example.text, "right": right, "source": example.source}


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over rows on a terminal, a line every few seconds elsewhere."""
    from labeltune.progress import row_progress

    with row_progress(total, "predict", shown) as advance:
        yield advance


def predict(
    run: str | os.PathLike[str],
    texts: Iterable[str | Example],
    labels: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Load a run, answer some texts in order, and let go of the model. For more than one call use `load_predictor`."""
    from labeltune.inference.load import load_predictor

    rows = list(texts)
    with load_predictor(run) as predictor, _bar(len(rows), progress) as advance:
        return predictor.predict(rows, labels, on_batch=advance)


def check_data(
    config_or_task: RunConfig,
    train: str,
    test: str | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
) -> list[Rows]:
    """Audit a training file and, if given, a test file against it: every fault, none of them raised."""
    from labeltune.data.audit import add_duplicates, add_shared

    config = config_or_task
    rows = load_rows(train, config.task, config.data, config.hub, token_counts=token_counts)
    add_duplicates(rows.audit, rows.where)
    if test is None:
        return [rows]
    other = load_rows(test, config.task, config.data, config.hub, token_counts=token_counts)
    add_duplicates(other.audit, other.where)
    add_shared(rows.audit, other.audit, other.where)
    return [rows, other]
