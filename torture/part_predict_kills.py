"""Predictions that are killed again and again write, byte for byte, what one that was not killed writes."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from torture import world, zygote
from torture.common import PartResult, Settings, say
from torture.zygote import Kill

#: Kills at full size.
KILLS = 60
IN_A_ROW = 6
#: Rows of a file: some chunks of `files.CHUNK_ROWS`.
ROWS = 900


@dataclass(frozen=True)
class Scenario:
    """A file to predict.

    Attributes:
        suffix: its format.
        options: of `labeltune predict`.
    """

    task: str
    suffix: str
    options: tuple[str, ...] = ()


SCENARIOS = (
    Scenario("classification", ".jsonl", ("--top-k", "2", "--min-confidence", "0.4")),
    Scenario("classification", ".csv", ("--category", "Sports,Space,Art")),
    Scenario("classification", ".parquet", ("--long-text", "window")),
    Scenario("ner", ".jsonl"),
)


def run(settings: Settings) -> PartResult:
    """See the module."""
    result = PartResult("predict kills")
    zygote.warm()
    folder = settings.folder / "world"
    world.build(folder)
    runs = {task: trained(folder, task) for task in ("classification", "ner")}
    wanted, kinds = settings.count(KILLS, 4), dict.fromkeys(("time", "event", "torn"), 0)
    for number, scenario in enumerate(SCENARIOS):
        rows = ROWS if scenario.task == "classification" else ROWS // 2
        source = write_rows(folder / f"rows-{number}{scenario.suffix}", rows, settings.random("rows", number))
        work = world.empty(settings.folder / f"whole-{number}")
        begun = time.monotonic()
        counted = zygote.count_changes(work, work / "changes")
        command = ["predict", str(runs[scenario.task]), str(source), "-o", "out.jsonl", *scenario.options]
        code = zygote.run(command, work, work / "log", before=counted)
        seconds, changes = time.monotonic() - begun, (work / "changes").stat().st_size
        # Rows with a fault keep their places, and make the exit code 1.
        if not result.check(code == 1, f"{work}: the uninterrupted run ended with {code}"):
            continue
        expected = (work / "out.jsonl").read_bytes()
        result.check(expected.count(b"\n") == rows, f"{work}: {expected.count(10)} lines for {rows} rows")
        say(f"{scenario}: {seconds:.1f} s, {changes} changes of files uninterrupted")
        share, sequence = -(-wanted * (number + 1) // len(SCENARIOS)), 0
        while result.kills < share and not result.failures:
            generator = settings.random("predict", number, sequence)
            killed = world.empty(settings.folder / f"killed-{number}-{sequence}")
            most = min(IN_A_ROW, share - result.kills)
            result.kills += killed_run(killed, command, seconds, changes, most, generator, kinds, result)
            found = killed / "out.jsonl"
            same = found.is_file() and found.read_bytes() == expected
            result.check(same, f"{found} is not what an uninterrupted run writes")
            # A lock whose process is dead is nobody's; the next predict onto this output takes it away.
            kept = ("out.jsonl", "log", ".out.jsonl.lock", ".out.jsonl.lock.pid")
            left = sorted(path.name for path in killed.iterdir() if path.name not in kept)
            result.check(not left, f"{killed} holds leftovers: {', '.join(left)}")
            sequence += 1
    result.notes = [
        f"{kinds['time']} kills at a random time, {kinds['event']} before a change of a file, {kinds['torn']} in the middle of "
        "a chunk; jsonl, csv and parquet, labels and entities, with faulty rows among them"
    ]
    return result


def trained(folder: Path, task: str) -> Path:
    """A run that was trained for two steps."""
    work = world.empty(folder / f"run-{task}")
    config = world.config(folder, task, {"max_steps": 2})
    if (code := zygote.run(["train", str(config)], work, work / "log")) != 0:
        raise RuntimeError(f"training failed ({code}); see {work / 'log'}")
    return work / "out"


def write_rows(path: Path, count: int, generator: random.Random) -> Path:
    """Rows of many lengths, some of them faulty."""
    words = ["match", "rocket", "paint", "他在南京", "今天下雨", "number"]
    rows: list[dict[str, str]] = []
    for number in range(count):
        text = " ".join(generator.choices(words, k=generator.randint(1, 12)))
        rows.append({"id": f"r{number}", "text": " " if number % 97 == 5 else f"{text} {number}"})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def killed_run(
    work: Path,
    command: list[str],
    seconds: float,
    changes: int,
    most: int,
    generator: random.Random,
    kinds: dict[str, int],
    result: PartResult,
) -> int:
    """Predict with kills up to the end; returns how often it was killed."""
    kills = 0
    while True:
        resume = ["--resume"] if (work / ".out.jsonl.part.json").exists() else []
        kill = random_kill(generator, seconds, changes, work) if kills < most else None
        code = zygote.run([*command, *resume], work, work / "log", kill)
        if code != -signal.SIGKILL:
            result.check(code == 1, f"{work}: exit code {code} after {kills} kills; see {work / 'log'}")
            return kills
        assert kill is not None
        kinds[kill.kind] += 1
        kills += 1


def random_kill(generator: random.Random, seconds: float, changes: int, work: Path) -> Kill:
    """Some moment of a prediction."""
    kind = generator.choice(("time", "time", "event", "torn"))
    if kind == "time":
        return Kill(kind, generator.uniform(0.1, 0.9) * seconds)
    if kind == "event":
        return Kill(kind, generator.randint(1, changes), watched=work)
    return Kill(kind, generator.randint(1, 3), generator.random())
