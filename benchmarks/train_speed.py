"""How fast a training step is, side by side: the original loop, TRL's SFTTrainer, and labeltune's three ways.

    pip install -c constraints.txt '.[bench]'
    python benchmarks/train_speed.py --data rows.jsonl --tokenizer FOLDER --layers 6 --json result.json

Random weights in the shape of Qwen2-0.5B or 1.5B, or with `--family` of a hybrid model, whose prefix `shared_prefix` shares through its
cache; the same rows, tokens, adapter, threads and number format for all. Each
variant runs in a process of its own, the rounds are interleaved, and ratios are medians over rounds of ratios taken within
a round. The first step of a process warms up and is not counted. Every TRL setting is tried in the first round; the fastest
one goes on to the others.

Columns: examples a second; ratio to `original` and to `padded`; tokens that went through the layers for an example; peak memory above the
weights; share of the matmul rate: matrix operations that were carried out, recomputed ones included, by the rate of a large
matrix product measured in the same run; useful share: the same with the operations that `shared_prefix` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed_data import read_tokenizer, run_config, tokenized_rows

HERE = Path(__file__).resolve().parent
OURS = ["padded", "packed", "shared_prefix"]
ORIGINAL = ["original", "original_no_checkpointing"]
TRL = [
    "trl_padded_4x4",
    "trl_padded_16x1",
    "trl_padded_4x4_checkpointing",
    "trl_padding_free_4x4",
    "trl_padding_free_16x1",
    "trl_packing_bfd_short",
    "trl_packing_bfd_long",
]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(HERE.parent / "examples" / "data" / "zh_ner_train.jsonl"))
    parser.add_argument("--tokenizer", help="folder with a tokenizer; that of the pocket model when left out")
    parser.add_argument("--family", choices=["qwen2", "qwen3_5", "lfm2"], default="qwen2")
    parser.add_argument("--shape", choices=["0.5B", "1.5B", "small"], default="0.5B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--steps", type=int, default=2, help="measured steps of 16 examples, after one to warm up"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--layout", choices=["original", "labels_first"], default="original")
    parser.add_argument("--labels", help="label set of the task, with commas between")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compile", action="store_true", help="training.compile for labeltune's variants")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="note each operation's share of the time; the recording slows steps down",
    )
    parser.add_argument("--variants", help="only these, with commas between")
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args()


def measure(variant: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process."""
    file = folder / "options.json"
    file.write_text(
        json.dumps({**options, "variant": variant, "folder": str(folder / "run")}), encoding="utf-8"
    )
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(options["threads"]), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE / "speed_worker.py"), str(file)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [
            f"exit code {done.returncode}"
        ]
        return {"error": lines[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds(options: dict[str, Any], repeats: int, variants: list[str], folder: Path) -> dict[str, list[Any]]:
    """What was measured, by variant, one entry a round."""
    found: dict[str, list[Any]] = {"matmul": []}
    for number in range(repeats):
        for variant in ["matmul", *variants]:
            if variant.startswith("trl") and number and variant != best_trl(found):
                continue
            result = measure(variant, options, folder)
            found.setdefault(variant, []).append({"round": number, **result})
            rate = result.get("examples_per_second")
            shown = result.get("error") or (
                f"{rate:.3f} examples/s" if rate else f"{result['matmul_rate'] / 1e9:.0f} GFLOP/s"
            )
            print(f"round {number + 1}/{repeats}  {variant}: {shown}", file=sys.stderr, flush=True)
    return found


def best_trl(found: dict[str, list[Any]]) -> str | None:
    """The fastest TRL setting of the first round."""
    ran = {
        name: runs[0]["examples_per_second"]
        for name, runs in found.items()
        if name.startswith("trl") and "error" not in runs[0]
    }
    return max(ran, key=lambda name: ran[name]) if ran else None


def ratio(found: dict[str, list[Any]], variant: str, to: str | None) -> float | None:
    """Median over rounds of the ratio within a round."""
    if to is None or "error" in found.get(to, [{"error": ""}])[0] or "error" in found[variant][0]:
        return None
    base = {run["round"]: run["examples_per_second"] for run in found[to]}
    ratios = [
        run["examples_per_second"] / base[run["round"]] for run in found[variant] if run["round"] in base
    ]
    return round(statistics.median(ratios), 3)


def summarize(found: dict[str, list[Any]], variants: list[str]) -> list[dict[str, Any]]:
    """One record a variant; failed ones with the reason."""
    rate = statistics.median(run["matmul_rate"] for run in found["matmul"])
    best = best_trl(found)
    shared = found.get("shared_prefix", [{"error": ""}])[0]
    useful = shared.get("flops_per_example")
    records = []
    for variant in variants:
        runs = found[variant]
        if "error" in runs[0]:
            records.append({"variant": variant, "error": runs[0]["error"]})
            continue
        speed = statistics.median(run["examples_per_second"] for run in runs)
        records.append(
            {
                "variant": variant,
                "examples_per_second": round(speed, 4),
                "ratio_to_original": ratio(found, variant, "original"),
                "ratio_to_trl_best": ratio(found, variant, best),
                "ratio_to_padded": ratio(found, variant, "padded"),
                "tokens_per_example": round(runs[0]["tokens_per_example"], 1),
                "peak_memory_above_weights_mb": round(
                    statistics.median(run["peak_memory_above_weights_mb"] for run in runs)
                ),
                "share_of_matmul_rate": round(speed * runs[0]["flops_per_example"] / rate, 3),
                "useful_share_of_matmul_rate": round(speed * useful / rate, 3) if useful else None,
                "rounds": len(runs),
                **({"notes": runs[0]["notes"]} if runs[0]["notes"] else {}),
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| variant | examples/s | to original | to best TRL | to padded | tokens/example | peak MB above weights | share of matmul rate | useful share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if "error" in record:
            lines.append(f"| {record['variant']} | failed: {record['error']} | | | | | | | |")
            continue
        shown = [
            f"{record['examples_per_second']:.3f}",
            *(
                f"{record[key]:.2f}" if record[key] else ""
                for key in ("ratio_to_original", "ratio_to_trl_best", "ratio_to_padded")
            ),
            f"{record['tokens_per_example']:.0f}",
            str(record["peak_memory_above_weights_mb"]),
            *(
                f"{100 * record[key]:.0f} %" if record[key] else ""
                for key in ("share_of_matmul_rate", "useful_share_of_matmul_rate")
            ),
        ]
        lines.append(f"| {record['variant']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, writes the JSON."""
    given = arguments()
    config = run_config(given.data, given.layout, given.max_length, given.labels)
    rows, lengths = tokenized_rows(config, read_tokenizer(given.tokenizer), 16 * (given.steps + 1))
    variants = [*ORIGINAL, *TRL, *OURS]
    if given.variants:
        wanted = given.variants.split(",")
        unknown = sorted(set(wanted) - set(variants))
        if unknown:
            raise SystemExit(f"unknown variants {unknown}; there are {variants}")
        variants = [variant for variant in variants if variant in wanted]
    keys = ("tokenizer", "family", "shape", "layers", "device", "dropout", "threads", "compile", "profile")
    options = {key: getattr(given, key) for key in keys}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options["rows_file"] = str(folder / "rows.json")
        Path(options["rows_file"]).write_text(json.dumps(rows), encoding="utf-8")
        found = rounds(options, given.repeats, variants, folder)
    records = summarize(found, variants)
    rate = statistics.median(run["matmul_rate"] for run in found["matmul"])
    print(
        f"{given.family}, {given.shape}, {given.layers or 'all'} layers, {given.device}, {given.threads} threads, {platform.processor() or platform.machine()}; "
        f"{Path(given.data).name}: {lengths['tokens']:.0f} tokens an example, {lengths['answer_tokens']:.1f} of them answer; "
        f"matmul rate {rate / 1e9:.0f} GFLOP/s\n"
    )
    print(table(records))
    print(f"\nfastest TRL setting: {best_trl(found)}")
    for record in records:
        for name, share in record.get("notes", {}).get("profile", {}).items():
            print(f"{record['variant']}  {100 * share:5.1f} %  {name}")
    if given.json:
        Path(given.json).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
