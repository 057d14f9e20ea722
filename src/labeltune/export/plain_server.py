"""A server of an export by plain transformers, that speaks as vLLM does as far as the gate asks; for `--engine transformers`.

It is run by the python of another environment and imports nothing of labeltune, so that it says what that environment makes of an export.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file has modules that are called as other libraries are

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class PlainModels:
    """A whole model, or an adapter and its base, and how prompts are read; computed on the CPU.

    Attributes:
        base_name: what the model of `--model` is called.
        name: what the adapter is called; `base_name` without one.
        stops: tokens that end an answer.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.base_name = self.name = options.served_model_name
        self.stops = [int(each) for each in (options.stop_ids or "").split(",") if each]
        folder, trusted = options.model, options.trust_remote_code
        dtype = getattr(torch, options.dtype)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trusted)
        if options.lora_modules:
            from peft import PeftModel

            self.name, _, folder = options.lora_modules.partition("=")
            self.model = PeftModel.from_pretrained(self.model, folder)
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        if options.chat_template:
            self.tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")

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
        if name not in (self.name, self.base_name):
            raise KeyError(f"there is no model {name}")
        bare = name == self.base_name != self.name
        with torch.no_grad(), self.model.disable_adapter() if bare else contextlib.nullcontext():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), dim=-1)

    def written(self, name: str, ids: list[int], most: int, choice: list[str] | None = None) -> str:
        """What it writes, always the most probable token; of some answers one of these, by the tokens that still lead to one."""
        ways = [self.ids(answer, False) for answer in choice] if choice else None
        found: list[int] = []
        while len(found) < most:
            logs = self.logs(name, [*ids, *found])[-1]
            going: list[int] | None = None
            if ways is not None:
                ways = [way for way in ways if way[: len(found)] == found]
                going = [way[len(found)] for way in ways if len(way) > len(found)]
                if any(len(way) == len(found) for way in ways):
                    going += self.stops
                if not set(going) - set(self.stops):
                    break
            best = max(going, key=lambda token: float(logs[token])) if going else int(logs.argmax())
            if best in self.stops:
                break
            found.append(best)
        return str(self.tokenizer.decode(found, skip_special_tokens=True))


class VllmProtocol:
    """As much of vLLM's protocol as the gate asks."""

    def __init__(self, models: PlainModels) -> None:
        self.models = models

    def get(self, path: str) -> Any:
        """Its models."""
        name, base = self.models.name, self.models.base_name
        told = [{"id": base, "parent": None}, {"id": name, "parent": base}]
        return {"data": told if name != base else told[:1]}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A chat's answer, or `prompt_logprobs` of prompts."""
        models, name = self.models, body["model"]
        if path.endswith("/chat/completions"):
            ids = models.ids(models.prompt(body), False)
            choice = body.get("structured_outputs", {}).get(
                "choice"
            )  # what else bounds an answer is left alone
            text = models.written(name, ids, body.get("max_tokens", 1000), choice)
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
    for name in ("model", "served-model-name", "lora-modules", "chat-template", "dtype", "stop-ids"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_known_args(arguments)[0]


def serve(server: Any, port: int) -> None:
    """Answer on this machine until ended."""

    class Handler(BaseHTTPRequestHandler):
        def _tell(self, answer: Any) -> None:
            try:
                code, value = 200, answer()
            except Exception as error:  # told to who asks, whatever it is
                code, value = 500, {"error": f"{type(error).__name__}: {error}"}
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._tell(lambda: server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._tell(lambda: server.post(self.path, body))

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    given = options_of()
    serve(VllmProtocol(PlainModels(given)), given.port)
