"""Memory over a million rows: `data check` as it is, with its worker processes, on lines and on one JSON array as Label Studio exports it,
and `predict` with an engine that answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torture.common import ROOT, PartResult, Settings

ROWS = 1_000_000
#: What is promised, in bytes of peak resident memory: in all, and a row.
ALLOWED, A_ROW = 300e6, 64


def run(settings: Settings) -> PartResult:
    """Each command in a process of its own; memory is that of it and of all it starts, shared pages counted once."""
    result = PartResult("memory")
    rows = settings.count(ROWS, 20_000)
    lines, tasks = settings.folder / "rows.jsonl", settings.folder / "export.json"
    with lines.open("w", encoding="utf-8") as file, tasks.open("w", encoding="utf-8") as export:
        for number in range(rows):
            text = f"row {number} of the generated file, about {number % 977} and other things"
            label = "abc"[number % 3]
            file.write(json.dumps({"text": text, "category": ["a", "b", "c"], "output": label}) + "\n")
            export.write(("[" if not number else ",") + json.dumps(task(number, text, label)))
        export.write("]")
    result.inputs = 2 * rows
    for what, path in (("check", lines), ("check", tasks), ("predict", lines)):
        command = [sys.executable, "-m", "torture.part_memory", what, str(path)]
        log = settings.folder / f"{what}-{path.stem}.log"
        with log.open("w+", encoding="utf-8") as said:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True)
            peak, most = watch(process)
            printed = process.stdout.read() if process.stdout is not None else ""
        if not result.check(process.returncode == 0, f"{what}: {log.read_text(encoding='utf-8')[-500:]}"):
            continue
        found = json.loads(printed.splitlines()[-1])
        peak = max(peak, found["peak"])
        allowed = ALLOWED + A_ROW * rows
        figures = (
            f"{what} {path.name}: {peak / 1e6:.0f} MB at the peak in {most} processes over {rows:,} rows, "
            f"{allowed / 1e6:.0f} MB promised"
        )
        result.check(peak <= allowed, figures)
        result.notes.append(f"{figures} ({found['begin'] / 1e6:.0f} MB of it before the first row)")
    result.notes.append(
        "predict: real reading, writing and ledger; the model is a stand-in that answers at once"
    )
    return result


def task(number: int, text: str, label: str) -> dict[str, Any]:
    """A task of a Label Studio export with its annotation."""
    chosen = {"choices": [label]}
    result = {
        "id": f"r{number}",
        "from_name": "topic",
        "to_name": "text",
        "type": "choices",
        "value": chosen,
        "origin": "manual",
    }
    annotation = {
        "id": number,
        "completed_by": 1,
        "was_cancelled": False,
        "created_at": "2026-01-01T00:00:00Z",
        "lead_time": 1.5,
        "result": [result],
    }
    return {
        "id": number,
        "data": {"text": text},
        "annotations": [annotation],
        "drafts": [],
        "predictions": [],
        "meta": {},
    }


def watch(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Largest memory of a process and those it starts, looked at five times a second until it ends, and how many there were.

    Returns:
        Bytes (proportional set size, so that pages shared by forks count once; the process's own peak where the system does not
        tell), and the number of processes.
    """
    import psutil

    peak, most = 0, 1
    while process.poll() is None:
        total = 0
        try:
            family = [root := psutil.Process(process.pid), *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        for each in family:
            try:
                total += int(getattr(each.memory_full_info(), "pss", 0))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak, most = max(peak, total), max(most, len(family))
        time.sleep(0.2)
    return peak, most


class StandIn:
    """What `predict_file` asks of a predictor, without a model."""

    def __init__(self) -> None:
        from labeltune.config import ColumnsConfig, PromptConfig
        from labeltune.prompts import make_task

        self.columns, self.encoding, self.format_name = ColumnsConfig(), "utf-8", "auto"
        self.task = make_task("classification", ("a", "b", "c"), PromptConfig())

    def fingerprint(self) -> str:
        """As the predictor's."""
        return "stand-in"

    def check(self, example: Any) -> None:
        """As the predictor's."""

    def stream(self, examples: Any) -> Any:
        """The first candidate."""
        from labeltune.types import Prediction

        ranking = (("a", 0.5), ("b", 0.3), ("c", 0.2))
        for example in examples:
            yield Prediction(example.id, "a", "a", ranking=ranking)


def measure(what: str, path: Path) -> None:
    """Run one command in this process, and print its memory in bytes."""
    import contextlib
    import io
    import resource

    peak_unit = 1 if sys.platform == "darwin" else 1024
    import psutil

    if what == "check":
        import datasets  # noqa: F401

        from labeltune.commands import main

        begin = psutil.Process().memory_info().rss
        sys.argv = ["labeltune", "data", "check", str(path)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main.run()
    else:
        from labeltune.inference.files import predict_file

        begin = psutil.Process().memory_info().rss
        output = path.with_name("predictions.jsonl")
        predictor: Any = StandIn()
        predict_file(predictor, path, output)
        with output.open("rb") as file:
            lines = sum(1 for _ in file)
        with path.open("rb") as file:
            assert lines == sum(1 for _ in file), "a row is missing"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * peak_unit
    print(json.dumps({"begin": begin, "peak": peak}))


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]))
