"""Logs as JSON lines on standard error: no key, and no document unless that was asked for."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any

#: What a request adds to its own line; set anew for every request.
request_notes: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "request_notes", default=None
)
_log = logging.getLogger("labeltune.serve")


def note(**values: Any) -> None:
    """Add values to the line of the request that is being answered."""
    notes = request_notes.get()
    if notes is not None:
        notes.update(values)


def log(event: str, level: int = logging.INFO, **values: Any) -> None:
    """Write a line."""
    _log.log(level, event, extra={"values": values})


def frames(error: BaseException) -> list[str]:
    """Kind and places of an error; its message may hold a document and is left out."""
    places = traceback.extract_tb(error.__traceback__)
    return [type(error).__name__, *(f"{place.filename}:{place.lineno} {place.name}" for place in places[-8:])]


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Ours with its values; of other libraries' lines the message, and of their errors the places."""
        values = getattr(record, "values", None)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage() if values is None else record.msg,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = frames(record.exc_info[1])
        return json.dumps({**line, **(values or {})}, ensure_ascii=True)


def log_to_stderr() -> None:
    """Send our lines, and the errors and warnings of uvicorn, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("labeltune.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
