"""One frozen configuration: the original's defaults, overrides, and errors that name the right key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from labeltune.commands.original import original_config
from labeltune.config import (
    RunConfig,
    TaskName,
    build_config,
    config_keys,
    load_config,
)
from labeltune.default_prompts import CLASSIFICATION_SYSTEM, NER_MARKS_SYSTEM, NER_SYSTEM
from labeltune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def get(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_defaults_are_the_originals(task: str) -> None:
    config = load_config(None, [f"task={task}"])
    expected = {
        "model": "ms:qwen/Qwen2-1.5B-Instruct",
        "tracking": "swanlab",
        "hub.trust_remote_code": False,
        "prompt.max_length": 384,
        "lora.r": 8,
        "lora.alpha": 32,
        "lora.dropout": 0.1,
        "lora.target_modules": "all-linear",
        "training.method": "lora",
        "training.learning_rate": 1e-4,
        "training.epochs": 2,
        "training.batch_size": 16,
        "training.logging_steps": 10,
        "training.save_steps": 100,
        "training.scheduler": "linear",
        "training.warmup_steps": 0,
        "training.weight_decay": 0.0,
    }
    if task == "ner":
        expected |= {"output_dir": "./output/Qwen2-NER", "swanlab.project": "labeltune"}
        expected |= {"prompt.system": NER_SYSTEM, "prompt.user": "文本:{text}"}
    else:
        expected |= {"output_dir": "./output/Qwen2", "swanlab.project": "labeltune"}
        expected |= {"prompt.system": CLASSIFICATION_SYSTEM, "prompt.user": "文本:{text},类型选型:{category}"}
    assert {key: get(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("task", "project"), [("classification", "Qwen2-fintune"), ("ner", "Qwen2-NER-fintune")]
)
def test_only_the_original_s_commands_use_its_projects(task: TaskName, project: str) -> None:
    assert original_config(task, []).swanlab.project == project
    assert original_config(task, ["swanlab.project=mine"]).swanlab.project == "mine"


def test_task_defaults_give_way_key_by_key() -> None:
    config = load_config(None, ["task=ner", "prompt.user=T {text}", "swanlab.mode=local", "output_dir=here"])
    assert config.prompt.user == "T {text}" and config.prompt.system == NER_SYSTEM
    assert config.swanlab.mode == "local" and config.output_dir == "here"
    assert load_config(None, ["swanlab.project=mine", "task=ner"]).swanlab.project == "mine"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("src/**/starter/*.yaml")]))
def test_the_configs_of_the_project_load(path: Path) -> None:
    config = load_config(path)
    assert config.task in path.name or path.parent.name == "configs"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("#   labeltune train ") for line in lines[:8])


@pytest.mark.parametrize("name", ["fudan_news", "ccfbdci_ner"])
def test_the_original_configs_hold_the_original_prompt(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.prompt == load_config(None, [f"task={config.task}"]).prompt
    assert config.training == RunConfig().training and config.lora == RunConfig().lora


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("training.learning_rat=1", "training.learning_rate"),
        ("training.batchsize=8", "training.batch_size"),
        ("trainig.epochs=1", "training"),
        ("lora.rank=4", "lora.r"),
        ("lora_r=4", "lora.r"),
        ("training.lr=1", "training.learning_rate"),
        ("modle=pocket", "model"),
        ("learning_rate=1", "training.learning_rate"),
        ("epochs=1", "training.epochs"),
        ("output=x", "output_dir"),
        ("data.colums.text=x", "data.columns"),
        ("data.columns.txt=x", "data.columns.text"),
    ],
)
def test_typos_suggest_the_right_key(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [typo])
    message = str(raised.value)
    assert "unknown key" in message and "\n" not in message and f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("key", ["swanlab.api_key", "wandb", "data.file"])
def test_no_suggestion_is_better_than_a_wild_one(key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [f"{key}=x"])
    assert f"unknown key {key!r}; `labeltune keys` lists all keys" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "training.epochs=two",
            "training.epochs: Input should be a valid number, unable to parse string as a number, or 'auto' (got 'two')",
        ),
        ("training.epochs=-1", "training.epochs: Input should be greater than 0, or 'auto' (got -1)"),
        (
            "generation.batch_size=0",
            "generation.batch_size: Input should be greater than or equal to 1, or 'auto' (got 0)",
        ),
        (
            "prompt.descriptions={a: [1], b: [1]}",
            "prompt.descriptions.a: Input should be a valid string (got [1]); prompt.descriptions.b: Input should be a valid string (got [1])",
        ),
        (
            "data.labels=[[1], [1]]",
            "data.labels.0: Input should be a valid string (got [1]); data.labels.1: Input should be a valid string (got [1])",
        ),
    ],
)
def test_a_key_that_takes_a_number_or_a_word_has_one_problem(change: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [change])
    assert str(caught.value) == f"command line: {told}"


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        build_config(
            {"lora": {"r": 0, "alfa": 1}, "training": {"epochs": "two"}, "tracking": "mlflow"}, "my.yaml"
        )
    message = str(raised.value)
    assert message.startswith("my.yaml: ")
    for part in ("lora.r: ", "(got 0)", "'lora.alpha'", "training.epochs: ", "(got 'two')", "tracking: "):
        assert part in message


def test_overrides_are_typed() -> None:
    config = load_config(
        None,
        [
            "training.learning_rate=2e-5",
            "training.epochs=3",
            "lora.rslora=true",
            "data.labels=[地点, 人名]",
            "lora.target_modules=[q_proj, v_proj]",
            "data.columns.text=content",
            "hub.cache_dir=",
            "prompt.user=文本: {text} {category} = 1: [x",
            "training.max_steps=7",
            "training.max_steps=9",
        ],
    )
    assert config.training.learning_rate == 2e-5 and config.training.epochs == 3 and config.lora.rslora
    assert config.data.labels == ("地点", "人名") and config.lora.target_modules == ("q_proj", "v_proj")
    assert config.data.columns.text == "content" and config.hub.cache_dir is None
    assert config.prompt.user == "文本: {text} {category} = 1: [x" and config.training.max_steps == 9


@pytest.mark.parametrize("override", ["epochs", "=3", " =3", "model.name=x", "training.epochs.x=3"])
def test_odd_overrides(override: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: pocket\ntraining: {epochs: 1}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, [override])
    assert repr(override) in str(raised.value)


def test_overrides_come_on_top_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\ufefftask: ner\ntraining:\n  epochs: 5\n  seed: 1\n", encoding="utf-8")
    config = load_config(path, ["training.epochs=7"])
    assert (config.task, config.training.epochs, config.training.seed) == ("ner", 7, 1)


def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    assert load_config(path) == load_config(None) == build_config({})
    path.write_text("".join(f"{name}:\n" for name in RunConfig.model_fields if name not in FLAT))
    assert load_config(path) == load_config(None)


FLAT = ("task", "model", "output_dir", "tracking")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [1\n", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold `key: value` lines, not a list"),
        (b"just text\n", "not a str"),
        (b"model: \xff\n", "cannot be read"),
        (b"!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        (b"1: 2\n", "run.yaml"),
        (b"training: 3\n", "training: "),
        (b"data: {labels: []}\n", "data.labels is empty"),
    ],
)
def test_bad_files(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(path) in str(raised.value) and part in str(raised.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist; `labeltune init classification` writes one"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "train.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=rf"writes one; near it are: {tmp_path}/train\.yaml$"):
        load_config(tmp_path / "trian.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; name a config file, .* with --resume$"):
        load_config(tmp_path)
    (tmp_path / "gb.yaml").write_bytes("# 配置".encode("gb18030"))
    with pytest.raises(ConfigError, match=r"gb\.yaml cannot be read"):
        load_config(tmp_path / "gb.yaml")


def test_a_key_is_blamed_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: classification\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^command line: unknown key 'trials'"):
        load_config(tmp_path / "a.yaml", ["trials=2"])
    (tmp_path / "b.yaml").write_text("modle: pocket\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.yaml: unknown key 'modle'"):
        load_config(tmp_path / "b.yaml", ["training.epochs=2"])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["training.max_tokens_per_pack=0"], "max_tokens_per_pack must be at least 1, or auto"),
        (["prompt.user=no place"], "prompt.user must contain {text} exactly once"),
        (["prompt.user={text} {text} {category}"], "exactly once"),
        (["prompt.system='{text}'"], "prompt.system cannot contain {text}"),
        (["prompt.user='{text}'", "prompt.descriptions={a: b}"], "prompt.user must contain {category}"),
        (["data.labels=[A, A]"], "empty or repeated label"),
        (["data.labels=[A, ' ']"], "empty or repeated label"),
        (["training.method=full", "lora.dora=true"], "lora.dora and lora.rslora need training.method"),
        (["prompt.answer=marks"], "prompt.answer=marks is for entities (task: ner)"),
        (["task=ner", "data.entities=deep"], "data.entities: "),
        (["data.validation_fraction=1"], "data.validation_fraction: "),
        (["model="], "model: "),
        (["training.learning_rate=fast"], "training.learning_rate: "),
    ],
)
def test_cross_checks(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, overrides)
    assert part in str(raised.value)


def test_marks_have_a_prompt_of_their_own() -> None:
    marks = load_config(None, ["task=ner", "prompt.answer=marks"]).prompt
    assert marks.system == NER_MARKS_SYSTEM and "[实体原文|实体类型]" in marks.system
    assert load_config(None, ["task=ner", "prompt.answer=marks", "prompt.system=S"]).prompt.system == "S"
    assert load_config(None, ["task=ner"]).prompt.system == NER_SYSTEM


def test_checks_let_right_values_pass() -> None:
    assert load_config(None, ["training.batch_size=2"]).training.batch_size == 2
    assert load_config(None, ["prompt.user='{text}'", "prompt.system='{category}'"])
    assert load_config(None, ["task=ner", "prompt.user='{text}'"])


def test_a_config_is_frozen() -> None:
    config = load_config(None)
    for section, key in ((config, "model"), (config.training, "epochs"), (config.data.columns, "text")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, "x")


def test_every_key_is_described_and_holds_its_default() -> None:
    keys = list(config_keys())
    names = [name for name, *_ in keys]
    assert len(names) == len(set(names)) > 50
    defaults = RunConfig()
    for name, kind, default, description in keys:
        assert description and kind
        if name not in ("swanlab.project",):  # by task
            assert get(defaults, name) == default
        assert not any(word in name for word in ("key", "token", "password", "secret")) or "tokens" in name
    sections = {name.rpartition(".")[0] for name in names}
    assert {"", "hub", "data", "data.columns", "prompt", "lora", "training", "swanlab"} <= sections


def test_a_config_survives_yaml(tmp_path: Path) -> None:
    config = load_config(None, ["task=ner", "data.labels=[地点]", "lora.target_modules=[q_proj]"])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True), encoding="utf-8")
    assert load_config(path) == config
