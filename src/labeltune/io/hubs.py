"""Asking a model hub: said at once, without other libraries' warnings, and with one error that tells what to do."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from labeltune.errors import HubError, ModelError, message_of
from labeltune.io.progress import during

#: Names of exceptions, of several libraries, that say that a host did not answer, in words; the first that fits is told.
_NO_ANSWER = {
    "OfflineModeIsEnabled": "offline mode is on",
    "gaierror": "host name not found",
    "ConnectionRefusedError": "the connection was refused",
    "SSLError": "no secure connection",
    "ProxyError": "the proxy cannot be used",
    "TimeoutError": "no answer in time",
    "TimeoutException": "no answer in time",
    "Timeout": "no answer in time",
    "ConnectionError": "no connection",
    "TransportError": "no connection",
}
#: A longer text of a library, e.g. that of a connection pool, is not told.
_SHORT = 80
#: The same for what a hub answers.
_ANSWERS = {
    "GatedRepoError": "its terms have to be accepted there first",
    "RepositoryNotFoundError": "there is no such repository, or you may not see it",
    "RevisionNotFoundError": "there is no such revision",
}


Kind = Literal["model", "dataset"]


def fetch(
    hub: str,
    kind: Kind,
    repo: str,
    instead: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_dir: str | None = None,
    allowed: list[str] | None = None,
    ignored: list[str] | None = None,
) -> Path:
    """Fetch a repository with its hub's own client; returns the folder of its files.

    Args:
        hub: `ms` or `hf`.
        repo: `org/name`.
        instead: how to go on without the hub, for the error; the page of the repository's files stands in front of it.
        revision: branch, tag or commit; the hub's default when None.
        cache_dir: folder for downloads; the hub's own when None.
        local_dir: where to put the files themselves; into the cache when None.
        allowed, ignored: patterns of the files wanted, all when None, and of those that are not.

    Raises:
        HubError: the hub cannot be reached or has no such repository.
    """
    with _asking(hub, kind, repo, instead):
        client = importlib.import_module("modelscope" if hub == "ms" else "huggingface_hub")
        folder = Path(
            client.snapshot_download(
                repo,
                repo_type=kind,
                revision=revision,
                cache_dir=cache_dir,
                local_dir=local_dir,
                allow_patterns=allowed,
                ignore_patterns=ignored,
            )
        )
    if local_dir is None:
        _check_inside(folder, f"{hub}:{repo}")
    return folder


@contextlib.contextmanager
def _asking(hub: str, kind: Kind, repo: str, instead: str) -> Iterator[None]:
    """What is done inside asks a hub for a repository; anything that fails in it is a HubError."""
    name, address = hub_address(hub)
    host = address.partition("://")[2]
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), during(f"fetching {repo} from {name} ({host})"):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        page = f"{repo_page(hub, kind, repo)}/{'files' if hub == 'ms' else 'tree/main'}"
        reason = why_unanswered(error)
        if reason is not None:
            raise HubError(
                f"{repo} could not be fetched: {name} ({host}) cannot be reached ({reason}). Check the network, "
                f"or download its files by hand from {page} and {instead}"
            ) from error
        raise HubError(
            f"{repo} could not be fetched from {name} ({_in_words(error, _ANSWERS) or message_of(error)}). Check the name and the revision, "
            f"or download its files by hand from {page} and {instead}"
        ) from error
    finally:
        logging.disable(disabled)


def hub_address(hub: str) -> tuple[str, str]:
    """Name and address of `ms` or `hf`, a mirror's where the hub's own variable names one."""
    if hub == "ms":
        return "ModelScope", f"https://{os.environ.get('MODELSCOPE_DOMAIN') or 'www.modelscope.cn'}"
    return "Hugging Face", (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def repo_page(hub: str, kind: Kind, repo: str) -> str:
    """The address of a repository."""
    address = hub_address(hub)[1]
    if hub == "ms":
        return f"{address}/{kind}s/{repo}"
    return f"{address}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def why_unanswered(error: BaseException) -> str | None:
    """Why a host did not answer, in words; None where the error, and whatever caused it, says something else."""
    reason, said = _in_words(error, _NO_ANSWER), message_of(error)
    return said if reason == "no connection" and len(said) <= _SHORT else reason


def _in_words(error: BaseException | None, words: Mapping[str, str]) -> str | None:
    found: set[str] = set()
    while error is not None:
        found |= {each.__name__ for each in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return next((words[name] for name in words if name in found), None)


#: Set to 1 by a user who trusts the code of the models whose checkpoints are loaded.
TRUST_VARIABLE = "LABELTUNE_TRUST_REMOTE_CODE"

#: Endings of files that may hold Python objects, and with them code.
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def _check_inside(snapshot: Path, spec: str) -> None:
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
