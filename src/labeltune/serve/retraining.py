"""Training on a project's annotations while the server answers: one at a time, a queue of one, in a process of its own.

The old model answers until the new one is at least as good on the validation rows.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from labeltune.config import DataConfig, RunConfig, build_config
from labeltune.data.check import text_hash
from labeltune.data.formats.write import write_rows
from labeltune.data.loading import load_rows, load_splits
from labeltune.errors import LabeltuneError, clipped
from labeltune.evaluation.learning_curve import metric_of
from labeltune.evaluation.summary import OUT_OF_FOLD
from labeltune.io.outputs import write_json, write_text
from labeltune.io.run_folder import RECORD_FILE, naming_folder, trained_config, validated_row, validation_file
from labeltune.serve.guard import frames, log
from labeltune.serve.models import Models, Served
from labeltune.serve.schemas import ApiError
from labeltune.types import Example

#: In a run's folder: a folder for each training that was started here.
FOLDER = "label-studio"
#: Fewer annotated texts teach nothing.
FEWEST = 2
#: Seconds for an export of annotations.
_FETCH = 120.0
#: Share of the annotated rows that validate, where the run has no validation rows of its own.
_HELD_OUT = 0.2
#: Jobs whose end is remembered.
_REMEMBERED = 100
#: Lines of a failed training that are kept.
_LAST_LINES = 20


def fetch_annotations(hostname: str, token: str, project: str) -> list[dict[str, Any]]:
    """The annotated tasks of a project, as its server exports them.

    Raises:
        ApiError: the server cannot be asked, or refuses (502).
    """
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[\w./-]*)?", hostname):
        raise ApiError(
            502,
            f"Label Studio told no address of its own: {clipped(hostname, 100)!r}; start it with LABEL_STUDIO_HOST=http://...",
            "hostname",
        )
    base = hostname.rstrip("/")
    try:
        with httpx.Client(timeout=_FETCH) as client:
            headers = {"Authorization": f"Token {token}"}
            if token.count(".") == 2:  # a personal access token, which is exchanged for one of a few minutes
                fresh = client.post(f"{base}/api/token/refresh", json={"refresh": token})
                fresh.raise_for_status()
                headers = {"Authorization": f"Bearer {fresh.json()['access']}"}
            found = client.get(
                f"{base}/api/projects/{int(project)}/export", params={"exportType": "JSON"}, headers=headers
            )
            found.raise_for_status()
            tasks = found.json()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = "; allow legacy tokens in its organization's settings" if status in (401, 403) else ""
        raise ApiError(502, f"Label Studio refuses its annotations with {status}{hint}") from None
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ApiError(
            502,
            f"Label Studio cannot be asked for its annotations at {clipped(base, 100)}, which it told as its own "
            f"address: {clipped(str(error), 200)}; start it with LABEL_STUDIO_HOST=http://... where it listens elsewhere",
        ) from None
    if not isinstance(tasks, list):
        raise ApiError(502, "Label Studio exported no list of tasks")
    return tasks


@dataclass
class Job:
    """A training that was asked for.

    Attributes:
        state: `queued`, `running`, `completed` (the new model answers), `kept` (the old one was better), `failed` or `replaced` (by a
            later one before it began).
        said: what it is doing, or why it ended.
    """

    number: str
    tasks: Sequence[dict[str, Any]]
    text_field: str
    control: str
    state: str = "queued"
    said: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    annotated: int = 0

    def told(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "job": self.number,
            "state": self.state,
            "tasks": self.annotated,
            "said": self.said,
            **self.figures,
        }


class Retraining:
    """Trains in the background and puts better models into a server.

    Args:
        models: of the server.
        name: of the run that is trained.
    """

    def __init__(self, models: Models, name: str) -> None:
        self._models, self._name = models, name
        self._lock = threading.Lock()
        self._jobs: dict[str, Job] = {}
        self._count = 0
        self._running: Job | None = None
        self._next: Job | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def start(self, tasks: Sequence[dict[str, Any]], text_field: str, control: str) -> str:
        """Begin, or wait behind the training that runs; one that was waiting is replaced. Returns the job's number.

        Raises:
            ApiError: there are too few annotated tasks (422), or the run cannot be trained further (409).
        """
        annotated = [task for task in tasks if isinstance(task, dict) and task.get("annotations")]
        if len(annotated) < FEWEST:
            raise ApiError(
                422,
                f"{len(annotated)} tasks are annotated; {FEWEST} are the least to train on",
                "annotations",
            )
        served = self._models.served[self._name]
        _config_of(served)
        with self._lock:
            job = self._noted(Job("", annotated, text_field, control, annotated=len(annotated)))
            if self._running is not None:
                if self._next is not None:
                    self._next.state, self._next.tasks = "replaced", ()
                self._next = job
            else:
                self._begin(job)
        return job.number

    def refused(self, reason: str) -> None:
        """Keep why a training was not begun: Label Studio shows nobody the answer."""
        with self._lock:
            self._noted(Job("", (), "", "", state="failed", said=reason))
        log("training refused", reason=reason)

    def _noted(self, job: Job) -> Job:
        """With a number, and remembered; under the lock."""
        self._count += 1
        job.number = str(self._count)
        self._jobs[job.number] = job
        while len(self._jobs) > _REMEMBERED:
            self._jobs.pop(next(iter(self._jobs)))
        return job

    def _begin(self, job: Job) -> None:
        self._running = job
        threading.Thread(target=self._run, args=(job,), name="labeltune-retraining", daemon=True).start()

    def state(self) -> dict[str, Any]:
        """What runs, or how the last training ended."""
        with self._lock:
            last = self._running or (list(self._jobs.values())[-1] if self._jobs else None)
            waiting = {"waiting": self._next.number} if self._next is not None else {}
            return {**(last.told() if last is not None else {"state": "idle"}), **waiting}

    def job(self, number: str) -> dict[str, Any]:
        """As Label Studio asks for it.

        Raises:
            ApiError: there is no such job (404).
        """
        job = self._jobs.get(number)
        if job is None:
            raise ApiError(404, "there is no such job", "job")
        return {
            "job_status": job.state,
            "error": job.said if job.state == "failed" else "",
            "log": job.said,
            "result": job.figures,
        }

    def close(self) -> None:
        """End what runs."""
        with self._lock:
            self._closed, self._next = True, None
            if self._process is not None:
                self._process.terminate()

    def _run(self, job: Job) -> None:
        try:
            job.state = "running"
            self._train(job)
        except (LabeltuneError, ApiError) as error:
            job.state, job.said = "failed", str(error)
        except Exception as error:
            log("error", error=frames(error))
            job.state, job.said = "failed", type(error).__name__
        job.tasks = ()
        log("training ended", job=job.number, state=job.state, figures=job.figures)
        with self._lock:
            self._running = None
            if self._next is not None and not self._closed:
                following, self._next = self._next, None
                self._begin(following)

    def _train(self, job: Job) -> None:
        served = self._models.served[self._name]
        run = naming_folder(served.folder)
        while run.parent.name == FOLDER:  # a model that was trained here: its folders stand beside each other
            run = run.parent.parent
        numbers = [int(each.name) for each in (run / FOLDER).glob("*") if each.name.isdigit()]
        folder = run / FOLDER / str(max(numbers, default=0) + 1)
        job.said = "reading the annotations"
        config = prepare(served, job, folder)
        write_text(
            folder / "config.yaml",
            yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True, sort_keys=False),
        )
        self._call(job, "train", str(folder / "config.yaml"))
        best = folder / "best"
        old = self._measured(job, config, served.folder, folder / "before")
        new = self._measured(job, config, best, folder / "after")
        job.figures = {"before": old, "after": new}
        if new < old:
            job.state, job.said = "kept", f"the new model in {folder} is not better on the validation rows"
            return
        job.said = "loading the new model"
        self._models.replace(self._name, best.resolve())
        job.state, job.said = "completed", f"{folder} answers"

    def _measured(self, job: Job, config: RunConfig, checkpoint: Path, output: Path) -> float:
        """The figure that picks checkpoints, of a model on the validation rows."""
        rows = str(config.data.validation)
        self._call(job, "evaluate", str(checkpoint), "--data", rows, "-o", str(output), "--on-error", "skip")
        figures = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        value: float = figures[metric_of(config)]["value"]
        return value

    def _call(self, job: Job, *arguments: str) -> None:
        """Run labeltune in a process of its own; its last line is what the job says.

        Raises:
            LabeltuneError: it failed.
        """
        with self._lock:
            if self._closed:
                raise LabeltuneError("the server was stopped")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "labeltune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        process = self._process
        assert process.stderr is not None
        last: deque[str] = deque(maxlen=_LAST_LINES)
        for line in process.stderr:
            if line.strip():
                last.append(line.strip())
                job.said = f"{arguments[0]}: {last[-1]}"
        code = process.wait()
        with self._lock:
            self._process = None
        if code:
            raise LabeltuneError(f"labeltune {arguments[0]} ended with {code}: {last[-1] if last else ''}")


def _config_of(served: Served) -> RunConfig:
    """The config that a run was trained with.

    Raises:
        ApiError: it is not there (409).
    """
    config = trained_config(served.folder)
    if config is None:
        raise ApiError(
            409,
            f"{served.folder.name} does not say how it was trained ({RECORD_FILE}), so it cannot be trained further",
        )
    return config


def prepare(served: Served, job: Job, folder: Path) -> RunConfig:
    """Rows and config of the new run, in its folder: the run's training rows where they are still there, and the annotated ones.

    The run's validation rows stay what they were; without any, a part of the annotated rows validates.

    Raises:
        LabeltuneError: the annotations hold nothing to train on.
    """
    config = _config_of(served)
    export = folder / "export.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(export, list(job.tasks))
    role = {"classification": "output", "multilabel": "labels", "ner": "entities"}[config.task]
    reading = DataConfig(
        format="label-studio",
        columns={"text": job.text_field, role: job.control},
        entities=config.data.entities,
    )  # type: ignore[arg-type]
    annotated = load_rows(str(export), config.task, reading).examples()
    if len(annotated) < FEWEST:
        raise LabeltuneError(f"{len(annotated)} annotated tasks can be used; see {export}")
    trained, validation = _rows_of_run(served, config)
    if not trained:
        job.said = "the run's own training rows are not where they were; training on the annotations alone"
        log("training", job=job.number, note=job.said)
    if not validation:
        at = max(1, round(_HELD_OUT * len(annotated)))
        validation, annotated = annotated[-at:], annotated[:-at]
    held = {text_hash(each.text) for each in validation}
    annotated = [each for each in annotated if text_hash(each.text) not in held]
    again = {text_hash(each.text) for each in annotated}
    again |= held
    rows = [*(each for each in trained if text_hash(each.text) not in again), *annotated]
    labels = dict.fromkeys([*served.labels, *(label for each in rows for label in each.right_names)])
    write_text(folder / "train.jsonl", "".join(write_rows(rows)))
    write_text(folder / "validation.jsonl", "".join(write_rows(validation)))
    values = config.model_dump()
    values["data"] = {
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "labels": list(labels),
        "entities": config.data.entities,
        "format": "rows",
        "on_error": "skip",
    }
    return build_config({**values, "output_dir": str(folder)})


def _figures(predictions: Path) -> dict[str, Any]:
    """The figures beside a file of predictions, where they are there."""
    file = predictions.with_name("metrics.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _rows_of_run(served: Served, config: RunConfig) -> tuple[list[Example], list[Example]]:
    """(training rows, validation rows) of a run; empty where its files have gone."""
    validation: list[Example] = []
    file = validation_file(served.folder, "predictions.jsonl")
    # Of a run with folds, that file holds the training rows.
    if file is not None and _figures(file).get("rows_are") != OUT_OF_FOLD:
        rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        validation = [validated_row(row, config.task, served.labels) for row in rows]
    try:
        splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    except LabeltuneError as error:
        log("training rows", error=str(error))
        return [], validation
    trained = [Example.from_row(row) for row in splits.train]
    if not validation and splits.validation is not None:
        validation = [Example.from_row(row) for row in splits.validation]
    return trained, validation
