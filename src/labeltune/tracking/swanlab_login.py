"""The SwanLab login, by itself: `labeltune doctor` asks for it without loading transformers."""

from __future__ import annotations


def logged_in() -> str:
    """`yes`, or why not; asks the server when there is a key, never the user."""
    import swanlab

    try:
        if not swanlab.Settings().api_key and not _stored_key():
            return "no key found; log in with `swanlab login` or set SWANLAB_API_KEY"
        swanlab.login(timeout=5)
    except Exception as error:
        return f"the login failed ({type(error).__name__}); check the key and the network"
    return "yes"


def _stored_key() -> str | None:
    from swanlab.sdk.internal.settings import create_settings

    key: str | None = create_settings().api_key
    return key
