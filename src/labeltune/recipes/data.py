"""Checking data, and reporting on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labeltune.config import RunConfig
from labeltune.data.loading import Rows, load_rows
from labeltune.run_folder import write_text


def check_data(
    config_or_task: RunConfig,
    train: str,
    test: str | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
) -> list[Rows]:
    """Audit a training file, and against it the config's validation file and a test file; no fault is raised."""
    from labeltune.data.audit import add_duplicates
    from labeltune.data.meeting import add_meeting_faults, nothing_to_learn
    from labeltune.data.schemas import Fault

    config = config_or_task
    rows = load_rows(train, config.task, config.data, config.hub, token_counts=token_counts)
    add_duplicates(rows.audit, rows.where)
    # Another file, e.g. a single test file, may well hold rows of one label.
    if train == config.data.train and (nothing := nothing_to_learn(rows.audit)) is not None:
        rows.audit.add_fault(Fault("one_label", f"{rows.audit.path}:1", nothing))
    found = [rows]
    for spec in (config.data.validation, test):
        if spec is not None:
            other = load_rows(spec, config.task, config.data, config.hub, token_counts=token_counts)
            add_duplicates(other.audit, other.where)
            add_meeting_faults(rows, other, config.data)
            found.append(other)
    return found


def report_data(
    files: Sequence[Rows],
    config: RunConfig,
    path: Path,
    tokenizer: Any | None = None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Write the HTML report of audited files, the training file first; returns its findings, JSON-ready.

    `tokenizer` counts tokens, and the input embeddings in its folder `model` help to judge labels; None leaves either out.

    Raises:
        MissingExtraError: datasketch or cleanlab is not installed.
        OutputError: the report cannot be written.
    """
    from labeltune.evaluation.data_page import data_page
    from labeltune.evaluation.data_report import check_report, make_report

    check_report(path)
    report = make_report(files, config, tokenizer, model, progress=True)
    write_text(path, data_page(report))
    return report.to_dict()
