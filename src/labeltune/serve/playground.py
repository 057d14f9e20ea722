"""The page at `/`: try a text, or a file, with the runs of this server; English and Chinese, without anything from elsewhere."""

from __future__ import annotations

import asyncio
import hmac
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from gradio_client.utils import is_file_obj, traverse

from labeltune.errors import LabeltuneError
from labeltune.inference.files import BadRow, count_rows, read_rows, to_line
from labeltune.serve.models import Served, documents
from labeltune.serve.schemas import ApiError
from labeltune.serve.service import Service
from labeltune.types import Entity, Example, Prediction

if TYPE_CHECKING:
    from gradio.block_function import BlockFunction
    from gradio.state_holder import SessionState

#: Rows of a file that are asked for at once, and lines shown of the result.
CHUNK = 64
PREVIEW = 20
#: How often a row of a file waits for room in the queue.
ATTEMPTS = 20
#: What the page says, by the browser's language. Chinese browsers ask for `zh-CN`, `zh-TW` ...; they all get `zh`.
_WORDS = {
    "en": {
        "model": "Model",
        "labels": "Labels: choose, remove, or type new ones",
        "one": "One text",
        "examples": "Examples",
        "text": "Text (Shift+Enter runs)",
        "run": "Run",
        "probabilities": "Probabilities",
        "entities": "Entities",
        "file": "File",
        "upload": "File",
        "columns": "jsonl or csv with a `text` column; labels in a `category` column of a row are used for that row.",
        "preview": "First lines",
        "download": "Download",
        "login": "Any user name; the password is the API key.",
        "no_file": "choose a file first",
        "errors": "errors",
    },
    "zh": {
        "model": "模型",
        "labels": "标签：可选择、删除或输入新的",
        "one": "单条",
        "examples": "示例",
        "text": "文本（Shift+Enter 运行）",
        "run": "运行",
        "probabilities": "概率",
        "entities": "实体",
        "file": "批量",
        "upload": "文件",
        "columns": "jsonl 或 csv，需有 `text` 列；某行的 `category` 列写有标签时用该行自己的标签。",
        "preview": "前几行",
        "download": "下载",
        "login": "用户名任意，密码为 API key。",
        "no_file": "请先选择文件",
        "errors": "错误",
    },
}
#: Events are no part of an API of the page.
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_TEXTS = gr.I18n(**_WORDS)
#: Colours that are seen on a light and on a dark page.
_MARK_STYLE = (
    "color: inherit; background: hsl({hue} 80% 50% / .2); border-bottom: 3px solid hsl({hue} 70% 50%); "
    "border-radius: 4px; padding: .2em .1em"
)
_LABEL_STYLE = 'style="margin: 0 .3em; font-weight: 600; user-select: none"'
_FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


def add_playground(app: FastAPI, service: Service) -> FastAPI:
    """Serve the page below everything else; with an API key it asks for that first."""
    key = service.settings.api_key

    def allowed(_: str, password: str) -> bool:
        return key is None or hmac.compare_digest(password.encode("utf-8", "replace"), key)

    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page(service),
        path="/",
        auth=None if key is None else allowed,
        auth_message=" ".join(words["login"] for words in _WORDS.values()),
        footer_links=[],
        max_file_size=service.settings.max_body_bytes,
        i18n=_TEXTS,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"]),
    )
    return mounted


class Page(gr.Blocks):  # type: ignore[misc]
    """A page whose events take no file but those that were uploaded here.

    gradio looks after that on pages it launches itself. On one that is mounted in another application, as here, it
    copies any file this process may read, and whatever an address answers, to where the client can fetch it, whichever
    component the client names it for.
    """

    async def preprocess_data(
        self,
        block_fn: BlockFunction,
        inputs: list[Any],
        state: SessionState | None,
        explicit_call: bool = False,
    ) -> list[Any]:
        """gradio's own, behind the check.

        Raises:
            gr.Error: a path outside of the folder of uploads, or an address.
        """
        folder = Path(get_upload_folder()).resolve()

        def uploaded(file: dict[str, Any]) -> dict[str, Any]:
            if not Path(file["path"]).resolve().is_relative_to(folder):
                raise gr.Error("this file was not uploaded here", print_exception=False)
            return file

        traverse(inputs, uploaded, is_file_obj)
        found: list[Any] = await super().preprocess_data(block_fn, inputs, state, explicit_call)
        return found


