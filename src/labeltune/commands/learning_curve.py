"""`labeltune train --learning-curve`: runs on parts of the training rows before the run on all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labeltune.config import RunConfig, build_config
from labeltune.data.formats.write import write_rows
from labeltune.data.loading import load_splits, stratum
from labeltune.errors import ConfigError
from labeltune.evaluation.learning_curve import parts_of, stratified_order
from labeltune.io.outputs import write_text
from labeltune.io.run_folder import VALIDATION_FOLDER
from labeltune.types import Example

#: Where the runs on parts are kept, in the run's folder.
FOLDER = "learning-curve"
#: A part has at least so many rows, and as many as there are labels.
_FEWEST = 8


def parts_of_run(config: RunConfig) -> list[tuple[RunConfig, int, int]]:
    """(config, its rows, all rows) of the runs on an eighth, a quarter and a half of the training rows; their files are written.

    Raises:
        ConfigError: there are no validation rows, or too few others to cut.
    """
    splits = load_splits(config.task, config.data, config.hub, config.training.seed)
    rows, labels = len(splits.train), len(splits.labels)
    if splits.validation is None:
        raise ConfigError(
            "--learning-curve needs validation rows; set data.validation_fraction or data.validation"
        )
    sizes = parts_of(rows, max(_FEWEST, labels))
    if len(sizes) < 2:
        raise ConfigError(
            f"--learning-curve cuts the training rows into an eighth, a quarter and a half, of at least "
            f"{max(_FEWEST, labels)} rows; there are {rows}"
        )
    folder = Path(config.output_dir) / FOLDER
    order = stratified_order(
        [stratum(row) for row in splits.train.remove_columns("text")], config.training.seed
    )
    _write(folder / "validation.jsonl", [Example.from_row(row) for row in splits.validation])
    for size in sizes:
        chosen = sorted(int(number) for number in order[:size])
        _write(folder / f"{size}.jsonl", [Example.from_row(splits.train[number]) for number in chosen])
    return [(_part(config, folder, size, splits.labels), size, rows) for size in sizes]


def _write(path: Path, examples: list[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(write_rows(examples)))


def _part(config: RunConfig, folder: Path, size: int, labels: tuple[str, ...]) -> RunConfig:
    """The config of a run on a part of the rows."""
    values = config.model_dump()
    values["data"] |= {
        "train": str(folder / f"{size}.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "test": None,
        "labels": labels,
        "columns": {},
        "format": "rows",
        "encoding": "utf-8",
        "max_rows": None,
    }
    return build_config({**values, "output_dir": str(folder / str(size)), "tracking": "none"})


def figures_of(config: RunConfig) -> dict[str, Any]:
    """The validation report of a run."""
    file = Path(config.output_dir) / VALIDATION_FOLDER / "metrics.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
