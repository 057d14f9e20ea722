r"""Accuracy by labelled rows: configs of labeltune, SetFit and the linear floor, on the same draws of rows, with paired intervals.

    python benchmarks/accuracy.py --data cls_titles.jsonl --model pocket-zh --rows 320 --part tune --out FOLDER \
        --arm short 'prompt.system=""' 'prompt.user="标题：{text}\n类别："' training.epochs=3 --arm recipe

Every text belongs to one part for good, by its hash: half of the file is drawn from for training, a fifth is there to choose by (`--part tune`),
and the rest to report (`--part test`). `--test FILE` reports on other rows instead, draws from all of `--data`, and refuses a text that is in both. A draw of
rows is the same for all arms. An arm is a name and config keys on top of what `labeltune init` writes; `recipe` starts from the original
recipe's config instead, `setfit` is SetFit on the encoder of `--encoder` with the 20 pairs a row of its paper, `trl` TRL's SFTTrainer on the
arm's model, prompt, adapter, rate, batch and passes, answering by greedy generation, and `hidden` a logistic regression on the untuned model's
hidden states. What follows a hyphen tells arms of one kind apart. What has been measured in FOLDER is not measured again.
FOLDER/result.json has mean figures and the difference of every arm to the floor: over draws and rows, both drawn again by the bootstrap.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

import labeltune
from labeltune.commands.original import original_config
from labeltune.config import DataConfig, RunConfig, load_config
from labeltune.data.check import text_hash
from labeltune.data.formats.write import write_rows
from labeltune.data.loading import load_rows
from labeltune.evaluation.compare import right_row
from labeltune.evaluation.floor import floor_of
from labeltune.evaluation.spans import f1_of_counts, span_counts, spans
from labeltune.types import Example, Prediction

FLOOR = "linear"
#: Hundredths of the texts, by their hash: below the first for training, below the second to choose by.
BORDERS = (50, 70)
RESAMPLES = 2000


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="labelled rows")
    parser.add_argument("--test", help="other rows to report on; none of them may stand in --data")
    parser.add_argument("--part", choices=["tune", "test"], default="tune")
    parser.add_argument("--task", choices=["classification", "ner"], default="classification")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--rows", type=int, help="training rows in all")
    parser.add_argument("--per-class", type=int, help="training rows of every label")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--asked", type=int, default=1000, help="rows to measure on, at most")
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar="NAME KEY=VALUE")
    parser.add_argument("--encoder", help="sentence encoder for SetFit: a folder or a name")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def part_of(text: str) -> str:
    """The part that a text belongs to."""
    number = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:4]) % 100
    return "train" if number < BORDERS[0] else "tune" if number < BORDERS[1] else "test"


def examples_of(path: str, task: Any) -> list[Example]:
    """The usable rows of a file, each text once."""
    config = DataConfig(on_error="skip")
    return list({each.text.strip(): each for each in load_rows(path, task, config).examples()}.values())


def overlap(train: list[Example], test: list[Example]) -> str | None:
    """Why test rows cannot be reported on: how many of them stand in the training file."""
    known = {text_hash(each.text) for each in train}
    twice = [each for each in test if text_hash(each.text) in known]
    if not twice:
        return None
    return f"{len(twice)} rows of the test file stand in --data, the first is {twice[0].where}; take them out of one of the two"


def drawn(pool: list[Example], seed: int, rows: int | None, per_class: int | None) -> list[Example]:
    """The training rows of a draw."""
    shuffled = random.Random(seed).sample(pool, len(pool))
    if per_class is None:
        return shuffled[:rows]
    counts: Counter[str] = Counter()
    found = []
    for each in shuffled:
        counts[str(each.label)] += 1
        if counts[str(each.label)] <= per_class:
            found.append(each)
    return found


def config_of(
    options: argparse.Namespace, arm: list[str], train: Path, folder: Path, labels: list[str]
) -> RunConfig:
    """The config of an arm."""
    name, *changes = arm
    common = [
        f"model={options.model}",
        f"data.train={train}",
        "data.test=null",
        "hub.accept_license=gemma",
        f"data.labels={json.dumps(labels, ensure_ascii=False)}",
        f"output_dir={folder}",
        "tracking=none",
    ]
    if name.startswith("recipe"):
        return original_config(options.task, [*common, *changes])
    starter = Path(labeltune.__file__).parent / "starter" / f"{options.task}.yaml"
    return load_config(starter, [*common, *changes])


def tuned(
    options: argparse.Namespace, arm: list[str], known: list[Example], asked: list[Example], folder: Path
) -> tuple[list[Prediction], dict[str, float]]:
    """What a run on these rows answers, and seconds of training and of answering."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "train.jsonl"
    file.write_text("".join(write_rows(known)), "utf-8")
    labels = sorted({name for each in known for name in each.right_names})
    started = time.perf_counter()
    result = labeltune.train(
        config_of(options, arm, file, folder / "run", labels), overwrite=True, say=lambda _: None
    )
    trained = time.perf_counter()
    with labeltune.load_predictor(result.best, merge=True, precision="fp32") as predictor:
        found = list(predictor.stream(asked))
    return found, {"training": trained - started, "answering": time.perf_counter() - trained}


