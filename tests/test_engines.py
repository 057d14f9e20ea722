"""The gate asks the engine that will serve an export, here stand-ins for vLLM and llama.cpp, and catches one that serves something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import labeltune
from helpers import fake_engines
from helpers.tiny_models import make_tokenizer
from helpers.training import config_for
from labeltune.client import LabelClient
from labeltune.commands.export import export
from labeltune.config import PromptConfig, build_config
from labeltune.errors import ConfigError, ModelError, ParityError
from labeltune.export import engines
from labeltune.export.engines import CLIENT_FILE, Served, answers
from labeltune.export.folder import Exported
from labeltune.export.llama_cpp import ADAPTER, MODEL
from labeltune.export.vllm import VllmServer
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Entity, Example

FOLDER = "out"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run that has learned its rows, so that a prompt that is lost changes answers."""
    folder = tmp_path_factory.mktemp("engines")
    config = config_for(folder, model_folder, epochs=4)
    prompt = {"system": "", "user": "Text: {text}\nLabel:", "max_length": 512}
    values = {**config.model_dump(exclude_unset=True), "lora": {"dropout": 0.0}, "prompt": prompt}
    labeltune.train(build_config(values), say=lambda _: None)
    return folder / "out"


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What stands for the python of vLLM's environment, and of llama.cpp's converters; LLAMA_CPP names a folder of stand-ins."""
    fake_engines.install(tmp_path)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return str(tmp_path / "python")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers start at once."""
    monkeypatch.setattr(engines, "_LOOK", 0.05)
    real = {name: getattr(subprocess, name) for name in ("STDOUT", "TimeoutExpired")}
    monkeypatch.setattr(engines, "subprocess", SimpleNamespace(Popen=fake_engines.Forked, **real))


def asked(run: Path, output: Path, python: str, **options: Any) -> Exported:
    return export(
        run, output, **{"engine": "vllm"} | options, engine_python=python, say=lambda _: None, progress=False
    )


#: They bound answers and tell probabilities.
SERVERS = ("vllm", "llama.cpp")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("engine", SERVERS)
def test_an_engine_that_answers_alike(
    engine: str, merged: bool, run: Path, python: str, tmp_path: Path
) -> None:
    done = asked(run, tmp_path / FOLDER, python, engine=engine, merged=merged)
    assert done.engine_parity is not None and not done.engine_parity.differences
    assert done.engine_parity.largest_shift == pytest.approx(0, abs=1e-5) and done.engine_parity.rows == 5
    told = json.loads((tmp_path / FOLDER / "export.json").read_text(encoding="utf-8"))
    assert told["engine_parity"] == done.engine_parity.to_dict()
    accuracy = done.engine_figures["accuracy"]
    assert accuracy["first"] == accuracy["second"] and accuracy["difference"]["high"] == 0
    assert told["engine_figures"]["accuracy"] == accuracy
    file = tmp_path / FOLDER / (MODEL if merged else ADAPTER)
    assert file.is_file() == (engine == "llama.cpp")
    assert ("Convert the base" in done.commands) == (engine == "llama.cpp" and not merged)
    assert told.get("gguf") == ("f32" if engine == "llama.cpp" else None)
    assert (told["engine"], told["engine_form"]) == (engine, "f32" if engine == "llama.cpp" else "fp32")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".labeltune")]


