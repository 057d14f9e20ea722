"""The command line: exit codes, one-line errors, and a help that is quick."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.commands import process
from helpers.hubs import fake_hub
from helpers.rows import LABELS, classification_rows, ner_rows, read_jsonl, write_jsonl
from helpers.runs import run_without_weights
from labeltune.commands import main, original
from labeltune.config import load_config
from labeltune.default_prompts import CLASSIFICATION_USER, ENGLISH_PROMPTS
from labeltune.io import progress

ROOT = Path(__file__).resolve().parents[1]
#: A verb's page is imported when it is called, and with it what reads rows, but nothing that computes.
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "swanlab",
    "modelscope",
    "sklearn",
    "optuna",
    "fastapi",
    "gradio",
    "uvicorn",
    "ray",
)


COMMANDS = (
    "",
    "init",
    "doctor",
    "keys",
    "data",
    "data check",
    "data convert",
    "data download",
    "plan",
    "train",
    "sweep",
    "evaluate",
    "compare",
    "export",
    "predict",
    "serve",
    "board",
)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import contextlib, io, sys
sys.argv = ["labeltune"]
from labeltune.commands.main import app
for command in {COMMANDS!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app([*command.split(), "--help"], prog_name="labeltune")
    assert "Usage: labeltune" in out.getvalue(), command
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = process(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_takes_half_a_second_of_cpu(tmp_path: Path) -> None:
    code = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "labeltune", "--help"], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""
    process(tmp_path, "-c", code)  # whatever has to be compiled first
    seconds = [float(process(tmp_path, "-c", code).stdout) for _ in range(3)]
    assert min(seconds) < 0.5, seconds


def test_the_list_of_verbs_says_what_their_own_help_says() -> None:
    for verb, (_, _, described) in main.VERBS.items():
        assert main.load_verb(verb).help.partition("\n")[0] == described


def test_descriptions_fit_into_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["data"]):
        done = subprocess.run(
            [sys.executable, "-m", "labeltune", *command, "--help"], capture_output=True, text=True
        )
        listed = done.stdout.partition("Commands:")[2]
        assert listed.count("\n") > 3 and "..." not in listed


def shell(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """`L` in the command is `python -m labeltune`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    line = command.replace("L ", f"{sys.executable} -m labeltune ", 1)
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=120
    )


