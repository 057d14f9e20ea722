"""The whole job on a small model: check the data, fine-tune, measure against the untuned model, show three predictions.

Run by `make demo` (classification), `make demo DEMO=ner`, `DEMO=zh` (Chinese rows on `pocket-zh`, after its licence) and
`DEMO=all`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import labeltune
from labeltune.commands.main import quiet_libraries
from labeltune.config import RunConfig, load_config
from labeltune.errors import ConfigError, LabeltuneError

HERE = Path(__file__).resolve().parent
OUTPUT = Path("demo-output")
#: What DEMO can be, and the configs beside this file that it runs.
DEMOS = {
    "classification": ("en_classification",),
    "ner": ("en_ner",),
    "zh": ("zh_classification",),
    "all": ("en_classification", "en_ner", "zh_classification", "zh_ner"),
}
METRICS = {"classification": "accuracy", "ner": "span_f1"}
#: Predictions that are shown at the end.
SHOWN = 3


@dataclass(frozen=True)
class Outcome:
    """What one task came to."""

    task: str
    after: dict[str, Any]
    comparison: dict[str, Any]
    run: Path
    report: Path
    seconds: float
    shown: list[tuple[str, str]]


def configs_of(demo: str) -> tuple[str, ...]:
    """Names of the configs of a demo.

    Raises:
        ConfigError: there is no such demo.
    """
    if demo not in DEMOS:
        raise ConfigError(f"DEMO={demo} is unknown; it is {', '.join(DEMOS)}")
    return DEMOS[demo]


def accept_license(demo: str, accepted: str | None) -> str | None:
    """Ask about the Gemma terms before anything of that model is fetched."""
    if not any(name.startswith("zh_") for name in DEMOS[demo]):
        return None
    print("pocket-zh is Gemma 3 270M, under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")
    if accepted is not None:
        return accepted
    if not sys.stdin.isatty():
        raise LabeltuneError(
            f"nobody is here to accept the terms; run: make demo DEMO={demo} ACCEPT_LICENSE=gemma"
        )
    answer = input("Have you read them, and do you accept them? [y/N] ").strip().lower()
    return "gemma" if answer == "y" else None


def run_task(name: str, license_name: str | None) -> Outcome:
    """Check, fine-tune, measure, compare. The model is loaded once after training, and asked once about each test row."""
    from labeltune import load_predictor

    run = OUTPUT / name.replace("_", "-")
    report = Path(f"{run}-report")
    overrides = [f"data.{part}={HERE}/data/{name}_{part}.jsonl" for part in ("train", "test")]
    overrides += [f"output_dir={run}", f"swanlab.log_dir={OUTPUT}/swanlog"]
    if license_name is not None:
        overrides.append(f"hub.accept_license={license_name}")
    config = load_config(HERE / f"{name}.yaml", overrides)
    test = str(config.data.test)
    started = time.monotonic()
    say(name, "checking the data")
    examples = check(config)
    say(name, "fine-tuning")
    result = labeltune.train(config, overwrite=True)
    with load_predictor(result.best) as predictor:
        say(name, f"the tuned model answers {len(examples)} test rows")
        predictions = predictor.predict(examples)
        after = labeltune.evaluate(predictor, test, output=report, predictions=predictions)
        say(name, "the untuned model answers them")
        comparison = labeltune.compare("base", predictor, test, output=report, predictions=predictions)
    some = range(0, len(examples), len(examples) // SHOWN)[:SHOWN]
    shown = [(examples[i].text, predictions[i].label or predictions[i].answer) for i in some]
    return Outcome(config.task, after, comparison, run, report, time.monotonic() - started, shown)


def check(config: RunConfig) -> list[Any]:
    """`labeltune data check` on train and test rows; gives the test rows."""
    import labeltune

    checked = labeltune.check_data(config, config.data.train, config.data.test)
    for rows in checked:
        audit = rows.audit
        print(
            f"{audit.path}: {audit.rows} rows, {audit.errors} errors, {audit.warnings} warnings, {len(audit.labels)} labels"
        )
    return [checked[-1].example(i) for i in range(len(checked[-1].dataset))]


def say(name: str, what: str) -> None:
    """The heading of a phase."""
    print(f"\n== {name}: {what}", flush=True)


def print_outcome(outcome: Outcome) -> None:
    """Before and after on the same rows, beside what guessing and a linear model score, and three predictions."""
    metric = METRICS[outcome.task]
    after, found = outcome.after[metric], outcome.comparison["differences"][metric]
    change = found["difference"]
    print(f"\n{outcome.task}, {outcome.after['rows']} test rows, {metric} with 95 % interval")
    print(f"  before            {found['first']:.3f}")
    print(f"  after             {_shown(after)}")
    print(
        f"  difference       {change['value']:+.3f}  [{change['low']:+.3f}, {change['high']:+.3f}]  p = {found['p_value']:.2g}"
    )
    baselines = outcome.after["baselines"]
    for name, value in baselines.items():
        print(f"  {name:<17} {_shown(value)}")
    bar = max(value["value"] for value in baselines.values())
    better = change["low"] > 0 and after["low"] > bar
    print(
        f"  {'clearly' if better else 'NOT clearly'} better: the difference's lower end {change['low']:+.3f}, to be above 0; "
        f"after's {after['low']:.3f}, to be above {bar:.3f}; {outcome.seconds:.0f} s"
    )
    for text, answer in outcome.shown:
        print(f"\n  {text}\n  -> " + answer.replace("\n", "\n     "))


def print_next(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Where to look, and how to go on with rows of one's own."""
    command = Path(sys.executable).parent / "labeltune"
    last = outcomes[-1]
    print(f"\nThe demo took {seconds:.0f} s. Where to look:")
    for outcome in outcomes:
        print(f"  {outcome.report}/report.html, {outcome.report}/comparison.html")
    print(f"  {command} board {OUTPUT}/swanlog    # the training in your browser")
    print("\nNext:")
    print(f'  {command} predict {last.run} --text "..."    # ask this model')
    print(f"  {command} init {last.task}    # a config and sample rows, to replace by yours")
    print(f"  {command} data check FILE.jsonl    # your own rows")
    print(f"  {command} train {last.task}.yaml")


def _shown(measure: dict[str, float]) -> str:
    return f"{measure['value']:.3f}  [{measure['low']:.3f}, {measure['high']:.3f}]"


def main() -> None:
    """One demo, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", nargs="?", default="classification", help=", ".join(DEMOS))
    parser.add_argument("--accept-license", help="gemma, to accept the terms of pocket-zh")
    given = parser.parse_args()
    names = configs_of(given.demo)
    license_name = accept_license(given.demo, given.accept_license)
    quiet_libraries()
    started = time.monotonic()
    outcomes = [run_task(name, license_name) for name in names]
    for outcome in outcomes:
        print_outcome(outcome)
    print_next(outcomes, time.monotonic() - started)


if __name__ == "__main__":
    try:
        main()
    except LabeltuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
