"""What `train` and `plan` do before the first step: rows are read, checked and tokenized, and the model is loaded."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig, TaskName, TrainingConfig, load_config
from labeltune.data.columns import first_values
from labeltune.data.columns import guess_task as guess_row
from labeltune.data.labels import by_count, not_among
from labeltune.data.loading import Splits, evenly, load_splits, stratum
from labeltune.data.schemas import Fault
from labeltune.data.sources import resolve_data
from labeltune.distributed import rank
from labeltune.errors import ConfigError, MissingExtraError, PromptError, counted, listed
from labeltune.io.progress import Say, begin, tell
from labeltune.io.run_folder import RunInfo, public_name
from labeltune.models.kernels import missing_kernels
from labeltune.models.pocket import check_spec, tell_terms
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder, builder_for_base
from labeltune.prompts.template import ChatTemplate
from labeltune.prompts.weights import AnswerWeights, balanced, balanced_each
from labeltune.types import Example

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    from labeltune.models.precision import Precision


#: Training rows that are looked at to tell what script they are written in.
SCRIPT_ROWS = 200


def tell_on_main(line: str) -> None:
    """Tell the user, once in a job of several processes."""
    if rank() == 0:
        tell(line)


def read_rows(config: RunConfig, say: Say) -> Splits:
    """The checked rows, split into training and validation.

    Raises:
        ConfigError: a key names a label that is not there.
        DataError: rows are faulty, and `data.on_error` is `stop`.
        LicenseError, ModelError: the model's name alone shows that it cannot be used.
        MissingExtraError: the tracker is not installed.
    """
    if config.tracking in ("wandb", "tensorboard") and importlib.util.find_spec(config.tracking) is None:
        raise MissingExtraError(f"tracking={config.tracking}", config.tracking)
    check_spec(config.model, config.hub.accept_license)
    tell_terms(config.model, config.hub.accept_license)
    begin("checking the rows")
    splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    check_labels_named(config, splits.labels)
    report_splits(splits, say)
    return splits


def check_labels_named(config: RunConfig, labels: Sequence[str]) -> None:
    """Whether the labels that keys of the config name are there.

    Raises:
        ConfigError: one is not; the message names it and its key.
    """
    whose = "data.labels" if config.data.labels is not None else "the labels of the training rows"
    weights = config.training.class_weights
    named = {
        "prompt.descriptions": [*config.prompt.descriptions],
        "training.class_weights": [] if isinstance(weights, str) else [*weights],
    }
    for key, names in named.items():
        for label in names:
            if label not in labels:
                raise ConfigError(f"{key} names an unknown label: {not_among(label, labels, whose)}")


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is loaded.

    Attributes:
        config: the one given, with numbers in place of `auto`.
        base: folder of the base model.
        splits: the rows that fit `prompt.max_length`.
        selection: the validation rows that are predicted again and again, whose figure picks the best checkpoint.
    """

    config: RunConfig
    base: Path
    builder: PromptBuilder
    splits: Splits
    selection: list[Example]

    @property
    def precision(self) -> Precision:
        """What is computed in on this machine. It starts CUDA, so ask when no more processes are forked."""
        from labeltune.models.precision import pick_precision

        options = self.config.training
        return pick_precision(options.precision, full=options.method == "full")

    @property
    def info(self) -> RunInfo:
        """What prediction needs beside the weights."""
        template = self.builder.template
        about = summarize(self.config, self.splits)
        return RunInfo.of(
            self.config, self.splits.labels, template.tokenizer.chat_template, about, template.answer_lead
        )

    def where(self, number: int) -> str:
        """Place of a training row, for messages."""
        return str(self.splits.train[number]["source"])


def prepare(config: RunConfig, all_rows: Splits, say: Say, resume_from: Path | None = None) -> Prepared:
    """Find the base model and its prompts, and leave out the rows that cannot fit.

    Args:
        resume_from: the checkpoint whose template goes on.

    Raises:
        ModelError: the model cannot be found, or not be trained as the config says.
        PromptError: a row cannot fit, and `data.on_error` is `stop`.
    """
    base, builder = load_prompts(config, all_rows.labels, resume_from)
    from labeltune.training.preflight import check_layers, settled

    check_layers(config, base)
    splits = without_too_long(all_rows, builder, config, say)
    config = settled(config, len(splits.train), len(splits.labels), base, say)
    selection = validation_rows(splits, config.eval.max_rows)
    warn_of_rows(config, splits, selection, say)
    return Prepared(config, base, builder, splits, selection)


