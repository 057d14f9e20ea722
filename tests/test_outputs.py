"""No command writes over what it reads; devices, links and folders stay what they are; and it is said before the work begins."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import refused
from helpers.rows import classification_rows, read_jsonl, write_jsonl
from helpers.runs import run_without_weights
from labeltune.config import build_config
from labeltune.errors import OutputError
from labeltune.inference.files import csv_of
from labeltune.io import progress
from labeltune.io.outputs import check_file, check_folder, descriptor, is_stream, write_json, write_text
from labeltune.io.run_folder import check_inputs_kept


def same_name(folder: Path) -> str:
    return "rows.jsonl"


def absolute(folder: Path) -> str:
    return str(folder / "rows.jsonl")


def through_parent(folder: Path) -> str:
    (folder / "sub").mkdir()
    return "sub/../rows.jsonl"


def soft_link(folder: Path) -> str:
    (folder / "link.jsonl").symlink_to("rows.jsonl")
    return "link.jsonl"


def hard_link(folder: Path) -> str:
    (folder / "hard.jsonl").hardlink_to(folder / "rows.jsonl")
    return "hard.jsonl"


def linked_folder(folder: Path) -> str:
    (folder / "elsewhere").symlink_to(folder)
    return "elsewhere/rows.jsonl"


def link_of_links(folder: Path) -> str:
    (folder / "one").symlink_to("rows.jsonl")
    (folder / "two").symlink_to(folder / "one")
    return "two"


WAYS = (same_name, absolute, through_parent, soft_link, hard_link, linked_folder, link_of_links)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("a model was loaded")

    monkeypatch.setattr("labeltune.inference.load.load_predictor", refuse)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_command_writes_over_the_rows_it_reads(
    labeltune: Any,
    in_folder: Path,
    unloaded: None,
    way: Callable[[Path], str],
) -> None:
    rows = write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    before = rows.read_bytes()
    run_without_weights(in_folder / "run")
    output = way(in_folder)
    for command in (
        ("predict", "run", "rows.jsonl", "-o", output),
        ("data", "convert", "rows.jsonl", output),
        ("data", "check", "rows.jsonl", "--report", output),
        ("data", "check", "other.jsonl", "--test", "rows.jsonl", "--report", output),
    ):
        refused(labeltune(*command), "is part of what this command reads (")
    assert rows.read_bytes() == before


def test_outputs_that_are_there_are_named_before_they_are_replaced(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    run_without_weights(in_folder / "run")
    for name in ("out.jsonl", "into/metrics.json", "into/comparison.json"):
        (in_folder / name).parent.mkdir(exist_ok=True)
        (in_folder / name).touch()
    for command, named in (
        (("predict", "run", "rows.jsonl", "-o", "out.jsonl"), "out.jsonl"),
        (("data", "convert", "rows.jsonl", "out.jsonl"), "out.jsonl"),
        (("evaluate", "run", "--data", "rows.jsonl", "-o", "into"), "into/metrics.json"),
        (("compare", "base", "run", "--data", "rows.jsonl", "-o", "into"), "into/comparison.json"),
    ):
        progress._noted.clear()
        assert f"note: already there, and replaced at the end: {named}\n" in labeltune(*command).err
        assert "already there" not in labeltune(*command[:-1], "new").err


def test_a_file_without_texts_is_refused_before_a_model_is_loaded(
    labeltune: Any, in_folder: Path, unloaded: None
) -> None:
    write_jsonl(in_folder / "rows.jsonl", [{"body": "a"}])
    run_without_weights(in_folder / "run")
    found = labeltune("predict", "run", "rows.jsonl", "-o", "out.jsonl")
    assert found.code == 2 and found.err.startswith(
        "error: rows.jsonl: no column 'text'; the file has 'body'"
    )


def test_names_in_folders_are_looked_at_too(labeltune: Any, in_folder: Path, unloaded: None) -> None:
    run_without_weights(in_folder / "run")
    for command, name in (
        (("evaluate", "run"), "predictions.jsonl"),
        (("compare", "base", "run"), "changed.jsonl"),
    ):
        (in_folder / "report").mkdir(exist_ok=True)
        rows = write_jsonl(in_folder / "report" / name, classification_rows(3))
        found = labeltune(*command, "--data", f"report/{name}", "-o", "report")
        refused(found, f"report/{name} is part of what this command reads (report/{name})")
        assert len(rows.read_text().splitlines()) == 3


def test_a_runs_own_files_are_inputs(labeltune: Any, in_folder: Path, unloaded: None) -> None:
    base = in_folder / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    run = run_without_weights(in_folder / "run", model=str(base))
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    for output in (
        "run/checkpoint-1/labeltune.json",
        "run/checkpoint-1/adapter_model.safetensors",
        "base/config.json",
    ):
        refused(labeltune("predict", "run", "rows.jsonl", "-o", output), "part of what this command reads")
    assert (run / "checkpoint-1" / "adapter_model.safetensors").read_bytes() == b"weights"
    # A file of one's own in a run folder is no part of the run.
    (run / "predictions.jsonl").write_text("")
    check_file(run / "predictions.jsonl", [run / "checkpoint-1" / "labeltune.json", base])


def test_standard_input_is_an_input(
    labeltune: Any,
    in_folder: Path,
    unloaded: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_without_weights(in_folder / "run")
    rows = in_folder / "rows.txt"
    rows.write_text("a document\n")
    kept = os.dup(0)
    with rows.open() as file:
        os.dup2(file.fileno(), 0)
        try:
            monkeypatch.setattr(sys, "stdin", file)
            refused(labeltune("predict", "run", "-o", "rows.txt"), "part of what this command reads")
        finally:
            os.dup2(kept, 0)
            os.close(kept)


def test_what_cannot_be_written_is_said_first(labeltune: Any, in_folder: Path, unloaded: None) -> None:
    run_without_weights(in_folder / "run")
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    (in_folder / "folder").mkdir()
    (in_folder / "loop").symlink_to("loop")
    for output, part in (
        ("folder", "folder is a folder; name a file"),
        ("new/", "names a folder"),
        ("", "is a folder"),
        ("rows.jsonl/deeper.jsonl", "rows.jsonl is not a folder"),
        ("loop", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("x" * 250, "cannot be written"),
        ("out.xlsx", "jsonl or csv"),
    ):
        refused(labeltune("predict", "run", "rows.jsonl", "-o", output), part)
    refused(labeltune("data", "convert", "rows.jsonl", "folder"), "folder is a folder; name a file")
    (in_folder / "gone").symlink_to("nowhere")
    for command in (
        ("evaluate", "run", "-d", "rows.jsonl", "-o", "rows.jsonl"),
        ("compare", "base", "run", "-d", "rows.jsonl", "-o", "rows.jsonl"),
        ("sweep", "run.yaml", "--search", "lora.r=4,8", "--output", "rows.jsonl"),
        ("data", "download", "fudan", "rows.jsonl"),
        ("init", "ner", "rows.jsonl"),
        ("export", "run", "rows.jsonl"),
    ):
        (in_folder / "run.yaml").write_text("model: pocket\ndata: {train: rows.jsonl}\n")
        refused(labeltune(*command), "rows.jsonl is a file and cannot be written into")
    with pytest.raises(OutputError, match="link to a folder that is not there"):
        check_folder(in_folder / "gone", [])
    assert sorted(path.name for path in in_folder.iterdir()) == [
        "folder",
        "gone",
        "loop",
        "rows.jsonl",
        "run",
        "run.yaml",
    ]


def test_a_folder_that_may_not_be_written(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    for check, output in ((check_file, "locked/a/b.jsonl"), (check_folder, "locked/a")):
        with pytest.raises(OutputError, match=r"nothing may be written into .*locked"):
            check(in_folder / output, [])


def test_an_export_keeps_what_it_reads(labeltune: Any, in_folder: Path) -> None:
    base = in_folder / "merged"  # an earlier export, which --overwrite would replace
    base.mkdir()
    for name in ("export.json", "config.json", "rows.jsonl"):
        (base / name).write_text("{}")
    run_without_weights(in_folder / "run", model="merged")
    refused(
        labeltune("export", "run", "merged", "--overwrite"), "merged holds merged, which this command reads"
    )
    run_without_weights(in_folder / "other")
    found = labeltune("export", "other", "merged", "--overwrite", "--verify", "merged/rows.jsonl")
    refused(found, "merged holds merged/rows.jsonl, which this command reads")
    for target in ("run", "run/checkpoint-1"):
        refused(labeltune("export", "run", target, "--overwrite"), "holds the run")
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "export.json", "rows.jsonl"]


def test_a_sweep_and_an_evaluation_keep_what_their_config_names(labeltune: Any, in_folder: Path) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    (in_folder / "best.yaml").write_text("data: {train: rows.jsonl}\n")
    found = labeltune("sweep", "best.yaml", "--search", "lora.r=4,8", "--output", ".")
    refused(found, "best.yaml is part of what this command reads (best.yaml)")
    # Its test rows too, which no trial reads.
    (in_folder / "trials").mkdir()
    rows = write_jsonl(in_folder / "trials" / "predictions.jsonl", classification_rows(3))
    (in_folder / "trials.csv").write_text("text,output\na,b\n")
    (in_folder / "run.yaml").write_text("data: {train: rows.jsonl, test: trials.csv}\n")
    found = labeltune("sweep", "run.yaml", "--search", "lora.r=4,8", "--output", ".")
    refused(found, "trials.csv is part of what this command reads (trials.csv)")
    (in_folder / "run.yaml").write_text(f"data: {{train: rows.jsonl, test: {rows}}}\n")
    found = labeltune("evaluate", "run.yaml", "--data", "rows.jsonl", "--output", "trials")
    refused(found, "trials/predictions.jsonl is part of what this command reads")


def test_training_keeps_what_it_reads(labeltune: Any, in_folder: Path) -> None:
    run = run_without_weights(in_folder / "out")
    (run / "best").symlink_to("checkpoint-1")
    (run / "validation").mkdir()
    rows = [
        write_jsonl(run / folder / "predictions.jsonl", classification_rows(3))
        for folder in ("checkpoint-1", "validation")
    ]
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    config = in_folder / "run.yaml"
    for text, part in (
        ("model: out/checkpoint-1", "out/best holds out/checkpoint-1, which this command reads"),
        ("model: out/best", "out/best holds out/best, which this command reads"),
        ("data: {train: out/best/predictions.jsonl}", "holds out/best/predictions.jsonl, which this command"),
        (
            "data: {test: out/validation/predictions.jsonl}",
            "out/validation/predictions.jsonl is part of what",
        ),
    ):
        config.write_text(f"{text}\noutput_dir: out\n")
        refused(labeltune("train", "run.yaml", "--overwrite"), part)
    assert all(len(path.read_text().splitlines()) == 3 for path in rows)
    check_inputs_kept(build_config({"model": "out/checkpoint-1", "output_dir": "other"}), None, True)
    check_inputs_kept(build_config({"output_dir": "out"}), "run.yaml", True)


def rows_in(text: str) -> list[str]:
    return [json.loads(line)["id"] for line in text.splitlines()]


def test_a_fifo_and_a_link_stay(labeltune: Any, in_folder: Path, loaded: None) -> None:
    run_without_weights(in_folder / "run")
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    os.mkfifo(in_folder / "pipe")
    (in_folder / "to-pipe").symlink_to("pipe")
    for name, arguments in (
        ("to-pipe", ("rows.jsonl",)),
        ("pipe", ("--text", "a", "--text", "b", "--text", "c")),
    ):
        read: list[str] = []
        reader = threading.Thread(target=lambda kept=read: kept.append((in_folder / "pipe").read_text()))
        reader.start()
        assert labeltune("predict", "run", *arguments, "-o", name).code == 0
        reader.join(20)
        assert rows_in(read[0]) == ["0", "1", "2"]
        assert stat.S_ISFIFO((in_folder / "pipe").lstat().st_mode)
    (in_folder / "kept").mkdir()
    (in_folder / "link.jsonl").symlink_to("kept/real.jsonl")
    for arguments in (("rows.jsonl",), ("--text", "a", "--text", "b", "--text", "c")):
        (in_folder / "kept" / "real.jsonl").unlink(missing_ok=True)
        assert labeltune("predict", "run", *arguments, "-o", "link.jsonl").code == 0
        assert (in_folder / "link.jsonl").is_symlink()
        assert rows_in((in_folder / "kept" / "real.jsonl").read_text()) == ["0", "1", "2"]
    assert [path.name for path in (in_folder / "kept").iterdir()] == ["real.jsonl"]
    refused(
        labeltune("predict", "run", "rows.jsonl", "-o", "pipe", "--resume"), "--resume needs an input file"
    )
    try:  # a null device of our own, never the machine's
        os.mknod(in_folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError:
        return
    assert labeltune("predict", "run", "rows.jsonl", "-o", "null").code == 0
    assert stat.S_ISCHR((in_folder / "null").lstat().st_mode)


def test_a_written_file_goes_through_a_link_and_into_a_fifo(in_folder: Path) -> None:
    (in_folder / "link").symlink_to("real")
    write_text(in_folder / "link", "text")
    assert (in_folder / "link").is_symlink() and (in_folder / "real").read_text() == "text"
    os.mkfifo(in_folder / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((in_folder / "pipe").read_text()))
    reader.start()
    write_text(in_folder / "pipe", "text")
    reader.join(20)
    assert read == ["text"] and stat.S_ISFIFO((in_folder / "pipe").lstat().st_mode)


def test_names_of_open_descriptors(in_folder: Path) -> None:
    (in_folder / "link").symlink_to("/dev/stdout")
    for name, number in (
        ("/dev/stdout", 1),
        ("/dev/stderr", 2),
        ("/dev/fd/7", 7),
        ("/proc/self/fd/1", 1),
        (f"/proc/{os.getpid()}/fd/5", 5),
        ("/dev/../dev/fd/1", 1),
        ("link", 1),
        ("/dev/null", None),
        ("rows.jsonl", None),
    ):
        assert descriptor(Path(name)) == number, name
    assert not is_stream(in_folder) and not is_stream(in_folder / "none")


def test_devices_that_hold_disks_are_refused(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real device is touched: its kind is told by a stand-in for `stat`."""
    real = Path.stat
    kinds = {"disk": stat.S_IFBLK, "terminal": stat.S_IFCHR, "socket": stat.S_IFSOCK}

    def told(path: Path, **options: Any) -> os.stat_result:
        if path.name in kinds:
            return os.stat_result((kinds[path.name] | 0o666, 1, 1, 1, 0, 0, 0, 0, 0, 0))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", told)
    check_file(in_folder / "terminal", [])
    for name in ("disk", "socket"):
        with pytest.raises(OutputError, match="is a disk or a socket"):
            check_file(in_folder / name, [])


