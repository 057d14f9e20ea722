"""Trainings that are killed again and again end with the bits of one that was not."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torture import world, zygote
from torture.common import PartResult, Settings, say
from torture.zygote import Kill

#: Kills at full size: in forked processes, and in processes of their own.
FORKED, FRESH = 112, 8
#: Kills of one training before it may end.
IN_A_ROW = 8
#: Below this scale only the first kind of training is tried.
SMALL = 0.05


@dataclass(frozen=True)
class Scenario:
    """A kind of training."""

    name: str
    task: str
    training: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)


SCENARIOS = (
    Scenario(
        "classification, a checkpoint a step, one kept",
        "classification",
        {"epochs": 1, "save_steps": 1, "save_total_limit": 1},
    ),
    Scenario(
        "classification, plain packing, early stopping, log lines across checkpoints",
        "classification",
        {"epochs": 4, "packing": "packed", "save_steps": 2, "logging_steps": 3, "learning_rate": 3e-2},
        {"eval": {"patience": 2, "metric": "loss"}},
    ),
    Scenario(
        "entities, padded, one checkpoint kept, warm-up and weight decay",
        "ner",
        {
            "epochs": 2,
            "packing": "padded",
            "save_steps": 3,
            "save_total_limit": 1,
            "logging_steps": 2,
            "scheduler": "cosine",
            "warmup_steps": 3,
            "weight_decay": 0.1,
        },
    ),
    Scenario(
        "entities, checkpoints by epoch, no validation, steps that end inside an epoch",
        "ner",
        {"max_steps": 22, "save_steps": "epoch", "save_total_limit": 2, "logging_steps": 4},
        {"data": {"validation_fraction": 0.0}},
    ),
    Scenario(
        "classification, all weights",
        "classification",
        {"epochs": 1, "method": "full", "save_steps": 2, "save_total_limit": 2, "learning_rate": 1e-3},
    ),
    Scenario(
        "classification, shown in a local SwanLab",
        "classification",
        {"epochs": 1, "save_steps": 1, "save_total_limit": 2},
        {"tracking": "swanlab", "swanlab": {"mode": "local", "prediction_rows": 2, "log_dir": "swanlog"}},
    ),
)


@dataclass
class Reference:
    """A scenario's uninterrupted run: where it is, how long it took and how many changes of files it made."""

    config: Path
    out: Path
    seconds: float
    changes: int


def run(settings: Settings) -> PartResult:
    """See the module."""
    result = PartResult("training kills")
    zygote.warm()
    world.build(settings.folder / "world")
    wanted = settings.count(FORKED, 5)
    survived: dict[str, int] = {}
    scenarios = SCENARIOS if settings.scale >= SMALL else SCENARIOS[:1]
    for number, scenario in enumerate(scenarios):
        reference = uninterrupted(settings.folder, scenario, number)
        say(f"{scenario.name}: {reference.seconds:.1f} s, {reference.changes} changes of files uninterrupted")
        share, kills, sequence = -(-wanted * (number + 1) // len(scenarios)), 0, 0
        while result.kills < share:
            generator = settings.random("training", number, sequence)
            work = world.empty(settings.folder / f"killed-{number}-{sequence}")
            kills = killed_run(
                work, reference, generator, survived, result, min(IN_A_ROW, share - result.kills)
            )
            result.kills += kills
            sequence += 1
    forked = result.kills
    if fresh := settings.count(FRESH, 0):
        reference = uninterrupted(settings.folder, SCENARIOS[0], 99)
        result.kills += fresh_processes(settings, reference, fresh, result)
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(survived.items()))
    result.notes = [
        f"{forked} kills of forked processes ({kinds}) and {result.kills - forked} of processes started anew, in "
        f"{len(scenarios)} kinds of training; adapter, optimizer, scheduler, random state, log and reports equal the "
        "uninterrupted run's bit for bit"
    ]
    return result


def uninterrupted(folder: Path, scenario: Scenario, number: int) -> Reference:
    """Train without a kill."""
    config = world.config(folder / "world", scenario.task, scenario.training, **scenario.sections)
    work = world.empty(folder / f"whole-{number}")
    begun = time.monotonic()
    counted = zygote.count_changes(work / "out", work / "changes")
    code = zygote.run(["train", str(config)], work, work / "log", before=counted)
    if code != 0:
        raise RuntimeError(f"{scenario.name}: the uninterrupted run failed ({code}); see {work / 'log'}")
    return Reference(config, work / "out", time.monotonic() - begun, (work / "changes").stat().st_size)


