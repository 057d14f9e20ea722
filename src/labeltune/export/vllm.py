"""For vLLM: the adapter in the form `--enable-lora` loads, the command, and a request with structured output."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import HubConfig, PromptConfig
from labeltune.errors import ModelError
from labeltune.export.engines import Engine, Served, told
from labeltune.io.outputs import is_hub_name, write_json
from labeltune.io.run_folder import ADAPTER_FILE, ADAPTER_WEIGHTS
from labeltune.models.lora import layer_names, write_renamed
from labeltune.prompts import Task
from labeltune.prompts.marks import OPEN, closing
from labeltune.prompts.multilabel import MultilabelTask
from labeltune.prompts.ner import BEFORE_LABEL, BEFORE_TEXT, END, NerTask, escaped
from labeltune.prompts.template import ChatTemplate, build_conversation
from labeltune.types import Example

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from labeltune.inference.calibration import Calibration

#: How deep entities lie in each other in what a server is held to.
_NESTED = 3
#: What `--max-lora-rank` takes (vllm/config/lora.py, `MaxLoRARanks`, v0.11 to v0.26).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
REQUEST_FILE = "vllm_request.json"
#: What vLLM calls number formats.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: How a server that is started here calls the base that an adapter belongs to.
_BASE = "labeltune-base"
#: Of a model that reads images too: what reads them is not loaded.
_TEXT_ONLY = ("--language-model-only",)
#: Labels whose tokens are compared with what a tokenizer makes of the whole string.
_COMPARED = 500
#: Stands in the request where a document goes.
SAMPLE_TEXT = "The text to be read goes here."


@dataclass(frozen=True)
class Adapter:
    """What vLLM has to know of an adapter."""

    rank: int
    max_rank: int


def read_adapter(folder: Path) -> Adapter:
    """Check that vLLM loads an adapter (vllm/lora/peft_helper.py refuses the rest).

    Raises:
        ModelError: it is damaged, or holds what vLLM does not load; the message says that a merged export works.
    """
    path = folder / ADAPTER_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        faults = {
            "DoRA (lora.dora=true)": config.get("use_dora"),
            "modules_to_save": config.get("modules_to_save"),
            "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
            "trainable token embeddings": config.get("trainable_token_indices"),
            f"ranks above {RANKS[-1]}": max(ranks) > RANKS[-1],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    for fault, found in faults.items():
        if found:
            raise ModelError(
                f"vLLM loads no adapters with {fault}; export the whole model with --merged, which vLLM serves like any other"
            )
    return Adapter(max(ranks), next(rank for rank in RANKS if rank >= max(ranks)))


def save_adapter(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    revision: str | None,
    folder: Path,
    published: torch.nn.Module | None = None,
) -> None:
    """Copy an adapter, with its base named so that others find it, and the run's tokenizer.

    Args:
        base: what `adapter_config.json` calls the base model.
        published: the model as the class that servers load, where its layers have other names (`published_shell`): an adapter whose
            names a server does not know is ignored there without a word.
    """
    names = layer_names(source, published) if published is not None else {}
    if names:
        write_renamed(source, folder, names)
    else:
        shutil.copyfile(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    config = json.loads(((folder if names else source) / ADAPTER_FILE).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    write_json(folder / ADAPTER_FILE, config)
    tokenizer.save_pretrained(folder)


def base_name(spec: str) -> str:
    """How other tools call the base model: `org/name` without `ms:` or `hf:`, else as it is."""
    return spec[3:] if is_hub_name(spec) else spec


def adapter_command(
    base: str, hub: HubConfig, folder: str, name: str, adapter: Adapter, text_only: bool = False
) -> str:
    """The shell command that serves base and adapter.

    Args:
        base: a hub's model (`ms:org/name`, `hf:org/name`), or a folder.
        folder: of the adapter.
        name: what requests call the adapter.
        text_only: the base reads images too, and was trained on texts.
    """
    options = ["--enable-lora", "--lora-modules", f"{name}={folder}"]
    options += ["--max-lora-rank", str(adapter.max_rank)]
    if is_hub_name(base) and hub.revision is not None:
        options += ["--revision", hub.revision]
    # The run's own template: the base may have none, or another one by now.
    options += ["--chat-template", f"{folder}/chat_template.jinja", *_TEXT_ONLY[:text_only]]
    return _serve(base, options, hub.trust_remote_code)


def merged_command(model: str, name: str, trust_remote_code: bool = False, text_only: bool = False) -> str:
    """The shell command that serves a merged model: a folder, or one on a hub."""
    return _serve(model, ["--served-model-name", name, *_TEXT_ONLY[:text_only]], trust_remote_code)


def _serve(model: str, options: list[str], trust_remote_code: bool) -> str:
    trust = ["--trust-remote-code"] if trust_remote_code else []
    source = "VLLM_USE_MODELSCOPE=True " if model.startswith("ms:") else ""
    return source + shlex.join(["vllm", "serve", base_name(model), *options, *trust])


def request(
    task: Task, template: ChatTemplate, name: str, max_tokens: int, example: Example | None = None
) -> dict[str, Any]:
    """A chat completion request: the run's prompt around a text, answers bound to its form.

    It names what the template is told; a run's own template takes that for granted, one that a server was given may not. Marks in a text
    are bound to their form alone: neither a regular expression nor a grammar of a server knows the document.

    Args:
        name: the model or adapter that is asked.
        max_tokens: for entities; a label ends by itself.
        example: a sample text when None.
    """
    # A row without candidates of its own; a run whose rows all bring theirs still knows the labels it has seen.
    example = example or Example("0", SAMPLE_TEXT)
    messages = task.conversation(example).messages()
    found: dict[str, Any] = {"model": name, "messages": messages, **greedy(template)}
    if task.name == "classification":
        found["structured_outputs"] = {
            "choice": [template.answer_lead + label for label in example.candidates or task.labels]
        }
    elif isinstance(task, MultilabelTask):
        # One request a label; this one asks about the first. The two answers differ in what stands behind the label.
        answers = [template.answer_lead + answer for answer in task.answers_about(task.labels[0])]
        found["structured_outputs"] = {"choice": answers}
    else:
        assert isinstance(task, NerTask)
        found["max_tokens"] = most_tokens(task, max_tokens)
        pattern = re.escape(template.answer_lead) + entity_pattern(task.labels, task.prompt.no_entities)
        if task.marked:
            pattern = marks_pattern(task, template.answer_lead)
        nested = task.marked and task.nested
        found["structured_outputs"] = (
            {"grammar": marks_grammar(task, template.answer_lead)} if nested else {"regex": pattern}
        )
    if template.options:
        found["chat_template_kwargs"] = dict(template.options)
    return found


def client_file(
    task: Task,
    template: ChatTemplate,
    name: str,
    prompt: PromptConfig,
    calibration: Calibration,
    *,
    max_new_tokens: int,
    adapter: bool = False,
) -> dict[str, Any] | None:
    """What `labeltune.client` has to know of a run: plain strings and numbers. None where a tokenizer that is given the whole string reads
    otherwise than the run.

    Args:
        name: what servers call it.
        max_new_tokens: of an answer with entities; a copy of the text does not count.
        adapter: an adapter is asked about one prompt at a time: vLLM 0.32.0 multiplies an adapter's part of the probabilities of prompts as if
            there were one token a prompt, and ends where there are several prompts (Qwen3, on a CPU).
    """
    words = {
        name: text for name, text in task.values(task.labels).items() if name not in ("category", "labels")
    }
    before, after, strip = template.around(build_conversation(prompt, SAMPLE_TEXT, words))
    several = isinstance(task, MultilabelTask)
    end = str(template.tokenizer.decode(template.end_of_turn_ids, skip_special_tokens=False))
    ids = _sample_prompt(task, template, end)
    if ids is None:
        return None
    bos, alone = template.tokenizer.bos_token, template.tokenizer("x").input_ids
    adds = bos is not None and alone[:1] == [template.tokenizer.bos_token_id]
    found = {
        "model": name,
        "task": task.name,
        "labels": list(task.labels),
        "descriptions": dict(prompt.descriptions),
        "before": before,
        "after": after,
        "strip": list(strip),
        "lead": template.answer_lead,
        "max_length": prompt.max_length,
        "special_tokens": template.special_tokens,
        "added_bos": str(bos) if adds else "",
        # A label's answer is scored with its end of turn.
        "closing": template.closing_length
        - (len(template.end_of_turn_ids) if task.name == "classification" else 0),
    }
    if isinstance(task, NerTask):
        sample = template.tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids
        return found | {
            "stop": list(template.stop_ids),
            "none": prompt.no_entities,
            "marks": task.marked,
            "depth": _NESTED if task.nested else 1,
            "frame": len(ids) - len(sample),
            "max_tokens": most_tokens(task, max_new_tokens),
            "max_new_tokens": max_new_tokens,
        }
    return found | {
        "batched": not adapter,
        "words": [prompt.positive, prompt.negative] if several else [],
        "end": end,
        "temperature": calibration.temperature,
        "length_norm": calibration.length_norm,
        "scales": {label: list(pair) for label, pair in calibration.scales.items()},
        "threshold": calibration.threshold,
        "thresholds": dict(calibration.thresholds),
    }


def _sample_prompt(task: Task, template: ChatTemplate, end: str) -> list[int] | None:
    """The tokens of the prompt around a sample text; None where a tokenizer that is given it with an answer as one string reads otherwise."""
    example, ids = Example("0", SAMPLE_TEXT), list[int]()
    conversation = task.conversation(example)
    before, after, _ = template.around(conversation)
    for answer in _compared_answers(task):
        whole = f"{before}{SAMPLE_TEXT}{after}{template.answer_lead}{answer}{end}"
        encoded = template.encode(conversation, answer)
        start, stop = encoded.answer_span
        if template.tokenizer(whole, add_special_tokens=False).input_ids != encoded.ids[:stop]:
            return None
        ids = encoded.ids[:start]
    return ids


def _compared_answers(task: Task) -> list[str]:
    """Answers whose tokens are compared."""
    if isinstance(task, NerTask):
        return [task.prompt.no_entities]
    if isinstance(task, MultilabelTask):
        return [answer for label in task.labels[:_COMPARED] for answer in task.answers_about(label)]
    return list(task.labels[:_COMPARED])


def entity_pattern(labels: tuple[str, ...], no_entities: str) -> str:
    """A regular expression for the answers of an extractor: one entity a line, or the sentence that there is none."""
    types = "|".join(re.escape(escaped(label)) for label in labels)
    text = r'([^"\\\x00-\x1f]|\\(["\\/bfnrt]|u[0-9a-fA-F]{4}))+'
    begin, end = BEFORE_TEXT.replace("{", r"\{"), END.replace("}", r"\}")
    line = f"{begin}{text}{BEFORE_LABEL}({types}){end}"
    return rf"({re.escape(no_entities)}|{line}(\n{line})*)"


def marks_pattern(task: NerTask, lead: str) -> str:
    """A regular expression for a text with marks around entities, of which none lies inside another, or the sentence that there is none."""
    ends = "|".join(re.escape(closing(label)) for label in task.labels)
    text = r"([^\[\]|\\]|\\[\[\]|\\])"
    return (
        rf"{re.escape(lead)}({re.escape(task.prompt.no_entities)}|({text}|{re.escape(OPEN)}{text}+({ends}))+)"
    )


def marks_grammar(task: NerTask, lead: str) -> str:
    """The same as a grammar in the form of llama.cpp, which xgrammar reads, too (GBNF); entities may lie inside entities where the run's do."""
    ends = " | ".join(quoted(closing(label)) for label in task.labels)
    none = quoted(lead + task.prompt.no_entities)
    return "\n".join(
        [
            f"root ::= {none} | {quoted(lead)} part+" if lead else f"root ::= {none} | part+",
            f"part ::= character | {quoted(OPEN)} {'part' if task.nested else 'character'}+ end",
            r'character ::= [^\[\]|\\] | "\\" [\[\]|\\]',
            f"end ::= {ends}",
        ]
    )


