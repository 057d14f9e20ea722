"""Hostile configs: every one is read as it stands or is one clear error, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeltune.commands import main
from labeltune.config import RunConfig, build_config, config_keys, load_config
from labeltune.errors import ConfigError


def bomb(levels: int) -> str:
    """Ten aliases of ten aliases of ...: a few lines that mean 10 to the power of `levels` values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"data: {{labels: *a{levels - 1}}}"])


MERGE_BOMB = "\n".join(
    ["m0: &m0 {a: 1}", *(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9))]
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: " + "[" * 10_000, "nests too deeply"),
        ("task: 2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("task: 0x_", "is not valid YAML"),
        (
            "training:\n  epochs: 3\ntraining:\n  batch_size: 2\n",
            ":3: the key 'training' stands twice (first in line 1)",
        ),
        (bomb(9), "holds more than 200000 values once its aliases are written out"),
        (MERGE_BOMB, "holds more than 200000 values once its aliases are written out"),
        ("data: &a\n  labels: [*a]\n", ":1: a value contains itself"),
        ("task: !!python/object/apply:os.system ['echo no']", "could not determine a constructor"),
        ("task: ner\x00", "is not valid YAML"),
        ("# " + "x" * (4 * 2**20), "this is no config"),
    ],
)
def test_hostile_yaml_is_one_error(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert part in str(raised.value) and str(path) in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_aliases_are_fine_where_they_are_few(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: &d {labels: [a, b]}\n", encoding="utf-8")
    assert load_config(path).data.labels == ("a", "b")
    path.write_text("data: {train: &t rows.jsonl, test: *t}\n", encoding="utf-8")
    assert load_config(path).data.test == "rows.jsonl"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("lora.r=0", "lora.r: Input should be greater than or equal to 1"),
        ("lora.r=99999999999999999999", "lora.r"),
        ("training.batch_size=-1", "training.batch_size"),
        ("training.epochs=.inf", "training.epochs: Input should be a finite number"),
        ("training.learning_rate=.inf", "training.learning_rate: Input should be a finite number"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.weight_decay=-.inf", "training.weight_decay"),
        ("training.seed=4294967296", "seed is larger than 2147483647"),
        ("training.max_steps=1e30", "training.max_steps"),
        ("training.warmup_steps=10000000000", "warmup_steps is larger"),
        ("training.save_steps=0", "training.save_steps"),
        ("prompt.max_length=-5", "prompt.max_length"),
        ("data.labels=[]", "data.labels is empty"),
        ('data.labels=["a", "a "]', "empty or repeated label"),
        ('data.labels=["\\ud800", "b"]', "data.labels: holds a NUL character or half a surrogate pair"),
        ('prompt.user="{text} \\0 {category}"', "prompt.user: holds a NUL"),
        ('data.train="a\\0.jsonl"', "data.train: holds a NUL"),
        ("data.train=''", "data.train"),
        ("output_dir=''", "output_dir"),
        ("data.validation_fraction=1.5", "data.validation_fraction: Input should be less than 1"),
        ("data.train=" + "x" * 100_000 + "\0", "data.train"),
        ("training.epochs=" + "[" * 5000, "training.epochs"),
        ("x" * 100_000 + "=1", "unknown key"),
    ],
)
def test_hostile_overrides_are_one_short_error(override: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [override])
    assert part in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_hostile_config_ends_the_command_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    for text in (bomb(9), "task: 2024-13-45", "a: " + "[" * 10_000, "training: {seed: 4294967296}"):
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["labeltune", "train", str(path)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        shown = capsys.readouterr().err
        assert ended.value.code == 2
        assert shown.startswith("error: ") and "Traceback" not in shown


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([name for name, *_ in config_keys()])


def nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return found


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, PLAIN, max_size=4).map(nested) | st.dictionaries(st.text(), PLAIN, max_size=3))
def test_any_values_make_a_config_or_one_error(values: dict[str, Any]) -> None:
    try:
        config = build_config(values)
    except ConfigError as error:
        assert str(error).startswith("config: ")
        return
    # What is accepted survives the way through a checkpoint's JSON.
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_config_file_or_one_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)
