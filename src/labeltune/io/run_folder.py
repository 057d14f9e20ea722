"""Run and checkpoint folders: what `labeltune.json` says, which checkpoint is meant, and which files a run is read from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from labeltune.config import (
    CalibrateConfig,
    ColumnsConfig,
    DataConfig,
    EntitiesKind,
    GenerationConfig,
    HubConfig,
    PromptConfig,
    RunConfig,
    Section,
    TaskName,
    build_config,
)
from labeltune.config_values import Annotations, FormatName
from labeltune.errors import ConfigError, ModelError, OutputError, near_it
from labeltune.io.hubs import PICKLES, may_run_code
from labeltune.io.outputs import check_folder, file_hash, is_hub_name, local_path, write_json
from labeltune.types import Entity, Example

RUN_FILE = "labeltune.json"
#: In a checkpoint: config and rows of the run.
RECORD_FILE = "training.json"
#: What peft calls an adapter's settings and weights.
ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
#: SHA-256 of every file of a checkpoint as it was saved.
MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunInfo(Section):
    """Everything prediction needs beside the weights; saved in every checkpoint, its fields in this order.

    Attributes:
        model: the `model:` string of the base model.
        columns: names of the columns in the run's data files.
        encoding: of its text files.
        entities: whether its entities may lie inside entities.
        chat_template: the template the run was trained with, which says by itself what the run is asked: on what day, whether
            to think, and up to where an answer begins.
        answer_lead: see `ChatTemplate`; runs of version 0.1.0 have none, and a template as its model has it.
        adapter: True when the folder holds an adapter, False when it holds a whole model.
        data: what it was trained on, for model cards: file names without folders, numbers of rows, rows by label; empty
            when it is not known.
    """

    model_config = ConfigDict(extra="ignore")  # a later version may have more

    task: TaskName
    model: str
    hub: HubConfig
    labels: tuple[str, ...]
    prompt: PromptConfig
    generation: GenerationConfig
    columns: ColumnsConfig
    encoding: str = "utf-8"
    rows_format: FormatName = "auto"
    annotations: Annotations = "latest"
    entities: EntitiesKind = "flat"
    chat_template: str
    answer_lead: str = ""
    adapter: bool
    calibrate: CalibrateConfig = Field(default_factory=CalibrateConfig)
    data: dict[str, Any] = Field(default_factory=dict)

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, value: str) -> str:
        return DataConfig(encoding=value).encoding

    @staticmethod
    def of(
        config: RunConfig,
        labels: tuple[str, ...],
        chat_template: str,
        data: dict[str, Any] | None = None,
        answer_lead: str = "",
    ) -> RunInfo:
        """For a run that is about to be trained."""
        return RunInfo(
            task=config.task,
            model=config.model,
            hub=config.hub,
            labels=labels,
            prompt=config.prompt,
            generation=config.generation,
            columns=config.data.columns,
            encoding=config.data.encoding,
            # A tool's name is one of the training file, not of others.
            rows_format="rows" if config.data.format == "rows" else "auto",
            annotations=config.data.annotations,
            entities=config.data.entities,
            chat_template=chat_template,
            answer_lead=answer_lead,
            adapter=config.training.method != "full",
            calibrate=config.calibrate,
            data=data or {},
        )

    def runs_code(self, agreed: bool = False) -> bool:
        """Whether Python code that comes with the model is run; see `may_run_code`."""
        return self.hub.trust_remote_code and may_run_code(self.model, agreed)

    def save(self, folder: Path) -> None:
        """Write `labeltune.json`; it comes last, so a checkpoint that has it is complete."""
        write_json(folder / RUN_FILE, {"format": _FORMAT, **self.model_dump()})

    @staticmethod
    def load(folder: Path) -> RunInfo:
        """Read `labeltune.json`.

        Raises:
            ModelError: it is missing, damaged, or written by a newer version.
        """
        path = folder / RUN_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] > _FORMAT:
                raise ModelError(
                    f"{path} was written by a newer labeltune; upgrade in the folder of the clone: git pull && pip install -c constraints.txt ."
                )
            return RunInfo.model_validate(values)
        except FileNotFoundError:
            raise ModelError(f"{folder} holds no {RUN_FILE}; it is no labeltune checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error


def public_name(spec: str) -> str:
    """A model or data file as others may see it: a hub's name as it is, a path of this machine without its folders."""
    return spec if is_hub_name(spec) else Path(spec).name or spec


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of an output folder, by step: those that have a manifest, which is written last."""
    folders = checkpoint_folders(output_dir)
    return [path for path in folders if (path / MANIFEST_FILE).is_file() and (path / RUN_FILE).is_file()]


def how_to_go_on(output_dir: Path, command: str | None = None) -> str:
    """What to tell of a training that was ended by something else than itself; `command` is what began it, where it is known."""
    saved = checkpoints(output_dir)
    then = "--resume continues it" if command is None else f"go on with: {command} --resume"
    return f"{saved[-1].name} is saved, {then}" if saved else "no checkpoint has been saved"


def naming_folder(run: Path) -> Path:
    """The folder a run is called after: the one around `best` and `checkpoint-N`."""
    folder = run.expanduser().absolute()
    return folder.parent if folder.name == "best" or step_of(folder) >= 0 else folder


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint that is saved at a step."""
    return f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was saved, by its name; -1 of a folder that is called something else."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else -1


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Everything called checkpoint-N, by N."""
    inside = output_dir.iterdir() if output_dir.is_dir() else ()
    return sorted((path for path in inside if step_of(path) >= 0 and path.is_dir()), key=step_of)


def find_checkpoint(run: str | os.PathLike[str], prefer_newest: bool = False) -> Path:
    """The checkpoint that `run` means: itself, or the `best` (else the newest) one in it.

    Args:
        prefer_newest: take the newest checkpoint of a run folder, not the best.

    Raises:
        ModelError: there is none.
    """
    folder = Path(run).expanduser()
    if (folder / RUN_FILE).is_file():
        return folder
    if not prefer_newest and (folder / "best" / RUN_FILE).is_file():
        return folder / "best"
    found = checkpoints(folder)
    if found:
        return found[-1]
    if not folder.exists():
        raise ModelError(
            f"run folder {folder} does not exist; train first{near_it(folder, lambda each: (each / 'best').exists())}"
        )
    raise ModelError(f"{folder} holds no complete checkpoint (checkpoint-N with {RUN_FILE}); train first")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files by its manifest, or None.

    Nothing that could be a pickle is read unless the manifest names it.
    """
    manifest = checkpoint / MANIFEST_FILE
    for needed in (manifest, checkpoint / RUN_FILE):
        if not needed.is_file():
            return f"{needed.name} is missing"
    try:
        expected: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
        for name, digest in expected.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file_hash(file) != digest:
                return f"{name} is not what was saved"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    for file in sorted(checkpoint.rglob("*")):
        name = file.relative_to(checkpoint).as_posix()
        if file.suffix in PICKLES and name not in expected:
            return f"{name} was not saved with it"
    return None


