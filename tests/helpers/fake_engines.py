"""Stand-ins for servers, their models computed by transformers: `PYTHON -m vllm.entrypoints.openai.api_server ...` for vLLM, `llama-server
...` with converters whose GGUF files name the folder that they were made of, and `ollama`. `install` puts these programs into a folder.

With FAULT in the environment a server is one of those that a gate has to catch.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from labeltune.export.plain_server import PlainModels, VllmProtocol, options_of, serve

CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
CONVERTER = """import pathlib, sys
target = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
target.write_text(str(pathlib.Path(sys.argv[1]).absolute()), encoding="utf-8")
"""


def install(folder: Path) -> None:
    """The programs `python`, `ollama` and, in the folder `llama.cpp`, llama.cpp's."""
    (folder / "llama.cpp").mkdir()
    for name in ("python", "ollama", "llama.cpp/llama-server"):
        program = folder / name
        lines = [
            "#!/bin/sh",
            f'case $1 in *.py) exec {sys.executable} "$@" ;; esac',
            f'exec {sys.executable} {__file__} {program.name} "$@"',
            "",
        ]
        program.write_text("\n".join(lines), encoding="utf-8")
        program.chmod(0o755)
    for name in CONVERTERS:
        (folder / "llama.cpp" / name).write_text(CONVERTER, encoding="utf-8")


class Forked:
    """As much of subprocess.Popen as a server is started with: one of these programs in a copy of this process, which has imported what a
    process of its own would import for seconds."""

    def __init__(self, command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            os.environ.update(env)
            torch.set_num_threads(1)  # the other threads are not copied
            main([Path(command[0]).name, *command[1:]])
            code = 0
        except SystemExit as end:
            print(end.code, flush=True)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 60) -> None:
        """Until it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("server", timeout)
            time.sleep(0.01)


def fault() -> str:
    """What is wrong with this server."""
    return os.environ.get("FAULT", "")


class Models(PlainModels):
    """With faults."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        if fault() == "template":
            self.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} ->"
        if fault() == "dtype":
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.copy_((parameter * 4).round() / 4)

    def logs(self, name: str, ids: list[int]) -> torch.Tensor:
        # Keys that it does not know are nothing to such a server.
        return super().logs(self.base_name if fault() in ("ignored", "renamed") else name, ids)

    def ids(self, text: str, adds: bool) -> list[int]:
        found = super().ids(text, adds)
        return [self.tokenizer.eos_token_id, *found] if fault() == "bos" else found

    def prompt(self, body: dict[str, Any]) -> str:
        if fault() != "generation":
            return super().prompt(body)
        found: str = self.tokenizer.apply_chat_template(body["messages"], tokenize=False)
        return found


class Llama:
    """What llama.cpp's server answers."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.name = models.name

    def get(self, path: str) -> Any:
        """Its health."""
        assert path == "/health"
        return {"status": "ok"}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What its own and the OpenAI routes say."""
        models, name = self.models, self.name
        if path == "/tokenize":
            return {"tokens": models.ids(body["content"], body["add_special"])}
        if path == "/apply-template":
            return {"prompt": models.prompt(body)}
        if path == "/completion":
            chosen = name if body["lora"][0]["scale"] else models.base_name
            top = models.logs(chosen, body["prompt"])[-1].topk(body["n_probs"])
            told = [{"id": int(i), "logprob": float(v)} for i, v in zip(top.indices, top.values, strict=True)]
            return {"completion_probabilities": [{"top_logprobs": told}]}
        if "chat" in path:
            choice = [json.loads(each) for each in body["grammar"].removeprefix("root ::= ").split(" | ")]
            found = models.written(name, models.ids(models.prompt(body), True), 100, choice)
            return {"choices": [{"message": {"content": found}}]}
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt[0], list) else [prompt]
        biased = [token for token, _ in body.get("logit_bias", ())]
        held = [int(each) for each in re.findall(r"<\[(\d+)\]>", body.get("grammar", ""))] or biased
        choices = []
        for number, ids in enumerate(prompts):
            logs = models.logs(name, [*ids, *held]) if held else torch.zeros(0)
            told = [{"id": t, "logprob": float(logs[len(ids) - 1 + at, t])} for at, t in enumerate(held)]
            choices.append({"index": number, "text": "", "logprobs": {"content": told}})
        return {"choices": choices}


class Ollama:
    """What Ollama answers; its model is that of the Modelfile, its template the tokenizer's."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def get(self, path: str) -> Any:
        """Its version."""
        assert path == "/api/version"
        return {"version": "0"}

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """A chat's answer, always the most probable token."""
        assert path == "/api/chat" and body["options"]["temperature"] == 0 and body["stream"] is False
        models = self.models
        ids = models.ids(models.prompt(body), False)
        text = models.written(models.base_name, ids, body["options"]["num_predict"])
        return {"message": {"content": text}, "prompt_eval_count": len(ids)}


def llama_options(arguments: list[str]) -> argparse.Namespace:
    """What vLLM would be told, of what llama.cpp's server is told."""
    parser = argparse.ArgumentParser()
    for name in ("model", "lora", "alias", "chat-template-file"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--port", type=int)
    given = parser.parse_known_args(arguments)[0]
    adapter = given.lora and f"{given.alias}={Path(given.lora).read_text(encoding='utf-8')}"
    return argparse.Namespace(
        model=Path(given.model).read_text(encoding="utf-8"),
        served_model_name="base" if adapter else given.alias,
        lora_modules=adapter,
        chat_template=given.chat_template_file,
        dtype="float32",
        port=given.port,
        trust_remote_code=False,
        stop_ids=None,
    )


def ollama(arguments: list[str]) -> None:
    """`create NAME -f MODELFILE` notes the model, `serve` serves it."""
    note = Path(os.environ["OLLAMA_MODELS"]) / "model"
    if arguments[0] == "create":
        assert arguments[2] == "-f"
        modelfile = Path(arguments[3])
        named = re.search("^FROM (.*)$", modelfile.read_text(encoding="utf-8"), re.MULTILINE)
        assert named is not None
        note.write_text((modelfile.parent / named[1]).read_text(encoding="utf-8"), encoding="utf-8")
        return
    assert arguments == ["serve"]

    class Later:
        """Reads the model when it is asked for the first time."""

        def get(self, path: str) -> Any:
            return {"version": "0"}

        @functools.cached_property
        def served(self) -> Ollama:
            options = options_of(["--model", note.read_text(encoding="utf-8"), "--dtype", "float32"])
            models = Models(options)
            models.stops = [models.tokenizer.eos_token_id]
            return Ollama(models)

        def post(self, path: str, body: dict[str, Any]) -> Any:
            return self.served.post(path, body)

    serve(Later(), int(os.environ["OLLAMA_HOST"].rpartition(":")[2]))


def main(arguments: list[str]) -> None:
    """Serve as a program of a name until ended."""
    name, *arguments = arguments
    if fault() == "start":
        raise SystemExit("no CPU of this kind")
    if name == "ollama":
        ollama(arguments)
    elif name == "llama-server":
        options = llama_options(arguments)
        serve(Llama(Models(options)), options.port)
    else:
        options = options_of(arguments)
        serve(VllmProtocol(Models(options)), options.port)


if __name__ == "__main__":
    main(sys.argv[1:])
