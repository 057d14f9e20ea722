"""FSDP2: parameters are DTensors, of which every rank holds a part. Checkpoints hold full tensors, in the files that one process writes.

So a checkpoint can be resumed by any number of ranks, sharded or not, and read by everything that reads PEFT folders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from labeltune.distributed import rank
from labeltune.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from accelerate.state import AcceleratorState
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


#: The optimizer's and the scheduler's state of sharded weights, whole. It does not have the name of Trainer's own file, as
#: Trainer would load it on every device as a whole, which large models have no room for.
OPTIMIZER_FILE = "whole_optimizer.pt"


def whole(tensor: torch.Tensor) -> Any:
    """The full tensor of a DTensor; a collective, so all ranks must call it. Other tensors are returned as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_fsdp(accelerator_state: AcceleratorState) -> None:
    """Have FSDP2 round as a run without it does.

    Raises:
        ConfigError: it is FSDP 1.
    """
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigError("FSDP 1 is not supported; set fsdp_version: 2 as in configs/distributed/fsdp2.yaml")
    if plugin.mixed_precision_policy is not None:
        # Losses are not rounded to bf16, and gradients are added up over processes in fp32.
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


class WhenSharded(TrainerCallback):  # type: ignore[misc]
    """Calls `ready(model)` when training begins: from then on the model's weights are sharded."""

    def __init__(self, ready: Callable[[Any], None]) -> None:
        self.ready = ready

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: PreTrainedModel,
        **_: Any,
    ) -> None:
        """On all processes, before the first step."""
        register_fsdp_forward_method(model, "generate")
        self.ready(model)


def reshard(model: PreTrainedModel) -> None:
    """Free the parameters that stay gathered between passes, so that the model's parameters are its DTensors again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_weights(model: PreTrainedModel) -> dict[str, Any]:
    """The weights that a checkpoint needs, by name, as full tensors on the CPU of rank 0; gathered one at a time.

    These are the trained ones, and embeddings that carry an adapter, which peft saves with it.
    """
    reshard(model)
    adapted = [
        m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if hasattr(m, "base_layer")
    ]
    embeddings = {id(p) for module in adapted for p in module.parameters()}
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in embeddings:
            value = whole(parameter.detach())
            if rank() == 0:
                found[name] = value.cpu()
    return found


def save_optimizer(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler
) -> None:
    """Gather the optimizer's state into a checkpoint, where weights are sharded by FSDP2; all ranks must call it.

    Trainer has written only what rank 0 holds of it, from which no run could be resumed; that file is removed.
    """
    if not is_sharded_here(model.parameters()):
        return
    given = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for number, values in given["state"].items():
        state[number] = {}
        for key, value in values.items():
            full = whole(value)
            if rank() == 0:
                state[number][key] = full.cpu() if hasattr(full, "cpu") else full
    if rank() != 0:
        return
    saved = {
        "optimizer": {"state": state, "param_groups": given["param_groups"]},
        "scheduler": lr_scheduler.state_dict(),
    }
    torch.save(saved, folder / OPTIMIZER_FILE)
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink(missing_ok=True)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, lr_scheduler: LRScheduler) -> None:
    """Give an optimizer the state of a checkpoint that a run with sharded weights has saved (other ones are loaded by Trainer),
    and where this run's weights are sharded, to every process its part."""
    file = folder / OPTIMIZER_FILE
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if file.is_file():
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for number, values in saved["optimizer"]["state"].items():
            saved["optimizer"]["state"][number] = _parts(values, parameters[number])
        optimizer.load_state_dict(saved["optimizer"])
        lr_scheduler.load_state_dict(saved["scheduler"])
    elif is_sharded_here(parameters):
        for parameter, values in optimizer.state.items():
            optimizer.state[parameter] = _parts(values, parameter)


def is_sharded_here(parameters: Iterable[Any]) -> bool:
    """Whether FSDP2 has sharded some of these parameters."""
    return any(isinstance(p, DTensor) for p in parameters)


def _parts(values: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """An optimizer's state of one parameter, with tensors of the parameter's shape sharded like it."""
    return {
        key: _part(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
        for key, value in values.items()
    }


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load the trained weights of a checkpoint of the same run into a model with sharded weights.

    Raises:
        ModelError: the checkpoint lacks some of them.
    """
    reshard(model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if hasattr(model, "peft_config"):
        names = get_peft_model_state_dict(model, state_dict=names)
    with torch.no_grad(), _gathered_by_deepspeed(list(names.values())):
        for name, value in _tensors(folder):
            if name in names:
                parameter = names.pop(name)
                parameter.copy_(_part(value.to(parameter.dtype), parameter))
    if names:
        raise ModelError(f"{folder} lacks {', '.join(sorted(names)[:3])}; go on from another checkpoint")


def _gathered_by_deepspeed(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Inside, ZeRO-3's parameters are gathered; what rank 0 writes is broadcast."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)  # type: ignore[no-any-return]


def _tensors(folder: Path) -> Any:
    """Name and value of every tensor in a checkpoint's safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def _part(value: torch.Tensor, parameter: torch.Tensor) -> Any:
    """A full tensor, sharded as a DTensor like the parameter; a plain tensor for a plain parameter."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
