"""Files of the last checkpoint are damaged in every way: `--resume` says so, goes back one, and ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from torture import world, zygote
from torture.common import PartResult, Settings


def flip(file: Path, generator: random.Random) -> None:
    """One bit is another one."""
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, generator: random.Random) -> None:
    """The end is missing."""
    content = file.read_bytes()
    file.write_bytes(content[: generator.randrange(len(content))])


def zeros(file: Path, generator: random.Random) -> None:
    """As long as it should be, without what was in it: a crash of the machine."""
    file.write_bytes(bytes(file.stat().st_size))


def delete(file: Path, generator: random.Random) -> None:
    """It is not there."""
    file.unlink()


def lengthen(file: Path, generator: random.Random) -> None:
    """There is more than was written."""
    with file.open("ab") as out:
        out.write(b"\0")


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, zeros, delete, lengthen)
#: Trainings that are resumed to their end behind a damage, at full size; the others only choose their checkpoint.
RESUMED = 15


def run(settings: Settings) -> PartResult:
    """See the module."""
    result = PartResult("damaged checkpoints")
    zygote.warm()
    folder = settings.folder / "world"
    world.build(folder)
    config = world.config(
        folder, "classification", {"epochs": 1, "save_steps": 2, "save_total_limit": 3, "max_steps": 6}
    )
    whole = world.empty(settings.folder / "whole")
    if (code := zygote.run(["train", str(config)], whole, whole / "log")) != 0:
        raise RuntimeError(f"training failed ({code}); see {whole / 'log'}")
    files = sorted(p.name for p in (whole / "out" / "checkpoint-6").iterdir() if written_by_saving(p.name))
    cases = [(name, way) for name in files for way in WAYS]
    resumed = set(settings.random("resumed").sample(range(len(cases)), settings.count(RESUMED, 2)))
    # The manifest and what says that a checkpoint is one are always among them.
    resumed |= {
        i
        for i, (name, way) in enumerate(cases)
        if way is delete and name in ("manifest.json", "labeltune.json")
    }
    for number, (name, way) in enumerate(cases):
        generator = settings.random("damage", name, way.__name__)
        work = world.empty(settings.folder / f"damaged-{number}")
        shutil.copytree(whole / "out", work / "out", symlinks=True)
        way(work / "out" / "checkpoint-6" / name, generator)
        what = f"{name}, {way.__name__}"
        if not result.check(goes_back_aloud(config, work), f"{what}: not noticed, or not said"):
            continue
        if number in resumed:
            code = zygote.run(["train", str(config), "--resume"], work, work / "log")
            text = (work / "log").read_text(encoding="utf-8")
            said = "checkpoint-6 is damaged" in text and "Traceback" not in text
            if not result.check(code == 0 and said, f"{what}: exit code {code}: {text[-500:]}"):
                continue
            for line in world.differences(work / "out", whole / "out"):
                result.check(False, f"{what}, resumed: {line}")
        result.faults += 1
        shutil.rmtree(work)
    predict_from_damaged(settings, folder, whole / "out", result)
    result.notes = [
        f"{len(files)} files of a checkpoint, each with a flipped bit, cut short, zeroed, deleted and lengthened; {len(resumed)} of "
        "these trainings were resumed to their end, with the bits of an undamaged one"
    ]
    return result


def written_by_saving(name: str) -> bool:
    """The files of a checkpoint that going on needs; what is fitted afterwards is fitted again."""
    return name not in ("calibration.json", "selection.u64")


def goes_back_aloud(config: Path, work: Path) -> bool:
    """Whether `--resume` would choose the checkpoint before the damaged one, and say why."""
    from labeltune.config import load_config
    from labeltune.io.run_folder import check_output

    said: list[str] = []
    loaded = load_config(config, [f"output_dir={work / 'out'}"])
    chosen = check_output(loaded, resume=True, say=said.append)
    return (
        chosen is not None and chosen.name == "checkpoint-4" and len(said) == 1 and "checkpoint-6" in said[0]
    )


def predict_from_damaged(settings: Settings, folder: Path, run: Path, result: PartResult) -> None:
    """A prediction from a damaged checkpoint is one error, or right."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "labeltune.json", "tokenizer.json"):
        for way in (truncate, zeros, delete):
            work = world.empty(settings.folder / "predicted")
            shutil.copytree(run / "checkpoint-6", work / "checkpoint-6")
            way(work / "checkpoint-6" / name, settings.random(name, way.__name__))
            code = zygote.run(["predict", str(work / "checkpoint-6"), "-t", "rocket"], work, work / "log")
            text = (work / "log").read_text(encoding="utf-8")
            one_error = code == 2 and text.count("error: ") == 1 and "Traceback" not in text
            fine = result.check(
                one_error, f"predict with {name}, {way.__name__}: exit code {code}: {text[-600:]}"
            )
            result.faults += fine
