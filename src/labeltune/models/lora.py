"""Adapters: attach one to a base model, load one from a checkpoint."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from labeltune.config import LoraConfig
from labeltune.errors import ModelError
from labeltune.io.hubs import PICKLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTER_FILE = "adapter_config.json"


def attach_adapter(model: PreTrainedModel, lora: LoraConfig, *, quantized: bool = False) -> Any:
    """Wrap a causal language model in a fresh LoRA adapter (arXiv:2106.09685); only the adapter is trained.

    Adapter weights are fp32 whatever the base model's type is, so that small updates are not lost.

    Raises:
        ModelError: `lora.target_modules` names no layer of this model.
    """
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
    )
    try:
        with _without_warnings():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(
            f"lora.target_modules={lora.target_modules!r} does not fit this model: {error}"
        ) from error
    # peft keeps the names in a set and saves them in its order, which changes from process to process; a checkpoint's
    # adapter_config.json has to have the same bytes whichever process wrote it.
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    return adapted


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """peft asks transformers for things by names that transformers is about to drop; nobody else can do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def load_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """Wrap a base model in the adapter of a checkpoint folder.

    Raises:
        ModelError: the adapter is missing, damaged, or made for another model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        pickles = sorted(p.name for p in folder.glob("adapter_model*") if p.suffix in PICKLES)
        reason = (
            f"only {', '.join(pickles)}, a pickle, which is never loaded" if pickles else "it is incomplete"
        )
        raise ModelError(f"{folder} holds no adapter_model.safetensors: {reason}")
    try:
        with _without_warnings():
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except Exception as error:
        raise ModelError(f"the adapter in {folder} does not fit its base model: {error}") from error


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a model with an adapter the adapter weights of a checkpoint of the same run."""
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def merge_adapter(model: PreTrainedModel, dtype: torch.dtype) -> Any:
    """The base model with the adapter as part of its weights: every adapted layer is merged in fp32, then rounded to `dtype`.

    Raises:
        ModelError: the adapter is of a kind that cannot be merged, or not finite.
    """
    embedding = model.get_input_embeddings().weight.data_ptr()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        inner = layer.get_base_layer()
        # fp32 weights are merged where they are; those of the input embedding would take the merge there as well.
        weight = inner.weight.detach()
        whole = weight.clone() if weight.data_ptr() == embedding else weight.to(torch.float32)
        inner.weight = torch.nn.Parameter(whole.to(torch.float32), requires_grad=False)
        try:
            layer.merge()
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"the adapter cannot be merged: {error}") from error
        if not bool(inner.weight.isfinite().all()):
            raise ModelError("the adapter cannot be merged: it makes weights that are not finite")
        inner.weight = torch.nn.Parameter(inner.weight.detach().to(dtype), requires_grad=False)
    merged = model.unload()
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if merged.config.tie_word_embeddings and outputs is not None and inputs.weight is not outputs.weight:
        merged.config.tie_word_embeddings = False
    return merged
