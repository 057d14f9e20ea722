"""A run on disk -> a predictor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from labeltune.config import HubConfig, RunConfig, changed_generation
from labeltune.inference.calibration import Calibration, linear_of
from labeltune.inference.fingerprint import fingerprint
from labeltune.inference.predictor import Predictor
from labeltune.io.outputs import is_hub_name
from labeltune.io.run_folder import ADAPTER_WEIGHTS, MANIFEST_FILE, RunInfo, find_checkpoint
from labeltune.models.hub import load_model, load_tokenizer, resolve_model, snapshot
from labeltune.models.lora import load_adapter, merge_adapter
from labeltune.models.precision import pick_precision
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder, builder_for_base
from labeltune.prompts.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_predictor(
    run: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    base_folder: str | os.PathLike[str] | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Predictor:
    """Load a checkpoint (or the best one of a run folder) with the base model it was trained on.

    Args:
        run: `output/Qwen2`, `output/Qwen2/checkpoint-100`, or a checkpoint on a hub, `ms:org/name` or `hf:org/name`.
        device: `cuda`, `cpu` ...; the best there is when None.
        precision: `auto`, `bf16`, `fp16` or `fp32`.
        base_folder: where the base model's files are, when they have moved since training.
        merge: make an adapter part of fp32 weights, which is faster and the same up to rounding; there is no untuned model to
            go back to then. Other weights are left as they are, as the merge would be rounded to them.
        trust_remote_code: run the Python code of a model whose run asks for it, as `LABELTUNE_TRUST_REMOTE_CODE=1` does.

    Raises:
        HubError: the hub cannot be reached or has no such checkpoint.
        ModelError: there is no complete checkpoint, or its base model cannot be found.
    """
    folder = checkpoint_of(run)
    info = RunInfo.load(folder)
    picked = pick_precision(precision, device=device)
    where = picked.device
    trust = info.runs_code(trust_remote_code)
    if info.adapter:
        base = Path(base_folder) if base_folder is not None else resolve_model(info.model, info.hub).folder
        model = load_adapter(load_model(base, picked.weights, trust_remote_code=trust), folder)
        if merge and model.get_base_model().dtype == torch.float32:
            model = merge_adapter(model, torch.float32)
        model.to(where)
    else:
        model = load_model(folder, picked.weights, device=where, trust_remote_code=trust)
    model.eval()
    return predictor_on(model, folder, trust_remote_code)


def predictor_on(model: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> Predictor:
    """A checkpoint's predictor on a model that has its weights already.

    Raises:
        ModelError: the checkpoint is incomplete or damaged.
    """
    info, calibration = RunInfo.load(folder), Calibration.load(folder)
    task = make_task(info.task, info.labels, info.prompt, info.entities)
    return Predictor(
        model,
        task,
        run_template(folder, info, trust_remote_code),
        info.generation,
        columns=info.columns,
        calibrate=info.calibrate,
        calibration=calibration,
        linear=linear_of(folder, calibration),
        source=info.model,
        weights=weights_file(folder, info),
        encoding=info.encoding,
        format_name=info.rows_format,
    )


def run_template(folder: Path, info: RunInfo, trust_remote_code: bool = False) -> ChatTemplate:
    """The tokenizer of a checkpoint with the template that the run was trained with.

    Raises:
        ModelError: the tokenizer is missing or damaged.
    """
    return ChatTemplate.of_run(info, load_tokenizer(folder, info.runs_code(trust_remote_code)))


def weights_file(folder: Path, info: RunInfo) -> Path:
    """The file whose hash tells a checkpoint's weights from others: of a whole model, the sums of a checkpoint's files where
    they are, as an index of weights in several files is the same for any two trainings."""
    if info.adapter:
        return folder / ADAPTER_WEIGHTS
    names = (MANIFEST_FILE, "model.safetensors", "model.safetensors.index.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])


def load_changed(run: str, changes: dict[str, Any]) -> Predictor:
    """The predictor of `labeltune predict`: a run's with other values for keys of `generation`, its adapter merged.

    A worker on another machine can call it.
    """
    predictor = load_predictor(run, merge=True)
    predictor.change(**changes)
    return predictor


def run_fingerprint(run: str, changes: dict[str, Any]) -> str:
    """`fingerprint` of what `load_changed` would load, without loading weights.

    Raises:
        ConfigError: a change is not possible.
        HubError: the hub cannot be reached or has no such checkpoint.
        ModelError: there is no complete checkpoint.
    """
    folder = checkpoint_of(run)
    info = RunInfo.load(folder)
    return fingerprint(
        info.model,
        weights_file(folder, info),
        task=make_task(info.task, info.labels, info.prompt, info.entities),
        template=run_template(folder, info),
        generation=changed_generation(info.generation, changes),
        calibrate=info.calibrate,
        calibration=Calibration.load(folder),
    )


def checkpoint_of(run: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that `run` means, fetched when it is on a hub (`ms:org/name`, `hf:org/name`).

    Raises:
        HubError: the hub cannot be reached or has no such checkpoint.
        ModelError: there is no complete checkpoint.
    """
    return find_checkpoint(snapshot(str(run), HubConfig()) if is_hub_name(str(run)) else run)


def base_predictor(config: RunConfig, labels: Sequence[str]) -> Predictor:
    """The untuned model of a config, asked with the config's prompt: what a run starts from."""
    local = resolve_model(config.model, config.hub)
    picked = pick_precision(config.training.precision)
    trust = config.hub.trust_remote_code
    model = load_model(local.folder, picked.weights, device=picked.device, trust_remote_code=trust)
    model.eval()
    return predictor_as(config, model, builder_for_base(config, labels, load_tokenizer(local.folder, trust)))


def predictor_as(config: RunConfig, model: PreTrainedModel, builder: PromptBuilder) -> Predictor:
    """A model that is no checkpoint, asked as a config says."""
    return Predictor(
        model,
        builder.task,
        builder.template,
        config.generation,
        columns=config.data.columns,
        calibrate=config.calibrate,
        source=config.model,
        encoding=config.data.encoding,
        format_name="rows" if config.data.format == "rows" else "auto",
    )