def load_prompts(
    config: RunConfig, labels: tuple[str, ...], resume_from: Path | None = None
) -> tuple[Path, PromptBuilder]:
    """The base model's folder, and the builder of prompts with its tokenizer.

    Args:
        resume_from: the checkpoint whose template goes on.
    """
    begin("loading libraries and the tokenizer")
    from labeltune.models.hub import load_tokenizer, resolve_model

    folder = resolve_model(config.model, config.hub).folder
    tokenizer = load_tokenizer(folder, config.hub.trust_remote_code)
    if resume_from is None:
        return folder, builder_for_base(config, labels, tokenizer)
    template = ChatTemplate.of_run(RunInfo.load(resume_from), tokenizer)
    return folder, PromptBuilder(
        make_task(config.task, labels, config.prompt, config.data.entities), template
    )


def tokenize_splits(
    config: RunConfig, splits: Splits, builder: PromptBuilder, say: Say
) -> tuple[Dataset, Dataset | None]:
    """Tokens of the training rows and of the validation rows (None without any), as `tokenize_rows` has them.

    Class weights and label smoothing are for training rows only, so that validation losses of different runs compare.
    """
    from labeltune.training.dataset import tokenize_rows

    begin("tokenizing the rows")
    weights = training_weights(config.training, splits.train)
    if weights.classes:
        low, high = min(weights.classes, key=weights.of), max(weights.classes, key=weights.of)
        say(f"class weights: from {weights.of(low):.3g} ({low}) to {weights.of(high):.3g} ({high})")
    weighing = PromptBuilder(builder.task, builder.template, weights)
    train, account = tokenize_rows(splits.train, weighing, config.data.workers)
    validation = splits.validation
    if validation is not None:
        validation, _ = tokenize_rows(validation, builder, config.data.workers)
    say(
        f"tokens: {account.tokens} in {account.rows} rows, {account.answer_tokens} of them answers; "
        f"{account.shortened} texts were shortened to fit prompt.max_length={config.prompt.max_length}"
    )
    if account.cut_entities and builder.marks is None:
        say(
            f"warning: {account.cut_entities} entities stand in text that was cut away but are still asked for; "
            "raise prompt.max_length"
        )
    elif account.cut_entities:
        say(
            f"warning: {account.cut_entities} entities stand in text that was cut away and are not learnt; raise prompt.max_length"
        )
    return train, validation


def training_weights(options: TrainingConfig, train: Dataset) -> AnswerWeights:
    """What answers count for in training, as the config says; `balanced` weights follow from the training rows."""
    classes = options.class_weights
    if classes == "none":
        classes = {}
    elif classes == "balanced":
        classes = _balanced(train)
    found = AnswerWeights(classes, options.label_smoothing, options.objective != "tokens")
    return (
        found
        if options.negatives == "all"
        else replace(found, negatives=options.negatives, seed=options.seed)
    )


def _balanced(train: Dataset) -> dict[str, float]:
    if train[0]["labels"] is None:
        return balanced(rows_by_label(train))
    return balanced_each(Counter(label for labels in train["labels"] for label in labels), len(train))


def rows_by_label(dataset: Dataset) -> dict[str, float]:
    """Label -> its rows; a soft label counts by its shares."""
    counts: dict[str, float] = {}
    columns = dataset.select_columns(["label", "shares"]).with_format("arrow")
    for batch in columns.iter(batch_size=1000):
        for row in batch.to_pylist():
            for each in row["shares"] or [{"label": row["label"], "share": 1.0}]:
                counts[each["label"]] = counts.get(each["label"], 0.0) + each["share"]
    return counts


