"""The exported folder: it appears whole or not at all, and goes to a hub through the hub's own client and login."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from huggingface_hub import HfApi

from labeltune.errors import ConfigError, HubError, OutputError, first_line
from labeltune.io.hubs import hub_address, repo_page
from labeltune.io.outputs import check_folder, is_hub_name, link_target, obey_umask, writing
from labeltune.io.run_folder import files_read

if TYPE_CHECKING:
    from labeltune.export.parity import Parity

#: Number formats that whole models are exported in.
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
#: Says how an export was made; a folder that has it may be replaced by `--overwrite`.
EXPORT_FILE = "export.json"


@dataclass(frozen=True)
class Asked:
    """Which forms of a run are wanted, and which engine is asked.

    Attributes:
        merged: a whole model.
        dtype: of a whole model; that of the base's weights when None.
        ollama: a Modelfile, too.
        onnx: ONNX, too.
        gguf: a type of GGUF, too; None for none.
        engine: who is asked the rows; None for nobody.
        python: of its environment, and of llama.cpp's converters; this one when None.
        url: where it runs already; it is started when None.
        push: where the folder goes.
        name: what servers call it; the folder's name when None.
        tolerance: share of rows that may be answered otherwise.
    """

    merged: bool = False
    dtype: str | None = None
    ollama: bool = False
    onnx: bool = False
    gguf: str | None = None
    engine: str | None = None
    python: str | None = None
    url: str | None = None
    push: str | None = None
    name: str | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        folder: where it is.
        kind: `merged model` or `adapter`.
        dtype: number format of the weights; of the base's, for an adapter.
        parity: how its answers compare with the run's; None when that was not checked.
        engine_parity: the same of the engine that served it; None where none was asked.
        engine_figures: figures of run and engine on rows with right answers, and the intervals of their differences.
        commands: what to run next, by what it is for.
        address: where it was pushed, None when it was not.
    """

    folder: Path
    kind: str
    dtype: Dtype
    parity: Parity | None
    commands: dict[str, str]
    address: str | None = None
    engine_parity: Parity | None = None
    engine_figures: Mapping[str, Any] = field(default_factory=dict)


def check_target(
    output: Path, checkpoint: Path, overwrite: bool, inputs: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Whether an export may go there; `inputs` are other files that it reads.

    Raises:
        OutputError: it is no folder, is not empty, cannot be written, or is or holds the run, its base model or an input.
    """
    target, source = output.resolve(), checkpoint.resolve()
    if source == target or target in source.parents:
        raise OutputError(f"{output} holds the run that is to be exported; choose another folder")
    check_folder(output, [*files_read(checkpoint), *inputs], replaced=True)
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{output} is not empty; replace an earlier export with --overwrite or choose another folder"
        )
    if not (output / EXPORT_FILE).is_file():
        raise OutputError(
            f"{output} holds no {EXPORT_FILE}, so it is no earlier export and is not replaced; choose another folder"
        )


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends, and vanishes when it fails.

    Raises:
        OutputError: the folder cannot be written.
    """
    output = link_target(output.absolute())
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error}") from error
    try:
        with writing(output):
            yield folder
            obey_umask(folder)
            _put_in_place(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, output: Path) -> None:
    if not output.exists():
        folder.rename(output)
        return
    # A folder cannot be exchanged in one step everywhere: the old one steps aside, and comes back if the new one cannot move in.
    aside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-old-"))
    old = aside / "old"
    try:
        output.rename(old)
        try:
            folder.rename(output)
        except OSError:
            old.rename(output)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_repo(spec: str) -> None:
    """Raise ConfigError unless `spec` is `hf:org/name` or `ms:org/name`."""
    parts = spec[3:].split("/")
    if not is_hub_name(spec) or len(parts) != 2 or not all(parts):
        raise ConfigError(f"--push {spec}: write hf:org/name (Hugging Face) or ms:org/name (ModelScope)")


def push_folder(folder: Path, spec: str) -> str:
    """Upload a folder into a model repository, which is made (private) when there is none.

    Args:
        spec: `hf:org/name` or `ms:org/name`.

    Returns:
        Its address.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    hub, repo = spec[:2], spec[3:]
    message = "Upload by labeltune export"
    try:
        if hub == "hf":
            hf = HfApi()
            hf.create_repo(repo, private=True, repo_type="model", exist_ok=True)
            hf.upload_folder(repo_id=repo, folder_path=folder, repo_type="model", commit_message=message)
        else:
            from modelscope.hub.api import HubApi

            ms = HubApi()
            ms.create_repo(repo, visibility="private", repo_type="model", exist_ok=True)
            ms.upload_folder(repo, folder, repo_type="model", commit_message=message)
    except Exception as error:
        login = "hf auth login" if hub == "hf" else "modelscope login"
        raise HubError(
            f"{repo} could not be pushed to {hub_address(hub)[0]} ({first_line(error)}). The export itself is complete in {folder}; "
            f"check the name, your login ({login}) and the network"
        ) from error
    return repo_page(hub, "model", repo)
