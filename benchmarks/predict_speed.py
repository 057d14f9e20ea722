"""How fast prediction is, side by side: the original's loop, batched free generation, one forward a label, and labeltune.

    labeltune train examples/en_classification.yaml
    python benchmarks/predict_speed.py --model RUN --task classification --data examples/data/en_classification_test.jsonl --json result.json

The same adapter and rows for all; every variant runs in a process of its own, rounds are interleaved, ratios are medians over
rounds of ratios taken within a round. Classification rows are offered 20 candidates: the run's labels and made-up ones.

    python benchmarks/predict_speed.py --family qwen3_5 --tokenizer FOLDER --data rows.jsonl

No run, but random weights in a small shape of a hybrid model: `per_label` and `labeltune` alone, and ratios to `per_label`.

    python benchmarks/predict_speed.py --model RUN --task ner --data rows.jsonl --without original --without original_bf16

With a run that answers with marks (prompt.answer=marks) there is `token_by_token` too: the same decoding without reading ahead. `passes/row` is how often
the model was asked.

`original`: one row at a time, the chat template applied, `generate` with up to 512 new tokens; `original_bf16` the same with
the weights in bf16, as the original loads them (the others have fp32 on a CPU). `free_batched`: the same prompts in batches. `per_label`: one forward pass for every candidate. `labeltune`: label scoring, or constrained extraction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from labeltune.io.run_folder import RunInfo, find_checkpoint

MADE_UP = [
    "Agriculture",
    "Architecture",
    "Astronomy",
    "Cooking",
    "Education",
    "Energy",
    "Fashion",
    "Finance",
    "Gardening",
    "Geography",
    "History",
    "Law",
    "Literature",
    "Mathematics",
    "Medicine",
    "Music",
    "Philosophy",
    "Psychology",
    "Religion",
    "Transport",
    "Tourism",
    "Weather",
]
CANDIDATES = 20
VARIANTS = {
    "classification": ("original", "original_bf16", "free_batched", "per_label", "labeltune"),
    "ner": ("original", "original_bf16", "free_batched", "token_by_token", "labeltune"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="a run folder or checkpoint")
    model.add_argument(
        "--family", choices=["qwen2", "qwen3_5", "lfm2"], help="random weights of such a model"
    )
    parser.add_argument("--tokenizer", help="folder with a tokenizer, for --family")
    parser.add_argument("--task", choices=list(VARIANTS), default="classification")
    parser.add_argument("--data", required=True, help="labelled rows of this task")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layout", choices=["original", "labels_first"], default="original")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--without", action="append", default=[], help="leave a variant out (may be repeated)"
    )
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.family and (given.task != "classification" or not given.tokenizer):
        parser.error("--family needs --tokenizer, and measures classification")
    return given


def random_predictor(given: argparse.Namespace) -> Any:
    """A predictor on random weights: what a pass costs does not depend on them."""
    import torch
    from speed_worker import model_config
    from transformers import AutoModelForCausalLM

    from labeltune.config import PromptConfig
    from labeltune.inference.predictor import Predictor
    from labeltune.models.hub import load_tokenizer
    from labeltune.prompts import make_task
    from labeltune.prompts.template import ChatTemplate

    torch.manual_seed(0)
    config = model_config({"family": given.family, "shape": "small", "layers": None})
    model = AutoModelForCausalLM.from_config(config).eval().to(given.device)
    task = make_task("classification", MADE_UP[:CANDIDATES], PromptConfig())
    return Predictor(model, task, ChatTemplate(load_tokenizer(Path(given.tokenizer))))


def run_variant(given: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: rows a second behind a first row that warms up, and peak memory of the process."""
    import psutil

    from labeltune.config import DataConfig
    from labeltune.data.loading import load_rows
    from labeltune.inference import runners
    from labeltune.inference.generation import generate_answers
    from labeltune.inference.load import load_predictor
    from labeltune.inference.scoring import Question, score_one_by_one
    from labeltune.prompts import make_task
    from labeltune.prompts.builder import PromptBuilder

    # As `labeltune predict` loads it; the original leaves its adapter beside the weights.
    merge = given.variant in ("labeltune", "token_by_token")
    predictor = (
        random_predictor(given)
        if given.family
        else load_predictor(given.model, device=given.device, merge=merge)
    )
    task = make_task(
        given.task,
        predictor.task.labels,
        predictor.task.prompt.model_copy(update={"layout": given.layout}),
        predictor.entities,
    )
    predictor.task, predictor.builder = task, PromptBuilder(task, predictor.template)
    labels = task.labels if given.task == "ner" else None
    reading = DataConfig(labels=labels, columns=predictor.columns, entities=predictor.entities)
    loaded = load_rows(given.data, given.task, reading)
    rows = [loaded.example(i) for i in range(min(given.rows + 1, len(loaded.dataset)))]
    if given.task == "classification":
        candidates = tuple(
            [*task.labels, *(word for word in MADE_UP if word not in task.labels)][:CANDIDATES]
        )
        rows = [replace(row, candidates=candidates) for row in rows]
    tokenizer, model = predictor.template.tokenizer, predictor.model
    if given.variant == "original_bf16":
        model.bfloat16()
    if given.variant == "token_by_token":
        runners.LOOKAHEAD, runners.FAR = {}, 0
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)

    def generate(batch: list[Any], batch_size: int, limit: int) -> None:
        prompts = [predictor.builder.prompt(row).ids for row in batch]
        generate_answers(
            model,
            tokenizer,
            prompts,
            stop_ids=predictor.template.stop_ids,
            max_new_tokens=limit,
            batch_size=batch_size,
        )

    def ask(batch: list[Any]) -> None:
        if given.variant.startswith("original"):
            for row in batch:
                generate([row], 1, 512)
        elif given.variant == "free_batched":
            generate(batch, 16, 512)
        elif given.variant == "per_label":
            for row in batch:
                trie = predictor._trie(row, row.candidates)
                score_one_by_one(model, Question(predictor.builder.prompt(row).ids, trie))
        else:
            predictor.predict(batch)

    peak = [0]
    done = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ask(rows[:1])
    passes = 0
    start = time.perf_counter()
    ask(rows[1:])
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if given.device == "cuda":
        import torch

        peak[0] = torch.cuda.max_memory_allocated()
    count_of_rows = len(rows) - 1
    return {
        "rows_per_second": count_of_rows / seconds,
        "passes_per_row": passes / count_of_rows,
        "peak_memory_mb": peak[0] / 1e6,
    }


