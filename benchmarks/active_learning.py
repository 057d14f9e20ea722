"""`labeltune next` against random choice: what rounds of labelling bring, on rows whose labels are known and shown only when they are chosen.

    python benchmarks/active_learning.py --data cls_titles.jsonl --task classification --model pocket-zh --rounds 5 --count 40 --seeds 3 --out FOLDER

Each seed draws a pool and test rows. The first round is drawn at random for both ways; then `margin` takes what `next` would, `random` draws. Every round trains
from the base model on all rows labelled so far. FOLDER/result.json has the figure on the test rows by way, seed and round, and means with the
95 % interval over seeds of their difference (t distribution).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from scipy import stats

import labeltune
from labeltune.config import DataConfig, build_config
from labeltune.data.formats.write import write_rows
from labeltune.data.loading import load_rows
from labeltune.default_prompts import ENGLISH_PROMPTS, PROMPTS
from labeltune.evaluation.summary import headline
from labeltune.inference.acquisition import Candidate, informativeness, most_informative, spread
from labeltune.models.text_vectors import vectors_by
from labeltune.types import Example

FIGURES = {"classification": "macro_f1", "ner": "span_f1"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="labelled rows")
    parser.add_argument("--task", choices=list(FIGURES), default="classification")
    parser.add_argument("--model", default="pocket-zh")
    parser.add_argument("--pool", type=int, default=600, help="rows to choose from, at each seed")
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=40, help="rows labelled a round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--precision", default="auto", help="training.precision")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def examples_of(options: argparse.Namespace) -> list[Example]:
    """All usable rows, each text once, without candidates of their own: all rows choose among all labels."""
    rows = load_rows(options.data, options.task, DataConfig())
    unique = {
        example.text: Example(example.id, example.text, (), example.label, example.entities, example.source)
        for example in rows.examples()
    }
    return list(unique.values())


def trained(options: argparse.Namespace, chosen: list[Example], labels: list[str], folder: Path) -> Path:
    """A run on the rows that are labelled so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(write_rows(chosen)), "utf-8")
    prompts = PROMPTS if options.model == "pocket-zh" else ENGLISH_PROMPTS
    config = build_config(
        {
            "task": options.task,
            "model": options.model,
            "output_dir": str(folder / "run"),
            "tracking": "none",
            "hub": {"accept_license": "gemma"},
            "data": {"train": str(folder / "train.jsonl"), "validation_fraction": 0, "labels": labels},
            "prompt": {**prompts.get(options.task, {}), "layout": "labels_first"},
            "lora": {"dropout": 0},
            "training": {
                "epochs": options.epochs,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "scheduler": "linear",
                "save_steps": "epoch",
                "save_total_limit": 1,
                "precision": options.precision,
            },
        }
    )
    return labeltune.train(config, overwrite=True, say=lambda _: None).best


def chosen_next(predictor: Any, pool: list[Example], count: int) -> list[Example]:
    """What `labeltune next` takes from the pool."""
    found = (
        Candidate(example, prediction, informativeness(prediction, "margin"))
        for example, prediction in zip(pool, predictor.stream(pool), strict=True)
    )
    weights = predictor.model.get_input_embeddings().weight
    vectors = vectors_by(lambda ids: weights[ids.tolist()].float().numpy(), predictor.template.tokenizer)
    return [candidate.example for candidate, _ in spread(most_informative(found, count), count, vectors)]


def one_way(options: argparse.Namespace, rows: list[Example], way: str, seed: int) -> list[float]:
    """The figure on the test rows after every round."""
    drawn = random.Random(seed)
    shuffled = drawn.sample(rows, len(rows))
    test, pool = shuffled[: options.test], shuffled[options.test :][: options.pool]
    labels = sorted({name for example in rows for name in example.right_names})
    labelled, figures = pool[: options.count], []
    for number in range(options.rounds):
        best = trained(options, labelled, labels, options.out / f"{way}-{seed}")
        with labeltune.load_predictor(best, merge=True) as predictor:
            figures.append(headline(test, list(predictor.stream(test)))[FIGURES[options.task]])
            print(way, seed, len(labelled), round(figures[-1], 4), flush=True)
            if number + 1 == options.rounds:
                break
            texts = {example.text for example in labelled}
            left = [example for example in pool if example.text not in texts]
            labelled = labelled + (
                left[: options.count] if way == "random" else chosen_next(predictor, left, options.count)
            )
    return figures


def main() -> None:
    """Measure, and write result.json."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = examples_of(options)
    found = {
        way: [one_way(options, rows, way, seed) for seed in range(options.seeds)]
        for way in ("random", "margin")
    }
    summary = []
    for number in range(options.rounds):
        ways = {way: [figures[number] for figures in each] for way, each in found.items()}
        difference = [a - b for a, b in zip(ways["margin"], ways["random"], strict=True)]
        mean = statistics.mean(difference)
        half = stats.t.ppf(0.975, len(difference) - 1) * statistics.stdev(difference) / len(difference) ** 0.5
        summary.append(
            {
                "rows": options.count * (number + 1),
                **{way: round(statistics.mean(each), 4) for way, each in ways.items()},
                "difference": [round(mean, 4), round(mean - half, 4), round(mean + half, 4)],
            }
        )
        print(json.dumps(summary[-1]))
    (options.out / "result.json").write_text(
        json.dumps({"figures": found, "summary": summary}, indent=2) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
