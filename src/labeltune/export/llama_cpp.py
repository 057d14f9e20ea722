"""For llama.cpp: GGUF by its converters and its quantizer, a request bound by a grammar, and its server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from labeltune.errors import ConfigError, ModelError
from labeltune.export import vllm
from labeltune.export.engines import Engine, Served, told
from labeltune.export.folder import Dtype
from labeltune.prompts import Task
from labeltune.prompts.ner import BEFORE_LABEL, BEFORE_TEXT, END, NerTask, escaped
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Example

#: A whole model, an adapter, and the base that is converted for asking about an adapter.
MODEL, ADAPTER, BASE = "model.gguf", "adapter.gguf", "base.gguf"
CONVERTER, ADAPTER_CONVERTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
QUANTIZER, SERVER = "llama-quantize", "llama-server"
TOOLS = (CONVERTER, ADAPTER_CONVERTER, QUANTIZER, SERVER)
REQUEST_FILE = "llama_cpp_request.json"
#: What weights can be written as; the converter writes those that it calls so, the quantizer the others.
TYPES = ("f32", "bf16", "f16", "q8_0", "q4_k_m")
_CONVERTED = ("f32", "bf16", "f16", "q8_0")
_TYPE_OF: dict[Dtype, str] = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
#: Last lines of a converter's output that are shown.
_SHOWN = 3
#: Where programs lie in the folder that LLAMA_CPP names.
_PLACES = ("", "bin", "build/bin")
#: Models with layers for drafts: by their type, and by keys of their config.
_DRAFTING = ("qwen3_5", "qwen3_next")
_DRAFTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")


def find_tool(name: str) -> Path | None:
    """A converter or a program of llama.cpp: on PATH, or in the folder that LLAMA_CPP names; of others (`ollama`) on PATH alone."""
    found = shutil.which(name)
    if found:
        return Path(found)
    folder = os.environ.get("LLAMA_CPP") if name in TOOLS else None
    paths = [Path(folder).expanduser() / place / name for place in _PLACES] if folder else []
    script = name.endswith(".py")
    return next((path for path in paths if path.is_file() and (script or os.access(path, os.X_OK))), None)


def needed(*names: str) -> None:
    """Refuse before any work is done what cannot be done without these.

    Raises:
        ConfigError: one is not there.
    """
    for name in names:
        if find_tool(name) is not None:
            continue
        if name not in TOOLS:
            raise ConfigError(f"there is no {name} on PATH; install it (ollama.com)")
        raise ConfigError(
            f"there is no {name} on PATH or in the folder LLAMA_CPP; build llama.cpp, and set LLAMA_CPP to its folder"
        )


def tools(form: str, adapter: bool, server: str | None) -> list[str]:
    """What has to be there to write a type, and to ask a server about it."""
    found = [ADAPTER_CONVERTER] if adapter else []
    if not adapter or server is not None:
        found += [CONVERTER, *([] if form in _CONVERTED else [QUANTIZER])]
    return found if server is None else [*found, server]


def type_of(dtype: Dtype) -> str:
    """What GGUF calls a number format."""
    return _TYPE_OF[dtype]


def write_model(source: Path, target: Path, form: str, dtype: Dtype, python: str = sys.executable) -> None:
    """Convert a model folder, and quantize it where the converter does not.

    Args:
        form: one of `TYPES`.
        dtype: of the weights in `source`.
        python: with the converter's libraries (transformers, torch, sentencepiece).

    Raises:
        ModelError: llama.cpp fails, e.g. because it does not know the architecture.
    """
    given = [str(source), *_no_drafts(source)]
    if form in _CONVERTED:
        _run(CONVERTER, [python], [*given, "--outfile", str(target), "--outtype", form], target)
        return
    whole = target.with_name(f"{target.name}.whole")
    try:
        outtype = ["--outfile", str(whole), "--outtype", _TYPE_OF[dtype]]
        _run(CONVERTER, [python], [*given, *outtype], whole)
        _run(QUANTIZER, [], [str(whole), str(target), form], target)
    finally:
        whole.unlink(missing_ok=True)


def _no_drafts(folder: Path) -> list[str]:
    """Of models whose layers for drafts (multi-token prediction) transformers does not load, and the converter looks for."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    parts = [config, config.get("text_config") or {}]
    named = any(str(part.get("model_type", "")).startswith(_DRAFTING) for part in parts)
    return ["--no-mtp"] if named or any(part.get(key) for part in parts for key in _DRAFTS) else []


def write_adapter(source: Path, base: Path, target: Path, dtype: Dtype, python: str = sys.executable) -> None:
    """Convert an adapter; it stays in the number format of its base.

    Raises:
        ModelError: llama.cpp fails.
    """
    options = [str(source), "--base", str(base), "--outfile", str(target), "--outtype", _TYPE_OF[dtype]]
    _run(ADAPTER_CONVERTER, [python], options, target)


def _path(tool: str) -> str:
    needed(tool)
    return str(find_tool(tool))


