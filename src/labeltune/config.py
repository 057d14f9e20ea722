"""The whole configuration of a run: frozen, typed, strict about key names, with the defaults of the original recipe."""

from __future__ import annotations

import codecs
import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from labeltune.config_values import (
    CONFIG_SUFFIXES,
    Annotations,
    FormatName,
    apply_override,
    describe,
    unwritable,
    values_of_file,
    with_descriptions,
)
from labeltune.default_prompts import CLASSIFICATION_SYSTEM, CLASSIFICATION_USER, PROMPTS
from labeltune.errors import ConfigError

TaskName = Literal["classification", "multilabel", "ner"]
EntitiesKind = Literal["flat", "nested"]
#: Figures that can pick a checkpoint, the usual one first.
METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("macro_f1", "accuracy"),
    "multilabel": ("micro_f1", "macro_f1"),
    "ner": ("span_f1",),
}


def higher_is_better(metric: str) -> bool:
    """Of a figure that picks a checkpoint."""
    return metric != "loss"


#: Keys and sections that say where a run is kept and shown; nothing that comes of it depends on them.
KEPT_AND_SHOWN = ("output_dir", "tracking", "swanlab", "hub.cache_dir", "hub.accept_license", "data.test")
#: No step, row, token or seed has a larger number: libraries keep them in 32 bits.
LARGEST = 2**31 - 1


