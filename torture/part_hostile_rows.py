"""Hostile files through the real commands: every row is answered in its place or named with its line, and nothing crashes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from torture.common import PartResult, Settings, say, use_tests

ROWS_A_FILE = 100
#: Seconds that a command may take over one file.
PATIENCE = 120


def run(settings: Settings) -> PartResult:
    """10,000 rows and more in jsonl, csv and parquet: `data check` on all files, the other commands on a part of them."""
    use_tests()
    from helpers import hostile

    warnings.simplefilter("ignore")
    result = PartResult("hostile rows")
    world = World(settings.folder)
    files = settings.count(12_000, 300) // ROWS_A_FILE
    heavy = max(3, files // 4)
    commands = 0
    for number in range(files):
        chance = settings.random("rows", number)
        suffix = sorted(hostile.MAKERS)[number % 3]
        path = hostile.write(
            settings.folder, f"f{number}{suffix}", hostile.MAKERS[suffix](chance, ROWS_A_FILE)
        )
        result.inputs += ROWS_A_FILE
        for task in ("classification", "ner"):
            check(result, ["data", "check", str(path), "--task", task, "--json"], (0, 1), path, read_audit)
            commands += 1
        if number < heavy:
            commands += ask_models(result, world, path)
        path.unlink()
        if number % 20 == 19:
            say(f"{number + 1} of {files} files, {commands} commands")
    commands += special_files(result, settings, world)
    result.notes.append(
        f"{commands} commands over {files} generated files and the special ones, no traceback, none over {PATIENCE} s"
    )
    return result


class World:
    """A two-layer model, a run of each task on it, and their configs."""

    def __init__(self, folder: Path) -> None:
        from helpers.runs import make_run
        from helpers.tiny_models import make_model, make_tokenizer

        self.folder, self.model = folder, folder / "Qwen2-tiny"
        tokenizer = make_tokenizer()
        make_model(len(tokenizer)).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self.runs = {task: make_run(folder / task, self.model, task) for task in ("classification", "ner")}

    def config(self, task: str, data: Path) -> list[str]:
        """A config file of one step, and the changes that go with it."""
        path = self.folder / f"{task}.yaml"
        path.write_text(
            json.dumps(
                {
                    "task": task,
                    "model": str(self.model),
                    "tracking": "none",
                    "output_dir": str(self.folder / "out"),
                    "data": {"train": str(data), "on_error": "skip"},
                    "prompt": {"max_length": 3000},
                    "training": {"max_steps": 1, "batch_size": 2},
                    "generation": {"max_new_tokens": 8},
                    "eval": {"max_rows": 4},
                }
            ),
            encoding="utf-8",
        )
        return [str(path)]


def ask_models(result: PartResult, world: World, path: Path) -> int:
    """`predict`, `evaluate` and `train` over one file, both tasks."""
    for task, found in world.runs.items():
        out = world.folder / "out.jsonl"
        out.unlink(missing_ok=True)
        check(result, ["predict", str(found), str(path), "-o", str(out)], (0, 1, 2), path)
        if out.exists():
            read_predictions(result, path, out)
        evaluate = ["evaluate", str(found), "--data", str(path), "--on-error", "skip"]
        check(result, [*evaluate, "--max-rows", "30"], (0, 2), path)
        check(result, ["train", *world.config(task, path), "--overwrite"], (0, 2), path)
    return 6


def special_files(result: PartResult, settings: Settings, world: World) -> int:
    """What is too large or too odd to be generated row by row."""
    folder = settings.folder
    big = 100_000_000 if settings.scale >= 1 else 20_000_000
    fine = b'{"text": "a", "output": "x"}\n{"text": "b", "output": "y"}\n'
    made: dict[str, bytes] = {
        "long-line.jsonl": fine + b'{"text": "' + b"x" * big + b'", "output": "x"}\n' + fine,
        "long-cell.csv": b"text,output\na,x\n" + b'"' + b"x" * big + b'",y\nb,x\n',
        "open-quote.csv": b'text,output\na,x\n"' + b"y," * (big // 2) + b"\n",
        "nested.jsonl": fine + b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n",
        "empty.jsonl": b"",
        "one-row.jsonl": fine[:29],
        "one-class.jsonl": b"".join(b'{"text": "t%d", "output": "x"}\n' % n for n in range(40)),
        "all-the-same.jsonl": fine[:29] * 200,
        "ten-thousand-classes.jsonl": b"".join(
            b'{"text": "t%d", "output": "class %d"}\n' % (n, n) for n in range(10_000)
        ),
    }
    count = 0
    for name, raw in made.items():
        path = folder / name
        path.write_bytes(raw)
        result.inputs += 1
        check(result, ["data", "check", str(path)], (0, 1), path)
        for command in (
            ["predict", str(world.runs["classification"]), str(path), "-o", str(folder / "out.jsonl")],
            ["evaluate", str(world.runs["classification"]), "--data", str(path), "--max-rows", "30"],
            ["train", *world.config("classification", path), "--overwrite"],
        ):
            if name == "ten-thousand-classes.jsonl" and command[0] == "predict":
                continue  # answered row by row it is no other than the others
            check(result, command, (0, 1, 2), path)
        path.unlink()
        count += 4
        say(f"{name}: done")
    return count


def check(
    result: PartResult,
    arguments: list[str],
    codes: tuple[int, ...],
    path: Path,
    read: Any = None,
) -> None:
    """A real command in this process: its exit code is one of `codes`, and it never ends in a traceback."""
    from labeltune.commands import main

    out, error = io.StringIO(), io.StringIO()
    begun, argv = time.monotonic(), sys.argv
    sys.argv = ["labeltune", *arguments]
    code: int | str | None = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main.run()
    except SystemExit as ended:
        code = ended.code
    except BaseException as raised:
        keep(result, path, f"{arguments[0]} {path.name}: {type(raised).__name__}: {str(raised)[:300]}")
        return
    finally:
        sys.argv = argv
    code = code or 0
    shown = error.getvalue()
    if not result.check(code in codes, f"{arguments[0]} {path.name}: exit code {code}: {shown[-300:]}"):
        keep(result, path, "")
    result.check("Traceback" not in shown, f"{arguments[0]} {path.name}: a traceback")
    if code == 2:
        result.check("error: " in shown, f"{arguments[0]} {path.name}: exit code 2 without an error")
    took = time.monotonic() - begun
    result.check(took < PATIENCE, f"{arguments[0]} {path.name} took {took:.0f} s")
    if read is not None and code in codes:
        read(result, path, out.getvalue())


def keep(result: PartResult, path: Path, line: str) -> None:
    """Keep the file that broke a promise beside the log."""
    kept = path.with_name(f"kept-{path.name}")
    if path.exists() and path.stat().st_size < 10_000_000:
        kept.write_bytes(path.read_bytes())
    if line:
        result.check(False, line)


def read_audit(result: PartResult, path: Path, out: str) -> None:
    """Every row is usable, or an error names its place."""
    found = json.loads(out)
    counts = found["files"][0]
    of_rows = [
        f for f in found["faults"] if "rows (this is the first) have no candidates" not in f["message"]
    ]
    named = {f["where"] for f in of_rows if f["severity"] == "error"}
    # What is wrong with the header is one error, and no row is read.
    refused = counts["rows"] == 0 and named == {f"{path}:1"}
    missing = len(named) != counts["rows"] - counts["usable"] and not refused
    result.check(not missing, f"data check {path.name}: a row is missing")
    result.check(
        all(f["where"].startswith(f"{path}:") for f in found["faults"]), f"data check {path.name}: no place"
    )


def read_predictions(result: PartResult, path: Path, out: Path) -> None:
    """A line a row, each an answer in legal form or an error with its place."""
    for line in out.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "error" in row:
            result.check(
                row["source"].startswith(f"{path}:"), f"predict {path.name}: an error without its place"
            )
        elif "entities" in row:
            result.check(row["parsed"], f"predict {path.name}: an answer that is not legal: {line[:200]}")
        else:
            known = [entry["label"] for entry in row["ranking"]]
            result.check(
                row["label"] in known, f"predict {path.name}: a label that is no candidate: {line[:200]}"
            )
