"""A browser without a network tries the playground: one text, entities, a file, a key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.browsing import chromium
from helpers.rows import classification_rows, read_jsonl, write_jsonl
from helpers.runs import make_run, predictor_for
from helpers.serving import Server, serving
from labeltune import load_predictor
from labeltune.serve.app import create_app
from labeltune.serve.guard import Guard, Metrics
from labeltune.serve.models import Models, Served
from labeltune.serve.settings import Settings
from labeltune.types import Entity


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # Every name but this machine's is unknown to it.
    with chromium("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "news": make_run(folder / "news", model_folder, seed=1),
        "ents": make_run(folder / "ents", model_folder, "ner", seed=3),
        "nested": make_run(
            folder / "nested",
            model_folder,
            "ner",
            seed=4,
            prompt={"answer": "marks", "system": "Mark {labels}.", "user": "{text}"},
            data={"entities": "nested"},
        ),
    }


@pytest.fixture(scope="module")
def server(runs: dict[str, Path]) -> Iterator[Server]:
    others = [f"--adapter={name}={runs[name]}" for name in ("ents", "nested")]
    with serving(runs["news"], *others, playground=True) as running:
        yield running
        assert running.stop() == 0, "a page that is open does not hold up the end"


def holds(outer: Entity, inner: Entity) -> bool:
    """Whether an entity lies within another one, or at the same place."""
    spans = (outer.start, inner.start, inner.end, outer.end)
    assert None not in spans
    return list(spans) == sorted(spans)  # type: ignore[type-var]


def test_a_text_with_marks_inside_marks() -> None:
    from labeltune.serve.playground import marked  # an extra, which takes long to import

    found = [Entity("c", "X", 2, 3), Entity("bc<", "Y", 1, 4), Entity("a", "Z&", 0, 1), Entity("z", "Z")]
    shown = re.sub(r' style="[^"]*"| translate="no"', "", marked("abc<d", found))
    assert shown == (
        '<div><mark data-label="Z&amp;">a<small>Z&amp;</small></mark><mark data-label="Y">b<mark data-label="X">c<small>X</small></mark>'
        "&lt;<small>Y</small></mark>d</div>"
    )
    crossing = [Entity("ab", "X", 0, 2), Entity("bc", "Y", 1, 3)]
    assert 'data-label="Y"' not in marked("abc", crossing)
    assert "<mark" not in marked("abc", [])


def test_a_browser_classifies_extracts_and_uploads(
    browser: Any, server: Server, runs: dict[str, Path], tmp_path: Path
) -> None:
    view = browser.new_page(viewport={"width": 1200, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(server.url)
    view.wait_for_selector("#text textarea")
    with load_predictor(runs["news"]) as predictor:
        (right,) = predictor.predict(["match number 0 match"])
        (own,) = predictor.predict(["match number 0 match"], ["Sports", "Art", "rain"])
    # The keyboard alone: an example of the run's validation rows, then Shift+Enter.
    view.focus("#examples input")
    view.keyboard.press("Enter")
    view.get_by_role("option", name="match number 0 match").wait_for()
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Enter")
    view.wait_for_function("document.querySelector('#text textarea').value.length > 0")
    view.fill("#text textarea", "match number 0 match")
    view.focus("#text textarea")
    view.keyboard.press("Shift+Enter")
    view.wait_for_function("document.querySelector('#latency').innerText.includes('ms')")
    shown = view.inner_text("#probabilities").split("\n")
    order = [line for line in shown if line in ("Sports", "Space", "Art")]
    assert order[0] == right.label and order[1:] == [label for label, _ in right.ranking]
    assert f"{round(right.ranking[0][1] * 100)}%" in shown
    # Other labels: one removed, one typed.
    view.focus("#labels input")
    view.get_by_role("button", name="Remove Space").or_(
        view.locator("#labels .token-remove").nth(1)
    ).first.click()
    view.fill("#labels input", "rain")
    view.keyboard.press("Enter")
    view.keyboard.press("Escape")
    view.click("#run")
    view.wait_for_function("document.querySelector('#probabilities').innerText.includes('rain')")
    assert "Space" not in view.inner_text("#probabilities")
    assert view.inner_text("#probabilities").split("\n").count(str(own.label)) == 2
    # A file, with one row that cannot be read; its answers are downloaded.
    rows: list[dict[str, Any]] = [{"id": f"r{i}", **row} for i, row in enumerate(classification_rows(100))]
    rows[7] = {"id": "r7", "text": " "}
    view.get_by_role("tab", name="File").click()
    view.set_input_files("#upload input[type=file]", write_jsonl(tmp_path / "rows.jsonl", rows))
    view.wait_for_selector("#upload a, #upload .file-preview")
    view.click("#run-file")
    view.wait_for_selector("#download", state="visible")
    assert "100 / 100" in view.inner_text("#progress") and "1" in view.inner_text("#progress")
    with view.expect_download() as waiting:
        view.click("#download")
    lines = read_jsonl(Path(waiting.value.path()))
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert "empty" in lines[7]["error"] and lines[0]["label"] == right.label
    # Entities by another run.
    view.get_by_role("tab", name="One text").click()
    view.click("#model input")
    view.get_by_role("option", name="ents").click()
    view.wait_for_selector("#entities", state="visible")
    text = "他在南京大学学习，南京。"
    with load_predictor(runs["ents"]) as predictor:
        (found,) = predictor.extract([text])
    view.fill("#text textarea", text)
    view.click("#run")
    view.wait_for_function("document.querySelector('#latency').innerText.includes('ms')")
    marked = view.inner_text("#entities").replace("\n", "")
    assert all(entity.text in marked for entity in found)
    # Entities inside entities by a third.
    view.click("#model input")
    view.get_by_role("option", name="nested").click()
    view.wait_for_function("!document.querySelector('#latency').innerText.includes('ms')")
    with load_predictor(runs["nested"]) as predictor:
        (found,) = predictor.extract([text])
    inside = [
        each
        for n, each in enumerate(found)
        if any(holds(o, each) and (o != each or m < n) for m, o in enumerate(found) if m != n)
    ]
    assert inside
    view.fill("#text textarea", text)
    view.click("#run")
    view.wait_for_function("document.querySelector('#latency').innerText.includes('ms')")
    labels = view.eval_on_selector_all("#entities mark", "marks => marks.map(m => m.dataset.label)")
    assert sorted(labels) == sorted(each.label for each in found)
    assert view.locator("#entities mark mark").count() == len(inside)
    view.fill("#text textarea", " ")
    view.click("#run")
    view.get_by_test_id("toast-text").get_by_text("text is empty").wait_for()
    view.goto(f"{server.url}/docs")
    view.get_by_text("Labels with exact probabilities").first.wait_for()
    foreign = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert foreign == [] and said == []
    log = "".join(server.lines)
    assert text not in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("locale", "words", "foreign"),
    [
        (
            "zh-CN",
            ["模型", "标签：", "单条", "批量", "示例", "文本（", "运行", "概率"],
            ["Model", "Text", "Run"],
        ),
        (
            "en-US",
            ["Model", "Labels:", "One text", "File", "Examples", "Text (", "Run"],
            ["模型", "运行", "概率"],
        ),
        (
            "de-DE",
            ["Model", "Labels:", "One text", "File", "Examples", "Text (", "Run"],
            ["模型", "运行", "概率"],
        ),
    ],
)
def test_the_page_speaks_the_browser_s_language_alone(
    browser: Any, server: Server, tmp_path: Path, locale: str, words: list[str], foreign: list[str]
) -> None:
    view = browser.new_context(locale=locale, viewport={"width": 390, "height": 800}).new_page()
    view.goto(server.url)
    view.get_by_role("tab", name=words[3]).wait_for()
    # A text is found by get_by_text in any case, so that "runs" would do for "Run".
    all_there = "words => words.every(word => document.body.innerText.includes(word))"
    view.wait_for_function(all_there, arg=words)
    one = view.inner_text("body")
    view.get_by_role("tab", name=words[3]).click()
    view.set_input_files("#upload input[type=file]", write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}]))
    view.wait_for_selector("#upload a, #upload .file-preview")
    view.click("#run-file")
    result = (
        ["批量", "文件", "错误: 1", "前几行", "下载"]
        if locale == "zh-CN"
        else ["File", "errors: 1", "First lines", "Download"]
    )
    view.wait_for_function(all_there, arg=[*result, "rows.jsonl:1"])
    many = view.inner_text("body")
    assert all(word in one for word in words)
    assert "[object" not in one + many and not any(word in one + many for word in foreign)
    assert '"source": "rows.jsonl:1"' in many, "and not where it lies on the server"
    assert view.evaluate("document.documentElement.scrollWidth") == 390
    view.context.close()


def test_with_a_key_the_page_asks_for_it_first() -> None:
    from starlette.testclient import TestClient

    from labeltune.serve.playground import add_playground

    settings = Settings(api_key=b"secret-key")
    metrics = Metrics()
    models = Models([Served("m", predictor_for(), "", Path("nowhere/best"))])
    app, service = create_app(models, settings, metrics)
    client = TestClient(Guard(add_playground(app, service), settings, metrics))
    body = {"data": ["m", [], "a document"], "fn_index": 2, "session_hash": "x"}
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/v1/classify"):
        assert client.post(path, json=body).status_code == 401
    for password, status in (("wrong", 400), ("secret-key", 200)):
        assert client.post("/login", data={"username": "me", "password": password}).status_code == status
    service.close()


def test_uploads_stay_in_their_folder_and_no_other_file_can_be_named(server: Server, tmp_path: Path) -> None:
    """Of a name that leads out of the folder the last part is kept, and a path that was not uploaded is refused."""
    row = b'{"text": "a document"}\n'
    kept = []
    for name in ("../../../rows.jsonl", "/etc/rows.jsonl", "..\\..\\rows.jsonl"):
        answer = server.client.post(f"{server.url}/gradio_api/upload", files={"files": (name, row)})
        assert answer.status_code == 200
        (path,) = map(Path, answer.json())
        assert path.name.endswith("rows.jsonl") and path.read_bytes() == row and ".." not in path.parts
        kept.append(path)
    assert len({path.parent.parent for path in kept}) == 1
    refused = server.client.post(f"{server.url}/gradio_api/upload", files={"files": ("..", row)})
    assert refused.status_code == 400
    private = tmp_path / "private.jsonl"
    private.write_bytes(row)
    assert '"success":true' in events_of(server, "try_file", ["news", None, as_file(kept[0])], "own")
    elsewhere = [
        private,
        f"{kept[0].parent}/../../../{private}",
        "http://127.0.0.1:9/x.jsonl",
        "relative.jsonl",
    ]
    for number, path in enumerate(elsewhere):
        said = events_of(server, "try_file", ["news", None, as_file(path)], f"file-{number}")
        assert "was not uploaded here" in said and '"success":true' not in said and "a document" not in said
        said = events_of(server, "try_text", ["ents", None, as_file(path)], f"text-{number}")
        assert "was not uploaded here" in said and '"success":true' not in said, "as the text of a text box"
    assert server.get(f"/gradio_api/file={private}").status_code == 403


def as_file(path: Path | str) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def events_of(server: Server, name: str, data: list[Any], session: str) -> str:
    """What the page's own protocol answers to an event."""
    known = server.get("/config").json()["dependencies"]
    (number,) = (event["id"] for event in known if event["api_name"] == name)
    body = {"data": data, "fn_index": number, "session_hash": session}
    assert server.post("/gradio_api/queue/join", body).status_code == 200
    return server.get(f"/gradio_api/queue/data?session_hash={session}").text