class Section(BaseModel):
    """Base of every section: immutable, and strict about key names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _numbers_fit(self) -> Section:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is larger than {LARGEST}")
        return self


class HubConfig(Section):
    """How models and data sets are fetched."""

    revision: str | None = Field(None, description="branch, tag or commit of the model repository")
    cache_dir: str | None = Field(None, description="folder for downloads; the hub's own default when empty")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; off unless you trust it"
    )
    accept_license: str | None = Field(
        None, description="accept a model's terms by name, e.g. `gemma` for `pocket-zh`"
    )


class ColumnsConfig(Section):
    """Names of the columns in your files, where they differ from the standard ones."""

    id: str = Field("id", description="column of the row id (optional in the file)")
    text: str = Field("text", description="column of the document")
    category: str = Field(
        "category", description="column of the candidate labels (classification, multilabel)"
    )
    output: str = Field("output", description="column of the right label (classification)")
    labels: str = Field("labels", description="column of the right labels (multilabel)")
    entities: str = Field("entities", description="column of the entities (NER)")


class DataConfig(Section):
    """Where the rows come from."""

    train: str = Field(
        "train.jsonl",
        min_length=1,
        description="file of rows (jsonl, json, csv, tsv, parquet, xlsx), or `ms:`/`hf:` data set",
    )
    validation: str | None = Field(
        None, description="validation file; when empty, a part of `train` is held out"
    )
    validation_fraction: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="share of `train` held out, stratified by label; 0 trains on all rows",
    )
    test: str | None = Field(
        None,
        description="test file: `labeltune evaluate` reads it, `labeltune data check CONFIG` looks for rows it shares with `train`",
    )
    labels: tuple[str, ...] | None = Field(
        None,
        description="the label set, a list or `{label: description}`; when empty, the labels seen in the training rows",
    )
    columns: ColumnsConfig = Field(default_factory=lambda: ColumnsConfig(), description="column names")
    format: FormatName = Field(
        "auto",
        description="tool whose export a file is; auto: by its content; rows: as described in docs/data.md",
    )
    annotations: Annotations = Field(
        "latest",
        description="which of several annotations of a task counts; agreed: tasks whose annotations differ are left out",
    )
    encoding: str = Field("utf-8", description="encoding of text files, e.g. `gb18030` for GBK")
    entities: EntitiesKind = Field(
        "flat", description="nested: entities may lie inside entities (NER); ones that cross stay an error"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what training does with faulty rows: stop, or skip them and say how many"
    )
    max_rows: int | None = Field(None, ge=1, description="use only the first rows of `train`")
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="processes that check and tokenize; the result is the same for any number; auto: one per core, one for small files",
    )

    @model_validator(mode="after")
    def _encoding_is_known(self) -> DataConfig:
        try:
            # Any byte has to lead to a character or a fault: idna and punycode, say, read names, not files.
            raw = "a\n".encode(self.encoding) + bytes(range(128, 256))
            readable = codecs.getincrementaldecoder(self.encoding)("replace").decode(raw).startswith("a\n")
        except (LookupError, ValueError):
            readable = False
        if not readable:
            raise ValueError(
                f"data.encoding={self.encoding!r} is no encoding of text files; utf-8, gb18030, utf-16 are"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> DataConfig:
        if self.labels is not None:
            if not self.labels:
                raise ValueError("data.labels is empty; leave it out to use the labels of the training rows")
            names = {label.strip() for label in self.labels}
            if len(names) != len(self.labels) or "" in names:
                raise ValueError("data.labels holds an empty or repeated label")
        return self


class PromptConfig(Section):
    """What the model reads. `{text}`, `{category}`, `{labels}`, `{no_entities}`, `{positive}` and `{negative}` are filled in."""

    system: str = Field(CLASSIFICATION_SYSTEM, description="system message; empty for none (default by task)")
    user: str = Field(CLASSIFICATION_USER, description="user message, with `{text}` in it (default by task)")
    no_entities: str = Field(
        "没有找到任何实体", min_length=1, description="the answer when a text holds no entity (NER)"
    )
    positive: str = Field(
        ": yes",
        min_length=1,
        description="what stands behind a label that applies (multilabel; default by task)",
    )
    negative: str = Field(
        ": no", min_length=1, description="what stands behind one that does not (multilabel; default by task)"
    )
    answer: Literal["json", "marks"] = Field(
        "json",
        description="json: an entity a line; marks: the text again with marks around its entities, `[Oslo|LOC]` (NER, docs/train.md)",
    )
    layout: Literal["original", "labels_first"] = Field(
        "original",
        description="labels_first puts what stands behind the text, such as the candidates, before it (docs/train.md)",
    )
    max_length: int = Field(
        384, ge=8, description="tokens of prompt and answer together; only the text is shortened to fit"
    )
    truncation: Literal["head", "tail", "head_tail"] = Field(
        "head", description="which part of a long text is kept: its head, its tail, or half of each"
    )
    thinking: Literal["off", "template"] = Field(
        "off",
        description="off: the answer follows at once, an empty thinking block or channel in front of it where the template has one; "
        "template: the template's own generation prompt, whatever it ends in",
    )
    descriptions: dict[str, str] = Field(
        {},
        description="what labels mean, `{label: description}`: stands in place of `{category}` and `{labels}`, a line a label; "
        "a mapping in `data.labels` sets it",
    )
    template_kwargs: dict[str, JsonValue] = Field(
        {},
        description="what the chat template is told beside the messages, e.g. `reasoning_effort: low`; saved with the adapter",
    )

    @field_validator("thinking", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML reads a bare `off` as false.
        return "off" if value is False else value

    @field_validator("descriptions")
    @classmethod
    def _a_line_each(cls, value: dict[str, str]) -> dict[str, str]:
        plain = {label: " ".join(description.split()) for label, description in value.items()}
        return {label: description for label, description in plain.items() if description}

    @field_validator("template_kwargs", mode="before")
    @classmethod
    def _dates_are_words(cls, value: object) -> object:
        # YAML reads 2026-07-01 as a date; templates want it as it is written.
        if not isinstance(value, dict):
            return value
        return {name: str(each) if type(each) is date else each for name, each in value.items()}

    @model_validator(mode="after")
    def _text_has_a_place(self) -> PromptConfig:
        if self.user.count("{text}") != 1:
            raise ValueError("prompt.user must contain {text} exactly once")
        if "{text}" in self.system:
            raise ValueError("prompt.system cannot contain {text}; put it into prompt.user")
        if self.positive == self.negative:
            raise ValueError("prompt.positive and prompt.negative must differ")
        return self


class LoraConfig(Section):
    """The adapter (peft). Defaults are the original recipe's."""

    r: int = Field(8, ge=1, le=65_536, description="rank")
    alpha: int = Field(32, ge=1, description="scaling: alpha / r, or alpha / sqrt(r) with rslora")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="dropout before the adapter's first matrix")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="layers that get an adapter")
    rslora: bool = Field(False, description="rank-stabilized scaling (arXiv:2312.03732)")
    dora: bool = Field(False, description="weight-decomposed adapter (arXiv:2402.09353)")


