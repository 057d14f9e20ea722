"""What a client is told when a request cannot be answered: one shape, the one that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: HTTP status -> (`type` of the error, what it says).
KINDS: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "too_large_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "overloaded_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: what is wrong and how to repair it; never holds the document.
        param: the field of the request, e.g. `text[3]`.
        retry_after: seconds until it is worth trying again.
        allow: methods that the address takes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.allow = tuple(allow)

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.allow:
            found["allow"] = ", ".join(self.allow)
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found

    def body(self) -> dict[str, Any]:
        """The response as JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": str(self.status)}
        }


def field_name(path: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`; foreign names are shortened and always printable."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            plain = part[:60].encode("ascii", "backslashreplace").decode()
            plain = "".join(c if c.isprintable() else "?" for c in plain)
            name += f".{plain}" if name else plain
    return name or "body"
