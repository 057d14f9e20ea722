"""The body of a request, read within its limits and looked through before anything else sees it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from labeltune.serve.faults import ApiError, field_name

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: Lists and objects inside each other; our own requests need four.
DEEPEST = 32
#: Control characters that documents have.
_ALLOWED = {"\t", "\n", "\r", "\f"}
#: The same as a JSON schema pattern.
CLEAN_PATTERN = r"^[^\x00-\x08\x0b\x0e-\x1f\x7f]*$"
_CONTROL = {chr(code) for code in (*range(32), 127)} - _ALLOWED


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """The bytes of a body.

    Raises:
        ApiError: it is larger than `limit` (413), which is seen before it is read where its length is announced.
        ClientGone: the client went away.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and len(announced) < 20 and int(announced) > limit:
        raise ApiError(413, f"the body has {int(announced)} bytes; at most {limit} are accepted", "body")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", "body")
        if not message.get("more_body"):
            return b"".join(parts)


def check_json(body: bytes) -> None:
    """Refuse what is no JSON object, or would break something further in: depth, control characters, half characters.

    Raises:
        ApiError: with the field (400 for what is no JSON, else 422).
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}", "body") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(422, "the body is nested too deeply", "body") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}", "body") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:100]}", "body") from None
    if not isinstance(value, dict):
        raise ApiError(422, "the body must be a JSON object", "body")
    _look_through(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _look_through(value: object) -> None:
    left: list[tuple[object, tuple[str | int, ...]]] = [(value, ())]
    while left:
        item, path = left.pop()
        if isinstance(item, str):
            _check_text(item, path)
        elif isinstance(item, (dict, list)):
            if len(path) >= DEEPEST:
                name = field_name(path[:4])
                raise ApiError(422, f"{name}: lists and objects are nested more than {DEEPEST} deep", name)
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            for key, inner in pairs:
                if isinstance(key, str):
                    _check_text(key, (*path, key))
                left.append((inner, (*path, key)))


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    name = field_name(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            422, f"{name}: half a surrogate pair at character {error.start}; send whole characters", name
        ) from None
    if not _CONTROL.isdisjoint(text):
        at = next(i for i, c in enumerate(text) if c in _CONTROL)
        raise ApiError(
            422, f"{name}: control character U+{ord(text[at]):04X} at character {at}; remove it", name
        )