class TrainingConfig(Section):
    """The optimization. Defaults are the original recipe's."""

    method: Literal["lora", "qlora", "full"] = Field(
        "lora", description="adapter, adapter on a 4-bit base model, or all weights"
    )
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        2.0,
        description="passes over the training rows; auto: the fewer rows, the more, from 8 to 2 (docs/accuracy.md)",
    )
    max_steps: int | None = Field(
        None, ge=1, description="stop after this many optimizer steps, whatever `epochs` says"
    )
    batch_size: int = Field(16, ge=1, description="examples per optimizer step, over all processes")
    packing: Literal["shared_prefix", "packed", "padded"] = Field(
        "shared_prefix",
        description="how examples go through the model: common beginnings once, end to end, or padded; the result is the same",
    )
    max_tokens_per_pack: int | Literal["auto"] = Field(
        "auto", description="tokens pushed through the model at once; decides memory use, not the result"
    )
    negatives: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all",
        description="multilabel: labels that do not apply to a row and are trained, drawn once a row; evaluation asks all",
    )
    objective: Literal["tokens", "labels", "both"] = Field(
        "tokens",
        description="what is minimized (classification): the loss of the right answer's tokens; of the right one among all complete answers, "
        "which is what prediction computes; or the sum of both",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1e-4, description="peak learning rate; auto: by the width of the model (docs/accuracy.md)"
    )
    scheduler: str = Field("linear", description="learning rate schedule, by its transformers name")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        "none",
        description="what the loss of a label's rows is multiplied by (classification): balanced gives every label the same weight in "
        "all, `{label: weight}` sets some, the others weigh 1",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the right label that is spread evenly over all candidates (classification, arXiv:1512.00567)",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    logging_steps: int = Field(10, ge=1, description="steps between two log lines")
    save_steps: Annotated[int, Field(ge=1)] | Literal["epoch"] = Field(
        100, description="steps between two checkpoints, or `epoch`; validation runs at each"
    )
    save_total_limit: int = Field(3, ge=1, description="checkpoints kept; the best one is always among them")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp16 with a loss scaler, fp32 on CPU"
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="recompute activations: less memory, a second forward pass; auto: only when memory needs it",
    )
    compile: bool = Field(
        False, description="torch.compile the layers: minutes at the start, then faster steps on a GPU"
    )
    collective_timeout: int = Field(
        1800,
        ge=1,
        description="seconds after which a process that waits for others gives up and ends the job",
    )
    seed: int = Field(42, ge=0, description="seed of the split, the order, the adapter and dropout")

    @model_validator(mode="after")
    def _packs_hold_something(self) -> TrainingConfig:
        if isinstance(self.max_tokens_per_pack, int) and self.max_tokens_per_pack < 1:
            raise ValueError("training.max_tokens_per_pack must be at least 1, or auto")
        return self


class EvalConfig(Section):
    """What validation measures at every checkpoint, and what follows from it."""

    metric: Literal["auto", "macro_f1", "micro_f1", "accuracy", "span_f1", "loss"] = Field(
        "auto",
        description="picks `best` (the least loss among equals): auto is macro_f1 for a label a row, micro_f1 for several, span_f1 (strict) for entities",
    )
    max_rows: int = Field(
        500,
        ge=1,
        description="validation rows that are predicted at each checkpoint: the same ones, stratified",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many checkpoints in a row without improvement; never when empty",
    )
    min_delta: float = Field(
        0.0, ge=0, description="what counts as an improvement for `patience`: more than this"
    )


