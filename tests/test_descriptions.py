"""Descriptions of labels: what they look like in a prompt, where they may stand, and that a run keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.rows import LABELS
from helpers.runs import NER_LABELS, make_run
from helpers.tiny_models import make_tokenizer
from helpers.training import config_for
from labeltune.config import RunConfig, build_config, load_config
from labeltune.errors import ConfigError
from labeltune.inference.load import load_predictor
from labeltune.io.run_folder import RunInfo
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.serve.chat import read_prompt
from labeltune.types import Example

DESCRIBED = {"Sports": "比赛、运动员", "Space": "rockets  and\nplanets", "Art": None}


def described(**prompt: Any) -> RunConfig:
    return build_config({"data": {"labels": DESCRIBED}, "prompt": {"max_length": 512, **prompt}})


def test_a_mapping_is_labels_and_descriptions() -> None:
    config = described()
    assert config.data.labels == ("Sports", "Space", "Art")
    assert config.prompt.descriptions == {"Sports": "比赛、运动员", "Space": "rockets and planets"}
    assert build_config(config.model_dump(mode="json")) == config
    given = load_config(None, ['data.labels={Sports: "a, b", 7: 8}', "prompt.user={text} {category}"])
    assert given.data.labels == ("Sports", "7") and given.prompt.descriptions == {"Sports": "a, b", "7": "8"}
    entities = build_config({"task": "ner", "data": {"labels": {"地点": "places", "人名": None}}})
    assert entities.prompt.system == build_config({"task": "ner"}).prompt.system
    assert entities.prompt.descriptions == {"地点": "places"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"labels": {}}}, "data.labels is empty"),
        ({"data": {"labels": {"A": ["x"]}}}, "data.labels.A is the description of a label and must be a string, not list"),
        ({"data": {"labels": {" ": "x"}}}, "data.labels holds an empty or repeated label"),
        ({"data": {"labels": {"A\0": "x"}}}, "data.labels: holds a NUL character"),
        ({"data": {"labels": {"A": "x\ud800"}}}, "data.labels.A: holds a NUL character or half a surrogate"),
        (
            {"data": {"labels": {"A": "x"}}, "prompt": {"descriptions": {"A": "y"}}},
            "labels are described in data.labels and in prompt.descriptions",
        ),
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(values)


def test_a_prompt_has_a_line_a_label() -> None:
    config = described()
    task = make_task("classification", config.data.labels or (), config.prompt)
    user = task.conversation(Example("0", "text")).user
    assert user == "文本:text,类型选型:\nSports: 比赛、运动员\nSpace: rockets and planets\nArt"
    own = task.conversation(Example("0", "text", ("Art", "Space"))).user
    assert own == "文本:text,类型选型:\nArt\nSpace: rockets and planets"
    plain = task.conversation(Example("0", "text", ("Art", "Farm"))).user
    assert plain == "文本:text,类型选型:['Art', 'Farm']"
    front = described(layout="labels_first")
    first = make_task("classification", LABELS, front.prompt).conversation(Example("0", "text")).user
    assert first == "类型选型:\nSports: 比赛、运动员\nSpace: rockets and planets\nArt\n文本:text"
    entities = build_config({"task": "ner", "data": {"labels": {"地点": "places", "人名": None}}})
    system = make_task("ner", ("地点", "人名"), entities.prompt).conversation(Example("0", "text")).system
    assert "实体类型只有：\n地点: places\n人名。每个实体单独占一行" in system


def test_a_described_prompt_is_shared_and_never_cut() -> None:
    config = described(max_length=160, layout="labels_first")
    tokenizer = make_tokenizer()
    builder = PromptBuilder(make_task("classification", LABELS, config.prompt), ChatTemplate(tokenizer))
    encoded = builder.training(Example("0", "rocket " * 400, label="Space"))
    assert len(encoded.ids) <= 160 and encoded.excess
    written = tokenizer.decode(encoded.ids)
    assert "Sports: 比赛、运动员\nSpace: rockets and planets\nArt\n文本:rocket" in written
    other = builder.training(Example("1", "paint", label="Art"))
    shared = written[: written.index("rocket rocket")]
    assert tokenizer.decode(other.ids).startswith(shared)


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_a_run_keeps_its_descriptions(task: str, in_folder: Path, model_folder: Path) -> None:
    labels = LABELS if task == "classification" else ["地点", "人名", "地理实体", "组织"]
    config = config_for(in_folder, model_folder, task, max_steps=2, save_steps=100)
    values = config.model_dump(mode="json")
    values["data"]["labels"] = {labels[0]: "was 中文 sagt", labels[1]: None, **dict.fromkeys(labels[2:])}
    config = build_config(values)
    result = labeltune.train(config)
    info = RunInfo.load(result.best)
    assert info.prompt.descriptions == {labels[0]: "was 中文 sagt"} and info.labels == tuple(labels)
    example = Example("0", "he came")
    asked = make_task(config.task, labels, config.prompt).conversation(example)
    assert f"\n{labels[0]}: was 中文 sagt\n{labels[1]}\n" in asked.system + asked.user
    with load_predictor(result.best, device="cpu") as predictor:
        assert predictor.task.conversation(example) == asked
        assert len(predictor.predict(["he came"])) == 1
    values["data"]["labels"] = list(labels)
    values["training"]["max_steps"] = 3
    with pytest.raises(ConfigError, match=r"prompt\.descriptions: .*was 中文 sagt.* in checkpoint-2, {} now"):
        labeltune.train(build_config(values), resume=True)


def test_a_run_without_descriptions_loads(in_folder: Path, model_folder: Path) -> None:
    best = make_run(in_folder / "run", model_folder) / "best"
    file = best / "labeltune.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["prompt"]["descriptions"]
    file.write_text(json.dumps(values), encoding="utf-8")
    assert RunInfo.load(best).prompt.descriptions == {}


def test_descriptions_of_labels_that_are_not_there(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder)
    values = config.model_dump(mode="json")
    values["prompt"]["descriptions"] = {"Sport": "matches"}
    with pytest.raises(ConfigError) as raised:
        labeltune.train(build_config(values))
    assert str(raised.value) == (
        "prompt.descriptions names an unknown label: 'Sport' is not among the labels of the training rows; did you mean 'Sports'?"
    )


class _Served:
    """As much of a served run as reading a prompt takes."""

    def __init__(self, config: RunConfig, labels: tuple[str, ...]) -> None:
        self.labels = labels
        self.predictor = type("_", (), {"task": make_task(config.task, labels, config.prompt)})


@pytest.mark.parametrize("layout", ["original", "labels_first"])
@pytest.mark.parametrize("task", ["classification", "ner"])
def test_a_chat_knows_the_run_s_own_described_prompt(task: str, layout: str) -> None:
    labels = tuple(LABELS) if task == "classification" else NER_LABELS
    values = {"task": task, "data": {"labels": dict.fromkeys(labels, "x, y")}, "prompt": {"layout": layout}}
    served: Any = _Served(build_config(values), labels)
    user = served.predictor.task.conversation(Example("0", "a\ntext")).user
    assert read_prompt(user, served) == ("a\ntext", ())
    assert read_prompt("another text", served) == ("another text", ())
