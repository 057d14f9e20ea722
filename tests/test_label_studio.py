"""Label Studio's ML backend protocol, with requests as it sends them, and training in the background."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import pytest

import labeltune
from helpers.rows import LABELS, classification_rows, write_jsonl
from helpers.runs import make_run
from helpers.serving import Server, serving
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.serve.label_studio import PREFIX, controls_of
from labeltune.serve.models import Served
from labeltune.serve.retraining import Job, fetch_annotations, prepare
from labeltune.serve.schemas import ApiError

KEY = "a-key-of-these-tests"
CHOICES = (
    '<View><Text name="doc" value="$body"/><Choices name="topic" toName="doc" choice="single">'
    '<Choice value="Sports"/><Choice value="Space"/><Choice value="Art"/></Choices></View>'
)
ENTITIES = '<View><Labels name="ner" toName="doc"><Label value="地点"/></Labels><Text name="doc" value="$text"/></View>'


def test_a_labelling_configuration_is_read() -> None:
    found = controls_of(CHOICES, "classification")
    assert (found.control, found.text, found.field) == ("topic", "doc", "body")
    assert found.labels == {"Sports", "Space", "Art"}
    assert controls_of(ENTITIES, "ner").labels == {"地点"}
    for given, task, part in (
        (ENTITIES, "classification", '<Choices choice="single">'),
        (CHOICES, "multilabel", '<Choices choice="multiple">'),
        ("", "ner", "no labelling configuration yet"),
        ("<View", "ner", "is not XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "ner", "no plain XML"),
        (CHOICES.replace('value="$body"', 'value="fixed"'), "classification", "needs <Choices"),
    ):
        with pytest.raises(ApiError, match=part):
            controls_of(given, task)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, so that it knows its config and its rows."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_for(folder, model_folder, learning_rate=1e-6)
    labeltune.train(config, say=lambda _: None)
    return Path(config.output_dir)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run, "--label-studio", key=KEY) as running:
        yield running


def post(server: Server, path: str, body: Any) -> Any:
    """As Label Studio asks with basic authentication."""
    basic = base64.b64encode(f"any:{KEY}".encode()).decode()
    return server.post(f"{PREFIX}{path}", body, authorization=f"Basic {basic}")


def task(number: int, text: str, label: str | None = None) -> dict[str, Any]:
    result = [{"from_name": "topic", "to_name": "doc", "type": "choices", "value": {"choices": [label]}}]
    annotations = [{"id": number, "was_cancelled": False, "result": result}] if label else []
    return {"id": number, "project": 1, "data": {"body": text}, "annotations": annotations}


PROJECT = "1.1795835000"


def test_the_protocol(server: Server, run: Path) -> None:
    assert server.get(f"{PREFIX}/health").status_code == 401
    wrong = base64.b64encode(b"any:other").decode()
    assert server.get(f"{PREFIX}/health", authorization=f"Basic {wrong}").status_code == 401
    health = server.get(f"{PREFIX}/health", authorization=f"Bearer {KEY}").json()
    assert health["status"] == "UP" and health["training"] == {"state": "idle"}
    setup = {
        "project": PROJECT,
        "schema": CHOICES,
        "hostname": "http://localhost:8080",
        "access_token": "t",
        "extra_params": None,
    }
    found = post(server, "/setup", setup)
    assert found.status_code == 200 and found.json()["model_version"] == health["model_version"]
    refused = post(server, "/setup", {**setup, "schema": ENTITIES})
    assert refused.status_code == 422 and "this model does classification" in refused.text
    texts = ["match number 0 match", " ", "rocket number 1 rocket"]
    asked = {
        "tasks": [task(n, text) for n, text in enumerate(texts)],
        "project": PROJECT,
        "label_config": CHOICES,
        "params": {"login": None, "password": None, "context": None},
    }
    answered = post(server, "/predict", asked)
    assert answered.status_code == 200, answered.text
    first, empty, last = answered.json()["results"]
    with load_predictor(run) as predictor:
        right = predictor.predict([texts[0], texts[2]])
    for one, prediction in zip((first, last), right, strict=True):
        (result,) = one["result"]
        assert (result["from_name"], result["to_name"], result["type"]) == ("topic", "doc", "choices")
        assert result["value"]["choices"] == [prediction.label]
        assert one["score"] == pytest.approx(prediction.confidence, abs=1e-4)
        assert one["model_version"] == health["model_version"]
    assert empty["result"] == []
    fewer = post(
        server,
        "/predict",
        {**asked, "label_config": CHOICES.replace(f'<Choice value="{right[0].label}"/>', "")},
    )
    assert fewer.json()["results"][0]["result"] == [], "what the project does not offer cannot be shown"
    assert post(server, "/webhook", {"action": "ANNOTATION_CREATED"}).json()["status"] == "ignored"
    assert post(server, "/job_status", {"job": "77"}).status_code == 404
    few = post(
        server, "/train", {"annotations": [task(1, "a", "Art")], "project": PROJECT, "label_config": CHOICES}
    )
    assert few.status_code == 422 and "1 tasks are annotated" in few.text
    post(server, "/setup", {**setup, "hostname": "http://127.0.0.1:9"})
    unreachable = post(
        server, "/webhook", {"action": "START_TRAINING", "project": {"id": 1, "label_config": CHOICES}}
    )
    assert unreachable.status_code == 502 and "LABEL_STUDIO_HOST" in unreachable.text
    # Label Studio's page does not show the answer.
    told = server.get(f"{PREFIX}/health", authorization=f"Bearer {KEY}").json()["training"]
    assert told["state"] == "failed" and "at http://127.0.0.1:9" in told["said"]


def ended(server: Server, job: str) -> dict[str, Any]:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        state = post(server, "/job_status", {"job": job}).json()
        if state["job_status"] not in ("queued", "running"):
            return dict(state)
        time.sleep(0.2)
    raise AssertionError("training did not end")


class Export(BaseHTTPRequestHandler):
    """A Label Studio that has annotations."""

    tasks: list[dict[str, Any]]
    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        """The export."""
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        body = json.dumps(self.tasks).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def label_studio() -> Iterator[tuple[str, type[Export]]]:
    rows = classification_rows(24)
    told = [task(n, f"new {row['text']}", row["output"]) for n, row in enumerate(rows)]
    handler = type("Handler", (Export,), {"tasks": told, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_training_starts_from_the_page_and_the_better_model_answers(
    server: Server, run: Path, label_studio: tuple[str, type[Export]]
) -> None:
    address, handler = label_studio
    setup = {
        "project": PROJECT,
        "schema": CHOICES,
        "hostname": address,
        "access_token": "abc",
        "extra_params": None,
    }
    before = post(server, "/setup", setup).json()["model_version"]
    started = post(
        server, "/webhook", {"action": "START_TRAINING", "project": {"id": 1, "label_config": CHOICES}}
    )
    assert started.status_code == 201, started.text
    assert handler.asked == [("/api/projects/1/export?exportType=JSON", "Token abc")]
    job = started.json()["job"]
    # A queue of one: of two that come while one runs, the later waits.
    waiting = [
        post(
            server, "/webhook", {"action": "START_TRAINING", "project": {"id": 1, "label_config": CHOICES}}
        ).json()["job"]
        for _ in range(2)
    ]
    assert post(server, "/job_status", {"job": waiting[0]}).json()["job_status"] == "replaced"
    assert (
        server.get(f"{PREFIX}/health", authorization=f"Bearer {KEY}").json()["training"]["waiting"]
        == waiting[1]
    )
    found = ended(server, job)
    folder = run / "label-studio" / "1"
    assert found["job_status"] in ("completed", "kept"), found
    figures = found["result"]
    assert (found["job_status"] == "completed") == (figures["after"] >= figures["before"])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(row["text"].startswith("new ") for row in rows) == 24 and len(rows) > 24, (
        "the run's own rows stay"
    )
    after = post(server, "/setup", setup).json()["model_version"]
    assert (after != before) == (found["job_status"] == "completed")
    assert after.rpartition("-")[0] == before.rpartition("-")[0], "the name that is served"
    assert ended(server, waiting[1])["job_status"] in ("completed", "kept")
    assert (
        post(
            server, "/predict", {"tasks": [task(1, "match")], "project": PROJECT, "label_config": CHOICES}
        ).status_code
        == 200
    )


def test_validation_rows_keep_their_own_candidates(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    report = copy / "validation" / "predictions.jsonl"
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    lines[0]["ranking"] = [
        pair for pair in lines[0]["ranking"] if pair["label"] in ("Art", lines[0]["right"])
    ]
    write_jsonl(report, lines)
    served = cast(Served, SimpleNamespace(folder=(copy / "best").resolve(), labels=tuple(LABELS)))
    tasks = [task(n, f"new {row['text']}", row["output"]) for n, row in enumerate(classification_rows(4))]
    config = prepare(served, Job("1", tasks, "body", "topic"), tmp_path / "again")
    assert config.data.validation is not None
    told = [
        json.loads(line) for line in Path(config.data.validation).read_text(encoding="utf-8").splitlines()
    ]
    own = [label for label in LABELS if label in ("Art", lines[0]["right"])]
    assert told[0]["category"] == own and "category" not in told[1]


def test_annotations_that_cannot_be_fetched(label_studio: tuple[str, type[Export]]) -> None:
    address, handler = label_studio
    with pytest.raises(ApiError, match="no address of its own"):
        fetch_annotations("ftp://x", "t", "1")
    with pytest.raises(ApiError, match="cannot be asked"):
        fetch_annotations("http://127.0.0.1:9", "t", "1")
    handler.tasks = {"access": "fresh"}  # type: ignore[assignment]
    with pytest.raises(ApiError, match="exported no list"):
        fetch_annotations(address, "a.b.c", "1")
    assert handler.asked[-2:] == [
        ("/api/token/refresh", ""),
        ("/api/projects/1/export?exportType=JSON", "Bearer fresh"),
    ]


def test_a_run_that_does_not_say_how_it_was_trained(model_folder: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bare", model_folder)
    with serving(folder, "--label-studio") as running:
        rows = [task(n, row["text"], row["output"]) for n, row in enumerate(classification_rows(4))]
        found = running.post(
            f"{PREFIX}/train", {"annotations": rows, "project": PROJECT, "label_config": CHOICES}
        )
        assert found.status_code == 409 and "does not say how it was trained" in found.text


RECORDED = json.loads(
    (Path(__file__).parent / "exports" / "label-studio-requests.json").read_text(encoding="utf-8")
)


def test_what_label_studio_itself_sends(run: Path, label_studio: tuple[str, type[Export]]) -> None:
    """Every request that Label Studio sent in a session (tests/label_studio) is answered as it was then, with this model's answers."""
    address, handler = label_studio
    with serving(run, "--label-studio") as running:
        for name, each in RECORDED["choices"].items():
            method, path, *_ = name.split(" ")
            if method == "GET":
                found = running.get(PREFIX + path)
            else:
                body = dict(each["request"])
                body |= {"hostname": address} if "hostname" in body else {}
                found = running.post(PREFIX + path, body)
            assert found.status_code == each["status"], f"{name}: {found.text}"
            assert set(found.json()) == set(each["response"]), name
            if path == "/predict":
                then, now = each["response"]["results"], found.json()["results"]
                assert [set(one) for one in now] == [set(one) for one in then]
                offered = {"Art", "Space", "Sports"}
                chosen = [result for one in now for result in one["result"]]
                assert all(set(result["value"]["choices"]) <= offered for result in chosen)
                assert {result["from_name"] for result in chosen} == {"topic"}
        assert handler.asked == [("/api/projects/1/export?exportType=JSON", "Token a-token")]
        refused = running.post(f"{PREFIX}/setup", RECORDED["entities"]["POST /setup"]["request"])
        assert refused.status_code == 422, "this model gives one label a text"
