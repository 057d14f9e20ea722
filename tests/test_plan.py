"""A dry run: the first steps of a run are trained and timed, and nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers.training import config_for
from labeltune.commands.train import plan_command, train_command
from labeltune.config import RunConfig
from labeltune.errors import ConfigError, MissingExtraError
from labeltune.training import run, trainer
from labeltune.training.collate import StepBatches, make_batch
from labeltune.training.packing import run_order, steps_in_all


def without_validation(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.0})})


def quiet(_: str) -> None:
    """Says nothing."""


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens computed, tokens of the rows) of every pack that is trained on."""
    found: list[tuple[int, int]] = []

    def counted(rows: Any, pack: Any, packing: Any, pad_id: int) -> Any:
        batch = make_batch(rows, pack, packing, pad_id)
        found.append((batch.tokens, sum(len(rows[i].ids) for i in pack.rows)))
        return batch

    monkeypatch.setattr(trainer, "make_batch", counted)
    return found


@pytest.mark.parametrize(
    ("task", "training"),
    [
        ("classification", {"epochs": 2, "batch_size": 8}),
        ("classification", {"max_steps": 5, "max_tokens_per_pack": 60}),
        ("ner", {"packing": "packed", "max_tokens_per_pack": 200}),
        ("ner", {"packing": "padded", "method": "full"}),
    ],
)
def test_its_steps_and_tokens_are_those_of_the_run(
    in_folder: Path, model_folder: Path, packs: list[tuple[int, int]], task: str, training: dict[str, Any]
) -> None:
    config = without_validation(config_for(in_folder, model_folder, task, **training))
    found = labeltune.plan(config, say=quiet)
    dry = packs.copy()
    packs.clear()
    result = labeltune.train(config, say=quiet)
    assert dry == packs[: len(dry)], "the same packs in the same order"
    assert len(found.step_seconds) == run.TIMED_STEPS
    assert found.steps == result.steps and found.rows == 48 and found.validation_rows == 0
    computed, given = (sum(column) for column in zip(*packs, strict=True))
    # Rows of another epoch are cut into other steps, and a run that ends early has not seen all.
    assert found.computed_tokens == pytest.approx(computed, rel=0.05)
    assert found.computed_per_row == pytest.approx(found.computed_tokens / (found.steps * 8), abs=0.01)
    assert found.tokens.computed["packed"] / found.tokens.planned_rows == pytest.approx(
        given / (found.steps * 8), rel=0.05
    )
    assert found.packing == training.get("packing", "shared_prefix")
    assert found.max_tokens_per_pack == training.get("max_tokens_per_pack", found.max_tokens_per_pack)
    assert (found.trained == found.parameters) == (training.get("method") == "full")


def test_one_epoch_of_whole_steps_is_counted_exactly(
    in_folder: Path, model_folder: Path, packs: list[tuple[int, int]]
) -> None:
    config = without_validation(config_for(in_folder, model_folder, batch_size=8))
    found = labeltune.plan(config, say=quiet)
    packs.clear()
    labeltune.train(config, say=quiet)
    assert found.computed_tokens == sum(computed for computed, _ in packs)


