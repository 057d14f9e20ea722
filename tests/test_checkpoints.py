"""A checkpoint is whole or not there: kills while saving, damaged files, full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers import forks
from helpers.tiny_models import make_tokenizer
from helpers.training import adapter_weights, config_for, logged, same_weights
from labeltune.errors import DivergedError, ModelError, OutputError
from labeltune.io.lock import alone_with
from labeltune.io.outputs import file_hash
from labeltune.io.run_folder import (
    MANIFEST_FILE,
    RUN_FILE,
    checkpoints,
    damage,
    find_checkpoint,
    remove_half_checkpoints,
)
from labeltune.training.checkpoints import Checkpoint, LogSums, remove_old, write_manifest
from labeltune.training.trainer import LabelTrainer

SCRIPT = Path(__file__).parent / "helpers" / "kill_train.py"


def process(config: Path, moment: str, number: int, *rest: str) -> subprocess.CompletedProcess[str]:
    return forks.run([SCRIPT, config, moment, str(number), *rest])


def test_killed_while_saving_nothing_is_lost_and_nothing_half_is_picked(
    in_folder: Path, model_folder: Path
) -> None:
    """Four moments of a save, one process after the other; only the newest checkpoint is kept."""
    torch.set_num_threads(1)
    config = config_for(in_folder, model_folder, max_steps=6, save_steps=1, save_total_limit=1)
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.0})})
    whole = labeltune.train(config.model_copy(update={"output_dir": str(in_folder / "whole")}))
    path = in_folder / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    folder, rest, before = Path(config.output_dir), (), 0
    for moment, number in (("manifest", 1), ("torn", 1), ("files", 2), ("fsync", 1)):
        done = process(path, moment, number, *rest)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        (kept,) = checkpoints(folder)
        assert damage(kept) is None and int(kept.name.split("-")[1]) >= before
        before, rest = int(kept.name.split("-")[1]), ("--resume",)
    assert process(path, "never", 1, "--resume").returncode == 0
    (last,) = checkpoints(folder)
    assert last.name == "checkpoint-6" and same_weights(last, whole.last)
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (last, whole.last)]
    assert [entry["step"] for entry in states[0]["log_history"]] == [
        e["step"] for e in states[1]["log_history"]
    ]
    logs = [(run.parent / "metrics.jsonl").read_text().splitlines() for run in (last, whole.last)]
    timings = {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "memory_gb",
        "total_flos",
        "train_loss",
    }
    kept_logs = [
        [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines] for lines in logs
    ]
    assert kept_logs[0] == kept_logs[1] and [e["step"] for e in kept_logs[0]][:6] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in folder.glob("*checkpoint-*")] == [last.name]


def test_a_damaged_checkpoint_is_passed_over(in_folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    config = config_for(in_folder, model_folder, max_steps=4, save_steps=1, save_total_limit=9)
    last = labeltune.train(config).last
    expected = adapter_weights(last)
    listed = json.loads((last / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert listed["adapter_model.safetensors"] == file_hash(last / "adapter_model.safetensors")
    assert {"optimizer.pt", "trainer_state.json", "labeltune.json", "tokenizer.json"} <= set(listed)
    for folder, file in ((last, "optimizer.pt"), (last.with_name("checkpoint-3"), "rng_state.pth")):
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
    said: list[str] = []
    assert labeltune.train(config, resume=True, say=said.append).last == last
    warnings = [line for line in said if line.startswith("warning")]
    assert (
        len(warnings) == 2
        and "optimizer.pt is not what was saved" in warnings[0]
        and "checkpoint-3" in warnings[1]
    )
    assert damage(last) is None
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_weights(last).items())
    for folder in checkpoints(last.parent):
        (folder / "scheduler.pt").unlink()
    with pytest.raises(ModelError, match=r"every checkpoint in .* is damaged"):
        labeltune.train(config, resume=True)
    (last / MANIFEST_FILE).write_text("[")
    assert "cannot be read" in str(damage(last))


def test_what_is_replaced_is_kept_until_the_new_one_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in (RUN_FILE, "weights"):
        (folder / name).write_text("{}")
    write_manifest(folder)
    for _ in range(2):  # killed while writing, twice
        Checkpoint(None, {}, 1, LogSums()).begin(folder, True)  # type: ignore[arg-type]
        (folder / "weights").write_text("half")
        assert checkpoints(tmp_path) == []
        remove_half_checkpoints(tmp_path)
        assert checkpoints(tmp_path) == [folder] and damage(folder) is None
    Checkpoint(None, {}, 1, LogSums()).begin(folder, True)  # type: ignore[arg-type]
    (folder / RUN_FILE).write_text("new")
    write_manifest(folder)  # killed before the old one was deleted
    remove_half_checkpoints(tmp_path)
    assert (folder / RUN_FILE).read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert sorted(p.name for p in folder.iterdir()) == sorted([RUN_FILE, MANIFEST_FILE])
    # Folders of others are left alone, whatever they are called.
    (tmp_path / "checkpoint-9").mkdir()
    remove_half_checkpoints(tmp_path)
    assert (tmp_path / "checkpoint-9").is_dir()


@pytest.mark.parametrize(
    ("limit", "kept", "left"),
    [(9, {2}, [1, 2, 3, 4]), (3, {2, 4}, [2, 3, 4]), (2, {4}, [3, 4]), (1, {1, 4}, [1, 4]), (1, {1}, [1])],
)
def test_old_checkpoints_go_and_the_best_and_the_last_stay(
    limit: int, kept: set[int], left: list[int], tmp_path: Path
) -> None:
    folders = {number: tmp_path / f"checkpoint-{number}" for number in range(1, 5)}
    for folder in folders.values():
        folder.mkdir()
        (folder / RUN_FILE).write_text("{}")
        write_manifest(folder)
    remove_old(tmp_path, limit, {folders[number] for number in kept})
    assert sorted(path.name for path in tmp_path.iterdir()) == [folders[number].name for number in left]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    ],
)
def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(
    error: Exception, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(in_folder, model_folder, max_steps=4, save_steps=1)
    save, calls = torch.save, []

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(str(file))
        if "checkpoint-3" in str(file):
            raise error
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OutputError, match=r"checkpoint-3 cannot be written: .*checkpoint-2 is saved, --resume continues it"
    ) as raised:
        labeltune.train(config)
    assert raised.value.exit_code == 2 and calls
    folder = Path(config.output_dir)
    assert [found.name for found in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(folder.glob("checkpoint-3*"))
    monkeypatch.setattr(torch, "save", save)
    assert labeltune.train(config, resume=True).steps == 4


def test_another_error_while_saving_is_not_called_a_full_disk(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        labeltune.train(config_for(in_folder, model_folder, max_steps=1))


def test_a_second_training_into_the_same_folder_is_refused(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    seen: list[str] = []

    def meanwhile(_: str) -> None:
        if not seen:
            with pytest.raises(OutputError) as raised:
                labeltune.train(config, overwrite=True)
            seen.append(str(raised.value))

    labeltune.train(config, say=meanwhile)
    assert f"process {os.getpid()}" in seen[0] and "another training writes into" in seen[0]
    assert labeltune.train(config, overwrite=True).steps == 1


def test_a_dead_process_holds_no_lock(in_folder: Path) -> None:
    code = "import os\nfrom pathlib import Path\nfrom labeltune.io.lock import alone_with\n"
    code += "with alone_with(Path('x/.lock'), 'busy', 'wait'):\n    os._exit(3)\n"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3
    with (
        alone_with(Path("x/.lock"), "busy", "wait"),
        pytest.raises(OutputError, match=r"busy \(process \d+\); wait"),
        alone_with(Path("x/.lock"), "busy", "wait"),
    ):
        pytest.fail("two at a time")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(
    what: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's rows are named, the weights before it are kept, and a resumed run can go on from there."""
    config = config_for(in_folder, model_folder, max_steps=4, save_steps=1, save_total_limit=9)
    real, calls, rows = LabelTrainer.sum_over_packs, [], []

    def broken(self: LabelTrainer, model: Any, given: Any) -> Any:
        total = real(self, model, given)
        calls.append(len(given))
        if len(calls) == 3:
            rows.extend(given)
            if what == "loss":
                return total * float("nan")
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
        return total

    monkeypatch.setattr(LabelTrainer, "sum_over_packs", broken)
    with pytest.raises(
        DivergedError, match=rf"diverged at step 3: the {what}.*checkpoint-2 was saved before that"
    ) as raised:
        labeltune.train(config)
    assert raised.value.exit_code == 2
    lines = (in_folder / "classification.jsonl").read_text(encoding="utf-8").splitlines()
    named = [int(n) for n in re.findall(r"classification\.jsonl:(\d+)", str(raised.value))]
    assert len(named) == len(rows) == 8
    tokenizer = make_tokenizer()
    for number, row in zip(named, rows, strict=True):
        assert json.loads(lines[number - 1])["text"] in tokenizer.decode(row.ids)
    folder = Path(config.output_dir)
    assert [found.name for found in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert all(tensor.isfinite().all() for tensor in adapter_weights(folder / "checkpoint-2").values())
    monkeypatch.setattr(LabelTrainer, "sum_over_packs", real)
    assert labeltune.train(config, resume=True).steps == 4


def test_a_loss_scaler_leaves_out_steps_with_an_infinite_loss(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does with infinite gradients; they count for no mean. Where all are infinite, the run ends."""

    class Scaler:
        def scale(self, loss: Any) -> Any:
            return loss

        def state_dict(self) -> dict[str, Any]:
            return {}

    config = config_for(in_folder, model_folder, max_steps=4, save_steps=4)
    real = LabelTrainer.sum_over_packs
    overflowing = [2]

    def step(self: LabelTrainer, model: Any, given: Any) -> Any:
        self.accelerator.scaler = Scaler()
        total = real(self, model, given)
        return total * float("inf") if self.state.global_step + 1 in overflowing else total

    monkeypatch.setattr(LabelTrainer, "sum_over_packs", step)
    result = labeltune.train(config)
    losses = [line["loss"] for line in logged(result.last, "loss")]
    assert result.steps == 4 and losses[1] == 0 and all(loss > 0 for loss in (losses[0], *losses[2:]))
    assert result.train_loss == pytest.approx(sum(losses) / 3)
    overflowing[:] = range(1, 9)
    with pytest.raises(DivergedError, match="diverged at step 4: the loss is inf"):
        labeltune.train(config, overwrite=True)


def test_a_learning_rate_that_diverges_is_reported_as_such(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, epochs=8, learning_rate=1e30, scheduler="constant")
    with pytest.raises(DivergedError, match=r"Lower training\.learning_rate \(it is 1e\+30\)"):
        labeltune.train(config)


def test_a_run_folder_that_is_not_there_is_answered_with_those_near_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^run folder {tmp_path}/new does not exist; train first$"):
        find_checkpoint(tmp_path / "new")
    for name in ("news", "tickets"):
        (tmp_path / name / "best").mkdir(parents=True)
    with pytest.raises(ModelError, match=rf"; train first; near it are: {tmp_path}/news$"):
        find_checkpoint(tmp_path / "new")
    for name in ("a", "b", "c"):
        (tmp_path / name / "best").mkdir(parents=True)
    holds = ", ".join(f"{tmp_path}/{name}" for name in ("a", "b", "c", "news"))
    with pytest.raises(ModelError, match=rf"; train first; the folder holds: {holds}, \.\.\.$"):
        find_checkpoint(tmp_path / "mails")
