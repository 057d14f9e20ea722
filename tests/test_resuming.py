"""What a resumed run must get right beyond its weights: log lines, its end, what was said about damage, what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers.rows import classification_rows, write_jsonl
from helpers.templates import PECULIAR, on_day
from helpers.tiny_models import make_tokenizer
from helpers.training import config_for, same_weights
from labeltune.commands import export as export_page
from labeltune.commands import train as train_page
from labeltune.config import RunConfig, build_config
from labeltune.errors import ConfigError, Interrupted, OutputError
from labeltune.inference.load import run_fingerprint
from labeltune.io.run_folder import MANIFEST_FILE, RUN_FILE, checkpoints, damage
from labeltune.tracking.base import SilentTracker
from labeltune.training import dataset, run
from labeltune.training.callbacks import Progress
from labeltune.training.checkpoints import write_manifest
from labeltune.training.dataset import tokenize_rows
from labeltune.types import Example

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
    whole = labeltune.train(config)
    out = Path(config.output_dir)
    expected = log(out)
    assert [line["step"] for line in expected if "loss" in line] == [1, 3, 6, 9, 12]
    for folder in checkpoints(out)[2:]:
        shutil.rmtree(folder)
    resumed = labeltune.train(config, resume=True)
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
    whole = labeltune.train(config)
    assert whole.steps == 4, "not where the epoch ends"
    before = log(Path(config.output_dir))
    shutil.copytree(whole.last, in_folder / "kept")
    # As if it had been killed before it could note that everything is done.
    (Path(config.output_dir) / "finished.json").unlink()
    Path(config.output_dir, "validation", "report.html").unlink()
    again = labeltune.train(config, resume=True)
    assert again.steps == 4 and again.last == whole.last and log(Path(config.output_dir)) == before
    assert same_weights(again.last, in_folder / "kept") and again.best.resolve() == whole.best.resolve()


@contextlib.contextmanager
def pressed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, Ctrl-C is pressed in this step of a training."""
    moved = Progress.on_step_end

    def press(self: Progress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        moved(self, args, state, control, **rest)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "on_step_end", press)
        yield