def check_output(
    config: RunConfig,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """The checkpoint to resume from (None for a fresh start), or why the output folder cannot be used.

    Args:
        resume: continue the last complete checkpoint; one that its manifest shows damaged is passed over, and said.
        overwrite: an earlier run may be there; it is removed when training starts, not here.
        say: told about damaged checkpoints.

    Raises:
        OutputError: a fresh run would mix with an earlier one, or the folder cannot be written.
        ModelError: there is nothing to resume.
    """
    folder = Path(config.output_dir)
    found = checkpoints(folder)
    if resume:
        if not found:
            raise ModelError(
                f"nothing to resume: {folder} holds no complete checkpoint; start without --resume"
            )
        for checkpoint in reversed(checkpoint_folders(folder)):
            reason = damage(checkpoint)
            if reason is None:
                return checkpoint
            say(f"warning: {checkpoint} is damaged ({reason}); going back to the one before it")
        raise ModelError(
            f"nothing to resume: every checkpoint in {folder} is damaged; start over with --overwrite"
        )
    if found and not overwrite:
        theirs = RunInfo.load(found[-1]).model if damage(found[-1]) is None else config.model
        if theirs != config.model:
            raise OutputError(
                f"{folder} already holds {found[-1].name} of model {theirs}; choose another output_dir for model {config.model}, or start over "
                "with --overwrite"
            )
        raise OutputError(
            f"{folder} already holds {found[-1].name}. Continue it with --resume, start over with --overwrite, "
            "or choose another output_dir"
        )
    check_folder(folder, [])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir {folder} cannot be written: {error}") from error
    return None


def remove_checkpoints(output_dir: str) -> None:
    """Delete an earlier run's checkpoints and its `best`; nothing else in the folder."""
    folder = Path(output_dir)
    best = folder / "best"
    if best.is_symlink():
        best.unlink()
    elif best.is_dir():
        shutil.rmtree(best)
    for path in checkpoint_folders(folder):
        shutil.rmtree(path)


def trained_config(checkpoint: Path) -> RunConfig | None:
    """The config that a checkpoint was trained with; None where it does not tell."""
    try:
        values = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))["config"]
        return build_config(values)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


