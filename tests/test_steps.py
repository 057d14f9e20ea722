"""Steps of the trainer: what they hold, what they cost in memory, and that the cut into packs is nobody's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

import labeltune
from helpers.packing import lora_model, random_rows
from helpers.rows import classification_rows, write_jsonl
from helpers.templates import PECULIAR
from helpers.tiny_models import make_tokenizer
from helpers.training import adapter_weights, config_for, logged, without_dropout
from labeltune.config import PromptConfig, build_config
from labeltune.data.loading import load_splits
from labeltune.errors import ModelError, OutputError
from labeltune.models.precision import pick_precision
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.training import preflight, trainer
from labeltune.training.callbacks import Progress
from labeltune.training.collate import StepBatches
from labeltune.training.dataset import content_key, tokenize_rows
from labeltune.training.packing import Row, pack_step, useful_tokens
from labeltune.training.preflight import activation_bytes, budget_memory
from labeltune.types import Example

CPU = torch.device("cpu")


def log(result: Any, key: str = "loss") -> list[float]:
    return [line[key] for line in logged(result.last, key)]


def test_the_three_packings_give_the_same_curve(in_folder: Path, model_folder: Path) -> None:
    curves, losses = [], []
    for packing in ("shared_prefix", "packed", "padded"):
        config = without_dropout(config_for(in_folder, model_folder, packing=packing, save_steps=1000))
        result = labeltune.train(config, overwrite=True)
        curves.append(log(result) + log(result, "grad_norm"))
        losses.append(result.validation_loss)
    assert len(curves[0]) > 8
    for curve, loss in zip(curves[1:], losses[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-3)
        assert loss == pytest.approx(losses[0], rel=1e-3)


def test_every_module_trains_in_a_step(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is loaded for evaluation, and its adapter is not."""
    modes: list[bool] = []
    plain = trainer.LabelTrainer.sum_over_packs

    def watched(self: Any, model: Any, rows: Any) -> Any:
        modes.append(all(module.training for module in model.modules()))
        return plain(self, model, rows)

    monkeypatch.setattr(trainer.LabelTrainer, "sum_over_packs", watched)
    labeltune.train(config_for(in_folder, model_folder, max_steps=3, save_steps=2))
    assert modes == [True, True, True]


