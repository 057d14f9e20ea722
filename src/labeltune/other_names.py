"""What Hugging Face, LLaMA-Factory and ms-swift call things, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable

HF, LF, SWIFT = "Hugging Face", "LLaMA-Factory", "ms-swift"
_ALL = f"{HF}, {LF}, {SWIFT}"
_LF_SWIFT = f"{LF}, {SWIFT}"

#: name -> (who calls it so, our key, what to know beside). The value is taken over as it is, but for `_VALUES`.
KEYS: dict[str, tuple[str, str, str]] = {
    "model_name_or_path": (f"{HF}, {LF}", "model", ""),
    "model_id": (SWIFT, "model", ""),
    "model_id_or_path": (SWIFT, "model", ""),
    "model_revision": (_ALL, "hub.revision", ""),
    "cache_dir": (f"{HF}, {LF}", "hub.cache_dir", ""),
    "trust_remote_code": (_ALL, "hub.trust_remote_code", ""),
    "dataset": (_LF_SWIFT, "data.train", "a file, or ms:org/name or hf:org/name"),
    "dataset_name": (HF, "data.train", "a file, or ms:org/name or hf:org/name"),
    "train_file": (HF, "data.train", ""),
    "eval_dataset": (LF, "data.validation", ""),
    "val_dataset": (SWIFT, "data.validation", ""),
    "validation_file": (HF, "data.validation", ""),
    "test_file": (HF, "data.test", ""),
    "val_size": (LF, "data.validation_fraction", "a share of the rows"),
    "split_dataset_ratio": (SWIFT, "data.validation_fraction", ""),
    "max_samples": (LF, "data.max_rows", ""),
    "max_train_samples": (HF, "data.max_rows", ""),
    "preprocessing_num_workers": (f"{HF}, {LF}", "data.workers", ""),
    "dataset_num_proc": (SWIFT, "data.workers", ""),
    "text_column_name": (HF, "data.columns.text", ""),
    "label_column_name": (HF, "data.columns.output", ""),
    "system": (SWIFT, "prompt.system", ""),
    "default_system": (LF, "prompt.system", ""),
    "cutoff_len": (LF, "prompt.max_length", ""),
    "max_length": (f"{HF}, {SWIFT}", "prompt.max_length", ""),
    "max_seq_length": (HF, "prompt.max_length", ""),
    "max_seq_len": (HF, "prompt.max_length", ""),
    "model_max_length": (HF, "prompt.max_length", ""),
    "truncation_strategy": (SWIFT, "prompt.truncation", "head, tail or head_tail"),
    "lora_rank": (_LF_SWIFT, "lora.r", ""),
    "lora_r": (HF, "lora.r", ""),
    "lora_alpha": (_ALL, "lora.alpha", ""),
    "lora_dropout": (_ALL, "lora.dropout", ""),
    "lora_target": (LF, "lora.target_modules", ""),
    "lora_target_modules": (HF, "lora.target_modules", ""),
    "target_modules": (f"{HF}, {SWIFT}", "lora.target_modules", ""),
    "use_rslora": (_ALL, "lora.rslora", ""),
    "use_dora": (_ALL, "lora.dora", ""),
    "finetuning_type": (LF, "training.method", "lora, qlora or full"),
    "train_type": (SWIFT, "training.method", "lora, qlora or full"),
    "tuner_type": (SWIFT, "training.method", "lora, qlora or full"),
    "sft_type": (SWIFT, "training.method", "lora, qlora or full"),
    "quantization_bit": (LF, "training.method", "4 bits are qlora; there are no 8"),
    "quant_bits": (SWIFT, "training.method", "4 bits are qlora; there are no 8"),
    "load_in_4bit": (HF, "training.method", "4 bits are qlora"),
    "num_train_epochs": (_ALL, "training.epochs", ""),
    "num_epochs": (HF, "training.epochs", ""),
    "per_device_train_batch_size": (
        _ALL,
        "training.batch_size",
        "examples per optimizer step, over all devices and accumulated batches",
    ),
    "gradient_accumulation_steps": (
        _ALL,
        "training.batch_size",
        "examples per optimizer step; what fits into memory at once is found out by itself",
    ),
    "lr": (HF, "training.learning_rate", ""),
    "lr_scheduler_type": (_ALL, "training.scheduler", ""),
    "warmup_ratio": (_ALL, "training.warmup_steps", "a number of steps, not a share"),
    "label_smoothing_factor": (_ALL, "training.label_smoothing", ""),
    "precision": (HF, "training.precision", ""),
    "bf16": (_ALL, "training.precision", "auto takes bf16 where the card has it"),
    "fp16": (_ALL, "training.precision", "auto takes fp16 where the card has no bf16"),
    "torch_dtype": (f"{HF}, {SWIFT}", "training.precision", ""),
    "compute_dtype": (LF, "training.precision", ""),
    "pure_bf16": (LF, "training.precision", ""),
    "torch_compile": (_ALL, "training.compile", ""),
    "ddp_timeout": (_ALL, "training.collective_timeout", ""),
    "group_by_length": (HF, "training.packing", "rows are packed, not padded, anyway"),
    "evaluation_strategy": (HF, "training.save_steps", "validation runs at each checkpoint"),
    "eval_strategy": (_ALL, "training.save_steps", "validation runs at each checkpoint"),
    "eval_steps": (_ALL, "training.save_steps", "validation runs at each checkpoint"),
    "save_strategy": (_ALL, "training.save_steps", "a number of steps, or epoch"),
    "metric_for_best_model": (_ALL, "eval.metric", ""),
    "early_stopping_patience": (HF, "eval.patience", ""),
    "early_stop_interval": (SWIFT, "eval.patience", ""),
    "per_device_eval_batch_size": (_ALL, "generation.batch_size", ""),
    "eval_batch_size": (HF, "generation.batch_size", ""),
    "report_to": (_ALL, "tracking", "swanlab, tensorboard, wandb or none"),
    "use_swanlab": (LF, "tracking", ""),
    "run_name": (_ALL, "swanlab.experiment", ""),
    "swanlab_project": (_LF_SWIFT, "swanlab.project", ""),
    "swanlab_exp_name": (SWIFT, "swanlab.experiment", ""),
    "swanlab_run_name": (LF, "swanlab.experiment", ""),
    "swanlab_mode": (_LF_SWIFT, "swanlab.mode", "auto, online, local or offline"),
    "logging_dir": (HF, "swanlab.log_dir", ""),
}

#: name -> (who calls it so, what to do instead): what needs no key here.
NO_KEY: dict[str, tuple[str, str]] = {
    "load_best_model_at_end": (_ALL, "the best checkpoint is always kept, as `best` in output_dir"),
    "greater_is_better": (HF, "each figure of eval.metric knows its direction"),
    "flash_attn": (LF, "the attention is picked by itself"),
    "attn_implementation": (HF, "the attention is picked by itself"),
    "attn_impl": (SWIFT, "the attention is picked by itself"),
    "template": (_LF_SWIFT, "the chat template is the model's own, saved with the adapter"),
    "model_type": (SWIFT, "it is read from the model's files"),
    "num_labels": (f"{HF}, {SWIFT}", "labels are counted in the rows; data.labels=[A, B] fixes them"),
    "problem_type": (
        f"{HF}, {SWIFT}",
        "task=classification gives each row one label; there is no other kind",
    ),
    "task_type": (f"{HF}, {SWIFT}", "task=classification or task=ner says what is learnt"),
    "stage": (LF, "training is always supervised (sft)"),
    "do_train": (f"{HF}, {LF}", "labeltune train trains"),
    "do_eval": (f"{HF}, {LF}", "labeltune evaluate RUN measures"),
    "do_predict": (f"{HF}, {LF}", "labeltune predict RUN FILE predicts"),
    "optim": (_ALL, "the optimizer is AdamW"),
    "deepspeed": (_ALL, "give it to accelerate launch; docs/distributed.md shows how"),
    "fsdp": (HF, "give it to accelerate launch; docs/distributed.md shows how"),
    "dataset_dir": (LF, "write the path into data.train"),
    "overwrite_output_dir": (f"{HF}, {LF}", "labeltune train --overwrite"),
    "resume_from_checkpoint": (_ALL, "labeltune train --resume goes on from the last checkpoint"),
    "push_to_hub": (_ALL, "labeltune export RUN FOLDER --push hf:org/name"),
    "adapter_name_or_path": (LF, "labeltune predict, evaluate and serve take the run folder"),
    "adapters": (SWIFT, "labeltune predict, evaluate and serve take the run folder"),
    "plot_loss": (LF, "labeltune board shows the curves"),
    "remove_unused_columns": (HF, "columns that are not named in data.columns are not read"),
    "dataloader_num_workers": (
        _ALL,
        "tokens are read from disk; data.workers is for checking and tokenizing",
    ),
    "neftune_noise_alpha": (_ALL, "there is no such noise here"),
    "ignore_data_skip": (HF, "labeltune train --resume begins behind the rows that were seen"),
}


def _on(value: object, ours: str) -> str:
    return ours if str(value).lower() in ("true", "1", "yes", "none", "") else "auto"


def _method(value: object) -> str:
    return "lora" if str(value).lower() in ("false", "0", "none", "") else "qlora"


def _dtype(value: object) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(str(value), "auto")


def _one_of(*ours: str) -> Callable[[object], str | None]:
    return lambda value: str(value) if str(value) in ours else None


def _targets(value: object) -> str:
    if str(value) in ("all", "all-linear"):
        return "all-linear"
    names = value if isinstance(value, list | tuple) else str(value).split(",")
    return f"[{', '.join(str(name).strip() for name in names)}]"


def _metric(value: object) -> str:
    name = str(value).removeprefix("eval_")
    return name if name in ("loss", "accuracy", "macro_f1") else "auto"


#: Names -> their value here, where it is another one; None to show the key without one.
_SAME_VALUES: dict[tuple[str, ...], Callable[[object], str | None]] = {
    ("bf16", "pure_bf16"): lambda value: _on(value, "bf16"),
    ("fp16",): lambda value: _on(value, "fp16"),
    ("torch_dtype", "compute_dtype"): _dtype,
    ("quantization_bit", "quant_bits", "load_in_4bit"): _method,
    ("finetuning_type", "train_type", "tuner_type", "sft_type"): _one_of("lora", "qlora", "full"),
    ("lora_target", "target_modules", "lora_target_modules"): _targets,
    ("eval_strategy", "evaluation_strategy", "save_strategy"): lambda value: (
        "epoch" if str(value) == "epoch" else "100"
    ),
    ("warmup_ratio", "truncation_strategy", "group_by_length"): lambda value: None,
    ("use_swanlab",): lambda value: "swanlab" if _on(value, "on") == "on" else "none",
    ("report_to",): _one_of("none", "swanlab", "tensorboard", "wandb"),
    ("swanlab_mode",): lambda value: "online" if str(value) == "cloud" else str(value),
    ("metric_for_best_model",): _metric,
}
_VALUES = {name: value for names, value in _SAME_VALUES.items() for name in names}


def plain(name: str) -> str:
    """A name without dashes in front, section and spelling: `--training.num-train-epochs` -> `num_train_epochs`."""
    return name.lstrip("-").replace("-", "_").rpartition(".")[2].lower()


def our_name(name: str, value: object = None) -> str | None:
    """What other tools' name for a setting is here, in one sentence; None when it is nobody's name.

    Args:
        value: as it was given; None when it was left out.
    """
    found = plain(name)
    if found in NO_KEY:
        whose, instead = NO_KEY[found]
        return f"{found} ({whose}) needs no key here: {instead}"
    if found not in KEYS:
        return None
    whose, key, about = KEYS[found]
    shown = _VALUES.get(found, _shown)(value)
    return f"{found} ({whose}) is {key} here: {key}={'...' if shown is None else shown}" + (
        f" ({about})" if about else ""
    )


def _shown(value: object) -> str | None:
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)