def page(service: Service) -> Any:
    """Its components and what they do."""
    served = list(service.models.served.values())
    first = served[0]
    with Page(title="labeltune", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# labeltune")
        model = gr.Dropdown(
            [s.name for s in served], value=first.name, label=_TEXTS("model"), elem_id="model"
        )
        labels = gr.Dropdown(
            list(first.labels),
            value=list(first.labels),
            multiselect=True,
            allow_custom_value=True,
            label=_TEXTS("labels"),
            elem_id="labels",
        )
        with gr.Tab(_TEXTS("one"), elem_id="one"):
            _text_tab(service, first, model, labels)
        with gr.Tab(_WORDS["en"]["file"], elem_id="file") as file_tab:
            upload = _file_tab(service, model, labels)

        def name_files(request: gr.Request) -> list[Any]:
            # These two components show a text that waits for its translation as an object.
            words = _words(request.headers)
            return [gr.update(label=words["file"]), gr.update(label=words["upload"])]

        def switch(name: str) -> Any:
            now = service.pick(name)
            return gr.update(choices=list(now.labels), value=list(now.labels))

        blocks.load(name_files, None, [file_tab, upload], **_PRIVATE)
        model.change(switch, model, labels, **_PRIVATE)
    blocks.queue(default_concurrency_limit=16, max_size=256, api_open=False)
    return blocks


def _text_tab(service: Service, first: Served, model: gr.Dropdown, labels: gr.Dropdown) -> None:
    """One text and its answer."""
    with gr.Row():
        with gr.Column():
            examples = gr.Dropdown(
                _choices(first), value=None, label=_TEXTS("examples"), elem_id="examples", filterable=False
            )
            text = gr.Textbox(lines=8, max_lines=20, label=_TEXTS("text"), elem_id="text")
            run = gr.Button(_TEXTS("run"), variant="primary", elem_id="run")
        with gr.Column():
            label = gr.Label(
                label=_TEXTS("probabilities"),
                num_top_classes=20,
                visible=first.task != "ner",
                elem_id="probabilities",
            )
            entities = gr.HTML(
                label=_TEXTS("entities"),
                show_label=True,
                container=True,
                visible=first.task == "ner",
                elem_id="entities",
            )
            spent = gr.Markdown(elem_id="latency")

    async def try_text(name: str, chosen: list[str], given: str) -> tuple[Any, Any, str]:
        return await _try_text(service, name, chosen, given)

    def switch(name: str) -> tuple[Any, ...]:
        now = service.pick(name)
        return (
            gr.update(choices=_choices(now), value=None),
            gr.update(visible=now.task != "ner", value=None),
            gr.update(visible=now.task == "ner", value=None),
            "",
        )

    model.change(switch, model, [examples, label, entities, spent], **_PRIVATE)
    examples.input(lambda chosen: chosen, examples, text, **_PRIVATE)
    for trigger in (run.click, text.submit):
        trigger(try_text, [model, labels, text], [label, entities, spent], **_PRIVATE)


def _file_tab(service: Service, model: gr.Dropdown, labels: gr.Dropdown) -> gr.File:
    """A file of rows and its predictions; returns the component that takes the file."""
    gr.Markdown(_TEXTS("columns"))
    upload = gr.File(
        file_types=[".jsonl", ".csv"],
        type="filepath",
        label=_WORDS["en"]["upload"],
        elem_id="upload",
    )
    run = gr.Button(_TEXTS("run"), variant="primary", elem_id="run-file")
    state = gr.Markdown(elem_id="progress")
    preview = gr.Code(label=_TEXTS("preview"), language="json", elem_id="preview", visible=False)
    download = gr.DownloadButton(_TEXTS("download"), visible=False, elem_id="download")

    async def try_file(
        name: str, chosen: list[str], path: str | None, request: gr.Request
    ) -> AsyncIterator[Any]:
        async for update in _try_file(service, name, chosen, path, _words(request.headers)):
            yield update

    run.click(try_file, [model, labels, upload], [state, preview, download], **_PRIVATE)
    return upload


def _words(headers: Mapping[str, str]) -> Mapping[str, str]:
    """In the language that the browser asks for first."""
    return _WORDS["zh" if headers.get("accept-language", "").lower().startswith("zh") else "en"]


def _choices(served: Served) -> list[tuple[str, str]]:
    return [(text if len(text) <= 100 else f"{text[:100]}…", text) for text in documents(served)]


async def _try_text(
    service: Service, name: str, chosen: Sequence[str] | None, text: str
) -> tuple[Any, Any, str]:
    """(probabilities, the text with its entities marked, what it took)."""
    started = time.perf_counter()
    try:
        served = service.pick(name)
        own = _labels(served, chosen)
        candidates = own if served.task != "ner" else ()
        (answer,) = await service.ask(served, [text or ""], candidates)
    except ApiError as error:
        raise gr.Error(error.message, print_exception=False) from None
    spent = f"{(time.perf_counter() - started) * 1000:.0f} ms"
    found = answer.prediction
    if served.task != "ner":
        return dict(found.ranking), None, spent
    return (
        None,
        marked(text, [entity for entity in found.entities or () if entity.label in own], served.labels),
        spent,
    )


def _labels(served: Served, chosen: Sequence[str] | None) -> tuple[str, ...]:
    """The chosen labels; an extractor has only its own.

    Raises:
        ApiError: a type that the run does not know.
    """
    labels = tuple(label.strip() for label in chosen or ()) or served.labels
    if served.task == "ner":
        for label in labels:
            if label not in served.labels:
                raise ApiError(
                    422, f"{label} is no entity type of this run: {', '.join(served.labels)}", "labels"
                )
    return labels


def marked(text: str, entities: Sequence[Entity], labels: Sequence[str] = ()) -> str:
    """The text as HTML, with a mark and its label around each entity, the inner ones within the outer; of two that cross, the first.

    Args:
        labels: the run's, which tell colours apart.
    """
    found, at = [], 0
    open_marks: list[tuple[int, str]] = []

    def go_on(to: int) -> None:
        nonlocal at
        while open_marks and open_marks[-1][0] <= to:
            end, label = open_marks.pop()
            found.append(f"{escape(text[at:end])}<small {_LABEL_STYLE}>{escape(label)}</small></mark>")
            at = end
        found.append(escape(text[at:to]))
        at = to

    placed = [(e.start, e.end, e.label) for e in entities if e.start is not None and e.end is not None]
    for start, end, label in sorted(placed, key=lambda each: (each[0], -each[1])):
        go_on(start)
        if not open_marks or end <= open_marks[-1][0]:
            found.append(
                f'<mark data-label="{escape(label)}" style="{_MARK_STYLE.format(hue=_hue(label, labels))}">'
            )
            open_marks.append((end, label))
    go_on(len(text))
    return f'<div translate="no" style="white-space: pre-wrap; line-height: 2.4; padding-top: .7em">{"".join(found)}</div>'


def _hue(label: str, labels: Sequence[str]) -> int:
    """Degrees of a label's colour: neighbours of the list lie a golden angle apart."""
    return round(137.5 * labels.index(label)) % 360 if label in labels else 0


async def _try_file(
    service: Service, name: str, chosen: Sequence[str] | None, path: str | None, words: Mapping[str, str]
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """(progress, first lines, download) again and again until the file is done."""
    if not path:
        raise gr.Error(words["no_file"], print_exception=False)
    started = time.perf_counter()
    done = bad = 0
    first: list[str] = []
    hidden = gr.update(visible=False)
    with tempfile.TemporaryDirectory(prefix="labeltune-") as folder:
        result = Path(folder) / "predictions.jsonl"
        try:
            served = service.pick(name)
            labels = _labels(served, chosen) if served.task != "ner" else ()
            total = count_rows(Path(path), served.predictor.encoding)
            rows = read_rows(Path(path), served.predictor, labels, option=None)
            with result.open("w", encoding="utf-8") as file:
                while chunk := await asyncio.to_thread(lambda: list(islice(rows, CHUNK))):
                    for row in await asyncio.gather(*(_answer(service, served, row) for row in chunk)):
                        line = to_line(row)
                        bad += isinstance(row, BadRow)
                        file.write(line)
                        if len(first) < PREVIEW:
                            first.append(line if len(line) < 500 else f"{line[:500]}…\n")
                    done += len(chunk)
                    yield f"{done} / {total or '?'}", hidden, hidden
        except (ApiError, LabeltuneError) as error:
            raise gr.Error(str(error), print_exception=False) from None
        seconds = time.perf_counter() - started
        said = f"{done} / {done}, {seconds:.1f} s" + (f", {words['errors']}: {bad}" if bad else "")
        yield (
            said,
            gr.update(value="".join(first), visible=True),
            gr.update(value=str(result), visible=True),
        )


async def _answer(service: Service, served: Served, row: Example | BadRow) -> Prediction | BadRow:
    # Where an upload lies on this machine is nobody's business.
    row = replace(row, source=Path(row.source).name)
    if isinstance(row, BadRow):
        return row
    candidates = row.candidates if served.task != "ner" else ()
    for attempt in range(ATTEMPTS):
        try:
            (answer,) = await service.ask(served, [row.text], candidates)
        except ApiError as error:
            if error.status == 429 and attempt < ATTEMPTS - 1:
                await asyncio.sleep(error.retry_after or 1)
                continue
            return BadRow(row.id, error.message, row.source)
        return replace(answer.prediction, id=row.id)
    raise AssertionError("the last attempt returns")
