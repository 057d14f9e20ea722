"""Full disks, quotas, read-only folders and missing rights: one clear error, nothing lost, and it goes on when there is room."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torture import world, zygote
from torture.common import PartResult, Settings

#: Sizes of disk, and limits of file size, that each command is tried with at full size.
SIZES = 12
ROOM = "100m"


@dataclass(frozen=True)
class Command:
    """Something that writes.

    Attributes:
        name: for messages.
        arguments: of `labeltune`; `{out}` is the place to write to.
        largest: bytes it needs, about; it is tried with less.
        again: appended when it is tried again after it has failed.
        fine: its exit code when it succeeds.
    """

    name: str
    arguments: tuple[str, ...]
    largest: int
    again: tuple[str, ...] = ()
    fine: int = 0

    def at(self, out: Path) -> list[str]:
        """The arguments for a place."""
        return [argument.replace("{out}", str(out)) for argument in self.arguments]


def run(settings: Settings) -> PartResult:
    """See the module."""
    result = PartResult("full disks")
    zygote.warm()
    world.build(settings.folder)
    try_all(settings, settings.folder, result)
    return result


def try_all(settings: Settings, folder: Path, result: PartResult) -> None:
    """Every command against every fault."""
    reference = world.empty(folder / "whole")
    config = world.config(folder, "classification", {"save_steps": 2, "save_total_limit": 2, "epochs": 1})
    if zygote.run(["train", str(config)], reference, folder / "setup.log") != 0:
        raise RuntimeError((folder / "setup.log").read_text(encoding="utf-8"))
    commands = all_commands(config, reference / "out", folder)
    can_mount = mounts(folder)
    tried: list[str] = []
    for command in commands:
        generator = settings.random("disk", command.name)
        for number in range(settings.count(SIZES, 2)):
            size = int(command.largest * generator.random()) // 4096 * 4096 + 4096
            attempt = Attempt(folder, command, reference / "out", result, f"{number}")
            if can_mount:
                attempt.full_disk(size)
            attempt.small_files(int(command.largest * generator.random() ** 2 / 3) + 8000)
        attempt = Attempt(folder, command, reference / "out", result, "rights")
        attempt.read_only_folder()
        if can_mount:
            attempt.read_only_disk()
    tried.append("limits of file size, folders without the right to write")
    if can_mount:
        tried.insert(0, "full and read-only disks (tmpfs)")
        other_places(folder, config, reference / "out", result)
        tried.append("full caches and temporary folders")
    else:
        tried.append("no disk could be mounted here, so full and read-only disks were left out")
    full_standard_output(folder, reference / "out", result)
    result.notes = [
        f"{', '.join(command.name for command in commands)}: {', '.join(tried)}, full standard output"
    ]


def all_commands(config: Path, run: Path, folder: Path) -> tuple[Command, ...]:
    """What writes."""
    rows = str(folder / "classification.jsonl")
    return (
        Command("train", ("train", str(config), "output_dir={out}"), 1_300_000),
        Command("predict", ("predict", str(run), rows, "-o", "{out}"), 30_000, ("--resume",)),
        Command("export", ("export", str(run), "{out}", "--no-verify"), 150_000),
        Command("export --merged", ("export", str(run), "{out}", "--merged", "--no-verify"), 400_000),
        Command("evaluate", ("evaluate", str(run), "--data", rows, "-o", "{out}"), 100_000),
        Command("data check --report", ("data", "check", rows, "--report", "{out}"), 60_000),
        Command("data convert", ("data", "convert", rows, "{out}"), 20_000),
    )


class Attempt:
    """One command against one fault, and once more without it."""

    def __init__(
        self, folder: Path, command: Command, reference: Path, result: PartResult, name: str
    ) -> None:
        self.folder, self.command, self.reference, self.result = folder, command, reference, result
        self.name = f"{command.name.replace(' ', '-')}-{name}"

    def full_disk(self, size: int) -> None:
        """On a disk of so many bytes; then there is room."""
        with disk(self.folder / f"{self.name}-disk", f"{size}") as place:
            self._twice(
                place / "out", f"a disk of {size} bytes", None, lambda: mount(place, ROOM, "remount,")
            )

    def small_files(self, size: int) -> None:
        """With a limit on the size of every file, as quotas have it; then without."""
        place = world.empty(self.folder / f"{self.name}-quota")

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        self._twice(place / "out", f"files of at most {size} bytes", limit, lambda: None)
        shutil.rmtree(place)

    def read_only_disk(self) -> None:
        """On a disk that is mounted read-only; then read and write."""
        with disk(self.folder / f"{self.name}-readonly", ROOM, "ro,") as place:
            writable = lambda: mount(place, ROOM, "remount,rw,")  # noqa: E731
            self._twice(place / "out", "a read-only disk", None, writable, must_fail=True)

    def read_only_folder(self) -> None:
        """As a user without the right to write into the folder."""
        place = world.empty(self.folder / f"{self.name}-rights")
        place.chmod(0o555)
        code, log = self._run(place / "out", no_root)
        self._judge(code, log, "a folder without the right to write", must_fail=True)
        self.result.check(not list(place.iterdir()), f"{self.name}: something was written into {place}")
        place.chmod(0o755)
        shutil.rmtree(place)

    def _twice(
        self,
        out: Path,
        what: str,
        before: Callable[[], None] | None,
        repair: Callable[[], None],
        must_fail: bool = False,
    ) -> None:
        code, log = self._run(out, before)
        if code == self.command.fine and not must_fail:
            return  # it had enough
        if not self._judge(code, log, what, must_fail=True):
            return
        self._nothing_half(out, what)
        repair()
        from labeltune.io.run_folder import checkpoints

        more: tuple[str, ...] = ()
        if self.command.name == "train":
            more = ("--resume",) if checkpoints(out) else ()
        elif out.with_name(f".{out.name}.part.json").exists():
            more = self.command.again
        code, log = self._run(out, None, more)
        again = f"{self.name}: not repaired by room after {what}: {code}: {last(log)}"
        if self.result.check(code == self.command.fine, again) and self.command.name == "train":
            for line in world.differences(out, self.reference):
                if "output_dir" not in line and not line.startswith(
                    ("validation/metrics.json", "checkpoint-")
                ):
                    self.result.check(False, f"{self.name}, resumed after {what}: {line}")
            self.result.check(same_weights(out, self.reference), f"{self.name}: other weights after {what}")

    def _run(
        self, out: Path, before: Callable[[], None] | None, more: tuple[str, ...] = ()
    ) -> tuple[int, Path]:
        log = self.folder / f"{self.name}.log"
        log.unlink(missing_ok=True)
        log.touch()
        log.chmod(0o666)
        code = zygote.run([*self.command.at(out), *more], self.folder, log, before=before)
        return code, log

    def _judge(self, code: int, log: Path, what: str, must_fail: bool) -> bool:
        return judge(self.result, self.name, code, log, what)

    def _nothing_half(self, out: Path, what: str) -> None:
        """Only whole files have their names; the checkpoints that stand there are good."""
        from labeltune.io.run_folder import checkpoints, damage

        if self.command.name == "train":
            for checkpoint in checkpoints(out):
                found = damage(checkpoint)
                self.result.check(
                    found is None, f"{self.name}: {checkpoint.name} is damaged by {what}: {found}"
                )
        elif self.command.name != "evaluate":
            self.result.check(
                not out.exists(), f"{self.name}: {out.name} stands there, half-written, after {what}"
            )


def judge(result: PartResult, name: str, code: int, log: Path, what: str) -> bool:
    """One error line, exit code 2, no traceback; counted as a fault when so."""
    text = log.read_text(encoding="utf-8")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    fine = code == 2 and len(errors) == 1 and "Traceback" not in text
    result.check(fine, f"{name} with {what}: exit code {code}, {len(errors)} errors: {text[-700:]}")
    result.faults += fine
    return fine


def last(log: Path) -> str:
    """The end of a log."""
    return log.read_text(encoding="utf-8")[-500:]


def same_weights(out: Path, reference: Path) -> bool:
    """Whether the newest checkpoints have equal adapters and optimizers, byte for byte."""
    from labeltune.io.run_folder import checkpoints

    newest = [checkpoints(run)[-1] for run in (out, reference)]
    names = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    return newest[0].name == newest[1].name and all(
        (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes() for name in names
    )


def no_root() -> None:
    """Give up root's power over permission bits (capset(2)): an owner without the right to write has none."""
    if os.getuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def other_places(folder: Path, config: Path, run: Path, result: PartResult) -> None:
    """Disks that a command writes to without being told: the token cache and temporary files."""
    for variable in ("LABELTUNE_CACHE", "TMPDIR"):
        for size in (4096, 8192):
            with disk(folder / f"{variable}-{size}", f"{size}") as place:

                def full(variable: str = variable, place: Path = place) -> None:
                    os.environ[variable] = str(place)
                    tempfile.tempdir = None

                log = folder / f"{variable}-{size}.log"
                out = world.empty(folder / "elsewhere") / "out"
                code = zygote.run(["train", str(config), f"output_dir={out}"], folder, log, before=full)
                name = f"train with a full {variable} ({size} bytes)"
                if judge(result, name, code, log, "no room"):
                    result.check(
                        str(place) in last(log), f"{name}: the error does not name {place}: {last(log)}"
                    )


def full_standard_output(folder: Path, run: Path, result: PartResult) -> None:
    """What is printed cannot be written."""
    rows = str(folder / "classification.jsonl")
    if not Path("/dev/full").exists():
        return

    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    for arguments in (
        ["predict", str(run), rows],
        ["predict", str(run), "--text", "rocket"],
        ["evaluate", str(run), "--data", rows],
        ["data", "check", rows],
        ["export", str(run), str(folder / "printed"), "--no-verify"],
    ):
        log = folder / f"stdout-{arguments[0]}-{len(arguments)}.log"
        code = zygote.run(arguments, folder, log, before=full)
        judge(result, " ".join(arguments[:1]), code, log, "a full standard output")


def mounts(folder: Path) -> bool:
    """Whether small disks can be mounted here."""
    try:
        with disk(folder / "mountable", "64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def disk(place: Path, size: str, options: str = "") -> Iterator[Path]:
    """A disk in memory."""
    place.mkdir()
    try:
        mount(place, size, options)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
    finally:
        place.rmdir()


def mount(place: Path, size: str, options: str = "") -> None:
    """Mount a disk in memory, or change a mounted one."""
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size},mode=755", "tmpfs", str(place)]
    subprocess.run(command, check=True, capture_output=True)
