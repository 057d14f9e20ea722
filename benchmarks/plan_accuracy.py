"""`labeltune plan` against runs: two sizes of two model shapes, with random weights.

    python benchmarks/plan_accuracy.py --json result.json

Plan and run are processes of their own with the same threads. Memory is the run's largest resident size above what the process
had before it loaded the model; time is the training loop's. Ratios are planned / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import made_up

HERE = Path(__file__).resolve().parent
#: shape -> optimizer steps, so that each run takes some 20 seconds
CASES = {"qwen2-small": 20, "qwen2-large": 5, "llama-small": 20, "llama-large": 5}


def train(config_file: Path) -> dict[str, Any]:
    """In a process of its own: train, and watch the resident size from the moment the model is loaded."""
    import psutil

    from labeltune import recipes
    from labeltune.config import load_config
    from labeltune.modeling import hub
    from labeltune.training import trainer

    process, before, most = psutil.Process(), [0], [0]
    load, done, tokens = hub.load_model, threading.Event(), [0]
    make_batch = trainer.make_batch

    def watched(*given: Any, **options: Any) -> Any:
        before[0] = process.memory_info().rss
        threading.Thread(target=watch, daemon=True).start()
        return load(*given, **options)

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], process.memory_info().rss)

    def counted(*given: Any, **options: Any) -> Any:
        batch = make_batch(*given, **options)
        tokens[0] += batch.tokens
        return batch

    hub.load_model, trainer.make_batch = watched, counted
    result = recipes.train(load_config(config_file), say=lambda line: print(line, file=sys.stderr))
    done.set()
    return {
        "seconds": result.seconds,
        "memory": most[0] - before[0],
        "tokens": tokens[0],
        "steps": result.steps,
    }


def child(*arguments: str) -> dict[str, Any]:
    """Runs this file or labeltune, and reads the JSON it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


def compare(shape: str, folder: Path, steps: int, rows: Path) -> dict[str, Any]:
    """One row of the table."""
    model = made_up.make_model(folder / shape, shape)
    config = folder / f"{shape}.yaml"
    values = made_up.run_config(model, rows, folder / f"{shape}-out", max_steps=steps)
    config.write_text(json.dumps(values), encoding="utf-8")
    planned = child("-m", "labeltune", "plan", str(config), "--measure", "--json")
    ran = child(str(Path(__file__)), "--run", str(config))
    memory, seconds = sum(planned["memory"].values()), planned["hours"] * 3600
    return {
        "shape": shape,
        "parameters": planned["parameters"],
        "steps": ran["steps"],
        "planned_tokens": planned["computed_tokens"],
        "tokens": ran["tokens"],
        "planned_mb": round(memory / 1e6),
        "mb": round(ran["memory"] / 1e6),
        "memory_ratio": round(memory / ran["memory"], 3),
        "gflops": planned["gflops"],
        "planned_seconds": round(seconds, 2),
        "seconds": round(ran["seconds"], 2),
        "time_ratio": round(seconds / ran["seconds"], 3),
        "memory": planned["memory"],
    }


def main() -> None:
    """Prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, help="of every run; 20 of small and 5 of large models when left out"
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(train(Path(given.run))))
        return
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LABELTUNE_CACHE"] = str(folder / "cache")
        rows = made_up.write_rows(folder / "rows.jsonl", 500)
        for shape in given.cases.split(","):
            found.append(compare(shape, folder, given.steps or CASES[shape], rows))
            print(found[-1], file=sys.stderr)
    print(
        "| model | weights | tokens planned | computed | MB planned | measured | ratio | s planned | measured | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for f in found:
        print(
            f"| {f['shape']} | {f['parameters'] / 1e6:.0f} M | {f['planned_tokens']:,} | {f['tokens']:,} | {f['planned_mb']} "
            f"| {f['mb']} | {f['memory_ratio']:.2f} | {f['planned_seconds']} | {f['seconds']} | {f['time_ratio']:.2f} |"
        )
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
