"""One variant of benchmarks/train_speed.py, in a process of its own: trains a few steps and prints what it measured as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Lfm2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "heads": 14, "layers": 24},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "heads": 12, "layers": 28},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "heads": 8, "layers": 8},
}
#: Layers with an adapter: all linear ones but the output layer, router and the like.
MODULES: dict[str, Any] = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3_5": "all-linear",
    "lfm2": "all-linear",
}
VOCABULARY = 151936

#: Settings of TRL's SFTTrainer that are tried. Its output layer always runs in chunks, on answer positions.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "trl_padded_4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "trl_padded_16x1": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "trl_padded_4x4_checkpointing": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
    },
    "trl_padding_free_4x4": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "padding_free": True,
    },
    "trl_padding_free_16x1": {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "padding_free": True,
    },
    "trl_packing_bfd_short": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "packing": True,
        "packing_strategy": "bfd",
        "examples_in_a_pack": 4,
    },
    "trl_packing_bfd_long": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "packing": True,
        "packing_strategy": "bfd",
        "examples_in_a_pack": 16,
    },
}


class Meter(TrainerCallback):  # type: ignore[misc]
    """Steps after the first one: seconds, examples, tokens that went into the embedding; matmul operations of the first."""

    def __init__(self, model: Any, device: str) -> None:
        self.device, self.seconds, self.examples, self.tokens = device, [], 0, 0
        self.flops = self.first_tokens = 0
        self.mark = 0.0
        self.step = 0
        self.counter: Any = None
        model.get_input_embeddings().register_forward_pre_hook(self._count_tokens)

    def _count_tokens(self, module: Any, inputs: Any) -> None:
        if self.step == 0:
            self.first_tokens += inputs[0].numel()
        else:
            self.tokens += inputs[0].numel()

    def count_examples(self, batch: Any) -> None:
        """Called with what goes into `training_step`."""
        if self.step == 0:
            return
        if isinstance(batch, list):
            self.examples += len(batch)
        elif "position_ids" in batch:
            self.examples += int((batch["position_ids"] == 0).sum())
        else:
            self.examples += len(batch["input_ids"])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first step warms up, and its operations are counted."""
        if self.step == 0:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Takes the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.step == 0:
            self.counter.__exit__(None, None, None)
            self.flops = self.counter.get_total_flops()
            now = time.perf_counter()
        else:
            self.seconds.append(now - self.mark)
        self.mark = now
        self.step += 1


class PeakMemory:
    """The most memory above what was taken at the start: resident memory, polled; on CUDA, the allocator's own count."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self.device, self.process = device, psutil.Process()
        self.done = threading.Event()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = self.peak = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._poll, daemon=True)
            self.thread.start()

    def _poll(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def stop(self) -> float:
        """MB above the start."""
        self.done.set()
        if self.device == "cuda":
            return (torch.cuda.max_memory_allocated() - self.start) / 1e6
        self.thread.join()
        return (self.peak - self.start) / 1e6


def model_config(options: dict[str, Any]) -> PreTrainedConfig:
    """A family's config in a shape; hybrid layers stand as they do in the published models."""
    shape = SHAPES[options["shape"]]
    layers = options["layers"] or shape["layers"]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    }
    if options["family"] == "qwen2":
        return Qwen2Config(**common)
    if options["family"] == "lfm2":
        kinds = ["full_attention" if at % 3 == 2 else "conv" for at in range(layers)]
        return Lfm2Config(**common, layer_types=kinds, block_auto_adjust_ff_dim=False)
    size = shape["hidden_size"] // shape["heads"]
    heads = {"linear_num_key_heads": shape["heads"], "linear_num_value_heads": shape["heads"]}
    sizes = {"head_dim": size, "linear_key_head_dim": size, "linear_value_head_dim": size}
    kinds = ["full_attention" if at % 4 == 3 else "linear_attention" for at in range(layers)]
    return Qwen3_5TextConfig(**common, **heads, **sizes, layer_types=kinds)


def build_model(options: dict[str, Any]) -> Any:
    """Random weights in the shape of a published model, with the original recipe's adapter."""
    import peft

    config = model_config(options)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options["device"] == "cuda" else torch.float32
    with torch.device(options["device"]):
        torch.set_default_dtype(dtype)
        model = AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=32,
        lora_dropout=options["dropout"],
        target_modules=MODULES[options["family"]],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def common_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """What every Trainer is given."""
    return {
        "output_dir": options["folder"],
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": options["device"] == "cpu",
        "bf16": options["device"] == "cuda",
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }


def with_labels(rows: list[dict[str, Any]]) -> Any:
    """A data set of ids and labels, the latter by position."""
    import datasets

    return datasets.Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "labels": [-100] * row["answer_start"] + row["input_ids"][row["answer_start"] :],
            }
            for row in rows
        ]
    )


