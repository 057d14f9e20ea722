"""`labeltune next` against random choice: what rounds of labelling bring, on rows whose labels are known and shown only when they are chosen.

    python benchmarks/active_learning.py --data cls_titles.jsonl --task classification --model pocket-zh --rounds 5 --count 40 --out FOLDER

Each seed draws a pool and test rows. The first round is drawn at random and is the same for both ways; then `margin` takes what `next` would, `random` draws. Every
round trains from the base model on all rows labelled so far. FOLDER/seed-N.json has a seed's figures on the test rows by way and round; what is there is not
computed again. FOLDER/result.json has the means over all seeds there, with the 95 % interval of the difference (t distribution).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--precision", default="fp32", help="of training")
    parser.add_argument("--answers", default="fp32", help="precision of answers")
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
    prompt: dict[str, Any] = {
        **prompts.get("labels_first" if options.task == "classification" else options.task, {}),
        "layout": "labels_first",
    }
    if options.task == "ner":
        prompt = {**prompts["ner_marks"], "layout": "labels_first", "answer": "marks"}
    config = build_config(
        {
            "task": options.task,
            "model": options.model,
            "output_dir": str(folder / "run"),
            "tracking": "none",
            "hub": {"accept_license": "gemma"},
            "data": {"train": str(folder / "train.jsonl"), "validation_fraction": 0, "labels": labels},
            "prompt": prompt,
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


def one_seed(options: argparse.Namespace, rows: list[Example], seed: int) -> dict[str, list[float]]:
    """Of both ways, the figure on the test rows after every round."""
    drawn = random.Random(seed)
    shuffled = drawn.sample(rows, len(rows))
    test, pool = shuffled[: options.test], shuffled[options.test :][: options.pool]
    labels = sorted({name for example in rows for name in example.right_names})
    figures: dict[str, list[float]] = {"margin": [], "random": []}
    for way, found in figures.items():
        labelled = pool[: options.count]
        for number in range(options.rounds):
            if way == "random" and not number:
                found.append(figures["margin"][0])
                labelled = pool[: options.count * 2]
                continue
            began = time.perf_counter()
            best = trained(options, labelled, labels, options.out / f"{way}-{seed}")
            trained_at = time.perf_counter()
            with labeltune.load_predictor(
                best, precision=options.answers, merge=options.answers == "fp32"
            ) as predictor:
                found.append(headline(test, list(predictor.stream(test)))[FIGURES[options.task]])
                seconds = [round(trained_at - began), round(time.perf_counter() - trained_at)]
                print(way, seed, len(labelled), round(found[-1], 4), *seconds, flush=True)
                if number + 1 == options.rounds:
                    break
                texts = {example.text for example in labelled}
                left = [example for example in pool if example.text not in texts]
                labelled = labelled + (
                    left[: options.count] if way == "random" else chosen_next(predictor, left, options.count)
                )
    return figures


def summary_of(seeds: list[dict[str, list[float]]], count: int) -> list[dict[str, Any]]:
    """Means over the seeds, a round each, and the interval of the difference."""
    summary = []
    for number in range(len(seeds[0]["margin"])):
        ways = {way: [figures[way][number] for figures in seeds] for way in ("random", "margin")}
        difference = [a - b for a, b in zip(ways["margin"], ways["random"], strict=True)]
        mean = statistics.mean(difference)
        half = stats.t.ppf(0.975, len(difference) - 1) * statistics.stdev(difference) / len(difference) ** 0.5
        summary.append(
            {
                "rows": count * (number + 1),
                **{way: round(statistics.mean(each), 4) for way, each in ways.items()},
                "difference": [round(mean, 4), round(mean - half, 4), round(mean + half, 4)],
            }
        )
    return summary


def main() -> None:
    """Measure, and write result.json."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = examples_of(options)
    for seed in options.seeds:
        file = options.out / f"seed-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(one_seed(options, rows, seed)) + "\n", "utf-8")
    seeds = [json.loads(file.read_text("utf-8")) for file in sorted(options.out.glob("seed-*.json"))]
    if len(seeds) > 1:
        found = {"seeds": seeds, "summary": summary_of(seeds, options.count)}
        print(*map(json.dumps, found["summary"]), sep="\n")
        (options.out / "result.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