class SwanlabConfig(Section):
    """The tracker. Log in by `swanlab login` or SWANLAB_API_KEY; there is no key for a secret here."""

    project: str = Field("labeltune", description="project name")
    experiment: str | None = Field(None, description="experiment name; made up by SwanLab when empty")
    group: str | None = Field(
        None, description="group the experiment belongs to; a sweep puts its trials into one"
    )
    mode: Literal["auto", "online", "local", "offline"] = Field(
        "auto", description="auto: online when logged in and reachable, else local"
    )
    log_dir: str = Field("swanlog", description="folder of local runs, read by `labeltune board`")
    prediction_rows: int = Field(8, ge=0, description="validation rows shown as `Prediction` texts")


class GenerationConfig(Section):
    """How answers are found, for evaluation and prediction."""

    decoding: Literal["exact", "free"] = Field(
        "exact",
        description="exact: labels are scored, entities are parts of the text; free: plain generation, parsed",
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="rows decoded at once; auto: 128 on a GPU, 16 on the CPU"
    )
    max_new_tokens: int = Field(
        256,
        ge=1,
        description="longest NER answer in tokens, of marks beside the text's own; label answers are bounded by the labels",
    )
    long_text: Literal["truncate", "window"] = Field(
        "truncate",
        description="texts that do not fit: shortened as in training, or read in overlapping windows that are put together",
    )
    length_norm: Literal["none", "tokens"] = Field(
        "none",
        description="tokens: compare labels by log-probability a token, for labels of very different length",
    )


class CalibrateConfig(Section):
    """How sure a label is."""

    temperature: bool = Field(
        True, description="fit a temperature on the validation rows after training, saved with the checkpoint"
    )
    linear: bool = Field(
        False,
        description="classification: add the scores of a linear model of the training rows, weighed on the validation rows, where that helps on "
        "rows that it was not weighed on; labeltune alone does so, other engines answer without it",
    )
    prior: Literal["none", "batch"] = Field(
        "none",
        description="batch: divide by each label's mean probability over the rows predicted together (arXiv:2309.17249)",
    )

    thresholds: Literal["none", "one", "label"] = Field(
        "label",
        description="multilabel: from what probability on a label is given, chosen on the validation rows for the best `eval.metric`: "
        "one for all labels, or one a label where that is better on rows it was not chosen on; none: from 0.5 on",
    )


