"""The parts of benchmarks/gpu/check.py that are not commands of their own; each writes what it found after every figure."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(REPOSITORY / "tests")]

LABELS = ["地点", "人名", "地理实体", "组织"]
VERSIONS = ("torch", "triton", "transformers", "peft", "accelerate", "llguidance", "datasets", "tokenizers")


@dataclass
class Part:
    """What was asked for, and what was found so far."""

    given: argparse.Namespace
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.given.device == "cuda" else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def left(self) -> float:
        """Seconds."""
        return float(self.given.seconds - (time.monotonic() - self.began))

    def add(self, name: str, value: Any) -> None:
        """Note a figure."""
        self.found[name] = value
        Path(self.given.json).write_text(
            json.dumps(self.found, ensure_ascii=False, default=str), encoding="utf-8"
        )
        print(f"[{time.monotonic() - self.began:5.1f} s] {name}: {value}", flush=True)

    @contextlib.contextmanager
    def going_on(self, what: str, needs: float = 5.0) -> Iterator[None]:
        """What fails inside is noted. Nothing is measured when fewer seconds are left than it needs."""
        if self.left() < needs:
            self.add(f"left out: {what}", f"{self.left():.0f} s left")
            return
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever a new machine does
            traceback.print_exc()
            self.add(f"FAILED {what}", f"{type(error).__name__}: {error}"[:500])
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 10, warm: int = 2) -> float:
        """Median of a piece of work."""
        for _ in range(warm):
            work()
        found = []
        for _ in range(repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def shape(self, layers: int | None = None) -> dict[str, Any]:
        """Options of speed_worker.build_model."""
        tiny = self.given.shape == "tiny"
        return {
            "family": "qwen2",
            "shape": "small" if tiny else self.given.shape,
            "layers": 2 if tiny else layers,
            "device": "cuda" if self.on_gpu else "cpu",
            "dropout": 0.1,
        }

    def rows_file(self, name: str) -> str:
        """A file of rows: ner, documents or titles."""
        if self.given.data is not None:
            return str(self.given.data / f"{name}.jsonl")
        own = {
            "ner": "zh_ner_train",
            "documents": "zh_classification_train",
            "titles": "en_classification_train",
        }
        return str(REPOSITORY / "examples" / "data" / f"{own[name]}.jsonl")

    def tokenized(self, name: str, count: int) -> list[dict[str, Any]]:
        """Rows as training reads them."""
        from speed_data import read_tokenizer, run_config, tokenized_rows

        config = run_config(
            self.rows_file(name),
            "original",
            384,
            ",".join(LABELS) if name == "ner" and self.given.data else None,
        )
        return tokenized_rows(config, read_tokenizer(self.given.tokenizer), count)[0]


def environment(part: Part) -> None:
    """Card and versions."""
    part.add("python", platform.python_version())
    part.add("versions", {name: _version(name) for name in VERSIONS})
    if part.on_gpu:
        card = torch.cuda.get_device_properties(0)
        part.add(
            "card",
            {
                "name": card.name,
                "GB": round(card.total_memory / 1e9, 1),
                "capability": torch.cuda.get_device_capability(),
            },
        )
        part.add("libraries", {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def matmul_rate(part: Part) -> float:
    """Operations a second of a large product."""
    size = 8192 if part.on_gpu else 256
    left, right = (torch.randn(size, size, device=part.device, dtype=part.dtype) for _ in range(2))
    return 2 * size**3 / part.seconds(lambda: left @ right, 10)


def rates(part: Part) -> None:
    """What everything else is compared with."""
    with part.going_on("products"):
        part.add("TFLOP/s of a large product", matmul_rate(part) / 1e12)
        for tokens in (1640, 4096, 8192) if part.on_gpu else (64,):
            inner, outer = (1536, 8960) if part.on_gpu else (64, 128)
            x = torch.randn(tokens, inner, device=part.device, dtype=part.dtype)
            weight = torch.randn(outer, inner, device=part.device, dtype=part.dtype)
            took = part.seconds(lambda x=x, weight=weight: x @ weight.t())
            part.add(
                f"TFLOP/s of {tokens} tokens through one matrix", 2 * tokens * inner * outer / took / 1e12
            )
    with part.going_on("launches"):
        x = torch.zeros(8, device=part.device)

        def many() -> None:
            for _ in range(1000):
                x.add_(1)

        part.add("us to launch an operation", part.seconds(many, 5) * 1e3)
        part.add("us to read a value", part.seconds(lambda: float(x[0]), 50) * 1e6)
    with part.going_on("products in fp32 of bf16"):
        left, right = (torch.randn(64, 256, device=part.device, dtype=part.dtype) for _ in range(2))
        from labeltune.models.precision import fp32_product

        exact = left.double() @ right.double().t()
        part.add("largest error of fp32_product", float((fp32_product(left, right) - exact).abs().max()))


def correct(part: Part) -> None:
    """Does the device compute what the CPU's tests promise?"""
    from helpers.packing import assert_equal, lora_model, packed, plain, random_rows
    from helpers.tiny_models import MODEL_KINDS, make_model, make_tokenizer
    from labeltune.training import collate
    from labeltune.training.packing import pack_step

    with part.going_on("packings"):
        to_device, make = collate.PackBatch.to, collate.make_batch
        rows = random_rows(seed=2)
        for kind in MODEL_KINDS:
            right = plain(lora_model(kind), rows)
            model = lora_model(kind).to(part.device)
            worst = 0.0
            for packing in ("shared_prefix", "padded"):
                packs = pack_step(rows, 10_000, packing)[0]
                with _patched(
                    "helpers.packing.make_batch", lambda *g, **n: to_device(make(*g, **n), part.device)
                ):
                    loss, gradients = packed(model, rows, packs, packing, None)
                found = loss, {name: gradient.cpu() for name, gradient in gradients.items()}
                worst = max(worst, abs(found[0] - right[0]) / right[0], _apart(found[1], right[1]))
                assert_equal(found, right, rtol=1e-4)
            part.add(f"fp32 gradients of {kind} against single rows on the CPU", worst)
    with part.going_on("label scores"):
        from labeltune.inference.engine import Engine
        from labeltune.inference.scoring import LabelTrie, Question, score_one_by_one

        chance = random.Random(3)

        def tokens(low: int, high: int) -> list[int]:
            return [chance.randrange(3, 300) for _ in range(chance.randint(low, high))]

        head, trie = tokens(60, 60), LabelTrie.of(sorted({(*tokens(1, 3), 2) for _ in range(12)}))
        asked = [Question(head + tokens(5, 60), trie) for _ in range(24)]
        for kind in MODEL_KINDS:
            model = make_model(300, kind, seed=3).eval()
            right_scores = [score_one_by_one(model, question) for question in asked]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found_scores = Engine(model.to(part.device)).score(asked)
            pairs = zip(itertools.chain(*found_scores), itertools.chain(*right_scores), strict=True)
            part.add(f"fp32 label scores of {kind} against the CPU", max(abs(a - b) for a, b in pairs))
            part.add(f"{kind} scores in segments", not caught)
    with part.going_on("extraction"):
        from labeltune.inference.extraction import Grammars, extract
        from labeltune.inference.runners import PlainRunner, SegmentRunner
        from labeltune.inference.scoring import segment_prefix

        tokenizer = make_tokenizer()
        grammars = Grammars(tokenizer, LABELS, "none", len(tokenizer))
        end = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        texts = [
            "他在南京大学。",
            "a",
            "今天下雨 " * 8,
            "x y z",
            "The rocket landed on the platform",
            "北京 上海",
        ]
        prompts = [(tokenizer(f"find {text} :").input_ids, (text,)) for text in texts]
        for kind in MODEL_KINDS:
            model = make_model(len(tokenizer), kind, seed=5).eval()
            limits = {"max_new_tokens": 60, "batch_size": 4}
            right_answers = extract(PlainRunner(model), grammars, end, prompts, **limits)
            model.to(part.device)
            found_answers = extract(
                SegmentRunner(model, segment_prefix(), 500), grammars, end, prompts, **limits
            )
            part.add(
                f"extraction of {kind} as on the CPU",
                [f.answer for f in found_answers] == [r.answer for r in right_answers],
            )
    for task in ("classification", "ner"):
        for precision in ("auto", "fp16") if part.on_gpu else ("auto",):
            with part.going_on(f"{task} in {precision}", needs=15):
                _train_and_ask_again(part, task, precision)


