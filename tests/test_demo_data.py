"""The first ten minutes: the rows of the demo and of `labeltune init` keep their promise, and little has to be installed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.rows import read_jsonl
from labeltune.config import load_config
from labeltune.default_prompts import ENGLISH_PROMPTS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
STARTER = ROOT / "src" / "labeltune" / "starter"
ENTITY_NAMES = {
    "zh": {
        "PER": ["人名", "姓名"],
        "GPE": ["地缘政治实体", "政治实体", "地理实体", "社会实体"],
        "ORG": ["组织", "团体", "机构"],
        "LOC": ["地址", "地点", "地名"],
    },
    "en": {
        "PER": ["person", "human name"],
        "GPE": ["city or country", "geopolitical entity"],
        "ORG": ["organization", "institution"],
        "LOC": ["place", "location"],
    },
}


def rows(name: str, folder: Path = DATA) -> list[dict[str, Any]]:
    return read_jsonl(folder / f"{name}.jsonl")


def both(language: str, task: str) -> list[dict[str, Any]]:
    return rows(f"{language}_{task}_train") + rows(f"{language}_{task}_test")


@pytest.mark.parametrize("task", ["classification", "ner"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_there_are_enough_rows(language: str, task: str) -> None:
    assert len(rows(f"{language}_{task}_train")) >= 240
    assert len(rows(f"{language}_{task}_test")) >= 80


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_two_rows_are_alike(language: str) -> None:
    texts = [row["text"] for task in ("classification", "ner") for row in both(language, task)]
    grams = [{text[i : i + 5] for i in range(len(text) - 4)} for text in texts]
    for index, left in enumerate(grams):
        for other in range(index):
            shared = len(left & grams[other])
            union = len(left) + len(grams[other]) - shared
            assert shared <= 0.5 * union, (texts[index], texts[other])
    openings = Counter(text[:20] for text in texts)
    assert max(openings.values()) <= 3, openings.most_common(1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_classes_are_balanced_and_do_not_name_themselves(language: str) -> None:
    train, test = rows(f"{language}_classification_train"), rows(f"{language}_classification_test")
    labels = {row["output"] for row in train}
    assert len(labels) >= 8
    for label in labels:
        assert sum(row["output"] == label for row in train) >= 20
        assert sum(row["output"] == label for row in test) >= 8
        texts = [row["text"] for row in train + test if row["output"] == label]
        word = re.compile(rf"\b{re.escape(label)}\b" if label.isascii() else re.escape(label), re.IGNORECASE)
        assert sum(bool(word.search(text)) for text in texts) <= 0.1 * len(texts)
    assert all(set(row["category"]) == labels for row in train + test)
    assert all(30 <= len(row["text"]) <= 200 for row in train + test)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_entities_stand_where_they_say(language: str, split: str) -> None:
    found = rows(f"{language}_ner_{split}")
    for row in found:
        for entity in row["entities"]:
            assert row["text"][entity["start_idx"] : entity["end_idx"]] == entity["entity_text"]
            assert entity["entity_names"] == ENTITY_NAMES[language][entity["entity_label"]]
    empty = sum(not row["entities"] for row in found) / len(found)
    assert 0.28 <= empty <= 0.4
    kinds = Counter(entity["entity_label"] for row in found for entity in row["entities"])
    assert set(kinds) == set(ENTITY_NAMES[language]) and min(kinds.values()) >= 8


@pytest.mark.parametrize("name", ["en_classification", "en_ner", "zh_classification", "zh_ner"])
def test_the_check_finds_nothing(name: str) -> None:
    config = load_config(ROOT / "examples" / f"{name}.yaml")
    assert config.data.test is not None
    for checked in labeltune.check_data(config, str(ROOT / config.data.train), str(ROOT / config.data.test)):
        assert not checked.audit.counts


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_starter_measures_on_other_rows(task: str) -> None:
    config = load_config(STARTER / f"{task}.yaml")
    assert load_config(STARTER / f"{task}.zh.yaml") == config
    prompt = ENGLISH_PROMPTS["ner_marks" if config.prompt.answer == "marks" else config.task]
    assert {key: getattr(config.prompt, key) for key in prompt} == prompt, "as without a config"
    assert (config.data.train, config.data.test) == (f"{task}.jsonl", f"{task}_test.jsonl")
    train, test = rows(task, STARTER), rows(f"{task}_test", STARTER)
    others = [row["text"] for row in train + both("en", task)]
    assert len(test) >= 12 and not {row["text"] for row in test} & set(others)
    if task == "classification":
        assert {row["output"] for row in test} == {row["output"] for row in train}
        assert len({tuple(row["category"]) for row in train + test}) == 1
    else:
        kinds = [{e["entity_label"] for row in part for e in row["entities"]} for part in (train, test)]
        assert kinds[0] == kinds[1] == {"PER", "GPE", "ORG", "LOC"}
        for row in test:
            for entity in row["entities"]:
                assert row["text"][entity["start_idx"] : entity["end_idx"]] == entity["entity_text"]
    files = [str(STARTER / f"{name}.jsonl") for name in (task, f"{task}_test")]
    for checked in labeltune.check_data(config, *files):
        assert checked.audit.counts == {}


def test_the_core_installs_neither_ray_nor_gradio_nor_test_tools() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}

    extras = project["optional-dependencies"]
    left_out = names(extras["dev"]) | names(extras["ray"]) | names(extras["serve"]) | names(extras["bench"])
    assert {"ray", "gradio", "pytest", "playwright", "mypy", "fastapi", "uvicorn", "openai"} <= left_out
    assert names(project["dependencies"]) & left_out == set()


def make(target: str, venv: Path) -> str:
    """The commands that make would run."""
    command = ["make", "--dry-run", target, f"VENV={venv}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_demos_installation_is_not_taken_for_that_of_the_tests(tmp_path: Path) -> None:
    core, dev = "--editable .\n", '--editable ".[dev]"'
    assert core in make("demo", tmp_path) and dev not in make("demo", tmp_path)
    assert dev in make("test", tmp_path)
    (tmp_path / ".labeltune-demo-ready").touch()
    assert "pip" not in make("demo", tmp_path) and dev in make("test", tmp_path)
    (tmp_path / ".labeltune-ready").touch()
    assert "pip" not in make("demo", tmp_path) and "pip" not in make("test", tmp_path)


def test_an_unknown_demo_is_one_error(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "news"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: DEMO=news is unknown; it is classification, ner, zh, all\n"
    assert list(tmp_path.iterdir()) == []


def test_the_chinese_demo_asks_for_the_licence_first(tmp_path: Path) -> None:
    for demo in ("zh", "all"):
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), demo]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode != 0 and done.stderr == (
            f"error: nobody is here to accept the terms; run: make demo DEMO={demo} ACCEPT_LICENSE=gemma\n"
        )
        assert list(tmp_path.iterdir()) == []