def setfit(
    options: argparse.Namespace, _: list[str], known: list[Example], asked: list[Example], folder: Path
) -> tuple[list[Prediction], dict[str, float]]:
    """SetFit with its own defaults, but for the pairs, of which it would take all."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    labels = sorted({str(each.label) for each in known})
    rows = {"text": [each.text for each in known], "label": [labels.index(str(each.label)) for each in known]}
    started = time.perf_counter()
    model = SetFitModel.from_pretrained(options.encoder, labels=labels)
    given = TrainingArguments(output_dir=str(folder), report_to="none", seed=0, num_iterations=20)
    Trainer(model=model, args=given, train_dataset=Dataset.from_dict(rows)).train()
    trained = time.perf_counter()
    answers = model.predict([each.text for each in asked])
    found = [
        Prediction(each.id, str(answer), str(answer)) for each, answer in zip(asked, answers, strict=True)
    ]
    return found, {"training": trained - started, "answering": time.perf_counter() - trained}


def trl(
    options: argparse.Namespace, arm: list[str], known: list[Example], asked: list[Example], folder: Path
) -> tuple[list[Prediction], dict[str, float]]:
    """TRL's SFTTrainer, loss on the answers alone as it is for prompts and completions."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from labeltune.inference.load import base_predictor, predictor_as
    from labeltune.models.hub import resolve_model
    from labeltune.training.preflight import settled

    labels = sorted({str(each.label) for each in known})
    config = config_of(options, arm, folder / "train.jsonl", folder / "run", labels)
    config = settled(config, len(known), len(labels), resolve_model(config.model, config.hub).folder, print)
    base, lora, chosen = base_predictor(config, labels), config.lora, config.training
    rows = [
        {
            "prompt": base.task.conversation(each).messages(),
            "completion": [{"role": "assistant", "content": each.label}],
        }
        for each in known
    ]
    started = time.perf_counter()
    given = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=chosen.precision == "bf16",
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=chosen.batch_size,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.scheduler,
        max_length=config.prompt.max_length,
        gradient_checkpointing=False,
        seed=chosen.seed,
    )
    adapter = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules
    )
    trainer = SFTTrainer(
        model=base.model,
        args=given,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.template.tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    trained = time.perf_counter()
    model: Any = trainer.model
    predictor = predictor_as(config, model.merge_and_unload().eval(), base.builder)
    predictor.change(decoding="free")
    found = predictor.predict(asked)
    return found, {"training": trained - started, "answering": time.perf_counter() - trained}


def hidden(
    options: argparse.Namespace, arm: list[str], known: list[Example], asked: list[Example], folder: Path
) -> tuple[list[Prediction], dict[str, float]]:
    """Logistic regression on the untuned model's last hidden state behind each prompt."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from labeltune.inference.load import base_predictor

    labels = sorted({str(each.label) for each in known})
    config = config_of(options, arm, folder / "train.jsonl", folder / "run", labels)
    started = time.perf_counter()
    vectors = []
    with base_predictor(config, labels) as predictor, torch.no_grad():
        model: Any = predictor.model
        for each in (*known, *asked):
            ids = torch.tensor([predictor.builder.prompt(each).ids])
            states = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1, use_cache=False)
            vectors.append(states.hidden_states[-1][0, -1].float().numpy())
    read = time.perf_counter()
    scaled = StandardScaler().fit(vectors[: len(known)])
    head = LogisticRegression(C=0.01, max_iter=1000)
    head.fit(scaled.transform(vectors[: len(known)]), [str(each.label) for each in known])
    answers = head.predict(scaled.transform(vectors[len(known) :]))
    found = [Prediction(each.id, answer, answer) for each, answer in zip(asked, answers, strict=True)]
    return found, {"training": time.perf_counter() - read, "answering": read - started}


def linear(
    _: argparse.Namespace, __: list[str], known: list[Example], asked: list[Example], ___: Path
) -> tuple[list[Prediction], dict[str, float]]:
    """The floor."""
    started = time.perf_counter()
    floor = floor_of(known, asked)
    if floor is None:
        raise SystemExit("install python-crfsuite for the floor of entities")
    return list(floor.predictions), {"training": time.perf_counter() - started, "answering": 0.0}


Way = Callable[..., "tuple[list[Prediction], dict[str, float]]"]
WAYS: dict[str, Way] = {FLOOR: linear, "setfit": setfit, "hidden": hidden, "trl": trl}


def way_of(arm: str) -> Way:
    """How an arm is measured, by the beginning of its name."""
    return WAYS.get(arm.partition("-")[0], tuned)


def counts_of(asked: list[Example], found: list[Prediction]) -> list[list[int]]:
    """What figures are made of, a row each: [right] of labels, [right, predicted, wanted] of entities."""
    if asked[0].entities is not None:
        counted = span_counts([spans(e.entities) for e in asked], [spans(p.entities) for p in found])
        return [[int(each) for each in row] for row in counted]
    return [[int(right_row(e, p))] for e, p in zip(asked, found, strict=True)]


def figure(counts: Any) -> float:
    """Accuracy, or strict span F1."""
    return float(counts.mean()) if counts.shape[1] == 1 else f1_of_counts(counts)


def summary_of(measured: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means over the draws that all arms have, and each arm's difference to the floor with its 95 % interval."""
    draws = sorted(set.intersection(*(set(each) for each in measured.values())))
    counts = {arm: [numpy.array(each[draw]["counts"]) for draw in draws] for arm, each in measured.items()}
    random_rows = numpy.random.default_rng(0)
    rows = len(counts[FLOOR][0])
    resampled: dict[str, list[float]] = {arm: [] for arm in counts}
    for _ in range(RESAMPLES):
        chosen = random_rows.integers(rows, size=rows)
        again = random_rows.integers(len(draws), size=len(draws))
        for arm, each in counts.items():
            resampled[arm].append(float(numpy.mean([figure(each[draw][chosen]) for draw in again])))
    found = []
    for arm, each in counts.items():
        value = float(numpy.mean([figure(one) for one in each]))
        line: dict[str, Any] = {"arm": arm, "draws": len(draws), "asked": rows, "value": round(value, 4)}
        if arm != FLOOR:
            differences = numpy.array(resampled[arm]) - numpy.array(resampled[FLOOR])
            low, high = numpy.percentile(differences, [2.5, 97.5])
            floor = float(numpy.mean([figure(one) for one in counts[FLOOR]]))
            line["difference"] = [round(value - floor, 4), round(float(low), 4), round(float(high), 4)]
        for what in ("training", "answering"):
            line[what] = round(float(numpy.mean([measured[arm][draw]["seconds"][what] for draw in draws])), 1)
        found.append(line)
    return found


def main() -> None:
    """Measure what is missing, and write result.json."""
    options = arguments()
    rows = examples_of(options.data, options.task)
    parts: dict[str, list[Example]] = defaultdict(list)
    for each in rows:
        parts[part_of(each.text)].append(each)
    asked = parts[options.part]
    if options.test is not None:
        asked = examples_of(options.test, options.task)
        if (problem := overlap(rows, asked)) is not None:
            print(f"error: {problem}", file=sys.stderr)
            raise SystemExit(2)
    asked = random.Random(0).sample(asked, min(options.asked, len(asked)))
    pool = parts["train"] if options.test is None else rows
    options.out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for draw in options.draws:
        known = drawn(pool, draw, options.rows, options.per_class)
        for arm in ([FLOOR], *options.arm):
            file = options.out / f"{arm[0]}-{draw}.json"
            if not file.exists():
                found, seconds = way_of(arm[0])(options, arm, known, asked, options.out / f"{arm[0]}-{draw}")
                told = {"arm": arm, "rows": len(known), "counts": counts_of(asked, found), "seconds": seconds}
                file.write_text(json.dumps(told) + "\n", "utf-8")
                print(
                    arm[0],
                    draw,
                    len(known),
                    round(figure(numpy.array(told["counts"])), 4),
                    round(seconds["training"]),
                    flush=True,
                )
            measured.setdefault(arm[0], {})[draw] = json.loads(file.read_text("utf-8"))
    summary = summary_of(measured)
    print(*map(json.dumps, summary), sep="\n")
    (options.out / "result.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
