"""What other programs read: Ollama's template against the chat template, vLLM's limits, the hubs' own clients."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher

from helpers.templates import PECULIAR
from helpers.tiny_models import CHATML, make_tokenizer
from labeltune.config import HubConfig, PromptConfig, build_config
from labeltune.errors import ConfigError, HubError, ModelError, PromptError
from labeltune.export import card, llama_cpp, ollama, onnx, vllm
from labeltune.export.card import base_license
from labeltune.export.folder import check_repo, push_folder
from labeltune.io.run_folder import RunInfo
from labeltune.prompts import make_task
from labeltune.prompts.template import PLAIN_TEMPLATE, ChatTemplate
from labeltune.types import Entity, Example

LLAMA3 = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
#: Folds the system message into the user's, has braces and quotes of its own, and says when not to think.
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<{{ '{{' }} \"{{ 'model' if m['role'] == 'assistant' else 'user' }}\">"
    "{{ head if loop.first else '' }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<{{ '{{' }} \"model\">{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "{% for message in messages %}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for message in messages %}",
    1,
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "no system": NO_SYSTEM,
    "plain": PLAIN_TEMPLATE,
}
ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def execute(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that our templates use. `messages` holds the system message too, as Ollama's does."""
    parts = ACTION.split(template)
    pieces = [("text", p) if i % 2 == 0 else ("do", p) for i, p in enumerate(parts)]

    def block(at: int) -> int:
        """Index of the `else` or `end` that belongs to the block beginning behind `at`."""
        depth = 0
        while True:
            kind, what = pieces[at]
            if kind == "do":
                if what.startswith(("if ", "range ")):
                    depth += 1
                elif depth == 0 and (what == "end" or what.startswith("else")):
                    return at
                elif what == "end":
                    depth -= 1
            at += 1

    def true(condition: str, scope: dict[str, Any]) -> bool:
        if condition == ".System":
            return bool(system)
        if condition == "eq (len (slice $.Messages $i)) 1":
            return len(messages[scope["i"] :]) == 1
        found = re.fullmatch(r'eq \.Role "(\w+)"', condition)
        assert found, condition
        return bool(scope["message"]["role"] == found[1])

    def run(at: int, end: int, scope: dict[str, Any]) -> str:
        written = ""
        while at < end:
            kind, what = pieces[at]
            at += 1
            if kind == "text":
                written += what
            elif what == ".System":
                written += system
            elif what == ".Content":
                written += scope["message"]["content"]
            elif what.startswith('"'):
                written += json.loads(what)
            elif what == "range $i, $_ := .Messages":
                stop = block(at)
                written += "".join(run(at, stop, {"i": i, "message": m}) for i, m in enumerate(messages))
                at = stop + 1
            else:
                condition, done = what.removeprefix("if "), False
                while True:
                    stop = block(at)
                    if not done and (condition == "else" or true(condition, scope)):
                        written, done = written + run(at, stop, scope), True
                    if pieces[stop][1] == "end":
                        break
                    condition, at = pieces[stop][1].removeprefix("else if "), stop + 1
                at = stop + 1
        return written

    return run(0, len(pieces), {})


def talk(count: int, system: str) -> list[dict[str, str]]:
    found = [{"role": "system", "content": system}] if system else []
    for number in range(count):
        found.append({"role": "user", "content": f'{{{{ .X }}}} 文本 "{number}"\n<|im_end|> it\'s'})
        found.append({"role": "assistant", "content": f"Space {number}"})
    return found[:-1]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Choose {one} label."])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_go_template_says_what_the_chat_template_says(name: str, system: str, count: int) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    messages = talk(count, system)
    written = execute(ollama.go_template(ollama.turns_of(ChatTemplate(tokenizer))), system, messages)
    if name == "no system" and system:
        first = {"role": "user", "content": f"{system}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    wanted = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert written == wanted
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (written, wanted)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (
            CHATML.replace("message['content']", "(message['content'] if loop.index > 2 else 'Q')", 1),
            "another template|drops, repeats",
        ),
        (
            CHATML.replace(
                "'<|im_start|>' +",
                "'<|im_start|>' + (loop.index | string if message['role'] == 'user' else '') +",
                1,
            ),
            "later turns",
        ),
        (
            CHATML.replace(
                "{% for",
                "{% if messages | length % 2 == 0 and messages | length > 6 %}odd{% endif %}{% for",
                1,
            ),
            "order of the messages",
        ),
    ],
)
def test_templates_that_go_cannot_say_are_refused(template: str, part: str) -> None:
    with pytest.raises(PromptError, match=part):
        ollama.turns_of(ChatTemplate(make_tokenizer(template)))


