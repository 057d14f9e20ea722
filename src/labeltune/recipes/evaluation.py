"""Measuring a run, and asking it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from labeltune.config import DataConfig, GenerationConfig, HubConfig, RunConfig, TaskName, load_config
from labeltune.data.loading import Rows, load_rows, load_splits
from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.headline import SELECTION
from labeltune.evaluation.metrics import classification_metrics
from labeltune.evaluation.report import report_page
from labeltune.evaluation.slices import slices
from labeltune.evaluation.spans import entity_dictionary, ner_metrics
from labeltune.recipes.selection import count_selection
from labeltune.run_folder import RunInfo, write_json, write_text
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor


def evaluate(
    run: str | os.PathLike[str] | Predictor,
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
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    predictions: Sequence[Prediction] | None = None,
) -> dict[str, Any]:
    """Measure a run on labelled rows.

    Args:
        run: a run folder, a checkpoint, a config file (`.yaml`): the untuned model with that prompt; or a predictor, which is
            left open and is for the local engine.
        data: labelled file or hub data set.
        base: switch the run's adapter off and measure the untuned model.
        on_error: `stop` or `skip` faulty rows.
        output: folder for `metrics.json`, `predictions.jsonl` and `report.html`.
        overrides: `key=value` changes when `run` is a config file.
        train_data: training rows for the dictionary baseline of NER.
        decoding: `exact` or `free`; the run's own when None.
        engine: `ray` predicts on Ray Data; figures are those of `local` up to rounding of probabilities.
        workers: models that `ray` loads; one a GPU, or one a machine without GPUs, when None.
        address: a Ray cluster; this machine when None.
        predictions: what `run` answered to these rows, in their order; it is not asked again.

    Raises:
        ConfigError: `calibrate.prior=batch` on Ray: it needs all rows at once.
        DataError: the rows have faults (with `on_error="stop"`), or none is usable.
        ModelError: there is no such run.
    """
    name = name_of(run)
    changes = {} if decoding is None else {"decoding": decoding}
    with contextlib.ExitStack() as stack:
        if engine == "local":
            predictor, data_config, hub = stack.enter_context(opened(run, overrides))
            predictor.change(**changes)
            about_run = RunDescription(
                predictor.task.name,
                predictor.task.labels,
                data_config,
                hub,
                predictor.generation,
                predictor.weights,
            )
        else:
            about_run = describe_run(name, overrides, changes)
        task, labels = about_run.task, about_run.labels
        rows = labelled_rows(task, data, about_run.data, about_run.hub, on_error, max_rows)
        examples = [rows.example(i) for i in range(len(rows.dataset))]
        advance = stack.enter_context(row_bar(len(examples), progress and predictions is None))
        if predictions is None and engine == "local":
            stack.enter_context(predictor.base_model() if base else contextlib.nullcontext())
            predictions = predictor.predict(examples, on_batch=advance)
        elif predictions is None:
            from labeltune.recipes.spreading import answer_spread

            predictions = answer_spread(name, overrides, base, changes, examples, workers, address, advance)
    used = {"decoding": about_run.generation.decoding}
    dictionary = None
    if train_data is not None and task == "ner":
        known = load_rows(train_data, task, about_run.data, about_run.hub)
        dictionary = entity_dictionary([known.example(i) for i in range(len(known.dataset))])
    about = {
        "run": name,
        "base": base,
        **used,
        "data": data,
        **_what_rows_are(about_run.weights, examples),
    }
    metrics = all_metrics(about, examples, predictions, labels, dictionary)
    if rows.audit.errors:
        metrics["skipped"] = dict(rows.audit.counts)
    if output is not None:
        write_evaluation(Path(output), metrics, examples, predictions)
    return metrics


def all_metrics(
    about: dict[str, Any],
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    labels: Sequence[str],
    dictionary: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What is reported of labelled rows and their predictions, behind `about`."""
    if examples[0].entities is None:
        found = {"task": "classification", **classification_metrics(examples, predictions, labels)}
    else:
        found = {"task": "ner", **ner_metrics(examples, predictions, dictionary)}
    return {**about, **found, "slices": slices(examples, predictions)}


def write_evaluation(
    folder: Path, metrics: dict[str, Any], examples: Sequence[Example], predictions: Sequence[Prediction]
) -> None:
    """Write `metrics.json`, `predictions.jsonl` and `report.html`."""
    write_json(folder / "metrics.json", metrics)
    lines = [
        json.dumps(_evaluated_row(e, p), ensure_ascii=False)
        for e, p in zip(examples, predictions, strict=True)
    ]
    write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    write_text(folder / "report.html", report_page(metrics, examples, predictions))


def _what_rows_are(weights: Path | None, examples: Sequence[Example]) -> dict[str, Any]:
    """`rows_are`: test rows, or rows that this run's checkpoint and temperature were chosen on, as soon as one is."""
    folder = weights.parent if weights is not None else None
    seen = count_selection(folder, (example.text for example in examples))
    return {"rows_are": SELECTION, "selection_rows": seen} if seen else {"rows_are": "test"}


