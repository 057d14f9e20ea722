"""Hugging Face and ModelScope, answered by a function."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

HUBS = {"ms": "modelscope", "hf": "huggingface_hub"}


@functools.cache
def real_signature(hub: str) -> inspect.Signature:
    """Of the installed client, read before anything is replaced."""
    return inspect.signature(importlib.import_module(HUBS[hub]).snapshot_download)


def fake_hub(
    monkeypatch: pytest.MonkeyPatch, hub: str, answer: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """Replace a hub's `snapshot_download`; a call its real signature does not allow is a TypeError."""
    calls: list[dict[str, Any]] = []
    signature = real_signature(hub)

    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        calls.append(dict(signature.bind(*args, **kwargs).arguments))
        return answer(calls[-1])

    monkeypatch.setattr(importlib.import_module(HUBS[hub]), "snapshot_download", snapshot_download)
    return calls