def test_a_modelfile(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ollama.modelfile(ChatTemplate(make_tokenizer()), "Choose.", 384)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if .System }}')
    for line in (
        'SYSTEM """Choose."""',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ):
        assert line in text.split("\n")
    assert "PARAMETER num_ctx 4096" in text
    assert "PARAMETER num_ctx 9000" in ollama.modelfile(ChatTemplate(make_tokenizer()), "", 9000)
    assert ollama.modelfile(ChatTemplate(make_tokenizer(LLAMA3)), "", 384).startswith(
        "# Trained on messages without"
    )
    with pytest.raises(PromptError, match='"""'):
        ollama.modelfile(ChatTemplate(make_tokenizer()), 'a """ b', 384)


def test_a_bos_token_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    tokenizer.bos_token = "<|im_start|>"
    turns = ollama.turns_of(ChatTemplate(tokenizer))
    assert ollama.without_bos(turns, tokenizer) == turns
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    bare = ollama.without_bos(turns, tokenizer)
    messages = talk(2, "S")
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(bare.render(messages)).input_ids == tokenizer(whole, add_special_tokens=False).input_ids
    other = make_tokenizer(CHATML.replace("<|im_start|>", "<s>"))
    other.bos_token = "<|im_start|>"
    other.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor
    with pytest.raises(PromptError, match="trained without"):
        ollama.without_bos(ollama.turns_of(ChatTemplate(other)), other)


def test_the_tools_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert llama_cpp.find_tool(llama_cpp.CONVERTER) is None
    with pytest.raises(
        ConfigError, match=r"there is no convert_hf_to_gguf\.py on PATH or in the folder LLAMA_CPP"
    ):
        llama_cpp.needed(llama_cpp.CONVERTER)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv))", encoding="utf-8")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert llama_cpp.find_tool(llama_cpp.CONVERTER) == script
    model = tmp_path / "model.gguf"
    llama_cpp.write_model(tmp_path, model, "q8_0", "bf16")
    assert "--outtype q8_0" in model.read_text(encoding="utf-8")
    # What the converter does not write, the quantizer makes of what it writes.
    quantizer = tmp_path / "build" / "bin" / "llama-quantize"
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text('#!/bin/sh\nread line < "$1"; echo "$line $3" > "$2"\n', encoding="utf-8")
    quantizer.chmod(0o755)
    llama_cpp.write_model(tmp_path, model, "q4_k_m", "bf16")
    assert "--outtype bf16 q4_k_m" in model.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.whole"))
    model.unlink()
    script.write_text("raise SystemExit('Model X is not supported')", encoding="utf-8")
    for form in ("f32", "q4_k_m"):
        with pytest.raises(
            ModelError, match=r"convert_hf_to_gguf\.py could not write .*Model X is not supported"
        ):
            llama_cpp.write_model(tmp_path, model, form, "fp32")
    assert "--outtype f32" in llama_cpp.convert_command(str(tmp_path), model, "f32", "fp32")
    assert llama_cpp.convert_command("base", Path("b.gguf"), "q4_k_m", "bf16") == (
        "python llama.cpp/convert_hf_to_gguf.py base --outfile b.gguf.whole --outtype bf16 && llama-quantize b.gguf.whole b.gguf q4_k_m"
    )
    (tmp_path / "config.json").write_text('{"text_config": {"mtp_num_hidden_layers": 1}}', encoding="utf-8")
    assert " --no-mtp " in llama_cpp.convert_command(str(tmp_path), model, "f32", "fp32")
    with pytest.raises(ModelError, match=r"convert_hf_to_gguf\.py cannot be run"):
        llama_cpp.write_model(tmp_path, model, "f32", "fp32", str(tmp_path / "no python"))
    quantizer.chmod(0o644)
    assert llama_cpp.find_tool(llama_cpp.QUANTIZER) is None


