"""What a run will cost, against what it costs: tokens exactly, operations as PyTorch counts them, memory as training measures it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from labeltune import recipes
from labeltune.cli.plan import _si
from labeltune.cli.plan import plan as plan_command
from labeltune.config import RunConfig
from labeltune.errors import ConfigError
from labeltune.modeling.lora import attach_adapter
from labeltune.modeling.precision import pick_precision
from labeltune.training import collate, timing, token_plan, trainer
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.costs import Flops, SmallModel, count_flops, model_shape, peak_bytes
from labeltune.training.loss import answer_loss
from labeltune.training.memory import activation_bytes
from labeltune.training.planner import Row, plan_step
from labeltune.training.token_plan import TokenPlan, attention_pairs, plan_tokens
from test_training import config_for


def without_validation(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(
        update={"data": config.data.model_copy(update={"validation_fraction": 0.0, **data})}
    )


def without_weights(model_folder: Path, folder: Path) -> Path:
    """Configuration and tokenizer alone."""
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("task", "training"),
    [
        ("classification", {"epochs": 1.5, "batch_size": 7}),
        ("classification", {"max_steps": 9, "max_tokens_per_pack": 60}),
        ("ner", {"packing": "packed", "max_tokens_per_pack": 200}),
        ("ner", {"packing": "padded"}),
    ],
)
def test_the_tokens_are_those_of_the_run(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, task: str, training: dict[str, Any]
) -> None:
    config = without_validation(config_for(in_folder, model_folder, task, **training))
    light = config.model_copy(update={"model": str(without_weights(model_folder, in_folder / "light"))})
    planned = recipes.plan(light, progress=False)
    computed, given, largest = [], [], []

    def counted(rows: Any, pack: Any, packing: Any, pad_id: int) -> Any:
        batch = make_batch(rows, pack, packing, pad_id)
        computed.append(batch.tokens)
        given.append(sum(len(rows[i].ids) for i in pack.rows))
        largest.append(batch.index.numel())
        return batch

    monkeypatch.setattr(trainer, "make_batch", counted)
    result = recipes.train(config)
    assert planned.computed_tokens == sum(computed) and planned.largest_pack == max(computed)
    assert planned.answer_tokens == sum(largest) and planned.steps == result.steps
    rows = sum(given) / planned.tokens_per_row
    assert planned.computed_per_row == pytest.approx(sum(computed) / rows, abs=0.02)
    assert planned.gflops is None and planned.hours is None


def test_planning_in_processes_is_planning_in_one(in_folder: Path, model_folder: Path) -> None:
    config = without_validation(config_for(in_folder, model_folder, batch_size=2, epochs=3))
    one, three = (
        recipes.plan(without_validation(config, workers=workers), progress=False).to_dict()
        for workers in (1, 3)
    )
    for values in (one, three):
        values.pop("free_memory")
    assert one == three


def test_several_processes_train_no_fewer_tokens(in_folder: Path, model_folder: Path) -> None:
    from datasets import Dataset

    rows = [
        {"input_ids": [1, 2, *range(i % 5), 9], "answer_start": 2, "answer_end": 3 + i % 5} for i in range(20)
    ]
    config = config_for(in_folder, model_folder, epochs=1, batch_size=5)
    alone = plan_tokens(Dataset.from_list(rows), config.training, 30, "shared_prefix", 1)
    shared = plan_tokens(Dataset.from_list(rows), config.training, 30, "shared_prefix", 3)
    assert shared.given == alone.given and shared.computed >= alone.computed and shared.packs % 3 == 0


def rows_of(count: int, prefix: int = 40) -> list[Row]:
    return [
        Row.of([*range(3, 3 + prefix), *range(60 + i, 90 + i), 7, 8, 2], prefix + 30, prefix + 33)
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("packing", ["shared_prefix", "padded"])
def test_operations_are_those_that_pytorch_counts(
    in_folder: Path, kind: str, method: str, packing: Any
) -> None:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    # PyTorch does not count its attention for the CPU by itself.
    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), kind)
    model.save_pretrained(in_folder / "model")
    config = config_for(in_folder, in_folder / "model", method=method)
    if method == "lora":
        model = attach_adapter(model, config.lora)
    model.train()
    rows = rows_of(6)
    pack = plan_step(rows, 10_000, packing)[0][0]
    batch = make_batch(rows, pack, packing, 0)
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter, attention_for(model, packing):
        head = model.get_output_embeddings()
        answer_loss(model, head, batch.inputs, batch.index, batch.targets).backward()
    shape = model_shape(in_folder / "model", config, pick_precision("fp32"))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs = attention_pairs(pack, rows, packing)
    alone = TokenPlan(1, 6, 0, batch.tokens, batch.index.numel(), pairs, 1, batch.tokens, ())
    # Two layers: that nothing is propagated below the first one's adapters is a larger part here than in a real model.
    assert count_flops(shape, alone, False).total == pytest.approx(counter.get_total_flops(), rel=0.08)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_memory_of_many_layers_follows_from_one_and_two(in_folder: Path, kind: str) -> None:
    """The real model has five; its vocabulary is larger than that of the small ones."""
    tokenizer = make_tokenizer()
    made = make_model(len(tokenizer), kind)
    made.config.num_hidden_layers = 5
    if getattr(made.config, "layer_types", None):
        made.config.layer_types = list(made.config.layer_types[:1]) * 5
    made.config.save_pretrained(in_folder / "model")
    config, precision = config_for(in_folder, in_folder / "model"), pick_precision("fp32")
    real = attach_adapter(type(made)(made.config), config.lora)
    real.train()
    rows = rows_of(8)
    pack = plan_step(rows, 10_000)[0][0]
    one, two = (SmallModel(in_folder / "model", config, precision, layers) for layers in (1, 2))
    kept = [model.per_token(rows, "shared_prefix") for model in (one, two)]
    measured = activation_bytes(real, rows, "shared_prefix", 0, real.get_output_embeddings())
    assert kept[0] + 4 * (kept[1] - kept[0]) == pytest.approx(measured, rel=0.03)
    peaks = [model.peak(rows, pack, "shared_prefix", False) for model in (one, two)]
    with peak_bytes() as peak, attention_for(real, "shared_prefix"):
        batch = make_batch(rows, pack, "shared_prefix", 0)
        head = real.get_output_embeddings()
        answer_loss(real, head, batch.inputs, batch.index, batch.targets).backward()
    assert peaks[0] + 4 * (peaks[1] - peaks[0]) == pytest.approx(peak[0], rel=0.1)


def test_seconds_of_a_run_follow_from_those_of_its_parts(in_folder: Path, model_folder: Path) -> None:
    """A clock that stands still but for what each layer, each pack's rest, and the output layer are said to take."""
    config, precision = config_for(in_folder, model_folder), pick_precision("fp32")
    shape = model_shape(model_folder, config, precision)
    rows = rows_of(6)
    packs = plan_step(rows, 120)[0]
    assert len(packs) > 1
    few, many = (SmallModel(model_folder, config, precision, layers) for layers in (1, 4))
    slow = iter([1.0, 1.5, 0.5, *[1.0] * 999])  # the machine's moods, the same for both models

    def passes(model: SmallModel, mood: list[float]) -> Any:
        def step(*_: Any) -> float:
            if model is few:
                mood[0] = next(slow)
            return mood[0] * (0.25 + 0.5 * model.layers)

        return step

    mood = [1.0]
    few.step, many.step = passes(few, mood), passes(many, mood)  # type: ignore[method-assign]
    rest, layer = timing.layer_seconds(few, many, [(rows, packs)], "shared_prefix", False)
    assert (rest, layer) == pytest.approx((0.25 * len(packs), 0.5 * len(packs)))
    sample, whole = Flops(70.0, 30.0, 10.0), Flops(700.0, 300.0, 200.0)
    found = timing.run_seconds(shape, sample, whole, 9, 2, (rest, layer), 0.125, 0.0625)
    layers = 10 * layer * shape.layers
    assert found == pytest.approx(layers + 20 * 0.125 + 9 * (rest / 2 + 0.0625))


