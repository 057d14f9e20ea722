"""Weights & Biases: the only module that imports wandb."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from labeltune.evaluation.summary import Evaluation
from labeltune.tracking.charts import texts

#: The axis that transformers' callback gives to everything.
_STEP = "train/global_step"


class WandbTracker:
    """One run in Weights & Biases, in the project that `WANDB_PROJECT` names.

    Args:
        name: the run's name; wandb makes one up when None.
        run_config: everything about the run; shown in its config.
    """

    def __init__(self, name: str | None, run_config: dict[str, Any]) -> None:
        self.name, self.run_config = name, run_config

    def start(self) -> str:
        """Open the run."""
        project = os.environ.get("WANDB_PROJECT", "huggingface")
        wandb.init(project=project, name=self.name, config=self.run_config)
        return f"Weights & Biases: run {wandb.run.name} in project {project}"

    def callbacks(self) -> list[TrainerCallback]:
        """Transformers' own, which goes on in the open run."""
        return [WandbCallback()]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers, by training step."""
        wandb.log({**values, _STEP: step})

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """A table of rows."""
        self._log_table("Prediction", ("row", "text"), texts, step)

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Per-label figures, confusion matrix and reliability, each a table."""
        for name, lines in texts(evaluation.metrics).items():
            self._log_table(name, ("of", "figures"), lines, step)

    def _log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[tuple[str, str]], step: int
    ) -> None:
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        wandb.log({name: table, _STEP: step})

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run; one that ended with an error is shown as failed."""
        wandb.finish(exit_code=0 if error is None else 1)
