"""Two processes on gloo against one: the same curve, weights and figures, whoever computes what and whoever goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import labeltune
from helpers import forks
from helpers.forks import Fork
from helpers.rows import classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import make_model
from helpers.training import adapter_weights, config_for, logged, without_dropout
from labeltune.config import RunConfig, load_config
from labeltune.distributed import all_gather, all_reduce, assign, join_uneven
from labeltune.io.run_folder import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:prediction uses the model's own cache")
#: What `accelerate launch` sets for configs/distributed/fsdp2.yaml, and the device, which accelerate cannot guess here.
FSDP = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
#: So small that no weight moves: figures are then those of the same weights.
STANDING = 1e-30


def job(folder: Path, name: str, config: RunConfig, **more: Any) -> dict[str, Any]:
    """A config written for a worker, with an output folder of its own."""
    config = config.model_copy(update={"output_dir": str(folder / name)})
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return {"config": str(path), "resume": False, "environment": {}, **more}


def start(folder: Path, jobs: Sequence[dict[str, Any]]) -> list[Fork]:
    """Two processes that run these jobs."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    return two_processes([str(Path(__file__).parent / "helpers" / "ranks_worker.py"), str(path)])


def two_processes(arguments: Sequence[str]) -> list[Fork]:
    """Python twice, as torchrun would start it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    job_of_two = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        forks.start(arguments, env={**os.environ, **job_of_two, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]


def only_first_checkpoint(source: Path, target: Path) -> None:
    """A run as it stood after two steps."""
    shutil.copytree(source / "checkpoint-2", target / "checkpoint-2")


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`: by this process. `ddp`, `fsdp`: by two. `*_resumed`: by two, from the first checkpoint of `one`. `same_*`: weights
    that do not move. `cache_*`: prefixes shared by the model's cache."""
    folder = tmp_path_factory.mktemp("ranks")
    os.environ["LABELTUNE_CACHE"] = str(folder / "cache")
    # The last step of the epoch has one row, so one of two processes has nothing of its own to compute.
    config = without_dropout(config_for(folder, model_folder, batch_size=14, max_steps=6))
    rows = {"classification": classification_rows(114), "ner": ner_rows(114)}
    jobs, alone = [], []
    for task, all_rows in rows.items():
        train = write_jsonl(folder / f"{task}_train.jsonl", all_rows[:43])
        validation = write_jsonl(folder / f"{task}_validation.jsonl", all_rows[43:])
        labels = None if task == "classification" else ("地点", "人名", "地理实体", "组织")
        found = {"train": str(train), "validation": str(validation), "labels": labels}
        this = (
            config if task == "classification" else without_dropout(config_for(folder, model_folder, "ner"))
        )
        this = this.model_copy(update={"data": this.data.model_copy(update=found)})
        this = this.model_copy(
            update={"generation": this.generation.model_copy(update={"max_new_tokens": 12})}
        )
        still = this.training.model_copy(update={"learning_rate": STANDING, "max_steps": 1})
        still_config = this.model_copy(update={"training": still})
        if task == "classification":
            config = this
            alone.append(job(folder, "one", this))
            jobs += [job(folder, "ddp", this), job(folder, "fsdp", this, environment=FSDP)]
            jobs += [job(folder, "ddp_resumed", this, resume=True)]
            jobs += [job(folder, "fsdp_resumed", this, resume=True, environment=FSDP)]
        alone.append(job(folder, f"same_{task}_one", still_config))
        jobs.append(job(folder, f"same_{task}_ddp", still_config))
        jobs.append(job(folder, f"same_{task}_fsdp", still_config, environment=FSDP))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    make_model(len(tokenizer), "lfm2").save_pretrained(folder / "lfm2")
    tokenizer.save_pretrained(folder / "lfm2")
    by_cache = config.model_copy(update={"model": str(folder / "lfm2")})
    alone.append(job(folder, "cache_one", by_cache))
    jobs.append(job(folder, "cache_ddp", by_cache))
    for one in alone:
        labeltune.train(load_config(one["config"]))
    for name in ("ddp_resumed", "fsdp_resumed"):
        only_first_checkpoint(folder / "one", folder / name)
    # The last one: it ends the workers, with the code of a run that was interrupted.
    jobs.append(job(folder, "interrupted", config, signal=int(signal.SIGTERM)))
    processes = start(folder, jobs)
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], "\n".join(
        text[-3000:] for text in said
    )
    assert said[0].count("done in ") == len(jobs) - 1
    assert not any(word in said[1] for word in ("done in", "step 2", "data:", "confidence")), said[1]
    return folder


def history(run: Path, key: str) -> list[float]:
    """A figure over the steps of a run."""
    return [line[key] for line in logged(checkpoints(run)[-1], key)]


def assert_same_run(found: Path, right: Path) -> None:
    """Loss, gradient norm and validation at every step, and the last adapter as one vector, relative 1e-5."""
    for key, count in (("loss", 6), ("grad_norm", 6), ("eval_loss", 3), ("eval_macro_f1", 3)):
        expected = history(right, key)
        assert len(expected) == count
        assert history(found, key) == pytest.approx(expected, rel=1e-5), key
    a, b = (adapter_weights(run / "checkpoint-6") for run in (right, found))
    assert set(a) == set(b)
    expected, got = (torch.cat([weights[name].flatten() for name in sorted(a)]) for weights in (a, b))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    moved = torch.cat([t.flatten() for n, t in a.items() if "lora_B" in n])
    assert moved.norm() > 0.1, "training moved the weights"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_give_the_curve_and_adapter_of_one(name: str, runs: Path) -> None:
    assert_same_run(runs / name, runs / "one")


