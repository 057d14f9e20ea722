"""The whole job on a small model: check the data, fine-tune, measure against the untuned model, show three predictions.

Run by `make demo` (classification), `make demo DEMO=ner`, `DEMO=zh` (Chinese rows on `pocket-zh`, after its licence) and
`DEMO=all`.
"""

from __future__ import annotations

import argparse
import shutil
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
from labeltune.messages import language, spoken

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
#: The lines of the table: (English, Chinese).
LINES = {
    "before": ("before", "微调前"),
    "after": ("after", "微调后"),
    "difference": ("difference", "差值"),
    "majority": ("majority", "多数类"),
    "uniform_guess": ("guessing", "随机猜测"),
    "linear": ("linear model", "线性模型"),
    "crf": ("CRF", "条件随机场"),
    "dictionary": ("dictionary", "实体词典"),
}
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
    say(name, told("checking the data", "检查数据"))
    examples = check(config)
    say(name, told("fine-tuning", "微调"))
    result = labeltune.train(config, overwrite=True)
    with load_predictor(result.best) as predictor:
        say(
            name,
            told(
                f"the tuned model answers {len(examples)} test rows",
                f"微调后的模型回答 {len(examples)} 条测试数据",
            ),
        )
        predictions = predictor.predict(examples)
        after = labeltune.evaluate(predictor, test, output=report, predictions=predictions)
        say(name, told("the untuned model answers them", "未微调的模型回答同样的数据"))
        comparison = labeltune.compare("base", predictor, test, output=report, predictions=predictions)
    some = range(0, len(examples), len(examples) // SHOWN)[:SHOWN]
    shown = [(examples[i].text, predictions[i].label or predictions[i].answer) for i in some]
    return Outcome(config.task, after, comparison, run, report, shown)


def check(config: RunConfig) -> list[Any]:
    """`labeltune data check` on train and test rows; gives the test rows."""
    import labeltune

    checked = labeltune.check_data(config, config.data.train, config.data.test)
    for rows in checked:
        audit = rows.audit
        print(
            told(
                f"{audit.path}: {audit.rows} rows, {audit.errors} errors, {audit.warnings} warnings, {len(audit.labels)} labels",
                f"{audit.path}：{audit.rows} 行，{audit.errors} 处错误，{audit.warnings} 处警告，{len(audit.labels)} 个标签",
            )
        )
    return [checked[-1].example(i) for i in range(len(checked[-1].dataset))]


def told(english: str, chinese: str) -> str:
    """What is said, in the user's language."""
    return chinese if language() == "zh" else english


def line(name: str, value: str) -> str:
    """A line of the table; a Chinese character is as wide as two others."""
    shown = told(*LINES[name])
    wide = sum(ord(character) > 0x2E80 for character in shown)
    return f"  {shown}{' ' * (18 - len(shown) - wide)}{value}"


def say(name: str, what: str) -> None:
    """The heading of a phase."""
    print(f"\n== {name}: {what}", flush=True)


def print_outcome(outcome: Outcome) -> None:
    """Before and after on the same rows, beside what guessing and a linear model score, and three predictions."""
    metric = METRICS[outcome.task]
    after, found = outcome.after[metric], outcome.comparison["differences"][metric]
    change = found["difference"]
    rows = outcome.after["rows"]
    print(
        told(
            f"\n{outcome.task}, {rows} test rows, {metric} with 95 % interval",
            f"\n{outcome.task}：{rows} 条测试数据，{metric} 及 95% 置信区间",
        )
    )
    print(line("before", f"{found['first']:.3f}"))
    print(line("after", _shown(after)))
    interval = f"[{change['low']:+.3f}, {change['high']:+.3f}]"
    print(line("difference", f"{change['value']:+.3f}  {interval}  p = {found['p_value']:.2g}"))
    baselines = outcome.after["baselines"]
    for name, value in baselines.items():
        print(line(name, _shown(value)))
    bar = max(value["value"] for value in baselines.values())
    better = change["low"] > 0 and after["low"] > bar
    print(
        told(
            f"  {'clearly' if better else 'NOT clearly'} better: the difference's lower end {change['low']:+.3f}, to be above 0; "
            f"after's {after['low']:.3f}, to be above {bar:.3f}",
            f"  {'明显' if better else '并未明显'}更好：差值区间的下限为 {change['low']:+.3f}（应大于 0），微调后区间的下限为 {after['low']:.3f}（应大于 {bar:.3f}）",
        )
    )
    for text, answer in outcome.shown:
        print(f"\n  {text}\n  -> " + answer.replace("\n", "\n     "))


def print_next(outcomes: Sequence[Outcome], seconds: float) -> None:
    """Where to look, and how to go on with rows of one's own."""
    here = Path(sys.executable).parent / "labeltune"
    command = "labeltune" if shutil.which("labeltune") == str(here) else here
    last = outcomes[-1]
    print(
        told(f"\nThe demo took {seconds:.0f} s. Where to look:", f"\n演示用时 {seconds:.0f} 秒。查看结果：")
    )
    for outcome in outcomes:
        print(f"  {outcome.report}/report.html, {outcome.report}/comparison.html")
    print(
        f"  {command} board {OUTPUT}/swanlog    # {told('the training in your browser', '在浏览器中看训练过程')}"
    )
    print(told("\nNext:", "\n接下来："))
    print(f'  {command} predict {last.run} --text "..."    # {told("ask this model", "用这个模型预测")}')
    print(
        f"  {command} init {last.task}    # {told('a config and sample rows, to replace by yours', '配置和示例数据，可换成自己的')}"
    )
    print(f"  {command} data check FILE.jsonl    # {told('your own rows', '检查自己的数据')}")
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
    with spoken("stderr"):
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
