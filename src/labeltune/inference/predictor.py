"""A loaded checkpoint that answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from labeltune.config import ColumnsConfig, GenerationConfig, RunConfig
from labeltune.errors import ModelError
from labeltune.inference.generation import generate_answers
from labeltune.modeling.hub import load_model, load_tokenizer, resolve_model
from labeltune.modeling.lora import load_adapter
from labeltune.modeling.precision import pick_precision
from labeltune.prompts.template import ChatTemplate
from labeltune.run_folder import RunInfo, find_checkpoint
from labeltune.tasks import make_task
from labeltune.tasks.base import Task
from labeltune.tasks.builder import PromptBuilder
from labeltune.types import Example, Prediction


class Predictor:
    """Answers texts with the prompt, labels and template of a run.

    Args:
        model: a causal language model, with or without an adapter.
        task: the prompt builder and parser.
        template: the tokenizer and its chat template.
        generation: batch size and length of answers.
        columns: names of the columns in the run's data files.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        template: ChatTemplate,
        generation: GenerationConfig | None = None,
        columns: ColumnsConfig | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.template = template
        self.generation = generation or GenerationConfig()
        self.columns = columns or ColumnsConfig()
        self.builder = PromptBuilder(task, template)

    def predict(
        self,
        texts: str | Iterable[str | Example],
        labels: Sequence[str] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """One prediction a text, in order.

        Args:
            texts: documents, or examples (their candidates are used; their right answers are not looked at).
            labels: candidates for documents that bring none; the run's label set when None.
            on_batch: called with the number of rows after each batch.

        Raises:
            DataError: there are no labels to choose from.
            PromptError: instruction and candidates alone exceed the length budget.
        """
        examples = [
            self._example(i, text, labels)
            for i, text in enumerate([texts] if isinstance(texts, str) else texts)
        ]
        prompts = [self.builder.prompt(example).ids for example in examples]
        answers = generate_answers(
            self.model,
            self.template.tokenizer,
            prompts,
            stop_ids=self._stop_ids(),
            max_new_tokens=self._max_new_tokens(examples),
            batch_size=self.generation.batch_size,
            on_batch=on_batch,
        )
        decode = self.template.tokenizer.decode
        return [
            self.task.parse(
                example, decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
            for example, ids in zip(examples, answers, strict=True)
        ]

    def base_model(self) -> AbstractContextManager[Any]:
        """Inside this context the adapter is switched off: the untuned model answers.

        Raises:
            ModelError: the run trained all weights, so there is no untuned model to go back to.
        """
        if hasattr(self.model, "disable_adapter"):
            return self.model.disable_adapter()  # type: ignore[no-any-return]
        raise ModelError("this run has no adapter to switch off")

    def _example(self, number: int, text: str | Example, labels: Sequence[str] | None) -> Example:
        if isinstance(text, Example):
            return text
        return Example(str(number), text, tuple(labels or ()))

    def _stop_ids(self) -> list[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        extra = configured if isinstance(configured, list) else [] if configured is None else [configured]
        return list(dict.fromkeys([*self.template.stop_ids, *extra]))

    def _max_new_tokens(self, examples: Sequence[Example]) -> int:
        if self.task.name == "ner":
            return self.generation.max_new_tokens
        return max(self.builder.reserve(example) for example in examples) if examples else 1

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model's memory."""
        import gc

        import torch

        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_predictor(
    run: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: Any = "auto",
    base_folder: str | os.PathLike[str] | None = None,
) -> Predictor:
    """Load a checkpoint (or the best one of a run folder) with the base model it was trained on.

    Args:
        run: `output/Qwen2`, `output/Qwen2/checkpoint-100` ...
        device: `cuda`, `cpu` ...; the best there is when None.
        precision: `auto`, `bf16`, `fp16` or `fp32`.
        base_folder: where the base model's files are, when they have moved since training.

    Raises:
        ModelError: there is no complete checkpoint, or its base model cannot be found.
    """
    folder = find_checkpoint(run)
    info = RunInfo.load(folder)
    picked = pick_precision(precision)
    where = device or picked.device
    trust = info.hub.trust_remote_code
    if info.adapter:
        base = Path(base_folder) if base_folder is not None else resolve_model(info.model, info.hub).folder
        model = load_adapter(load_model(base, picked.weights, trust_remote_code=trust), folder).to(where)
    else:
        model = load_model(folder, picked.weights, device=where, trust_remote_code=trust)
    model.eval()
    tokenizer = load_tokenizer(folder, trust)
    tokenizer.chat_template = info.chat_template
    task = make_task(info.task, info.labels, info.prompt)
    return Predictor(model, task, ChatTemplate(tokenizer), info.generation, info.columns)


def base_predictor(config: RunConfig, labels: Sequence[str]) -> Predictor:
    """The untuned model of a config, asked with the config's prompt: what a run starts from."""
    local = resolve_model(config.model, config.hub)
    picked = pick_precision(config.training.precision)
    trust = config.hub.trust_remote_code
    model = load_model(local.folder, picked.weights, device=picked.device, trust_remote_code=trust)
    model.eval()
    template = ChatTemplate(load_tokenizer(local.folder, trust))
    task = make_task(config.task, labels, config.prompt)
    return Predictor(model, task, template, config.generation, config.data.columns)
