"""The wheel alone trains and predicts, in an environment that does not know the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from helpers.rows import classification_rows, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_trains_and_predicts(in_folder: Path, model_folder: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(in_folder / "dist"),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((in_folder / "dist").glob("labeltune-*.whl"))

    # A new environment that sees the installed dependencies, but not this repository's editable install: a plain path
    # line in a .pth file does not process the .pth files found there.
    home = in_folder / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    assert subprocess.run(install).returncode == 0

    work = in_folder / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        answer = subprocess.run(
            [python, *arguments], cwd=work, env=environment, capture_output=True, text=True
        )
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    where = run("-c", "import labeltune; print(labeltune.__file__)")
    assert str(site) in where and str(ROOT) not in where
    write_jsonl(work / "train.jsonl", classification_rows(24))
    run("-m", "labeltune", "init", "ner")
    assert (work / "ner.yaml").is_file()
    run("-m", "labeltune", "init", "classification")
    run(
        "-m",
        "labeltune",
        "train",
        "classification.yaml",
        f"model={model_folder}",
        "data.train=train.jsonl",
        "tracking=none",
    )
    row = json.loads(run("-m", "labeltune", "predict", "output/classification", "--text", "rocket"))
    assert set(row) == {"id", "label", "confidence", "ranking", "answer", "parsed"}
