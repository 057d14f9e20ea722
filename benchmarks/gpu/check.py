"""Everything that has to be looked at on a GPU, in eight minutes: is it right there, how fast is it, and what holds it back.

    pip install -c constraints.txt '.[dev,bench]'
    python benchmarks/gpu/check.py --out gpu-results
    python benchmarks/gpu/check.py --device cpu --shape tiny --out dry-run     # on the CPU, with tiny shapes

Parts run one after the other, each in a process of its own with a time limit; one that fails or is stopped leaves what it had found,
and the next one starts. Leaves results.json (all figures), log.txt (all output) and report.txt, the table that is printed last.
`--parts rates,train` runs some of them, in that order.

Rows are those in examples/data, unless `--data` names a folder with ner.jsonl, documents.jsonl and titles.jsonl; the tokenizer is
pocket's, unless `--tokenizer` names a folder. Weights are random, in the shape of Qwen2-1.5B.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
#: Most seconds of each part, in the order in which they run.
PARTS = {
    "environment": 30,
    "rates": 45,
    "correct": 100,
    "train": 100,
    "predict": 100,
    "against_original": 100,
    "ceiling": 45,
    "compile": 100,
    "tests": 90,
}
TESTS = [
    "packing",
    "scoring",
    "extraction",
    "self_check",
    "shared_cache",
    "steps",
    "training",
    "resuming",
    "validation",
]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["1.5B", "0.5B", "tiny"], default="1.5B")
    parser.add_argument("--data", type=Path, help="folder with ner.jsonl, documents.jsonl, titles.jsonl")
    parser.add_argument("--tokenizer", help="folder with a tokenizer")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    return parser.parse_args()


def command_of(part: str, given: argparse.Namespace, found: Path, seconds: float) -> list[str]:
    """What a part runs."""
    dry = given.device == "cpu"
    if part == "tests":
        files = [str(REPOSITORY / "tests" / f"test_{name}.py") for name in (TESTS[:1] if dry else TESTS)]
        workers = ["--numprocesses", "1" if dry else "6", "--dist", "loadfile"]
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--maxfail=60",
            *workers,
            *files,
        ]
    own = ["--device", given.device, *(["--tokenizer", given.tokenizer] if given.tokenizer else [])]
    if part == "against_original":
        data = (given.data or REPOSITORY / "examples" / "data") / (
            "ner.jsonl" if given.data else "zh_ner_train.jsonl"
        )
        variants = ["original", "trl_padded_16x1", "shared_prefix"]
        shape = (
            ["--shape", "small", "--layers", "1", "--steps", "1"]
            if dry
            else ["--shape", given.shape, "--steps", "4"]
        )
        script = [str(HERE.parent / "train_speed.py"), "--data", str(data), "--repeats", "1", *shape]
        return [sys.executable, *script, *own, "--variants", ",".join(variants), "--json", str(found)]
    data_option = ["--data", str(given.data)] if given.data else []
    script = [str(HERE / "parts.py"), part, "--shape", given.shape, "--seconds", str(seconds), *data_option]
    return [sys.executable, *script, *own, "--json", str(found)]


def run(part: str, given: argparse.Namespace, seconds: float, log: Any) -> tuple[str, Any]:
    """How a part ended, and what it found."""
    file = given.out / f"{part}.json"
    file.unlink(missing_ok=True)
    command = command_of(part, given, file, seconds - 5)
    print(f"\n######## {part}, at most {seconds:.0f} s: {' '.join(command)}", file=log, flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
        ended = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = "stopped: out of time"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:  # stopped while it was written
        found = {"FAILED to read its figures": str(file)}
    file.unlink(missing_ok=True)
    if isinstance(found, list):  # train_speed.py's: a record for each variant
        found = {record.pop("variant"): record for record in found}
    wrong = [name for name, value in found.items() if name.startswith("FAILED") or value is False]
    return "; ".join([ended, *wrong]), found


def main() -> None:
    """Run them all; the exit code says whether every part was right."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    given.out = given.out.resolve()
    began, results, states = time.monotonic(), {}, {}
    with (given.out / "log.txt").open("w", encoding="utf-8") as log:
        for part in given.parts.split(","):
            left = given.seconds - (time.monotonic() - began)
            seconds = min(PARTS[part] * (1 if given.device == "cuda" else 4), left - 3)
            if seconds < 12:
                states[part] = "left out: no time"
                continue
            started = time.monotonic()
            ended, results[part] = run(part, given, seconds, log)
            states[part] = f"{ended} ({time.monotonic() - started:.0f} s)"
            print(f"{part}: {states[part]}", flush=True)
            whole = json.dumps(results, indent=1, ensure_ascii=False)
            (given.out / "results.json").write_text(whole + "\n", encoding="utf-8")
    report = "\n".join(table(states, results))
    (given.out / "report.txt").write_text(report + "\n", encoding="utf-8")
    print(f"\n{report}")
    sys.exit(0 if all(state.startswith("ok (") for state in states.values()) else 1)


def table(states: dict[str, str], results: dict[str, Any]) -> list[str]:
    """What a person wants to see: how parts ended, then every figure on a line of its own."""
    lines = [f"{part:18s} {state}" for part, state in states.items()]
    for part, found in results.items():
        lines += ["", f"-- {part}"]
        for name, value in found.items():
            figures = value if isinstance(value, dict) else {"": value}
            shown = "  ".join(f"{key} {_short(figure)}".strip() for key, figure in figures.items())
            lines.append(f"{name}: {shown}"[:400])
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