def _apart(found: dict[str, Any], right: dict[str, Any]) -> float:
    return max(float((found[name] - right[name]).norm() / right[name].norm()) for name in right)


@contextlib.contextmanager
def _patched(name: str, value: Any) -> Iterator[None]:
    module, _, attribute = name.rpartition(".")
    before = getattr(sys.modules[module], attribute)
    setattr(sys.modules[module], attribute, value)
    try:
        yield
    finally:
        setattr(sys.modules[module], attribute, before)


def _train_and_ask_again(part: Part, task: str, precision: str) -> None:
    """A run's own validation must be what a fresh predictor says, and a resumed run the same to the last bit."""
    import shutil

    import labeltune
    from helpers.rows import classification_rows, ner_rows, write_jsonl
    from helpers.tiny_models import make_model, make_tokenizer
    from helpers.training import adapter_weights
    from labeltune.config import build_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_tokenizer()
        make_model(len(made)).save_pretrained(folder / "model")
        made.save_pretrained(folder / "model")
        rows = classification_rows(48) if task == "classification" else ner_rows(48)
        config = build_config(
            {
                "task": task,
                "model": str(folder / "model"),
                "output_dir": str(folder / "out"),
                "tracking": "none",
                "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "validation_fraction": 0.25},
                "generation": {"max_new_tokens": 40},
                "training": {
                    "epochs": 1,
                    "batch_size": 8,
                    "save_steps": 2,
                    "precision": precision,
                    "save_total_limit": 9,
                },
            }
        )
        whole = labeltune.train(config)
        written = [
            json.loads(line)
            for line in (folder / "out/validation/predictions.jsonl").read_text("utf-8").splitlines()
        ]
        with labeltune.load_predictor(
            whole.best, precision="auto" if precision == "auto" else precision
        ) as predictor:
            texts = {row["text"]: row for row in rows}
            again = predictor.predict([line.get("text") or _text_of(line, texts) for line in written])
        part.add(
            f"{task}, {precision}: validation of the run is a fresh predictor's",
            [p.answer for p in again] == [line["answer"] for line in written],
        )
        expected = adapter_weights(whole.last)
        first, *later = sorted(
            (folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
        )
        for path in later:
            shutil.rmtree(path)
        (folder / "out" / "best").unlink()
        (folder / "out" / "finished.json").unlink(missing_ok=True)
        resumed = adapter_weights(labeltune.train(config, resume=True).last)
        part.add(
            f"{task}, {precision}: resumed from {first.name} to the last bit",
            all(torch.equal(resumed[n], expected[n]) for n in expected),
        )


def _text_of(line: dict[str, Any], texts: dict[str, Any]) -> str:
    return list(texts)[int(line["id"])]


def train(part: Part) -> None:
    """Steps of 32 rows: time, rate, share of the matmul rate, kernels, and how long the device is busy."""
    from speed_worker import build_model

    rate = matmul_rate(part)
    part.add("TFLOP/s of a large product", rate / 1e12)
    for name, size in (("ner", 32), ("ner", 64), ("documents", 32)) if part.on_gpu else (("ner", 4),):
        with part.going_on(f"{name}, {size} rows a step", needs=20):
            # A new one each time: accelerate leaves its autocast around a model.
            _steps(part, build_model(part.shape()), name, size, rate)


def _steps(part: Part, model: Any, name: str, size: int, rate: float) -> None:
    import datasets
    from speed_data import read_tokenizer
    from torch.utils.flop_counter import FlopCounterMode

    from labeltune.config import build_config
    from labeltune.models.precision import Precision
    from labeltune.training.packing import to_rows
    from labeltune.training.preflight import prepare_steps, training_arguments
    from labeltune.training.trainer import LabelTrainer

    steps = 8 if part.on_gpu else 2
    rows = part.tokenized(name, min(size * steps, 240))
    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": 1, "batch_size": size, "compile": part.given.compiled}
        config = build_config({"output_dir": folder, "tracking": "none", "training": options})
        precision = Precision("bf16", torch.bfloat16, part.device.type)
        arguments = training_arguments(config, precision, False)
        arguments.save_strategy = "no"
        data = datasets.Dataset.from_list(rows)
        settings = prepare_steps(
            model,
            read_tokenizer(part.given.tokenizer),
            config,
            precision,
            data,
            device=arguments.device,
            say=print,
        )
        trainer = LabelTrainer(
            say=print, where=str, settings=settings, model=model, args=arguments, train_dataset=data
        )
        batches = [
            to_rows([data[i] for i in range(at, at + size)]) for at in range(0, len(data) - size + 1, size)
        ]
        trainer.create_optimizer_and_scheduler(len(batches))
        wrapped = trainer.accelerator.prepare(model)

        def step(rows: Any) -> None:
            trainer.training_step(wrapped, rows)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)

        for batch in batches[:2]:
            step(batch)
        if part.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        for batch in batches[2:] or batches:
            part.wait()
            started = time.perf_counter()
            step(batch)
            part.wait()
            times.append(time.perf_counter() - started)
        last = batches[-1]
        with FlopCounterMode(display=False) as counter:
            step(last)
        operations = counter.get_total_flops()
        took = statistics.median(times)
        figures: dict[str, Any] = {
            "ms a step": took * 1e3,
            "rows/s": len(last) / took,
            "share of the matmul rate": operations / took / rate,
        }
        if part.on_gpu:
            figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        part.add(f"{name}, {size} rows a step, packing={settings.packing}", figures)
        if part.on_gpu:
            part.add(f"{name}, {size} rows a step, kernels", _kernels(lambda: step(last)))


