"""One process of a job of two: python ranks_worker.py JOBS.json. Its trainings run one after the other, as imports take long.

A job: `config` (path), `resume`, `environment` (what a launcher sets), and `signal`: what the second process sends itself in the
third step. accelerate has FSDP for accelerators only: with
ACCELERATE_USE_FSDP it is told that this is a job of such; everything behind that, sharding included, is the real thing on gloo.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState

import labeltune
from labeltune.commands.main import run_app
from labeltune.config import load_config
from labeltune.distributed import is_sharded
from labeltune.training.trainer import LabelTrainer

torch.set_num_threads(1)
prepare = PartialState._prepare_backend


def prepare_backend(self: PartialState, *given: Any) -> Any:
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return ("gloo", DistributedType.MULTI_GPU) if sharded else prepare(self, *given)


PartialState._prepare_backend = prepare_backend
training_step = LabelTrainer.training_step


def watched_step(self: LabelTrainer, *given: Any, **named: Any) -> Any:
    if job.get("signal") and self.state.global_step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), job["signal"])
    assert is_sharded(self.model) == ("ACCELERATE_USE_FSDP" in job["environment"]), "the weights are sharded"
    return training_step(self, *given, **named)


LabelTrainer.training_step = watched_step


def train() -> None:
    """The command's own way, errors included."""
    labeltune.train(load_config(job["config"]), resume=job["resume"])


for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    before = dict(os.environ)
    os.environ.update(job["environment"])
    command = typer.Typer()
    command.command()(train)
    sys.argv[1:] = []
    try:
        run_app(command)
    except SystemExit as end:
        if end.code:
            raise
    os.environ.clear()
    os.environ.update(before)
