"""One trial: a run of its own, and what came of it."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from labeltune import recipes
from labeltune.config import RunConfig
from labeltune.errors import Interrupted, LabeltuneError, SweepError, first_line
from labeltune.run_folder import write_text
from labeltune.sweep.search import with_values

if TYPE_CHECKING:
    from labeltune.training.run import TrainResult

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        seconds: from the beginning to the end of the trial, loading included.
        metric: name of the validation metric; None for a failed trial.
        value: the metric of the trial's best checkpoint.
        failure: why it failed, in one line.
    """

    seconds: float
    metric: str | None = None
    value: float | None = None
    direction: Direction = "maximize"
    failure: str | None = None


def validation_metric(result: TrainResult) -> tuple[str, float, Direction]:
    """Name and value of the metric that picked the run's best checkpoint, and which way is better.

    Raises:
        SweepError: there is none, or it is not finite: the training has diverged.
    """
    name, value = result.metric_name, result.metric
    if name is None or value is None:
        raise SweepError("the run measured nothing on validation rows")
    if not math.isfinite(value):
        raise SweepError(f"{name} is {value}: the training diverged")
    if not math.isfinite(result.train_loss):
        raise SweepError(f"the training loss is {result.train_loss}: the training diverged")
    return name, value, "minimize" if name == "loss" else "maximize"


def trial_name(number: int) -> str:
    """Name of a trial's folder."""
    return f"trial-{number:04d}"


def trial_config(config: RunConfig, folder: Path, number: int, values: Mapping[str, str]) -> RunConfig:
    """The config of a trial: its values, an output folder and a SwanLab experiment of its own.

    Raises:
        ConfigError: the values do not go together.
    """
    changed = with_values(config, values, trial_name(number))
    shown = " ".join(f"{key}={shown_value(text)}" for key, text in values.items())
    tracker = changed.swanlab.model_copy(
        update={
            "experiment": f"{trial_name(number)} {shown}"[:200],
            "group": config.swanlab.group or folder.resolve().name,
        }
    )
    output = str(folder / trial_name(number))
    return changed.model_copy(update={"output_dir": output, "swanlab": tracker})


def shown_value(text: str) -> str:
    """A value for people: long fractions rounded to four digits."""
    try:
        return f"{float(text):.4g}" if len(text) > 6 else text
    except ValueError:
        return text


def run_trial(
    base: RunConfig, folder: Path, number: int, values: Mapping[str, str], say: Callable[[str], None]
) -> Outcome:
    """Train with these values; whatever goes wrong belongs to this trial alone and is part of its outcome.

    Raises:
        Interrupted, KeyboardInterrupt: Ctrl-C.
    """
    started = time.monotonic()
    try:
        result = recipes.train(trial_config(base, folder, number, values), overwrite=True, say=say)
        name, value, direction = validation_metric(result)
    except Interrupted:
        raise
    except LabeltuneError as error:
        return Outcome(time.monotonic() - started, failure=" ".join(str(error).split()))
    except Exception as error:
        # Out of memory at this rank, a layer name that peft does not find: the others go on, and the whole story is kept.
        write_text(folder / trial_name(number) / "error.txt", traceback.format_exc())
        return Outcome(time.monotonic() - started, failure=first_line(error))
    finally:
        _free_memory()
    return Outcome(time.monotonic() - started, name, value, direction)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
