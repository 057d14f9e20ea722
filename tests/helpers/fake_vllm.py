"""A stand-in for vLLM's server, started as it is: `PYTHON -m vllm.entrypoints.openai.api_server ...`; its model is computed by transformers.

With FAULT in the environment it is one of the servers that a gate has to catch.
"""

from __future__ import annotations

import argparse
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

FAULT = os.environ.get("FAULT", "")


class Models:
    """Base, adapter or whole model by their names, and how prompts are read."""

    def __init__(self, options: argparse.Namespace) -> None:
        dtype = torch.float32 if FAULT == "dtype" else getattr(torch, options.dtype)
        own = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        if FAULT == "dtype":
            with torch.no_grad():
                for parameter in own.parameters():
                    parameter.copy_((parameter * 4).round() / 4)
        self.by_name = {options.served_model_name: own}
        folder = options.model
        if options.lora_modules:
            name, _, folder = options.lora_modules.partition("=")
            base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
            # Keys that it does not know are nothing to such a server.
            renamed = FAULT in ("ignored", "renamed")
            self.by_name[name] = base.eval() if renamed else PeftModel.from_pretrained(base, folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if options.chat_template:
            self.tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        if FAULT == "template":
            self.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} ->"

    def ids(self, text: str, adds: bool) -> list[int]:
        """Tokens of a text."""
        found: list[int] = self.tokenizer(text, add_special_tokens=adds).input_ids
        return [self.tokenizer.eos_token_id, *found] if FAULT == "bos" else found

    def logs(self, name: str, ids: list[int]) -> torch.Tensor:
        """Log-probabilities behind every token."""
        with torch.no_grad():
            return torch.log_softmax(self.by_name[name](torch.tensor([ids])).logits[0].double(), dim=-1)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """`prompt_logprobs` of prompts."""
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = []
        for number, prompt in enumerate(prompts):
            ids = self.ids(prompt, body.get("add_special_tokens", True))
            logs = self.logs(body["model"], ids)
            told = [{str(token): {"logprob": float(logs[at, token])}} for at, token in enumerate(ids[1:])]
            choices.append({"index": number, "text": "", "prompt_logprobs": [None, *told]})
        return {"choices": choices}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """One of `choice`, token by token the most probable that still leads to one."""
        prompt = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=FAULT != "generation"
        )
        ids, left = self.ids(prompt, False), body["structured_outputs"]["choice"]
        ways = {choice: self.tokenizer(choice, add_special_tokens=False).input_ids for choice in left}
        written: list[int] = []
        while len(ways) > 1:
            logs = self.logs(body["model"], [*ids, *written])[-1]
            going = {way[len(written)] for way in ways.values() if len(way) > len(written)}
            best = max(going, key=lambda token: float(logs[token]))
            written.append(best)
            ways = {name: way for name, way in ways.items() if way[: len(written)] == written}
        (found,) = ways
        assert body["return_token_ids"] is True
        return {"choices": [{"message": {"content": found}}], "prompt_token_ids": ids}


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    for name in ("model", "served-model-name", "lora-modules", "max-lora-rank", "chat-template", "dtype"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    options = parser.parse_known_args()[0]
    if FAULT == "start":
        raise SystemExit("no CPU of this kind")
    models = Models(options)

    class Handler(BaseHTTPRequestHandler):
        def _tell(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._tell({"data": [{"id": name} for name in models.by_name]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._tell(models.chat(body) if "chat" in self.path else models.completion(body))

    HTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