def test_predictions_as_csv_and_with_text(labeltune: Any, in_folder: Path, loaded: None) -> None:
    run_without_weights(in_folder / "run")
    write_jsonl(
        in_folder / "rows.jsonl", [*classification_rows(2), {"text": ""}, {"text": '逗号, "和"\n换行'}]
    )
    assert labeltune("predict", "run", "rows.jsonl", "-o", "plain.jsonl", "--with-text").code == 1
    assert labeltune("predict", "run", "rows.jsonl", "-o", "table.csv", "--with-text").code == 1
    plain = read_jsonl(in_folder / "plain.jsonl")
    assert [row.get("text") for row in plain] == [
        "match number 0 match",
        "rocket number 1 rocket",
        None,
        '逗号, "和"\n换行',
    ]
    assert (in_folder / "table.csv").read_bytes().startswith(b"\xef\xbb\xbfid,label,")
    with (in_folder / "table.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == [
        "id",
        "label",
        "confidence",
        "ranking",
        "answer",
        "parsed",
        "error",
        "source",
        "text",
    ]
    for row, cells in zip(plain, table, strict=True):
        assert cells["id"] == row["id"] and cells["text"] == row.get("text", "")
        assert cells["label"] == row.get("label", "") and cells["error"] == row.get("error", "")
        if "error" not in row:
            assert float(cells["confidence"]) == row["confidence"] and cells["parsed"] == "true"
            assert json.loads(cells["ranking"]) == row["ranking"]
    assert sorted(path.name for path in in_folder.iterdir()) == [
        "plain.jsonl",
        "rows.jsonl",
        "run",
        "table.csv",
    ]
    found = labeltune("predict", "run", "--text", "a match", "-o", "one.csv")
    assert found.code == 0
    assert re.search(r"^predictions: one\.csv \(1 row, 0 errors, \d+ s\)$", found.err, re.MULTILINE)
    header, line = (in_folder / "one.csv").read_text("utf-8-sig").splitlines()
    assert header == "id,label,confidence,ranking,answer,parsed", "no columns for errors where there are none"
    assert line.startswith("0,")
    write_jsonl(in_folder / "good.jsonl", [{"text": "a match", "note": '"error"'}, {"text": 'an "error"'}])
    found = labeltune("predict", "run", "good.jsonl", "-o", "good.csv", "--with-text")
    assert found.code == 0
    assert re.search(r"^predictions: good\.csv \(2 rows, 0 errors, \d+ s\)$", found.err, re.MULTILINE)
    assert "predictions" not in labeltune("predict", "run", "good.jsonl").err, (
        "standard output needs no such line"
    )
    lines = (in_folder / "good.csv").read_text("utf-8-sig").splitlines()
    assert lines[0] == "id,label,confidence,ranking,answer,parsed,text" and lines[2].endswith(
        ',"an ""error"""'
    )