def _kernels(work: Callable[[], Any]) -> dict[str, Any]:
    """How many a piece of work starts, how long the device is busy with them, and the longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took = time.perf_counter() - started
    events = [e for e in recorder.key_averages() if e.self_device_time_total]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e3
    longest = {e.key[:60]: f"{e.self_device_time_total / 1e3:.2f} ms x{e.count}" for e in events[:6]}
    return {"kernels": sum(e.count for e in events), "busy ms": busy, "of ms": took * 1e3, **longest}


def predict(part: Part) -> None:
    """Rows a second of label scoring and extraction, and how often Python waits for the device."""
    from speed_worker import build_model

    with part.going_on("the model"):
        model = build_model(part.shape()).eval()
    for name, count in (
        (("titles", 512), ("documents", 128), ("ner", 256)) if part.on_gpu else (("titles", 4), ("ner", 2))
    ):
        with part.going_on(name, needs=15):
            _answers(part, model, name, count)


def _answers(part: Part, model: Any, name: str, count: int) -> None:
    from speed_data import read_tokenizer

    from labeltune.config import build_config
    from labeltune.inference.predictor import Predictor
    from labeltune.prompts import make_task
    from labeltune.prompts.template import ChatTemplate

    rows = [json.loads(line) for line in Path(part.rows_file(name)).read_text("utf-8").splitlines()][:count]
    texts = [row["text"] for row in rows]
    if name == "ner":
        labels = (
            LABELS
            if part.given.data
            else sorted({e["entity_label"] for row in rows for e in row["entities"]})
        )
    else:
        labels = sorted({row["output"] for row in rows})[:10]
    task = "ner" if name == "ner" else "classification"
    config = build_config({"task": task, "generation": {"max_new_tokens": 48}, "tracking": "none"})
    template = ChatTemplate(read_tokenizer(part.given.tokenizer))
    predictor = Predictor(model, make_task(task, labels, config.prompt), template, config.generation)
    predictor.predict(texts[:8])
    took = part.seconds(lambda: predictor.predict(texts), 2, 1)
    part.add(f"{name}, {len(labels)} labels", {"rows/s": len(texts) / took})
    if part.on_gpu:
        part.add(f"{name}, waits of 64 rows", _waits(lambda: predictor.predict(texts[:64])))
        part.add(f"{name}, kernels of 64 rows", _kernels(lambda: predictor.predict(texts[:64])))


def _waits(work: Callable[[], Any]) -> int:
    """Warnings of PyTorch's own watch for synchronisations."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def ceiling(part: Part) -> None:
    """The least that a step of a layer stack could take: its large products alone, one after the other."""
    inner, outer, layers = (1536, 8960, 28) if part.on_gpu else (64, 128, 2)
    sizes = [
        (inner, inner),
        (inner, 256),
        (inner, 256),
        (inner, inner),
        (inner, outer),
        (inner, outer),
        (outer, inner),
    ]
    weights = [torch.randn(n, k, device=part.device, dtype=part.dtype) for k, n in sizes]
    for tokens in (1640, 8192) if part.on_gpu else (64,):
        with part.going_on(f"{tokens} tokens"):
            inputs = {k: torch.randn(tokens, k, device=part.device, dtype=part.dtype) for k in (inner, outer)}

            def forward(inputs: Any = inputs) -> None:
                for weight in weights:
                    inputs[weight.shape[1]] @ weight.t()

            # Forward, and the gradient of the inputs: frozen weights have none.
            took = part.seconds(forward) * 2 * layers
            part.add(f"products alone, {tokens} tokens", {"ms a step": took * 1e3})


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="1.5B")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--json", required=True)
    given = parser.parse_args()
    given.compiled = given.part == "compile"
    parts = {
        "environment": environment,
        "rates": rates,
        "correct": correct,
        "train": train,
        "compile": train,
        "predict": predict,
        "ceiling": ceiling,
    }
    parts[given.part](Part(given))


if __name__ == "__main__":
    main()