def _run(tool: str, by: list[str], options: list[str], target: Path) -> None:
    try:
        done = subprocess.run([*by, _path(tool), *options], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ModelError(f"{tool} cannot be run: {error}") from error
    if done.returncode or not target.is_file():
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_SHOWN:])
        raise ModelError(f"{tool} could not write {target.name} (exit code {done.returncode}): {reason}")


def convert_command(source: str, target: Path, form: str, dtype: Dtype) -> str:
    """The shell command that converts a model folder with weights of a number format."""
    direct = form in _CONVERTED
    written = target if direct else target.with_name(f"{target.name}.whole")
    options = ["--outfile", str(written), "--outtype", form if direct else _TYPE_OF[dtype]]
    given = [source, *_no_drafts(Path(source))]
    command = shlex.join(["python", f"llama.cpp/{CONVERTER}", *given, *options])
    return command if direct else f"{command} && {shlex.join([QUANTIZER, str(written), str(target), form])}"


def serve_command(folder: Path, base: Path | None, name: str, template: ChatTemplate) -> str:
    """The shell command that serves an export; `base` is the file of the base that an adapter needs."""
    return shlex.join([SERVER, *_options(folder, base, name, template)])


def _options(folder: Path, base: Path | None, name: str, template: ChatTemplate) -> list[str]:
    model = ["--model", str(folder / MODEL if base is None else base), "--alias", name]
    adapter = [] if base is None else ["--lora", str(folder / ADAPTER)]
    found = [*model, *adapter, "--jinja", "--chat-template-file", str(folder / "chat_template.jinja")]
    bos = template.tokenizer.bos_token
    if bos is not None and not template.render([{"role": "user", "content": "x"}]).startswith(str(bos)):
        # The run was trained without the token that begins texts, which the server would put there.
        found += ["--override-kv", "tokenizer.ggml.add_bos_token=bool:false"]
    return found


def request_command(folder: Path) -> str:
    """The shell command that sends the request to a server on this machine."""
    url = "http://localhost:8080/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(f'@{folder / REQUEST_FILE}')}"


def request(
    task: Task, template: ChatTemplate, name: str, max_tokens: int, example: Example | None = None
) -> dict[str, Any]:
    """A chat completion request as `vllm.request`, its answers bound by a grammar."""
    body = vllm.request(task, template, name, max_tokens, example)
    # It has no penalties of its own, and knows from the file which tokens end an answer.
    del body["repetition_penalty"], body["stop_token_ids"]
    bound = body.pop("structured_outputs")
    return body | {
        "grammar": bound.get("grammar") or grammar(task, template.answer_lead, bound.get("choice"))
    }


def grammar(task: Task, lead: str, choice: list[str] | None) -> str:
    """The form of an answer in GBNF.

    Args:
        lead: in front of every answer.
        choice: the answers, where they can be listed.
    """
    if choice is not None:
        return "root ::= " + " | ".join(map(vllm.quoted, choice))
    assert isinstance(task, NerTask)
    none = vllm.quoted(lead + task.prompt.no_entities)
    begin = f"{vllm.quoted(lead)} " if lead else ""
    if task.marked:
        return vllm.marks_grammar(task, lead)
    return "\n".join(
        [
            rf'root ::= {none} | {begin}line ("\n" line)*',
            f"line ::= {vllm.quoted(BEFORE_TEXT)} character+ {vllm.quoted(BEFORE_LABEL)} type {vllm.quoted(END)}",
            r'character ::= [^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F])',
            "type ::= " + " | ".join(vllm.quoted(escaped(label)) for label in task.labels),
        ]
    )


class LlamaServer(Engine):
    """llama.cpp's own server, of the files in the export.

    Args:
        base: the file of the base that an adapter needs; None for a whole model.
    """

    name, health = "llama.cpp", "/health"

    def __init__(self, served: Served, base: Path | None) -> None:
        super().__init__(served)
        self._base = base

    def command(self, port: int) -> list[str]:
        """What starts it on this machine."""
        served = self.served
        options = _options(served.folder, self._base, served.name, served.builder.template)
        here = ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", str(served.max_tokens)]
        return [_path(SERVER), *options, *here, "--parallel", "1"]

    def prompt_told(self, url: str, prompt: list[int], adapter: bool) -> Any:
        """The most probable tokens behind a prompt."""
        body: dict[str, Any] = {"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0}
        body |= {"cache_prompt": False, "lora": [{"id": 0, "scale": 1.0 if adapter else 0.0}]}
        with told(f"{url}/completion", body) as answer:
            return answer["completion_probabilities"][0]["top_logprobs"]

    def written(self, url: str, row: Example) -> tuple[str, list[int] | int]:
        """The answer to the request that the export prints."""
        served = self.served
        body = request(served.builder.task, served.builder.template, served.name, served.max_new_tokens, row)
        with told(f"{url}/apply-template", body) as answer:
            prompt = str(answer["prompt"])
        with told(
            f"{url}/tokenize", {"content": prompt, "add_special": True, "parse_special": True}
        ) as answer:
            read = list(answer["tokens"])
        with told(f"{url}/v1/chat/completions", body) as answer:
            return str(answer["choices"][0]["message"]["content"]), read
