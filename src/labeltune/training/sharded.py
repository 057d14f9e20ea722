"""FSDP2: parameters are DTensors, of which every process holds a part. What is saved is whole, in the files of one process.

So a checkpoint is resumed by any number of processes, sharded or not, and read by everybody who reads PEFT folders.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from labeltune.errors import ModelError
from labeltune.ranks import rank


def whole(tensor: Any) -> Any:
    """A tensor as it is in one process; all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def reshard(model: Any) -> None:
    """Let go of the parameters that stay whole between passes, so that the model's parameters are its DTensors again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_weights(model: Any) -> dict[str, Any]:
    """The weights that a checkpoint needs, by name, whole and on the CPU, on the first process: one at a time goes over the wire.

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


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors on the CPU; empty on other processes than the first."""
    state: dict[int, dict[str, Any]] = {}
    given = optimizer.state_dict()
    for number, values in given["state"].items():
        state[number] = {}
        for key, value in values.items():
            full = whole(value)
            if rank() == 0:
                state[number][key] = full.cpu() if hasattr(full, "cpu") else full
    return {"state": state, "param_groups": given["param_groups"]} if rank() == 0 else {}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer of sharded parameters the state of a checkpoint; every process has read the file."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        for key, value in values.items():
            if getattr(value, "shape", None) == parameter.shape:
                values[key] = _part(value, parameter)
    optimizer.load_state_dict(state)


def load_weights(model: Any, folder: Path) -> None:
    """Give a model whose weights are shared out the trained weights of a checkpoint of the same run.

    Raises:
        ModelError: the checkpoint lacks some of them.
    """
    import torch

    reshard(model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        names = get_peft_model_state_dict(model, state_dict=names)
    with torch.no_grad(), _gathered_by_deepspeed(list(names.values())):
        for name, value in _tensors(folder):
            if name in names:
                parameter = names.pop(name)
                parameter.copy_(_part(value.to(parameter.dtype), parameter))
    if names:
        raise ModelError(f"{folder} lacks {', '.join(sorted(names)[:3])}; go on from another checkpoint")


def _gathered_by_deepspeed(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """ZeRO-3's parameters are whole inside; what the first process writes there is handed out."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)  # type: ignore[no-any-return]


def _tensors(folder: Path) -> Any:
    """Name and value of every tensor in a checkpoint's safetensors files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def _part(value: Any, parameter: Any) -> Any:
    """This process's part of a whole tensor, as a DTensor like the parameter; a plain tensor for a plain one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
