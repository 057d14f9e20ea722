"""Label Studio's ML backend protocol: predictions for a project's own labelling configuration, and training on its annotations.

What Label Studio sends was read off its source (`label_studio/ml/api_connector.py`) and recorded from it; `tests/test_label_studio.py`
keeps the requests.
"""

from __future__ import annotations

import asyncio
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse

from labeltune.config import TaskName
from labeltune.data.formats.write import prediction_of
from labeltune.inference.files import version_of
from labeltune.serve.guard import Receive, log
from labeltune.serve.models import Served
from labeltune.serve.retraining import Retraining, fetch_annotations
from labeltune.serve.schemas import ApiError
from labeltune.serve.service import Service

#: Where Label Studio is connected to.
PREFIX = "/v1/label-studio"
#: Of each task: the control that shows its answers, as people call it.
_CONTROLS: dict[TaskName, str] = {
    "classification": '<Choices choice="single">',
    "multilabel": '<Choices choice="multiple">',
    "ner": "<Labels>",
}
#: Characters that a labelling configuration may have.
_LONGEST = 1_000_000
_BODY = Body()
#: Projects that are remembered.
_PROJECTS = 1000
#: Events after which training starts: the button of the project's page. Annotations that are made one by one start none.
_STARTS = ("START_TRAINING",)


@dataclass(frozen=True)
class Controls:
    """The names in a labelling configuration that predictions refer to.

    Attributes:
        control: of `<Choices>` or `<Labels>`.
        text: of `<Text>`.
        field: of a task's data that holds the document.
        labels: what the control offers; empty where it takes them from the task.
    """

    control: str
    text: str
    field: str
    labels: frozenset[str]

    def names(self, task: TaskName) -> dict[str, str]:
        """As `prediction_of` takes them."""
        return {"labels" if task == "ner" else "choices": self.control, "text": self.text}


def controls_of(configuration: object, task: TaskName) -> Controls:
    """Read a labelling configuration.

    Raises:
        ApiError: it is no XML, or has no control for the task on a text (422).
    """
    if not isinstance(configuration, str) or not configuration.strip():
        raise ApiError(422, "the project has no labelling configuration yet", "label_config")
    if len(configuration) > _LONGEST or "<!" in configuration.replace("<!--", ""):
        raise ApiError(422, "the labelling configuration is no plain XML", "label_config")
    try:
        root = ElementTree.fromstring(configuration)
    except ElementTree.ParseError as error:
        raise ApiError(422, f"the labelling configuration is not XML: {error}", "label_config") from None
    texts = {each.get("name"): each.get("value", "") for each in root.iter("Text")}
    for control in root.iter("Labels" if task == "ner" else "Choices"):
        target = control.get("toName")
        several = control.get("choice") == "multiple"
        if target not in texts or control.get("perRegion") == "true":
            continue
        if task != "ner" and several != (task == "multilabel"):
            continue
        value = texts[target]
        if not value.startswith("$") or control.get("name") is None:
            continue
        offered = frozenset(
            each.get("alias") or each.get("value") or ""
            for each in control.iter("Label" if task == "ner" else "Choice")
        )
        return Controls(str(control.get("name")), str(target), value[1:], offered - {""})
    raise ApiError(
        422,
        f"this model does {task}: the labelling configuration needs {_CONTROLS[task]} on a <Text>",
        "label_config",
    )


@dataclass
class Project:
    """What Label Studio told of a project at `/setup`."""

    hostname: str
    token: str
    configuration: str