def test_parts_of_a_step_take_some_time(in_folder: Path, model_folder: Path) -> None:
    config, precision = config_for(in_folder, model_folder), pick_precision("fp32")
    shape = model_shape(model_folder, config, precision)
    model = SmallModel(model_folder, config, precision, 1)
    one, hundred = (timing.optimizer_seconds(model, trained) for trained in (1_000, 100_000))
    assert 0 < one < hundred
    before = torch.random.get_rng_state()
    assert timing.output_seconds(shape, 300, torch.float32, torch.device("cpu")) > 0
    assert torch.equal(torch.random.get_rng_state(), before), "what is measured does not change a run"


def test_living_bytes_are_counted() -> None:
    start = torch.zeros(1000)
    with peak_bytes() as peak:
        first = start + 1
        del first
        second = start + 1
        view = second.view(10, 100)
        del second
        third = view + 1
    assert peak == [8000] and third is not None


def test_the_command(in_folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = in_folder / "run.yaml"
    config = config_for(in_folder, model_folder)
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    plan_command(path, ["training.epochs=3"], gflops=1.0, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] == pytest.approx(sum(found["flops"].values()) / 1e9 / 3600)
    assert found["rows"] + found["validation_rows"] == 48 and found["trained"] < found["parameters"]
    assert found["memory"]["weights"] > 4 * (found["parameters"] - found["trained"]) * 0.99
    assert found["memory"]["optimizer"] == 8 * found["trained"]
    plan_command(path, measure=True)
    shown = capsys.readouterr().out
    assert "training.max_tokens_per_pack=" in shown and "FLOP/s, without validation" in shown
    plan_command(path)
    assert "give a rate (--gflops)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not both"):
        plan_command(path, gflops=1.0, measure=True)


def test_units() -> None:
    assert [_si(v) for v in (0, 999, 1500, 2.5e9, 3e21)] == ["0 ", "999 ", "1.5 k", "2.5 G", "3e+03 E"]


def test_the_order_is_that_of_training(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, epochs=2, batch_size=4)
    batches = collate.StepBatches(10, 4, config.training.seed)
    wanted = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        wanted += list(batches)
    assert list(token_plan.run_order(10, config.training)) == wanted
