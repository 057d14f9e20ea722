"""Entities as JSON lines against entities as marks in the text: figures and speed on the same rows.

    python benchmarks/answer_forms.py --data rows.jsonl --train 1200 --test 300 --epochs 1 --out FOLDER [--answer json]
    python benchmarks/answer_forms.py --data rows.jsonl --out FOLDER --speed 64

The first trains a run for each form (or for one, so that two commands can train side by side), measures it on the test rows and writes
FOLDER/FORM.json. The second asks both runs about the same rows in turn, three rounds, and writes FOLDER/speed.json with their rows a second,
how often the model was asked a row, and the ratio. Where entities lie within others, `json` learns the outer ones (data.entities=flat)
and `marks` all of them (nested); both are measured on all.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import labeltune
from labeltune.config import DataConfig, build_config
from labeltune.data.loading import load_rows
from labeltune.default_prompts import ENGLISH_PROMPTS, PROMPTS
from labeltune.evaluation.spans import ner_metrics
from labeltune.evaluation.summary import slices
from labeltune.types import Example

FORMS = {"json": "ner", "marks": "ner_marks"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="rows of text and entities")
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--answer", choices=list(FORMS), help="train this form alone")
    parser.add_argument("--speed", type=int, metavar="ROWS", help="measure the speed of both on so many rows")
    parser.add_argument("--precision", default="auto", help="training.precision")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def outer(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that lie in no other one."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: (e["start_idx"], -e["end_idx"])):
        if not kept or entity["start_idx"] >= kept[-1]["end_idx"]:
            kept.append(entity)
    return kept


def split(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test rows in a fixed random order; those whose entities are not what stands in the text are left out."""
    rows = [json.loads(line) for line in Path(options.data).read_text("utf-8").splitlines()]
    good = {
        row["text"]: {name: row[name] for name in ("text", "entities")}
        for row in rows
        if all(row["text"][e["start_idx"] : e["end_idx"]] == e["entity_text"] for e in row["entities"])
    }
    shuffled = list(good.values())
    random.Random(options.seed).shuffle(shuffled)
    return shuffled[: options.train], shuffled[options.train :][: options.test]


def is_nested(rows: list[dict[str, Any]]) -> bool:
    """Whether an entity lies within another one."""
    return any(len(outer(row["entities"])) < len(row["entities"]) for row in rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def measure(options: argparse.Namespace, form: str) -> dict[str, Any]:
    """Train one form and measure it on the test rows."""
    train, test = split(options)
    nested = is_nested(train + test)
    kind = "nested" if nested and form == "marks" else "flat"
    if kind == "flat":
        train = [{**row, "entities": outer(row["entities"])} for row in train]
    prompts = PROMPTS if options.model == "pocket-zh" else ENGLISH_PROMPTS
    labels = sorted({entity["entity_label"] for row in train for entity in row["entities"]})
    folder = options.out
    config = build_config(
        {
            "task": "ner",
            "model": options.model,
            "output_dir": str(folder / form),
            "tracking": "none",
            "hub": {"accept_license": "gemma"},
            "data": {
                "train": str(write(folder / f"{form}_train.jsonl", train)),
                "validation_fraction": 0,
                "labels": labels,
                "entities": kind,
            },
            "prompt": {**prompts[FORMS[form]], "answer": form, "max_length": 640, "layout": "labels_first"},
            "lora": {"dropout": 0},
            "training": {
                "epochs": options.epochs,
                "batch_size": options.batch,
                "precision": options.precision,
                "learning_rate": 1e-3,
                "scheduler": "linear",
                "save_steps": "epoch",
            },
            "eval": {"metric": "loss"},
        }
    )
    result = labeltune.train(config, overwrite=True, say=lambda line: print(line, flush=True))
    examples = test_examples(options, test, labels, nested)
    with labeltune.load_predictor(result.best) as predictor:
        started = time.monotonic()
        predictions = list(predictor.predict(examples))
        seconds = time.monotonic() - started
    figures = ner_metrics(examples, predictions) | slices(examples, predictions)
    kept = {
        name: figures[name] for name in ("span_f1", "precision", "recall", "by_nesting") if name in figures
    }
    return {
        "rows": [len(train), len(test)],
        "entities": kind,
        "training_seconds": result.seconds,
        **kept,
        "seconds": seconds,
    }


def test_examples(
    options: argparse.Namespace, rows: list[dict[str, Any]], labels: list[str], nested: bool
) -> list[Example]:
    """The rows as a run is measured on them."""
    reading = DataConfig(labels=labels, entities="nested" if nested else "flat")
    loaded = load_rows(str(write(options.out / "test.jsonl", rows)), "ner", reading)
    return [loaded.example(i) for i in range(len(loaded.dataset))]


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Both runs on the same rows, in turn."""
    rows = [{"text": row["text"]} for row in split(options)[1][: options.speed]]
    texts = [row["text"] for row in rows]
    predictors = {form: labeltune.load_predictor(options.out / form) for form in FORMS}
    passes = dict.fromkeys(FORMS, 0)
    for form, predictor in predictors.items():

        def count(*_: Any, form: str = form) -> None:
            passes[form] += 1

        list(predictor.predict(texts[:1]))  # the self-check
        predictor.model.register_forward_pre_hook(count)
    rates: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(3):
        for form, predictor in predictors.items():
            started = time.perf_counter()
            for text in texts:
                list(predictor.predict([text]))
            rates[form].append(len(texts) / (time.perf_counter() - started))
    ratios = [marks / other for marks, other in zip(rates["marks"], rates["json"], strict=True)]
    return {
        "rows": len(texts),
        "rows_per_second": {form: statistics.median(found) for form, found in rates.items()},
        "passes_per_row": {form: number / (3 * len(texts)) for form, number in passes.items()},
        "marks_to_json": [min(ratios), statistics.median(ratios), max(ratios)],
    }


def main() -> None:
    """Measure, and write the figures."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.speed:
        tell(options, "speed", speed(options))
        return
    for form in FORMS if options.answer is None else [options.answer]:
        tell(options, form, measure(options, form))


def tell(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Print figures, and write them."""
    print(name, json.dumps(found), flush=True)
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
