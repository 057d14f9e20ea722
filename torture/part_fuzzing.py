"""Coverage-guided fuzzing of the readers (atheris), for a bounded time."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from torture.common import ROOT, PartResult, Settings, say

#: Seconds at scale 1, over all targets.
SECONDS = 60
TARGETS = ("jsonl", "csv", "config")


def run(settings: Settings) -> PartResult:
    """Each target in a process of its own; a crash leaves its input in the part's folder."""
    result = PartResult("fuzzing")
    if importlib.util.find_spec("atheris") is None:
        result.notes.append(
            "skipped: atheris is not installed for this Python (pip install -c constraints.txt '.[torture]')"
        )
        return result
    for target in TARGETS:
        seconds = max(2, round(settings.seconds(SECONDS) / len(TARGETS)))
        corpus = settings.folder / target
        corpus.mkdir(parents=True)
        seed(corpus, target)
        command = [sys.executable, "-m", "torture.part_fuzzing", target, str(corpus)]
        command += [f"-seed={settings.seed + 1}", f"-artifact_prefix={settings.folder}/"]
        done = subprocess.run(
            [*command, f"-max_total_time={seconds}", "-max_len=4000", "-timeout=20", "-rss_limit_mb=2000"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
        )
        say(done.stderr[-3000:])
        runs = re.findall(r"Done (\d+) runs", done.stderr) or re.findall(r"#(\d+)\s", done.stderr)
        result.inputs += int(runs[-1]) if runs else 0
        result.check(done.returncode == 0, f"{target}: {done.stderr[-500:]}")
    result.notes.append(f"atheris, {', '.join(TARGETS)}, {settings.seconds(SECONDS):.0f} s in all")
    return result


def seed(corpus: Path, target: str) -> None:
    """Something to start from."""
    starts = {
        "jsonl": [
            b'{"text": "a", "category": ["a", "b"], "output": "a"}\n',
            b'{"text": "ab", "entities": []}\n',
        ],
        "csv": [b"text,category,output\n\"a\",\"['a', 'b']\",a\n"],
        "config": [b"task: ner\ndata: &d {train: a.jsonl}\nlora: {r: 4}\n"],
    }
    for number, raw in enumerate(starts[target]):
        (corpus / str(number)).write_bytes(raw)


def fuzz(target: str) -> None:
    """The loop of one process; never returns."""
    import tempfile

    import atheris

    with atheris.instrument_imports(
        include=["labeltune.data", "labeltune.config", "labeltune.io.safe_yaml", "json", "yaml", "csv"]
    ):
        from labeltune.config import ColumnsConfig, load_config
        from labeltune.data.schemas import parse_record
        from labeltune.data.sources import iter_records
        from labeltune.errors import LabeltuneError

    folder = Path(
        tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None, prefix="labeltune-fuzz-")
    )
    path = folder / f"any.{'yaml' if target == 'config' else target}"
    columns = ColumnsConfig()

    def one(raw: bytes) -> None:
        path.write_bytes(raw)
        if target == "config":
            try:
                load_config(path)
            except LabeltuneError:
                return
            return
        for number, record in enumerate(iter_records(path)):
            assert record.where.startswith(f"{path}:")
            for task in ("classification", "ner"):
                example, faults = parse_record(record, number, task, columns)  # type: ignore[arg-type]
                assert (example is None) == any(fault.severity == "error" for fault in faults)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1])
