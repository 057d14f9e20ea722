"""Files of any size: every row once and in its place, whatever is wrong with it and whenever the run is killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import labeltune
from helpers import forks
from helpers.rows import LABELS, classification_rows, read_jsonl, write_jsonl
from helpers.runs import predictor_for
from helpers.training import config_for
from labeltune.data.sources import iter_records
from labeltune.errors import DataError, Interrupted, OutputError
from labeltune.inference import files
from labeltune.inference.files import PredictOptions, count_rows, predict_file
from labeltune.inference.load import load_predictor
from labeltune.inference.predictor import Predictor
from labeltune.io.outputs import file_hash


def test_rows_come_out_in_order_with_faults_in_their_places(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_ROWS", 4)
    rows: list[Any] = [{"text": f"row {i}"} for i in range(11)]
    rows[2] = {"id": "mine", "text": ""}
    rows[5] = {"id": 77, "text": "x", "category": ["same", "same "]}
    rows[9] = {"text": "x", "category": ["long " * 600]}
    path = write_jsonl(in_folder / "rows.jsonl", rows)
    with path.open("a", encoding="utf-8") as file:
        file.write('no json\n{"id": "\\ud800", "text": "x"}\n')
    predictor = predictor_for()
    bad = predict_file(predictor, path, in_folder / "out.jsonl", PredictOptions(top_k=1))
    found = read_jsonl(in_folder / "out.jsonl")
    assert [row["id"] for row in found] == ["0", "1", "mine", "3", "4", "77", *map(str, range(6, 12)), "?"]
    assert [i for i, row in enumerate(found) if "error" in row] == [2, 5, 9, 11, 12] and bad == 5
    assert found[9]["source"].endswith("rows.jsonl:10") and "prompt.max_length" in found[9]["error"]
    assert all(len(row["ranking"]) == 1 for row in found if "error" not in row)
    assert [p.name for p in in_folder.iterdir() if p.name.startswith(".out")] == []


def test_killed_at_twenty_random_points_the_output_is_that_of_an_uninterrupted_run(
    in_folder: Path, model_folder: Path
) -> None:
    run = labeltune.train(config_for(in_folder, model_folder, max_steps=1)).best
    path = write_jsonl(in_folder / "rows.jsonl", [{"text": f"row {i} " * (1 + i % 7)} for i in range(300)])
    script = Path(__file__).parent / "helpers" / "kill_predict.py"
    done = forks.run([script, run, path, "out.jsonl", "20"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 20
    assert (in_folder / "out.jsonl").read_bytes() == (in_folder / "out.whole").read_bytes()
    assert len(read_jsonl(in_folder / "out.jsonl")) == 300


def test_resume_refuses_what_belongs_to_something_else(in_folder: Path) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", classification_rows(4))
    predictor, output = predictor_for(), in_folder / "out.jsonl"
    with pytest.raises(OutputError, match="nothing to resume"):
        predict_file(predictor, path, output, resume=True)
    for change in ("input", "run", "top_k"):
        (in_folder / ".out.jsonl.part.json").unlink(missing_ok=True)
        predict_file(predictor, path, output)
        note = {
            "input": file_hash(path),
            "run": predictor.fingerprint(),
            "labels": [],
            "min_confidence": None,
            "top_k": None,
        }
        (in_folder / ".out.jsonl.part.json").write_text(json.dumps({**note, change: "other"}))
        with pytest.raises(OutputError, match=f"another {change}"):
            predict_file(predictor, path, output, resume=True)


def test_rows_are_counted_where_that_is_quick(in_folder: Path) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", classification_rows(7))
    import pandas

    pandas.read_json(path, lines=True).to_parquet(in_folder / "rows.parquet")
    assert count_rows(path) == count_rows(in_folder / "rows.parquet") == 7
    with path.open("a", encoding="utf-8") as file:
        file.write("\u3000\n \n")  # blank lines, as they are to who reads the rows
    assert count_rows(path) == len(list(iter_records(path))) == 7
    (in_folder / "rows.csv").write_text("text\na\n", encoding="utf-8")
    assert count_rows(in_folder / "rows.csv") is None


def test_the_command(in_folder: Path, model_folder: Path) -> None:
    run = labeltune.train(config_for(in_folder, model_folder, max_steps=1)).best
    path = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    command = ["-m", "labeltune", "predict", run, path]
    options = ["-o", "out.jsonl", "--top-k", "2", "--min-confidence", "1.0"]
    done = forks.run([*command, *options])
    assert done.returncode == 1 and "1 row could not be predicted" in done.stderr
    assert "Traceback" not in done.stderr
    found = read_jsonl(in_folder / "out.jsonl")
    assert [row.get("label", "bad") for row in found] == [None, "bad", None]
    assert len(found[0]["ranking"]) == 2
    printed = forks.run(command)
    assert printed.returncode == 1 and len(printed.stdout.splitlines()) == 3
    for options, message in (
        (["--resume"], "--resume needs"),
        (["--resume", "-o", "new.jsonl"], "nothing to resume"),
        (["--decoding", "fast"], "generation.decoding: Input should be"),
    ):
        refused = forks.run([*command, *options])
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr


def test_a_loaded_run_is_named_by_its_weights(in_folder: Path, model_folder: Path) -> None:
    config = config_for(in_folder, model_folder, max_steps=2, save_steps=1)
    last = labeltune.train(config).last
    with load_predictor(last) as one, load_predictor(last.parent / "checkpoint-1") as other:
        assert one.fingerprint() != other.fingerprint()
        before = one.fingerprint()
        one.change(long_text="window")
        assert one.fingerprint() != before


def test_two_predicts_onto_one_file_are_told_apart(in_folder: Path) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    predictor, seen = predictor_for(), []
    stream_of = predictor.stream

    other = in_folder / "tmp"
    other.mkdir()
    predicts = (
        "from pathlib import Path; from labeltune.inference.files import alone_with_output\n"
        f"with alone_with_output(Path({str(in_folder / 'out.jsonl')!r}), 'it'): pass"
    )

    def meanwhile(rows: Any) -> Any:
        predictor.stream = stream_of  # type: ignore[method-assign]
        with pytest.raises(OutputError, match="another predict writes") as raised:
            predict_file(predictor, path, in_folder / "out.jsonl")
        # Also from a process whose temporary folder is another.
        environment = {**os.environ, "TMPDIR": str(other)}
        done = forks.run(["-c", predicts], env=environment)
        assert f"OutputError: another predict writes it (process {os.getpid()})" in done.stderr
        seen.append(str(raised.value))
        predict_file(predictor, path, in_folder / "other.jsonl")
        return stream_of(rows)

    predictor.stream = meanwhile  # type: ignore[method-assign]
    predict_file(predictor, path, in_folder / "out.jsonl")
    assert sorted(p.name for p in in_folder.glob(".*")) == [], "the lock is taken away"
    assert seen and (in_folder / "out.jsonl").read_text() == (in_folder / "other.jsonl").read_text()


def test_damage_behind_a_whole_chunk_is_written_anew(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash of the machine a file may end in zeros, and its note may be empty."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 4)
    path = write_jsonl(in_folder / "rows.jsonl", classification_rows(11))
    predictor, output = predictor_for(), in_folder / "out.jsonl"
    predict_file(predictor, path, output)
    whole = output.read_bytes()
    part, note = in_folder / ".out.jsonl.part", in_folder / ".out.jsonl.part.json"

    asked: list[int] = []

    def counted(rows: Any, most: int) -> Any:
        """The predictor's, which ends when it is asked for more chunks."""
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return Predictor.stream(predictor, rows)

    for damage in (b"\0" * 200 + b"\n", b"[]\n", b'{"id": "\xff"}\n'):
        output.unlink()
        asked.clear()
        monkeypatch.setattr(predictor, "stream", lambda rows: counted(rows, 1))
        with pytest.raises(Interrupted, match="stopped; 4 rows of the output are kept, go on with --resume"):
            predict_file(predictor, path, output)
        with part.open("ab") as file:
            file.write(damage)
        asked.clear()
        monkeypatch.setattr(predictor, "stream", lambda rows: counted(rows, 3))
        predict_file(predictor, path, output, resume=True)
        assert output.read_bytes() == whole and asked == [4, 3], "the first chunk is kept"
    note.write_text("")
    with pytest.raises(OutputError, match=r"part\.json cannot be read.*start without --resume"):
        predict_file(predictor, path, output, resume=True)


