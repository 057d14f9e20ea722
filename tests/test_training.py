"""Training on two-layer models: exact labels, exact resume, checkpoints that others can read."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import labeltune
from helpers import forks
from helpers.commands import command
from helpers.rows import classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import MODEL_KINDS, make_model, make_tokenizer
from helpers.training import adapter_weights, config_for, without_dropout
from labeltune.config import load_config
from labeltune.errors import DataError, Interrupted, ModelError, OutputError
from labeltune.io.run_folder import RunInfo, checkpoints, find_checkpoint
from labeltune.training.callbacks import StopOnInterrupt
from labeltune.training.preflight import settled
from labeltune.types import Example


def test_checkpoints_are_peft_folders_with_everything_prediction_needs(
    in_folder: Path, model_folder: Path
) -> None:
    config = config_for(in_folder, model_folder)
    result = labeltune.train(config)
    folders = checkpoints(Path(config.output_dir))
    assert folders[-1] == result.last
    assert result.best.resolve() in [folder.resolve() for folder in folders]
    info = RunInfo.load(result.last)
    assert info.labels == ("Art", "Space", "Sports")
    assert info.model == str(model_folder)
    assert "<|im_start|>" in info.chat_template
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "optimizer.pt"):
        assert (result.last / name).is_file()
    assert find_checkpoint(config.output_dir).resolve() == result.best.resolve()


@pytest.mark.parametrize(
    ("rows", "hidden", "method", "epochs", "rate"),
    [
        (40, 576, "lora", 8, 1.3e-3),
        (160, 640, "lora", 6, 1.2e-3),
        (320, 1536, "lora", 4, 6.1e-4),
        (800, 2000, "lora", 3, 5.0e-4),
        (2000, 4096, "full", 2, 2.9e-5),
    ],
)
def test_passes_follow_from_the_rows_and_the_rate_from_the_width(
    rows: int, hidden: int, method: str, epochs: float, rate: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "hidden_size": hidden}), encoding="utf-8"
    )
    said: list[str] = []
    asked = ["training.epochs=auto", "training.learning_rate=auto", f"training.method={method}"]
    found = settled(load_config(None, asked), rows, 10, tmp_path, said.append).training
    assert (found.epochs, found.learning_rate) == (epochs, rate)
    assert said == [
        f"training.epochs: {epochs:g}, for {rows} rows",
        f"training.learning_rate: {rate:.1e}, for a model of width {hidden}",
    ]
    given = load_config(None, ["training.epochs=3", "training.learning_rate=1e-4"])
    assert settled(given, rows, 10, tmp_path, said.append) == given and len(said) == 2
    # Many labels have few rows each.
    asked = ["training.epochs=auto"]
    assert settled(load_config(None, asked), 1232, 77, tmp_path, said.append).training.epochs == 6
    assert said[-1] == "training.epochs: 6, for 1232 rows of 77 labels"
    several = load_config(None, [*asked, "task=multilabel"])
    assert settled(several, 1232, 77, tmp_path, said.append).training.epochs == 2


def test_a_run_whose_passes_and_rate_are_chosen(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, epochs="auto", learning_rate="auto", batch_size=16)
    result = labeltune.train(config)
    log = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open(encoding="utf-8")]
    width = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    assert result.steps == 24
    assert log[0]["learning_rate"] == pytest.approx(5e-4 * (2000 / width) ** 0.781, rel=0.04)
    said: list[str] = []
    labeltune.train(config, resume=True, say=said.append)
    assert said[-1].startswith("nothing to do: all 24 steps are done"), said


def test_resume_gives_the_weights_of_an_uninterrupted_run(in_folder: Path, model_folder: Path) -> None:
    """Cut off in the middle of the second epoch, at the end of the first, and in its middle."""
    torch.set_num_threads(1)
    config = config_for(in_folder, model_folder, epochs=2, save_total_limit=20)
    whole = labeltune.train(config)
    expected = adapter_weights(whole.last)
    for kept in (4, 3, 1):
        # As if the later checkpoints had never been written.
        for folder in checkpoints(Path(config.output_dir))[kept:]:
            shutil.rmtree(folder)
        (Path(config.output_dir) / "best").unlink()
        assert labeltune.train(config, resume=True).last == whole.last
        found = adapter_weights(whole.last)
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


def test_ctrl_c_saves_and_resume_equals_uninterrupted(
    in_folder: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A process of its own is stopped; this one, which has its libraries, goes on with its training, and repeats it."""
    config = config_for(in_folder, model_folder, epochs=24, save_steps=1000)
    path = in_folder / "run.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    process = forks.start(["-m", "labeltune", "train", path])
    for said in process.stderr:
        if said.startswith("step 5/"):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert f"go on with: labeltune train {path} --resume\n" in rest
    assert "\nstopped at step " in rest and "error:" not in rest and "Traceback" not in rest
    saved = checkpoints(Path(config.output_dir))
    assert len(saved) == 1
    assert int(saved[0].name.split("-")[1]) < 130
    torch.set_num_threads(1)
    assert command(monkeypatch, capsys, "train", str(path), "--resume").code == 0
    found = adapter_weights(checkpoints(Path(config.output_dir))[-1])
    assert command(monkeypatch, capsys, "train", str(path), "--overwrite").code == 0
    for name, tensor in adapter_weights(checkpoints(Path(config.output_dir))[-1]).items():
        assert torch.equal(tensor, found[name]), name


