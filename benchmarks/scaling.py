"""What rows cost: checking and tokenizing from 1,000 to 1,000,000 rows; and prediction on Ray against the local engine.

    python benchmarks/scaling.py cost --rows 1000,10000,100000,1000000 --json cost.json
    python benchmarks/scaling.py cost --rows 1000000 --workers 2
    python benchmarks/scaling.py predict --rows 20000 --json predict.json
    python benchmarks/scaling.py steps

`cost`: every number of rows in a process of its own, on generated rows of about 40 tokens; seconds of CPU of each stage (all processes
together, so that other programs do not change them; `wall` in the JSON is the clock's) without imports, and the memory of the process with those it starts: anonymous pages, shared ones counted once (`Pss_Anon`), the largest seen four times a second. Pages of
memory-mapped files are left out, as the system takes them back when it needs them. The aim is 300 MB and 64 bytes a row.

`predict`: `labeltune predict` as a command, a two-layer model; `rows/s` counts the whole command, `steady` the time between the first
and the last part, without starting processes and loading models.

`steps`: cutting one step for so many processes, which every one of them does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import made_up

HERE = Path(__file__).resolve().parent
#: (rows of a step, processes)
STEPS = ((16, 1), (16, 2), (64, 8), (1_024, 64), (16_384, 8), (16_384, 1_000))
STAGES = ["check", "split", "tokenize", "read again"]


class Memory:
    """The largest anonymous memory of this process and its children, in bytes, since the last look."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, self._now())
            time.sleep(0.25)

    @staticmethod
    def _now() -> int:
        import psutil

        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))
            except OSError:
                continue  # it has ended
        return total

    def peak(self) -> int:
        """The largest since the last call."""
        found, self.most = max(self.most, self._now()), 0
        return found


def stages(rows_file: Path, tokenizer_folder: Path, workers: int, until: str) -> dict[str, Any]:
    """In a process of its own: the stages of preparing a run, as training and `data check` do them."""
    from labeltune.config import build_config
    from labeltune.data.check import add_duplicates
    from labeltune.data.loading import load_rows, stratified_split
    from labeltune.models.hub import load_tokenizer
    from labeltune.prompts import make_task
    from labeltune.prompts.builder import PromptBuilder
    from labeltune.prompts.template import ChatTemplate
    from labeltune.training.dataset import tokenize_rows

    data = {"train": str(rows_file), "workers": workers}
    config = build_config({"data": data, "prompt": made_up.PROMPT, "training": {"epochs": 1}})
    template = ChatTemplate(load_tokenizer(tokenizer_folder))
    import datasets.arrow_writer  # noqa: F401 - imports are no cost of a row

    memory = Memory()
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {"before": memory.peak()}
    wall: dict[str, float] = {}
    began = _clocks()

    def done(stage: str) -> None:
        nonlocal began
        now = _clocks()
        seconds[stage], wall[stage] = now[0] - began[0], now[1] - began[1]
        peaks[stage] = memory.peak()
        print(stage, rows.audit.rows, seconds[stage], wall[stage], peaks[stage], file=sys.stderr, flush=True)
        began = _clocks()

    rows = load_rows(str(rows_file), "classification", config.data)
    add_duplicates(rows.audit, rows.where)
    done("check")
    held_out = stratified_split(rows, 0.1, 42)
    done("split")
    found = {"rows": rows.audit.rows, "held_out": len(held_out)}
    if until == "split":
        return {**found, "seconds": seconds, "wall": wall, "peak": peaks}
    builder = PromptBuilder(make_task("classification", rows.audit.label_set(), config.prompt), template)
    _, account = tokenize_rows(rows.dataset, builder, workers)
    done("tokenize")
    tokenize_rows(rows.dataset, builder, workers)
    done("read again")
    return {**found, "tokens": account.tokens, "seconds": seconds, "wall": wall, "peak": peaks}


def _clocks() -> tuple[float, float]:
    """(seconds of CPU of this process and of its children that have ended, seconds on the clock)."""
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    return cpu, time.perf_counter()


def child(arguments: list[str], **environment: str) -> str:
    """What a process of this file or of labeltune prints."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    if done.returncode:
        raise SystemExit(f"{arguments} failed")
    return done.stdout


def cost(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A record a number of rows."""
    made_up.make_tokenizer().save_pretrained(folder / "tokenizer")
    found = []
    for count in map(int, given.rows.split(",")):
        file = made_up.write_rows(folder / f"{count}.jsonl", count, 3, 8)
        line = [
            str(Path(__file__)),
            "stages",
            str(file),
            str(folder / "tokenizer"),
            "--workers",
            str(given.workers),
            "--until",
            given.until,
        ]
        printed = child(line, LABELTUNE_CACHE=str(folder / "cache"), TOKENIZERS_PARALLELISM="false")
        record = {
            **json.loads(printed.splitlines()[-1]),
            "workers": given.workers,
            "file": file.stat().st_size,
        }
        print(record, file=sys.stderr, flush=True)
        found.append(record)
        file.unlink()
        shutil.rmtree(folder / "cache", ignore_errors=True)
    return found