#: Stands in a checkpoint's folder from its first file until its manifest is there.
UNFINISHED_FILE = ".unfinished"


#: Hashes of texts in a checkpoint, of those that chose it and those that trained it: 8 bytes each, little-endian, sorted.
SELECTION_FILE = "selection.u64"
TRAINING_FILE = "training.u64"
#: What of a base model other programs read and transformers does not write: llama.cpp converts no Gemma without its `tokenizer.model`, and
#: models that read images or sound have processors (processor_config.json, preprocessor_config.json, video_preprocessor_config.json).
BASE_FILES = ("tokenizer.model", "*processor_config.json")
#: What an evaluation writes into its folder.
EVALUATION_FILES = ("metrics.json", "predictions.jsonl", "report.html")
#: Where a training leaves them in its run folder, of its validation rows.
VALIDATION_FOLDER = "validation"


def base_files(base: Path) -> list[Path]:
    """`BASE_FILES` of a model's folder."""
    return sorted(path for pattern in BASE_FILES for path in base.glob(pattern))


def validation_file(checkpoint: Path, name: str) -> Path | None:
    """One of `EVALUATION_FILES` of a checkpoint's run, also of a link to a checkpoint; None where it is not there."""
    for folder in dict.fromkeys((checkpoint.absolute().parent, checkpoint.resolve().parent)):
        file = folder / VALIDATION_FOLDER / name
        if file.is_file():
            return file
    return None


def validated_row(row: Mapping[str, Any], task: str, labels: Sequence[str]) -> Example:
    """A row of a run's `predictions.jsonl` with its right answer. Candidates of its own stand there by probability: they come back in the
    order of `labels`."""
    example = Example(str(row["id"]), str(row["text"]), source=str(row.get("source", "")))
    right = row["right"]
    if task == "ner":
        found = [Entity(e["entity_text"], e["entity_label"], e["start_idx"], e["end_idx"]) for e in right]
        return replace(example, entities=tuple(found))
    if task == "multilabel":
        return replace(example, labels=tuple(right))
    ranked = [entry["label"] for entry in row.get("ranking", ())]
    order = {label: number for number, label in enumerate(labels)}
    own = sorted(ranked, key=lambda label: (order.get(label, len(order)), label))
    return replace(example, candidates=() if set(own) == set(labels) else tuple(own), label=right)


def files_read(run: str | os.PathLike[str]) -> list[Path]:
    """What a command reads that loads this run: the files of its checkpoint, and the folder of its base model.

    Empty for a run on a hub.

    Raises:
        ModelError: there is no complete checkpoint.
    """
    if is_hub_name(str(run)):
        return []
    folder = find_checkpoint(run)
    try:
        names = list(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        names = [path.name for path in folder.iterdir() if path.is_file()]  # an export has no manifest
    base = local_path(RunInfo.load(folder).model)
    return [
        *(folder / name for name in (*names, RUN_FILE, MANIFEST_FILE)),
        *([base] if base is not None else []),
    ]


def check_inputs_kept(config: RunConfig, path: str | None, overwrite: bool) -> None:
    """Whether training leaves its model, its rows and its config file, at `path`, as they are.

    Args:
        overwrite: an earlier run's checkpoints will be deleted.

    Raises:
        OutputError: it would delete one of them, or write its report over one.
    """
    folder = Path(config.output_dir)
    read = [*([path] if path is not None else []), *config.inputs()]
    if overwrite:
        for removed in (folder / "best", *checkpoints(folder)):
            if removed.exists():
                check_folder(removed, read, replaced=True)
    check_folder(folder / VALIDATION_FOLDER, read, EVALUATION_FILES)


def replaced(checkpoint: Path) -> Path:
    """Where an earlier checkpoint of the same name is kept until the new one is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.replaced")


def _half_written(checkpoint: Path) -> bool:
    return (checkpoint / UNFINISHED_FILE).exists() and not (checkpoint / MANIFEST_FILE).exists()


def remove_half_checkpoints(output_dir: Path) -> None:
    """Delete the checkpoint that a killed run was writing, and bring back what it was to replace.

    Only for who holds the run's lock.
    """
    for folder in checkpoint_folders(output_dir):
        if _half_written(folder):
            shutil.rmtree(folder)
        else:
            (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    for kept in output_dir.glob(".checkpoint-*.replaced"):
        folder = kept.with_name(kept.name.removeprefix(".").removesuffix(".replaced"))
        if folder.exists():
            shutil.rmtree(kept)
        else:
            kept.rename(folder)
    # labeltune 0.1.0 wrote its checkpoints there.
    shutil.rmtree(output_dir / ".saving", ignore_errors=True)