class RunConfig(Section):
    """One run: a task, a model, data, and how to train. `output_dir` follows the original by task."""

    task: TaskName = Field(
        "classification", description="`classification`, `multilabel` (several labels a row) or `ner`"
    )
    model: str = Field(
        "ms:qwen/Qwen2-1.5B-Instruct",
        min_length=1,
        description="local folder, `ms:org/name` (ModelScope), `hf:org/name` (Hugging Face), `pocket` or `pocket-zh`",
    )
    output_dir: str = Field(
        "./output/Qwen2", min_length=1, description="folder of the checkpoints (default by task)"
    )
    tracking: Literal["none", "swanlab", "tensorboard", "wandb"] = Field(
        "swanlab", description="where the run is shown"
    )
    hub: HubConfig = Field(default_factory=lambda: HubConfig(), description="downloads")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="rows")
    prompt: PromptConfig = Field(default_factory=lambda: PromptConfig(), description="prompt")
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig(), description="adapter")
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(), description="optimization")
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig(), description="validation")
    generation: GenerationConfig = Field(default_factory=lambda: GenerationConfig(), description="prediction")
    calibrate: CalibrateConfig = Field(default_factory=lambda: CalibrateConfig(), description="confidence")
    swanlab: SwanlabConfig = Field(default_factory=lambda: SwanlabConfig(), description="tracker")

    @property
    def metric(self) -> str:
        """The figure that picks the checkpoint: `loss`, or one of `METRICS`."""
        return METRICS[self.task][0] if self.eval.metric == "auto" else self.eval.metric

    def inputs(self) -> list[str]:
        """The model and the data that it names."""
        data = self.data
        given = (self.model, data.train, data.validation, data.test)
        return [name for name in given if name is not None]

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_task(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        # `training:` with all its keys commented out reads as null; it means the defaults.
        sections = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        values = {key: value for key, value in values.items() if value is not None or key not in sections}
        task = values.get("task", "classification")
        prompt = values.get("prompt")
        marked = task == "ner" and isinstance(prompt, dict) and prompt.get("answer") == "marks"
        if isinstance(task, str) and task in PROMPTS:
            values.setdefault("output_dir", f"./output/Qwen2-{'NER' if task == 'ner' else 'Multilabel'}")
            _set_default(values, "prompt", **PROMPTS["ner_marks" if marked else task])
        return with_descriptions(values)

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.eval.metric not in ("auto", "loss", *METRICS[self.task]):
            raise ValueError(
                f"eval.metric={self.eval.metric} is not measured for {self.task}; it has {', '.join(METRICS[self.task])}, loss"
            )
        listed = any(place in self.prompt.user + self.prompt.system for place in ("{labels}", "{category}"))
        if self.task != "ner" and self.prompt.descriptions and not listed:
            raise ValueError(
                f"prompt.system or prompt.user must contain {{{'labels' if self.task == 'multilabel' else 'category'}}}, or the model "
                "never sees the descriptions of the labels"
            )
        if self.task == "multilabel" and self.generation.decoding == "free":
            raise ValueError(
                "generation.decoding=free writes one answer; multilabel asks about every label, set exact"
            )
        if self.task != "ner" and self.prompt.answer == "marks":
            raise ValueError("prompt.answer=marks is for entities (task: ner)")
        if self.training.method == "full" and (self.lora.dora or self.lora.rslora):
            raise ValueError("lora.dora and lora.rslora need training.method lora or qlora")
        if self.task == "ner" and self.training.class_weights != "none":
            raise ValueError(
                "training.class_weights weighs the labels of rows, and task=ner has none; leave it out"
            )
        if self.task != "classification" and self.training.objective != "tokens":
            raise ValueError(
                f"training.objective={self.training.objective} needs one right label among candidates, and task={self.task} has no such thing; "
                "leave it out"
            )
        if self.task == "ner" and self.training.label_smoothing:
            raise ValueError(
                "training.label_smoothing needs candidate labels, and task=ner has none; leave it out"
            )
        return self


def _set_default(values: dict[str, Any], section: str, **defaults: str) -> None:
    given = values.get(section)
    if given is None:
        values[section] = defaults
    elif isinstance(given, dict):
        values[section] = {**defaults, **given}


def is_config(path: str | os.PathLike[str]) -> bool:
    """Whether this names a config file, by the end of its name."""
    return Path(path).suffix in CONFIG_SUFFIXES


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or start from the defaults) and apply `key=value` overrides.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown (with a suggestion), or a value is wrong.
    """
    values = {} if path is None else values_of_file(Path(path))
    of_file = copy.deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    try:
        return build_config(values, where="command line" if path is None else str(path))
    except ConfigError:
        if path is None or not overrides:
            raise
        build_config(of_file, where=str(path))
        # The file by itself is good.
        return build_config(values, where="command line")


def build_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a plain mapping.

    Raises:
        ConfigError: every wrong key and value at once, each with its dotted name.
    """
    wrong = next(unwritable(values), None)
    if wrong is not None:
        raise ConfigError(f"{where}: {wrong}: holds a NUL character or half a surrogate pair")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        known = {name: kind for name, kind, *_ in config_keys()}
        raise ConfigError(f"{where}: {describe(error.errors(), known)}") from None


def changed_generation(generation: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """Other values for keys of `generation`.

    Raises:
        ConfigError: there is no such key, or it does not take the value.
    """
    values = {**generation.model_dump(), **changes}
    return build_config({"generation": values}, "prediction").generation


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every leaf key as (dotted name, type, default, description), in the order of the sections."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from config_keys(annotation, f"{prefix}{name}.")
        else:
            shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            yield f"{prefix}{name}", shown.replace("typing.", ""), field.default, field.description or ""


def leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Config keys -> their values, of the keys that a nested mapping has."""
    found = {}
    for key, *_ in config_keys():
        value: Any = values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            found[key] = value
    return found


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether a config key is one of these, or stands in a section that is."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)
