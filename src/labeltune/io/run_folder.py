"""Run and checkpoint folders: what `labeltune.json` says, and which checkpoint is meant."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from labeltune.config import (
    CalibrateConfig,
    ColumnsConfig,
    DataConfig,
    GenerationConfig,
    HubConfig,
    PromptConfig,
    RunConfig,
    TaskName,
)
from labeltune.errors import ModelError, OutputError, first_line, near_it
from labeltune.io.outputs import check_folder, is_hub_name, is_stream, link_target, open_stream, umask
from labeltune.io.trust import PICKLES, may_run_code

RUN_FILE = "labeltune.json"
#: SHA-256 of every file of a checkpoint as it was saved.
MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class RunInfo:
    """Everything prediction needs beside the weights; saved in every checkpoint.

    Attributes:
        model: the `model:` string of the base model.
        columns: names of the columns in the run's data files.
        encoding: of its text files.
        chat_template: the template the run was trained with.
        adapter: True when the folder holds an adapter, False when it holds a whole model.
        data: what it was trained on, for model cards: file names without folders, numbers of rows, rows by label; empty
            when it is not known.
    """

    task: TaskName
    model: str
    hub: HubConfig
    labels: tuple[str, ...]
    prompt: PromptConfig
    generation: GenerationConfig
    columns: ColumnsConfig
    chat_template: str
    adapter: bool = True
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    data: dict[str, Any] = field(default_factory=dict)
    encoding: str = "utf-8"

    @staticmethod
    def of(
        config: RunConfig,
        labels: tuple[str, ...],
        chat_template: str,
        data: dict[str, Any] | None = None,
    ) -> RunInfo:
        """For a run that is about to be trained."""
        return RunInfo(
            config.task,
            config.model,
            config.hub,
            labels,
            config.prompt,
            config.generation,
            config.data.columns,
            chat_template,
            config.training.method != "full",
            config.calibrate,
            data or {},
            config.data.encoding,
        )

    def runs_code(self, agreed: bool = False) -> bool:
        """Whether Python code that comes with the model is run; see `may_run_code`."""
        return self.hub.trust_remote_code and may_run_code(self.model, agreed)

    def save(self, folder: Path) -> None:
        """Write `labeltune.json`; it comes last, so a checkpoint that has it is complete."""
        write_json(
            folder / RUN_FILE,
            {
                "format": _FORMAT,
                "task": self.task,
                "model": self.model,
                "hub": self.hub.model_dump(),
                "labels": list(self.labels),
                "prompt": self.prompt.model_dump(),
                "generation": self.generation.model_dump(),
                "columns": self.columns.model_dump(),
                "encoding": self.encoding,
                "chat_template": self.chat_template,
                "adapter": self.adapter,
                "calibrate": self.calibrate.model_dump(),
                "data": self.data,
            },
        )

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
                    f"{path} was written by a newer labeltune; upgrade with: pip install -U labeltune"
                )
            return RunInfo(
                values["task"],
                values["model"],
                HubConfig.model_validate(values["hub"]),
                tuple(values["labels"]),
                PromptConfig.model_validate(values["prompt"]),
                GenerationConfig.model_validate(values["generation"]),
                ColumnsConfig.model_validate(values["columns"]),
                values["chat_template"],
                values["adapter"],
                CalibrateConfig.model_validate(values.get("calibrate", {})),
                dict(values.get("data", {})),
                DataConfig(encoding=values.get("encoding", "utf-8")).encoding,
            )
        except FileNotFoundError:
            raise ModelError(f"{folder} holds no {RUN_FILE}; it is no labeltune checkpoint") from None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error


def public_name(spec: str) -> str:
    """A model or data file as others may see it: a hub's name as it is, a path of this machine without its folders."""
    return spec if is_hub_name(spec) else Path(spec).name or spec


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of an output folder, by step: those that have a manifest, which is written last."""
    folders = checkpoint_folders(output_dir)
    return [path for path in folders if (path / MANIFEST_FILE).is_file() and (path / RUN_FILE).is_file()]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Everything called checkpoint-N, by N."""
    found = []
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            if (match := _CHECKPOINT.match(path.name)) and path.is_dir():
                found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


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
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and path.name.rpartition("-")[2].isdigit():
            shutil.rmtree(path)


#: What a system says that does not let a file be written. (A library's OSError without a number means something else.)
_REFUSED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
}
#: torch.save has no error of its own for a full disk: parts of what its writer says.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_REFUSED = ("StreamWriter", "inline_container", "iostream error")


def why_not_written(error: BaseException) -> str | None:
    """Why a system or a library refused to write, in few words; None when it is another kind of error."""
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = f" ({error.filename2 or error.filename})" if error.filename else ""
        return f"{error.strerror or errno.errorcode[error.errno]}{place}"
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_REFUSED):
        return f"the disk is full, or files may not grow larger ({first_line(error)})"
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return str(error).rpartition("I/O error: ")[2]
    found = _OS_ERROR.search(str(error))  # tokenizers raises plain exceptions
    if found is not None and int(found.group(1)) in _REFUSED:
        return first_line(error)
    return None


@contextlib.contextmanager
def writing(place: Path, way_out: str = "") -> Iterator[None]:
    """What cannot be written inside is one clear error.

    Args:
        place: the file or folder that is written.
        way_out: what to do, behind a semicolon.

    Raises:
        OutputError: no space, no right, a quota, a read-only disk.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        raise OutputError(f"{place} cannot be written: {reason}{'; ' if way_out else ''}{way_out}") from error


def write_text(path: Path, text: str) -> None:
    r"""Write a file atomically, UTF-8: a reader sees the old one or the new one, never a part.

    File names that are not UTF-8 are written with escapes (`\udcd1`), which JSON reads back.

    Raises:
        OutputError: the folder cannot be written.
    """
    # A file name that is not UTF-8 is written with escapes, which JSON reads back as they were.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never a part.

    A link stays, and what it leads to is replaced; a device or a FIFO is written to.

    Raises:
        OutputError: the folder cannot be written.
    """
    if is_stream(path):
        with open_stream(path) as stream:
            stream.write(content)
        return
    path = link_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what processes that were killed left of files they were writing.

    Only for who holds the lock on these files, so that nobody is writing them now.

    Args:
        name: of a file in the folder; all files, at any depth, when None.
    """
    found = folder.rglob(".*-*.tmp") if name is None else folder.glob(f".{glob.escape(name)}-*.tmp")
    for path in list(found):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, UTF-8, indented."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
