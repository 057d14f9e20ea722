"""The parts of the server by themselves: batches, limits, names, prompts read back, options."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers.rows import LABELS
from helpers.runs import make_run, predictor_for
from helpers.tiny_models import make_model, make_tokenizer
from labeltune.commands.main import app
from labeltune.errors import ConfigError, DataError, ModelError
from labeltune.inference.predictor import Predictor
from labeltune.serve.app import bind
from labeltune.serve.batching import Answer, Batcher, Row
from labeltune.serve.chat import read_prompt
from labeltune.serve.guard import ClientGone, Metrics
from labeltune.serve.models import Models, Served, documents, load_models, parse_adapter, run_name
from labeltune.serve.schemas import ApiError, field_name
from labeltune.serve.service import Service
from labeltune.serve.settings import Settings, read_api_key
from labeltune.types import Example, Prediction


def row(text: str, model: str = "a", cost: int = 1) -> Row:
    return Row(model, Example(text, text), cost)


def echo(batches: list[list[str]]) -> Callable[..., list[Answer | Exception]]:
    def run(rows: Any) -> list[Answer | Exception]:
        batches.append([each.example.text for each in rows])
        return [
            DataError("bad")
            if each.example.text == "bad"
            else Answer(Prediction(each.example.id, each.example.text))
            for each in rows
        ]

    return run


def test_batches_hold_one_model_and_keep_their_budget() -> None:
    batches: list[list[str]] = []
    batcher = Batcher(echo(batches), Settings(max_wait_ms=200, batch_rows=3, batch_tokens=10))
    rows = [row("a1"), row("b1", "b"), row("a2"), row("a3"), row("a4", cost=9), row("a5", cost=9)]
    futures = batcher.submit(rows)
    assert [future.result(5).prediction.answer for future in futures] == ["a1", "b1", "a2", "a3", "a4", "a5"]
    assert batches == [["a1", "a2", "a3"], ["b1"], ["a4"], ["a5"]]
    batcher.close()


def test_one_bad_row_takes_no_other_with_it_and_a_crash_does_not_end_the_worker() -> None:
    batcher = Batcher(echo([]), Settings(max_wait_ms=1))
    good, bad = batcher.submit([row("good"), row("bad")])
    assert good.result(5).prediction.answer == "good"
    with pytest.raises(DataError):
        bad.result(5)
    batcher.close()

    def crash(rows: Any) -> Any:
        raise RuntimeError("broken")

    batcher = Batcher(crash, Settings(max_wait_ms=1))
    for _ in range(2):
        (future,) = batcher.submit([row("x")])
        with pytest.raises(RuntimeError):
            future.result(5)
    assert batcher.alive
    batcher.close()


def test_the_queue_is_bounded_drains_at_the_end_and_forgets_who_left() -> None:
    held, going = threading.Event(), threading.Event()

    def slow(rows: Any) -> Any:
        going.set()
        held.wait(10)
        return [Answer(Prediction(each.example.id, "x")) for each in rows]

    batcher = Batcher(slow, Settings(max_wait_ms=0, queue_rows=3))
    batcher.submit([row("in progress")])
    assert going.wait(5)
    futures = batcher.submit([row("1"), row("2"), row("3")])
    with pytest.raises(ApiError) as refused:
        batcher.submit([row("4")])
    assert refused.value.status == 429 and refused.value.headers()["retry-after"] == "1"
    batcher.withdraw(futures[:2])
    assert batcher.waiting == 1
    (late,) = batcher.submit([row("4")])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    held.set()
    closing.join(10)
    assert futures[2].done() and late.result(0).prediction.answer == "x" and not batcher.alive
    with pytest.raises(ApiError, match="stopped"):
        batcher.submit([row("5")])


def service_for(predictor: Predictor, **settings: Any) -> Service:
    return Service(
        Models([Served("m", predictor, "", Path("nowhere/best"))]), Settings(**settings), Metrics()
    )


def test_time_outs_lost_clients_and_long_prompts(caplog: pytest.LogCaptureFixture) -> None:
    service = service_for(predictor_for(max_length=120), timeout=5)
    served = service.pick(None, "classification")

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGone):
        asyncio.run(service.ask(served, ["a"] * 50, receive=gone))
    (good,) = asyncio.run(service.ask(served, ["a match"], count_tokens=True))
    (right,) = served.predictor.predict(["a match"])
    assert good.prediction.label == right.label and good.prompt_tokens > good.answer_tokens > 0
    with pytest.raises(ApiError) as long:
        asyncio.run(service.ask(served, ["a", "b"], ["x" * 500, "y"]))
    assert (long.value.status, long.value.param) == (422, "text[0]")
    service.close()
    service = service_for(predictor_for(), timeout=0.0001)
    with pytest.raises(ApiError) as late:
        asyncio.run(service.ask(service.pick(None), ["a"] * 20))
    assert late.value.status == 504
    service.close()


def test_documents_are_logged_only_when_that_was_asked_for() -> None:
    from labeltune.serve.guard import JsonLines, request_notes

    for wanted in (False, True):
        service = service_for(predictor_for(), log_texts=wanted)
        notes: dict[str, Any] = {}
        token = request_notes.set(notes)
        asyncio.run(service.ask(service.pick(None), ["a document"]))
        request_notes.reset(token)
        service.close()
        assert notes == {"model": "m", "rows": 1, **({"texts": ["a document"]} if wanted else {})}
    try:
        raise ValueError("a document")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, sys.exc_info())
    line = JsonLines().format(record)
    assert "a document" not in line and "ValueError" in line and "test_serve_parts.py" in line


@pytest.mark.parametrize("layout", ["original", "labels_first"])
@pytest.mark.parametrize(
    "user",
    [
        "文本:{text},类型选型:{category}",
        "{text}\nLabels: {category}",
        "{category}: {text} !",
        "{no_entities} {text}\nLabels: {category}",
    ],
)
def test_rendered_prompts_are_read_back(layout: str, user: str) -> None:
    predictor = predictor_for(prompt={"layout": layout, "user": user})
    served = Served("m", predictor, "", Path("x"))
    own = ("雨", "sun, moon")
    for text in ("a match", "x,类型选型:['a']\nLabels: no", "文本:"):
        rendered = predictor.task.conversation(Example("0", text, own)).user
        if (layout, user) == ("labels_first", "{category}: {text} !"):
            assert read_prompt(rendered, served)[0].strip(" !") == text.strip(" !")
            continue
        assert read_prompt(rendered, served) == (text, own), rendered
    assert read_prompt("just a document", served) == ("just a document", ())


def test_a_list_without_commas_is_part_of_the_document() -> None:
    """What numpy prints is no list of labels: the prompt is one document then, and no error of the server."""
    predictor = predictor_for()
    served = Served("m", predictor, "", Path("x"))
    rendered = predictor.task.conversation(Example("0", "a match", ("A", "B"))).user
    broken = rendered.replace("['A', 'B']", "['A' 'B']")
    assert broken != rendered and read_prompt(broken, served) == (broken, ())


def test_names_of_runs_and_fields(tmp_path: Path) -> None:
    assert (
        run_name("output/news/best")
        == run_name("output/news")
        == run_name("output/news/checkpoint-3")
        == "news"
    )
    assert run_name("ms:org/my model") == "my-model"
    chinese = [run_name(f"output/{name}/best") for name in ("意图", "实体")]
    assert chinese == ["意图", "实体"], "every language's letters are kept"
    assert run_name("ms:组织/意图 分类") == "意图-分类" and run_name("运行/हिन्दी") == "हिन्दी"
    assert run_name("cafe\u0301") == "café", "one spelling of the same name"
    assert run_name("🙂") == run_name("..a/--") == "run" and run_name("意" * 80) == "意" * 64
    assert parse_adapter("意图=output/x") == ("意图", "output/x")
    assert parse_adapter("a=b=c") == ("a", "b=c")
    for wrong in ("a", "=b", "a=", "a b=c", "--=c", "a/b=c", f"{'a' * 65}=c"):
        with pytest.raises(ConfigError, match="NAME=RUN"):
            parse_adapter(wrong)
    assert field_name(("messages", 0, "content")) == "messages[0].content" and field_name(()) == "body"
    assert field_name(("\ud800\n",)) == "\\ud800?"


def test_a_single_run_answers_to_any_name() -> None:
    """Clients come with other models' names, and `base_url` is all that is to be changed."""
    service = service_for(predictor_for())
    only = service.pick("m")
    assert service.pick("gpt-4o") is service.pick("gpt-4o", "classification") is only
    with pytest.raises(ApiError, match="model m does classification, not ner"):
        service.pick("gpt-4o", "ner")
    with pytest.raises(ApiError, match="this server has m") as missing:
        service.named("gpt-4o")
    assert missing.value.status == 404
    service.close()


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LABELTUNE_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("LABELTUNE_API_KEY", " ключ ")
    assert read_api_key(None) == "ключ".encode()
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_api_key(file) == b"from-file"
    assert "from-file" not in repr(Settings(api_key=b"from-file"))
    for content in ("", "two\nlines\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="one line"):
            read_api_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_key(tmp_path / "missing")


def test_ports_in_use_and_other_bases_are_refused(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match="choose another"):
            bind("127.0.0.1", bound.getsockname()[1])
    other = tmp_path / "base"
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    first = make_run(tmp_path / "first", model_folder, prior="batch")
    second = make_run(tmp_path / "second", other)
    with pytest.raises(ModelError, match=r"trained on .*base"):
        load_models(str(first), None, [("second", str(second))])
    with pytest.raises(
        ConfigError, match=r"same name: first, first; name the first with --name NAME, the others with"
    ):
        load_models(str(first), None, [("first", str(first))])
    said: list[str] = []
    models = load_models(str(first), "n.1", say=said.append)
    assert said == [
        f"loading the run {first}",
        "checking n.1: whether its first answer is that of plain computation",
    ]
    assert models.served["n.1"].predictor.calibrate.prior == "none" and "left out" in capsys.readouterr().err
    assert documents(models.served["n.1"])[0] == "match number 0 match"
    assert models.served["n.1"].labels == tuple(LABELS)


def test_a_served_adapter_is_never_read_from_a_pickle(tmp_path: Path, model_folder: Path) -> None:
    first, second = (make_run(tmp_path / name, model_folder) for name in ("first", "second"))
    weights = second / "best" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"only adapter_model\.bin, a pickle, which is never loaded"):
        load_models(str(first), None, [("other", str(second))])


def test_the_command_needs_its_extra_and_help_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "labeltune.commands.serve.find_spec", lambda name: None if name == "uvicorn" else find_spec(name)
    )
    result = CliRunner().invoke(app, ["serve", "somewhere"])
    assert "pip install -c constraints.txt '.[serve]'" in str(result.exception)
    code = (
        "import sys; from typer.testing import CliRunner; from labeltune.commands.main import app;"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0;"
        "print([m for m in ('torch', 'fastapi', 'uvicorn', 'gradio', 'transformers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
