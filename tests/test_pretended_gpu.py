"""What runs only on a GPU, on a pretended one: nothing stays behind on the CPU, results are the CPU's, and Python waits as seldom as it says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

import labeltune
from helpers.packing import lora_model, random_rows
from helpers.pretended import DEVICE, Device, pretended_gpu
from helpers.rows import classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import make_model, make_tokenizer
from helpers.training import logged
from labeltune.config import build_config
from labeltune.inference import marked
from labeltune.inference.engine import Engine
from labeltune.inference.extraction import Grammars, extract
from labeltune.inference.runners import PlainRunner, SegmentRunner
from labeltune.inference.scoring import (
    LabelTrie,
    Question,
    own_prefix,
    score_answers,
    score_by_cache,
    segment_prefix,
)
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.template import ChatTemplate
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import answer_loss
from labeltune.training.packing import pack_step

VOCABULARY = 300


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with pretended_gpu(monkeypatch) as device:
        yield device


def waits(device: Device, action: Any) -> list[str]:
    """Where Python waited for the device."""
    device.waits.clear()
    action()
    return device.waits


def config_of(folder: Path, model: Path, task: str, **training: Any) -> Any:
    rows = classification_rows(24) if task == "classification" else ner_rows(24)
    return build_config(
        {
            "task": task,
            "model": str(model),
            "output_dir": str(folder / "out"),
            "data": {"train": str(write_jsonl(folder / f"{task}.jsonl", rows)), "validation_fraction": 0.25},
            "lora": {"dropout": 0.0},
            "training": {"max_steps": 4, "batch_size": 6, "logging_steps": 1, "save_steps": 2, **training},
            "generation": {"max_new_tokens": 24},
            "tracking": "none",
        }
    )


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_training_and_prediction_from_end_to_end(
    task: str, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(in_folder, model_folder, task, precision="fp32")
    right = labeltune.train(config)
    curve = [line["loss"] for line in logged(right.last, "loss")]
    texts = [row["text"] for row in classification_rows(5)]
    answers = labeltune.load_predictor(right.best).predict(texts)
    with pretended_gpu(monkeypatch) as device:
        found = labeltune.train(config, overwrite=True)
        assert [line["loss"] for line in logged(found.last, "loss")] == pytest.approx(curve, rel=1e-4)
        assert found.validation_loss == pytest.approx(right.validation_loss, rel=1e-4)
        predictor = labeltune.load_predictor(found.best, precision="fp32")
        assert next(predictor.model.parameters()).device == DEVICE
        assert [p.answer for p in predictor.predict(texts)] == [p.answer for p in answers]
        assert device.operations["mm"] + device.operations["addmm"] > 100


def test_a_run_in_bf16(in_folder: Path, model_folder: Path, gpu: Device) -> None:
    """The format that `auto` takes there; validation computes what `evaluate` will."""
    result = labeltune.train(config_of(in_folder, model_folder, "classification"))
    assert result.metric is not None
    predictor = labeltune.load_predictor(result.best)
    assert predictor.model.get_base_model().dtype == torch.bfloat16
    assert predictor.predict(["match number 1 match"])[0].label in ("Sports", "Space", "Art")


def test_a_training_step_waits_once(
    in_folder: Path, model_folder: Path, gpu: Device, monkeypatch: Any
) -> None:
    from labeltune.training.trainer import LabelTrainer

    counted: list[list[str]] = []
    step = LabelTrainer.training_step

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        found: list[Any] = []
        counted.append(list(waits(gpu, lambda: found.append(step(self, *given, **named)))))
        return found[0]

    monkeypatch.setattr(LabelTrainer, "training_step", watched)
    config = config_of(in_folder, model_folder, "ner", precision="fp32", logging_steps=100, save_steps=1000)
    labeltune.train(config)
    assert [len(each) for each in counted] == [1, 1, 1, 1], counted
    assert all("training/trainer.py" in each[0] for each in counted)


def test_operations_of_a_layer_and_pack(gpu: Device) -> None:
    """Forward and backward without dropout in fp32, the difference of two and three layers."""
    rows = random_rows(seed=1, prefixes=(20,))
    packs = pack_step(rows, 10_000)[0]
    counts = []
    for layers in (2, 3):
        model = lora_model("qwen2", layers=layers).to(DEVICE)
        with attention_for(model, "shared_prefix"):
            batch = make_batch(rows, packs[0], "shared_prefix", pad_id=0).to(DEVICE)
            gpu.operations.clear()
            answer_loss(model, None, batch).backward()
        counts.append(sum(gpu.operations.values()))
    assert len(packs) == 1 and counts[1] - counts[0] <= 202, counts


def test_adapters_take_inputs_as_they_come_in_a_step(gpu: Device) -> None:
    def casts(model: Any) -> set[bool]:
        with attention_for(model, "shared_prefix"):
            return {m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, LoraLayer)}

    model = lora_model("qwen2")
    assert casts(model) == {True}, "the CPU's dropout rounds what it scales"
    assert casts(model.to(DEVICE)) == {False}
    assert {m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, LoraLayer)} == {True}


def questions(count: int) -> list[Question]:
    generator = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(low, high))]

    head = tokens(40, 40)
    trie = LabelTrie.of(sorted({(*tokens(1, 4), 2) for _ in range(6)}))
    # One row is too long to pad the others to.
    return [Question(head + (tokens(1, 30) if number else tokens(900, 900)), trie) for number in range(count)]


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_a_pass_of_label_scoring_waits_once_and_equals_the_cpu_s(kind: str, gpu: Device) -> None:
    model, asked = make_model(VOCABULARY, kind, seed=3).eval(), questions(12)
    right = score_answers(model, asked, 10_000, segment_prefix())
    model.to(DEVICE)
    cache = segment_prefix()
    score_answers(model, asked[:2], 10_000, cache)
    found: list[Any] = []
    seen = waits(gpu, lambda: found.append(score_answers(model, asked, 10_000, cache)))
    assert len(seen) == 1, seen
    for f, r in zip(found[0], right, strict=True):
        assert f == pytest.approx(r, rel=1e-4, abs=1e-4)


def test_the_engine_takes_the_fast_ways_there(gpu: Device) -> None:
    asked = questions(6)
    model = make_model(VOCABULARY, seed=3).eval()
    right = Engine(model).score(asked)
    found = Engine(model.to(DEVICE)).score(asked)
    for f, r in zip(found, right, strict=True):
        assert f == pytest.approx(r, rel=1e-4, abs=1e-4)


def test_a_step_of_decoding_waits_once_and_equals_the_cpu_s(gpu: Device) -> None:
    tokenizer = make_tokenizer()
    grammars = Grammars(tokenizer, ["地点", "组织"], "none", len(tokenizer))
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    documents = ["他在南京大学。", "a", "x y z" * 9, "今天下雨", "bc d", "南京 北京 上海"]
    prompts = [(tokenizer(f"find {text} :").input_ids, (text,)) for text in documents]
    model = make_model(len(tokenizer), seed=5).eval()

    def answers(runner: Any, **limits: int) -> Any:
        return extract(runner, grammars, end, prompts, **{"max_new_tokens": 40, **limits})

    right = answers(SegmentRunner(model, segment_prefix(), 500), batch_size=2)
    # What a grammar forces goes beyond the limit.
    short = [answers(PlainRunner(model), batch_size=1, max_new_tokens=most) for most in (1, 9)]
    model.to(DEVICE)
    for most, expected in zip((1, 9), short, strict=True):
        found = answers(SegmentRunner(model, segment_prefix(), 500), batch_size=4, max_new_tokens=most)
        assert [f.answer for f in found] == [r.answer for r in expected]
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for size in (1, 2, 6):
        gpu.waits.clear()
        passes.clear()
        found = answers(SegmentRunner(model, segment_prefix(), 500), batch_size=size)
        assert [f.answer for f in found] == [r.answer for r in right]
        for f, r in zip(found, right, strict=True):
            assert f.scores == pytest.approx(r.scores, rel=1e-4, abs=1e-4)
        assert len(gpu.waits) <= len(passes), "one for each step, however many passes it takes"
        assert {each.rpartition(":")[0] for each in gpu.waits} == {"tolist in inference/extraction.py"}


def test_marks_are_decoded_in_slots_and_wait_once_a_pass(gpu: Device) -> None:
    """What is read ahead and dropped leaves the slots as they were."""
    template = ChatTemplate(make_tokenizer())
    tokens = MarkTokens(template, ["地点", "组织"], "none")
    documents = ["他在南京大学。", "a", "x y z" * 9, "今天下雨", "bc d", "南京 北京 上海"]
    asked = [
        marked.Question(template.plain_ids(f"mark {text} :"), Shown(text, ((0, 0, len(text)),)))
        for text in documents
    ]
    model = make_model(len(template.tokenizer), seed=5).eval()
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(len(template.tokenizer)))
    model.get_output_embeddings().bias.data[tokens.none[0]] = -9

    def answers(runner: Any, **limits: int) -> Any:
        options = {"max_new_tokens": 60, "batch_size": 4, **limits}
        end = template.end_of_turn_ids[0]
        return marked.extract_marked(runner, tokens, asked, nested=True, end=end, **options)

    right = answers(PlainRunner(model), batch_size=1)
    assert sum(len(each.entities) for each in right) > 4
    model.to(DEVICE)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for size in (1, 2, 6):
        gpu.waits.clear()
        passes.clear()
        found = answers(SegmentRunner(model, segment_prefix(), 500), batch_size=size)
        for f, r in zip(found, right, strict=True):
            assert (f.entities, f.none, f.truncated) == (r.entities, r.none, r.truncated)
        assert len(gpu.waits) <= len(passes)
        assert {each.rpartition(":")[0] for each in gpu.waits} == {"tolist in inference/runners.py"}


def test_a_shared_cache_scores_there_too(gpu: Device) -> None:
    asked = questions(5)
    model = make_model(VOCABULARY, "lfm2", seed=3).eval()
    right = score_by_cache(model, asked, 10_000, own_prefix())
    found = score_by_cache(model.to(DEVICE), asked, 10_000, own_prefix())
    for f, r in zip(found, right, strict=True):
        assert f == pytest.approx(r, rel=1e-4, abs=1e-4)
