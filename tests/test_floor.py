"""The linear model beside every figure: what it answers, what it was trained on, and what is said of a model that is not above it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.commands import ROOT, command, process
from helpers.rows import LABELS, classification_rows, ner_rows, write_jsonl
from helpers.training import config_for
from labeltune.commands.evaluate import evaluate
from labeltune.evaluation.floor import evenly, floor_figures, floor_of
from labeltune.evaluation.summary import floor_line, headline
from labeltune.messages import chinese
from labeltune.types import Entity, Example, Prediction


def classified(count: int, **fields: Any) -> list[Example]:
    return [
        Example(str(n), row["text"], fields.get("candidates", ()), row["output"])
        for n, row in enumerate(classification_rows(count))
    ]


def test_labels_among_the_candidates_of_a_row() -> None:
    train, asked = classified(60), classified(90)[60:]
    floor = floor_of(train, asked)
    assert floor is not None and (floor.kind, floor.rows) == ("linear", 60)
    assert headline(asked, floor.predictions)["accuracy"] == 1.0
    # The best of the candidates that a row has; of those that training never saw, the first.
    pair, unseen = (
        Example("a", "match", ("Space", "Art"), "Art"),
        Example("b", "match", ("New", "Other"), "New"),
    )
    floor = floor_of(train, [pair, unseen])
    assert floor is not None
    assert floor.predictions[0].label in ("Space", "Art") and floor.predictions[1].label == "New"


def test_two_labels_and_one() -> None:
    two = [each for each in classified(60) if each.label != "Art"]
    floor = floor_of(two[:30], two[30:])
    assert floor is not None and headline(two[30:], floor.predictions)["accuracy"] == 1.0
    one = [each for each in classified(30) if each.label == "Art"]
    floor = floor_of(one, classified(3))
    assert floor is not None and {p.label for p in floor.predictions} == {"Art"}
    assert floor_of([], one) is None and floor_of(one, []) is None


def several(count: int, always: tuple[str, ...] = ()) -> list[Example]:
    rows = classification_rows(count)
    texts = [f"{rows[n]['text']} {rows[n * 7 % count]['text'] if n % 2 else ''}" for n in range(count)]
    words = {"match": "Sports", "rocket": "Space", "paint": "Art"}
    found = [tuple(label for word, label in words.items() if word in text) for text in texts]
    return [
        Example(str(n), t, labels=(*labels, *always))
        for n, (t, labels) in enumerate(zip(texts, found, strict=True))
    ]


def test_several_labels() -> None:
    rows = several(120)
    floor = floor_of(rows[:90], rows[90:])
    assert floor is not None and headline(rows[90:], floor.predictions)["micro_f1"] > 0.95
    rows = several(60, ("all",))
    floor = floor_of(rows[:45], rows[45:])
    assert floor is not None and all("all" in (p.labels or ()) for p in floor.predictions)
    nothing = [Example(str(n), f"text {n}", labels=()) for n in range(4)]
    floor = floor_of(nothing, nothing)
    assert floor is not None and {p.labels for p in floor.predictions} == {()}
    single = [Example(str(n), f"{'a b'[n % 2 :]} {n}", labels=("x",) * (n % 2)) for n in range(40)]
    floor = floor_of(single[:30], single[30:])
    assert floor is not None and all(set(p.labels or ()) <= {"x"} for p in floor.predictions)


def test_entities() -> None:
    pytest.importorskip("pycrfsuite")
    names = ["Mara Olsen", "Tom", "Ada King", "Li Na", "Bo"]
    places = ["Oslo", "New York", "北京", "Rome"]

    def example(n: int) -> Example:
        name, place = names[n % 5], places[n % 4]
        text = f"😀 {name} went to {place} 在2011年."
        start = text.index(place)
        found = (Entity(name, "PER", 2, 2 + len(name)), Entity(place, "LOC", start, start + len(place)))
        inner = (Entity("York", "CITY", start + 4, start + 8),) if place == "New York" else ()
        return Example(str(n), text, entities=found + inner)

    train = [*map(example, range(20)), Example("e", "", entities=()), Example("n", "nobody", entities=())]
    asked = [
        Example("a", "😀 Mara Olsen went to 北京 在2012年.", entities=()),
        Example("b", " ", entities=()),
        Example("c", "😀 Bo went to New York 在2013年.", entities=()),
    ]
    floor = floor_of(train, asked)
    assert floor is not None and (floor.kind, floor.rows) == ("crf", 22)
    first, empty, last = floor.predictions
    assert [(e.text, e.label) for e in first.entities or ()] == [("Mara Olsen", "PER"), ("北京", "LOC")]
    assert empty.entities == ()
    for prediction, row in zip(floor.predictions, asked, strict=True):
        for each in prediction.entities or ():
            assert row.text[each.start : each.end] == each.text
    assert ("New York", "LOC") in [(e.text, e.label) for e in last.entities or ()], "the outer entity"


def test_thousands_of_labels_would_take_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Example(str(n), f"text {n}", label=f"label {n}") for n in range(1100)]
    assert floor_of(rows, rows[:3]) is None
    assert "no linear model beside it: with 1,100 labels it would take minutes" in capsys.readouterr().err


def test_a_long_file_is_learned_from_evenly() -> None:
    assert evenly(5, 10) == [0, 1, 2, 3, 4] and evenly(10, 3) == [0, 4, 9] and evenly(0, 3) == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [("right", "clearly better than"), ("wrong", "clearly worse than"), ("floor", "not clearly better than")],
)
def test_what_is_said_of_a_model(answers: str, said: str) -> None:
    asked = [Example(str(n), "match" if n % 2 else "nothing known", label=LABELS[n % 2]) for n in range(60)]
    floor = floor_of([Example("a", "x", label=LABELS[0]), Example("b", "y", label=LABELS[0])], asked)
    assert floor is not None
    other = {
        "right": [e.label for e in asked],
        "wrong": [None] * 60,
        "floor": [p.label for p in floor.predictions],
    }
    predictions = [Prediction(e.id, "", label) for e, label in zip(asked, other[answers], strict=True)]
    found = floor_figures(floor, asked, predictions, "classification")
    assert (found["kind"], found["rows"], found["figure"], found["first"]) == ("linear", 2, "accuracy", 0.5)
    line = floor_line({"floor": found})
    assert line is not None and line.startswith(
        f"{said} logistic regression on character n-grams on the same 2 training rows"
    )
    assert "逻辑回归" in chinese(f"floor: {line}") and "training" not in chinese(f"floor: {line}")
    assert floor_line({}) is None


def test_reports_have_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, model_folder)
    said: list[str] = []
    result = labeltune.train(config, say=said.append)
    assert [line for line in said if line.startswith("floor: ")]
    report = Path(config.output_dir) / "validation" / "metrics.json"
    floor = json.loads(report.read_text(encoding="utf-8"))["floor"]
    assert floor["first"] == 1.0 and floor["rows"] > 30
    # evaluate reads the same rows again, and no others that the file has by now.
    train = Path(str(config.data.train))
    more = [{**row, "text": f"later {row['text']}"} for row in classification_rows(30)]
    train.write_text(
        train.read_text(encoding="utf-8")
        + write_jsonl(tmp_path / "m.jsonl", more).read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    test = str(write_jsonl(tmp_path / "test.jsonl", classification_rows(90)[60:]))
    folder = tmp_path / "report"
    found = evaluate(result.best, test, output=folder, progress=False)
    assert found["floor"]["rows"] == floor["rows"] and found["baselines"]["linear"]["value"] == 1.0
    assert 'id="floor"' in (folder / "report.html").read_text(encoding="utf-8")
    compared = command(
        monkeypatch, capsys, "compare", "base", str(result.best), "--data", test, "-o", str(tmp_path / "c")
    )
    assert compared.code == 0 and "floor: " in compared.err, compared.err
    assert 'id="floor"' in (tmp_path / "c" / "comparison.html").read_text(encoding="utf-8")
    train.unlink()
    capsys.readouterr()
    assert "floor" not in evaluate(result.best, test, progress=False)
    assert f"no linear model beside it: {train} is not there; --train-data FILE" in capsys.readouterr().err
    again = write_jsonl(tmp_path / "again.jsonl", classification_rows(48))
    assert evaluate(result.best, test, train_data=str(again), progress=False)["floor"]["rows"] == 48


def test_entities_of_a_run_have_both(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycrfsuite")
    config = config_for(tmp_path, model_folder, "ner", max_steps=1)
    result = labeltune.train(config, say=lambda _: None)
    test = str(write_jsonl(tmp_path / "test.jsonl", ner_rows(12)))
    found = evaluate(result.best, test, progress=False)
    assert set(found["baselines"]) == {"dictionary", "crf"} and found["floor"]["kind"] == "crf"


def test_the_benchmark_refuses_test_rows_that_stand_in_the_training_file(tmp_path: Path) -> None:
    rows = classification_rows(120)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [*classification_rows(140)[120:], rows[7]])
    script = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--data", str(data), "--rows", "30"]
    script += ["--draws", "0", "1", "--out", str(tmp_path / "out")]
    refused = process(tmp_path, *script[1:], "--test", str(test))
    assert refused.returncode == 2 and "1 rows of the test file stand in --data" in refused.stderr
    done = process(tmp_path, *script[1:], "--part", "test")
    assert done.returncode == 0, done.stderr
    (floor,) = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert (floor["arm"], floor["draws"], floor["value"]) == ("linear", 2, 1.0)
