"""What a resumed run must get right beyond its weights: log lines, its end, what was said about damage, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from labeltune import recipes
from labeltune.config import RunConfig
from labeltune.errors import Interrupted, OutputError
from labeltune.run_folder import MANIFEST_FILE, RUN_FILE, checkpoints, damage
from labeltune.training import trainer
from labeltune.training.callbacks import Progress
from labeltune.training.stepping import PackTrainer
from test_checkpoints import same_weights
from test_training import config_for

MEASURED = ("runtime", "per_second", "memory_gb")


def impatient(config: RunConfig) -> RunConfig:
    """Stops at its second validation: nothing is a large enough improvement."""
    return config.model_copy(
        update={"eval": config.eval.model_copy(update={"patience": 1, "min_delta": 99.0})}
    )


def log(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if not any(part in k for part in MEASURED)} for line in lines]


def test_log_lines_that_span_a_checkpoint_are_those_of_an_uninterrupted_run(
    in_folder: Path, model_folder: Path
) -> None:
    """Three steps a line, two a checkpoint: the resumed run has to know the first step of the line it is in."""
    torch.set_num_threads(1)
    config = config_for(
        in_folder, model_folder, epochs=2, save_steps=2, logging_steps=3, save_total_limit=9, batch_size=7
    )
    whole = recipes.train(config)
    out = Path(config.output_dir)
    expected = log(out)
    assert [line["step"] for line in expected if "loss" in line] == [1, 3, 6, 9, 12]
    for folder in checkpoints(out)[2:]:
        shutil.rmtree(folder)
    resumed = recipes.train(config, resume=True)
    assert log(out) == expected
    assert resumed.train_loss == whole.train_loss == expected[-1]["train_loss"]


@pytest.mark.parametrize("why", ["max_steps", "patience"])
def test_a_run_killed_behind_its_last_checkpoint_has_nothing_left_to_do(
    why: str, in_folder: Path, model_folder: Path
) -> None:
    """Its steps end inside an epoch, where Trainer would go on."""
    torch.set_num_threads(1)
    if why == "max_steps":
        config = config_for(in_folder, model_folder, max_steps=4, save_steps=2)
    else:
        config = impatient(config_for(in_folder, model_folder, save_steps=2))
    whole = recipes.train(config)
    assert whole.steps == 4, "not where the epoch ends"
    before = log(Path(config.output_dir))
    shutil.copytree(whole.last, in_folder / "kept")
    again = recipes.train(config, resume=True)
    assert again.steps == 4 and again.last == whole.last and log(Path(config.output_dir)) == before
    assert same_weights(again.last, in_folder / "kept") and again.best.resolve() == whole.best.resolve()


def test_ctrl_c_keeps_its_checkpoint_when_only_one_is_kept(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(in_folder, model_folder, save_steps=2, save_total_limit=1)
    moved = Progress.on_step_end

    def press(self: Progress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        moved(self, args, state, control, **rest)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "on_step_end", press)
    with pytest.raises(Interrupted, match="checkpoint-3 is saved"):
        recipes.train(config)
    assert checkpoints(Path(config.output_dir))[-1].name == "checkpoint-3"
    monkeypatch.setattr(Progress, "on_step_end", moved)
    result = recipes.train(config, resume=True)
    assert result.last.is_dir() and result.best.is_dir()


def test_the_last_checkpoint_that_is_named_exists(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint kept, that is the best one, which need not be the last."""
    config = config_for(in_folder, model_folder, save_steps=2, save_total_limit=1)
    found = PackTrainer._determine_best_metric
    first_is_best = lambda self, metrics, trial: self.state.global_step == 2 and found(self, metrics, trial)  # noqa: E731
    monkeypatch.setattr(PackTrainer, "_determine_best_metric", first_is_best)
    result = recipes.train(config)
    assert result.last.is_dir() and result.last.resolve() == result.best.resolve()
    assert result.last.name == "checkpoint-2" and result.steps == 6


@pytest.mark.parametrize("missing", [MANIFEST_FILE, RUN_FILE])
def test_a_checkpoint_without_its_manifest_or_its_description_is_passed_over_aloud(
    missing: str, in_folder: Path, model_folder: Path
) -> None:
    config = config_for(in_folder, model_folder, max_steps=4, save_steps=2)
    last = recipes.train(config).last
    (last / missing).unlink()
    said: list[str] = []
    assert recipes.train(config, resume=True, say=said.append).last == last
    assert any(line.startswith(f"warning: {last} is damaged ({missing} is missing)") for line in said)
    assert damage(last) is None


def test_what_a_killed_process_left_half_written_is_removed(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    out = Path(config.output_dir)
    (out / "validation").mkdir(parents=True)
    for left in (".metrics.jsonl-x1.tmp", ".best-77.tmp", "validation/.report.html-x2.tmp"):
        (out / left).write_text("half")
    (out / ".keep").write_text("mine")
    recipes.train(config)
    assert [path.name for path in out.rglob(".*")] and not list(out.rglob("*.tmp"))
    assert (out / ".keep").exists()


def test_a_link_to_the_best_that_cannot_be_made_is_one_error(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", full)
        patched.setattr(trainer.shutil, "copytree", full)
        with pytest.raises(OutputError, match=r"best cannot be written: No space left.*--resume"):
            recipes.train(config)
    assert recipes.train(config, resume=True).best.resolve().name == "checkpoint-1"


def test_an_adapter_s_configuration_has_the_same_bytes_whichever_process_wrote_it(
    in_folder: Path, model_folder: Path
) -> None:
    """peft's own order is that of a set of names, which changes with Python's hash seed."""
    config = config_for(in_folder, model_folder, max_steps=1)
    recipes.train(config)
    saved = json.loads((checkpoints(Path(config.output_dir))[-1] / "adapter_config.json").read_text("utf-8"))
    targets = saved["target_modules"]
    assert targets == sorted(targets)
    assert len({name.rsplit(".")[-1] for name in targets}) == 7