def test_sigterm_before_the_first_step_stops_like_ctrl_c_and_leaves_no_lock(
    in_folder: Path, model_folder: Path
) -> None:
    # Other tests of this process leave the handler of Ray.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = config_for(in_folder, model_folder)

    def say(line: str) -> None:
        if line.startswith("checking whether packed rows"):
            signal.raise_signal(signal.SIGTERM)

    try:
        with pytest.raises(Interrupted, match=r"^stopped; no checkpoint has been saved$"):
            labeltune.train(config, say=say)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not Path(config.output_dir).exists()


def test_ctrl_c_finishes_a_step_only_once_one_has_begun(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    stopper = StopOnInterrupt()
    nothing: Any = None
    stopper.on_train_begin(nothing, nothing, nothing)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and not stopper.interrupted
    stopper.on_train_begin(nothing, nothing, nothing)
    stopper.on_step_begin(nothing, nothing, nothing)
    signal.raise_signal(signal.SIGINT)
    stopper.restore()
    assert stopper.interrupted and signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capsys.readouterr().err


def test_the_end_of_turn_is_learnt_when_it_is_also_the_pad_token(in_folder: Path) -> None:
    folder = in_folder / "pad-is-eos"
    tokenizer = make_tokenizer(pad="<|im_end|>")
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = config_for(in_folder, folder, epochs=30, learning_rate=5e-3, method="full", save_steps=1000)
    result = labeltune.train(config)
    from labeltune import load_predictor

    with load_predictor(result.last) as predictor:
        predictions = predictor.predict(
            ["rocket number 90 rocket", "match number 91 match", "paint number 92 paint"]
        )
    assert [p.label for p in predictions] == ["Space", "Sports", "Art"]
    assert all(p.answer == p.label for p in predictions), "the answer stops at the end of turn"


def test_a_prompt_without_candidates_learns_labels_from_the_rows(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder)
    prompt = config.prompt.model_copy(update={"system": "", "user": "Title: {text}\nCategory:"})
    result = labeltune.train(config.model_copy(update={"prompt": prompt}), say=lambda _: None)
    rows = classification_rows(60)[48:]
    with labeltune.load_predictor(result.best) as predictor:
        asked = predictor.builder.prompt(Example("1", rows[0]["text"])).ids
        assert not any(
            label in predictor.builder.template.tokenizer.decode(asked) for label in rows[0]["category"]
        )
        (answer,) = predictor.predict([rows[0]["text"]])
        assert {label for label, _ in answer.ranking} == set(rows[0]["category"])
        (pair,) = predictor.predict([Example("1", rows[0]["text"], ("Space", "Art"))])
        assert {label for label, _ in pair.ranking} == {"Space", "Art"}


def test_ner_trains_and_extracts(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, "ner", epochs=40, learning_rate=1e-2, save_steps=1000)
    result = labeltune.train(config)
    test = write_jsonl(in_folder / "test.jsonl", ner_rows(9))
    metrics = labeltune.evaluate(result.best, str(test), output=in_folder / "eval", progress=False)
    # Where transformers draws other random weights, one of the nine stays wrong.
    assert metrics["span_f1"]["value"] >= 0.8
    rows = [
        json.loads(line)
        for line in (in_folder / "eval" / "predictions.jsonl").read_text("utf-8").splitlines()
    ]
    (entity,) = rows[0]["entities"]
    assert entity.pop("score") < 0
    assert entity == {"start_idx": 2, "end_idx": 4, "entity_text": "南京", "entity_label": "地理实体"}
    base = labeltune.evaluate(result.best, str(test), base=True, progress=False)
    assert base["span_f1"]["value"] < metrics["span_f1"]["value"]


def assert_the_same_result(folder: Path, model: Path, *settings: dict[str, Any]) -> None:
    """As without these settings of training, with the prefix shared."""
    weights = []
    for given in ({}, *settings):
        config = without_dropout(config_for(folder, model, max_steps=3, save_steps=1000, **given))
        said: list[str] = []
        weights.append(adapter_weights(labeltune.train(config, overwrite=True, say=said.append).last))
        assert any("packing=shared_prefix" in line for line in said)
        assert weights[0].keys() == weights[-1].keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[-1][name], rtol=1e-3, atol=1e-4)