def original(model: Any, tokenizer: Any, options: dict[str, Any], meter: Meter) -> Any:
    """The original loop: batch 4 x accumulation 4, padded, checkpointed, logits everywhere."""
    checkpointing = options["variant"] == "original"
    if checkpointing:
        model.enable_input_require_grads()
    arguments = TrainingArguments(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        gradient_checkpointing=checkpointing,
        **common_arguments(options),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=with_labels(options["rows"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
        callbacks=[meter],
    )


def trl(model: Any, tokenizer: Any, options: dict[str, Any], meter: Meter) -> Any:
    """TRL's SFTTrainer in one of `TRL_SETTINGS`."""
    from trl import SFTConfig, SFTTrainer

    setting = dict(TRL_SETTINGS[options["variant"]])
    examples = setting.pop("examples_in_a_pack", None)
    longest = max(len(row["input_ids"]) for row in options["rows"])
    mean = sum(len(row["input_ids"]) for row in options["rows"]) / len(options["rows"])
    # Nothing is longer than the budget already; padding-free refuses a limit.
    setting["max_length"] = max(longest, round(mean * examples)) if examples else None
    setting.setdefault("gradient_checkpointing", False)
    arguments = SFTConfig(**setting, **common_arguments(options))
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=with_labels(options["rows"]),
        processing_class=tokenizer,
        callbacks=[meter],
    )


def ours(model: Any, tokenizer: Any, options: dict[str, Any], meter: Meter) -> Any:
    """labeltune's own trainer, prepared as `labeltune train` prepares it; rows in file order like the others."""
    import datasets

    from labeltune.config import build_config
    from labeltune.models.precision import pick_precision
    from labeltune.training.packing import to_rows
    from labeltune.training.preflight import prepare_steps, training_arguments
    from labeltune.training.trainer import LabelTrainer

    training = {"packing": options["variant"], "epochs": 1, "compile": options["compile"]}
    config = build_config({"output_dir": options["folder"], "tracking": "none", "training": training})
    precision = pick_precision("bf16" if options["device"] == "cuda" else "fp32")
    arguments = training_arguments(config, precision, False)
    arguments.save_strategy = "no"
    rows = datasets.Dataset.from_list(options["rows"])

    class InFileOrder(LabelTrainer):
        def get_train_dataloader(self) -> Any:
            size = config.training.batch_size
            steps: Any = [list(range(at, min(at + size, len(rows)))) for at in range(0, len(rows), size)]
            return DataLoader(rows, batch_sampler=steps, collate_fn=to_rows)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    plan = prepare_steps(model, tokenizer, config, precision, rows, device=arguments.device, say=say)
    options["notes"] = {"packing": plan.packing, "max_tokens_per_pack": plan.max_tokens}
    meter.first_tokens = meter.tokens = 0
    # Nothing is saved, so no run has to be described.
    given = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": [meter]}
    return InFileOrder(say=say, where=str, settings=plan, **given)


def matmul_rate(options: dict[str, Any]) -> dict[str, Any]:
    """Operations a second of a large matrix product in the shape of this model's widest layer."""
    shape = SHAPES[options["shape"]]
    on_cuda = options["device"] == "cuda"
    kind = {"device": options["device"], "dtype": torch.bfloat16 if on_cuda else torch.float32}
    x = torch.randn(8192 if on_cuda else 1024, shape["hidden_size"], **kind)
    w = torch.randn(shape["intermediate_size"], shape["hidden_size"], **kind)
    out = torch.empty(x.shape[0], w.shape[0], **kind)
    times = []
    for _ in range(60):
        start = time.perf_counter()
        torch.mm(x, w.t(), out=out)
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"matmul_rate": 2 * x.shape[0] * x.shape[1] * w.shape[0] / sorted(times)[len(times) // 2]}


def profile(trainer: Any, meter: Meter) -> dict[str, float]:
    """Trains, and gives each operation's share of the time spent in operations behind the first step; 1 % and more."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    plain_step = trainer.training_step
    on_cuda = meter.device == "cuda"
    recorder = record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])])

    def step(*given: Any, **named: Any) -> Any:
        if meter.step == 1 and recorder.profiler is None:
            recorder.__enter__()
        return plain_step(*given, **named)

    trainer.training_step = step
    trainer.train()
    recorder.__exit__(None, None, None)
    column = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, column) for event in recorder.key_averages()}
    whole = sum(times.values())
    shares = {name: round(time / whole, 3) for name, time in times.items() if time >= 0.01 * whole}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def main() -> None:
    """Reads the options from a file, prints the result as the last line."""
    options = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(options["threads"])
    if options["variant"] == "matmul":
        print(json.dumps(matmul_rate(options)))
        return
    from speed_data import read_tokenizer

    tokenizer = read_tokenizer(options["tokenizer"])
    options["rows"] = json.loads(Path(options["rows_file"]).read_text(encoding="utf-8"))
    model = build_model(options)
    memory = PeakMemory(options["device"])
    meter = Meter(model, options["device"])
    build = (
        original
        if options["variant"].startswith("original")
        else trl
        if "trl" in options["variant"]
        else ours
    )
    trainer = build(model, tokenizer, options, meter)
    plain_step = trainer.training_step

    def step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        meter.count_examples(inputs)
        return plain_step(model, inputs, *rest, **named)

    trainer.training_step = step
    if options["profile"]:
        options["notes"] = {"profile": profile(trainer, meter)}
    else:
        trainer.train()
    print(
        json.dumps(
            {
                "examples_per_second": meter.examples / sum(meter.seconds),
                "tokens_per_example": meter.tokens / meter.examples,
                "flops_per_example": meter.flops * meter.tokens / meter.first_tokens / meter.examples,
                "peak_memory_above_weights_mb": memory.stop(),
                "notes": options.get("notes", {}),
            }
        )
    )


if __name__ == "__main__":
    main()