def test_notes_that_killed_processes_left_half_written_are_removed(in_folder: Path) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}])
    mine, other = in_folder / "..out.jsonl.part.json-x.tmp", in_folder / "..else.jsonl.part.json-x.tmp"
    mine.write_text("half")
    other.write_text("half")
    predict_file(predictor_for(), path, in_folder / "out.jsonl")
    assert not mine.exists() and other.exists()


def test_a_file_of_which_nothing_can_be_read_is_one_error(in_folder: Path) -> None:
    predictor = predictor_for()
    for name, content, part in (
        ("rows.csv", "text;n\na;b\n", r"rows\.csv:1: its columns seem to be separated by ';'"),
        (
            "rows.jsonl",
            '{"body": "a"}\n{"body": "b"}\n',
            r"rows\.jsonl: no column 'text'; the file has 'body'; .*; say which one holds it: rename that column to 'text'$",
        ),
    ):
        (in_folder / name).write_text(content)
        with pytest.raises(DataError, match=part):
            predict_file(predictor, in_folder / name, in_folder / "out.jsonl")
    assert [p.name for p in in_folder.iterdir() if "out" in p.name] == []


def test_rows_are_predicted_whatever_their_answers_are(in_folder: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "output": [0, 1], "entities": [3.5, None]}),
        in_folder / "rows.parquet",
    )
    write_jsonl(
        in_folder / "rows.jsonl",
        [
            {"text": "a", "output": 0},
            {"text": "b", "output": ["Sports"], "entities": "none"},
            {"text": "a", "category": LABELS, "output": "Football"},
            {"sentence": "never mind", "text": "b", "output": None},
        ],
    )
    (in_folder / "rows.csv").write_text("文本,output\na,\nb,Football\n", encoding="utf-8")
    for task in ("classification", "ner"):
        predictor = predictor_for(task, max_new_tokens=4)
        for name, count in (("rows.parquet", 2), ("rows.jsonl", 4), ("rows.csv", 2)):
            assert predict_file(predictor, in_folder / name, in_folder / "out.jsonl") == 0
            found = read_jsonl(in_folder / "out.jsonl")
            assert len(found) == count and not any("error" in row for row in found)