def test_memory_settings_do_not_change_the_result(in_folder: Path, model_folder: Path) -> None:
    assert_the_same_result(
        in_folder, model_folder, {"max_tokens_per_pack": 90}, {"gradient_checkpointing": True}
    )


def test_compiling_does_not_change_the_result(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, traced, checked, and run as traced: that kernels agree is test_self_check.py's."""
    torch.compiler.reset()
    compiled, layers = torch.nn.Module.compile, []

    def traced(module: torch.nn.Module, **options: Any) -> None:
        layers.append(module)
        compiled(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), layers=1).save_pretrained(in_folder / "model")
    tokenizer.save_pretrained(in_folder / "model")
    assert_the_same_result(in_folder, in_folder / "model", {"compile": True})
    assert len(layers) == 1


def test_an_earlier_run_is_not_overwritten_by_accident(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    labeltune.train(config)
    with pytest.raises(OutputError, match="--resume"):
        labeltune.train(config)
    labeltune.train(config, overwrite=True)


def test_nothing_to_resume(in_folder: Path, model_folder: Path) -> None:
    with pytest.raises(ModelError, match="nothing to resume"):
        labeltune.train(config_for(in_folder, model_folder), resume=True)


def test_an_incomplete_checkpoint_is_not_picked(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=2)
    result = labeltune.train(config)
    (Path(config.output_dir) / "checkpoint-999").mkdir()
    assert find_checkpoint(config.output_dir, prefer_newest=True) == result.last


def test_faulty_rows_stop_before_weights_are_loaded(in_folder: Path, model_folder: Path) -> None:
    (in_folder / "no-model").mkdir()
    config = config_for(in_folder, in_folder / "no-model")
    rows = [*classification_rows(6), {"text": "", "category": ["a"], "output": "a"}]
    write_jsonl(in_folder / "classification.jsonl", rows)
    with pytest.raises(DataError, match=r"classification\.jsonl:7.*empty_field"):
        labeltune.train(config)


def test_skipped_rows_are_counted(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    rows = [*classification_rows(12), {"text": "x", "category": ["a"], "output": "b"}]
    write_jsonl(in_folder / "classification.jsonl", rows)
    config = config.model_copy(update={"data": config.data.model_copy(update={"on_error": "skip"})})
    said: list[str] = []
    labeltune.train(config, say=said.append)
    assert any("output_not_in_candidates 1" in line for line in said)


@pytest.mark.parametrize("lora", [{"rslora": True}, {"dora": True}, {"target_modules": ("q_proj",)}])
def test_adapter_variants_train(in_folder: Path, model_folder: Path, lora: dict[str, Any]) -> None:
    config = config_for(in_folder, model_folder, max_steps=1)
    config = config.model_copy(update={"lora": config.lora.model_copy(update=lora)})
    assert (labeltune.train(config).last / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_every_kind_of_model_trains_and_predicts(kind: str, in_folder: Path) -> None:
    from labeltune import load_predictor

    tokenizer = make_tokenizer()
    make_model(len(tokenizer), kind).save_pretrained(in_folder / kind)
    tokenizer.save_pretrained(in_folder / kind)
    result = labeltune.train(
        config_for(in_folder, in_folder / kind, epochs=4, learning_rate=2e-2, save_steps=1000)
    )
    assert result.validation_loss is not None and result.validation_loss < math.log(len(tokenizer)), (
        "below that of a uniform guess"
    )
    with load_predictor(result.last) as predictor:
        assert len(predictor.predict(["rocket", "a longer match report"])) == 2


@pytest.mark.parametrize("objective", ["tokens", "labels"])
def test_two_processes_train_like_one(objective: str, in_folder: Path, model_folder: Path) -> None:
    """By torchrun itself. The last step of the epoch has one row, so one of the processes has nothing of its own to compute."""
    weights = []
    for processes in (1, 2):
        config = without_dropout(
            config_for(in_folder, model_folder, batch_size=14, save_steps=1000, objective=objective)
        )
        config = config.model_copy(update={"output_dir": str(in_folder / f"out{processes}")})
        path = in_folder / f"run{processes}.yaml"
        path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
        if processes == 1:
            labeltune.train(config)
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "-m", "labeltune", "train", str(path)],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stderr.count("done in ") == 1, "only the main process speaks"
            assert f"{3 * 14 + 1} rows" in done.stderr
        (folder,) = checkpoints(Path(config.output_dir))
        assert folder.name == "checkpoint-4"
        weights.append((adapter_weights(folder), json.loads((folder / "trainer_state.json").read_text())))
    (first, one), (second, two) = weights
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-5)
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [[line[key] for line in state["log_history"] if key in line] for state in (one, two)]
        assert curves[0] and curves[0] == pytest.approx(curves[1], rel=1e-4), key
