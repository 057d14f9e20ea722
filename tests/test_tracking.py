"""Trackers: local runs that the dashboard can read, the same for wandb and TensorBoard, no secrets, and failures that cost nothing."""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.rows import classification_rows, ner_rows, write_jsonl
from labeltune.config import RunConfig, SwanlabConfig, build_config
from labeltune.inference.predictor import Predictor
from labeltune.tracking import swanlab as tracking
from labeltune.types import Prediction


def tracked_config(folder: Path, model: Path, **values: Any) -> RunConfig:
    data = write_jsonl(folder / "train.jsonl", classification_rows(24))
    return build_config(
        {
            "model": str(model),
            "output_dir": str(folder / "out"),
            "data": {"train": str(data), "validation_fraction": 0.25},
            "training": {"epochs": 2, "batch_size": 8, "logging_steps": 1},
            "swanlab": {"log_dir": str(folder / "swanlog"), "prediction_rows": 3, **values},
        }
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def test_the_dashboard_reads_a_run(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real run: loss and predictions reach the board; a planted key reaches nothing."""
    planted = secrets.token_hex(16)
    monkeypatch.setenv("HF_TOKEN", planted)
    config = tracked_config(in_folder, model_folder, mode="local")
    path = in_folder / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "labeltune", "train", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "SWANLAB_API_KEY": planted},
    )
    assert done.returncode == 0, done.stderr
    assert "labeltune board" in done.stderr
    for folder in ("swanlog", "out"):
        for file in (in_folder / folder).rglob("*"):
            if file.is_file():
                assert planted.encode() not in file.read_bytes(), file
    assert planted not in done.stderr + done.stdout

    port = free_port()
    board = subprocess.Popen(
        [sys.executable, "-m", "labeltune", "board", str(in_folder / "swanlog"), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        base = f"http://127.0.0.1:{port}/api/v1"
        for _ in range(150):
            try:
                project = fetch(f"{base}/project")["data"]
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("the dashboard did not come up")
        experiment = project["experiments"][0]
        number = experiment["id"]
        charts = json.dumps(fetch(f"{base}/experiment/{number}/chart")["data"])
        mine = "validation (used for selection)"
        for name in ("train/loss", "train/grad_norm", "train/tokens_saved", "train/memory_gb", "Prediction"):
            assert name in charts
        for name in ("loss", "macro_f1", "calibration_temperature", "confusion matrix (text)"):
            assert f"{mine}/{name}" in charts
        assert "eval/" not in charts
        drawn = [json.loads(f.read_text("utf-8")) for f in (in_folder / "swanlog").rglob("echarts/*.json")]
        axes = [chart["xAxis"][0].get("name") for chart in drawn]
        assert axes.count("Right label") == 1 and axes.count("confidence") == 1 and "Recall" in axes
        assert "NaN" not in json.dumps(drawn)
        loss = fetch(f"{base}/experiment/{number}/tag/train%2Floss")["data"]
        assert len(loss["list"]) >= 4
        text = json.dumps(fetch(f"{base}/experiment/{number}/tag/Prediction")["data"])
        assert text
        shown = json.dumps(experiment)
        assert "labeltune" in shown and "learning_rate" in shown
    finally:
        os.killpg(board.pid, 15)
        board.wait(timeout=20)


def test_predictions_are_shown_before_at_each_epoch_and_at_the_end(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[tuple[str, str]]]] = []
    monkeypatch.setattr(
        tracking.SwanlabTracker, "log_predictions", lambda self, step, texts: seen.append((step, texts))
    )
    monkeypatch.setattr(tracking.SwanlabTracker, "callbacks", lambda _: [])
    for name in ("start", "log", "log_charts", "finish"):
        monkeypatch.setattr(tracking.SwanlabTracker, name, lambda *_: None)
    labeltune.train(tracked_config(in_folder, model_folder, mode="local"))
    assert [step for step, _ in seen] == [0, 3, 6]
    assert all(len(texts) == 3 for _, texts in seen)
    first = [text.split("Ground truth:")[1] for _, text in seen[0][1]]
    last = [text.split("Ground truth:")[1] for _, text in seen[-1][1]]
    assert first == last, "the same rows every time"
    caption, text = seen[0][1][0]
    assert caption.startswith("before training, row ")
    assert text.startswith("Prediction:") and "Document:" in first[0]


def test_an_untrained_extractor_does_not_fill_the_board(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    predict = Predictor.predict

    def watched(self: Predictor, *given: Any, **named: Any) -> list[Prediction]:
        limits.append(self.generation.max_new_tokens)
        return predict(self, *given, **named)

    monkeypatch.setattr(Predictor, "predict", watched)
    monkeypatch.setattr(tracking.SwanlabTracker, "callbacks", lambda _: [])
    for name in ("start", "log", "log_charts", "log_predictions", "finish"):
        monkeypatch.setattr(tracking.SwanlabTracker, name, lambda *_: None)
    config = tracked_config(in_folder, model_folder, mode="local").model_dump(mode="json")
    config["data"]["train"] = str(write_jsonl(in_folder / "ner.jsonl", ner_rows(24)))
    labeltune.train(build_config({**config, "task": "ner", "prompt": {}}))
    assert 32 <= limits[0] < 256 and {*limits} == {limits[0], 256}, "validations have the limit of the config"


def test_auto_is_local_without_a_login(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    assert tracking.pick_mode("auto") == "local"
    monkeypatch.setattr(tracking, "logged_in", lambda: "yes")
    assert tracking.pick_mode("auto") == "online"
    assert tracking.pick_mode("offline") == "offline"
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    assert tracking.pick_mode("auto") == "offline"


def test_auto_with_a_key_but_no_network_is_local(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import swanlab

    def unreachable(**_: Any) -> bool:
        raise ConnectionError("no route")

    monkeypatch.setenv("SWANLAB_API_KEY", secrets.token_hex(16))
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    monkeypatch.setattr(swanlab, "login", unreachable)
    assert tracking.pick_mode("auto") == "local"


def test_a_tracker_that_fails_mid_run_is_named_once(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from swanlab.integration.transformers import SwanLabCallback

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk of the tracker is full")

    monkeypatch.setattr(SwanLabCallback, "on_log", broken)
    result = labeltune.train(tracked_config(in_folder, model_folder, mode="local"))
    assert (result.last / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().err.count("SwanLab failed (OSError: disk of the tracker is full)") == 1


def test_a_tracker_that_cannot_start_does_not_stop_training(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking.SwanlabTracker, "start", lambda _: 1 / 0)
    result = labeltune.train(tracked_config(in_folder, model_folder, mode="local"))
    assert result.steps == 6


def test_offline_runs_are_kept_for_sync(in_folder: Path, model_folder: Path) -> None:
    labeltune.train(tracked_config(in_folder, model_folder, mode="offline"))
    assert any((in_folder / "swanlog").glob("*run*"))


class Recorded:
    """Stands in for swanlab.init and the run that it makes."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def init(self, **given: Any) -> None:
        self.calls.append(given)

    @property
    def id(self) -> str:
        return self.calls[-1]["id"] or f"run-{len(self.calls)}"

    @property
    def name(self) -> str:
        return self.calls[-1]["name"] or "swift-1"


def longer(config: RunConfig, epochs: int) -> RunConfig:
    """The config of a run that is trained on."""
    return config.model_copy(
        update={"training": config.training.model_copy(update={"epochs": float(epochs)})}
    )


@pytest.mark.parametrize("mode", ["online", "local", "offline"])
def test_a_resumed_training_goes_on_in_its_run_or_says_what_it_continues(
    mode: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import swanlab

    recorded = Recorded()
    monkeypatch.setattr(swanlab, "init", recorded.init)
    monkeypatch.setattr(swanlab, "get_run", lambda: recorded)
    monkeypatch.setattr(swanlab, "has_run", lambda: False)
    monkeypatch.setattr(tracking.SwanlabTracker, "callbacks", lambda _: [])
    for name in ("log", "log_charts", "log_predictions"):
        monkeypatch.setattr(tracking.SwanlabTracker, name, lambda *_: None)
    config = tracked_config(in_folder, model_folder, mode=mode)
    labeltune.train(config)
    for epochs in (3, 4):
        labeltune.train(longer(config, epochs), resume=True)
    first, second, third = recorded.calls
    assert first["id"] is None and first["resume"] is None and "resumed_from" not in first["config"]
    assert first["group"].startswith("out-") and first["group"] == second["group"] == third["group"]
    if mode == "online":
        assert [(call["id"], call["resume"]) for call in (second, third)] == [("run-1", "allow")] * 2
        assert "resumed_from" not in third["config"]
    else:
        assert second["id"] is None and second["resume"] is None
        assert [call["config"]["resumed_from"] for call in (second, third)] == [
            {"run": "run-1", "checkpoint": "checkpoint-6"},
            {"run": "run-2", "checkpoint": "checkpoint-9"},
        ]
        assert [call["name"] for call in recorded.calls] == [
            None,
            "swift-1 (resumed from step 6)",
            "swift-1 (resumed from step 9)",
        ]
    if mode != "local":
        return
    other = config.model_copy(
        update={"swanlab": config.swanlab.model_copy(update={"mode": "offline", "group": "mine"})}
    )
    labeltune.train(longer(other, 5), resume=True)
    assert recorded.calls[-1]["id"] is None and recorded.calls[-1]["group"] == "mine"
    (in_folder / "out" / "swanlab.json").write_text("[")
    labeltune.train(longer(config, 6), resume=True)
    assert recorded.calls[-1]["config"]["resumed_from"] == {"run": None, "checkpoint": "checkpoint-15"}
    assert recorded.calls[-1]["name"] == "out (resumed from step 15)"
    labeltune.train(config, overwrite=True)
    assert (
        "resumed_from" not in recorded.calls[-1]["config"] and recorded.calls[-1]["group"] != first["group"]
    )


def test_swanlab_says_nothing_on_ctrl_c(in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    tracker = tracking.SwanlabTracker(
        SwanlabConfig(mode="local", log_dir=str(in_folder / "board")), {}, in_folder
    )
    tracker.start()
    try:
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt) as pressed:
            signal.raise_signal(signal.SIGINT)
        assert tracking.swanlab.has_run(), "the run is ours to end"
    finally:
        tracker.finish(pressed.value)
    assert not tracking.swanlab.has_run() and signal.getsignal(signal.SIGINT) is before
    assert not (in_folder / "swanlab.json").exists(), "nothing goes on with a run that has no checkpoint"
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_real_local_run_is_linked_to_the_one_before(in_folder: Path, model_folder: Path) -> None:
    config = tracked_config(in_folder, model_folder, mode="local")
    found = []
    for epochs in (2, 3):
        labeltune.train(longer(config, epochs), resume=epochs == 3)
        found.append(json.loads((in_folder / "out" / "swanlab.json").read_text("utf-8")))
    assert found[0]["id"] != found[1]["id"] and found[0]["group"] == found[1]["group"]
    written = [f.read_text("utf-8") for f in (in_folder / "swanlog").rglob("*.yaml")]
    assert len(written) == 2
    assert sum("resumed_from" in text and found[0]["id"] in text for text in written) == 1
    assert found[1]["name"] == f"{found[0]['name']} (resumed from step 6)"


MINE = "validation (used for selection)"


def with_tracker(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"tracking": name})


def test_tensorboard_gets_predictions_figures_and_steps(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    labeltune.train(with_tracker(tracked_config(in_folder, model_folder), "tensorboard"))
    (folder,) = (in_folder / "out" / "runs").iterdir()
    assert f"tensorboard --logdir {folder}" in capsys.readouterr().err
    found = EventAccumulator(str(folder))
    found.Reload()
    scalars = {name: [event.step for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert scalars["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert scalars[f"{MINE}/macro_f1"] == [6]
    assert scalars[f"{MINE}/calibration_temperature"] == [6]
    assert not [name for name in scalars if name.startswith("eval/")]
    predicted = found.Tensors("Prediction/text_summary")
    assert [event.step for event in predicted] == [0, 3, 6]
    text = predicted[0].tensor_proto.string_val[0].decode()
    assert text.count("    Prediction:") == 3 and "before training, row " in text
    (confusion,) = found.Tensors(f"{MINE}/confusion matrix (text)/text_summary")
    assert b"predicted: " in confusion.tensor_proto.string_val[0]
    (config,) = found.Tensors("labeltune/text_summary")
    assert b"learning_rate" in config.tensor_proto.string_val[0]


#: Stands in for the package: it records what it is told.
FAKE_WANDB = """
import types
calls, run, summary = [], None, {}
class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
config = Config()
class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data
def init(**given):
    global run
    calls.append(("init", given))
    run = types.SimpleNamespace(id="a1", name="sunny-1", summary=summary, _label=lambda **_: None)
    return run
def log(values):
    if broken:
        raise OSError("no route to wandb")
    calls.append(("log", values))
def define_metric(*_, **__):
    pass
def finish(exit_code=0):
    calls.append(("finish", exit_code))
broken = False
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package `wandb` on the path, so that labeltune and transformers find and import it as they do the real one."""
    package = tmp_path / "fake" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB, encoding="utf-8")
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def forget() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] == "wandb" or name == "labeltune.tracking.wandb":
                del sys.modules[name]

    forget()
    yield importlib.import_module("wandb")
    forget()


def test_wandb_gets_predictions_figures_and_steps(
    in_folder: Path, model_folder: Path, fake_wandb: Any
) -> None:
    config = tracked_config(in_folder, model_folder, experiment="mine")
    labeltune.train(with_tracker(config, "wandb"))
    names = [name for name, _ in fake_wandb.calls]
    assert names.count("init") == 1 and names[0] == "init" and fake_wandb.calls[-1] == ("finish", 0)
    given = fake_wandb.calls[0][1]
    assert given["project"] == "huggingface" and given["name"] == "mine"
    assert given["config"]["labels"] and given["config"]["labeltune"]["training"]["epochs"] == 2
    logged = [values for name, values in fake_wandb.calls if name == "log"]
    steps = {
        key: [v["train/global_step"] for v in logged if key in v] for key in {k for v in logged for k in v}
    }
    assert steps["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert steps["Prediction"] == [0, 3, 6] and steps[f"{MINE}/macro_f1"] == [6]
    assert steps[f"{MINE}/calibration_temperature"] == steps[f"{MINE}/per label (text)"] == [6]
    assert not [key for key in steps if key.startswith("eval/")]
    first = next(v["Prediction"] for v in logged if "Prediction" in v)
    assert first.columns == ["row", "text"] and len(first.data) == 3
    assert first.data[0][0].startswith("before training, row ")
    assert first.data[0][1].startswith("Prediction:")
    assert "train_runtime" in fake_wandb.summary


def test_a_failing_wandb_is_named_once_and_a_failed_training_is_shown_as_failed(
    in_folder: Path,
    model_folder: Path,
    fake_wandb: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = with_tracker(tracked_config(in_folder, model_folder), "wandb")
    fake_wandb.broken = True
    result = labeltune.train(config)
    assert (result.last / "adapter_model.safetensors").is_file()
    told = capsys.readouterr().err
    assert told.count("Weights & Biases failed (OSError: no route to wandb)") == told.count("failed (") == 1
    assert [name for name, _ in fake_wandb.calls] == ["init", "finish"]

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("labeltune.training.run.run_training", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        labeltune.train(config, overwrite=True)
    assert fake_wandb.calls[-1] == ("finish", 1)
