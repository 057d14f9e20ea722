"""Arrow data sets of examples, faulty rows, and a split that is fair to every label."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers import forks
from helpers.rows import classification_rows, ner_rows, write_jsonl
from labeltune import check_data
from labeltune.config import ColumnsConfig, DataConfig, RunConfig, TaskName, build_config
from labeltune.data.loading import Splits, evenly, load_rows, load_splits, stratified_split
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records
from labeltune.errors import DataError
from labeltune.types import Entity, Example


def data(train: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": str(train), "validation_fraction": 0.25, **more})


def split(train: Path, seed: int = 0, **more: Any) -> Splits:
    return load_splits("classification", data(train, **more), None, seed)


def labelled(text: str, label: str) -> dict[str, Any]:
    return {"text": text, "output": label}


def test_examples_come_back_as_they_went_in(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "x7", "text": " 空白 \n留着 ", "category": ["A", "B"], "output": "A"},
        {"id": 12, "text": "\u2028 emoji 🚀 \0", "category": ["B", "A"], "output": "B"},
        {"text": "no id", "category": "A,C", "output": "C"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded = load_rows(str(path), "classification")
    expected = [
        Example("x7", " 空白 \n留着 ", ("A", "B"), "A", None, f"{path}:1"),
        Example("12", "\u2028 emoji 🚀 \0", ("B", "A"), "B", None, f"{path}:2"),
        Example("2", "no id", ("A", "C"), "C", None, f"{path}:3"),
    ]
    assert [loaded.example(n) for n in range(3)] == expected == list(iter_rows(path))
    assert loaded.where(2) == f"{path}:3"
    assert [Example.from_row(example.to_row()) for example in expected] == expected


def iter_rows(path: Path) -> list[Example]:
    parsed = [
        parse_record(record, number, "classification", ColumnsConfig())
        for number, record in enumerate(iter_records(path))
    ]
    return [example for example, _ in parsed if example is not None]


def test_entities_come_back_too(tmp_path: Path) -> None:
    loaded = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", ner_rows(3))), "ner")
    assert loaded.example(0).entities == (Entity("南京", "GPE", 2, 4),)
    assert loaded.example(2).entities == () and loaded.example(2).label is None


def test_rows_stay_what_they_were_when_the_file_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", classification_rows(40))
    first = load_rows(str(path), "classification", max_rows=4)
    before = [first.example(n) for n in range(4)]
    write_jsonl(path, [labelled(f"changed {n} " * 50, "X") for n in range(900)])
    second = load_rows(str(path), "classification")
    assert [first.example(n) for n in range(4)] == before
    assert (len(first.dataset), len(second.dataset)) == (4, 900)


def test_no_usable_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    loaded = load_rows(str(path), "classification")
    assert len(loaded.dataset) == 0 and loaded.audit.errors == 1
    with pytest.raises(
        DataError, match=r"no column 'label'; the file has 'text'; .*data\.columns\.output=COLUMN"
    ):
        split(path, on_error="skip")


def test_faulty_rows_stop_the_run_or_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = classification_rows(40)
    for number in range(12):
        rows[number] = {"text": "", "output": "Art"} if number else {"output": "Art"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as raised:
        split(path)
    message = str(raised.value)
    assert "12 errors" in message and "... and 2 more" in message and f"{path}:1: error" in message
    assert "data.on_error=skip" in message and "labeltune data check" in message
    found = split(path, on_error="skip")
    assert found.skipped == {"missing_field": 1, "empty_field": 11}
    assert found.validation is not None and len(found.train) + len(found.validation) == 28


def test_warnings_stop_nothing_and_duplicates_stay_in_training(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", classification_rows(12) * 2)
    found = split(path, validation_fraction=0)
    assert len(found.train) == 24 and found.validation is None and found.skipped == {}


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_the_split_is_fair_to_every_label(tmp_path: Path, fraction: float) -> None:
    sizes = {"wide": 200, "middle": 60, "small": 11, "pair": 2, "single": 1} | {
        f"tiny{n}": 3 for n in range(20)
    }
    rows = [labelled(f"{label} {number}", label) for label, size in sizes.items() for number in range(size)]
    rows += [labelled(f"wide {number}", "wide") for number in range(100)]
    loaded = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", rows)), "classification")
    held = stratified_split(loaded, fraction, seed=3)
    assert held.tolist() == sorted(set(held.tolist()))
    texts = Counter(label for _, label in {(rows[n]["text"], rows[n]["output"]) for n in held})
    for label, size in sizes.items():
        assert abs(texts[label] - fraction * size) <= 1.5 and texts[label] < size
    rest = set(range(len(rows))) - set(held.tolist())
    assert not {rows[n]["text"] for n in held} & {rows[n]["text"] for n in rest}
    if fraction <= 0.5:
        total = sum(size for size in sizes.values() if size > 1)
        assert abs(sum(texts.values()) - fraction * total) <= 1


def test_the_split_follows_the_seed_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", classification_rows(60))

    def held(seed: int) -> list[str]:
        found = split(path, seed)
        assert found.validation is not None
        assert not set(found.train["text"]) & set(found.validation["text"])
        return list(found.validation["text"])

    assert held(1) == held(1) and len(held(1)) == 15
    assert held(1) != held(2)


def test_ner_rows_are_split_by_their_entity_types(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ner_rows(60))
    found = load_splits("ner", data(path, labels=["地理实体", "人名"]), None, 0)
    assert found.validation is not None and found.labels == ("地理实体", "人名")
    empty = sum(not entities for entities in found.validation["entities"])
    assert (empty, len(found.validation)) == (5, 15)


def test_a_validation_file_of_its_own(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(12))
    other = write_jsonl(
        tmp_path / "other.jsonl", [*classification_rows(2), {**classification_rows(1)[0], "text": "new"}]
    )
    with pytest.raises(DataError) as raised:
        split(train, validation=str(other))
    assert "2 errors" in str(raised.value) and "shared_with_train" in str(raised.value)
    write_jsonl(other, [{**row, "text": f"new {row['text']}"} for row in classification_rows(6)])
    found = split(train, validation=str(other))
    assert found.validation is not None and (len(found.train), len(found.validation)) == (12, 6)


def test_shared_rows_are_left_out_of_validation(tmp_path: Path) -> None:
    rows = classification_rows(12)
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    other = write_jsonl(tmp_path / "other.jsonl", [*rows[:2], {**rows[0], "text": "new"}])
    found = split(train, validation=str(other), on_error="skip")
    assert found.validation is not None and list(found.validation["text"]) == ["new"]
    assert len(found.train) == 12 and found.skipped == {"shared_with_train": 2}
    found = split(train, validation=str(train), on_error="skip")
    assert found.validation is None and found.skipped == {"shared_with_train": 12}


@pytest.mark.parametrize("side", ["validation", "test"])
@pytest.mark.parametrize(
    ("name", "raw", "part"),
    [
        ("a.csv", b"text;output\na;b\n", "separated by ';'"),
        ("a.jsonl", b"", "the file holds no rows"),
        ("a.csv", b"words,label\na,b\n", "no column 'text'"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_skipped(
    tmp_path: Path, side: str, name: str, raw: bytes, part: str
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(12))
    other = tmp_path / name
    other.write_bytes(raw)
    with pytest.raises(DataError) as raised:
        split(train, on_error="skip", **{side: str(other)})
    first, fault = str(raised.value).split("\n")
    assert first == "the data holds 1 error:" and fault.startswith(f"  {other}:") and part in fault
    with pytest.raises(DataError) as stopped:
        split(train, **{side: str(other)})
    assert str(stopped.value) == str(raised.value), "no row of it can be left out, so skipping is no advice"


def test_validation_rows_that_are_all_faulty_are_not_no_validation(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(12))
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "", "output": "Art"}])
    with pytest.raises(DataError, match=rf"^{other} holds no usable row; see: labeltune data check"):
        split(train, on_error="skip", validation=str(other))


def test_the_label_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [labelled(f"t{n}", label) for n, label in enumerate("BAC" * 4)])
    assert split(path).labels == ("A", "B", "C")
    assert split(path, labels=["C", "B", "A"]).labels == ("C", "B", "A")
    with pytest.raises(DataError, match="unknown_label"):
        split(path, labels=["A", "B"])
    rows = [{**labelled(text, label), "category": [label, "Z"]} for text, label in ("tA", "uB", "vA")]
    path = write_jsonl(tmp_path / "b.jsonl", rows)
    assert split(path).labels == ("A", "B", "Z")


def check_config(folder: Path, task: TaskName = "classification", **data: Any) -> RunConfig:
    return build_config({"task": task, "output_dir": str(folder / "out"), "data": data})


@pytest.mark.parametrize("side", ["validation", "test"])
def test_a_label_that_training_does_not_have_is_found_where_the_files_meet(tmp_path: Path, side: str) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [labelled(f"t{n}", "AB"[n % 2] + "rt") for n in range(8)])
    rows = [labelled("u1", "Art"), labelled("u2", " ａrt"), labelled("u3", "Zoo")]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    config = check_config(tmp_path, train=str(train), **{side: str(other)})
    # The same faults with `data check`, which raises none of them.
    _, checked = check_data(config, str(train), config.data.test)
    errors = [fault for fault in checked.audit.faults if fault.severity == "error"]
    assert [(f.kind, f.where, f.message) for f in errors] == [
        (
            "unknown_label",
            f"{other}:2",
            "'ａrt' is not among the labels of the training rows; did you mean 'Art'?",
        ),
        ("unknown_label", f"{other}:3", "'Zoo' is not among the labels of the training rows (Art, Brt)"),
    ]
    with pytest.raises(DataError, match=rf"2 errors:\n  {other}:2: error: unknown_label: 'ａrt'"):
        split(train, **{side: str(other)})
    found = split(train, on_error="skip", **{side: str(other)})
    assert found.labels == ("Art", "Brt")
    if side == "validation":
        assert found.validation is not None and found.validation["text"][:] == ["u1"]
        assert (found.skipped_rows, found.skipped) == (2, {"unknown_label": 2})
    assert split(train, labels=["Art", "Brt", "ａrt", "Zoo"], **{side: str(other)}).labels[2:] == (
        "ａrt",
        "Zoo",
    )


def test_a_row_with_candidates_of_its_own_may_have_any_of_them(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(6))
    rows = [{"text": "new", "category": ["Zoo", "Sea"], "output": "Zoo"}]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    found = split(train, validation=str(other))
    assert found.validation is not None and len(found.validation) == 1


def test_an_entity_type_that_training_does_not_have(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", ner_rows(6))
    rows = [{**row, "text": row["text"] + " neu"} for row in ner_rows(3)]
    rows[1]["entities"] = [{**rows[1]["entities"][0], "entity_label": "GPE "}]
    rows[0]["entities"] = [{**rows[0]["entities"][0], "entity_label": "ORG"}]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    with pytest.raises(DataError, match=rf"{other}:1: error: unknown_label: 'ORG' is not among the labels"):
        load_splits("ner", data(train, validation=str(other)), None, 0)


@pytest.mark.parametrize(
    ("task", "other", "columns"),
    [("classification", "ner", ("entities", "output")), ("ner", "classification", ("output", "entities"))],
)
def test_a_file_for_the_other_task_is_one_fault(
    tmp_path: Path, task: TaskName, other: str, columns: tuple[str, str]
) -> None:
    rows = {"classification": classification_rows(30), "ner": ner_rows(30)}
    path = write_jsonl(tmp_path / "rows.jsonl", rows[other])
    audit = load_rows(str(path), task).audit
    assert [(f.kind, f.where, f.message) for f in audit.faults] == [
        (
            "wrong_task",
            f"{path}:1",
            f"these are rows for task={other} (column {columns[0]!r}); task={task} reads a column {columns[1]!r}",
        )
    ]
    assert (audit.errors, audit.rows) == (1, 0)  # one for the file, not one a row


def test_rows_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [labelled(f"t{n}", "Art") for n in range(8)])
    with pytest.raises(
        DataError, match="the training rows hold 1 label, 'Art': there is nothing to tell apart"
    ):
        split(one, labels=["Art", "Zoo"])
    (found,) = check_data(check_config(tmp_path, train=str(one)), str(one))
    assert [fault.kind for fault in found.audit.faults] == ["one_label"]
    # A file that nobody trains on may hold rows of one label.
    assert check_data(check_config(tmp_path, train="other.jsonl"), str(one))[0].audit.errors == 0
    none = write_jsonl(tmp_path / "none.jsonl", [{"text": f"t{n}", "entities": []} for n in range(8)])
    with pytest.raises(DataError, match="the training rows hold no entity"):
        load_splits("ner", data(none, labels=["人名"]), None, 0)


def test_a_killed_process_leaves_no_copy_of_its_rows(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(6))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    loads = (
        f"from labeltune.data.loading import load_rows; rows = load_rows({str(train)!r}, 'classification')"
    )
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(scratch)}
    run = lambda code: forks.run(["-c", code], env=environment).returncode  # noqa: E731
    assert run(f"{loads}; assert len(rows.dataset) == 6; {kill}") == -signal.SIGKILL
    (left,) = scratch.iterdir()
    assert [path.name for path in left.iterdir()] == ["owner"]
    # A process that dies while it writes: the next one takes it away, but not what belongs to a living one.
    assert run(f"from labeltune.io.lock import *; (scratch_folder() / 'x').touch(); {kill}") < 0
    assert not left.exists() and len(list(scratch.iterdir())) == 1
    other = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {loads!r}], check=True)"
    alive = "f = scratch_folder(); (f / 'x').touch()"
    checked = "assert (f / 'x').exists(); assert len(list(f.parent.iterdir())) == 1"
    assert run(f"from labeltune.io.lock import *; {alive}; {other}; {checked}") == 0
    assert list(scratch.iterdir()) == []


def test_max_rows_counts_the_rows_of_train_only(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", classification_rows(12))
    rows = [{**row, "text": "new " + row["text"]} for row in classification_rows(9)]
    other = write_jsonl(tmp_path / "other.jsonl", rows)
    found = split(train, validation=str(other), max_rows=5)
    assert found.validation is not None
    assert list(found.train["id"]) == ["0", "1", "2", "3", "4"] and len(found.validation) == 9
    # `data check` sees the rows and labels that training sees.
    kept, held = check_data(
        check_config(tmp_path, train=str(train), validation=str(other), max_rows=5), str(train)
    )
    assert (kept.audit.rows, held.audit.rows) == (5, 9)


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"nr": f"n{i}", "content": f"t{i}", "options": "A,B", "label": "AB"[i % 2]} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"id": "nr", "text": "content", "category": "options", "output": "label"}
    loaded = load_rows(str(path), "classification", data(path, columns=columns))
    assert loaded.example(1) == Example("n1", "t1", ("A", "B"), "B", None, f"{path}:2")
    with pytest.raises(
        DataError, match=r"no column 'body'; the file has 'content', .* data\.columns\.text=COLUMN"
    ):
        split(path, columns={"text": "body"})


def test_spread_rows_are_as_many_as_there_are_at_most() -> None:
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert (evenly(3, 5), evenly(0, 3), evenly(5, 0)) == ([0, 1, 2], [], [])
