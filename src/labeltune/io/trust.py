"""Folders that came from elsewhere: what is never loaded from them, and where they may not lead."""

from __future__ import annotations

import os
from pathlib import Path

from labeltune.errors import HubError, ModelError

#: Set to 1 by a user who trusts the code of the models whose checkpoints are loaded.
TRUST_VARIABLE = "LABELTUNE_TRUST_REMOTE_CODE"

#: Endings of files that may hold Python objects, and with them code.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def check_inside(snapshot: Path, spec: str) -> None:
    """Refuse a hub's snapshot with a link to somewhere else on this machine.

    Links into the repository's own folder are how Hugging Face's cache is made (`snapshots/REVISION` -> `blobs`).

    Raises:
        HubError: a file of it lies outside.
    """
    folder = snapshot.resolve()
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise HubError(
                f"{spec}: {path.relative_to(folder)} is a link out of the downloaded folder, to {path.resolve()}; it is not used. "
                f"Remove {folder}, and report the repository to its hub"
            )


def may_run_code(model: str, agreed: bool) -> bool:
    """True where the user agreed to run the Python code of a model whose checkpoint asks for it.

    A checkpoint may come from anybody, so what it says of itself is not enough.

    Args:
        agreed: the user's own config says so, as in the training that made this checkpoint.

    Raises:
        ModelError: neither `agreed` nor `LABELTUNE_TRUST_REMOTE_CODE=1` in the environment.
    """
    if not agreed and os.environ.get(TRUST_VARIABLE) != "1":
        raise ModelError(
            f"this checkpoint asks to run Python code that comes with {model} (hub.trust_remote_code in its labeltune.json). "
            f"If you trust it, set {TRUST_VARIABLE}=1 in the environment"
        )
    return True