def main() -> None:
    """Prints the table, writes the JSON."""
    given = arguments()
    if given.variant:
        print(json.dumps(run_variant(given)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    variants = ("per_label", "labeltune") if given.family else VARIANTS[given.task]
    if given.task == "ner" and RunInfo.load(find_checkpoint(given.model)).prompt.answer == "json":
        given.without.append("token_by_token")
    for number in range(given.repeats):
        for variant in (v for v in variants if v not in given.without):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--variant", variant],
                capture_output=True,
                text=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
            if done.returncode:
                raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
            found.setdefault(variant, []).append(json.loads(done.stdout.splitlines()[-1]))
            rate = found[variant][-1]["rows_per_second"]
            print(
                f"round {number + 1}/{given.repeats}  {variant}: {rate:.2f} rows/s",
                file=sys.stderr,
                flush=True,
            )
    records = []
    print(
        f"{given.task}, layout {given.layout}, {Path(given.data).name}, {given.rows} rows, {given.device}\n"
    )
    base = next(iter(found))
    print(f"| variant | rows/s | to {base} | passes/row | peak MB |\n|---|---|---|---|---|")
    for variant, runs in found.items():
        ratios = [
            run["rows_per_second"] / other["rows_per_second"]
            for run, other in zip(runs, found[base], strict=True)
        ]
        record = {
            "task": given.task,
            "variant": variant,
            "rows_per_second": round(statistics.median(run["rows_per_second"] for run in runs), 3),
            f"ratio_to_{base}": round(statistics.median(ratios), 2),
            "passes_per_row": round(statistics.median(run["passes_per_row"] for run in runs), 2),
            "peak_memory_mb": round(statistics.median(run["peak_memory_mb"] for run in runs)),
            "layout": given.layout,
        }
        records.append(record)
        print(
            f"| {variant} | {record['rows_per_second']:.2f} | {record[f'ratio_to_{base}']:.2f} | {record['passes_per_row']} "
            f"| {record['peak_memory_mb']} |"
        )
    if given.json:
        Path(given.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
