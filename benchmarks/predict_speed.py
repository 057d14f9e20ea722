"""How fast prediction is, side by side: the original's loop, batched free generation, one forward a label, and labeltune.

    labeltune train examples/en_classification.yaml
    python benchmarks/predict_speed.py --model RUN --task classification --data examples/data/en_classification_test.jsonl --json result.json

The same adapter and rows for all; every variant runs in a process of its own, rounds are interleaved, ratios are medians over
rounds of ratios taken within a round. Classification rows are offered 20 candidates: the run's labels and made-up ones.

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
    "ner": ("original", "original_bf16", "free_batched", "labeltune"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a run folder or checkpoint")
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
    return parser.parse_args()


def run_variant(given: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process: rows a second behind a first row that warms up, and peak memory of the process."""
    import psutil

    from labeltune.config import DataConfig
    from labeltune.data.loading import load_rows
    from labeltune.inference.generation import generate_answers
    from labeltune.inference.load import load_predictor
    from labeltune.inference.scoring import Question, score_one_by_one
    from labeltune.prompts import make_task
    from labeltune.prompts.builder import PromptBuilder

    # As `labeltune predict` loads it; the original leaves its adapter beside the weights.
    predictor = load_predictor(given.model, device=given.device, merge=given.variant == "labeltune")
    task = make_task(
        given.task, predictor.task.labels, predictor.task.prompt.model_copy(update={"layout": given.layout})
    )
    predictor.task, predictor.builder = task, PromptBuilder(task, predictor.template)
    labels = task.labels if given.task == "ner" else None
    loaded = load_rows(given.data, given.task, DataConfig(labels=labels, columns=predictor.columns))
    rows = [loaded.example(i) for i in range(min(given.rows + 1, len(loaded.dataset)))]
    if given.task == "classification":
        candidates = tuple(
            [*task.labels, *(word for word in MADE_UP if word not in task.labels)][:CANDIDATES]
        )
        rows = [replace(row, candidates=candidates) for row in rows]
    tokenizer, model = predictor.template.tokenizer, predictor.model
    if given.variant == "original_bf16":
        model.bfloat16()

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
    start = time.perf_counter()
    ask(rows[1:])
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if given.device == "cuda":
        import torch

        peak[0] = torch.cuda.max_memory_allocated()
    return {"rows_per_second": (len(rows) - 1) / seconds, "peak_memory_mb": peak[0] / 1e6}


def main() -> None:
    """Prints the table, writes the JSON."""
    given = arguments()
    if given.variant:
        print(json.dumps(run_variant(given)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(given.repeats):
        for variant in (v for v in VARIANTS[given.task] if v not in given.without):
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
    print("| variant | rows/s | to original | peak MB |\n|---|---|---|---|")
    for variant, runs in found.items():
        ratios = [
            run["rows_per_second"] / base["rows_per_second"]
            for run, base in zip(runs, found["original"], strict=True)
        ]
        record = {
            "task": given.task,
            "variant": variant,
            "rows_per_second": round(statistics.median(run["rows_per_second"] for run in runs), 3),
            "ratio_to_original": round(statistics.median(ratios), 2),
            "peak_memory_mb": round(statistics.median(run["peak_memory_mb"] for run in runs)),
            "layout": given.layout,
        }
        records.append(record)
        print(
            f"| {variant} | {record['rows_per_second']:.2f} | {record['ratio_to_original']:.2f} | {record['peak_memory_mb']} |"
        )
    if given.json:
        Path(given.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
