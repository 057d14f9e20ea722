"""The demo rows keep their promise: written one by one, varied, balanced, and rightly marked."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from labeltune import recipes
from labeltune.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
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


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


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
    for checked in recipes.check_data(config, str(ROOT / config.data.train), str(ROOT / config.data.test)):
        assert not checked.audit.counts
