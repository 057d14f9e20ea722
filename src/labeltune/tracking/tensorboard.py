"""TensorBoard: event files in the run folder, below `runs/`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from labeltune.evaluation.summary import Evaluation
from labeltune.tracking.charts import texts


class TensorboardTracker:
    """One folder of event files: `TENSORBOARD_LOGGING_DIR`, or one with the time and the machine's name in `output_dir/runs`.

    Args:
        run_config: everything about the run; shown as a text.
    """

    writer: SummaryWriter

    def __init__(self, run_config: dict[str, Any], output_dir: Path) -> None:
        self.run_config, self.output_dir = run_config, output_dir

    def start(self) -> str:
        """Open the folder."""
        own = self.output_dir / "runs" / f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}"
        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", own)).expanduser()
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text(
            "labeltune", _verbatim(json.dumps(self.run_config, indent=2, ensure_ascii=False))
        )
        return f"TensorBoard: watch the run with: tensorboard --logdir {folder}"

    def callbacks(self) -> list[TrainerCallback]:
        """Transformers' own, which writes into the same files."""
        return [TensorBoardCallback(self.writer)]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """One text with all rows."""
        self._log_text("Prediction", texts, step)

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Per-label figures, confusion matrix and reliability, each a text."""
        for name, lines in texts(evaluation.metrics).items():
            self._log_text(name, lines, step)

    def _log_text(self, name: str, lines: Sequence[tuple[str, str]], step: int) -> None:
        shown = "\n\n".join(_verbatim(f"{caption}:\n{text}") for caption, text in lines)
        self.writer.add_text(name, shown, step)

    def finish(self, error: BaseException | None = None) -> None:
        """Write everything to the disk."""
        self.writer.close()


def _verbatim(text: str) -> str:
    """Text that TensorBoard's Markdown leaves as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