@pytest.mark.parametrize(
    ("fault", "merged", "error", "part"),
    [
        ("ignored", False, ParityError, "the server ignores the adapter"),
        (
            "template",
            True,
            ParityError,
            "the server reads another prompt than the run was trained on: from token 1 on",
        ),
        ("generation", True, ParityError, "on '' where"),
        ("bos", True, ParityError, "from token 1 on"),
        ("dtype", True, ParityError, "rows differ"),
        ("start", True, ModelError, "does not start with this export (exit code 1): no CPU of this kind"),
    ],
)
@pytest.mark.parametrize("engine", SERVERS)
def test_an_engine_that_does_not(
    engine: str,
    fault: str,
    merged: bool,
    error: type[Exception],
    part: str,
    run: Path,
    python: str,
    tmp_path: Path,
    forked: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(error) as caught:
        asked(run, tmp_path / FOLDER, python, engine=engine, merged=merged)
    assert part in str(caught.value)
    assert not (tmp_path / FOLDER).exists(), "nothing was exported"


def test_an_adapter_whose_names_a_server_does_not_know(
    run: Path, python: str, tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "renamed")
    with pytest.raises(ParityError, match="the server ignores the adapter"):
        asked(run, tmp_path / FOLDER, python)


def test_gguf_asks_llama_cpp(run: Path, python: str, tmp_path: Path, forked: None) -> None:
    done = asked(run, tmp_path / FOLDER, python, engine=None, gguf="q8_0", merged=True)
    assert done.engine_parity is not None and "Serve with llama.cpp" in done.commands
    request = json.loads((tmp_path / FOLDER / "llama_cpp_request.json").read_text(encoding="utf-8"))
    assert request["grammar"].startswith('root ::= "') and "structured_outputs" not in request
    done = asked(run, tmp_path / "unasked", python, engine=None, gguf="q8_0", merged=True, verify=False)
    assert done.engine_parity is None and (tmp_path / "unasked" / MODEL).is_file()
    # Ollama's Modelfile names the file that was compared.
    asked(run, tmp_path / "modelfile", python, engine=None, gguf="f16", ollama=True)
    assert f"FROM ./{MODEL}" in (tmp_path / "modelfile" / "Modelfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("merged", [False, True])
def test_plain_transformers(merged: bool, run: Path, tmp_path: Path) -> None:
    done = asked(run, tmp_path / FOLDER, sys.executable, engine="transformers", merged=merged)
    assert done.engine_parity is not None and not done.engine_parity.differences
    assert done.engine_parity.largest_shift == pytest.approx(0, abs=1e-5)


def test_ollama(
    run: Path, python: str, tmp_path: Path, forked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = asked(run, tmp_path / FOLDER, python, engine="ollama", name="Mine")
    assert done.engine_parity is not None and done.engine_parity.largest_shift is None, "it tells none"
    assert not done.engine_parity.differences and done.kind == "merged model"
    assert {"Add to Ollama", "Serve with llama.cpp"} <= set(done.commands)
    monkeypatch.setenv("FAULT", "bos")
    with pytest.raises(ParityError, match="tokens instead of"):
        asked(run, tmp_path / "other", python, engine="ollama")


def test_a_server_that_runs_already(run: Path, python: str, tmp_path: Path) -> None:
    import time

    import httpx

    from labeltune.export.engines import _free_port

    export(run, tmp_path / "served", merged=True, say=lambda _: None, progress=False)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--model", str(tmp_path / "served"), "--served-model-name", "mine"]
    server = subprocess.Popen([python, *options, "--dtype", "float32", "--port", str(port)])
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/v1/models", timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        done = asked(run, tmp_path / FOLDER, python, merged=True, name="mine", engine_url=f"{url}/v1/")
        assert done.engine_parity is not None and not done.engine_parity.differences
        with pytest.raises(ModelError, match=r"has no adapter out; it has mine"):
            asked(run, tmp_path / "adapter" / "out", python, engine_url=url)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("holds", [True, False])
def test_entities_of_an_engine(holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = PromptConfig(user="{text}", system="", max_length=100)
    builder = PromptBuilder(make_task("ner", ("A",), prompt), ChatTemplate(make_tokenizer()))
    row = Example("0", "a b", entities=())
    told = {"entities": [{"text": "b", "label": "A", "start": 2, "end": 3}]}
    written = '{"entity_text": "a c", "entity_label": "A"}'

    class Asked(LabelClient):
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def predict(self, text: str, labels: Any = None) -> dict[str, Any]:
            return told

        def close(self) -> None: ...

    class Engine(VllmServer):
        def written(self, url: str, row: Example) -> tuple[str, list[int] | int]:
            return written, builder.prompt(row).ids

    monkeypatch.setattr("labeltune.client.LabelClient", Asked)
    monkeypatch.setattr(Engine, "holds", holds)
    (tmp_path / CLIENT_FILE).touch()
    engine = Engine(Served(tmp_path, None, "m", "fp32", 1, 200, 50, builder), sys.executable)
    (found,) = answers(engine, "http://server", [row])
    assert found.answer == written and found.parsed and not found.truncated
    right = Entity("b", "A", 2, 3) if holds else Entity("a c", "A")
    assert found.entities == (right,), "what is written need not be in the text; what the client gets is"


def test_options_that_make_no_sense(
    run: Path, tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, part in (
        ({"engine": "tgi"}, "--engine must be one of vllm, llama.cpp, ollama, transformers, not 'tgi'"),
        ({"gguf": "q2"}, "--gguf must be one of f32, bf16, f16, q8_0, q4_k_m, not 'q2'"),
        ({"engine_python": "python"}, "--engine-python says where an engine is"),
        ({"engine_url": "http://x"}, "--engine-url says where an engine runs"),
        ({"engine": "vllm", "verify": False}, "leave out --no-verify"),
        ({"engine": "vllm", "gguf": "f16"}, "export twice"),
        ({"engine": "transformers", "gguf": "f16"}, "transformers is not served GGUF"),
        ({"engine": "llama.cpp", "gguf": "f16", "engine_url": "http://127.0.0.1:9"}, "leave out --gguf"),
    ):
        with pytest.raises(ConfigError, match=part):
            export(run, tmp_path / FOLDER, say=lambda _: None, progress=False, **options)
    for engine in (*SERVERS, "transformers"):
        with pytest.raises(ModelError, match="nowhere is no program"):
            asked(run, tmp_path / FOLDER, str(tmp_path / "nowhere"), engine=engine)
    for url in ("http://127.0.0.1:9", "http://host:80OO", "http://[::1", "localhost:8000"):
        with pytest.raises(ModelError, match="does not answer"):
            asked(run, tmp_path / FOLDER, python, engine_url=url)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped, symlinks=True)
    shutil.rmtree(stopped / "validation")
    with pytest.raises(ConfigError, match="there are no rows; name some with --verify FILE"):
        asked(stopped, tmp_path / FOLDER, python)
    (tmp_path / "llama.cpp" / "llama-server").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no llama-server on PATH"):
        export(run, tmp_path / FOLDER, gguf="f16", merged=True, say=lambda _: None, progress=False)
    with pytest.raises(ConfigError, match="there is no llama-quantize on PATH"):
        export(
            run,
            tmp_path / FOLDER,
            gguf="q4_k_m",
            merged=True,
            verify=False,
            say=lambda _: None,
            progress=False,
        )
