"""A name for everything that answers follow from but the rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from labeltune.config import CalibrateConfig, GenerationConfig
from labeltune.inference.calibration import Calibration
from labeltune.io.outputs import file_hash
from labeltune.prompts import Task
from labeltune.prompts.ner import NerTask
from labeltune.prompts.template import ChatTemplate


def fingerprint(
    source: str,
    weights: Path | None,
    *,
    task: Task,
    template: ChatTemplate,
    generation: GenerationConfig,
    calibrate: CalibrateConfig,
    calibration: Calibration,
) -> str:
    """See `Predictor.fingerprint`; this one needs no model."""
    known = ""
    if weights is not None:
        known = file_hash(weights) if weights.exists() else str(weights.parent.resolve())
    settings = [generation, calibrate, task.prompt]
    values = [
        f"{source} {known}",
        *(s.model_dump_json() for s in settings),
        repr(isinstance(task, NerTask) and task.nested),
        repr(calibration),
        template.rendered,
    ]
    return hashlib.sha256("\n".join([*values, *task.labels]).encode()).hexdigest()
