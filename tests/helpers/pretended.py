"""A pretended GPU: its tensors hold numbers of the CPU, say that they are on `cuda:0`, and may not meet tensors that are not.

Every operation on them is counted, and every time that Python would wait for a GPU is noted with its place: a value that is read,
or a copy from memory that is not pinned. It says nothing of speed, of memory, or of CUDA's own kernels.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import labeltune

PACKAGE = Path(labeltune.__file__).parent
DEVICE = torch.device("cuda", 0)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
#: Operations that only look at memory in another way, for which no kernel runs.
_VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unsqueeze", "unbind", "view", "_unsafe_view", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided",
}  # fmt: skip


class Tensor(torch.Tensor):
    """One of the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: type[Tensor], inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def data(self) -> Any:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Any) -> None:
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def __repr__(self, **_: Any) -> str:
        return f"pretended {self.inner!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        Device.active.wait("tolist")
        return self.inner.tolist()

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        Device.active.wait("cpu")
        return self.inner.detach().clone()

    def to(self, *given: Any, **named: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*given, **named)
        if device is not None and device.type == "cpu":
            found = self.cpu()
            return found if dtype is None else found.to(dtype)
        return self if dtype is None else super().to(dtype)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.active.run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """The device.

    Attributes:
        operations: how often each ran, views left out.
        waits: where Python waited: `operation in file:line`.
    """

    active: Device

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []

    def wait(self, what: str) -> None:
        """Python would stand still here."""
        # A clone is called labeltune too, so the name of a folder tells nothing.
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
        place = "?"
        if frames:
            place = f"{Path(frames[-1].filename).relative_to(PACKAGE).as_posix()}:{frames[-1].lineno}"
        self.waits.append(f"{what} in {place}")

    def sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device."""
        if isinstance(tensor, Tensor) or tensor.dim() == 0:
            return tensor
        self.wait(f"copy of {tuple(tensor.shape)}")
        return Tensor(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute on the CPU, as that device would refuse or wait."""
        flat = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        tensors = [each for each in flat if isinstance(each, torch.Tensor)]
        here = [each for each in tensors if isinstance(each, Tensor)]
        wanted = kwargs.get("device")
        to_cuda = wanted is not None and torch.device(wanted).type == "cuda"
        to_cpu = wanted is not None and torch.device(wanted).type == "cpu"
        if to_cpu and torch._C._current_graph_task_id() != -1:
            # A formula of autograd's own, in C++, where these tensors say that they are on the CPU.
            to_cuda, to_cpu = True, False
        if here and func._schema.name.startswith("aten::index"):
            # Indices may be on the CPU: they are copied, and Python waits.
            args = tree_map_only(torch.Tensor, self.sent, args)
        elif here and func not in _COPIES:
            strangers = [each for each in tensors if not isinstance(each, Tensor) and each.dim() > 0]
            if strangers:
                raise RuntimeError(f"{func} got tensors on cuda:0 and cpu: {strangers[0].shape}")
        if func is torch.ops.aten._local_scalar_dense.default and here:
            self.wait("item")
        if func is torch.ops.aten.nonzero.default and here:
            self.wait("nonzero")
        crossing = func in _COPIES and (len(here) not in (0, len(tensors)) or (to_cuda and not here))
        if crossing:
            source = tensors[-1] if func is torch.ops.aten.copy_.default else tensors[0]
            blocking = isinstance(source, Tensor) or not getattr(source, "pinned", False)
            if blocking and source.dim() > 0:
                self.wait(f"copy of {tuple(source.shape)}")
        if to_cuda:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        out = func(
            *tree_map_only(Tensor, lambda t: t.inner, args),
            **tree_map_only(Tensor, lambda t: t.inner, kwargs),
        )
        name = func._schema.name.partition("::")[2]
        if (here and not to_cpu) or to_cuda:
            if name.rstrip("_") not in _VIEWS:
                self.operations[name] += 1
            wrapped = tree_map_only(torch.Tensor, lambda t: t if isinstance(t, Tensor) else Tensor(t), out)
            return return_and_correct_aliasing(func, args, kwargs, wrapped) if here else wrapped
        return out


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Inside, there seems to be one GPU that computes in bf16."""
    cuda = torch.cuda
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: "pretended",
        "mem_get_info": lambda *_: (8 * 2**30, 8 * 2**30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: None,
        "_lazy_init": lambda: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
        if hasattr(cuda.random, name):
            monkeypatch.setattr(cuda.random, name, value)

    def pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        copied = tensor.clone()
        copied.pinned = True  # type: ignore[attr-defined]
        return copied

    begin = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *given: Any, **named: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *given, **named)

    save = safetensors.torch.save_file

    def saved(tensors: dict[str, torch.Tensor], *given: Any, **named: Any) -> None:
        save({k: t.inner if isinstance(t, Tensor) else t for k, t in tensors.items()}, *given, **named)

    product = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, out_dtype: Any = None, **named: Any) -> torch.Tensor:
        if out_dtype is None:
            return product(left, right, **named)
        with torch.autocast("cpu", enabled=False):
            return product(left.to(out_dtype), right.to(out_dtype))

    move = torch.nn.Module.to

    def moved(module: torch.nn.Module, *given: Any, **named: Any) -> torch.nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*given, **named)
        if device is None or device.type != "cuda":
            return move(module, *given, **named)
        if dtype is not None:
            move(module, dtype)
        made: dict[int, Any] = {}
        for part in module.modules():
            for names in (part._parameters, part._buffers):
                for name, held in names.items():
                    if held is None or isinstance(held, Tensor):
                        continue
                    if id(held) not in made:
                        there: Any = Tensor(held.detach())
                        if isinstance(held, torch.nn.Parameter):
                            there = torch.nn.Parameter(there, requires_grad=held.requires_grad)
                        made[id(held)] = held, there
                    names[name] = made[id(held)][1]
        return module

    # These build a tensor of the CPU first, below every mode.
    for name in ("tensor", "as_tensor"):
        build = getattr(torch, name)

        def built(data: Any, *given: Any, build: Any = build, device: Any = None, **named: Any) -> Any:
            if isinstance(data, Tensor):
                return data if named.get("dtype") is None else data.to(named["dtype"])
            made = build(data, *given, **named)
            return made if device is None else made.to(torch.device(device))

        monkeypatch.setattr(torch, name, built)
    # Views of other tensors cannot be wrapped in inference mode.
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    grouped = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype

    def of_device(*given: Any, **named: Any) -> Any:
        return {(DEVICE, dtype): group for (_, dtype), group in grouped(*given, **named).items()}

    monkeypatch.setattr(torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", of_device)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.autocast, "__init__", autocast)
    monkeypatch.setattr(safetensors.torch, "save_file", saved)
    monkeypatch.setattr("peft.peft_model.safe_save_file", saved)
    Device.active = Device()
    with Device.active as device:
        yield device