def load_for_training(prepared: Prepared, say: Say) -> PreTrainedModel:
    """The base model with the weights that will be trained, and with the run's random state.

    Raises:
        ConfigError, ModelError: training as the config says is not possible, whatever the weights are.
    """
    from transformers import set_seed

    from labeltune.models import hub, lora
    from labeltune.training.preflight import check_feasible

    config, precision, splits = prepared.config, prepared.precision, prepared.splits
    check_feasible(config, precision, len(splits.train), splits.validation is not None)
    set_seed(config.training.seed)
    begin("loading the model", say)
    quantized = config.training.method == "qlora"
    model = hub.load_model(
        prepared.base, precision.weights, trust_remote_code=config.hub.trust_remote_code, four_bit=quantized
    )
    if config.training.method != "full":
        model = lora.attach_adapter(model, config.lora, quantized=quantized)
    trained, total = count_parameters(model)
    say(
        f"model: {config.model}, {total:,} weights, {trained:,} trained ({precision.name} on {precision.device})"
    )
    missing = missing_kernels(model) if precision.device == "cuda" else []
    if missing:
        say(
            f"note: not installed: {', '.join(missing)}; layers of this model go through PyTorch's own operations, with the same results "
            f"but much slower; pip install {' '.join(missing)}"
        )
    return model


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(weights that are trained, weights in all)."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def summarize(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """What a run is trained on, for its model card: names without folders, rows, and training rows (entities) by label.

    `test` is the path as it was given: `labeltune evaluate` reads it when no other is named.
    """
    counts: Counter[str] = Counter()
    if config.task == "classification":
        counts.update(splits.train["label"])
    elif config.task == "multilabel":
        counts.update(label for labels in splits.train["labels"] for label in labels)
    else:
        counts.update(e["label"] for row in splits.train["entities"] for e in row)
    validation = config.data.validation
    return {
        "train": public_name(config.data.train),
        "validation": None if validation is None else public_name(validation),
        "test": config.data.test,
        "train_rows": len(splits.train),
        "validation_rows": splits.held_out,
        "labels": by_count(counts),
    }


def report_splits(splits: Splits, say: Say) -> None:
    """Say how many rows there are, and how many were left out."""
    held_out = splits.held_out
    say(f"data: {len(splits.train)} training rows, {held_out} validation rows, {len(splits.labels)} labels")
    if held_out > len(splits.train):
        say("warning: there are more validation rows than training rows; are the two files swapped?")
    if splits.skipped:
        reasons = ", ".join(f"{kind} {count}" for kind, count in sorted(splits.skipped.items()))
        say(f"data: {splits.skipped_rows} faulty rows were skipped (data.on_error=skip): {reasons}")


def warn_of_rows(config: RunConfig, splits: Splits, selection: Sequence[Example], say: Say) -> None:
    """Say what is allowed and will disappoint."""
    if config.metric == "span_f1" and selection and not any(example.entities for example in selection):
        say(
            f"warning: none of the {len(selection)} validation rows holds an entity, and span_f1 on them picks `best`; "
            "name rows with entities as data.validation, or set eval.metric=loss"
        )
    if config.prompt.answer == "marks" and "entity_text" in config.prompt.system + config.prompt.user:
        say(
            "warning: answers are marks in the text (prompt.answer=marks), but the prompt asks for JSON (entity_text); describe the marks "
            "in prompt.system, or leave it out"
        )
    usual = TrainingConfig.model_fields["learning_rate"].default
    if config.model in ("pocket", "pocket-zh") and config.training.learning_rate == usual:
        say(
            f"note: {config.model} is small and learns with training.learning_rate=auto; the default is for large models"
        )
    if config.model != "pocket":
        return
    texts = splits.train.select(range(min(SCRIPT_ROWS, len(splits.train))))["text"]
    foreign, total = sum(not c.isascii() for text in texts for c in text), sum(map(len, texts))
    if 2 * foreign > total:
        say(
            "warning: pocket reads Chinese, and most other scripts, byte by byte, and learns little of them; use pocket-zh or a "
            "Qwen model"
        )


def fixed_handful(splits: Splits, count: int) -> list[Example]:
    """Rows spread evenly over the validation rows (the training rows when there are none); the same in every run."""
    source = splits.validation if splits.validation is not None else splits.train
    return [Example.from_row(source[i]) for i in evenly(len(source), count)]


def validation_rows(splits: Splits, count: int) -> list[Example]:
    """At most `count` validation rows, the same in every run of a config: every stratum in proportion (a label, or a set of
    entity types), spread evenly over the file. All of them in file order when they are no more."""
    source = splits.validation
    if source is None:
        return []
    if len(source) <= count:
        return [Example.from_row(row) for row in source]

    names = [stratum(row) for row in source.select_columns(["label", "labels", "entities"])]
    order = sorted(range(len(source)), key=lambda i: (names[i], i))
    chosen = sorted(order[i] for i in evenly(len(order), count))
    return [Example.from_row(source[i]) for i in chosen]


def too_long(where: str, tokens: int, max_length: int, enough: int) -> Fault:
    """The fault of a row that cannot fit; `enough` is the length that fits every row."""
    return Fault(
        "too_long",
        where,
        f"instruction, candidates and answer alone need {tokens} tokens, {tokens - max_length} more than "
        f"prompt.max_length={max_length}; prompt.max_length={enough} fits every row",
    )


def without_too_long(
    splits: Splits, builder: PromptBuilder, config: RunConfig, say: Callable[[str], None] | None = None
) -> Splits:
    """The rows that fit `prompt.max_length`; those that cannot are left out with `data.on_error: skip`.

    Args:
        say: told how many were left out.

    Raises:
        PromptError: some cannot, and `data.on_error` is `stop`; the message lists them and the length that would do.
    """
    from labeltune.training.dataset import rows_that_cannot_fit

    parts = [splits.train, splits.validation]
    needed = [{} if part is None else rows_that_cannot_fit(part, builder) for part in parts]
    count = sum(map(len, needed))
    if not count:
        return splits
    limit, enough = config.prompt.max_length, max(tokens for found in needed for tokens in found.values())
    if config.data.on_error == "stop":
        faults = [
            too_long(str(part[number]["source"]), tokens, limit, enough)
            for part, found in zip(parts, needed, strict=True)
            if part is not None
            for number, tokens in found.items()
        ]
        shown = listed([f"{fault.where}: {fault.message}" for fault in faults], count)
        raise PromptError(
            f"{counted(count, 'row')} cannot fit:\n  {shown}\n"
            f"Set prompt.max_length={enough}, shorten prompt and labels, or leave them out with data.on_error=skip"
        )
    fitting = [
        [n for n in range(len(part)) if n not in found] if part is not None else []
        for part, found in zip(parts, needed, strict=True)
    ]
    kept = [None if part is None else part.select(rows) for part, rows in zip(parts, fitting, strict=True)]
    if not kept[0]:
        raise PromptError(f"no row fits prompt.max_length={limit}; prompt.max_length={enough} fits every row")
    if say is not None:
        say(
            f"data: {counted(count, 'row')} skipped that cannot fit prompt.max_length={limit} (data.on_error=skip); "
            f"prompt.max_length={enough} fits every row"
        )
    skipped = {**splits.skipped, "too_long": splits.skipped.get("too_long", 0) + count}
    return replace(
        splits,
        train=kept[0],
        validation=kept[1] or None,
        train_texts=splits.train_texts[fitting[0]],
        skipped_rows=splits.skipped_rows + count,
        skipped=skipped,
    )


def named_task(changes: Sequence[str]) -> str | None:
    """The task that `key=value` changes set, if they do."""
    named = [
        value for key, _, value in (change.partition("=") for change in changes) if key.strip() == "task"
    ]
    return named[-1].strip() if named else None


def reading_config(changes: Sequence[str]) -> RunConfig:
    """Only the changes that tell how rows are read: the others may be for a task that is not known yet."""
    return load_config(None, [change for change in changes if re.match(r"\s*(hub|data)\s*[.=]", change)])


def first_rows(spec: str, config: RunConfig) -> list[dict[str, Any]]:
    """The first rows that can be read."""
    return first_values(resolve_data(spec, config.hub), config.data)


def guess_task(rows: Sequence[dict[str, Any]], config: RunConfig) -> TaskName:
    """`ner` when one of the rows has entities, `multilabel` when one has a list of labels, else `classification`."""
    found = {guess_row(row, config.data.columns) for row in rows}
    order: tuple[TaskName, ...] = ("ner", "multilabel", "classification")
    return next((task for task in order if task in found), "classification")
