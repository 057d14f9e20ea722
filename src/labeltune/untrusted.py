"""Folders that came from elsewhere: what is never loaded from them, and where they may not lead."""

from __future__ import annotations

from pathlib import Path

from labeltune.errors import HubError

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
