"""What loading a run reads, so that no command writes over it; what a killed training left of its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from labeltune.config import RunConfig
from labeltune.io.outputs import check_folder, is_hub_name, local_path
from labeltune.io.run_folder import (
    MANIFEST_FILE,
    RUN_FILE,
    RunInfo,
    checkpoint_folders,
    checkpoints,
    find_checkpoint,
)

#: Stands in a checkpoint's folder from its first file until its manifest is there.
UNFINISHED_FILE = ".unfinished"


#: What an evaluation writes into its folder.
EVALUATION_FILES = ("metrics.json", "predictions.jsonl", "report.html")


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


def encoding_of(run: str | os.PathLike[str]) -> str | None:
    """The encoding of a run's data; None for a run on a hub, which is not fetched for it.

    Raises:
        ModelError: there is no complete checkpoint.
    """
    if is_hub_name(str(run)):
        return None
    return RunInfo.load(find_checkpoint(run)).encoding


def check_inputs_kept(config: RunConfig, path: str | None, overwrite: bool) -> None:
    """Whether training leaves its model, its rows and its config file, at `path`, as they are.

    Args:
        overwrite: an earlier run's checkpoints will be deleted.

    Raises:
        OutputError: it would delete one of them, or write its report over one.
    """
    data, folder = config.data, Path(config.output_dir)
    read = [
        given for given in (path, config.model, data.train, data.validation, data.test) if given is not None
    ]
    if overwrite:
        for removed in (folder / "best", *checkpoints(folder)):
            if removed.exists():
                check_folder(removed, read, replaced=True)
    check_folder(folder / "validation", read, EVALUATION_FILES)


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