@pytest.mark.parametrize(
    ("command", "code", "part"),
    [
        ("L data check rows.jsonl >&-", 2, "error: standard output is closed"),
        ("L --help >&-", 2, "error: standard output is closed"),
        ("L keys >&-", 2, "error: standard output is closed"),
        ("L predict run <&-", 2, "error: standard input is closed"),
        ("L data check rows.jsonl <&- >&- 2>&-", 2, ""),
        ("L data check none.jsonl 2>&-", 2, ""),
        ("L data check rows.jsonl >/dev/null 2>&-", 0, ""),
        ("L data check rows.jsonl <&- >/dev/null", 0, ""),
        ("L data convert rows.jsonl out.jsonl <&- >&-", 0, "out.jsonl: 3 rows written"),
        ("L data check rows.jsonl >/dev/full", 2, "error: the output cannot be written: No space left"),
        ("L data check rows.jsonl 1<rows.jsonl", 2, "error: the output cannot be written: it is not open"),
        ("L data check rows.jsonl | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("L --help | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("L keys | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("L nonsense 2>&1 | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("L data check none.jsonl 2>&1 | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("L data convert rows.jsonl /dev/stdout | true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
def test_closed_streams_and_broken_pipes(tmp_path: Path, command: str, code: int, part: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", classification_rows(3))
    done = shell(tmp_path, command)
    assert done.returncode == code, done.stderr
    assert part in done.stderr and done.stderr.count("\n") == (1 if part else 0), done.stderr


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", classification_rows(3))
    assert shell(tmp_path, "L data convert rows.jsonl out.jsonl 0<&- 1>&- 2>&-").returncode == 0
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and all(json.loads(row) for row in rows)


def test_convert_to_standard_output(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", classification_rows(3))
    done = shell(tmp_path, "L data convert rows.jsonl /dev/stdout")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    refused = shell(tmp_path, "L data convert rows.jsonl /dev/stdout >> rows.jsonl")
    assert refused.returncode == 2 and "which this command reads" in refused.stderr
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_the_rows_that_a_config_leaves_out_are_not_converted(labeltune: Any, in_folder: Path) -> None:
    rows = [{"text": "Ann", "entities": []} for _ in range(2)]
    rows[0]["entities"] = [{"start_idx": 0, "end_idx": 3, "entity_text": "Ann", "entity_label": "PER"}]
    late = {**rows[0], "entities": [{**rows[0]["entities"][0], "entity_label": "LATE"}]}
    write_jsonl(in_folder / "rows.jsonl", [*rows, late])
    (in_folder / "run.yaml").write_text("task: ner\ndata: {train: rows.jsonl, max_rows: 2}\n")
    assert labeltune("data", "convert", "run.yaml", "out.jsonl").code == 0
    lines = (in_folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and not any("LATE" in line for line in lines)


def test_a_name_that_is_not_utf8_is_printed_with_escapes(tmp_path: Path) -> None:
    for command in (
        "train NAME.yaml",
        "evaluate NAME -d rows.jsonl",
        "board NAME",
        "predict NAME NAME.jsonl",
    ):
        done = shell(tmp_path, "L " + command.replace("NAME", r"$'\321\265\301\267'"))
        escapes = ("ѵ" + r"\udcc1\udcb7", "ѵ" + r"\xc1\xb7")
        assert done.returncode == 2 and any(name in done.stderr for name in escapes), done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    write_jsonl(tmp_path / "rows.jsonl", classification_rows(6))
    done = shell(tmp_path, r"cp rows.jsonl $'\321\265\301\267.jsonl'; L data check *.jsonl")
    assert done.returncode == 0 and not done.stderr
    checked = [line for line in done.stdout.splitlines() if line.endswith("6 usable, 0 errors, 0 warnings")]
    assert [line.partition(":")[0] for line in checked] == ["rows.jsonl", "ѵ" + r"\xc1\xb7.jsonl"]


def test_each_of_several_files_is_checked(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", classification_rows(6))
    write_jsonl(tmp_path / "b.jsonl", [*classification_rows(6), {"text": ""}])
    done = shell(tmp_path, "L data check a.jsonl b.jsonl data.on_error=skip")
    assert done.returncode == 1 and "b.jsonl:7: error: empty_field" in done.stdout
    assert "a.jsonl: 6 rows, 6 usable" in done.stdout and "b.jsonl: 7 rows, 6 usable" in done.stdout
    for more, why in (
        ("none.jsonl", "none.jsonl does not exist"),
        ("b.jsonl --test a.jsonl", "take one file"),
    ):
        done = shell(tmp_path, f"L data check a.jsonl {more}")
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_python_m_labeltune(tmp_path: Path) -> None:
    done = process(tmp_path, "-m", "labeltune", "--help")
    assert done.returncode == 0
    for command in ("init", "doctor", "data", "train", "sweep", "evaluate", "predict", "board"):
        assert f"\n  {command} " in done.stdout
    write_jsonl(tmp_path / "rows.jsonl", [*classification_rows(6), {"text": ""}])
    done = process(tmp_path, "-m", "labeltune", "data", "check", "rows.jsonl")
    assert done.returncode == 1 and done.stderr == ""
    assert "rows.jsonl:7: error: empty_field: text is empty" in done.stdout
    done = process(tmp_path, "-m", "labeltune", "data", "check", "none.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: data file none.jsonl does not exist") and done.stderr.count("\n") == 1
    )


def test_check_of_good_rows(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(9))
    found = labeltune("data", "check", "rows.jsonl")
    assert found.code == 0
    assert "rows.jsonl: 9 rows, 9 usable, 0 errors, 0 warnings" in found.out
    assert "33.3%  Space" in found.out and "text length in characters: 10th percentile" in found.out
    assert labeltune("--version").out.startswith("labeltune 0.")


def test_check_lists_faults_and_counts_the_rest(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(
        in_folder / "rows.jsonl", [*classification_rows(3), *classification_rows(3), *[{"text": ""}] * 5]
    )
    found = labeltune("data", "check", "rows.jsonl", "--limit", "2")
    assert found.code == 1
    assert found.out.count(": error: empty_field: ") == 2 and "... 3 more of empty_field" in found.out
    assert found.out.count(": warning: exact_duplicate: ") == 2
    assert "11 rows, 6 usable, 10 errors, 3 warnings" in found.out
    found = labeltune("data", "check", "rows.jsonl", "--limit", "0")
    assert found.out.count(": error: empty_field: ") == 5


def test_warnings_alone_are_no_failure(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3) * 2)
    assert labeltune("data", "check", "rows.jsonl").code == 0


def test_check_against_a_test_file(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "train.jsonl", classification_rows(6))
    write_jsonl(in_folder / "test.jsonl", classification_rows(1))
    found = labeltune("data", "check", "train.jsonl", "--test", "test.jsonl")
    assert found.code == 1
    assert "test.jsonl:1: error: shared_with_train: this text also stands in train.jsonl" in found.out
    (in_folder / "run.yaml").write_text("data: {train: train.jsonl, test: test.jsonl}\n")
    assert labeltune("data", "check", "run.yaml").out == found.out


def test_check_takes_keys_for_a_data_file(labeltune: Any, in_folder: Path) -> None:
    raw = "语句,意图\n今天下雨,天气\n进球了,体育\n".encode("gb18030")
    (in_folder / "rows.csv").write_bytes(raw)
    found = labeltune("data", "check", "rows.csv")
    assert found.code == 1 and "data.encoding=gb18030" in found.out
    found = labeltune("data", "check", "rows.csv", "data.encoding=gb18030")
    assert found.code == 1 and "\nrows.csv: no row can be read, 1 error, 0 warnings\n" in found.out
    assert "no columns 'text', 'label'; the file has '意图', '语句'" in found.out
    assert "add data.columns.text=COLUMN data.columns.output=COLUMN to the command" in found.out
    assert "labels (" not in found.out and "text length" not in found.out
    keys = ("data.encoding=gb18030", "data.columns.text=语句", "data.columns.output=意图")
    found = labeltune("data", "check", "rows.csv", *keys)
    assert found.code == 0 and "rows.csv: 2 rows, 2 usable, 0 errors, 0 warnings" in found.out
    assert labeltune("data", "check", "rows.csv", "data.colums.text=a").code == 2
    found = labeltune("data", "check", "rows.csv", "--labels", "[]")
    assert found.code == 2 and "--labels '[]' names no label" in found.err
    write_jsonl(in_folder / "ner.jsonl", ner_rows(3))
    assert "rows without entities: 1" in labeltune("data", "check", "ner.jsonl").out
    assert labeltune("data", "check", "ner.jsonl", "task=classification").code == 1


def test_nothing_that_moves_the_terminal_is_printed(labeltune: Any, in_folder: Path) -> None:
    labels = ["\x1b[31mred\x1b[2J", "x\ty", "two\nlines", "\u202egnp", "plain 中文\u3000"]
    write_jsonl(
        in_folder / "rows.jsonl", [{"text": str(n), "output": label} for n, label in enumerate(labels)]
    )
    rows = [{"text": "a", "category": ["b\x1b[2J"], "output": "c\x9b"}]
    write_jsonl(in_folder / "bad\x1b[2J\udcff.jsonl", rows)
    found = labeltune("data", "check", "rows.jsonl", "--test", "bad\x1b[2J\udcff.jsonl")
    assert found.code == 1
    printed = found.out + found.err
    assert not [c for c in printed if not (c.isprintable() or c in "\n\u3000")]
    for part in (
        r"\x1b[31mred\x1b[2J",
        r"x\ty",
        r"two\nlines",
        r"\u202egnp",
        "bad\\x1b[2J\\xff.jsonl:1: error",
    ):
        assert part in printed
    found = labeltune("data", "check", "none\x1b[2J.jsonl")
    assert found.code == 2 and r"none\x1b[2J.jsonl does not exist" in found.err and "\x1b" not in found.err


def rows_of_one_long_label(count: int) -> list[dict[str, Any]]:
    rows = classification_rows(count)
    for number in (3, 7):
        rows[number] = {**rows[number], "category": [*LABELS, "long " * 40 * number]}
    return rows


def test_rows_that_cannot_fit_are_faults(labeltune: Any, in_folder: Path, model_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", rows_of_one_long_label(24))
    (in_folder / "run.yaml").write_text(
        f"model: {model_folder}\ntracking: none\noutput_dir: out\nprompt: {{max_length: 300}}\n"
        "data: {train: rows.jsonl}\ntraining: {max_steps: 1}\n"
    )
    found = labeltune("data", "check", "run.yaml")
    assert found.code == 1
    lines = [line for line in found.out.splitlines() if ": error: too_long: " in line]
    assert [line.partition(": ")[0] for line in lines] == ["rows.jsonl:4", "rows.jsonl:8"]
    enough = re.findall(r"prompt\.max_length=(\d+) fits every row", found.out)
    assert len(enough) == 2 and len(set(enough)) == 1
    assert f"need {enough[0]} tokens, {int(enough[0]) - 300} more than prompt.max_length=300" in lines[1]
    for command in (("train", "run.yaml"), ("plan", "run.yaml")):
        stopped = labeltune(*command)
        assert stopped.code == 2 and "Traceback" not in stopped.err
        for part in (
            "2 rows cannot fit:",
            "rows.jsonl:4: ",
            "rows.jsonl:8: ",
            f"prompt.max_length={enough[0]}",
        ):
            assert part in stopped.err
    less, fits = int(enough[0]) - 1, f"prompt.max_length={enough[0]}"
    assert "1 error" in labeltune("data", "check", "run.yaml", f"prompt.max_length={less}").out
    assert labeltune("data", "check", "run.yaml", fits).code == 0
    skipped = labeltune("train", "run.yaml", "data.on_error=skip")
    assert skipped.code == 0, skipped.err
    assert "2 rows skipped that cannot fit prompt.max_length=300" in skipped.err
    # What was left out is neither measured nor remembered, and the run is recognised with the same rows.
    again = labeltune("train", "run.yaml", "data.on_error=skip", "--resume")
    assert again.code == 0 and "nothing to do: all 1 steps are done" in again.err
    write_jsonl(
        in_folder / "held.jsonl",
        [rows_of_one_long_label(24)[3], {**classification_rows(1)[0], "text": "a match"}],
    )
    held = labeltune(
        "train", "run.yaml", "data.on_error=skip", "data.validation=held.jsonl", "output_dir=other"
    )
    assert held.code == 0, held.err
    metrics = json.loads((in_folder / "other" / "validation" / "metrics.json").read_text())
    assert metrics["rows"] == 1


def test_entities_that_cannot_fit_are_faults(labeltune: Any, in_folder: Path, model_folder: Path) -> None:
    rows = ner_rows(9)
    text = "他在南京" * 60
    rows[4] = {
        "text": text,
        "entities": [
            {"start_idx": n + 2, "end_idx": n + 4, "entity_text": "南京", "entity_label": "GPE"}
            for n in range(0, len(text), 4)
        ],
    }
    write_jsonl(in_folder / "rows.jsonl", rows)
    (in_folder / "run.yaml").write_text(
        f"task: ner\nmodel: {model_folder}\nprompt: {{max_length: 600}}\ndata: {{train: rows.jsonl}}\n"
    )
    found = labeltune("data", "check", "run.yaml")
    assert found.code == 1 and "rows.jsonl:5: error: too_long" in found.out and "1 error, " in found.out
    (enough,) = re.findall(r"prompt\.max_length=(\d+) fits every row", found.out)
    assert labeltune("data", "check", "run.yaml", f"prompt.max_length={enough}").code == 0
    assert labeltune("data", "check", "run.yaml", f"prompt.max_length={int(enough) - 1}").code == 1


def test_check_as_json(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", [*ner_rows(6), {"text": "南京"}])
    found = labeltune("data", "check", "rows.jsonl", "--json", "--labels", "地理实体，人名")
    assert found.code == 1
    report = json.loads(found.out)
    (file,) = report["files"]
    assert (file["rows"], file["usable"], file["errors"]) == (7, 6, 1)
    assert file["labels"] == {"地理实体": 4} and file["rows_without_entities"] == 2
    (fault,) = report["faults"]
    assert (
        fault["kind"] == "missing_field" and fault["where"] == "rows.jsonl:7" and fault["severity"] == "error"
    )


def test_convert_writes_the_originals_rows(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    found = labeltune("data", "convert", "rows.jsonl", "out/converted.jsonl")
    assert (found.code, found.out) == (0, "") and "3 rows written, 0 skipped" in found.err
    path = in_folder / "out" / "converted.jsonl"
    rows = read_jsonl(path)
    assert rows[1] == {
        "instruction": "你是一个文本分类领域的专家，你会接收到一段文本和几个潜在的分类选项，请输出文本内容的正确类型",
        "input": "文本:rocket number 1 rocket,类型选型:['Sports', 'Space', 'Art']",
        "output": "Space",
    }
    assert [p.name for p in path.parent.iterdir()] == ["converted.jsonl"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_convert_of_entities(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", ner_rows(3))
    assert labeltune("data", "convert", "rows.jsonl", "out.jsonl", "--labels", "地理实体").code == 0
    rows = read_jsonl(in_folder / "out.jsonl")
    assert json.loads(rows[0]["output"]) == {"entity_text": "南京", "entity_label": "地理实体"}
    assert rows[2]["output"] == "没有找到任何实体" and "地理实体" in rows[0]["instruction"]


def test_convert_stops_or_skips(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", [*classification_rows(2), {"text": ""}])
    found = labeltune("data", "convert", "rows.jsonl", "out.jsonl")
    assert found.code == 2 and "rows.jsonl:3" in found.err and "--on-error skip" in found.err
    assert [p.name for p in in_folder.iterdir()] == ["rows.jsonl"]
    found = labeltune("data", "convert", "rows.jsonl", "out.jsonl", "--on-error", "skip")
    assert found.code == 0 and "2 rows written, 1 skipped" in found.err
    assert labeltune("data", "convert", "rows.jsonl", "out.jsonl", "--on-error", "ignore").code == 2
    kept = (in_folder / "out.jsonl").read_bytes()
    (in_folder / "rows.csv").write_text("text;output\na;b\n")
    found = labeltune("data", "convert", "rows.csv", "out.jsonl", "--on-error", "skip")
    assert found.code == 2 and "rows.csv:1: error: unparsable_line" in found.err
    assert "--on-error" not in found.err
    write_jsonl(in_folder / "rows.jsonl", [{"text": "", "output": "Art"}])
    found = labeltune("data", "convert", "rows.jsonl", "out.jsonl", "--on-error", "skip")
    assert found.code == 2 and "rows.jsonl holds no usable row" in found.err
    assert (in_folder / "out.jsonl").read_bytes() == kept


def test_convert_names_the_error_and_not_a_warning_before_it(labeltune: Any, in_folder: Path) -> None:
    blank = {"start_idx": 0, "end_idx": 2, "entity_text": "a ", "entity_label": "X"}
    write_jsonl(in_folder / "rows.jsonl", [{"text": "a b", "entities": [blank, {**blank, "start_idx": 9}]}])
    found = labeltune("data", "convert", "rows.jsonl", "out.jsonl", "--labels", "X")
    assert found.code == 2 and "rows.jsonl:1: error: span_mismatch: entities[1]" in found.err
    assert "entity_blanks" not in found.err


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_init_writes_a_config_that_loads(
    labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    found = labeltune("init", task, "new")
    assert found.code == 0, found.err
    kinds = {".yaml": "config", ".jsonl": "sample rows to train on", "_test.jsonl": "sample rows to test on"}
    assert found.out.startswith("".join(f"wrote new/{task}{end}: {what}\n" for end, what in kinds.items()))
    config = load_config(in_folder / "new" / f"{task}.yaml")
    assert config.task == task and (in_folder / "new" / config.data.train).is_file()
    assert config.data.test == f"{task}_test.jsonl" and (in_folder / "new" / config.data.test).is_file()
    commands = (
        f"  labeltune data check {task}.jsonl\n  labeltune train {task}.yaml\n"
        f"  labeltune evaluate output/{task} --data {task}_test.jsonl\n"
    )
    assert found.out.endswith(f"\n\ngo on with:\n  cd new\n{commands}"), "they are run inside the folder"
    assert labeltune("init", task).out.endswith(f"\n\ngo on with:\n{commands}"), "here"
    monkeypatch.setenv("LABELTUNE_LANG", "zh")
    found = labeltune("init", task, "neu")
    assert "示例数据是英文的" in found.out and load_config(in_folder / "neu" / f"{task}.yaml") == config
    comments = (in_folder / "neu" / f"{task}.yaml").read_text(encoding="utf-8")
    assert "# 用自己的数据训练" in comments and "pocket-zh" in comments
    monkeypatch.setenv("LABELTUNE_LANG", "en")
    (in_folder / "new" / f"{task}.yaml").write_text("task: ner\n")
    found = labeltune("init", task, "new")
    assert found.code == 2 and "exists already; --force replaces it" in found.err
    assert (in_folder / "new" / f"{task}.yaml").read_text() == "task: ner\n"
    assert labeltune("init", task, "new", "--force").code == 0
    assert load_config(in_folder / "new" / f"{task}.yaml") == config


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("train", "run.yaml", "training.epoch=3"), "did you mean 'training.epochs'?"),
        (("train", "run.yaml", "training.max_tokens_per_pack=0"), "at least 1, or auto"),
        (("train", "none.yaml"), "labeltune init classification"),
        (("sweep", "run.yaml"), "--search lora.r=4,8,16"),
        (("sweep", "run.yaml", "--search", "lora.rank=4,8"), "did you mean 'lora.r'?"),
        (("sweep", "run.yaml", "--search", "lora.r=8,0"), "--search lora.r=0: lora.r: "),
        (("sweep", "run.yaml", "--search", "lora.r=4..8", "--grid"), "a grid needs choices"),
        (("sweep", "run.yaml", "data.validation_fraction=0", "--search", "lora.r=4,8"), "on validation rows"),
        (("evaluate", "run", "--on-error", "maybe"), "--on-error must be stop or skip"),
        (("init", "summary"), "classification, multilabel or ner"),
        (
            ("init",),
            "name the task: labeltune init classification, labeltune init multilabel, or labeltune init ner",
        ),
        (("init", "--task", "ner"), "name the task: labeltune init ner"),
        (("data", "download", "imdb"), "fudan, ccfbdci"),
        (("data", "check", "run.yaml", "--task", "nre"), "'ner'"),
        (("data", "check", "ms:name"), "ms:org/name"),
        (("board", "nowhere"), "no folder nowhere"),
        (("predict", "run", "a.jsonl", "--text", "b"), "not both"),
        (("predict", "run", "--text", " "), "text is empty"),
    ],
)
def test_errors_are_one_line(labeltune: Any, in_folder: Path, args: tuple[str, ...], part: str) -> None:
    (in_folder / "run.yaml").write_text("model: pocket\n")
    found = labeltune(*args)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ") and found.err.count("\n") == 1
    assert part in found.err and "Traceback" not in found.err


def test_download(labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(call: dict[str, Any]) -> str:
        write_jsonl(Path(call["local_dir"]) / "train.jsonl", classification_rows(3))
        write_jsonl(Path(call["local_dir"]) / "test.jsonl", classification_rows(1))
        return str(call["local_dir"])

    fake_hub(monkeypatch, "ms", answer)
    found = labeltune("data", "download", "fudan")
    assert found.code == 0 and found.out.split() == ["train.jsonl", "test.jsonl"]
    assert labeltune("data", "check", "train.jsonl").code == 0

    def unreachable(_: dict[str, Any]) -> str:
        logging.getLogger("urllib3").warning("Retrying (Retry(total=1)) after connection broken")
        warnings.warn("something is old", stacklevel=1)
        raise ConnectionError(
            "HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: " + 99 * "x"
        )

    fake_hub(monkeypatch, "hf", unreachable)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    found = labeltune("data", "download", "ccfbdci", "rows")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        "fetching qgyd2021/chinese_ner_sft from Hugging Face (huggingface.co)\n"
        "error: qgyd2021/chinese_ner_sft could not be fetched: Hugging Face (huggingface.co) cannot be reached "
        "(no connection). Check the network, or download its files by hand from "
        "https://huggingface.co/datasets/qgyd2021/chinese_ner_sft/tree/main and put them here: "
        f"{in_folder}/rows/ccfbdci.jsonl\n"
    )


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("--num_train_epochs 3", "is training.epochs here: training.epochs=3"),
        ("--lora-rank=8", "lora_rank (LLaMA-Factory, ms-swift) is lora.r here: lora.r=8"),
        ("lora_rank=8", "lora_rank (LLaMA-Factory, ms-swift) is lora.r here: lora.r=8"),
        ("training.per_device_train_batch_size=4", "is training.batch_size here: training.batch_size=4"),
        ("--training.gradient_accumulation_steps 4", "is training.batch_size here: training.batch_size=4"),
        ("model_name_or_path=pocket", "is model here: model=pocket"),
        ("--cutoff_len 512", "cutoff_len (LLaMA-Factory) is prompt.max_length here: prompt.max_length=512"),
        ("--max_seq_length=512", "is prompt.max_length here: prompt.max_length=512"),
        ("lr_scheduler_type=cosine", "is training.scheduler here: training.scheduler=cosine"),
        ("--warmup_ratio 0.1", "is training.warmup_steps here: training.warmup_steps=... (a number of steps"),
        ("--bf16", "is training.precision here: training.precision=bf16"),
        ("bf16=false", "is training.precision here: training.precision=auto"),
        ("--fp16 true", "is training.precision here: training.precision=fp16"),
        ("dataset=rows.jsonl", "is data.train here: data.train=rows.jsonl"),
        ("--val_size 0.1", "is data.validation_fraction here: data.validation_fraction=0.1"),
        ("eval_steps=50", "is training.save_steps here: training.save_steps=50"),
        ("--load_best_model_at_end true", "needs no key here: the best checkpoint is always kept"),
        ("report_to=wandb", "is tracking here: tracking=wandb"),
        ("--quantization_bit 4", "is training.method here: training.method=qlora"),
        ("flash_attn=fa2", "needs no key here: the attention is picked by itself"),
        ("--template qwen", "needs no key here: the chat template is the model's own"),
        ("num_labels=3", "needs no key here: labels are counted in the rows"),
        ("--problem_type single_label_classification", "needs no key here: task=classification"),
        ("--lora_target all", "is lora.target_modules here: lora.target_modules=all-linear"),
        ("lora_target=q_proj,v_proj", "lora.target_modules=[q_proj, v_proj]"),
        ("--learning_rate 1e-4", "--learning_rate is written training.learning_rate=1e-4 here"),
        ("--training.epochs=3", "--training.epochs is written training.epochs=3 here"),
        ("--output_dir out", "--output_dir is written output_dir=out here"),
        ("--logging_steps", "--logging_steps is written training.logging_steps=... here"),
    ],
)
def test_names_of_other_tools_are_answered_with_ours(
    labeltune: Any, in_folder: Path, given: str, answer: str
) -> None:
    (in_folder / "run.yaml").write_text("model: pocket\n")
    for command in ("train", "plan", "evaluate"):
        found = labeltune(command, "run.yaml", *given.split())
        assert (found.code, found.out) == (2, "") and found.err.count("\n") == 1
        assert answer in found.err, found.err


def test_all_names_of_other_tools_lead_to_keys_of_ours() -> None:
    from labeltune.config import config_keys
    from labeltune.other_names import KEYS, NO_KEY, our_name

    ours = {key for key, *_ in config_keys()}
    assert {key for _, key, _ in KEYS.values()} <= ours and len(KEYS) + len(NO_KEY) > 60
    # A name that is ours too would be answered instead of taken.
    assert not {*KEYS, *NO_KEY} & ours
    for name in KEYS:
        for value in ("1", "true", "all", "x", True, None, 0.5, ["a"]):
            assert f"is {KEYS[name][1]} here: {KEYS[name][1]}=" in str(our_name(name, value))
    assert our_name("training.epochs") is None


def test_our_own_options_and_typos_are_left_alone(labeltune: Any, in_folder: Path) -> None:
    (in_folder / "run.yaml").write_text("model: pocket\ndata: {train: none.jsonl}\n")
    found = labeltune("train", "run.yaml", "--wibble", "3")
    assert found.code == 2 and "No such option: --wibble" in found.err
    found = labeltune("tran", "run.yaml")
    assert found.code == 2 and "Did you mean 'train'?" in found.err
    for command in (("train", "run.yaml", "--model", "pocket"), ("evaluate", "run.yaml", "--max-rows", "1")):
        assert "is written" not in labeltune(*command).err


def test_keys(labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = labeltune("keys")
    assert found.code == 0 and found.out.startswith("task  (default: classification)\n")
    from labeltune.config import config_keys

    for key, *_ in config_keys():
        assert f"\n{key}" in f"\n{found.out}"
    assert all(len(line) <= 60 for line in found.out.splitlines() if line.startswith(" "))
    found = labeltune("keys", "lora.r")
    assert [line for line in found.out.splitlines() if not line.startswith(" ")] == [
        "lora.r  (default: 8)",
        "lora.rslora  (default: false)",
    ]
    found = labeltune("keys", "lora_rank")
    assert "is lora.r here" in found.out and "lora.r  (default: 8)\n    rank\n" in found.out
    found = labeltune("keys", "zzz")
    assert (found.code, found.out) == (2, "") and "no key has 'zzz'" in found.err
    monkeypatch.setenv("LABELTUNE_LANG", "zh")
    assert labeltune("keys", "lora.r").out.startswith("lora.r（默认：8）\n    秩\n")


def test_train_without_a_config(labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("labeltune.commands.train.train", lambda config, **_: seen.append(config))
    (in_folder / "意图").mkdir()
    write_jsonl(in_folder / "意图" / "客服 rows.v2.jsonl", classification_rows(3))
    write_jsonl(in_folder / "people.jsonl", ner_rows(3))
    found = labeltune("train", "--data", "意图/客服 rows.v2.jsonl", "--model", "pocket")
    assert (found.code, found.out) == (0, ""), found.err
    assert found.err == (
        "no config: task=classification (by its columns), an English prompt, model=pocket, output_dir=output/客服 rows\n"
    )
    (config,) = seen
    assert (config.task, config.model, config.data.train, config.output_dir, config.swanlab.project) == (
        "classification",
        "pocket",
        "意图/客服 rows.v2.jsonl",
        "output/客服 rows",
        "labeltune",
    )
    assert config.prompt.user == "Text: {text}\nLabel:"
    assert labeltune("train", "lora.r=4", "--data", "people.jsonl", "output_dir=here").code == 0
    assert seen[1].prompt.no_entities == "没有找到任何实体", "the types are Chinese"
    assert (seen[1].task, seen[1].lora.r, seen[1].output_dir) == ("ner", 4, "here")
    found = labeltune("train", "--data", "people.jsonl", "--task", "classification")
    assert found.code == 0 and "task=classification (as --task says)" in found.err
    (in_folder / "run.yaml").write_text("model: pocket\n")
    assert labeltune("train", "run.yaml", "-d", "people.jsonl", "--task", "ner").code == 0
    assert (seen[3].task, seen[3].data.train, seen[3].output_dir) == (
        "ner",
        "people.jsonl",
        "./output/Qwen2-NER",
    )
    for arguments, part in (
        ((), "name a config (`labeltune init classification` writes one) or rows: --data FILE"),
        (("--data", "none.jsonl"), "none.jsonl does not exist"),
        (("none.yaml",), "none.yaml does not exist"),
    ):
        found = labeltune("train", *arguments)
        assert found.code == 2 and part in found.err and found.err.count("\n") == 1
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("row", "changes", "prompt", "said"),
    [
        ({"text": "a goal", "label": "sport"}, (), ENGLISH_PROMPTS["classification"]["user"], "an English prompt"),
        ({"文本": "a goal", "标签": "sport"}, (), ENGLISH_PROMPTS["classification"]["user"], "an English prompt"),
        ({"text": "进球", "label": "sport"}, (), "文本：{text}\n类别：", "a Chinese prompt"),
        ({"text": "a goal", "label": "体育"}, (), "文本：{text}\n类别：", "a Chinese prompt"),
        ({"text": "a goal", "label": "sport", "category": ["sport", "art"]}, (), "Text: {text}\nLabel:", "an English prompt"),
        (
            {"text": "a goal", "label": "sport"},
            ("data.labels={sport: matches, art: paintings}",),
            "Labels: {category}\nText: {text}\nLabel:",
            "an English prompt",
        ),
        ({"text": "a goal", "label": "sport"}, ("prompt.layout=labels_first",), "Labels: {category}\n{text}", "an English prompt"),
        ({"text": "进球", "label": "sport"}, ("prompt.layout=labels_first",), CLASSIFICATION_USER, "a Chinese prompt"),
        ({"text": "a goal", "label": "sport"}, ("prompt.user={category} {text}",), "{category} {text}", "your own prompt"),
        (
            {"text": "a goal", "label": "sport"},
            ("prompt.max_length=99",),
            ENGLISH_PROMPTS["classification"]["user"],
            "an English prompt",
        ),
    ],
)  # fmt: skip
def test_without_a_config_the_prompt_is_in_the_language_of_the_rows(
    labeltune: Any,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, str],
    changes: tuple[str, ...],
    prompt: str,
    said: str,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("labeltune.commands.train.train", lambda config, **_: seen.append(config))
    write_jsonl(in_folder / "rows.jsonl", [row])
    found = labeltune("train", "--data", "rows.jsonl", *changes)
    assert found.code == 0 and f", {said}, " in found.err
    assert seen[0].prompt.user == prompt
    assert (seen[0].training.epochs, seen[0].training.learning_rate) == ("auto", "auto")
    if "category" in row:
        own = {**row, "category": ["sport", "politics"]}
        write_jsonl(in_folder / "rows.jsonl", [row, own])
        assert labeltune("train", "--data", "rows.jsonl").code == 0
        assert seen.pop().prompt.user == "Labels: {category}\nText: {text}\nLabel:"
    entity = {"start_idx": 0, "end_idx": 3, "entity_text": "Ada", "entity_label": "PER"}
    write_jsonl(in_folder / "people.jsonl", [{"text": "Ada", "entities": [entity]}])
    assert labeltune("train", "--data", "people.jsonl").code == 0
    assert seen.pop().prompt.no_entities == "none"
    assert labeltune("train", "--data", "people.jsonl", "prompt.answer=marks").code == 0
    assert "[entity|type]" in seen.pop().prompt.system
    (in_folder / "old.yaml").write_text("data: {train: rows.jsonl}\n")
    assert labeltune("train", "old.yaml").code == 0
    assert seen[1].prompt.user == CLASSIFICATION_USER, "a config means what it did"


def test_doctor_does_not_wait_for_a_network(labeltune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import threading
    import time

    from labeltune.commands import doctor

    over = threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        over.wait(30)
        raise TimeoutError("timed out")

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "create_connection", silent)
    monkeypatch.setattr("labeltune.tracking.swanlab.logged_in", lambda: over.wait(30) and "yes")
    began = time.monotonic()
    found = labeltune("doctor")
    assert time.monotonic() - began < 25
    over.set()
    assert found.code == 0 and found.out.endswith("\nready\n")
    assert found.out.endswith(
        "note  ModelScope (www.modelscope.cn), Hugging Face (huggingface.co), SwanLab cannot be reached: no answer in 0.2 s\n"
        "      use model=./folder with weights you copied here, or model=pocket (for Chinese: model=pocket-zh); runs are kept locally; see them with "
        "`labeltune board`\n\nready\n"
    ), "one cause is one note"


def test_doctor_says_in_words_what_cannot_be_reached(labeltune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def answer(address: tuple[str, int], **_: Any) -> socket.socket:
        if "huggingface" in address[0]:
            raise socket.gaierror(-2, "Name or service not known")
        return socket.socket()

    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(socket, "create_connection", answer)
    monkeypatch.setattr("labeltune.tracking.swanlab.logged_in", lambda: "no key found")
    out = labeltune("doctor").out
    assert (
        "  ok  ModelScope (www.modelscope.cn) can be reached\n"
        "note  Hugging Face (huggingface.co) cannot be reached: host name not found\n"
        "      its models need a local folder instead\n"
        "note  SwanLab: no key found\n"
    ) in out


def test_doctor_asks_the_mirror_that_downloads_go_to(labeltune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked: set[tuple[str, int]] = set()

    def answer(address: tuple[str, int], **_: Any) -> socket.socket:
        asked.add(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", answer)
    monkeypatch.setattr("labeltune.tracking.swanlab.logged_in", lambda: "yes")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080/")
    assert "  ok  Hugging Face (mirror.example:8080) can be reached\n" in labeltune("doctor").out
    assert asked == {("www.modelscope.cn", 443), ("mirror.example", 8080)}


def test_doctor_names_missing_kernels_where_there_is_a_gpu(
    labeltune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from labeltune.models import kernels

    card = SimpleNamespace(name="card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(kernels, "PACKAGES", {"json": "json", "no_such": "no-such"})
    monkeypatch.setattr("labeltune.commands.doctor.PACKAGES", kernels.PACKAGES)
    out = labeltune("doctor", "--offline").out
    assert "note  not installed: no-such\n" in out and "pip install no-such\n" in out


def test_doctor_loads_no_library_that_it_can_ask_without(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['labeltune', 'doctor']\n"
        "from labeltune.commands.main import run\n"
        "try: run()\n"
        "finally: print([n for n in ('transformers', 'peft', 'datasets', 'modelscope') if n in sys.modules], file=sys.stderr)"
    )
    done = process(tmp_path, "-c", code)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [["serve", "nowhere"], ["predict", "nowhere", "--text", "a"]])
def test_a_run_that_is_not_there_is_told_before_anything_is_loaded(
    tmp_path: Path, command: list[str]
) -> None:
    code = (
        f"import sys; sys.argv = ['labeltune', *{command}]\n"
        "from labeltune.commands.main import run\n"
        f"try: run()\nfinally: print([n for n in {HEAVY} if n in sys.modules], file=sys.stderr)"
    )
    done = process(tmp_path, "-c", code)
    assert done.stderr.splitlines() == ["error: run folder nowhere does not exist; train first", "[]"]


FAKE_SWANLAB = """
import os, sys, time
open("pid", "w").write(str(os.getpid()))
print("watching", *sys.argv[1:], flush=True)
time.sleep(60)
"""


def test_a_stopped_board_stops_its_server(tmp_path: Path) -> None:
    for name in ("swanlab", "swanboard"):
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("")
    (tmp_path / "fake" / "swanlab" / "__main__.py").write_text(FAKE_SWANLAB)
    (tmp_path / "swanlog").mkdir()
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path / 'fake'}"}
    command = [sys.executable, "-m", "labeltune", "board", "swanlog", "--port", "5099"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as board:
        assert board.stdout is not None and board.stderr is not None
        assert board.stderr.readline() == (
            "runs in swanlog: open http://127.0.0.1:5099 in a browser; Ctrl-C ends the board\n"
        )
        assert board.stdout.readline() == "watching watch swanlog --host 127.0.0.1 --port 5099\n"
        server = int((tmp_path / "pid").read_text())
        board.terminate()
        assert board.wait(20) == -15
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_doctor_asks_nobody_when_offline(labeltune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a connection was made"))
    found = labeltune("doctor", "--offline")
    assert found.code == 0 and found.out.endswith("\nready\n")
    for part in ("Python 3.", "torch ", "swanlab ", "of memory free", "of disk free for the cache"):
        assert part in found.out


@pytest.mark.parametrize("script", ["train_qwen2.py", "train_qwen2_ner.py", "predict_qwen2.py"])
def test_the_original_scripts_have_a_quick_help(script: str, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = process(tmp_path, "-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert f"Usage: {script}" in done.stdout


@pytest.mark.parametrize(("task", "name"), [("classification", "fudan"), ("ner", "ccfbdci")])
def test_the_original_scripts_say_where_their_data_comes_from(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: Any,
    name: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_qwen2.py"])
    with pytest.raises(SystemExit) as stopped:
        original.train_main(task)
    assert stopped.value.code == 2
    assert f"does not exist; fetch it with: labeltune data download {name}\n" in capsys.readouterr().err


def test_only_the_closest_option_is_suggested(labeltune: Any) -> None:
    err = labeltune("train", "--dta", "rows.jsonl").err
    assert "--data" in err and "--task" not in err
    assert "(Possible options: --test)" in labeltune("data", "check", "rows.jsonl", "--tset", "x.jsonl").err


def test_the_first_rows_tell_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("labeltune.io.progress.time.monotonic", lambda: now)
    with progress.row_progress(100, "predict") as advance:
        # A minute goes before the first rows; rows that are answered together come one by one.
        for seconds, rows in ((60, 1), (0.01, 9), (10, 1), (0.01, 19), (10, 1), (0.01, 19), (20, 50)):
            now += seconds
            advance(rows)
    assert capsys.readouterr().err.splitlines() == [
        "predict: 31/100 rows, 2.00 rows/s, 35 s left",
        "predict: 100/100 rows, 1.00 rows/s, 0 s left",
    ]


def test_a_bar_leaves_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may be a file or a pipe, while the bar is on a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = json.dumps({"text": "x" * 200})
    with progress.row_progress(None, "predict") as advance:
        print(row)
        advance(1)
    found = capsys.readouterr()
    assert found.out == f"{row}\n" and "predict" in found.err


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_rows_are_enough_for_a_plan(verb: str, labeltune: Any, in_folder: Path, model_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(24))
    given = ["--data", "rows.jsonl", "--model", str(model_folder), "training.batch_size=8"]
    found = labeltune(verb, *given, *(["--dry-run"] if verb == "train" else []))
    assert found.code == 0 and "computed: " in found.out
    assert not (in_folder / "output").exists()


def test_no_hidden_file_is_named_as_near(labeltune: Any, in_folder: Path) -> None:
    (in_folder / ".pre-commit-config.yaml").touch()
    assert "pre-commit" not in labeltune("train", "nowhere.yaml").err
    (in_folder / "there.yaml").touch()
    assert "there.yaml" in labeltune("train", "nowhere.yaml").err


def test_the_original_settings() -> None:
    for task, train, folder in (
        ("classification", "train.jsonl", "./output/Qwen2"),
        ("ner", "ccfbdci.jsonl", "./output/Qwen2-NER"),
    ):
        config = original.original_config(task, ["training.seed=7"])  # type: ignore[arg-type]
        assert (config.task, config.data.train, config.output_dir) == (task, train, folder)
        assert (config.data.on_error, config.data.validation_fraction, config.training.seed) == (
            "skip",
            0.1,
            7,
        )
    assert config.data.labels == ("地点", "人名", "地理实体", "组织")
    assert original.original_config("ner", ["data.labels=[PER]"]).data.labels == ("PER",)


def test_the_task_is_guessed_before_other_changes_are_looked_at(
    labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("labeltune.commands.train.train", lambda config, **_: seen.append(config))
    write_jsonl(in_folder / "ner.jsonl", ner_rows(3))
    found = labeltune("train", "--data", "ner.jsonl", "eval.metric=span_f1", "data.encoding=gbk")
    assert found.code == 0 and "task=ner (by its columns)" in found.err
    assert (seen[0].task, seen[0].metric, seen[0].data.encoding) == ("ner", "span_f1", "gbk")
    found = labeltune("train", "--data", "ner.jsonl", "task=ner", "eval.metric=span_f1")
    assert found.code == 0 and "task=ner (as task= says)" in found.err
    found = labeltune("train", "--data", "ner.jsonl", "eval.metric=accuracy")
    assert found.code == 2 and "eval.metric=accuracy is not measured for ner" in found.err
    found = labeltune("train", "--data", "ner.jsonl", "data.colums.text=x")
    assert found.code == 2 and "unknown key 'data.colums'" in found.err and found.err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    found = labeltune("train", "--data", "ner.jsonl")
    assert found.code == 0 and "no config" not in found.err
    monkeypatch.delenv("RANK")
    assert labeltune("data", "check", "ner.jsonl", "eval.metric=span_f1").code == 0
    found = labeltune("data", "check", "ner.jsonl", "eval.metric=accuracy")
    assert found.code == 2 and "eval.metric=accuracy is not measured for ner" in found.err


def test_ctrl_c_outside_the_steps_is_said(
    labeltune: Any, in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """typer would end with exit code 130 and without a word."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    monkeypatch.setattr("labeltune.commands.preparing.load_splits", interrupted)
    stopped = labeltune("train", "--data", "rows.jsonl", "--model", str(model_folder))
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == "stopped; no checkpoint has been saved"
    run_without_weights(in_folder / "output" / "rows")
    stopped = labeltune("train", "--data", "rows.jsonl", "--model", str(model_folder), "--overwrite")
    again = f"labeltune train --data rows.jsonl model={model_folder} --resume"
    assert stopped.err.splitlines()[-1] == f"stopped; checkpoint-1 is saved, go on with: {again}"
    monkeypatch.setattr("labeltune.commands.data.check_data", interrupted)
    stopped = labeltune("data", "check", "rows.jsonl")
    assert (stopped.code, stopped.err.splitlines()[-1]) == (130, "interrupted")


def test_a_wrong_model_is_named_before_a_folder_that_is_taken(
    labeltune: Any, in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    run_without_weights(in_folder / "output" / "rows")
    found = labeltune("train", "--data", "rows.jsonl", "--model", "pockt")
    assert found.code == 2 and "did you mean pocket?" in found.err
    found = labeltune("train", "--data", "rows.jsonl", "--model", "pocket-zh", "--accept-license", "gemma")
    assert found.code == 2 and "already holds checkpoint-1. Continue it" in found.err, "a damaged one"
    monkeypatch.setattr("labeltune.io.run_folder.damage", lambda checkpoint: None)
    found = labeltune("train", "--data", "rows.jsonl", "--model", "pocket-zh", "--accept-license", "gemma")
    assert found.code == 2 and "already holds checkpoint-1 of model pocket; choose another" in found.err
