"""Runs loaded with their adapter as part of the weights."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import chat_template_utils

from helpers.runs import make_run
from helpers.templates import PECULIAR
from labeltune import load_predictor
from labeltune.errors import ModelError
from labeltune.inference.load import run_fingerprint, weights_file
from labeltune.io.outputs import file_hash
from labeltune.io.run_folder import RunInfo, find_checkpoint
from labeltune.training.checkpoints import write_manifest

TEXTS = ["a match in the rain", "the rocket landed", "南京 的 比赛", "paint on canvas"]


def test_a_merged_adapter_gives_the_same_probabilities(tmp_path: Path, model_folder: Path) -> None:
    run = make_run(tmp_path / "run", model_folder, seed=3)
    with load_predictor(run) as beside, load_predictor(run, merge=True) as merged:
        assert hasattr(beside.model, "disable_adapter") and not hasattr(merged.model, "disable_adapter")
        assert not any("lora" in name for name, _ in merged.model.named_parameters())
        scores = beside.scores(TEXTS)
        assert np.abs(merged.scores(TEXTS) - scores).max() < 1e-5
        with beside.base_model():
            assert np.abs(beside.scores(TEXTS) - scores).max() > 1e-3
        with pytest.raises(ModelError, match="no adapter"):
            merged.base_model()


def test_entities_of_a_merged_adapter(tmp_path: Path, model_folder: Path) -> None:
    run = make_run(tmp_path / "run", model_folder, "ner", seed=4)
    with load_predictor(run) as beside, load_predictor(run, merge=True) as merged:
        for left, right in zip(beside.extract(TEXTS), merged.extract(TEXTS), strict=True):
            assert [(e.start, e.end, e.label) for e in left] == [(e.start, e.end, e.label) for e in right]


def test_weights_that_would_round_the_merge_keep_the_adapter_beside_them(
    tmp_path: Path, model_folder: Path
) -> None:
    run = make_run(tmp_path / "run", model_folder)
    with load_predictor(run, merge=True, precision="bf16", device="cpu") as predictor:
        assert predictor.model.get_base_model().dtype == torch.bfloat16
        assert hasattr(predictor.model, "disable_adapter")


def test_a_template_that_moves_with_the_day_has_another_fingerprint(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 0.1.0 did not keep its day; `predict --resume` does not put two days into one file."""
    run = make_run(tmp_path / "run", model_folder)
    info = RunInfo.load(find_checkpoint(run))
    dated, _, _ = PECULIAR["a date (Llama 3.2)"]
    info.model_copy(update={"chat_template": dated}).save(find_checkpoint(run))
    found = []
    for year in (2001, 2002):

        class Day(datetime):
            @classmethod
            def now(cls, tz: Any = None, year: int = year) -> Day:
                return cls(year, 1, 2)

        monkeypatch.setattr(chat_template_utils, "datetime", Day)
        with load_predictor(run) as predictor:
            assert run_fingerprint(str(run), {}) == predictor.fingerprint()
            found.append(predictor.fingerprint())
    assert len(set(found)) == 2


def test_retrained_weights_have_another_fingerprint(tmp_path: Path, model_folder: Path) -> None:
    """So `predict --resume` does not mix the answers of two models, also where all weights were trained and one file holds them."""
    run = make_run(tmp_path / "run", model_folder)
    info = RunInfo.load(find_checkpoint(run)).model_copy(update={"adapter": False})
    folder = tmp_path / "whole"
    folder.mkdir()
    found = []
    for weights in (b"first", b"second"):
        (folder / "model.safetensors").write_bytes(weights)
        found.append(file_hash(weights_file(folder, info)))
        write_manifest(folder)
        found.append(file_hash(weights_file(folder, info)))
        (folder / "manifest.json").unlink()
    assert len(set(found)) == 4
