"""Keys in the environment, and not one of them in anything that is written or printed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from torture.common import PartResult, Settings, use_tests

VARIABLES = ("SWANLAB_API_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "LABELTUNE_API_KEY", "WANDB_API_KEY")


def run(settings: Settings) -> PartResult:
    """train, evaluate, predict, export (with its model card), data check --report and serve; then every byte is searched."""
    use_tests()
    from helpers.rows import classification_rows, write_jsonl
    from helpers.tiny_models import make_model, make_tokenizer

    result = PartResult("secrets")
    folder = settings.folder / "work"
    home = settings.folder / "home"
    model = settings.folder / "Qwen2-tiny"
    for each in (folder, home):
        each.mkdir()
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    write_jsonl(folder / "train.jsonl", classification_rows(24))
    (folder / "run.yaml").write_text(
        f"model: {model}\noutput_dir: out\nprompt: {{max_length: 512}}\nswanlab: {{mode: local}}\n"
        "training: {max_steps: 2, save_steps: 1, batch_size: 4}\n",
        encoding="utf-8",
    )
    planted = {name: secrets.token_hex(20) for name in VARIABLES}
    environment = {
        **os.environ,
        **planted,
        "HOME": str(home),
        "LABELTUNE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    commands: tuple[tuple[int, list[str]], ...] = (
        (0, ["train", "run.yaml"]),
        (0, ["evaluate", "out", "--data", "train.jsonl", "-o", "evaluation"]),
        (0, ["predict", "out", "train.jsonl", "-o", "predictions.jsonl"]),
        (0, ["export", "out", "exported"]),
        (0, ["export", "out", "merged", "--merged"]),
        (0, ["data", "check", "train.jsonl", "--report", "data.html"]),
        (2, ["train", "run.yaml", "model=hf:nobody/nothing", "output_dir=none"]),
        (0, ["doctor"]),
    )
    for number, (expected, command) in enumerate(commands):
        done = subprocess.run(
            [sys.executable, "-m", "labeltune", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=300,
        )
        (folder / f"shown-{number}.txt").write_bytes(done.stdout + done.stderr)
        result.check(done.returncode == expected, f"{command[0]}: {done.returncode}: {done.stderr[-300:]!r}")
    requests = serve(folder, environment, result)
    searched = 0
    for path in sorted([*folder.rglob("*"), *home.rglob("*")]):
        if path.is_file() and not path.is_symlink():
            raw = path.read_bytes()
            searched += 1
            for name, key in planted.items():
                found = key.encode() in raw or key.encode("utf-16-le") in raw
                result.check(not found, f"{name} stands in {path.relative_to(settings.folder)}")
    made = [
        name
        for name in ("out", "swanlog", "evaluation", "predictions.jsonl", "exported", "data.html")
        if (folder / name).exists()
    ]
    result.check("swanlog" in made and "out" in made, f"the run left too little to search: {made}")
    result.inputs = searched
    result.notes.append(
        f"{len(VARIABLES)} keys in the environment, none in {searched} files: {', '.join(made)}, caches, what was printed, "
        f"and a server's log of {requests} requests with the right key and wrong ones"
    )
    return result


def serve(folder: Path, environment: dict[str, str], result: PartResult) -> int:
    """A server whose log and answers are kept in `folder`; returns how many requests it answered."""
    from helpers.serving import Server

    key = environment["LABELTUNE_API_KEY"]
    command = [sys.executable, "-m", "labeltune", "serve", "out", "--port", "0", "--log-texts"]
    right, document = {"Authorization": f"Bearer {key}"}, {"json": {"text": "a document"}}
    requests: tuple[tuple[str, str, dict[str, str], dict[str, Any], int | None], ...] = (
        ("POST", "/v1/classify", right, document, 200),
        ("POST", "/v1/classify", {"Authorization": f"Bearer {key}x"}, document, 401),
        ("POST", "/v1/classify", {"Authorization": f"Basic {key}"}, document, 401),
        ("POST", "/v1/classify", {"X-Api-Key": key[:-1]}, document, 401),
        *(("GET", path, right, {}, None) for path in ("/v1/models", "/metrics", "/healthz", "/", "/login")),
        ("POST", "/login", {}, {"data": {"username": "me", "password": key}}, None),
        ("POST", "/v1/classify", right, {"content": b"{"}, None),
    )
    with (folder / "serve.stdout").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.PIPE, text=True
        )
    server = Server(process)
    try:
        server.wait()
        with (folder / "answers.txt").open("wb") as file:
            for method, path, headers, body, expected in requests:
                answer = server.client.request(method, server.url + path, headers=headers, **body)
                result.check(
                    expected in (None, answer.status_code),
                    f"serve: {method} {path}: {answer.status_code}, not {expected}",
                )
                file.write(answer.content)
    finally:
        code = server.stop()
        (folder / "serve.log").write_text("".join(server.lines), encoding="utf-8")
    result.check(code == 0, f"serve: exit code {code}")
    return len(requests)
