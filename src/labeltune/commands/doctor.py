"""`labeltune doctor`: is this machine ready, and what does each lack mean?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import psutil
import typer

from labeltune.errors import message_of
from labeltune.io.hubs import hub_address, why_unanswered
from labeltune.messages import localize, spoken
from labeltune.models.kernels import PACKAGES, not_installed
from labeltune.models.pocket import cache_folder

Finding = tuple[str, str, str]
OK, NOTE, LACK = "ok", "note", "LACK"

NO_HUB = "its models need a local folder instead"
NO_HUBS = "use model=./folder with weights you copied here, or model=pocket (for Chinese: model=pocket-zh)"
LOCAL = "runs are kept locally; see them with `labeltune board`"
#: Seconds until a hub or SwanLab counts as out of reach.
PATIENCE = 3.0


@spoken("stdout")
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach hubs and SwanLab.")] = False,
) -> None:
    """Say what this machine has and what each lack means.

    Looks at Python, PyTorch, GPU, memory, disk, hubs and the SwanLab login; exit 1 when something needed is missing.
    """
    lacks = 0
    # The network is asked meanwhile: torch takes seconds to load, and a name server that is not there takes longer.
    hubs = [] if offline else [hub_address(hub) for hub in ("ms", "hf")]
    network = {f"{name} ({address.partition('://')[2]})": _Asked(_hub, address) for name, address in hubs}
    swanlab = None if offline else _Asked(_login)
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _accelerator, _memory, _disk]
    if swanlab is not None:
        checks += [lambda: _network(network, swanlab)]
    for check in checks:
        for state, name, meaning in check():
            lacks += state == LACK
            print(f"{state:>4}  {name}" + (f"\n      {meaning}" if meaning else ""), flush=True)
    print(localize("\nready") if not lacks else f"\n{lacks} lacks; see the lines marked {LACK}")
    if lacks:
        raise typer.Exit(1)


class _Asked:
    """A question to somewhere else, asked in a thread that is left behind when it takes too long."""

    def __init__(self, ask: Callable[..., str], *about: str) -> None:
        self._found: list[str] = []
        self._until = time.monotonic() + PATIENCE
        self._thread = threading.Thread(target=lambda: self._found.append(ask(*about)), daemon=True)
        self._thread.start()

    def answer(self) -> str:
        """What was found, or that nothing came in time."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        return self._found[0] if self._found else f"cannot be reached: no answer in {PATIENCE:g} s"


def _python() -> Iterator[Finding]:
    yield OK, f"Python {platform.python_version()}", ""


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "peft", "datasets", "accelerate", "modelscope", "swanlab"):
        try:
            yield OK, f"{name} {importlib.metadata.version(name)}", ""
        except importlib.metadata.PackageNotFoundError:
            yield LACK, name, f"not installed; pip install {name}"


def _accelerator() -> Iterator[Finding]:
    try:
        import torch

        from labeltune.models.precision import has_bf16
    except ImportError as error:
        yield LACK, "PyTorch cannot be imported", str(error)
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield (
            NOTE,
            f"no CUDA GPU (PyTorch is {built})",
            "training runs on the CPU in fp32: fine for the pocket models, far too slow for Qwen2-1.5B",
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            OK,
            f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
            "",
        )
        if properties.total_memory < 10 * 2**30:
            yield (
                NOTE,
                "less than 10 GiB of GPU memory",
                "Qwen2-1.5B may need training.method=qlora",
            )
        if has_bf16(index):
            yield OK, "bf16", ""
        else:
            yield NOTE, "no bf16 on this card", "fp16 with a loss scaler is used instead"
    missing = not_installed(set(PACKAGES))
    if missing:
        yield (
            NOTE,
            f"not installed: {', '.join(missing)}",
            "layers of Qwen3.5, Qwen3-Next, LFM2, Granite 4, Falcon-H1 and other hybrid models go through PyTorch's own operations, with the "
            f"same results but much slower (other models want none of this); pip install {' '.join(missing)}",
        )


def _memory() -> Iterator[Finding]:
    free = psutil.virtual_memory().available / 2**30
    state, meaning = (
        (OK, "") if free >= 8 else (NOTE, "Qwen2-1.5B needs about 8 GiB to load; the pocket model 2 GiB")
    )
    yield state, f"{free:.1f} GiB of memory free", meaning


def _disk() -> Iterator[Finding]:
    for what, folder, wanted in (("here", Path.cwd(), 2), ("the cache", cache_folder(), 5)):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        name = f"{free:.1f} GiB of disk free for {what} ({folder})"
        if not os.access(existing, os.W_OK):
            yield LACK, name, "the folder cannot be written; set LABELTUNE_CACHE or work in another folder"
        elif free < wanted:
            yield NOTE, name, f"checkpoints and models want {wanted} GiB or more"
        else:
            yield OK, name, ""


def _hub(address: str) -> str:
    try:
        url = urlsplit(address)
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or address, port), timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        return f"cannot be reached: {why_unanswered(error) or message_of(error)}"
    return "yes"


def _login() -> str:
    from labeltune.tracking.swanlab import logged_in

    return logged_in()


def _network(hubs: dict[str, _Asked], swanlab: _Asked) -> Iterator[Finding]:
    """A finding for each hub and SwanLab; one for all that are out of reach where no hub is in reach, as they have one cause."""
    found = {hub: asked.answer() for hub, asked in hubs.items()}
    login = swanlab.answer()
    away = login.startswith("cannot be reached")
    if "yes" in found.values():
        for what, answer in found.items():
            yield (
                (OK, f"{what} can be reached", "") if answer == "yes" else (NOTE, f"{what} {answer}", NO_HUB)
            )
        if away:
            yield NOTE, f"SwanLab {login}", LOCAL
    else:
        reasons = dict.fromkeys(
            answer.partition(": ")[2] for answer in (*found.values(), *([login] if away else []))
        )
        names = ", ".join([*found, *(["SwanLab"] if away else [])])
        yield (
            NOTE,
            f"{names} cannot be reached: {', '.join(reasons)}",
            f"{NO_HUBS}; {LOCAL}" if away else NO_HUBS,
        )
    if not away:
        yield (OK, "SwanLab: logged in", "") if login == "yes" else (NOTE, f"SwanLab: {login}", LOCAL)