class Backend:
    """The protocol of one run of this server.

    Args:
        served: its name.
    """

    def __init__(self, service: Service, served: str, retraining: Retraining) -> None:
        self.service, self._name, self.retraining = service, served, retraining
        self.projects: dict[str, Project] = {}
        self._version: tuple[Served, str] | None = None

    @property
    def served(self) -> Served:
        """The run that answers now."""
        return self.service.models.served[self._name]

    def version(self) -> str:
        """Of the model that answers now."""
        served = self.served
        if self._version is None or self._version[0] is not served:
            self._version = served, version_of(served.predictor, served.name)
        return self._version[1]

    def setup(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A project is connected, or asks again whether it still is.

        Raises:
            ApiError: its labelling configuration does not fit the model (422).
        """
        schema = given.get("schema")
        if isinstance(schema, str) and schema.strip():
            controls_of(schema, self.served.task)
        project = str(given.get("project", ""))
        while len(self.projects) >= _PROJECTS:
            self.projects.pop(next(iter(self.projects)))
        self.projects[project] = Project(
            str(given.get("hostname") or ""), str(given.get("access_token") or ""), str(schema or "")
        )
        return {"model_version": self.version()}

    async def predict(self, given: Mapping[str, Any], receive: Receive) -> dict[str, Any]:
        """A prediction for each task, in order; none for a task without a text.

        Raises:
            ApiError: the request has another form, or texts cannot be answered.
        """
        tasks = given.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise ApiError(422, "tasks must be a list of objects", "tasks")
        served, version = self.served, self.version()
        controls = controls_of(given.get("label_config"), served.task)
        texts = [_text_of(task, controls) for task in tasks]
        asked = [text for text in texts if text.strip()]
        step = self.service.settings.max_rows
        answers = []
        for at in range(0, len(asked), step):
            answers += await self.service.ask(served, asked[at : at + step], receive=receive)
        found = iter(answers)
        results = []
        for text in texts:
            if not text.strip():
                results.append({"model_version": version, "score": 0.0, "result": []})
                continue
            row = {**next(found).prediction.to_dict(), "text": text}
            results.append(_offered(prediction_of(row, version, controls.names(served.task)), controls))
        return {"results": results, "model_version": version}

    async def start_training(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Train on a project's annotations: those that are sent, else those that its server exports. The reason of a refusal is kept for
        `/health` too.

        Raises:
            ApiError: there are none, or they cannot be fetched (409, 422, 502).
        """
        try:
            return {"job": await self._started(given)}
        except ApiError as error:
            self.retraining.refused(str(error))
            raise

    async def _started(self, given: Mapping[str, Any]) -> str:
        name, configuration = self._project_of(given)
        controls = controls_of(configuration, self.served.task)
        tasks: Any = given.get("annotations")
        if not isinstance(tasks, list):
            project = self.projects.get(name)
            if project is None:
                raise ApiError(409, "this server was not told of the project: connect it first", "project")
            number = name.partition(".")[0]
            tasks = await asyncio.to_thread(fetch_annotations, project.hostname, project.token, number)
        return self.retraining.start(tasks, controls.field, controls.control)

    def _project_of(self, given: Mapping[str, Any]) -> tuple[str, str]:
        """(the project's name in `projects`, its labelling configuration)."""
        project = given.get("project")
        if isinstance(project, dict):  # a webhook's, by its number alone
            number = str(project.get("id", ""))
            name = next((known for known in self.projects if known.partition(".")[0] == number), number)
            configuration = project.get("label_config")
        else:
            name, configuration = str(project or ""), given.get("label_config")
        known = self.projects.get(name)
        return name, str(configuration or (known.configuration if known else ""))


def _text_of(task: Mapping[str, Any], controls: Controls) -> str:
    data = task.get("data")
    text = data.get(controls.field) if isinstance(data, dict) else None
    return text if isinstance(text, str) else ""


def _offered(prediction: dict[str, Any], controls: Controls) -> dict[str, Any]:
    """A prediction without labels that the control does not offer; Label Studio cannot show them."""
    if not controls.labels:
        return prediction
    kept = []
    for result in prediction["result"]:
        kind = result["type"]
        labels = [label for label in result["value"][kind] if label in controls.labels]
        if labels:
            kept.append({**result, "value": {**result["value"], kind: labels}})
    return {**prediction, "result": kept}


def add_label_studio(app: FastAPI, backend: Backend) -> None:
    """Its routes, below `PREFIX`."""
    hidden: dict[str, Any] = {"include_in_schema": False}

    def state() -> dict[str, Any]:
        return {
            "status": "UP",
            "model_class": f"labeltune {backend.served.name}",
            "model_version": backend.version(),
            "training": backend.retraining.state(),
        }

    @app.get(PREFIX, **hidden)
    @app.get(f"{PREFIX}/", **hidden)
    @app.get(f"{PREFIX}/health", **hidden)
    async def health() -> dict[str, Any]:
        return state()

    @app.get(f"{PREFIX}/versions", **hidden)
    async def versions() -> dict[str, Any]:
        return {"versions": [backend.version()]}

    @app.post(f"{PREFIX}/setup", **hidden)
    async def setup(given: dict[str, Any] = _BODY) -> dict[str, Any]:
        return backend.setup(given)

    @app.post(f"{PREFIX}/predict", **hidden)
    async def predict(request: Request, given: dict[str, Any] = _BODY) -> dict[str, Any]:
        return await backend.predict(given, request.receive)

    @app.post(f"{PREFIX}/webhook", **hidden)
    async def webhook(given: dict[str, Any] = _BODY) -> JSONResponse:
        action = given.get("action")
        if action not in _STARTS:
            return JSONResponse({"status": "ignored", "action": action})
        found = await backend.start_training(given)
        log("training", job=found["job"])
        return JSONResponse(found, 201)

    @app.post(f"{PREFIX}/train", **hidden)
    async def train(given: dict[str, Any] = _BODY) -> JSONResponse:
        return JSONResponse(await backend.start_training(given), 201)

    @app.post(f"{PREFIX}/job_status", **hidden)
    async def job_status(given: dict[str, Any] = _BODY) -> dict[str, Any]:
        return backend.retraining.job(str(given.get("job", "")))
