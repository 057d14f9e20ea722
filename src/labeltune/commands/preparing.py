"""What comes before the first training step: rows, prompts, tokens, and the model that will be trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.commands.rows import report_splits
from labeltune.config import RunConfig
from labeltune.data.loading import Splits, load_splits
from labeltune.errors import MissingExtraError
from labeltune.io.progress import begin
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder

if TYPE_CHECKING:
    from datasets import Dataset

    from labeltune.models.precision import Precision

Say = Callable[[str], None]


def check_tracker(config: RunConfig) -> None:
    """Raises MissingExtraError where the tracker is not installed."""
    if config.tracking in ("wandb", "tensorboard") and importlib.util.find_spec(config.tracking) is None:
        raise MissingExtraError(f"tracking={config.tracking}", config.tracking)


def read_rows(config: RunConfig, say: Say) -> Splits:
    """The checked rows, split into training and validation.

    Raises:
        DataError: rows are faulty, and `data.on_error` is `stop`.
    """
    begin("checking the rows")
    splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    report_splits(splits, say)
    return splits


def load_prompts(config: RunConfig, labels: tuple[str, ...]) -> tuple[Path, PromptBuilder]:
    """The base model's folder, and the builder of prompts with its tokenizer."""
    begin("loading libraries and the tokenizer")
    from labeltune.models.hub import load_tokenizer, resolve_model
    from labeltune.prompts.template import ChatTemplate

    folder = resolve_model(config.model, config.hub).folder
    template = ChatTemplate(load_tokenizer(folder, config.hub.trust_remote_code))
    return folder, PromptBuilder(make_task(config.task, labels, config.prompt), template)


def tokenize_splits(
    config: RunConfig, splits: Splits, builder: PromptBuilder, say: Say
) -> tuple[Dataset, Dataset | None]:
    """Tokens of the training rows and of the validation rows (None without any), as `tokenize_rows` has them."""
    from labeltune.training.dataset import tokenize_rows

    begin("tokenizing the rows")
    train, account = tokenize_rows(splits.train, builder, config.data.workers)
    validation = splits.validation
    if validation is not None:
        validation, _ = tokenize_rows(validation, builder, config.data.workers)
    say(
        f"tokens: {account.tokens} in {account.rows} rows, {account.answer_tokens} of them answers; "
        f"{account.shortened} texts were shortened to fit prompt.max_length={config.prompt.max_length}"
    )
    if account.cut_entities:
        say(
            f"warning: {account.cut_entities} entities stand in text that was cut away but are still asked for; "
            "raise prompt.max_length"
        )
    return train, validation


def load_for_training(config: RunConfig, folder: Path, precision: Precision, say: Say) -> Any:
    """The model in `folder` with the weights that will be trained, and with the run's random state."""
    from transformers import set_seed

    from labeltune.models.hub import load_model
    from labeltune.models.lora import attach_adapter

    set_seed(config.training.seed)
    begin("loading the model", say)
    quantized = config.training.method == "qlora"
    model = load_model(
        folder, precision.weights, trust_remote_code=config.hub.trust_remote_code, four_bit=quantized
    )
    if config.training.method != "full":
        model = attach_adapter(model, config.lora, quantized=quantized)
    trained, total = count_parameters(model)
    say(
        f"model: {config.model}, {total:,} weights, {trained:,} trained ({precision.name} on {precision.device})"
    )
    return model


def count_parameters(model: Any) -> tuple[int, int]:
    """(weights that are trained, weights in all)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
