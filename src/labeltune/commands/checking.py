"""Checking data, and reporting on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import RunConfig
from labeltune.data.loading import Rows, Splits, load_rows
from labeltune.data.schemas import Fault
from labeltune.errors import PromptError, counted
from labeltune.io.run_folder import write_text

if TYPE_CHECKING:
    from labeltune.prompts.builder import PromptBuilder

#: Rows that an error lists.
_SHOWN = 10


def check_data(
    config_or_task: RunConfig,
    train: str,
    test: str | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    tokenizer: Any | None = None,
) -> list[Rows]:
    """Audit a training file, and against it the config's validation file and a test file; no fault is raised.

    Args:
        tokenizer: finds rows that cannot fit `prompt.max_length`; they are not looked for when None.
    """
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
    if tokenizer is not None:
        _add_too_long(found, config, tokenizer)
    return found


def _add_too_long(files: Sequence[Rows], config: RunConfig, tokenizer: Any) -> None:
    """Add an error for each row that cannot fit; the labels are those of the training file, as in training."""
    from labeltune.prompts import make_task
    from labeltune.prompts.builder import PromptBuilder
    from labeltune.prompts.template import ChatTemplate
    from labeltune.training.dataset import rows_that_cannot_fit

    labels = config.data.labels or files[0].audit.label_set()
    builder = PromptBuilder(make_task(config.task, labels, config.prompt), ChatTemplate(tokenizer))
    needed = [rows_that_cannot_fit(rows.dataset, builder) for rows in files]
    enough = max((tokens for found in needed for tokens in found.values()), default=0)
    for rows, found in zip(files, needed, strict=True):
        for number, tokens in found.items():
            rows.audit.add_fault(too_long(rows.where(number), tokens, config.prompt.max_length, enough))


def too_long(where: str, tokens: int, max_length: int, enough: int) -> Fault:
    """The fault of a row that cannot fit; `enough` is the length that fits every row."""
    return Fault(
        "too_long",
        where,
        f"instruction, candidates and answer alone need {tokens} tokens, {tokens - max_length} more than "
        f"prompt.max_length={max_length}; prompt.max_length={enough} fits every row",
    )


def without_too_long(
    splits: Splits, builder: PromptBuilder, config: RunConfig, say: Callable[[str], None] | None = None
) -> Splits:
    """The rows that fit `prompt.max_length`; those that cannot are left out with `data.on_error: skip`.

    Args:
        say: told how many were left out.

    Raises:
        PromptError: some cannot, and `data.on_error` is `stop`; the message lists them and the length that would do.
    """
    from labeltune.training.dataset import rows_that_cannot_fit

    parts = [splits.train, splits.validation]
    needed = [{} if part is None else rows_that_cannot_fit(part, builder) for part in parts]
    count = sum(map(len, needed))
    if not count:
        return splits
    limit, enough = config.prompt.max_length, max(tokens for found in needed for tokens in found.values())
    if config.data.on_error == "stop":
        faults = [
            too_long(str(part[number]["source"]), tokens, limit, enough)
            for part, found in zip(parts, needed, strict=True)
            if part is not None
            for number, tokens in found.items()
        ]
        shown = "\n  ".join(f"{fault.where}: {fault.message}" for fault in faults[:_SHOWN])
        more = f"\n  ... and {count - _SHOWN} more" if count > _SHOWN else ""
        raise PromptError(
            f"{counted(count, 'row')} cannot fit:\n  {shown}{more}\n"
            f"Set prompt.max_length={enough}, shorten prompt and labels, or leave them out with data.on_error=skip"
        )
    fitting = [
        [n for n in range(len(part)) if n not in found] if part is not None else []
        for part, found in zip(parts, needed, strict=True)
    ]
    kept = [None if part is None else part.select(rows) for part, rows in zip(parts, fitting, strict=True)]
    if not kept[0]:
        raise PromptError(f"no row fits prompt.max_length={limit}; prompt.max_length={enough} fits every row")
    if say is not None:
        say(
            f"data: {counted(count, 'row')} skipped that cannot fit prompt.max_length={limit} (data.on_error=skip); "
            f"prompt.max_length={enough} fits every row"
        )
    skipped = {**splits.skipped, "too_long": splits.skipped.get("too_long", 0) + count}
    return replace(
        splits,
        train=kept[0],
        validation=kept[1] or None,
        train_texts=splits.train_texts[fitting[0]],
        skipped_rows=splits.skipped_rows + count,
        skipped=skipped,
    )


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
        DataError: a file cannot be used as a whole, so there is nothing to report on.
        MissingExtraError: datasketch or cleanlab is not installed.
        OutputError: the report cannot be written.
    """
    from labeltune.data.audit import stop_on_errors
    from labeltune.evaluation.data_report import check_report, data_page, make_report

    check_report(path)
    stop_on_errors([rows.audit for rows in files], skip=True, fix="")
    report = make_report(files, config, tokenizer, model, progress=True)
    write_text(path, data_page(report))
    return report.to_dict()
