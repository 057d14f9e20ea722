"""The documentation is true: its commands run, its table is current, and both languages say the same commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import classification_rows, ner_rows, write_jsonl
from labeltune.config_table import replace_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md")

FAKE_MODELSCOPE = """
import os, sys, types
fake = types.ModuleType("modelscope")
fake.snapshot_download = lambda repo, **_: os.environ["LABELTUNE_TEST_MODEL"]
sys.modules["modelscope"] = fake
"""


def blocks(page: str, language: str) -> list[list[str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block.splitlines() for block in found]


def without_comments(found: list[list[str]]) -> list[list[str]]:
    return [[re.sub(r"\s+# .*", "", line) for line in block] for block in found]


def commands(page: str) -> list[list[str]]:
    stripped = [[line.strip() for line in block] for block in without_comments(blocks(page, "bash"))]
    return [[line for line in block if line] for block in stripped]


@pytest.fixture
def world(in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `pocket` and ModelScope give a two-layer model, and the original's data is there."""
    cache = in_folder / "cache"
    shutil.copytree(model_folder, cache / "pocket-1")
    fake = in_folder / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text(FAKE_MODELSCOPE, encoding="utf-8")
    monkeypatch.setenv("LABELTUNE_CACHE", str(cache))
    monkeypatch.setenv("LABELTUNE_TEST_MODEL", str(model_folder))
    monkeypatch.setenv("PYTHONPATH", str(fake), prepend=os.pathsep)
    for name, rows in (
        ("train", classification_rows(24)),
        ("test", classification_rows(6)),
        ("ccfbdci", ner_rows(24)),
    ):
        write_jsonl(in_folder / f"{name}.jsonl", rows)
    return in_folder


def test_readme_commands_run(world: Path) -> None:
    ran = 0
    for block in commands("README.md"):
        for line in block:
            if line.startswith(("make ", "pip ")):
                continue
            command = line.replace("python ", f"{sys.executable} {ROOT}/")
            command = re.sub(r"^labeltune", f"{sys.executable} -m labeltune", command)
            if "train_qwen2_ner" in command:
                command += " prompt.max_length=600 generation.max_new_tokens=8"
            done = subprocess.run(command, shell=True, cwd=world, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
            assert "Traceback" not in done.stderr, line
            ran += 1
    assert ran >= 10
    assert (world / "output" / "Qwen2-NER" / "best").exists()
    for block in blocks("README.md", "python"):
        script = subprocess.run(
            [sys.executable, "-c", "\n".join(block)], cwd=world, capture_output=True, text=True
        )
        assert script.returncode == 0, script.stderr[-2000:]


def test_both_languages_have_the_same_commands() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1])
    first, second = (without_comments(blocks(page, "python")) for page in PAGES)
    assert first == second and first


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_keys_is_current(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert replace_table(text) == text, f"run: python -m labeltune.config_table {page}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_weights_or_large_files_are_committed() -> None:
    for path in tracked_files():
        assert path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".whl"}, path
        assert path.stat().st_size < 1_000_000, path


def test_configs_and_examples_are_valid() -> None:
    from labeltune.config import load_config

    for path in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")]:
        load_config(path)
        assert "labeltune train" in path.read_text(encoding="utf-8"), f"{path} does not say how to launch it"


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_starter_trains(task: str, world: Path) -> None:
    command = [sys.executable, "-m", "labeltune"]
    for arguments in (["init", task], ["data", "check", f"{task}.jsonl"]):
        assert subprocess.run([*command, *arguments], cwd=world).returncode == 0
    limits = ["training.max_steps=1", "generation.max_new_tokens=4", "tracking=none"]
    done = subprocess.run(
        [*command, "train", f"{task}.yaml", *limits],
        cwd=world,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