def labelled_rows(
    task: TaskName,
    data: str,
    data_config: DataConfig,
    hub: HubConfig | None,
    on_error: str,
    max_rows: int | None,
) -> Rows:
    """Load rows to measure on.

    Raises:
        DataError: the rows have faults (with `on_error="stop"`), or none is usable.
    """
    rows = load_rows(data, task, data_config, hub, max_rows=max_rows)
    if rows.audit.errors and on_error != "skip":
        shown = "\n  ".join(str(f) for f in rows.audit.faults if f.severity == "error")
        raise DataError(
            f"the data holds {rows.audit.errors} errors:\n  {shown[:2000]}\nRepair them, or evaluate with --on-error skip"
        )
    if not rows.audit.usable:
        raise DataError(f"{rows.audit.path} holds no usable row")
    return rows


@dataclass(frozen=True)
class RunDescription:
    """What measuring has to know of a run, beside its answers.

    Attributes:
        data: how its rows are read.
        weights: file that tells its weights from others.
    """

    task: TaskName
    labels: tuple[str, ...]
    data: DataConfig
    hub: HubConfig | None
    generation: GenerationConfig
    weights: Path | None


def describe_run(
    run: str | os.PathLike[str], overrides: Sequence[str], changes: Mapping[str, Any]
) -> RunDescription:
    """Of a run, or of the untuned model of a config file; no weights are loaded.

    Raises:
        ConfigError: a change is not possible, or its answers depend on all rows at once.
    """
    from labeltune.inference.load import checkpoint_of, weights_file
    from labeltune.inference.predictor import changed_generation

    weights: Path | None = None
    hub: HubConfig | None = None
    if Path(run).suffix in {".yaml", ".yml"}:
        config = load_config(run, overrides)
        task, labels, data, hub = config.task, _labels_of(config), config.data, config.hub
        generation, calibrate = config.generation, config.calibrate
    else:
        folder = checkpoint_of(run)
        info = RunInfo.load(folder)
        task, labels, generation, calibrate = info.task, info.labels, info.generation, info.calibrate
        data = DataConfig(labels=labels if task == "ner" else None, columns=info.columns)
        weights = weights_file(folder, info)
    if calibrate.prior == "batch":
        raise ConfigError(
            "calibrate.prior=batch looks at all rows at once; measure this run with the local engine"
        )
    return RunDescription(task, labels, data, hub, changed_generation(generation, changes), weights)


def _labels_of(config: RunConfig) -> tuple[str, ...]:
    if config.data.labels is not None:
        return config.data.labels
    return load_splits(config.task, config.data, config.hub, config.training.seed).labels


def predictor_of(
    run: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Predictor, DataConfig, HubConfig | None]:
    """The predictor of a run, or of the untuned model of a config file, with how its data is read."""
    from labeltune.inference.load import base_predictor, load_predictor

    if Path(run).suffix in {".yaml", ".yml"}:
        config = load_config(run, overrides)
        return base_predictor(config, _labels_of(config)), config.data, config.hub
    predictor = load_predictor(run)
    return predictor, _data_of(predictor), None


@contextlib.contextmanager
def opened(
    run: str | os.PathLike[str] | Predictor, overrides: Sequence[str] = ()
) -> Iterator[tuple[Predictor, DataConfig, HubConfig | None]]:
    """As `predictor_of`, for as long as the context lasts; a predictor that is given is left open, and as it was."""
    from labeltune.inference.predictor import Predictor

    if not isinstance(run, Predictor):
        predictor, data, hub = predictor_of(run, overrides)
        with predictor:
            yield predictor, data, hub
        return
    generation = run.generation
    try:
        yield run, _data_of(run), None
    finally:
        run.generation = generation


def _data_of(predictor: Predictor) -> DataConfig:
    labels = predictor.task.labels if predictor.task.name == "ner" else None
    return DataConfig(labels=labels, columns=predictor.columns)


def name_of(run: str | os.PathLike[str] | Predictor) -> str:
    """What a run is called in reports: its path, or that of the checkpoint a predictor was loaded from."""
    if isinstance(run, str | os.PathLike):
        return str(run)
    return str(run.weights.parent) if run.weights is not None else run.source


def _evaluated_row(example: Example, prediction: Prediction) -> dict[str, Any]:
    right = right_answer(example)
    return {**prediction.to_dict(), "text": example.text, "right": right, "source": example.source}


def right_answer(example: Example) -> Any:
    """The right label, or the right entities, JSON-ready."""
    if example.entities is None:
        return example.label
    return [entity.to_dict() for entity in example.entities]


@contextlib.contextmanager
def row_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
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
    with load_predictor(run) as predictor, row_bar(len(rows), progress) as advance:
        return predictor.predict(rows, labels, on_batch=advance)