def test_two_processes_that_share_by_the_cache_train_like_one(runs: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        assert history(runs / "cache_ddp", key) == pytest.approx(
            history(runs / "cache_one", key), rel=1e-3
        ), key
    one, two = (adapter_weights(runs / name / "checkpoint-6") for name in ("cache_one", "cache_ddp"))
    for name, tensor in one.items():
        # Short convolutions of random weights have next to no gradient, of whose rounding Adam makes whole steps.
        if ".conv." not in name:
            torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddp_resumed", "fsdp_resumed"])
def test_two_processes_go_on_where_one_stopped(name: str, runs: Path) -> None:
    assert_same_run(runs / name, runs / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(name: str, runs: Path) -> None:
    folder = runs / f"{name}_by_one"
    path = runs / f"{name}_by_one.yaml"
    config = load_config(runs / f"{name}.yaml").model_copy(update={"output_dir": str(folder)})
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    only_first_checkpoint(runs / name, folder)
    labeltune.train(load_config(path), resume=True)
    assert_same_run(folder, runs / "one")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", ["classification", "ner"])
def test_shared_out_validation_is_that_of_one_process_to_the_last_bit(
    task: str, way: str, runs: Path
) -> None:
    """71 rows in three units; probabilities, temperature and loss are compared as they are written."""
    one, two = runs / f"same_{task}_one", runs / f"same_{task}_{way}"
    assert history(two, "eval_loss") == history(one, "eval_loss") != []
    predictions = [(run / "validation" / "predictions.jsonl").read_bytes() for run in (one, two)]
    assert predictions[0] == predictions[1] and predictions[0].count(b"\n") == 71
    figures = [
        json.loads((run / "validation" / "metrics.json").read_text(encoding="utf-8")) for run in (one, two)
    ]
    for found in figures:
        del found["run"]
    assert figures[0] == figures[1]
    if task == "classification":
        assert (one / "best" / "calibration.json").read_bytes() == (
            two / "best" / "calibration.json"
        ).read_bytes()


def test_a_signal_to_one_process_lets_both_finish_the_step_and_save(runs: Path) -> None:
    assert [path.name for path in checkpoints(runs / "interrupted")] == ["checkpoint-2", "checkpoint-3"]
    assert (runs / "interrupted" / "checkpoint-3" / "optimizer.pt").is_file()


def test_a_process_that_is_killed_ends_the_other_with_the_cause(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, collective_timeout=60)
    first, second = start(in_folder, [job(in_folder, "run", config, signal=int(signal.SIGKILL))])
    assert second.wait(timeout=120) == -signal.SIGKILL
    started = time.monotonic()
    said = first.communicate(timeout=60)[1]
    second.communicate()
    assert time.monotonic() - started < 60, "long before the time-out would have ended it"
    assert first.returncode == 2 and "Traceback" not in said, said
    error = next(line for line in said.splitlines() if line.startswith("error"))
    assert error.startswith("error on rank 0: another process of the job has ended")
    assert "checkpoint-2 is saved, --resume continues it" in error


SILENT = """
import os, time
from labeltune.config import build_config
from labeltune.distributed import all_reduce, peer_errors
from labeltune.models.precision import Precision
from labeltune.training.preflight import check_feasible
config = build_config({"training": {"collective_timeout": 3}})
check_feasible(config, Precision("fp32", None, "cpu"), 99, has_validation=False)
if os.environ["RANK"] == "1":
    time.sleep(600)
with peer_errors(3, lambda: "checkpoint-2 is saved"):
    all_reduce([1], "sum")
"""


def test_a_process_that_hangs_is_given_up_after_the_time_out() -> None:
    """What a training does with `training.collective_timeout`, without the training."""
    first, second = two_processes(["-c", SILENT])
    try:
        said = first.communicate(timeout=60)[1]
    finally:
        second.kill()
        second.communicate()
    last = said.strip().splitlines()[-1]
    assert (
        "PeerError: another process of the job did not answer within training.collective_timeout=3 s" in last
    )
    assert "checkpoint-2 is saved" in last


def test_the_time_out_of_the_config_is_that_of_the_processes(tmp_path: Path, model_folder: Path) -> None:
    from labeltune.models.precision import pick_precision
    from labeltune.training.preflight import training_arguments

    config = config_for(tmp_path, model_folder, collective_timeout=77)
    assert training_arguments(config, pick_precision("fp32"), False).ddp_timeout == 77


def test_units_are_dealt_evenly() -> None:
    costs = [9, 1, 1, 5, 4, 3, 3, 2]
    owners = assign(costs, 3)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == p) for p in range(3)]
    assert sum(loads) == sum(costs) and max(loads) - min(loads) <= 2
    assert assign(costs, 1) == [0] * 8 and assign([], 2) == []


def test_one_process_needs_nobody() -> None:
    assert all_gather("x") == ["x"] and all_reduce([1.5, 2.0], "sum") == [1.5, 2.0]
    with join_uneven(torch.nn.Linear(2, 2)):
        pass
