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

import psutil
import typer

from labeltune.messages import localize, spoken
from labeltune.models.pocket import cache_folder

Finding = tuple[str, str, str]
OK, NOTE, LACK = "ok", "note", "LACK"

HUBS = (("ModelScope", "modelscope.cn"), ("Hugging Face", "huggingface.co"))
NO_HUB = "its models need a local folder instead"
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
    network = [] if offline else [_Asked(_hub, *hub) for hub in HUBS]
    swanlab = None if offline else _Asked(_swanlab)
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _accelerator, _memory, _disk]
    if swanlab is not None:
        checks += [lambda: _hubs(network), swanlab.answer]
    for check in checks:
        for state, name, meaning in check():
            lacks += state == LACK
            print(f"{state:>4}  {name}" + (f"\n      {meaning}" if meaning else ""), flush=True)
    print(localize("\nready") if not lacks else f"\n{lacks} lacks; see the lines marked {LACK}")
    if lacks:
        raise typer.Exit(1)


class _Asked:
    """A question to somewhere else, asked in a thread that is left behind when it takes too long."""

    def __init__(self, ask: Callable[..., Finding], *about: str) -> None:
        self.about = about
        self._found: list[Finding] = []
        self._until = time.monotonic() + PATIENCE
        self._thread = threading.Thread(target=lambda: self._found.append(ask(*about)), daemon=True)
        self._thread.start()

    def answer(self) -> Iterator[Finding]:
        """The finding."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if self._found:
            yield self._found[0]
        else:
            what = f"{self.about[0]} ({self.about[1]})" if self.about else "SwanLab"
            yield (
                NOTE,
                f"{what} cannot be reached: no answer in {PATIENCE:g} s",
                NO_HUB if self.about else LOCAL,
            )


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
    except ImportError as error:
        yield LACK, "PyTorch cannot be imported", str(error)
        return
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        yield (
            NOTE,
            f"no CUDA GPU (PyTorch is {built})",
            "training runs on the CPU in fp32: fine for model=pocket, far too slow for Qwen2-1.5B",
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
        if properties.major >= 8:
            yield OK, "bf16", ""
        else:
            yield NOTE, "no bf16 on this card", "fp16 with a loss scaler is used instead"


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


def _hub(name: str, host: str) -> Finding:
    try:
        socket.create_connection((host, 443), timeout=PATIENCE).close()
    except OSError as error:
        return NOTE, f"{name} ({host}) cannot be reached: {error}", NO_HUB
    return OK, f"{name} ({host}) can be reached", ""


def _hubs(asked: list[_Asked]) -> Iterator[Finding]:
    found = [finding for hub in asked for finding in hub.answer()]
    yield from found
    if all(state != OK for state, _, _ in found):
        yield NOTE, "no model hub", "use model=./folder with weights you copied here, or model=pocket"


def _swanlab() -> Finding:
    from labeltune.tracking.swanlab import logged_in

    answer = logged_in()
    return (OK, "SwanLab: logged in", "") if answer == "yes" else (NOTE, f"SwanLab: {answer}", LOCAL)