def test_nothing_is_left_behind(in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a new folder nor in one with a run; no tracker is started, and weights of a run stay as they are."""
    config = config_for(in_folder, model_folder, save_steps=1)
    monkeypatch.setattr("labeltune.tracking.swanlab.SwanlabTracker.start", lambda _: pytest.fail("a tracker"))
    monkeypatch.setenv("TMPDIR", str(in_folder / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(in_folder / "tmp"))
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "cache"))
    (in_folder / "tmp").mkdir()

    def files() -> dict[str, float]:
        kept = (path for path in in_folder.rglob("*") if "cache" not in str(path) and path.is_file())
        return {
            str(path): path.stat().st_mtime
            for path in kept
            if not path.parent.name.startswith("labeltune-rows")
        }

    before = files()
    labeltune.plan(config.model_copy(update={"tracking": "swanlab"}), say=quiet)
    assert files() == before and not Path(config.output_dir).exists()
    assert not list((in_folder / "tmp").glob("labeltune-dry-run-*"))
    labeltune.train(config, say=quiet)
    before = files()
    assert any("checkpoint-" in name for name in before)
    labeltune.plan(config, say=quiet)
    assert files() == before


@pytest.mark.parametrize(("steps", "timed"), [(1, 1), (2, 1), (3, 2), (9, 3)])
def test_seconds_of_a_run_follow_from_those_of_its_first_steps(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, timed: int
) -> None:
    """A clock on which the first step takes 100 s, and every other one 2 s; the first counts only where it is alone."""
    ticks = itertools.chain([0.0], itertools.count(100.0, 2.0))
    monkeypatch.setattr(run, "perf_counter", lambda: next(ticks))
    config = without_validation(config_for(in_folder, model_folder, batch_size=8, max_steps=steps))
    found = labeltune.plan(config, say=quiet)
    each = 100.0 if steps == 1 else 2.0
    assert found.step_seconds == pytest.approx((each,) * timed)
    assert found.seconds == pytest.approx(each * steps, rel=0.05)
    assert found.hours == found.seconds / 3600


def test_longer_steps_are_thought_to_take_longer(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was timed is counted by its tokens: a run whose other steps hold more of them takes more."""
    ticks = itertools.count(0.0, 1.0)
    monkeypatch.setattr(run, "perf_counter", lambda: next(ticks))
    config = without_validation(config_for(in_folder, model_folder, batch_size=8))
    given: list[list[int]] = []
    order = run.run_order

    def noted(*arguments: Any) -> Any:
        given.extend(order(*arguments))
        return iter(given)

    monkeypatch.setattr(run, "run_order", noted)
    found = labeltune.plan(config, say=quiet)
    assert len(given) == 6
    per_step = found.computed_tokens / 6
    assert found.seconds == pytest.approx(6 * 3 * per_step / sum(_computed(config, found, given[1:4])))


def _computed(config: RunConfig, found: Any, steps: list[list[int]]) -> list[int]:
    from labeltune.commands.preparing import load_prompts, read_rows, tokenize_splits
    from labeltune.training.packing import pack_step, to_rows

    splits = read_rows(config, quiet)
    _, builder = load_prompts(config, splits.labels)
    tokens, _ = tokenize_splits(config, splits, builder, quiet)
    rows = [to_rows([tokens[i] for i in step]) for step in steps]
    return [sum(pack.tokens(step) for pack in pack_step(step, found.max_tokens_per_pack)[0]) for step in rows]


def test_memory_at_its_peak_is_seen_after_it_was_given_back() -> None:
    gc.collect()  # what earlier tests left would be given back while the watcher looks
    # From the system itself: a tensor may lie in memory that an earlier test freed and this process has still.
    with run.peak_memory(torch.device("cpu")) as most, mmap.mmap(-1, 240_000_000) as held:
        held[:: mmap.PAGESIZE] = bytes(len(held[:: mmap.PAGESIZE]))
        until = time.monotonic() + 60  # a busy machine may not let the watcher look for long
        while most[0] < 200e6 and time.monotonic() < until:
            time.sleep(run._SECONDS_BETWEEN_LOOKS)
    assert most[0] > 200e6


def test_what_training_refuses_is_refused(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, warmup_steps=99)
    with pytest.raises(ConfigError, match="warmup_steps=99 is no less than the"):
        labeltune.plan(config, say=quiet)
    with pytest.raises(MissingExtraError, match="tracking=wandb"):
        labeltune.plan(config.model_copy(update={"tracking": "wandb"}), say=quiet)


def test_both_commands(in_folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, path = config_for(in_folder, model_folder), in_folder / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    plan_command(config=str(path), overrides=["training.epochs=3"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] == pytest.approx(found["seconds"] / 3600) and found["seconds"] > 0
    assert found["rows"] + found["validation_rows"] == 48 and found["trained"] < found["parameters"]
    assert found["steps"] == 3 * -(-found["rows"] // 8) and len(found["step_seconds"]) == 3
    assert found["tokens"]["tokens"] > found["rows"] and found["free_memory"] > found["memory"] >= 0
    for command in (
        lambda: plan_command(config=str(path)),
        lambda: train_command(config=str(path), dry_run=True),
    ):
        command()
        names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
        assert names == ["rows", "tokens", "budget", "computed", "memory", "time"]
    assert not Path(config.output_dir).exists()
    with pytest.raises(ConfigError, match="leave out --resume"):
        train_command(config=str(path), dry_run=True, resume=True)


def test_the_order_is_that_of_training(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, epochs=2.5, batch_size=4)
    batches = StepBatches(10, 4, config.training.seed)
    wanted = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        wanted += list(batches)
    assert steps_in_all(10, config.training) == 8
    assert list(run_order(10, config.training)) == wanted[:8]
