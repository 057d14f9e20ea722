"""Training on one and on two processes, and how evenly a step's rows are divided.

    python benchmarks/scaling_ranks.py --data ner_ccfbdci.jsonl --labels 地点,人名,地理实体,组织 --tokenizer qwen2-tokenizer

Speed: random weights in a small Qwen2's shape, one thread a process, the same steps; rows/s from the end of the first step.
Balance: the plans of 2 to 8 processes for the same rows; nothing is trained. `largest / mean` is the work (matrix products and
attention) of the process that all wait for, over the mean, summed over steps; `tokens` is what is computed, over one process's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speed_data import read_tokenizer, run_config, tokenized_rows

from labeltune.training.packing import PAIRS_PER_TOKEN, Row, pack_step, pairs, to_rows

BATCHES = (16, 64)
WORLDS = (2, 4, 8)


def balance(records: list[dict[str, Any]], batch: int, processes: int) -> dict[str, Any]:
    """How evenly the steps of these rows are divided, and what dividing costs."""
    steps = [to_rows(records[at : at + batch]) for at in range(0, len(records) - batch + 1, batch)]
    largest = mean = tokens = alone = 0.0
    started = time.perf_counter()
    plans = [pack_step(step, 2048, "shared_prefix", processes) for step in steps]
    seconds = time.perf_counter() - started
    for step, shares in zip(steps, plans, strict=True):
        loads = [sum(work(step, pack.groups) for pack in share) for share in shares]
        largest += max(loads)
        mean += sum(loads) / processes
        tokens += sum(pack.tokens(step) for share in shares for pack in share)
        alone += sum(pack.tokens(step) for pack in pack_step(step, 2048)[0])
    return {
        "batch_size": batch,
        "processes": processes,
        "largest_over_mean": largest / mean,
        "tokens_over_one_process": tokens / alone,
        "planning_ms_a_step": 1000 * seconds / len(steps),
    }


def work(rows: list[Row], groups: Any) -> int:
    """Counted anew from the packs: a group's prefix once, then each row's own tokens."""
    total = 0
    for group in groups:
        total += pairs(group.prefix, PAIRS_PER_TOKEN)
        for i in group.rows:
            whole = pairs(len(rows[i].ids), PAIRS_PER_TOKEN)
            total += whole - pairs(group.prefix, PAIRS_PER_TOKEN)
    return total


def train(path: str) -> None:
    """One process of a training; the first one prints seconds and rows."""
    import datasets
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

    from labeltune.distributed import connect
    from labeltune.models.lora import attach_adapter
    from labeltune.models.precision import pick_precision
    from labeltune.training.preflight import prepare_steps, training_arguments
    from labeltune.training.trainer import LabelTrainer

    torch.set_num_threads(1)
    connect(600)
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    config = run_config(given["data"], "original", 384, given["labels"])
    training = config.training.model_copy(update={"batch_size": given["batch"], "epochs": 1.0})
    config = config.model_copy(
        update={"training": training, "output_dir": given["folder"], "tracking": "none"}
    )
    tokenizer = read_tokenizer(given["tokenizer"])
    torch.manual_seed(0)
    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "vocab_size": len(tokenizer),
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = attach_adapter(Qwen2ForCausalLM(Qwen2Config(**shape, **heads)), config.lora)
    precision = pick_precision("fp32")
    rows = datasets.Dataset.from_list(given["rows"])
    arguments = training_arguments(config, precision, False)
    arguments.save_strategy = "no"
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    def say(line: str) -> None:
        """Nothing is told."""

    plan = prepare_steps(model, tokenizer, config, precision, rows, device=arguments.device, say=say)
    options = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": [Clock()]}
    LabelTrainer(say=say, where=str, settings=plan, **options).train()
    if os.environ.get("RANK", "0") == "0":
        count = (len(times) - 1) * given["batch"]
        print("RESULT " + json.dumps({"rows_a_second": count / (times[-1] - times[0])}), flush=True)


def speed(job: Path, processes: int) -> float:
    """Rows a second of a training in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*command, __file__, "--job", str(job)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return float(json.loads(line.removeprefix("RESULT "))["rows_a_second"])


def main() -> None:
    """Prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="jsonl file")
    parser.add_argument("--labels", help="NER labels, separated by commas")
    parser.add_argument("--tokenizer", help="folder of the tokenizer")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each training")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the best of each is shown")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        train(given.job)
        return
    config = run_config(given.data, "original", 384, given.labels)
    rows, lengths = tokenized_rows(config, read_tokenizer(given.tokenizer), 512)
    found: dict[str, Any] = {"speed": [], "balance": []}
    with tempfile.TemporaryDirectory() as folder:
        for batch in BATCHES:
            steps = given.steps if batch == 16 else max(3, given.steps // 2)
            job = Path(folder) / "job.json"
            about = {
                "data": given.data,
                "labels": given.labels,
                "tokenizer": given.tokenizer,
                "folder": folder,
            }
            job.write_text(
                json.dumps({**about, "batch": batch, "rows": rows[: batch * steps]}), encoding="utf-8"
            )
            rates = {p: max(speed(job, p) for _ in range(given.repeats)) for p in (1, 2)}
            found["speed"].append({"batch_size": batch, "rows_a_second": rates, "ratio": rates[2] / rates[1]})
    found["balance"] = [balance(rows, batch, processes) for batch in BATCHES for processes in WORLDS]
    print(f"{Path(given.data).name}: {lengths['tokens']:.0f} tokens a row\n")
    print("| rows a step | rows/s, 1 process | 2 processes | ratio |\n|---|---|---|---|")
    for line in found["speed"]:
        rates = line["rows_a_second"]
        print(f"| {line['batch_size']} | {rates[1]:.2f} | {rates[2]:.2f} | {line['ratio']:.2f} |")
    print(
        "\n| rows a step | processes | largest / mean | tokens | planning, ms a step |\n|---|---|---|---|---|"
    )
    for line in found["balance"]:
        print(
            f"| {line['batch_size']} | {line['processes']} | {line['largest_over_mean']:.3f} | "
            f"{line['tokens_over_one_process']:.2f} | {line['planning_ms_a_step']:.1f} |"
        )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