def quoted(text: str) -> str:
    """A string of a grammar; llama.cpp, xgrammar and llguidance read control characters in one form alone."""
    known = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    control = (sign if 32 <= ord(sign) != 127 else rf"\x{ord(sign):02X}" for sign in text)
    return '"' + "".join(known.get(sign, written) for sign, written in zip(text, control, strict=True)) + '"'


def greedy(template: ChatTemplate) -> dict[str, Any]:
    """What makes a server write the most probable tokens, and end where the run does. It would take penalties, and the tokens that end an
    answer, from the base's `generation_config.json` otherwise: Qwen2 has a `repetition_penalty` of 1.1 there."""
    return {"temperature": 0, "repetition_penalty": 1.0, "stop_token_ids": list(template.stop_ids)}


def most_tokens(task: NerTask, max_new_tokens: int) -> int:
    """Of an answer with entities and its end of turn. Marks stand in a copy of the text, which is with its escapes at most twice as long: the run
    reads both together."""
    return max_new_tokens + 1 + (2 * task.prompt.max_length // 3 if task.marked else 0)


def request_command(folder: Path) -> str:
    """The shell command that sends the request to a server on this machine."""
    url = "http://localhost:8000/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(f'@{folder / REQUEST_FILE}')}"


class VllmServer(Engine):
    """vLLM in an environment of its own.

    Args:
        python: of that environment.
    """

    name, health = "vLLM", "/v1/models"
    program: tuple[str, ...] = ("-m", "vllm.entrypoints.openai.api_server")

    def __init__(self, served: Served, python: str) -> None:
        super().__init__(served)
        self._python = python

    def environment(self, port: int) -> dict[str, str]:
        """On a CPU vLLM would take half of the memory for its cache."""
        name = "VLLM_CPU_KVCACHE_SPACE"
        return {name: os.environ.get(name, "1")}

    def command(self, port: int) -> list[str]:
        """What starts it on this machine."""
        served = self.served
        found = [self._python, *self.program, "--host", "127.0.0.1"]
        found += ["--port", str(port), "--dtype", _DTYPES[served.dtype]]
        found += ["--max-model-len", str(served.max_tokens)]
        if served.base is None:
            found += ["--model", str(served.folder), "--served-model-name", served.name]
        else:
            found += ["--model", str(served.base), "--served-model-name", _BASE, "--enable-lora"]
            found += ["--lora-modules", f"{served.name}={served.folder}"]
            found += ["--max-lora-rank", str(served.rank)]
            found += ["--chat-template", str(served.folder / "chat_template.jinja")]
        found += _TEXT_ONLY[: served.text_only]
        return [*found, "--trust-remote-code"] if served.trust_remote_code else found

    def prompt_told(self, url: str, prompt: list[int], adapter: bool) -> Any:
        """The log-probabilities of a prompt's tokens."""
        name = self.served.name if adapter else self._base_of(url)
        body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        with told(f"{url}/v1/completions", body) as answer:
            places = answer["choices"][0]["prompt_logprobs"]
            return [each["logprob"] for place in places if place for each in place.values()]

    def _base_of(self, url: str) -> str:
        """How the server calls the base of the adapter."""
        with told(f"{url}/v1/models") as answer:
            bases = {str(each["id"]): each.get("parent") for each in answer["data"]}
        if bases.get(self.served.name) is None:
            raise ModelError(
                f"the server at {url} has no adapter {self.served.name}; it has {', '.join(bases)}"
            )
        return str(bases[self.served.name])

    def written(self, url: str, row: Example) -> tuple[str, list[int] | int]:
        """The answer to the request that the export prints."""
        served = self.served
        body = request(served.builder.task, served.builder.template, served.name, served.max_new_tokens, row)
        with told(f"{url}/v1/chat/completions", {**body, "return_token_ids": True}) as answer:
            return str(answer["choices"][0]["message"]["content"]), list(answer["prompt_token_ids"])


class TransformersServer(VllmServer):
    """Plain transformers in an environment of its own; it answers as vLLM does (`plain_server`)."""

    name, holds = "transformers", False
    program = (str(Path(__file__).with_name("plain_server.py")),)

    def command(self, port: int) -> list[str]:
        """The same, and what ends an answer, which is no part of a plain model's own settings."""
        return [
            *super().command(port),
            "--stop-ids",
            ",".join(map(str, self.served.builder.template.stop_ids)),
        ]