def killed_run(
    work: Path,
    reference: Reference,
    generator: random.Random,
    survived: dict[str, int],
    result: PartResult,
    most: int,
) -> int:
    """Train with kills up to the end and compare; returns how often it was killed."""
    out, kills = work / "out", 0
    while True:
        kill = random_kill(generator, reference, out) if kills < most else None
        code = zygote.run(arguments(reference.config, out), work, work / "log", kill)
        if code == -signal.SIGKILL:
            kills += 1
            assert kill is not None
            survived[NAMES[kill.kind]] = survived.get(NAMES[kill.kind], 0) + 1
            if not result.check(
                newest_is_whole(out), f"{out}: the newest checkpoint is not whole after {kill}"
            ):
                return kills
            continue
        if not result.check(code == 0, f"{work}: exit code {code} after {kills} kills; see {work / 'log'}"):
            return kills
        break
    for line in world.differences(out, reference.out):
        result.check(False, f"{work} after {kills} kills: {line}")
    if (work / "swanlog").is_dir():
        result.check(is_a_chain(work), f"{work} after {kills} kills: SwanLab's runs are not linked")
    if not result.failures:
        world.empty(work).rmdir()
    return kills


NAMES = {"time": "at a random time", "event": "before a change of a file", "torn": "in the middle of a file"}


def is_a_chain(work: Path) -> bool:
    """Whether SwanLab's runs of a training form a chain: each resumed part names the run before it, the last one is remembered."""
    last: str = json.loads((work / "out" / "swanlab.json").read_text(encoding="utf-8"))["id"]
    # One that was killed before SwanLab wrote its config has a folder alone.
    folders = (work / "swanlog").glob("run-*")
    before: dict[str, str | None] = {folder.name.rpartition("-")[2]: None for folder in folders}
    for path in (work / "swanlog").rglob("config.yaml"):
        name = next(part for part in path.parts if part.startswith("run-")).rpartition("-")[2]
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        before[name] = found.get("resumed_from", {}).get("value", {}).get("run")
    run: str | None = last
    while run is not None:
        if run not in before:
            return False
        run = before.pop(run)
    return True


def random_kill(generator: random.Random, reference: Reference, out: Path) -> Kill:
    """Some moment of what is left of a training."""
    kind = generator.choice(("time", "event", "event", "torn"))
    if kind == "time":
        return Kill(kind, generator.uniform(0.2, 0.8) * reference.seconds)
    if kind == "event":
        return Kill(kind, generator.randint(1, max(2, reference.changes // 3)), watched=out)
    return Kill(kind, generator.randint(1, 8), generator.random())


def arguments(config: Path, out: Path) -> list[str]:
    """The command that starts a training, or goes on with it."""
    from labeltune.io.run_folder import checkpoints

    return ["train", str(config), *(["--resume"] if checkpoints(out) else [])]


def newest_is_whole(out: Path) -> bool:
    """No checkpoint stands there half-written: the newest one is what its manifest says."""
    from labeltune.io.run_folder import checkpoints, damage

    found = checkpoints(out)
    return not found or damage(found[-1]) is None


def fresh_processes(settings: Settings, reference: Reference, wanted: int, result: PartResult) -> int:
    """`python -m labeltune train` in processes of their own, killed after they have begun to train."""
    work = world.empty(settings.folder / "fresh")
    out, kills = work / "out", 0
    generator = settings.random("fresh")
    while kills < wanted:
        command = [sys.executable, "-m", "labeltune", *arguments(reference.config, out)]
        process = subprocess.Popen(
            command, cwd=work, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("steps: "):
                break
        time.sleep(generator.uniform(0.0, 0.3) * reference.seconds)
        process.kill()
        _, rest = process.communicate()
        if process.returncode == 0:
            world.empty(out)  # it was faster
            continue
        if not result.check(
            process.returncode == -signal.SIGKILL, f"fresh: exit code {process.returncode}: {rest[-500:]}"
        ):
            return kills
        kills += 1
        result.check(newest_is_whole(out), f"{out}: the newest checkpoint is not whole")
    code = zygote.run(arguments(reference.config, out), work, work / "log")
    result.check(code == 0, f"{work}: exit code {code}")
    for line in world.differences(out, reference.out):
        result.check(False, f"{work}: {line}")
    return kills