def test_csv_of_entities() -> None:
    entity = {"start_idx": 1, "end_idx": 3, "entity_text": "南京", "entity_label": "地点", "score": -0.1}
    rows = [{"id": "a", "error": "x"}, {"id": "b", "entities": [entity], "answer": "y", "parsed": False}]
    text = "".join(csv_of(json.dumps(row) for row in rows))
    table = list(csv.DictReader(text.removeprefix("\ufeff").splitlines()))
    assert list(table[0]) == ["id", "entities", "answer", "parsed", "truncated", "error", "source"]
    (header, *_) = "".join(csv_of([json.dumps(rows[1])], faulty=False)).splitlines()
    assert header == "\ufeffid,entities,answer,parsed,truncated"
    assert (table[0]["id"], table[0]["error"], table[0]["entities"]) == ("a", "x", "")
    assert json.loads(table[1]["entities"]) == [entity] and table[1]["parsed"] == "false"


def test_evaluate_takes_the_runs_test_file(labeltune: Any, in_folder: Path, unloaded: None) -> None:
    run_without_weights(in_folder / "run", data={"test": "held/out.jsonl"})
    run_without_weights(in_folder / "bare")
    (in_folder / "run.yaml").write_text("model: pocket\ndata: {test: from_config.jsonl}\n")
    for arguments, part in (
        (("evaluate", "run"), "data file held/out.jsonl does not exist"),
        (("compare", "base", "run"), "run names it in data.test; --data FILE takes another"),
        (("evaluate", "run.yaml"), "data file from_config.jsonl does not exist"),
        (("evaluate", "bare"), "name the labelled rows with --data FILE; bare was trained without data.test"),
        (("evaluate", "run", "--data", "none.jsonl"), "data file none.jsonl does not exist"),
        (("evaluate", "nowhere", "--data", "none.jsonl"), "run folder nowhere does not exist"),
    ):
        refused(labeltune(*arguments), part)