def test_rows_are_counted_by_what_the_file_is(in_folder: Path) -> None:
    (in_folder / "array.jsonl").write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    (in_folder / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert count_rows(in_folder / "array.jsonl") is None and count_rows(in_folder / "lines.json") == 2


def test_an_output_is_not_resumed_in_another_encoding(in_folder: Path) -> None:
    (in_folder / "rows.csv").write_bytes("text\n今天\n".encode("gb18030"))
    predictor, output = predictor_for(), in_folder / "out.jsonl"
    note = {
        "input": file_hash(in_folder / "rows.csv"),
        "run": predictor.fingerprint(),
        "labels": [],
        "min_confidence": None,
        "top_k": None,
        "with_text": True,
    }
    for was, now, agree in (
        (None, "utf-8", True),
        (None, "gb18030", False),
        ("gb18030", "GB18030", True),
        ("gb18030", "utf-8", False),
    ):
        given = {**note, "encoding": was} if was is not None else note
        (in_folder / ".out.jsonl.part.json").write_text(json.dumps(given))
        options = PredictOptions(with_text=True, encoding=now)
        if agree:
            predict_file(predictor, in_folder / "rows.csv", output, options, resume=True)
        else:
            with pytest.raises(OutputError, match="made with another encoding;"):
                predict_file(predictor, in_folder / "rows.csv", output, options, resume=True)
    assert read_jsonl(output)[0]["text"] == "今天"
    predictor.encoding = "gb18030"
    predict_file(predictor, in_folder / "rows.csv", in_folder / "own.jsonl", PredictOptions(with_text=True))
    assert (in_folder / "own.jsonl").read_bytes() == output.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows removes no file that is open")
def test_a_lock_on_a_file_that_lost_its_name_counts_for_nothing(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tidy owner may remove it between another's opening and locking; filelock has to look (3.21 does first)."""
    import fcntl

    from labeltune.io.lock import alone_with

    lock, flock = in_folder / ".out.lock", fcntl.flock

    def removed_before(file: Any, how: int) -> None:
        lock.unlink(missing_ok=True)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with pytest.raises(OutputError, match="taken"), alone_with(lock, "taken", "wait", tidy=True):
        pass
