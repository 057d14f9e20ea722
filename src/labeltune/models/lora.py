"""Adapters: attach one to a base model, load one from a checkpoint."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import peft
import torch
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers.pytorch_utils import Conv1D

from labeltune.config import LoraConfig
from labeltune.errors import ModelError, first_line
from labeltune.io.hubs import PICKLES
from labeltune.io.outputs import write_bytes, write_json
from labeltune.io.run_folder import ADAPTER_FILE, ADAPTER_WEIGHTS

try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # peft 0.18
    convert_peft_config_for_transformers = None

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: The value of `lora.target_modules` that stands for `linear_layers`.
ALL_LINEAR = "all-linear"
#: What peft puts in front of the names of a model that it wraps, and what models that read images too have in those of their text part.
_WRAPPED, TEXT_PART = "base_model.model.", "language_model."
#: Where a module reads the weights of a layer of its own without calling it.
_READS_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape)\b)")


def attach_adapter(model: PreTrainedModel, lora: LoraConfig, *, quantized: bool = False) -> Any:
    """Wrap a causal language model in a fresh LoRA adapter (arXiv:2106.09685); only the adapter is trained.

    Adapter weights are fp32 whatever the base model's type is, so that small updates are not lost.

    Raises:
        ModelError: `lora.target_modules` names no layer of this model, or one that cannot have an adapter.
    """
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    fitting = linear_layers(model)
    targets: str | list[str] = fitting
    if lora.target_modules != ALL_LINEAR:
        targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    elif not fitting:
        raise ModelError(
            "lora.target_modules=all-linear finds no layer of this model that can have an adapter; name layers, or train "
            "all weights with training.method=full"
        )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=_outside_language_model(model),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
    )
    try:
        with _without_warnings():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(_why_not(error, fitting, lora, config)) from error
    # peft keeps the names in sets and saves them in their order, which changes from process to process; a checkpoint's
    # adapter_config.json has to have the same bytes whichever process wrote it.
    for names in ("target_modules", "target_parameters"):
        if isinstance(getattr(config, names, None), set):
            setattr(config, names, sorted(getattr(config, names)))
    return adapted


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The layers of the language model that `lora.target_modules=all-linear` stands for.

    Left out are layers that would be no linear layer with an adapter: those with a forward of their own (a router that returns
    several values), those whose weights another layer reads without calling them (a state-space layer's output, in its fused
    kernel), those that run without gradients (what chooses the tokens of sparse attention), and on mixtures of experts what peft takes for an expert's projection.
    """
    decoder = language_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    found = []
    for parent in decoder.modules():
        if _runs_without_gradients(type(parent)):
            continue
        read = _weights_read_by(type(parent))
        for name, layer in parent.named_children():
            if layer is not output and name not in read and _is_linear(layer):
                found.append(names[id(layer)])
    return _without_experts(model, list(dict.fromkeys(found)))


