"""The gate asks the engine that will serve an export, here a stand-in for vLLM, and catches one that serves something else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers import fake_vllm
from helpers.training import config_for
from labeltune.commands.export import Exported, export
from labeltune.config import build_config
from labeltune.errors import ConfigError, ModelError, ParityError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run that has learned its rows, so that a prompt that is lost changes answers."""
    folder = tmp_path_factory.mktemp("engines")
    config = config_for(folder, model_folder, epochs=4)
    prompt = {"system": "", "user": "Text: {text}\nLabel:", "max_length": 512}
    values = {**config.model_dump(exclude_unset=True), "lora": {"dropout": 0.0}, "prompt": prompt}
    labeltune.train(build_config(values), say=lambda _: None)
    return folder / "out"


@pytest.fixture
def python(tmp_path: Path) -> str:
    """What stands for the python of vLLM's environment."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def asked(run: Path, output: Path, python: str, **options: Any) -> Exported:
    return export(
        run, output, engine="vllm", engine_python=python, say=lambda _: None, progress=False, **options
    )


@pytest.mark.parametrize("merged", [False, True])
def test_an_engine_that_answers_alike(merged: bool, run: Path, python: str, tmp_path: Path) -> None:
    done = asked(run, tmp_path / "out", python, merged=merged)
    assert done.engine_parity is not None and not done.engine_parity.differences
    assert done.engine_parity.largest_shift == pytest.approx(0, abs=1e-5) and done.engine_parity.rows == 5
    told = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert told["engine_parity"] == done.engine_parity.to_dict()


@pytest.mark.parametrize(
    ("fault", "merged", "error", "part"),
    [
        ("ignored", False, ParityError, "the server ignores the adapter"),
        ("renamed", False, ParityError, "the server ignores the adapter"),
        (
            "template",
            True,
            ParityError,
            "the server reads another prompt than the run was trained on: from token 1 on",
        ),
        ("generation", True, ParityError, "on '' where"),
        ("bos", True, ParityError, "from token 1 on"),
        ("dtype", True, ParityError, "rows differ"),
        (
            "start",
            True,
            ModelError,
            "vLLM does not start with this export (exit code 1): no CPU of this kind",
        ),
    ],
)
def test_an_engine_that_does_not(
    fault: str,
    merged: bool,
    error: type[Exception],
    part: str,
    run: Path,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(error) as caught:
        asked(run, tmp_path / "out", python, merged=merged)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing was exported"


def test_options_that_make_no_sense(run: Path, tmp_path: Path) -> None:
    for options, part in (
        ({"engine": "ollama"}, "--engine must be one of vllm"),
        ({"engine_python": "python"}, "--engine-python says where an engine is"),
        ({"engine": "vllm", "verify": False}, "leave out --no-verify"),
    ):
        with pytest.raises(ConfigError, match=part):
            export(run, tmp_path / "out", say=lambda _: None, progress=False, **options)
    with pytest.raises(ModelError, match="is no program"):
        asked(run, tmp_path / "out", str(tmp_path / "nowhere"))
