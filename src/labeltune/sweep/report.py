"""What a sweep leaves behind: the table, `trials.csv` and `best.yaml`."""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from labeltune.errors import SweepError
from labeltune.evaluation.summary import SELECTION
from labeltune.io.outputs import write_text
from labeltune.messages import localize
from labeltune.sweep.space import Sweep, with_values

State = Literal["finished", "failed", "interrupted", "running", "waiting"]


@dataclass(frozen=True)
class Trial:
    """A trial as it is kept.

    Attributes:
        values: key -> value, as it would be written in an override.
        score: the metric, turned so that higher is better.
        seconds: None when it was not trained to its end.
        reason: why it failed, or whose values it has.
    """

    number: int
    state: State
    values: dict[str, str] = field(default_factory=dict)
    metric: str | None = None
    value: float | None = None
    score: float | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that were asked for."""
        return self.state in ("finished", "failed")


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The finished trial with the best metric; the earlier one of two equal ones."""
    scored = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    return max(scored, key=lambda trial: (trial.score or 0.0, -trial.number), default=None)


def figure(trial: Trial) -> str:
    """A finished trial's metric, and where it comes from."""
    return f"{trial.metric} {trial.value:.4f} on {SELECTION}"


def write_results(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write `trials.csv`, and `best.yaml` when a trial has finished; both atomically.

    Raises:
        OutputError: the folder cannot be written.
    """
    keys = sweep.space.keys
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["trial", "state", *keys, "metric", "value", "measured_on", "seconds", "reason"])
    for trial in trials:
        seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
        values = [trial.values.get(key, "") for key in keys]
        measured = SELECTION if trial.value is not None else ""
        writer.writerow(
            [trial.number, trial.state, *values, trial.metric, trial.value, measured, seconds, trial.reason]
        )
    write_text(sweep.folder / "trials.csv", table.getvalue())
    best = best_trial(trials)
    if best is not None:
        write_text(sweep.folder / "best.yaml", _best_yaml(sweep, best, trials))


def _best_yaml(sweep: Sweep, best: Trial, trials: Sequence[Trial]) -> str:
    config = with_values(sweep.config, best.values, "best.yaml")
    config = config.model_copy(update={"output_dir": str(sweep.folder / "best-run")})
    finished = sum(trial.counts for trial in trials)
    head = (
        f"# Trial {best.number}, the best of {finished}: {figure(best)}. Launch it with:\n#\n"
        f"#   {train_command(sweep)}\n\n"
    )
    return head + yaml.safe_dump(
        config.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=110
    )


def train_command(sweep: Sweep) -> str:
    """The command that trains the best config."""
    return f"labeltune train {shlex.quote(str(sweep.folder / 'best.yaml'))}"


def print_table(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """All trials on standard output, best first, failed ones with their reason."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    metric = next((trial.metric for trial in trials if trial.metric), "metric")
    table = Table(title=localize(f"{metric} on {SELECTION}"), title_justify="left")
    table.add_column(localize("trial"), justify="right")
    for key in sweep.space.keys:
        table.add_column(key, justify="right", overflow="fold")
    table.add_column(metric, justify="right")
    table.add_column(localize("seconds"), justify="right")
    table.add_column(localize("state"), overflow="fold")
    for trial in sorted(trials, key=_order):
        state = localize(trial.state) + (f": {localize(trial.reason)}" if trial.reason else "")
        cells = [
            str(trial.number),
            *(shown_value(trial.values.get(key, "")) for key in sweep.space.keys),
            "" if trial.value is None else f"{trial.value:.4f}",
            "" if trial.seconds is None else f"{trial.seconds:.0f}",
            state,
        ]
        # A reason may hold [brackets], which are no markup.
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def _order(trial: Trial) -> tuple[bool, float, int]:
    return trial.score is None, -(trial.score or 0.0), trial.number


def shown_value(text: str) -> str:
    """A value for people: long fractions rounded to four digits."""
    try:
        return f"{float(text):.4g}" if len(text) > 6 else text
    except ValueError:
        return text


def conclude(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Print the table and what to do next.

    Raises:
        SweepError: no trial has finished.
    """
    print_table(sweep, [trial for trial in trials if trial.counts])
    best = best_trial(trials)
    if best is None:
        failed = next(trial for trial in trials if trial.state == "failed")
        raise SweepError(
            f"all trials failed; trial {failed.number}: {failed.reason} (to start over, delete {sweep.folder})"
        )
    print(localize(f"The best is trial {best.number}. Train its config: {train_command(sweep)}"))
    equal = [str(trial.number) for trial in trials if trial.score == best.score and trial is not best]
    if equal:
        print(localize(f"Equal to it are {', '.join(equal)}: the metric does not tell them apart."))
    rows = "" if sweep.config.data.test is not None else " --data FILE"
    print(
        localize(
            "Its figure picked it, so measure the result on rows that no trial has seen: "
            f"labeltune evaluate {shlex.quote(str(sweep.folder / 'best-run'))}{rows}"
        )
    )
