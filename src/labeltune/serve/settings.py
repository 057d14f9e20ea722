"""What a server is told: where it listens, what it accepts, how it batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from labeltune.errors import ConfigError

#: Environment variable that holds the API key.
KEY_VARIABLE = "LABELTUNE_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        max_wait_ms: how long the first row of a batch waits for company, in milliseconds.
        batch_rows: rows of one batch.
        batch_tokens: tokens of one batch, estimated from above by characters.
        queue_rows: rows that may wait; more are refused with 429.
        max_rows: texts of one request; more are refused with 413.
        max_chars: characters of one text.
        max_labels: candidate labels of one request.
        max_body_bytes: bytes of a request's body.
        timeout: seconds until a request is given up with 504.
        api_key: what clients have to send, None for an open server; left out of `repr`.
        log_texts: documents are written into the logs.
        playground: the page at `/` is served.
        label_studio: Label Studio's ML backend protocol is answered below /v1/label-studio.
        allow_hosts: names in the `Host` header that a server without a key answers to, beside localhost and addresses.
    """

    max_wait_ms: float = 5.0
    batch_rows: int = 64
    batch_tokens: int = 16384
    queue_rows: int = 1024
    max_rows: int = 256
    max_chars: int = 100_000
    max_labels: int = 500
    max_body_bytes: int = 8 * 2**20
    timeout: float = 60.0
    api_key: bytes | None = None
    log_texts: bool = False
    playground: bool = True
    allow_hosts: tuple[str, ...] = ()
    label_studio: bool = False

    def __repr__(self) -> str:
        return f"Settings(queue_rows={self.queue_rows}, api_key={'set' if self.api_key else 'none'})"


def read_api_key(file: Path | None) -> bytes | None:
    """The key in a file, else the one in `LABELTUNE_API_KEY`, else None.

    Raises:
        ConfigError: the file cannot be read, or holds no key; the message never shows what it holds.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip().encode() or None
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error.strerror or error}") from None
    if not key or b"\n" in key:
        raise ConfigError(f"--api-key-file {file} must hold one line with the key")
    return key
