"""The whole job on a small model: check the data, fine-tune, measure, compare with the untuned model, predict.

Run by `make demo` (English rows on `pocket`) and `make demo DEMO=zh` (Chinese rows on `pocket-zh`, after its licence).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeltune.cli.quiet import quiet_libraries
from labeltune.config import RunConfig, load_config
from labeltune.errors import LabeltuneError

HERE = Path(__file__).resolve().parent
OUTPUT = Path("demo-output")
TASKS = {"classification": "accuracy", "ner": "span_f1"}


@dataclass(frozen=True)
class Outcome:
    """What one task came to."""

    task: str
    metric: str
    after: dict[str, Any]
    comparison: dict[str, Any]
    report: Path
    seconds: float
    shown: list[tuple[str, str]]


def accept_license(language: str) -> str | None:
    """Ask about the Gemma terms before anything of that model is fetched."""
    if language != "zh":
        return None
    print("pocket-zh is Gemma 3 270M, under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")
    if "--accept-license=gemma" in sys.argv:
        return "gemma"
    if not sys.stdin.isatty():
        raise LabeltuneError(
            "nobody is here to accept the terms; run: make demo DEMO=zh ACCEPT_LICENSE=gemma"
        )
    return (
        "gemma"
        if input("Have you read them, and do you accept them? [y/N] ").strip().lower() == "y"
        else None
    )


def run_task(language: str, task: str, license_name: str | None) -> Outcome:
    """Check, fine-tune, measure, compare, predict."""
    from labeltune import load_predictor, recipes

    path = HERE / f"{language}_{task}.yaml"
    overrides = [
        f"data.train={HERE}/data/{language}_{task}_train.jsonl",
        f"data.test={HERE}/data/{language}_{task}_test.jsonl",
    ]
    overrides += [f"output_dir={OUTPUT}/{language}-{task}", f"swanlab.log_dir={OUTPUT}/swanlog"]
    if license_name is not None:
        overrides.append(f"hub.accept_license={license_name}")
    config = load_config(path, overrides)
    assert config.data.test is not None
    started = time.monotonic()
    check(config)

    print(f"\n== {task}: fine-tuning", flush=True)
    result = recipes.train(config, overwrite=True)
    print(f"\n== {task}: the tuned model on the test rows", flush=True)
    common = {"train_data": config.data.train} if task == "ner" else {}
    report = OUTPUT / f"{language}-{task}-report"
    after = recipes.evaluate(result.best, config.data.test, output=report, **common)
    print(f"\n== {task}: the untuned model against the tuned one", flush=True)
    comparison = recipes.compare("base", result.best, config.data.test, output=report)

    texts = [row.text for row in _some_rows(config, 3)]
    with load_predictor(result.best) as predictor:
        predictions = predictor.predict(texts)
    shown = [(t, p.label or p.answer) for t, p in zip(texts, predictions, strict=True)]
    return Outcome(task, TASKS[task], after, comparison, report, time.monotonic() - started, shown)


def check(config: RunConfig) -> None:
    """`labeltune data check` on train and test rows."""
    from labeltune import recipes

    print(f"\n== {config.task}: checking the data", flush=True)
    for rows in recipes.check_data(config, config.data.train, config.data.test):
        audit = rows.audit
        print(
            f"{audit.path}: {audit.rows} rows, {audit.errors} errors, {audit.warnings} warnings, {len(audit.labels)} labels"
        )


def _some_rows(config: RunConfig, count: int) -> list[Any]:
    from labeltune.data.loading import load_rows

    assert config.data.test is not None
    rows = load_rows(config.data.test, config.task, config.data)
    step = len(rows.dataset) // count
    return [rows.example(index * step) for index in range(count)]


def print_outcome(outcome: Outcome) -> None:
    """Before and after on the same rows, beside what no learning would score, and three predictions."""
    after, found = outcome.after[outcome.metric], outcome.comparison["differences"][outcome.metric]
    change = found["difference"]
    print(f"\n{outcome.task}, {outcome.after['rows']} test rows, {outcome.metric} with 95 % interval")
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
    print(f"  report: {outcome.report}/report.html, comparison.html")
    for text, answer in outcome.shown:
        print(f"\n  {text}\n  -> " + answer.replace("\n", "\n     "))


def _shown(measure: dict[str, float]) -> str:
    return f"{measure['value']:.3f}  [{measure['low']:.3f}, {measure['high']:.3f}]"


def main() -> None:
    """Both tasks of one language."""
    language = next((a for a in sys.argv[1:] if not a.startswith("-")), "en")
    if language not in ("en", "zh"):
        raise LabeltuneError(f"DEMO={language} is unknown; it is en or zh")
    license_name = accept_license(language)
    quiet_libraries()
    started = time.monotonic()
    outcomes = [run_task(language, task, license_name) for task in TASKS]
    for outcome in outcomes:
        print_outcome(outcome)
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s. Look at the runs in your browser:")
    print(f"  {Path(sys.executable).parent / 'labeltune'} board {OUTPUT}/swanlog")


if __name__ == "__main__":
    try:
        main()
    except LabeltuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