def test_out_of_memory_halves_the_packs_and_repeats_the_step(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(in_folder, model_folder, max_steps=3, save_steps=1000, max_tokens_per_pack=400)
    config = without_dropout(config)
    right = labeltune.train(config)
    expected, curve = adapter_weights(right.last), log(right)
    plain, refused = trainer.answer_loss, []

    def small_device(model: Any, head: Any, batch: Any) -> Any:
        loss = plain(model, head, batch)
        if batch.tokens > 250:
            refused.append(batch.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(trainer, "answer_loss", small_device)
    said: list[str] = []
    found = labeltune.train(config, overwrite=True, say=said.append)
    assert refused
    warnings = [line for line in said if "out of memory" in line]
    assert "packs of 200 tokens" in warnings[0] and len(warnings) == 1
    assert log(found) == pytest.approx(curve, rel=1e-4)
    for name, tensor in adapter_weights(found.last).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_one_example_that_does_not_fit_stops_with_the_way_out(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "answer_loss", full)
    with pytest.raises(ModelError, match=r"an example of \d+ tokens does not fit.*gradient_checkpointing"):
        labeltune.train(config_for(in_folder, model_folder, max_steps=1))


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    batches = StepBatches(10, 4, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert sorted(i for step in epochs[-1] for i in step) == list(range(10))
    assert [len(step) for step in epochs[0]] == [4, 4, 2] and len(batches) == 3
    assert epochs[0] == epochs[2] != epochs[1]
    assert list(StepBatches(10, 4, seed=4)) != epochs[0]


def test_the_validation_loss_is_the_mean_over_answer_tokens(in_folder: Path, model_folder: Path) -> None:
    """Against the saved adapter in plain transformers and peft, row by row."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_for(in_folder, model_folder, save_steps=1000)
    result = labeltune.train(config)
    splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    assert splits.validation is not None and len(splits.validation) > 1
    builder = PromptBuilder(
        make_task(config.task, splits.labels, config.prompt),
        ChatTemplate(AutoTokenizer.from_pretrained(model_folder)),
    )
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), result.last
    ).eval()
    total, count = 0.0, 0
    for row in splits.validation:
        encoded = builder.training(Example.from_row(row))
        start, end = encoded.answer_span
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : end - 1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:end], reduction="sum"))
        count += end - start
    assert result.validation_loss == pytest.approx(total / count, rel=1e-5)


# --- tokens are made once ---


def rows_and_builder(folder: Path, **prompt: Any) -> tuple[Any, PromptBuilder]:
    file = write_jsonl(folder / "rows.jsonl", classification_rows(12))
    options = {"max_length": 512, **prompt}
    data = {"train": str(file), "validation_fraction": 0}
    config = build_config({"task": "classification", "data": data, "prompt": options})
    splits = load_splits(config.task, config.data, config.hub, 0)
    task = make_task(config.task, splits.labels, config.prompt)
    return splits.train, PromptBuilder(task, ChatTemplate(make_tokenizer()))


def test_a_second_run_reads_the_tokens_of_the_first(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "cache"))
    rows, builder = rows_and_builder(in_folder)
    first, account = tokenize_rows(rows, builder)
    assert len(list((in_folder / "cache" / "tokens").glob("*.arrow"))) == 1

    def must_not_run(*_: Any) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(PromptBuilder, "training", must_not_run)
    second, again = tokenize_rows(rows, builder)
    assert second[:] == first[:] and again == account


def test_tokens_are_made_anew_when_anything_they_follow_from_changes(in_folder: Path) -> None:
    rows, builder = rows_and_builder(in_folder)
    key = content_key(rows, builder)
    assert content_key(*rows_and_builder(in_folder)) == key
    others = [
        content_key(rows.select(range(11)), builder),
        content_key(rows.map(lambda row: {**row, "text": row["text"] + "."}), builder),
        *(
            content_key(*rows_and_builder(in_folder, **p))
            for p in ({"max_length": 256}, {"layout": "labels_first"})
        ),
    ]
    other_tokenizer = PromptBuilder(builder.task, ChatTemplate(make_tokenizer(pad="<|im_end|>")))
    others.append(content_key(rows, other_tokenizer))
    dated, _, _ = PECULIAR["a date (Llama 3.2)"]
    for day in ("1 Jan", "2 Jan"):
        prompt = PromptConfig(template_kwargs={"date_string": day})
        template = ChatTemplate(make_tokenizer(dated), prompt)
        # The day alone, as the next day's run has it: the task says nothing of it.
        others.append(content_key(rows, PromptBuilder(builder.task, template)))
    assert len({key, *others}) == 8


def test_a_cache_that_cannot_be_written_is_named(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "file").write_text("")
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "file"))
    with pytest.raises(OutputError, match="LABELTUNE_CACHE"):
        tokenize_rows(*rows_and_builder(in_folder))


# --- what labels_first is for ---


def test_a_shared_candidate_list_in_front_joins_the_prefix(in_folder: Path) -> None:
    prefixes = {}
    for layout in ("original", "labels_first"):
        rows, builder = rows_and_builder(in_folder, layout=layout)
        encoded = [builder.training(Example.from_row(row)) for row in rows]
        tokens = [Row.of(e.ids, *e.answer_span) for e in encoded]
        (pack,) = pack_step(tokens, 100_000)[0]
        prefixes[layout] = min(group.prefix for group in pack.groups)
        text = builder.template.tokenizer.decode(encoded[0].ids)
        assert (text.index("Sports") < text.index("number 0")) == (layout == "labels_first")
    assert prefixes["labels_first"] > prefixes["original"] + 5


# --- memory ---


def plan(
    model: Any, free: int, monkeypatch: pytest.MonkeyPatch, tokens: int | None = None, **given: Any
) -> Any:
    steps = [random_rows(prefixes=(40,), each=16)]
    monkeypatch.setattr(preflight, "free_memory", lambda device: free)
    each = activation_bytes(model, steps[0][:3], "shared_prefix", 0, None)
    checkpointing = given.get("checkpointing")
    return steps, budget_memory(
        steps,
        "shared_prefix",
        wanted_tokens=tokens,
        wanted_checkpointing=checkpointing,
        processes=1,
        bytes_per_token=each,
        vocabulary=300,
        device=CPU,
        agree=lambda v: v,
    )


def test_activations_are_measured_without_the_weights() -> None:
    model = lora_model()
    small = activation_bytes(model, random_rows(each=1), "packed", 0, None)
    large = activation_bytes(model, random_rows(each=8, text=40), "packed", 0, None)
    # Two layers of 32 with their adapters: some kilobytes a token, whatever the number of tokens.
    assert 2_000 < large < 20_000 and abs(small - large) < 0.5 * large


def test_much_memory_means_no_checkpointing_and_a_full_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, found = plan(lora_model(), 10**10, monkeypatch)
    assert not found.checkpointing
    assert len(pack_step(steps[0], found.max_tokens)[0]) == 1


def test_little_memory_means_smaller_packs_and_then_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model()
    logits = 3 * 4 * 128 * 300
    longest = max(len(row.ids) for row in random_rows(prefixes=(40,), each=16))
    _, found = plan(model, 0, monkeypatch)
    assert found.checkpointing and found.max_tokens == longest
    each = found.bytes_per_token
    _, some = plan(model, int((logits + 600 * each) / preflight.SHARE["cpu"]), monkeypatch)
    assert not some.checkpointing and longest < some.max_tokens <= 600
    _, less = plan(model, int((logits + 150 * each) / preflight.SHARE["cpu"]), monkeypatch)
    assert less.checkpointing, "a second forward pass costs less than packs of a few rows"
    _, told = plan(model, 0, monkeypatch, tokens=77, checkpointing=False)
    assert (told.max_tokens, told.checkpointing) == (77, False)


def test_packs_are_no_larger_than_sharing_asks_for() -> None:
    rows = random_rows(prefixes=(100,), each=64, text=4, answer=2)
    whole = sum(len(row.ids) for row in rows)
    found = useful_tokens([rows], "shared_prefix", 1, enough=50)
    cost = sum(pack.tokens(rows) for pack in pack_step(rows, found)[0])
    least = sum(pack.tokens(rows) for pack in pack_step(rows, whole)[0])
    assert found < whole / 2 and least <= cost <= 1.1 * least
    assert useful_tokens([rows], "packed", 1, enough=50) == 50


def test_the_rate_leaves_out_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits for what is done once, and a resumed run has one of its own."""
    now = 1000.0
    monkeypatch.setattr("labeltune.training.callbacks.time.monotonic", lambda: now)
    state, control, arguments = (
        TrainerState(global_step=4, max_steps=10),
        TrainerControl(),
        TrainingArguments("out"),
    )
    shown = Progress(batch_size=8)
    shown.on_train_begin(arguments, state, control)
    lines = []
    for seconds in (300, 4, 4):
        now += seconds
        state.global_step += 1
        shown.on_step_end(arguments, state, control)
        lines.append(shown.line(state))
    assert lines == [
        "step 5/10  epoch 0.00",
        "step 6/10  epoch 0.00  2.00 examples/s  16 s left",
        "step 7/10  epoch 0.00  2.00 examples/s  12 s left",
    ]
    assert capsys.readouterr().err.splitlines()[0] == "resuming at step 4 of 10"


def test_what_a_model_s_own_code_cannot_do_is_one_message() -> None:
    for wanted, more in (("bf16", "; training.precision=fp32 may do"), ("fp32", "")):
        precision = pick_precision(wanted)
        with pytest.raises(ModelError) as raised, preflight.cannot_compute(precision):
            raise RuntimeError("expected scalar type Float\nsomewhere")
        assert str(raised.value) == (
            f"the model's own code does not run in {wanted} on {precision.device}: RuntimeError: expected scalar type Float{more}"
        )
    with pytest.raises(torch.OutOfMemoryError), preflight.cannot_compute(pick_precision("fp32")):
        raise torch.OutOfMemoryError