def _is_linear(layer: torch.nn.Module) -> bool:
    """Whether an adapter can stand for the layer: it gives one tensor of its size, as a router that is a linear layer does not."""
    if not isinstance(layer, (torch.nn.Linear, Conv1D)):
        return False
    if "modeling_" not in type(layer).__module__:  # PyTorch's own, or a quantized one
        return True
    weight = layer.weight
    with torch.no_grad():
        found = layer(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    return isinstance(found, torch.Tensor) and found.shape == (1, weight.shape[0])


def _weights_read_by(kind: type[torch.nn.Module]) -> set[str]:
    """Names of the layers of a module whose weights its methods read."""
    found: set[str] = set()
    for name, method in vars(kind).items():
        if inspect.isfunction(method) and not name.startswith(("__init__", "_init", "reset_")):
            found |= set(_READS_WEIGHT.findall(_source(method)))
    return found


def _runs_without_gradients(kind: type[torch.nn.Module]) -> bool:
    return "no_grad" in _source(kind.forward).partition("def ")[0]


def _source(method: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):  # made at run time
        return ""


def _without_experts(model: PreTrainedModel, names: list[str]) -> list[str]:
    """What is left once peft has taken some names for those of experts, which it adapts as whole tensors (without dropout)."""
    if convert_peft_config_for_transformers is None or not names:
        return names
    probe = peft.LoraConfig(target_modules=names)
    convert_peft_config_for_transformers(probe, model, None)
    return [name for name in names if name in probe.target_modules]


def language_model(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that reads text; all of one that reads nothing else."""
    found: torch.nn.Module = model
    if model.config.get_text_config() is not model.config:
        found = model.get_decoder() or model
    return found


def _outside_language_model(model: PreTrainedModel) -> str | None:
    """A regular expression for the layers of a model that reads images or sound too which no text goes through."""
    decoder = language_model(model)
    if decoder is model:
        return None
    inside = {id(module) for module in decoder.modules()}
    holds_it = {
        name for name, module in model.named_modules() if any(part is decoder for part in module.modules())
    }
    outside = [
        name
        for name, module in model.named_modules()
        if name
        and id(module) not in inside
        and name not in holds_it
        and name.rpartition(".")[0] in holds_it
        and module is not model.get_output_embeddings()
    ]
    return "|".join(rf"{re.escape(name)}(\..*)?" for name in sorted(outside)) or None


def _why_not(error: ValueError, fitting: list[str], lora: LoraConfig, config: peft.LoraConfig) -> str:
    """What to tell of layers that peft refuses.

    Args:
        fitting: layers that can have an adapter.
    """
    if getattr(config, "target_parameters", None) and (lora.dropout or lora.dora):
        unfit = f"lora.dropout={lora.dropout:g}" if lora.dropout else "lora.dora=true"
        return (
            f"lora.target_modules={lora.target_modules!r} names experts, which this model keeps in whole tensors: {unfit} does not "
            f"work with them. Set {'lora.dropout=0' if lora.dropout else 'lora.dora=false'}, or lora.target_modules=all-linear, "
            "which leaves experts as they are"
        )
    names = ", ".join(sorted({name.rpartition(".")[2] for name in fitting}))
    return (
        f"lora.target_modules={lora.target_modules!r} does not fit this model: {first_line(error)}; "
        f"what fits: all-linear, or some of {names}"
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """peft asks transformers for things by names that transformers is about to drop, and complains of patterns for experts that it made
    itself; nobody else can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        yield


@contextlib.contextmanager
def uncast_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Inside, which on CUDA must be under autocast or have all weights in one format, adapters there take inputs as they come.

    peft makes fp32 of them, drops out, and autocast makes its own format of the result: the same for more memory traffic. Dropout on the CPU
    rounds what it scales, and DoRA computes in fp32, so these are left as they are.
    """
    if next(model.parameters()).device.type != "cuda":
        yield
        return
    if model not in _ADAPTERS:
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        _ADAPTERS[model] = [layer for layer in layers if not any(layer.use_dora.values())]
    for layer in _ADAPTERS[model]:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in _ADAPTERS[model]:
            layer.cast_input_dtype_enabled = True


#: Of a model that has been asked for: thousands of modules are walked for them.
_ADAPTERS: WeakKeyDictionary[torch.nn.Module, list[LoraLayer]] = WeakKeyDictionary()


def load_adapter(model: PreTrainedModel, folder: Path, name: str = "default") -> Any:
    """Wrap a base model in the adapter of a checkpoint folder; a model that is wrapped already gets one more, by another name.

    Raises:
        ModelError: the adapter is missing, damaged, or made for another model.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model*") if p.suffix in PICKLES)
        reason = (
            f"only {', '.join(pickles)}, a pickle, which is never loaded" if pickles else "it is incomplete"
        )
        raise ModelError(f"{folder} holds no adapter_model.safetensors: {reason}")
    try:
        names = layer_names(folder, model)
        if not names:
            return _load_adapter(model, folder, name)
        with tempfile.TemporaryDirectory(prefix="labeltune-adapter-") as renamed:
            write_renamed(folder, Path(renamed), names)
            return _load_adapter(model, Path(renamed), name)
    except Exception as error:
        raise ModelError(f"the adapter in {folder} does not fit its base model: {error}") from error


def _load_adapter(model: PreTrainedModel, folder: Path, name: str) -> Any:
    with _without_warnings():
        if not isinstance(model, peft.PeftModel):
            return peft.PeftModel.from_pretrained(model, str(folder), name)
        model.load_adapter(str(folder), name, torch_device=str(model.device))
        return model


def layer_names(folder: Path, model: torch.nn.Module) -> dict[str, str]:
    """The adapted layers of a folder -> what `model` calls them, where that differs because the one is the text part alone and the other
    the whole model that reads images too; empty where no name differs."""
    known = {name for name, _ in model.named_modules()}
    if isinstance(model, peft.PeftModel):
        known = {name.removeprefix(_WRAPPED) for name in known}
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as opened:
        layers = {_layer_of(key) for key in opened.keys()}  # noqa: SIM118
    if layers <= known:
        return {}
    by_part = {name.replace(TEXT_PART, ""): name for name in known}
    found = {layer: by_part.get(layer.replace(TEXT_PART, ""), "") for layer in layers}
    return found if all(found.values()) else {}


def _layer_of(key: str) -> str:
    """The layer that weights of an adapter belong to."""
    return key.removeprefix(_WRAPPED).rpartition(".lora_")[0]


def write_renamed(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """An adapter's config and weights with other names of its layers."""
    config = json.loads((source / ADAPTER_FILE).read_text(encoding="utf-8"))
    write_json(target / ADAPTER_FILE, {**config, "target_modules": sorted(names.values())})
    weights = {
        key.replace(_layer_of(key), names[_layer_of(key)]): tensor
        for key, tensor in load_file(source / ADAPTER_WEIGHTS).items()
    }
    write_bytes(target / ADAPTER_WEIGHTS, save(weights, {"format": "pt"}))


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model with an adapter the adapter weights of a checkpoint of the same run."""
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))


def merge_adapter(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """The base model with the adapter as part of its weights: every adapted layer is merged in fp32, then rounded to `dtype`.

    Raises:
        ModelError: the adapter is of a kind that cannot be merged, or not finite.
    """
    embedding = model.get_input_embeddings().weight.data_ptr()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        # Experts are tensors of a layer, each with a wrapper around it.
        inner, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        # fp32 weights are merged where they are; those of the input embedding would take the merge there as well.
        weight = getattr(inner, name).detach()
        whole = weight.clone() if weight.data_ptr() == embedding else weight.to(torch.float32)
        setattr(inner, name, torch.nn.Parameter(whole.to(torch.float32), requires_grad=False))
        try:
            layer.merge()
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"the adapter cannot be merged: {error}") from error
        merged_weight = getattr(inner, name).detach()
        if not bool(merged_weight.isfinite().all()):
            raise ModelError("the adapter cannot be merged: it makes weights that are not finite")
        setattr(inner, name, torch.nn.Parameter(merged_weight.to(dtype), requires_grad=False))
    merged = model.unload()
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if merged.config.tie_word_embeddings and outputs is not None and inputs.weight is not outputs.weight:
        merged.config.tie_word_embeddings = False
    return merged
