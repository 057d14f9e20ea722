"""An adapter becomes part of its base model's weights."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import GenerationConfig

from labeltune.errors import ModelError
from labeltune.export.folder import Dtype
from labeltune.inference.generation import stop_ids
from labeltune.io.run_folder import base_files
from labeltune.models.hub import load_model
from labeltune.models.lora import TEXT_PART, load_adapter, merge_adapter
from labeltune.models.precision import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from labeltune.prompts.template import ChatTemplate

_STORED: dict[str, Dtype] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def stored_dtype(folder: Path) -> Dtype:
    """The number format that most weights of a model folder are stored in, from the headers of its safetensors files.

    Raises:
        ModelError: a file is damaged, or the weights are quantized.
    """
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
        except Exception as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
    found = counts.most_common(1)[0][0] if counts else "nothing"
    if found not in _STORED:
        raise ModelError(
            f"{folder} stores its weights as {found}; an adapter can only be merged into bf16, fp16 or fp32 weights"
        )
    return _STORED[found]


def whole_model(
    base: Path,
    adapter: Path | None,
    dtype: Dtype,
    trust_remote_code: bool = False,
    published: Path | None = None,
) -> PreTrainedModel:
    """The base model with the adapter merged into it, on the CPU.

    The base is loaded as it is stored, as the class that it is published as, and every adapted layer is merged in fp32 and then rounded to `dtype`: the result is
    that of a merge in fp32 throughout, without the memory for it.

    Args:
        base: folder of the base model, or of a model whose weights were all trained.
        adapter: checkpoint with the adapter; None when there is none.
        published: folder of the model whose text part `base` is, all of its weights trained; the rest is taken from there.

    Raises:
        ModelError: the weights cannot be loaded, do not fit each other, or do not fit into `dtype`.
    """
    model = load_model(base, DTYPES[stored_dtype(base)], trust_remote_code=trust_remote_code, published=True)
    if published is not None:
        model = _with_text_part(published, model, trust_remote_code)
    if adapter is not None:
        model = merge_adapter(load_adapter(model, adapter), DTYPES[dtype])
    model.to(DTYPES[dtype])
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(
                f"{name} is not finite in {dtype}; export with --dtype bf16 or --dtype fp32"
                if dtype == "fp16"
                else f"{name} is not finite: the run's weights are damaged"
            )
    return model


def _with_text_part(published: Path, text: PreTrainedModel, trust_remote_code: bool) -> Any:
    """A published model with another text part."""
    model = load_model(
        published, DTYPES[stored_dtype(published)], trust_remote_code=trust_remote_code, published=True
    )
    places = {name.replace(TEXT_PART, ""): name for name in model.state_dict()}
    weights = text.state_dict()
    unknown = [name for name in weights if name.replace(TEXT_PART, "") not in places]
    if unknown:
        raise ModelError(f"{published} has no place for {unknown[0]} of the run's weights")
    model.load_state_dict(
        {places[name.replace(TEXT_PART, "")]: each for name, each in weights.items()}, strict=False
    )
    return model


def save_whole_model(model: PreTrainedModel, template: ChatTemplate, folder: Path, base: Path) -> None:
    """Write weights (safetensors), config, tokenizer and a generation config that ends answers as training did.

    Args:
        template: the run's `ChatTemplate`; its tokenizer is saved with its chat template.
        base: folder of the base model; its `tokenizer.model` is copied from there, and how one that reads images or sound prepares them.
    """
    tokenizer = template.tokenizer
    stop = stop_ids(model, template)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop if len(stop) > 1 else stop[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = model.config.get_text_config() is not model.config
    for path in base_files(base):
        if images or path.name == "tokenizer.model":
            shutil.copyfile(path, folder / path.name)
