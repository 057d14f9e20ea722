"""A server of an export by plain transformers, that speaks as vLLM does as far as the gate asks; for `--engine transformers`.

It is run by the python of another environment and imports nothing of labeltune, so that it says what that environment makes of an export.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class PlainModels:
    """Base and adapter, or a whole model, by their names, and how prompts are read."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.base_name, folder = options.served_model_name, options.model
        self.by_name = {self.base_name: self.loaded(options)}
        if options.lora_modules:
            from peft import PeftModel

            name, _, folder = options.lora_modules.partition("=")
            self.by_name[name] = PeftModel.from_pretrained(self.loaded(options), folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if options.chat_template:
            self.tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")

    def loaded(self, options: argparse.Namespace) -> Any:
        """The model of `--model`."""
        dtype, trusted = getattr(torch, options.dtype), options.trust_remote_code
        return AutoModelForCausalLM.from_pretrained(
            options.model, dtype=dtype, trust_remote_code=trusted
        ).eval()

    def ids(self, text: str, adds: bool) -> list[int]:
        """Tokens of a text, with or without those that the tokenizer puts around every text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=adds).input_ids
        return found

    def prompt(self, body: dict[str, Any]) -> str:
        """The prompt of a conversation."""
        more = body.get("chat_template_kwargs") or {}
        found: str = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **more
        )
        return found

    def logs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Log-probabilities behind every token, shape [tokens, vocabulary]."""
        with torch.no_grad():
            return torch.log_softmax(self.by_name[name](torch.tensor([ids])).logits[0].double(), dim=-1)

    def chosen(self, name: str, ids: list[int], choice: list[str]) -> str:
        """One of some answers, token by token the most probable that still leads to one."""
        ways = {answer: self.ids(answer, False) for answer in choice}
        written: list[int] = []
        while len(ways) > 1:
            logs = self.logs(name, [*ids, *written])[-1]
            going = {way[len(written)] for way in ways.values() if len(way) > len(written)}
            ended = [answer for answer, way in ways.items() if len(way) == len(written)]
            best = max(going, key=lambda token: float(logs[token]))
            if ended and float(logs[self.tokenizer.eos_token_id]) >= float(logs[best]):
                return ended[0]
            written.append(best)
            ways = {answer: way for answer, way in ways.items() if way[: len(written)] == written}
        return next(iter(ways))

    def written(self, name: str, ids: list[int], most: int) -> str:
        """What it writes by itself, always the most probable token."""
        with torch.no_grad():
            found = self.by_name[name].generate(
                torch.tensor([ids]), max_new_tokens=most, do_sample=False, pad_token_id=0
            )
        return str(self.tokenizer.decode(found[0][len(ids) :], skip_special_tokens=True))


class VllmProtocol:
    """As much of vLLM's protocol as the gate asks."""

    def __init__(self, models: PlainModels) -> None:
        self.models = models

    def get(self, path: str) -> Any:
        """Its models."""
        names, base = self.models.by_name, self.models.base_name
        return {"data": [{"id": name, "parent": base if name != base else None} for name in names]}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A chat's answer, or `prompt_logprobs` of prompts."""
        models, name = self.models, body["model"]
        if path.endswith("/chat/completions"):
            ids = models.ids(models.prompt(body), False)
            choice = body.get("structured_outputs", {}).get("choice")
            text = (
                models.chosen(name, ids, choice) if choice else models.written(name, ids, body["max_tokens"])
            )
            return {"choices": [{"message": {"content": text}}], "prompt_token_ids": ids}
        prompt = body["prompt"]
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        choices = []
        for number, one in enumerate(prompts):
            ids = models.ids(one, body.get("add_special_tokens", True)) if isinstance(one, str) else one
            logs = models.logs(name, ids)
            told = [{str(token): {"logprob": float(logs[at, token])}} for at, token in enumerate(ids[1:])]
            choices.append({"index": number, "text": "", "prompt_logprobs": [None, *told]})
        return {"choices": choices}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """What vLLM is told; more is left alone."""
    parser = argparse.ArgumentParser()
    for name in ("model", "served-model-name", "lora-modules", "chat-template", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_known_args(arguments)[0]


def serve(server: Any, port: int) -> None:
    """Answer on this machine until ended."""

    class Handler(BaseHTTPRequestHandler):
        def _tell(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._tell(server.get(self.path))

        def do_POST(self) -> None:
            self._tell(
                server.post(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    given = options_of()
    serve(VllmProtocol(PlainModels(given)), given.port)
