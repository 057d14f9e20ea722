"""What cannot go well, said before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labeltune.config import RunConfig
from labeltune.errors import ConfigError, first_line
from labeltune.modeling.lora import attach_adapter
from labeltune.modeling.precision import Precision
from labeltune.training.planner import steps_in_all
from labeltune.training.trainer import training_arguments


def check_feasible(
    config: RunConfig, precision: Precision, model: Path, rows: int, has_validation: bool
) -> None:
    """Find what the libraries would refuse only after the weights are loaded, and what would train nothing.

    Args:
        model: the base model's folder, of which only `config.json` is read.
        rows: number of training rows.

    Raises:
        ConfigError: the schedule is unknown, or needs what has no key here; warm-up takes the whole run.
        ModelError: `lora.target_modules` names no layer of this model.
    """
    training_arguments(config, precision, has_validation)
    options = config.training
    steps = steps_in_all(rows, options)
    if options.warmup_steps >= steps:
        raise ConfigError(
            f"training.warmup_steps={options.warmup_steps} is no less than the {steps} steps of this run "
            f"({rows} rows, {options.batch_size} a step, {options.epochs:g} epochs): the learning rate would never be "
            "reached. Lower it"
        )
    _check_scheduler(options.scheduler, options.warmup_steps, steps)
    if options.method != "full" and config.lora.target_modules != "all-linear":
        attach_adapter(_without_weights(model, config.hub.trust_remote_code), config.lora)


def _check_scheduler(name: str, warmup: int, steps: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, warmup, steps)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training.scheduler={name} cannot be used: {first_line(error)}") from error


def _without_weights(folder: Path, trust_remote_code: bool) -> Any:
    """The model's layers on torch's meta device, where they take no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=trust_remote_code)
