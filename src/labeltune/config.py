"""The whole configuration of a run: frozen, typed, small. Unknown keys fail with a suggestion; secrets have no key."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from labeltune.config_sections import CLASSIFICATION_SYSTEM as CLASSIFICATION_SYSTEM
from labeltune.config_sections import CLASSIFICATION_USER as CLASSIFICATION_USER
from labeltune.config_sections import METRICS as METRICS
from labeltune.config_sections import NER_LABELS as NER_LABELS
from labeltune.config_sections import NER_SYSTEM as NER_SYSTEM
from labeltune.config_sections import NER_USER as NER_USER
from labeltune.config_sections import CalibrateConfig as CalibrateConfig
from labeltune.config_sections import ColumnsConfig as ColumnsConfig
from labeltune.config_sections import DataConfig as DataConfig
from labeltune.config_sections import EvalConfig as EvalConfig
from labeltune.config_sections import GenerationConfig as GenerationConfig
from labeltune.config_sections import HubConfig as HubConfig
from labeltune.config_sections import LoraConfig as LoraConfig
from labeltune.config_sections import PromptConfig as PromptConfig
from labeltune.config_sections import Section as Section
from labeltune.config_sections import SwanlabConfig as SwanlabConfig
from labeltune.config_sections import TaskName as TaskName
from labeltune.config_sections import TrainingConfig as TrainingConfig
from labeltune.errors import ConfigError, clipped, near_it
from labeltune.io.safe_yaml import read_yaml
from labeltune.other_names import KEYS, our_name, plain

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class RunConfig(Section):
    """One run: a task, a model, data, and how to train. `output_dir` follows the original by task."""

    task: TaskName = Field("classification", description="`classification` or `ner`")
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_by_task(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        # `training:` with all its keys commented out reads as null; it means the defaults.
        sections = {name for name, field in cls.model_fields.items() if field.default_factory is not None}
        values = {key: value for key, value in values.items() if value is not None or key not in sections}
        if values.get("task", "classification") == "ner":
            values.setdefault("output_dir", "./output/Qwen2-NER")
            _set_default(values, "prompt", system=NER_SYSTEM, user=NER_USER)
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.task == "classification" and "{category}" not in self.prompt.user + self.prompt.system:
            raise ValueError(
                "prompt.user must contain {category}, or the model never sees the candidate labels"
            )
        if self.eval.metric not in ("auto", "loss", *METRICS[self.task]):
            raise ValueError(
                f"eval.metric={self.eval.metric} is not measured for {self.task}; it has {', '.join(METRICS[self.task])}, loss"
            )
        if self.training.method == "full" and (self.lora.dora or self.lora.rslora):
            raise ValueError("lora.dora and lora.rslora need training.method lora or qlora")
        return self


def _set_default(values: dict[str, Any], section: str, **defaults: str) -> None:
    given = values.get(section)
    if given is None:
        values[section] = defaults
    elif isinstance(given, dict):
        values[section] = {**defaults, **given}


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or start from the defaults) and apply `key=value` overrides.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown (with a suggestion), or a value is wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise ConfigError(
                f"config file {path} does not exist; `labeltune init classification` writes one"
                f"{near_it(Path(path), lambda each: each.suffix in ('.yaml', '.yml'))}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from None
        loaded = read_yaml(text, f"config file {path}")
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {path} must hold `key: value` lines, not a {type(loaded).__name__}"
            )
        values = loaded or {}
    for override in overrides:
        apply_override(values, override)
    return build_config(values, where=str(path) if path is not None else "command line")


def build_config(values: dict[str, Any], where: str = "config") -> RunConfig:
    """Validate a plain mapping.

    Raises:
        ConfigError: every wrong key and value at once, each with its dotted name.
    """
    unwritable = next(_unwritable(values), None)
    if unwritable is not None:
        raise ConfigError(f"{where}: {unwritable}: holds a NUL character or half a surrogate pair")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def _unwritable(value: object, key: str = "") -> Iterator[str]:
    """Dotted names of strings that no file could hold."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            yield key
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _unwritable(child, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _unwritable(child, key)


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every leaf key as (dotted name, type, default, description), in the order of the sections."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from config_keys(annotation, f"{prefix}{name}.")
        else:
            shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            yield f"{prefix}{name}", shown.replace("typing.", ""), field.default, field.description or ""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in a plain mapping; the value is read as YAML.

    Raises:
        ConfigError: it does not look like that, or the key leads through a value.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key=value, e.g. training.epochs=3")
    try:
        value = read_yaml(text, f"override {key}") if text.strip() else None
    except ConfigError:
        value = text
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _describe(problem: ErrorDetails) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {clipped(key, 200)!r}{_suggestion(key, problem['input'])}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {clipped(repr(problem['input']), 200)})" if key else message


#: What people call a key, where it is spelled too differently to be found and no other tool's name.
_OTHER_NAMES = {"rank": "lora.r"}


def _suggestion(key: str, value: object = None) -> str:
    known = [name for name, *_ in config_keys()]
    sections = sorted({name.rpartition(".")[0] for name in known if "." in name})
    leaf = key.rpartition(".")[2]
    elsewhere = our_name(key, value)
    if elsewhere is not None:
        named = KEYS.get(plain(key))
        return f": {elsewhere}" if named is None else f"; did you mean {named[1]!r}? {elsewhere}"
    if leaf in _OTHER_NAMES:
        close = [_OTHER_NAMES[leaf]]
    else:
        close = difflib.get_close_matches(key, known + sections, n=1, cutoff=0.75)
    if not close:
        leaves = {name.rpartition(".")[2]: name for name in reversed(known)}
        found = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)
        close = [leaves[found[0]]] if found else []
    return f"; did you mean {close[0]!r}?" if close else "; `labeltune keys` lists all keys"
