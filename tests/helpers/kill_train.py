"""Train a config and be killed (SIGKILL) at one moment of saving: python kill_train.py CONFIG MOMENT NUMBER [--resume]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import labeltune
from labeltune.config import load_config
from labeltune.training import checkpoints

path, moment, number, *rest = sys.argv[1:]
left = int(number)


def die() -> None:
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def after(reached: str) -> None:
    if reached == moment:
        die()


save = torch.save


def torn(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
    """Half of the optimizer's state is written."""
    save(value, file, *args, **kwargs)
    if moment == "torn" and str(file).endswith("optimizer.pt"):
        os.truncate(file, Path(file).stat().st_size // 2)
        die()


checkpoints.after = after
torch.save = torn
torch.set_num_threads(1)
labeltune.train(load_config(path), resume="--resume" in rest)