def cost_table(found: list[dict[str, Any]]) -> str:
    """Markdown: seconds of each stage with the ratio to the row above, memory beside what is allowed."""
    lines = [
        f"| rows | processes | {' | '.join(f'{stage}, CPU s' for stage in STAGES)} | before, MB | most while checking and tokenizing, MB | 300 MB + 64 B a row |",
        "|" + "---|" * (len(STAGES) + 5),
    ]
    before: dict[str, float] = {}
    for record in found:
        shown = []
        for stage in STAGES:
            if stage not in record["seconds"]:
                shown.append("")
                continue
            value = record["seconds"][stage]
            ratio = f" ({value / before[stage]:.1f}x)" if before.get(stage) else ""
            shown.append(f"{value:.2f}{ratio}")
        before = record["seconds"]
        most = max(record["peak"].values())
        allowed = 300e6 + 64 * record["rows"]
        lines.append(
            f"| {record['rows']:,} | {record['workers']} | {' | '.join(shown)} | {record['peak']['before'] / 1e6:.0f} "
            f"| {most / 1e6:.0f} | {allowed / 1e6:.0f} |"
        )
    return "\n".join(lines)


def predict(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A record an engine."""
    import labeltune
    from labeltune.config import build_config

    made_up.make_model(folder / "model")
    few = made_up.write_rows(folder / "few.jsonl", 64)
    values = made_up.run_config(folder / "model", few, folder / "run", max_steps=1)
    run = labeltune.train(build_config(values), say=lambda _: None).best
    file = made_up.write_rows(folder / "rows.jsonl", given.rows, 3, 6)
    command = ["-m", "labeltune", "predict", str(run), str(file), "-o"]
    found = []
    for name, options in (
        ("local, 2 threads", []),
        ("local, 1 thread", []),
        ("ray, 1 worker of 2 threads", ["--engine", "ray", "--workers", "1", "--block-rows", "1024"]),
        ("ray, 2 workers of 1 thread", ["--engine", "ray", "--workers", "2", "--block-rows", "1024"]),
    ):
        output = folder / name.replace(" ", "-").replace(",", "")
        threads = {"OMP_NUM_THREADS": "1"} if name == "local, 1 thread" else {}
        started = time.perf_counter()
        child([*command, str(output), *options], **threads)
        seconds = time.perf_counter() - started
        record: dict[str, Any] = {"engine": name, "rows": given.rows, "seconds": round(seconds, 1)}
        record["rows_per_second"] = round(given.rows / seconds, 1)
        if output.is_dir():
            times = sorted(part.stat().st_mtime for part in output.glob("part-*"))
            # The workers begin together: as many parts as there are workers came out of the first round.
            first = int(name.split()[1])
            rows = (len(times) - first) * 1024 if len(times) > first else 0
            record["steady"] = round(rows / max(times[-1] - times[first - 1], 1e-9), 1)
            answers = b"".join(part.read_bytes() for part in sorted(output.glob("part-*")))
        else:
            answers = output.read_bytes()
        record["labels"] = [json.loads(line)["label"] for line in answers.splitlines()]
        found.append(record)
    for record in found:
        record["same_labels"] = record["labels"] == found[0]["labels"]
    for record in found:
        del record["labels"]
    return found


def predict_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| engine | rows | s | rows/s | steady rows/s | labels as local |", "|---|---|---|---|---|---|"]
    for r in found:
        same = "all" if r["same_labels"] else "not all"
        lines.append(
            f"| {r['engine']} | {r['rows']:,} | {r['seconds']} | {r['rows_per_second']} | {r.get('steady', '')} | {same} |"
        )
    return "\n".join(lines)


def steps() -> list[dict[str, Any]]:
    """A record for a number of rows and processes: seconds to cut one step of rows of about 90 tokens, the median of three."""
    from labeltune.training.packing import Row, pack_step

    generator, prefix, found = random.Random(0), tuple(range(3, 35)), []
    for count, processes in STEPS:
        rows = []
        for _ in range(count):
            text = tuple(generator.randrange(100, 9_000) for _ in range(generator.randint(20, 80)))
            ids = (*prefix, *text, 7, 8, 9, generator.randrange(4), 2)
            rows.append(Row.of(ids, len(ids) - 4, len(ids)))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            pack_step(rows, 2048, "shared_prefix", processes)
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        found.append(
            {"rows": count, "processes": processes, "seconds": seconds, "ms_a_row": 1000 * seconds / count}
        )
    return found


def steps_table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| rows a step | processes | s a step | ms a row |", "|---|---|---|---|"]
    for r in found:
        lines.append(f"| {r['rows']:,} | {r['processes']:,} | {r['seconds']:.3f} | {r['ms_a_row']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    costs = commands.add_parser("cost")
    costs.add_argument("--rows", default="1000,10000,100000,1000000")
    costs.add_argument("--workers", type=int, default=1)
    costs.add_argument("--until", choices=["split", "tokenize"], default="tokenize", help="last stage")
    predicts = commands.add_parser("predict")
    predicts.add_argument("--rows", type=int, default=20_000)
    for command in (costs, predicts, commands.add_parser("steps")):
        command.add_argument("--json")
    one = commands.add_parser("stages")
    one.add_argument("file", type=Path)
    one.add_argument("tokenizer", type=Path)
    one.add_argument("--workers", type=int)
    one.add_argument("--until")
    given = parser.parse_args()
    if given.what == "stages":
        print(json.dumps(stages(given.file, given.tokenizer, given.workers, given.until)))
        return
    if given.what == "steps":
        found, table = steps(), steps_table
    else:
        measure, table = (cost, cost_table) if given.what == "cost" else (predict, predict_table)
        with tempfile.TemporaryDirectory() as temporary:
            found = measure(given, Path(temporary))
    print(table(found))
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