def test_strings_of_a_grammar() -> None:
    assert vllm.quoted('a "b"\\\n\b\f\x07文') == r'"a \"b\"\\\n\x08\x0C\x07文"'


CONFIG = {"r": 8, "bias": "none", "modules_to_save": None, "use_dora": False}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"r": 600}, "above 512"),
        ({"r": None}, "damaged"),
    ],
)
def test_adapters_that_vllm_refuses(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **change}), encoding="utf-8")
    with pytest.raises(ModelError, match=part):
        vllm.read_adapter(tmp_path)


@pytest.mark.parametrize(("rank", "wanted"), [(1, 1), (8, 8), (12, 16), (300, 320), (512, 512)])
def test_ranks_are_those_vllm_knows(rank: int, wanted: int, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": rank}), encoding="utf-8")
    assert vllm.read_adapter(tmp_path).max_rank == wanted


def test_commands_for_hub_models() -> None:
    adapter = vllm.Adapter(8, 8)
    hub = HubConfig(revision="v2", trust_remote_code=True)
    command = vllm.adapter_command("ms:qwen/Qwen2", hub, "my out", "news", adapter)
    assert command == (
        "VLLM_USE_MODELSCOPE=True vllm serve qwen/Qwen2 --enable-lora --lora-modules 'news=my out' --max-lora-rank 8 "
        "--revision v2 --chat-template 'my out/chat_template.jinja' --trust-remote-code"
    )
    local = vllm.adapter_command("/cache/pocket-1", HubConfig(revision="v2"), "o", "news", adapter)
    assert local.startswith("vllm serve /cache/pocket-1 --enable-lora") and "--revision" not in local


def test_the_cards_commands_are_those_of_the_export() -> None:
    hub = {"trust_remote_code": True}
    config = build_config({"model": "hf:org/base", "hub": hub})
    info, adapter = RunInfo.of(config, ("a", "b"), ""), vllm.Adapter(12, 16)
    said = "vllm serve org/base --enable-lora --lora-modules news=news --max-lora-rank 16 "
    said += "--chat-template news/chat_template.jinja --trust-remote-code"
    assert card.usage(info, adapter, False, None, "news")["With vLLM"] == said
    # vLLM reads a template from a file of its machine, so the adapter is fetched first.
    for push, fetched in (("hf:me/x", "hf download me/x"), ("ms:me/x", "modelscope download me/x")):
        pushed = card.usage(info, adapter, False, push, "news")["With vLLM"]
        assert pushed == f"{fetched} --local-dir news\n{said}"
    served = "--served-model-name news --trust-remote-code"
    for push, model in ((None, "vllm serve news"), ("ms:me/x", "VLLM_USE_MODELSCOPE=True vllm serve me/x")):
        assert card.usage(info, None, False, push, "news")["With vLLM"] == f"{model} {served}"


def test_a_request_for_entities_takes_exactly_the_answers_of_training() -> None:
    task = make_task("ner", ("GPE", 'odd "(x)"'), PromptConfig(user="{text}", system=""))
    pattern = vllm.request(task, ChatTemplate(make_tokenizer()), "m", 64)["structured_outputs"]["regex"]
    several = (Entity('a "q" \\ \n', "GPE", 0, 8), Entity("南京🎉", 'odd "(x)"', 9, 12))
    for entities in ((), several[:1], several):
        assert re.fullmatch(pattern, task.target(Example("0", "t", entities=entities)))
    for wrong in (
        "",
        '{"entity_text": "a", "entity_label": "XX"}',
        '{"entity_text": "", "entity_label": "GPE"}',
    ):
        assert not re.fullmatch(pattern, wrong)
    request = vllm.request(task, ChatTemplate(make_tokenizer(GEMMA)), "m", 64)
    assert request["max_tokens"] == 65 and request["chat_template_kwargs"] == {"enable_thinking": False}


LABELS = ("GPE", 'odd "(x)|]"')


def test_a_request_for_marks_takes_the_answers_of_training() -> None:
    prompt = PromptConfig(user="{text}", system="", answer="marks", max_length=100)
    task = make_task("ner", LABELS, prompt)
    request = vllm.request(task, ChatTemplate(make_tokenizer()), "m", 64)
    pattern = request["structured_outputs"]["regex"]
    assert request["max_tokens"] == 66 + 64 + 1, "the copy, its marks and its end"
    text = "a [q] \\ |\n南京🎉"
    entities = (Entity("a [q]", "GPE", 0, 5), Entity("南京🎉", LABELS[1], 10, 13))
    for some in ((), entities[:1], entities):
        assert re.fullmatch(pattern, task.target(Example("0", text, entities=some)))
    for wrong in ("", "a [b", "a [b|XX]", "a [|GPE]", "[[a|GPE] b|GPE]", "a | b", "a \\b"):
        assert not re.fullmatch(pattern, wrong), wrong


def test_a_request_for_nested_marks_is_a_grammar_of_the_answers_of_training() -> None:
    """Read by llguidance, whose Lark dialect differs from EBNF in the signs between a rule and its body."""
    prompt = PromptConfig(user="{text}", system="", answer="marks", no_entities="none")
    task = make_task("ner", LABELS, prompt, "nested")
    grammar = vllm.request(task, ChatTemplate(make_tokenizer()), "m", 64)["structured_outputs"]["grammar"]
    assert grammar.splitlines()[0] == 'root ::= "none" | part+'
    lark = grammar.replace("root ::=", "start ::=").replace("::=", ":")
    lark = lark.replace(r"[^\[\]|\\]", r"/(?s:[^\[\]|\\])/").replace(r"[\[\]|\\]", r"/[\[\]|\\]/")
    tokenizer = make_tokenizer()
    known = llguidance.hf.from_tokenizer(tokenizer)

    def takes(answer: str) -> bool:
        matcher = LLMatcher(known, LLMatcher.grammar_from_lark(lark))
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        return (
            matcher.validate_tokens(ids) == len(ids)
            and matcher.consume_tokens(ids)
            and matcher.is_accepting()
        )

    text = "a [q] 南京🎉"
    entities = (Entity("a [q]", "GPE", 0, 5), Entity("[q]", LABELS[1], 2, 5), Entity("南京🎉", "GPE", 6, 9))
    for some in ((), entities[:1], entities):
        assert takes(task.target(Example("0", text, entities=some)))
    for wrong in ("a [b", "a [b|XX]", "a [|GPE]", "a | b"):
        assert not takes(wrong), wrong


@pytest.mark.parametrize("name", PECULIAR)
def test_what_the_template_is_told_goes_into_requests_and_modelfiles(name: str) -> None:
    source, ending, lead = PECULIAR[name]
    told = {"reasoning_effort": "low"} if "effort" in name else {}
    prompt = PromptConfig(user="{text} {category}", system=" Sort.\n", template_kwargs=told)
    template = ChatTemplate(make_tokenizer(source), prompt)
    task = make_task("classification", ("Space", "Art"), prompt)
    request = vllm.request(task, template, "m", 64)
    assert request["structured_outputs"] == {"choice": [f"{lead}Space", f"{lead}Art"]}
    assert request.get("chat_template_kwargs", {}) == template.options
    off = {"enable_thinking": False} if "enable_thinking" in source else {}
    assert template.options == told | off
    turns = ollama.turns_of(template)
    assert turns.generation.endswith(ending)
    system, question = request["messages"]
    asked = turns.system_head + template.system_text(system["content"]) + turns.system_end
    asked += question["content"] + turns.generation
    assert asked == template.tokenizer.apply_chat_template(
        request["messages"], tokenize=False, add_generation_prompt=True
    )
    assert f'SYSTEM """{template.system_text(system["content"])}"""' in ollama.modelfile(
        template, system["content"], 384
    )


CLIENTS = {"hf": ("huggingface_hub", "HfApi"), "ms": ("modelscope.hub.api", "HubApi")}


def fake_client(monkeypatch: pytest.MonkeyPatch, hub: str, error: Exception | None = None) -> list[Any]:
    """Replace a hub's two calls; one that the real signature does not allow is a TypeError."""
    import importlib

    module, name = CLIENTS[hub]
    client = getattr(importlib.import_module(module), name)
    calls: list[Any] = []

    def faked(method: str) -> Any:
        signature = inspect.signature(getattr(client, method))

        def call(*args: Any, **kwargs: Any) -> None:
            given = dict(signature.bind(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
            calls.append((method, {k: v for k, v in given.items() if k != "self"}))
            if error is not None:
                raise error

        return call

    for method in ("create_repo", "upload_folder"):
        monkeypatch.setattr(client, method, faked(method))
    monkeypatch.setattr(client, "__init__", lambda self: None)
    return calls


@pytest.mark.parametrize("hub", CLIENTS)
def test_pushing_uses_the_hubs_own_client(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_client(monkeypatch, hub)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    address = {"hf": "https://mirror.example/org/name", "ms": "https://www.modelscope.cn/models/org/name"}
    assert push_folder(tmp_path, f"{hub}:org/name") == address[hub]
    (_, made), (_, sent) = calls
    assert [method for method, _ in calls] == ["create_repo", "upload_folder"]
    assert made.pop("private" if hub == "hf" else "visibility") in (True, "private")
    assert made == {"repo_id": "org/name", "repo_type": "model", "exist_ok": True}
    assert sent.pop("commit_message")
    assert sent == {"repo_id": "org/name", "folder_path": tmp_path, "repo_type": "model"}


def test_the_real_upload_of_modelscope_takes_what_we_give() -> None:
    from modelscope_hub.api import HubApi

    inspect.signature(HubApi.upload_folder).bind(
        None, repo_id="a/b", repo_type="model", folder_path="x", commit_message="m"
    )


@pytest.mark.parametrize("hub", CLIENTS)
def test_a_hub_that_refuses(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(monkeypatch, hub, ConnectionError("no route\nhere"))
    with pytest.raises(HubError, match=r"ConnectionError: no route\).*complete in .*login"):
        push_folder(tmp_path, f"{hub}:org/name")
    for wrong in ("org/name", f"{hub}:name", f"{hub}:a/b/c", f"{hub}:/x"):
        with pytest.raises(ConfigError):
            check_repo(wrong)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: 'qwen'\n---\n"}, "qwen"),
        (
            {"README.md": "no front matter", "LICENSE": "\n  Tongyi Qianwen\n..."},
            "Tongyi Qianwen (the base's LICENSE)",
        ),
        ({"README.md": "---\nlicense: [\n---\n", "LICENSE": "MIT"}, "MIT (the base's LICENSE)"),
        ({"README.md": "---\n- license\n---\n"}, None),
        ({"config.json": "{}"}, None),
    ],
)
def test_the_licence_of_the_base(files: dict[str, str], wanted: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert base_license("ms:a/b", tmp_path) == wanted


def test_pocket_licences_are_known() -> None:
    assert (base_license("pocket", None) or "").startswith("Apache-2.0")


def test_onnx_goes_through_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    calls = []
    fake = types.ModuleType("optimum.exporters.onnx")
    fake.main_export = lambda model, **options: calls.append((model, options))  # type: ignore[attr-defined]
    for name in ("optimum", "optimum.exporters"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", fake)
    onnx.write_onnx(onnx.exporter(), tmp_path)
    assert calls[0][0] == str(tmp_path) and calls[0][1]["output"] == str(tmp_path / "onnx")

    def fails(model: str, **options: Any) -> None:
        raise KeyError("qwen9")

    with pytest.raises(ModelError, match="qwen9"):
        onnx.write_onnx(fails, tmp_path)


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("classification", "classification"),
        ("Qwen2_v1.5", "Qwen2_v1.5"),
        ("me/model:latest", "me/model:latest"),
        ("导出 merged", "merged"),
        ("意图", "labeltune"),
        ("My Model (v2)", "my-model-v2"),
        ("..hidden", "hidden"),
        ("a" * 90, "a" * 80),
        ("-x-", "x"),
    ],
)
def test_names_that_ollama_takes(called: str, name: str) -> None:
    from labeltune.export.ollama import ask_command, create_command, model_name

    assert model_name(called) == name
    created = shlex.split(create_command(Path("导出 merged"), called))
    assert created == ["ollama", "create", name, "-f", "导出 merged/Modelfile"]
    user = "文本:it's here,类型选型:['a', 'b']"
    assert shlex.split(ask_command(called, user)) == ["ollama", "run", name, user]
