"""Checking data: one function that reads from top to bottom."""

from __future__ import annotations

from collections.abc import Callable

from labeltune.config import RunConfig
from labeltune.data.loading import Rows, load_rows


def check_data(
    config_or_task: RunConfig,
    train: str,
    test: str | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
) -> list[Rows]:
    """Audit a training file and, if given, a test file against it: every fault, none of them raised."""
    from labeltune.data.audit import add_duplicates, add_shared

    config = config_or_task
    rows = load_rows(train, config.task, config.data, config.hub, token_counts=token_counts)
    add_duplicates(rows.audit, rows.where)
    if test is None:
        return [rows]
    other = load_rows(test, config.task, config.data, config.hub, token_counts=token_counts)
    add_duplicates(other.audit, other.where)
    add_shared(rows.audit, other.audit, other.where)
    return [rows, other]
