"""Several labels a row: figures before and after training, beside a linear model on the same rows, and what sharing the prompt saves.

    python benchmarks/multilabel.py --data rows.jsonl --train 1000 --test 300 --epochs 2 --out FOLDER

Rows are `{"text": ..., "labels": [...]}`. A tenth of the training rows chooses the run's thresholds. `--steps` times single steps
alone, `one_question_a_sequence` being the same questions without a shared prompt (`training.packing` packed and padded).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import labeltune
from labeltune.config import RunConfig, build_config
from labeltune.default_prompts import ENGLISH_PROMPTS, PROMPTS
from labeltune.evaluation.floor import floor_of
from labeltune.evaluation.multilabel import multilabel_metrics
from labeltune.types import Example

SHOWN = ("micro_f1", "macro_f1", "subset_accuracy")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for rows, the run, its report and result.json"
    )
    parser.add_argument("--steps", action="store_true", help="time steps alone, and train nothing")
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def split(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows of the file in a fixed random order, without repeated texts."""
    rows = [json.loads(line) for line in Path(options.data).read_text("utf-8").splitlines()]
    unique = list(
        {
            row["text"]: {"text": row["text"], "labels": list(dict.fromkeys(row["labels"]))} for row in rows
        }.values()
    )
    random.Random(options.seed).shuffle(unique)
    held = options.train // 10
    train, rest = unique[: options.train], unique[options.train :]
    return {"train": train[held:], "validation": train[:held], "test": rest[: options.test]}


def config_of(options: argparse.Namespace, labels: list[str], **training: Any) -> RunConfig:
    """A run on the written rows."""
    prompts = PROMPTS if options.model == "pocket-zh" else ENGLISH_PROMPTS
    folder = options.out
    return build_config(
        {
            "task": "multilabel",
            "model": options.model,
            "output_dir": str(folder / "run"),
            "tracking": "none",
            "hub": {"accept_license": "gemma"},
            "data": {name: str(folder / f"{name}.jsonl") for name in ("train", "validation", "test")}
            | {"labels": labels},
            "prompt": {**prompts["multilabel"], "max_length": 320},
            "training": {
                "epochs": options.epochs,
                "batch_size": options.batch,
                "learning_rate": 1e-3,
                "scheduler": "linear",
                "save_steps": "epoch",
                **training,
            },
            "eval": {"max_rows": 60},
        }
    )


def linear(parts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The linear model that stands beside every figure of labeltune."""
    started = time.monotonic()
    known, asked = (
        [Example(str(n), row["text"], labels=tuple(row["labels"])) for n, row in enumerate(parts[name])]
        for name in ("train", "test")
    )
    floor = floor_of(known, asked)
    assert floor is not None
    figures = multilabel_metrics(asked, floor.predictions)
    return {"seconds": time.monotonic() - started, **{name: figures[name] for name in SHOWN}}


def _shown(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in (*SHOWN, "map")}


def main() -> None:
    """Measure, and write result.json."""
    options = arguments()
    parts = split(options)
    labels = sorted({label for rows in parts.values() for row in rows for label in row["labels"]})
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(lines, "utf-8")
    found: dict[str, Any] = {"rows": {name: len(rows) for name, rows in parts.items()}, "labels": len(labels)}
    if options.steps:
        for way in ("shared_prefix", "packed", "shared_prefix", "padded"):
            plan = labeltune.plan(config_of(options, labels, packing=way))
            timed = {"seconds": list(plan.step_seconds), "tokens_a_row": plan.computed_per_row}
            found.setdefault("steps", {}).setdefault(way, []).append(timed)
            print(way, plan.packing, json.dumps(timed), flush=True)
    else:
        config = config_of(options, labels)
        found["linear"] = linear(parts)
        print("linear", json.dumps(found["linear"]), flush=True)
        result = labeltune.train(config, overwrite=True, say=print)
        found["training_seconds"] = result.seconds
        for base in (True, False):
            started = time.monotonic()
            figures = labeltune.evaluate(
                result.best, config.data.test, base=base, output=None if base else options.out / "report"
            )
            name = "before" if base else "after"
            found[name] = {**_shown(figures), "seconds": time.monotonic() - started}
            print(name, json.dumps(found[name]), flush=True)
    file = options.out / ("steps.json" if options.steps else "result.json")
    file.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
