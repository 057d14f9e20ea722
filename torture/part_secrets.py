"""Keys in the environment, and not one of them in anything that is written or printed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

from torture.common import PartResult, Settings, use_tests

VARIABLES = ("SWANLAB_API_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN", "LABELTUNE_API_KEY", "WANDB_API_KEY")


def run(settings: Settings) -> PartResult:
    """train, evaluate, predict, export (with its model card) and data check --report; then every byte is searched."""
    use_tests()
    from conftest import classification_rows, make_model, make_tokenizer, write_jsonl

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
    commands = (
        ["train", "run.yaml"],
        ["evaluate", "out", "--data", "train.jsonl", "-o", "evaluation"],
        ["predict", "out", "train.jsonl", "-o", "predictions.jsonl"],
        ["export", "out", "exported"],
        ["export", "out", "merged", "--merged"],
        ["data", "check", "train.jsonl", "--report", "data.html"],
        ["train", "run.yaml", "model=hf:nobody/nothing", "output_dir=none"],
        ["doctor"],
    )
    for number, command in enumerate(commands):
        done = subprocess.run(
            [sys.executable, "-m", "labeltune", *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            timeout=300,
        )
        (folder / f"shown-{number}.txt").write_bytes(done.stdout + done.stderr)
        expected = (0, 1, 2) if number >= 3 else (0,)
        result.check(done.returncode in expected, f"{command[0]}: {done.stderr[-300:]!r}")
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
        f"{len(VARIABLES)} keys in the environment, none in {searched} files: {', '.join(made)}, caches and what was printed"
    )
    return result
