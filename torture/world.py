"""A two-layer model, rows and configs for the parts that train and predict, and how two runs are compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture import zygote
from torture.common import use_tests

#: What differs from run to run because it is measured, not computed.
MEASURED = ("runtime", "per_second", "memory_gb", "total_flos")


def in_child(action: Callable[[], object], log: Path) -> None:
    """Run something that computes in a forked process, so that this one can go on forking."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            action()
            code = 0
        finally:
            os._exit(code)
    if zygote.finish(child) != 0:
        raise RuntimeError(f"setting up failed; see {log}")


def build(folder: Path) -> None:
    """`model/`, `classification.jsonl` and `ner.jsonl` in a folder; caches and temporary files of commands go there, too."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in (("HOME", "home"), ("LABELTUNE_CACHE", "cache"), ("TMPDIR", "tmp"), ("HF_HOME", "hf")):
        (folder / place).mkdir(exist_ok=True)
        os.environ[name] = str(folder / place)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("SWANLAB_API_KEY", None)
    use_tests()
    from helpers.rows import classification_rows, ner_rows, write_jsonl
    from helpers.tiny_models import make_model, make_tokenizer

    def make() -> None:
        tokenizer = make_tokenizer()
        make_model(len(tokenizer)).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")

    in_child(make, folder / "setup.log")
    write_jsonl(folder / "classification.jsonl", classification_rows(72))
    write_jsonl(folder / "ner.jsonl", ner_rows(72))


def config(folder: Path, task: str, training: dict[str, Any], **sections: Any) -> Path:
    """Write a config for `build`'s model and rows; its output goes to `out` in the working folder."""
    values: dict[str, Any] = {
        "task": task,
        "model": str(folder / "model"),
        "output_dir": "out",
        "tracking": "none",
        "data": {"train": str(folder / f"{task}.jsonl"), "validation_fraction": 0.25},
        "prompt": {"max_length": 512},
        "lora": {"dropout": 0.1, "r": 4},
        "training": {"batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, **training},
        "generation": {"max_new_tokens": 24},
    }
    if task == "ner":
        values["data"]["labels"] = ["地点", "人名", "地理实体", "组织"]
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(values.get(name), dict) else section
    path = folder / f"{task}-{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


def empty(folder: Path) -> Path:
    """The folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def without_measured(value: Any) -> Any:
    """JSON without what was measured: times, memory, rates."""
    if isinstance(value, dict):
        return {k: without_measured(v) for k, v in value.items() if not any(part in k for part in MEASURED)}
    if isinstance(value, list):
        return [without_measured(v) for v in value]
    return value


def differences(found: Path, expected: Path) -> Iterator[str]:
    """How a run folder differs from another one of the same config, in anything that is computed: bit for bit."""
    names = [
        sorted(_name(path, run) for path in run.rglob("*") if path.is_file()) for run in (found, expected)
    ]
    for name in sorted(set(names[0]) ^ set(names[1])):
        yield f"{name} is {'missing' if name in names[1] else 'left over'}"
    best = [(run / "best").readlink().name for run in (found, expected)]
    if best[0] != best[1]:
        yield f"best is {best[0]}, not {best[1]}"
    for name in sorted(set(names[0]) & set(names[1])):
        one, two = (found / name).read_bytes(), (expected / name).read_bytes()
        # A manifest follows from files that are compared; every resumed part is a run of its own in a local SwanLab.
        if one == two or name == "swanlab.json" or name.endswith("manifest.json"):
            continue
        if name.endswith((".json", ".jsonl")):
            pieces = [
                c.splitlines() if name.endswith(".jsonl") else [c] for c in (one.decode(), two.decode())
            ]
            values = [[without_measured(json.loads(piece)) for piece in lines] for lines in pieces]
            if values[0] == values[1]:
                continue
            yield f"{name} differs: {_first_difference(*values)}"
        elif not name.endswith(".html"):  # says where the run is
            yield f"{name} differs"


def _name(path: Path, run: Path) -> str:
    return path.relative_to(run).as_posix()


def _first_difference(one: Any, two: Any) -> str:
    if isinstance(one, dict) and isinstance(two, dict) and set(one) == set(two):
        return next(f"{k}: {_first_difference(one[k], two[k])}" for k in one if one[k] != two[k])
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return next(
            f"{i}: {_first_difference(a, b)}" for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b
        )
    return f"{str(one)[:300]} against {str(two)[:300]}"