def test_json_goes_where_it_is_wanted(
    labeltune: Any,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_without_weights(in_folder / "run")
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    figures = {"rows": 3, "rows_are": "test", "task": "classification", "unparsable": 0.0, "labels": {}}
    found = {"rows": 3, "differences": {}, "changed": {"gained": [], "lost": []}}
    monkeypatch.setattr("labeltune.commands.evaluate.evaluate", lambda *_, **__: figures)
    monkeypatch.setattr("labeltune.commands.compare.compare", lambda *_, **__: found)
    monkeypatch.setattr("labeltune.commands.evaluate.shown_headline", lambda _: [])
    for command, value in ((("evaluate", "run"), figures), (("compare", "base", "run"), found)):
        command = (*command, "-d", "rows.jsonl")
        assert json.loads(labeltune(*command).out) == value
        summary = labeltune(*command, "-o", "report")
        assert summary.out == "" and summary.err.splitlines()[-1].startswith("report: report/")
        assert json.loads(labeltune(*command, "-o", "report", "--json").out) == value
        with monkeypatch.context() as on_terminal:
            on_terminal.setattr("labeltune.commands.evaluate.is_terminal", lambda: True)
            assert labeltune(*command).out == ""
            assert json.loads(labeltune(*command, "--json").out) == value


def test_names_that_are_not_utf8_reach_files_as_escapes(
    labeltune: Any,
    in_folder: Path,
    loaded: None,
) -> None:
    run_without_weights(in_folder / "run")
    name = os.fsdecode(b"\321\265\301\267.jsonl")
    write_jsonl(in_folder / "rows.jsonl", [{"text": ""}]).rename(in_folder / name)
    assert labeltune("predict", "run", name, "-o", "out.jsonl").code == 1
    (row,) = read_jsonl(in_folder / "out.jsonl")
    assert row["source"] == "\u0475\\xc1\\xb7.jsonl:1"
    write_json(in_folder / "metrics.json", {"data": name})
    assert json.loads((in_folder / "metrics.json").read_text("utf-8")) == {"data": name}
