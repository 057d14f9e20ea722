"""`labeltune evaluate`: a run is asked about labelled rows, and its answers are measured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from labeltune.commands.options import Address, Decoding, FiguresAsJson, MaxRows, OnError, Workers
from labeltune.commands.predict import absolute_run, check_engine
from labeltune.commands.row_hashes import rows_seen, training_rows
from labeltune.config import (
    ColumnsConfig,
    DataConfig,
    EntitiesKind,
    GenerationConfig,
    HubConfig,
    RunConfig,
    TaskName,
    changed_generation,
    is_config,
    load_config,
)
from labeltune.data.check import add_unknown_labels, stop_on_errors
from labeltune.data.loading import Rows, load_rows, load_splits
from labeltune.data.records import without_key
from labeltune.data.sources import resolve_data
from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.floor import Floor, floor_figures, floor_of
from labeltune.evaluation.metrics import classification_metrics
from labeltune.evaluation.multilabel import multilabel_metrics
from labeltune.evaluation.report import report_page
from labeltune.evaluation.spans import entity_dictionary, ner_metrics
from labeltune.evaluation.summary import (
    SHOWN_FIRST,
    figure_of_rows,
    floor_line,
    rows_line,
    shown_headline,
    slices,
    worse_than_constant,
)
from labeltune.io.outputs import check_folder, is_hub_name, note_replaced, write_json, write_jsonl, write_text
from labeltune.io.progress import note, phase, track
from labeltune.io.run_folder import EVALUATION_FILES, RunInfo, files_read, find_checkpoint
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

#: Rows that a worker of Ray answers together.
RAY_ROWS = 1024


def evaluate_command(
    *,
    run: Annotated[str, typer.Argument(help="Run folder, checkpoint, or config.yaml (its untuned model).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes when RUN is a config file.", metavar="[KEY=VALUE]...")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Labelled rows; the run's data.test when missing."),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Switch the adapter off: measure the untuned model.")
    ] = False,
    on_error: OnError = "stop",
    max_rows: MaxRows = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="Training rows, for the linear model beside it; the run's own when missing."),
    ] = None,
    decoding: Decoding = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for metrics.json, predictions.jsonl and report.html."),
    ] = None,
    as_json: FiguresAsJson = False,
    engine: Annotated[str, typer.Option(help="local, or ray: on many processes or machines.")] = "local",
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Measure a run on labelled rows.

    A summary goes to standard error. All figures go as JSON to metrics.json with --output, else to standard output unless
    that is a terminal.
    """
    check_engine(engine, workers, address)
    read = [*files_of(run, overrides or [])]
    data = data_to_measure(run, data, overrides or [])
    if output is not None:
        read += [data, *([train_data] if train_data is not None else [])]
        check_folder(output, read, EVALUATION_FILES)
        note_replaced(*(output / name for name in EVALUATION_FILES))
    with phase("loading the model"):
        metrics = evaluate(
            run,
            data,
            base=base,
            on_error=on_error,
            max_rows=max_rows,
            output=output,
            overrides=overrides or [],
            train_data=train_data,
            decoding=decoding,
            engine="ray" if engine == "ray" else "local",
            workers=workers,
            address=address,
        )
    print_summary(metrics)
    print_figures(metrics, output and output / "report.html", as_json)


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
        train_data: training rows for the linear model (of entities also the dictionary) beside it; the run's own, where they still are, when
            None.
        decoding: `exact` or `free`; the run's own when None.
        engine: `ray` predicts on Ray actors; figures are those of `local` up to rounding of probabilities.
        workers: models that `ray` loads; one a GPU, or one a machine without GPUs, when None.
        address: a Ray cluster; this machine when None.
        predictions: what `run` answered to these rows, in their order; it is not asked again.

    Raises:
        ConfigError: `calibrate.prior=batch` on Ray: it needs all rows at once.
        DataError: the rows have faults (with `on_error="stop"`), or none is usable.
        ModelError: there is no such run.
    """
    changes = {} if decoding is None else {"decoding": decoding}
    about_run = describe_run(run, overrides, changes)
    if engine == "ray" and about_run.prior == "batch":
        raise ConfigError(
            "calibrate.prior=batch looks at all rows at once; measure this run with the local engine"
        )
    labels = about_run.labels
    rows = labelled_rows(about_run, data, on_error, max_rows)
    examples = rows.examples()
    if predictions is None:
        if engine == "local":
            asked = _asked(run, overrides, labels, base, changes, examples)
        else:
            name = about_run.name
            asked = _on_ray(name, overrides, base, changes, examples, workers=workers, address=address)
        predictions = list(track(asked, len(examples), shown=progress))
    train = rows_of_training(about_run, train_data)
    about = {
        "run": about_run.name,
        "base": base,
        "decoding": about_run.generation.decoding,
        "data": data,
        **rows_seen([about_run.folder], [e.text for e in examples]).to_dict(),
    }
    metrics = all_metrics(about, examples, predictions, labels, train)
    if rows.audit.errors:
        metrics["skipped"] = rows.audit.error_counts
    if output is not None:
        write_evaluation(Path(output), metrics, examples, predictions)
    return metrics


def all_metrics(
    about: dict[str, Any],
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    labels: Sequence[str],
    train: Sequence[Example] = (),
    floor: Floor | None = None,
) -> dict[str, Any]:
    """What is reported of labelled rows and their predictions, behind `about`.

    Args:
        train: the rows that the model was trained on, for a linear model beside it, unless
        floor: the answers of one are there already.
    """
    if examples[0].labels is not None:
        found = {"task": "multilabel", **multilabel_metrics(examples, predictions, labels)}
    elif examples[0].entities is None:
        found = {"task": "classification", **classification_metrics(examples, predictions, labels)}
    else:
        dictionary = entity_dictionary(train) if train else None
        found = {"task": "ner", **ner_metrics(examples, predictions, dictionary)}
    if floor is None:
        floor = floor_of(train, examples)
    if floor is not None:
        found["floor"] = floor_figures(floor, examples, predictions, found["task"])
        (figure,) = figure_of_rows(examples, floor.predictions, range(len(examples))).values()
        found.setdefault("baselines", {})[floor.kind] = figure
    return {**about, **found, "slices": slices(examples, predictions)}


def rows_of_training(run: RunDescription, train_data: str | None = None) -> Sequence[Example]:
    """The rows that a run was trained on, or those that are said to be; none where they cannot be read again, which is told."""
    if train_data is not None:
        return load_rows(train_data, run.task, run.data, run.hub).examples()
    if run.folder is None:
        return ()
    try:
        return training_rows(run.folder)
    except DataError as error:
        note(f"no linear model beside it: {error}; --train-data FILE names the training rows")
        return ()


def write_evaluation(
    folder: Path, metrics: dict[str, Any], examples: Sequence[Example], predictions: Sequence[Prediction]
) -> None:
    """Write `metrics.json`, `predictions.jsonl` and `report.html`."""
    write_json(folder / "metrics.json", metrics)
    rows = (_evaluated_row(e, p) for e, p in zip(examples, predictions, strict=True))
    write_jsonl(folder / "predictions.jsonl", rows)
    write_text(folder / "report.html", report_page(metrics, examples, predictions))


def labelled_rows(
    run: RunDescription, data: str, on_error: str, max_rows: int | None, *others: RunDescription
) -> Rows:
    """Load rows to measure a run on, and `others` beside it.

    Raises:
        DataError: the rows have faults, or labels that a run cannot answer (with `on_error="stop"`), or none is usable.
    """
    rows = load_rows(data, run.task, run.data, run.hub, max_rows=max_rows, numbered=run.labels)
    unknown: set[int] = set()
    for each in (run, *others):
        whose = f"the labels of {each.name}"
        unknown |= set(add_unknown_labels(rows.audit, rows.answers(), each.labels, whose))
    try:
        stop_on_errors([rows.audit], on_error == "skip", "Repair them, or evaluate with --on-error skip")
    except DataError as error:
        raise error if run.configured else DataError(without_key(str(error))) from None
    rows = rows.without(sorted(unknown))
    if not len(rows.dataset):
        raise DataError(f"{rows.audit.path} holds no usable row")
    return rows


@dataclass(frozen=True)
class RunDescription:
    """What measuring has to know of a run, beside its answers.

    Attributes:
        data: how its rows are read.
        folder: its checkpoint; None for an untuned model.
        configured: it is a config file, whose keys can be changed.
    """

    name: str
    task: TaskName
    labels: tuple[str, ...]
    data: DataConfig
    hub: HubConfig | None
    generation: GenerationConfig
    prior: str
    folder: Path | None
    configured: bool = False


def describe_run(
    run: str | os.PathLike[str] | Predictor,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> RunDescription:
    """Of a run, of the untuned model of a config file, or of a predictor; no weights are loaded.

    Raises:
        ConfigError: a change is not possible.
        ModelError: there is no such run.
    """
    folder: Path | None = None
    hub: HubConfig | None = None
    configured = False
    if not isinstance(run, str | os.PathLike):
        task, labels, generation, calibrate = run.task.name, run.task.labels, run.generation, run.calibrate
        data = _reading(task, labels, run.columns, run.encoding, run.entities)
        data = data.model_copy(update={"format": run.format_name})
        folder = run.weights.parent if run.weights is not None else None
    elif is_config(run):
        config = load_config(run, overrides)
        task, labels, data, hub = config.task, _labels_of(config), config.data, config.hub
        generation, calibrate, configured = config.generation, config.calibrate, True
    else:
        folder = _checkpoint(run)
        info = RunInfo.load(folder)
        task, labels, generation, calibrate = info.task, info.labels, info.generation, info.calibrate
        data = _reading(task, labels, info.columns, info.encoding, info.entities)
        data = data.model_copy(update={"format": info.rows_format, "annotations": info.annotations})
        hub = info.hub
    generation = changed_generation(generation, changes or {})
    name = str(run) if isinstance(run, str | os.PathLike) else str(folder or run.source)
    return RunDescription(name, task, labels, data, hub, generation, calibrate.prior, folder, configured)


def _checkpoint(run: str | os.PathLike[str]) -> Path:
    if not is_hub_name(str(run)):
        return find_checkpoint(run)
    # Loads torch and transformers, which takes seconds; whatever can be wrong with a local run and its rows is said before.
    from labeltune.inference.load import checkpoint_of

    return checkpoint_of(run)


def _reading(
    task: TaskName, labels: tuple[str, ...], columns: ColumnsConfig, encoding: str, entities: EntitiesKind
) -> DataConfig:
    """How the rows of a run are read: entity types by their configured names."""
    known = labels if task == "ner" else None
    return DataConfig(labels=known, columns=columns, encoding=encoding, entities=entities)


def _labels_of(config: RunConfig) -> tuple[str, ...]:
    if config.data.labels is not None:
        return config.data.labels
    return load_splits(config.task, config.data, config.hub, config.training.seed).labels


@contextlib.contextmanager
def opened(
    run: str | os.PathLike[str] | Predictor,
    overrides: Sequence[str] = (),
    labels: Sequence[str] | None = None,
) -> Iterator[Predictor]:
    """The predictor of a run for as long as the context lasts; one that is given is left open, and as it was."""
    if isinstance(run, str | os.PathLike):
        with predictor_of(run, overrides, labels) as predictor:
            yield predictor
        return
    generation = run.generation
    try:
        yield run
    finally:
        run.generation = generation


def predictor_of(
    run: str | os.PathLike[str], overrides: Sequence[str] = (), labels: Sequence[str] | None = None
) -> Predictor:
    """The predictor of a run, or of the untuned model of a config file, whose `labels` are looked for in its data when None."""
    from labeltune.inference.load import base_predictor, load_predictor

    if is_config(run):
        config = load_config(run, overrides)
        return base_predictor(config, labels if labels is not None else _labels_of(config))
    return load_predictor(run)


def _evaluated_row(example: Example, prediction: Prediction) -> dict[str, Any]:
    right = right_answer(example)
    return {**prediction.to_dict(), "text": example.text, "right": right, "source": example.source}


def right_answer(example: Example) -> Any:
    """The right label, labels or entities, JSON-ready."""
    if example.labels is not None:
        return list(example.labels)
    if example.entities is None:
        return example.label
    return [entity.to_dict() for entity in example.entities]


def _asked(
    run: str | os.PathLike[str] | Predictor,
    overrides: Sequence[str],
    labels: Sequence[str],
    base: bool,
    changes: Mapping[str, Any],
    examples: Sequence[Example],
) -> Iterator[Prediction]:
    """Predictions of checked examples, in order, by a model of this process."""
    with opened(run, overrides, labels) as predictor:
        predictor.change(**changes)
        with predictor.base_model() if base else contextlib.nullcontext():
            yield from predictor.stream(examples)


def _on_ray(
    run: str,
    overrides: Sequence[str],
    base: bool,
    changes: dict[str, Any],
    examples: Sequence[Example],
    *,
    workers: int | None,
    address: str | None,
) -> Iterator[Prediction]:
    """Predictions of checked examples, in order; equal to those of this process up to rounding."""
    from labeltune.inference.ray import Cluster, ray_workers

    load = partial(_changed, absolute_run(run), tuple(overrides), changes)
    found: dict[int, list[Prediction]] = {}
    at = 0
    blocks = [_Rows(first, examples[first : first + RAY_ROWS]) for first in range(0, len(examples), RAY_ROWS)]
    with ray_workers(load, Cluster(workers, address)) as work:
        for rows, answers in work(partial(_answers, base), blocks):
            found[rows.first] = answers
            while at in found:
                yield from found[at]
                at += len(found.pop(at))


@dataclass(frozen=True)
class _Rows:
    """Neighbouring examples."""

    first: int
    examples: Sequence[Example]

    def __str__(self) -> str:
        return f"rows {self.first} to {self.first + len(self.examples) - 1}"


def _changed(run: str, overrides: tuple[str, ...], changes: dict[str, Any]) -> Predictor:
    """What a worker of Ray asks."""
    predictor = predictor_of(run, overrides)
    predictor.change(**changes)
    return predictor


def _answers(base: bool, load: Callable[[], Predictor], rows: _Rows) -> list[Prediction]:
    predictor = load()
    with predictor.base_model() if base else contextlib.nullcontext():
        return list(predictor.stream(rows.examples))


def files_of(run: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[str | os.PathLike[str]]:
    """The files and folders that stand for a run, or for the untuned model of a config file.

    Raises:
        ConfigError: the config cannot be used.
        ModelError: there is no such run.
    """
    if is_config(run):
        return [run, *load_config(run, overrides).inputs()]
    return list(files_read(run))


def data_to_measure(run: str | os.PathLike[str], data: str | None, overrides: Sequence[str] = ()) -> str:
    """The labelled rows to measure on: `data`, else the run's own `data.test`; a file of this machine is there.

    Raises:
        ConfigError: the config cannot be used.
        DataError: neither is given, or there is no such file.
        ModelError: there is no such run.
    """
    spec, why = data, ""
    if spec is None:
        spec, why = (
            _test_data_of(run, overrides),
            f" ({run} names it in data.test; --data FILE takes another)",
        )
    if spec is None:
        raise DataError(f"name the labelled rows with --data FILE; {run} was trained without data.test")
    if not is_hub_name(spec):
        try:
            resolve_data(spec)
        except DataError as error:
            raise DataError(f"{error}{why}") from None
    return spec


def _test_data_of(run: str | os.PathLike[str], overrides: Sequence[str]) -> str | None:
    if is_config(run):
        return load_config(run, overrides).data.test
    if is_hub_name(str(run)):
        return None
    found = RunInfo.load(find_checkpoint(run)).data.get("test")
    return found if isinstance(found, str) else None


def print_figures(figures: dict[str, Any], page: Path | None, as_json: bool) -> None:
    """Where the page is; and all figures on standard output: on demand, else for programs that have no file to read them from."""
    if page is not None:
        print(f"report: {page}", file=sys.stderr)
    if as_json or (page is None and not is_terminal()):
        print(json.dumps(figures, ensure_ascii=False, indent=2))


def is_terminal() -> bool:
    """Whether standard output is read by a person."""
    return sys.stdout.isatty()


def print_summary(metrics: dict[str, Any]) -> None:
    """Headline figures on standard error, for people."""
    print(f"rows: {rows_line(metrics)}", file=sys.stderr)
    for key, value in shown_headline(metrics):
        print(f"{key}: {value}", file=sys.stderr)
    if (worse := worse_than_constant(metrics)) is not None:
        print(f"accuracy: {worse}", file=sys.stderr)
    if (floor := floor_line(metrics)) is not None:
        print(f"floor: {floor}", file=sys.stderr)
    figure = SHOWN_FIRST[metrics["task"]][0]
    for name, m in metrics.get("baselines", {}).items():
        print(f"baseline {name}: {figure} {m['value']:.3f}", file=sys.stderr)
    print(f"unparsable answers: {metrics['unparsable']:.1%} of {metrics['rows']} rows", file=sys.stderr)
