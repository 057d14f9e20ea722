"""What a command is going to read, found out before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from labeltune.config import load_config
from labeltune.data.sources import resolve_data
from labeltune.errors import DataError
from labeltune.io.outputs import is_hub_name
from labeltune.io.run_folder import RunInfo, files_read, find_checkpoint


def files_of(run: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[str | os.PathLike[str]]:
    """The files and folders that stand for a run, or for the untuned model of a config file.

    Raises:
        ConfigError: the config cannot be used.
        ModelError: there is no such run.
    """
    if Path(run).suffix in {".yaml", ".yml"}:
        config = load_config(run, overrides)
        used = (run, config.model, config.data.train, config.data.validation)
        return [given for given in used if given is not None]
    return list(files_read(run))


def data_to_measure(run: str | os.PathLike[str], data: str | None, overrides: Sequence[str] = ()) -> str:
    """The labelled rows to measure on: `data`, else the run's own `data.test`; a file of this machine is there.

    Raises:
        ConfigError: the config cannot be used.
        DataError: neither is given, or there is no such file.
        ModelError: there is no such run.
    """
    spec, why = data, ""
    if spec is None:
        spec, why = (
            _test_data_of(run, overrides),
            f" ({run} names it in data.test; --data FILE takes another)",
        )
    if spec is None:
        raise DataError(f"name the labelled rows with --data FILE; {run} was trained without data.test")
    if not is_hub_name(spec):
        try:
            resolve_data(spec)
        except DataError as error:
            raise DataError(f"{error}{why}") from None
    return spec


def _test_data_of(run: str | os.PathLike[str], overrides: Sequence[str]) -> str | None:
    if Path(run).suffix in {".yaml", ".yml"}:
        return load_config(run, overrides).data.test
    if is_hub_name(str(run)):
        return None
    found = RunInfo.load(find_checkpoint(run)).data.get("test")
    return found if isinstance(found, str) else None
