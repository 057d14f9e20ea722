"""What loading a run reads, so that no command writes over it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from labeltune.config import RunConfig
from labeltune.errors import OutputError
from labeltune.output_paths import local_path, same_file
from labeltune.run_folder import MANIFEST_FILE, RUN_FILE, RunInfo, checkpoints, find_checkpoint


def files_read(run: str | os.PathLike[str]) -> list[Path]:
    """What a command reads that loads this run: the files of its checkpoint, and the folder of its base model.

    Empty for a run on a hub.

    Raises:
        ModelError: there is no complete checkpoint.
    """
    if str(run).startswith(("ms:", "hf:")):
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


def check_base_kept(config: RunConfig) -> None:
    """Whether a run may begin with the deletion of an earlier run's checkpoints.

    Raises:
        OutputError: the run starts from one of them.
    """
    base, folder = local_path(config.model), Path(config.output_dir)
    if base is not None and any(same_file(base, path) for path in (folder / "best", *checkpoints(folder))):
        raise OutputError(
            f"--overwrite would delete {config.model}, which this run starts from; choose another output_dir"
        )