def test_ctrl_c_keeps_its_checkpoint_when_only_one_is_kept(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(in_folder, model_folder, save_steps=2, save_total_limit=1)
    told = "^stopped at step 3 of 6; checkpoint-3 is saved, go on with: labeltune train c.yaml --resume$"
    with pressed_at(3, monkeypatch), pytest.raises(Interrupted, match=told):
        labeltune.train(config, command="labeltune train c.yaml")
    assert checkpoints(Path(config.output_dir))[-1].name == "checkpoint-3"
    result = labeltune.train(config, resume=True)
    assert result.last.is_dir() and result.best.is_dir()


def test_ctrl_c_predicts_and_validates_nothing_more(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the checkpoint is written; the resumed run logs what an uninterrupted one does."""
    torch.set_num_threads(1)
    monkeypatch.setattr("labeltune.tracking.base.start_tracker", lambda *_: SilentTracker())
    config = config_for(in_folder, model_folder, epochs=2, save_steps="epoch")
    config = config.model_copy(update={"tracking": "swanlab"})
    whole: list[str] = []
    labeltune.train(config, say=whole.append)
    expected = log(Path(config.output_dir))

    def shown(lines: list[str]) -> list[str]:
        return [line.partition(" for the board: ")[2] for line in lines if "for the board" in line]

    assert shown(whole) == ["before training", "epoch 1", "epoch 2"]
    said: list[str] = []
    told = r"^stopped at step 9 of 12; checkpoint-9 is saved"
    with pressed_at(9, monkeypatch), pytest.raises(Interrupted, match=told):
        labeltune.train(config, overwrite=True, say=said.append)
    assert shown(said) == ["before training", "epoch 1"]
    labeltune.train(config, resume=True)
    assert log(Path(config.output_dir)) == expected


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """The config with other values: `training__seed=1`."""
    plain = config.model_dump(mode="json")
    for key, value in values.items():
        section, _, name = key.rpartition("__")
        (plain[section] if section else plain)[name] = value
    return build_config(plain)


def test_a_finished_run_is_left_as_it_is_and_can_be_trained_on(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    whole = labeltune.train(config)
    before, said = everything(in_folder), []
    again = labeltune.train(config, resume=True, say=said.append)
    assert said[-1] == (
        "nothing to do: all 2 steps are done; to train on, raise training.max_steps, which is 2: "
        "--resume training.max_steps=..."
    )
    assert everything(in_folder) == before
    assert replace(again, seconds=whole.seconds) == whole
    # What labeltune 0.1.0 has left is recognised too: it noted neither the end nor the config.
    (in_folder / "out" / "finished.json").unlink()
    for checkpoint in checkpoints(in_folder / "out"):
        for name in ("training.json", "training.u64"):
            (checkpoint / name).unlink()
        write_manifest(checkpoint)
    before = everything(in_folder)
    old = labeltune.train(config, resume=True)
    assert everything(in_folder) == before and replace(old, seconds=whole.seconds) == whole
    longer = labeltune.train(changed(config, training__max_steps=3), resume=True, say=said.append)
    again = (
        "checking again, as this machine may be another one, whether packed rows compute what single rows do"
    )
    assert again in said
    assert longer.steps == 3 and (longer.last / "training.json").is_file()
    rates = [line["learning_rate"] for line in log(in_folder / "out") if "learning_rate" in line]
    assert rates == pytest.approx([0.01, 0.005, 0.01 / 3]), "the schedule of three steps"


def test_a_run_keeps_the_day_on_which_it_began(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training, its predictions, and what a resumed run trains on; a template that lacks a channel besides."""
    source, ending, _ = PECULIAR["a date in a macro, and a channel (gpt-oss)"]
    tokenizer = make_tokenizer(source)
    shutil.copytree(model_folder, in_folder / "model")
    tokenizer.save_pretrained(in_folder / "model")
    config = config_for(in_folder, in_folder / "model", max_steps=2, save_steps=1)
    on_day(monkeypatch, 2001)
    whole = labeltune.train(config)
    ids = []

    def tokenized(*given: Any, **options: Any) -> Any:
        tokens, account = tokenize_rows(*given, **options)
        ids.append(tokens[0]["input_ids"])
        return tokens, account

    monkeypatch.setattr(dataset, "tokenize_rows", tokenized)
    shutil.rmtree(in_folder / "out" / "checkpoint-2")
    on_day(monkeypatch, 2002)
    resumed = labeltune.train(config, resume=True)
    with labeltune.load_predictor(resumed.best) as predictor:
        example = Example("0", "a rocket", tuple(predictor.labels))
        prompt = tokenizer.decode(predictor.builder.prompt(example).ids)
        known = run_fingerprint(str(resumed.best), {})
        assert known == predictor.fingerprint()
    assert resumed.train_loss == whole.train_loss
    for text in (prompt, tokenizer.decode(ids[0])):
        assert text.startswith("Date: 2001-01-02, %d<|im_start|>") and f"<|im_start|>{ending}" in text
    on_day(monkeypatch, 2003)
    assert run_fingerprint(str(resumed.best), {}) == known


@pytest.mark.parametrize("remembered", [True, False])
def test_resume_takes_no_other_config_and_no_other_rows(
    remembered: bool, in_folder: Path, model_folder: Path
) -> None:
    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    labeltune.train(config)
    if not remembered:  # a checkpoint of labeltune 0.1.0
        for name in ("training.json", "training.u64"):
            (in_folder / "out" / "checkpoint-2" / name).unlink()
        write_manifest(in_folder / "out" / "checkpoint-2")
    other = [{**row, "category": None, "output": "New" + row["output"]} for row in classification_rows(48)]
    renamed = str(write_jsonl(in_folder / "other.jsonl", other))
    before = everything(in_folder)

    def refused(**values: Any) -> str:
        with pytest.raises(
            ConfigError, match=r"--resume goes on with what .*checkpoint-2 was trained"
        ) as raised:
            labeltune.train(changed(config, training__max_steps=3, **values), resume=True)
        assert raised.value.exit_code == 2 and everything(in_folder) == before
        return str(raised.value)

    for key, value, was in (("thinking", "template", '"off"'), ("template_kwargs", {"a": 1}, "{}")):
        found = refused(**{f"prompt__{key}": value})
        assert f"\n  prompt.{key}: {was} in checkpoint-2, {json.dumps(value)} now\n" in found
    found = refused(lora__r=4, prompt__max_length=400)
    assert "\n  prompt.max_length: 512 in checkpoint-2, 400 now\n" in found
    assert "\n  lora.r: 8 in checkpoint-2, 4 now\n" in found and "max_steps" not in found
    found = refused(data__train=renamed)
    assert "labels: Art, Space, Sports in checkpoint-2, NewArt, NewSpace, NewSports now" in found
    assert ("data.train: " in found) == remembered
    if remembered:
        assert "training.learning_rate: 0.01 in checkpoint-2, 0.5 now" in refused(training__learning_rate=0.5)
        assert "data.validation_fraction: 0.1 in checkpoint-2, 0.3 now" in refused(
            data__validation_fraction=0.3
        )
        rows = [{**row, "text": row["text"] + "!"} for row in classification_rows(48)]
        path = Path(config.data.train)
        kept = path.read_bytes()
        write_jsonl(path, rows)
        before = everything(in_folder)
        assert "43 for training and 5 for validation now, not the same ones" in refused()
        path.write_bytes(kept)
    # The same rows in another file, and another place for the run: nothing that matters.
    moved = in_folder / "elsewhere.jsonl"
    shutil.copyfile(config.data.train, moved)
    (in_folder / "out").rename(in_folder / "moved")
    values = {"data__train": str(moved), "output_dir": str(in_folder / "moved"), "training__max_steps": 3}
    said: list[str] = []
    assert (
        labeltune.train(changed(config, **values, eval__patience=5), resume=True, say=said.append).steps == 3
    )


def test_a_run_that_stopped_early_goes_on_with_more_patience(in_folder: Path, model_folder: Path) -> None:
    config = impatient(config_for(in_folder, model_folder, max_steps=6, save_steps=1))
    assert labeltune.train(config).steps == 2
    said: list[str] = []
    assert labeltune.train(config, resume=True, say=said.append).steps == 2
    assert said[-1].startswith(
        "nothing to do: training stopped at step 2, after 1 checkpoints without improvement"
    )
    more = labeltune.train(changed(config, eval__patience=3), resume=True)
    assert (more.steps, more.unimproved) == (4, 3)
    assert labeltune.train(changed(config, eval__patience=None), resume=True).steps == 6


def test_outputs_can_be_read_by_others(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    before = os.umask(0o022)
    try:
        result = labeltune.train(config)
        exported = export_page.export(result.best, in_folder / "merged", merged=True, verify=False)
    finally:
        os.umask(before)
    for folder in (result.last, exported.folder):
        found = {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert set(found.values()) == {0o644}, found
        assert folder.stat().st_mode & 0o777 == 0o755
    assert not (result.last / "README.md").exists(), "peft's empty card"


def test_the_last_checkpoint_that_is_named_exists(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint kept, that is the best one, which need not be the last."""
    config = config_for(in_folder, model_folder, save_steps=2, save_total_limit=1)
    figures = iter([0.9, 0.5, 0.5])
    monkeypatch.setattr(train_page, "headline", lambda *_: {"macro_f1": next(figures), "accuracy": 0.0})
    result = labeltune.train(config)
    assert result.last.is_dir() and result.last.resolve() == result.best.resolve()
    assert result.last.name == "checkpoint-2" and result.steps == 6


@pytest.mark.parametrize("missing", [MANIFEST_FILE, RUN_FILE])
def test_a_checkpoint_without_its_manifest_or_its_description_is_passed_over_aloud(
    missing: str, in_folder: Path, model_folder: Path
) -> None:
    config = config_for(in_folder, model_folder, max_steps=4, save_steps=2)
    last = labeltune.train(config).last
    (last / missing).unlink()
    said: list[str] = []
    assert labeltune.train(config, resume=True, say=said.append).last == last
    assert any(line.startswith(f"warning: {last} is damaged ({missing} is missing)") for line in said)
    assert damage(last) is None


def test_what_a_killed_process_left_half_written_is_removed(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    out = Path(config.output_dir)
    (out / "validation").mkdir(parents=True)
    for left in (".metrics.jsonl-x1.tmp", ".best-77.tmp", "validation/.report.html-x2.tmp"):
        (out / left).write_text("half")
    (out / ".keep").write_text("mine")
    labeltune.train(config)
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
        patched.setattr(run.shutil, "copytree", full)
        with pytest.raises(OutputError, match=r"best cannot be written: No space left.*--resume"):
            labeltune.train(config)
    assert labeltune.train(config, resume=True).best.resolve().name == "checkpoint-1"


def test_an_adapter_s_configuration_has_the_same_bytes_whichever_process_wrote_it(
    in_folder: Path, model_folder: Path
) -> None:
    """peft's own order is that of a set of names, which changes with Python's hash seed."""
    config = config_for(in_folder, model_folder, max_steps=1)
    labeltune.train(config)
    saved = json.loads((checkpoints(Path(config.output_dir))[-1] / "adapter_config.json").read_text("utf-8"))
    targets = saved["target_modules"]
    assert targets == sorted(targets)
    assert len({name.rsplit(".")[-1] for name in targets}) == 7
