"""The sections of a configuration, with the original recipe's defaults."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TaskName = Literal["classification", "ner"]

CLASSIFICATION_SYSTEM = (
    "你是一个文本分类领域的专家，你会接收到一段文本和几个潜在的分类选项，请输出文本内容的正确类型"
)
CLASSIFICATION_USER = "文本:{text},类型选型:{category}"
NER_SYSTEM = (
    "你是命名实体识别方面的专家。请找出用户所给文本中的全部实体，实体类型只有：{labels}。"
    '每个实体单独占一行，写成一个合法的JSON对象，形如 {"entity_text": "实体原文", "entity_label": "实体类型"}，'
    "按照在文本中出现的先后顺序输出。如果文本中一个实体也没有，只输出“{no_entities}”。"
)
NER_USER = "文本:{text}"
NER_LABELS = ("地点", "人名", "地理实体", "组织")


#: Figures that can pick a checkpoint, the usual one first.
METRICS: dict[str, tuple[str, ...]] = {"classification": ("macro_f1", "accuracy"), "ner": ("span_f1",)}


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
    category: str = Field("category", description="column of the candidate labels (classification)")
    output: str = Field("output", description="column of the right label (classification)")
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
        None, description="the label set; when empty, the labels seen in the training rows"
    )
    columns: ColumnsConfig = Field(default_factory=lambda: ColumnsConfig(), description="column names")
    encoding: str = Field("utf-8", description="encoding of text files, e.g. `gb18030` for GBK")
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
    """What the model reads. `{text}`, `{category}`, `{labels}` and `{no_entities}` are filled in."""

    system: str = Field(CLASSIFICATION_SYSTEM, description="system message; empty for none (default by task)")
    user: str = Field(CLASSIFICATION_USER, description="user message, with `{text}` in it (default by task)")
    no_entities: str = Field(
        "没有找到任何实体", min_length=1, description="the answer when a text holds no entity (NER)"
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

    @model_validator(mode="after")
    def _text_has_a_place(self) -> PromptConfig:
        if self.user.count("{text}") != 1:
            raise ValueError("prompt.user must contain {text} exactly once")
        if "{text}" in self.system:
            raise ValueError("prompt.system cannot contain {text}; put it into prompt.user")
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
    epochs: float = Field(2, gt=0, description="passes over the training rows")
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
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate")
    scheduler: str = Field("linear", description="learning rate schedule, by its transformers name")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
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

    metric: Literal["auto", "macro_f1", "accuracy", "span_f1", "loss"] = Field(
        "auto",
        description="picks `best` (the least loss among equals): auto is macro_f1 for labels, span_f1 (strict) for entities",
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
    batch_size: int = Field(16, ge=1, description="rows decoded at once")
    max_new_tokens: int = Field(
        256, ge=1, description="longest NER answer in tokens; label answers are bounded by the labels"
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
    prior: Literal["none", "batch"] = Field(
        "none",
        description="batch: divide by each label's mean probability over the rows predicted together (arXiv:2309.17249)",
    )
