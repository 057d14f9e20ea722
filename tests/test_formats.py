"""Rows of other tools are read as ours, written for them, and read back the same."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.rows import write_jsonl
from labeltune.config import DataConfig, TaskName
from labeltune.config_values import FormatName
from labeltune.data import check
from labeltune.data.columns import columns_of_file, first_values, reading_of
from labeltune.data.formats import READERS
from labeltune.data.formats.base import joined, listed_in
from labeltune.data.formats.tags import spans_of_tags
from labeltune.data.formats.write import WRITERS, predicted_prodigy, prediction_of
from labeltune.data.offsets import units
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records
from labeltune.errors import DataError
from labeltune.io import progress
from labeltune.types import Entity, Example


@pytest.fixture(autouse=True)
def _notes_are_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_noted", set())


def rows(path: Path, task: TaskName | None = None, **data: Any) -> list[dict[str, Any]]:
    """The rows of a file; a fault is {"where", "kind", "problem"}."""
    config = DataConfig(**data)
    found = iter_records(path, config.encoding, reading_of(config, task))
    return [
        record.values
        if record.values is not None
        else {"where": record.where.removeprefix(f"{path}:"), "kind": record.kind, "problem": record.problem}
        for record in found
    ]


def spans(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What entities name, where they stand."""
    for each in row["entities"]:
        assert row["text"][each["start_idx"] : each["end_idx"]] == each["entity_text"], each
    return [(each["entity_text"], each["entity_label"]) for each in row["entities"]]


def array(path: Path, values: Iterable[Any]) -> Path:
    path.write_text(json.dumps(list(values), ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def test_every_reader_has_its_name_in_the_config() -> None:
    assert {*READERS, "auto", "rows"} == set(get_args(FormatName))


# Label Studio


def region(start: int, end: int, label: str, **more: Any) -> dict[str, Any]:
    value = {"start": start, "end": end, "labels": [label], **more}
    return {"id": "r", "from_name": "ner", "to_name": "text", "type": "labels", "value": value}


def choice(*labels: str, control: str = "topic") -> dict[str, Any]:
    return {
        "id": "c",
        "from_name": control,
        "to_name": "text",
        "type": "choices",
        "value": {"choices": list(labels)},
    }


def task(text: str, *results: list[dict[str, Any]], number: int = 1, **annotation: Any) -> dict[str, Any]:
    return {
        "id": number,
        "data": {"text": text},
        "annotations": [
            {
                "id": 10 * number + at,
                "was_cancelled": False,
                "created_at": f"2026-01-0{at + 1}",
                "result": found,
                **annotation,
            }
            for at, found in enumerate(results)
        ],
    }


def test_label_studio_offsets_are_characters_or_utf16_units(tmp_path: Path) -> None:
    text = "😀 Mara 👩‍👩‍👧 left Oslo"
    at, far, here = units(text, text.index("Mara")), units(text, text.index("Oslo")), text.index("Oslo")
    assert at == 3 and far > here
    # The text of a region tells for it, and for the others of its annotation or its file.
    wide = task(text, [region(at, at + 4, "PER", text="Mara"), region(far, far + 4, "LOC")])
    narrow = task(text, [region(here, here + 4, "LOC", text="Oslo"), region(2, 6, "PER")], number=2)
    found = rows(array(tmp_path / "both.json", [wide, narrow]), "ner")
    assert [spans(row) for row in found] == [
        [("Mara", "PER"), ("Oslo", "LOC")],
        [("Oslo", "LOC"), ("Mara", "PER")],
    ]
    assert found[0]["id"] == 1
    cut = task(text, [region(1, 5, "PER")], number=3)
    fault = rows(array(tmp_path / "wide.json", [wide, cut]), "ner")[1]
    assert fault["kind"] == "span_mismatch" and "inside a character" in fault["problem"]
    # Where nothing tells, a place that is no part of a word.
    for start in (far, here):
        (row,) = rows(array(tmp_path / "silent.json", [task(text, [region(start, start + 4, "LOC")])]), "ner")
        assert spans(row) == [("Oslo", "LOC")]
    # Line breaks inside a region's text are a backslash and an n.
    lines = task("Ada\nKing left", [region(0, 8, "PER", text="Ada\\nKing")])
    assert spans(rows(array(tmp_path / "lines.json", [lines]), "ner")[0]) == [("Ada\nKing", "PER")]


def test_label_studio_annotations_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [
        task("both agree", [choice("a")], [choice("a")]),
        task("they differ", [choice("a")], [choice("b")], number=2),
        task("cancelled", [choice("a")], number=3, was_cancelled=True),
        {"id": 4, "data": {"text": "nobody looked"}, "annotations": []},
        task("only a rectangle", [{"type": "rectanglelabels", "value": {"x": 1}}], number=5),
    ]
    path = array(tmp_path / "export.json", tasks)
    assert [row["output"] for row in rows(path, "classification")] == ["a", "b"]
    said = capsys.readouterr().err
    assert "read as Label Studio JSON" in said
    for part in (
        "cancelled or skipped annotations (1)",
        "tasks without an annotation (2)",
        "regions of type rectanglelabels (1)",
        "tasks whose annotation holds no label (1)",
    ):
        assert part in said
    assert [row["output"] for row in rows(path, "classification", annotations="first")] == ["a", "a"]
    assert [row["output"] for row in rows(path, "classification", annotations="agreed")] == ["a"]
    assert "tasks whose annotations disagree" in capsys.readouterr().err
    to_predict = reading_of(DataConfig(), "classification", answers=False)
    assert len(list(iter_records(path, "utf-8", to_predict))) == 5


def test_label_studio_controls(tmp_path: Path) -> None:
    taxonomy = {"type": "taxonomy", "from_name": "tax", "value": {"taxonomy": [["News", "Sport"], ["News"]]}}
    two = [choice("good", control="mood"), choice("sport", "art", control="topic"), region(0, 3, "PER")]
    path = array(tmp_path / "t.json", [task("Ada plays", two), task("x", [taxonomy], number=2)])
    found = rows(path, "multilabel")
    assert found[0]["kind"] == "wrong_type" and "data.columns.labels=NAME" in found[0]["problem"]
    assert found[0]["where"] == "2" and "'tax'" in found[1]["problem"], "controls of one file are not mixed"
    alone = array(tmp_path / "tax.json", [task("x", [taxonomy])])
    assert rows(alone, "multilabel")[0]["labels"] == ["News/Sport", "News"]
    named = {"columns": {"labels": "topic"}}
    other_control = rows(path, "classification", columns={"output": "category"})
    assert other_control == [], "a control that is not there is not replaced by another one"
    assert rows(path, "multilabel", **named)[0]["labels"] == ["sport", "art"]
    assert spans(rows(path)[0]) == [("Ada", "PER")]
    other = array(
        tmp_path / "fields.json",
        [{"data": {"title": "t", "body": "b"}, "annotations": [{"result": [choice("a")]}]}],
    )
    assert "set data.columns.text=FIELD" in rows(other, "classification")[0]["problem"]
    assert rows(other, "classification", columns={"text": "body"}) == [{"text": "b", "output": "a"}]
    html = {
        "start": "/p[1]/text()[1]",
        "end": "/p[1]/text()[1]",
        "globalOffsets": {"start": 0, "end": 3},
        "hypertextlabels": ["PER"],
        "text": "Ada",
    }
    hyper = {"type": "hypertextlabels", "from_name": "ner", "value": html}
    path = array(tmp_path / "html.json", [task("Ada plays", [hyper]), task("<p>Ada</p>", [hyper], number=2)])
    plain, tagged = rows(path, "ner")
    assert spans(plain) == spans(tagged) == [("Ada", "PER")] and tagged["text"] == "Ada"


def test_label_studio_json_min(tmp_path: Path) -> None:
    own = {"annotator": 1, "annotation_id": 1, "created_at": "2026-01-01", "lead_time": 1.0}
    ner = [
        {
            "id": 1,
            "text": "😀 Ada",
            "label": [{"start": 3, "end": 6, "text": "Ada", "labels": ["PER"]}],
            **own,
        },
        {"id": 2, "text": "nobody", **own},
    ]
    first, second = rows(array(tmp_path / "n.json", ner), "ner")
    assert spans(first) == [("Ada", "PER")] and second["entities"] == []
    topics = [
        {"id": 1, "text": "a", "topic": "x", **own, "updated_at": "2026-01-01"},
        {"id": 1, "text": "a", "topic": "y", **own, "updated_at": "2026-01-02"},
        {"id": 2, "text": "b", "topic": {"choices": ["x", "y"]}, **own},
    ]
    path = array(tmp_path / "c.json", topics)
    assert [row.get("output", row.get("kind")) for row in rows(path, "classification")] == ["y", "wrong_type"]
    assert [row["labels"] for row in rows(path, "multilabel", annotations="first")] == [["x"], ["x", "y"]]


def test_label_studio_csv(tmp_path: Path) -> None:
    spans_cell = json.dumps([{"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]}]).replace('"', '""')
    (tmp_path / "n.csv").write_text(
        f'text,id,label,annotator,annotation_id,created_at,updated_at,lead_time\nAda left,1,"{spans_cell}",1,1,2026,2026,1.0\n',
        encoding="utf-8",
    )
    assert spans(rows(tmp_path / "n.csv", "ner")[0]) == [("Ada", "PER")]
    choices = json.dumps({"choices": ["x", "y"]}).replace('"', '""')
    (tmp_path / "c.csv").write_text(
        f'text,id,topic,annotator,annotation_id\na,1,x,1,1\nb,2,"{choices}",1,2\n', encoding="utf-8"
    )
    assert [row["labels"] for row in rows(tmp_path / "c.csv", "multilabel")] == [["x"], ["x", "y"]]


def test_what_only_looks_like_a_tool_is_left_alone(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [{"text": "good", "label": "pos", "data": {"source": "web"}}])
    assert rows(own, "classification") == [{"text": "good", "label": "pos", "data": {"source": "web"}}]
    (tmp_path / "comments.csv").write_text("text,output,Comments\na,b,c\n", encoding="utf-8")
    assert rows(tmp_path / "comments.csv") == [{"text": "a", "output": "b", "Comments": "c"}]
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": "a", "labels": ["x"], "tokens": [], "tags": []}])
    assert rows(empty, "multilabel")[0]["labels"] == ["x"]
    # A named format on rows of another one is a fault of each row, never a traceback.
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": "a", "output": "b"}])
    for name in READERS:
        found = next(iter(rows(plain, "ner", format=name)), {"kind": "missing_field"})
        assert found["kind"] in ("wrong_type", "missing_field", "unparsable_line"), (name, found)


def test_answers_of_rows_that_are_predicted_do_not_matter(tmp_path: Path) -> None:
    reading = reading_of(DataConfig(), "classification", answers=False)
    path = array(tmp_path / "t.json", [task("a", [choice("x", "y")]), task("b", [choice("x")], number=2)])
    assert [record.values for record in iter_records(path, "utf-8", reading)] == [
        {"id": 1, "text": "a"},
        {"id": 2, "text": "b", "output": "x"},
    ]
    chats = write_jsonl(
        tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "Ada (Oslo, Norway) left"}]}]
    )
    assert [r.values for r in iter_records(chats, "utf-8", reading)] == [{"text": "Ada (Oslo, Norway) left"}]


# doccano, Prodigy


def test_doccano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"id": 7, "text": "Ada left", "label": [[0, 3, "PER"]]}, {"id": 8, "text": "no", "label": []}],
    )
    assert [spans(row) for row in rows(path, "ner")] == [[("Ada", "PER")], []]
    relations = {
        "id": 1,
        "text": "Ada left",
        "entities": [{"id": 1, "label": "PER", "start_offset": 0, "end_offset": 3}],
        "relations": [{"id": 2}],
        "Comments": [],
    }
    assert spans(rows(write_jsonl(tmp_path / "r.jsonl", [relations]), "ner")[0]) == [("Ada", "PER")]
    assert "left out: relations (1)" in capsys.readouterr().err
    both = [{"id": 1, "text": "Ada left", "entities": [[0, 3, "PER"]], "cats": ["news"]}]
    path = write_jsonl(tmp_path / "b.jsonl", both)
    assert (
        spans(rows(path, "ner")[0]) == [("Ada", "PER")]
        and rows(path, "classification")[0]["output"] == "news"
    )
    (tmp_path / "c.csv").write_text("id,text,label\n1,one,a#b\n2,two,a\n3,three,b\n", encoding="utf-8")
    assert [row["labels"] for row in rows(tmp_path / "c.csv", "multilabel")] == [["a", "b"], ["a"], ["b"]]
    (tmp_path / "sharp.csv").write_text("id,text,label\n1,one,C#\n2,two,C\n", encoding="utf-8")
    assert [row["label"] for row in rows(tmp_path / "sharp.csv", "classification")] == ["C#", "C"]
    # A label that holds the sign is a label, where other columns say that this is no export.
    (tmp_path / "d.csv").write_text("text,label,url\none,C#,u\n", encoding="utf-8")
    assert rows(tmp_path / "d.csv", "classification")[0]["label"] == "C#"
    bad = write_jsonl(
        tmp_path / "e.jsonl",
        [{"text": "Ada", "label": [[0, 3, "PER"]]}, {"text": "Ada", "label": [[0, "3", "PER"]]}],
    )
    fault = rows(bad, "ner")[1]
    assert (fault["where"], fault["kind"]) == ("2", "wrong_type") and "must be an integer" in fault["problem"]


def test_prodigy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [{"text": "Ada", "start": 0, "end": 3, "id": 0}, {"text": "King", "start": 4, "end": 8, "id": 1}]
    told = [
        {
            "text": "Ada King",
            "spans": [{"start": 0, "end": 8, "token_start": 0, "token_end": 1, "label": "PER"}],
            "answer": "accept",
        },
        {
            "text": "Ada King",
            "tokens": tokens,
            "spans": [{"token_start": 0, "token_end": 1, "label": "PER"}],
            "answer": "accept",
        },
        {"text": "x", "spans": [], "answer": "reject"},
        {"text": "y", "spans": [], "answer": "ignore"},
        {
            "text": "z",
            "tokens": tokens,
            "spans": [{"token_start": 0, "token_end": 2, "label": "PER"}],
            "answer": "accept",
        },
    ]
    found = rows(write_jsonl(tmp_path / "n.jsonl", told), "ner")
    assert [spans(row) for row in found[:2]] == [[("Ada King", "PER")]] * 2
    assert found[2]["where"] == "5" and "2 tokens" in found[2]["problem"]
    capsys_err = capsys.readouterr().err
    assert all(part in capsys_err for part in ("left out: ignored rows (1)", "left out: rejected rows (1)"))
    options = [{"id": "s", "text": "Sport"}, {"id": "a", "text": "Art"}]
    chosen = [
        {"text": "t", "options": options, "accept": ["s"], "answer": "accept"},
        {"text": "u", "options": options, "accept": ["a", "s"], "answer": "accept"},
    ]
    path = write_jsonl(tmp_path / "c.jsonl", chosen)
    assert [row["labels"] for row in rows(path, "multilabel")] == [["Sport"], ["Art", "Sport"]]
    binary = [
        {"text": "t", "label": label, "answer": answer, "_input_hash": 1, "_task_hash": n}
        for n, (label, answer) in enumerate([("a", "accept"), ("b", "reject"), ("c", "accept")])
    ]
    # Questions about one text need not stand together.
    other = {"text": "u", "label": "b", "answer": "reject", "_input_hash": 2, "_task_hash": 9}
    binary.insert(1, other)
    path = write_jsonl(tmp_path / "b.jsonl", binary)
    assert rows(path, "multilabel") == [{"text": "t", "labels": ["a", "c"]}, {"text": "u", "labels": []}]
    assert [row["output"] for row in rows(path, "classification")] == ["a", "c"]


# Words with tags


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("I-A I-A B-A I-B", [(0, 2, "A"), (2, 3, "A"), (3, 4, "B")]),
        ("B-A M-A E-A S-A S-B", [(0, 3, "A"), (3, 4, "A"), (4, 5, "B")]),
        ("B-A L-A U-A O", [(0, 2, "A"), (2, 3, "A")]),
        ("B_A I_A O B-B-C", [(0, 2, "A"), (3, 4, "B-C")]),
    ],
)
def test_tags_of_all_schemes(tags: str, found: list[tuple[int, int, str]]) -> None:
    assert spans_of_tags(tags.split()) == found


def test_conll(tmp_path: Path) -> None:
    path = tmp_path / "eng.conll"
    path.write_text(
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\n. . O O\n\n奥 B-LOC\n斯 I-LOC\n陆 E-LOC\n很 O\n\n"
        "# text = a b\na\tO\nb\tB-my type\n\nwrong\nx O\n\nx Q-PER\n",
        encoding="utf-8",
    )
    found = rows(path)
    assert [row["text"] for row in found[:3]] == ["EU rejects German .", "奥斯陆很", "a b"]
    assert [spans(row) for row in found[:3]] == [
        [("EU", "ORG"), ("German", "MISC")],
        [("奥斯陆", "LOC")],
        [("b", "my type")],
    ]
    assert [(fault["where"], fault["kind"]) for fault in found[3:]] == [
        ("17", "unparsable_line"),
        ("20", "wrong_type"),
    ]
    audit = check.audit_file(path, "ner")
    assert (audit.rows, audit.usable, audit.errors) == (5, 3, 2)
    plain = tmp_path / "plain.txt"
    plain.write_text("only a text\nand another line\n", encoding="utf-8")
    (fault,) = rows(plain)
    assert "plain text" in fault["problem"]
    table = tmp_path / "ncbi.tsv"
    table.write_text("Ada\tB-PER\nleft\tO\n", encoding="utf-8")
    assert spans(rows(table, format="conll")[0]) == [("Ada", "PER")]


def test_words_that_begin_with_a_sign(tmp_path: Path) -> None:
    path = tmp_path / "signs.conll"
    path.write_text(
        "#Oslo NNP B-NP B-LOC\nnow RB O O\n# # B-NP O\n10\u00a0000 CD O O\n\n# newdoc\nAda NNP O B-PER\n",
        encoding="utf-8",
    )
    first, second = rows(path)
    assert first["text"] == "#Oslo now # 10\u00a0000" and spans(first) == [("#Oslo", "LOC")]
    assert spans(second) == [("Ada", "PER")]
    own = [{"text": "Ada left.", "tokens": ["Ada", "left", "."], "ner_tags": ["B-PER", "O", "O"]}]
    assert rows(write_jsonl(tmp_path / "own.jsonl", own))[0]["text"] == "Ada left."


def test_tokens_and_positions_of_words(tmp_path: Path) -> None:
    told = [{"id": "0", "tokens": ["Ada", "left", "."], "ner_tags": ["B-PER", "O", "O"]}]
    assert spans(rows(write_jsonl(tmp_path / "t.jsonl", told))[0]) == [("Ada", "PER")]
    numbers = [{"tokens": ["Ada"], "ner_tags": [1]}]
    assert (
        "does not say what they stand for" in rows(write_jsonl(tmp_path / "i.jsonl", numbers))[0]["problem"]
    )
    unequal = [*told, {"tokens": ["Ada", "x"], "ner_tags": ["B-PER"]}]
    assert (
        "2 tokens and 1 ner_tags"
        in rows(write_jsonl(tmp_path / "u.jsonl", unequal), format="tokens")[1]["problem"]
    )
    gliner = [
        {"tokenized_text": ["Ada", "King", "left"], "ner": [[0, 1, "person"]]},
        {"tokenized_text": ["x"], "ner": [[0, 1, "p"]]},
    ]
    found = rows(write_jsonl(tmp_path / "g.jsonl", gliner))
    assert spans(found[0]) == [("Ada King", "person")] and "1 words" in found[1]["problem"]


def test_parquet_names_its_classes(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    tags = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER", "I-PER"]))}
    )
    Dataset.from_dict(
        {"tokens": [["Ada", "King", "left"]], "ner_tags": [[1, 2, 0]]}, features=tags
    ).to_parquet(str(tmp_path / "n.parquet"))
    assert spans(rows(tmp_path / "n.parquet")[0]) == [("Ada King", "PER")]
    audit = check.audit_file(tmp_path / "n.parquet", "ner")
    assert audit.usable == 1
    labels = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=labels).to_parquet(
        str(tmp_path / "c.parquet")
    )
    path = tmp_path / "c.parquet"
    assert [row["label"] for row in rows(path)] == ["pos", "neg"]
    # Labels of one's own number the classes themselves; and `rows` is what stands there.
    assert [row["label"] for row in rows(path, labels=["Negative", "Positive"])] == [1, 0]
    assert [row["label"] for row in rows(path, labels=["neg", "pos", "other"])] == ["pos", "neg"]
    assert [row["label"] for row in rows(path, format="rows")] == [1, 0]
    named = check.audit_file(path, "classification", DataConfig(labels=["Negative", "Positive"]))
    assert named.labels == {"Positive": 1, "Negative": 1}


def test_words_are_joined_as_they_are_written() -> None:
    words = ["ab", "北", "京", "cd", "ef", "，", "g"]
    text, places = joined(words)
    assert text == "ab北京cd ef，g" and [text[a:b] for a, b in places] == words
    # A character a line: digits and letters belong together.
    assert joined(list("1998年NBA在京"))[0] == "1998年NBA在京"


# Chinese formats, brat, DocBin, chats


def test_cluener_clue_and_uie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluener = [{"text": "叶老桂和叶老桂", "label": {"name": {"叶老桂": [[0, 2], [4, 6]]}}}]
    assert spans(rows(write_jsonl(tmp_path / "c.jsonl", cluener))[0]) == [("叶老桂", "name")] * 2
    clue = [
        {"label": "102", "label_desc": "x", "label_des": "news_sport", "sentence": "他赢了", "keywords": ""}
    ]
    assert rows(write_jsonl(tmp_path / "t.json", clue))[0] == {"text": "他赢了", "output": "news_sport"}
    uie = [
        {"content": "王五在北京", "result_list": [{"text": "王五", "start": 0, "end": 2}], "prompt": "人名"},
        {"content": "他", "result_list": [], "prompt": "人名"},
        {"content": "王五在北京", "result_list": [{"text": "北京", "start": 3, "end": 5}], "prompt": "地点"},
        {
            "content": "王五在北京",
            "result_list": [{"text": "北京", "start": 3, "end": 5}],
            "prompt": "王五的住地",
        },
    ]
    first, second = rows(write_jsonl(tmp_path / "u.jsonl", uie), "ner")
    assert spans(first) == [("王五", "人名"), ("北京", "地点")] and second["entities"] == []
    assert "left out: relations (1)" in capsys.readouterr().err
    mood = [
        {
            "content": "很好",
            "result_list": [{"text": "正向", "start": 0, "end": 0}],
            "prompt": "情感倾向[正向,负向]",
        }
    ]
    assert rows(write_jsonl(tmp_path / "m.jsonl", mood), "classification")[0] == {
        "text": "很好",
        "category": ["正向", "负向"],
        "output": "正向",
    }


def test_brat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "brat"
    folder.mkdir()
    (folder / "a.txt").write_text("Ada\nKing left 😀 Oslo\n", encoding="utf-8")
    (folder / "a.ann").write_text(
        "T1\tPER 0 8\tAda King\nT2\tLOC 16 20\tOslo\nT3\tPER 0 3;9 13\tAda left\nR1\tin Arg1:T1 Arg2:T2\n#1\tAnnotatorNotes T1\tx\n",
        encoding="utf-8",
    )
    (folder / "b.txt").write_text("nobody", encoding="utf-8")
    (folder / "b.ann").write_text("", encoding="utf-8")
    (folder / "c.ann").write_text("", encoding="utf-8")
    first, second, third = rows(folder, "ner")
    assert spans(first) == [("Ada\nKing", "PER"), ("Oslo", "LOC")] and first["id"] == "a"
    assert second["entities"] == [] and "c.txt" in third["problem"]
    said = capsys.readouterr().err
    assert [line.rpartition(": ")[2] for line in said.splitlines() if "left out" in line] == [
        "discontinuous entities (1)",
        "notes (1)",
        "relations (1)",
    ]
    assert spans(rows(folder / "a.ann", "ner")[0]) == spans(rows(folder / "a.txt", "ner")[0]) == spans(first)
    (folder / "b.ann").write_text("T1 PER 0 3 nob", encoding="utf-8")
    assert "line 1 of b.ann" in rows(folder / "b.txt", "ner")[0]["problem"]
    # A collection has its folders for training and test; what looks like an end of a line inside a name is none.
    (tmp_path / "all" / "dev").mkdir(parents=True)
    (tmp_path / "all" / "dev" / "d.txt").write_bytes("Ada\u2028King left\r\n".encode())
    (tmp_path / "all" / "dev" / "d.ann").write_bytes("T1\tPER 0 8\tAda\u2028King\r\n".encode())
    (row,) = rows(tmp_path / "all", "ner")
    assert row["id"] == "dev/d" and spans(row) == [("Ada\u2028King", "PER")]


def test_docbin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spacy = pytest.importorskip("spacy")
    docs = []
    for text, span, cats in (
        ("Ada left 😀 Oslo", (0, 3), {"news": 1.0, "art": 0.0}),
        ("nobody", None, {"news": 0.7, "art": 0.9}),
    ):
        doc = spacy.blank("en")(text)
        doc.ents = [doc.char_span(*span, label="PER")] if span else []
        doc.cats = cats
        docs.append(doc)
    path = tmp_path / "train.spacy"
    spacy.tokens.DocBin(docs=docs).to_disk(path)
    assert [spans(row) for row in rows(path, "ner")] == [[("Ada", "PER")], []]
    assert "left out: categories of texts (2)" in capsys.readouterr().err
    assert [row["labels"] for row in rows(path, "multilabel")] == [["news"], ["art", "news"]]
    assert check.audit_file(path, "ner").usable == 2
    (tmp_path / "broken.spacy").write_bytes(b"nothing")
    (fault,) = rows(tmp_path / "broken.spacy", "ner")
    assert fault["problem"].startswith("not a readable DocBin")


def test_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*turns: str, system: str = "") -> dict[str, Any]:
        start = [{"role": "system", "content": system}] if system else []
        return {
            "messages": start
            + [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        }

    told = [
        said("文本:今天比赛，很精彩,类型选型:['Sports', 'Art']", "Sports"),
        said("He won", "Sports", system="Choose one of [Sports, Art]."),
        said("He won", "Sports"),
        said("a", "b", "c", "d"),
        said("no answer"),
    ]
    found = rows(write_jsonl(tmp_path / "m.jsonl", told), "classification")
    assert found == [
        {"category": ["Sports", "Art"], "text": "今天比赛，很精彩", "output": "Sports"},
        {"category": ["Sports", "Art"], "text": "He won", "output": "Sports"},
        {"text": "He won", "output": "Sports"},
    ]
    left = capsys.readouterr().err
    assert "conversations of several turns (1)" in left and "conversations without an answer (1)" in left
    shared = [
        {
            "conversations": [
                {"from": "human", "value": "Ada left Oslo"},
                {"from": "gpt", "value": '{"entity_text": "Oslo", "entity_label": "LOC"}'},
            ]
        }
    ]
    assert spans(rows(write_jsonl(tmp_path / "s.json", shared), "ner")[0]) == [("Oslo", "LOC")]
    lost = [
        {
            "conversations": [
                {"from": "human", "value": "Ada"},
                {"from": "gpt", "value": '[{"entity_text": "Bob", "entity_label": "PER"}]'},
            ]
        }
    ]
    assert rows(write_jsonl(tmp_path / "l.json", lost), "ner")[0]["kind"] == "entity_not_in_text"
    plain = write_jsonl(
        tmp_path / "p.jsonl", [{"instruction": "Classify", "input": "He won", "output": "Sports"}]
    )
    assert rows(plain) == [{"instruction": "Classify", "input": "He won", "output": "Sports"}], "rows as ours"
    alpaca = [{"instruction": "Choose from Labels: Sports, Art", "input": "He won", "output": "Sports"}]
    assert rows(write_jsonl(tmp_path / "al.jsonl", alpaca))[0] == {
        "category": ["Sports", "Art"],
        "text": "He won",
        "output": "Sports",
    }
    assert listed_in("nothing here", ["a"]) is None


# Writing


TEXT = st.text(
    st.one_of(st.sampled_from("ab 北京，😀é\n\t[]|#"), st.characters(exclude_categories=["Cs", "Cc"])),
    min_size=1,
    max_size=40,
).filter(lambda text: any(c.isalnum() for c in text))
LABEL = st.sampled_from(["PER", "地点", "my type", "a/b"])


@st.composite
def with_entities(draw: st.DrawFn, nested: bool = False) -> Example:
    text = draw(TEXT)
    found: list[Entity] = []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, len(text)))
        inside = text[start:end]
        free = all(e.end <= start or end <= e.start for e in found)  # type: ignore[operator]
        if free and inside.strip() == inside and not inside[0].isspace():
            found.append(Entity(inside, draw(LABEL), start, end))
    found.sort(key=lambda e: e.start or 0)
    return Example(draw(st.sampled_from(["7", "x-1"])), text, entities=tuple(found))


@st.composite
def with_label(draw: st.DrawFn) -> Example:
    labels = draw(st.lists(LABEL, min_size=2, max_size=3, unique=True))
    candidates = tuple(labels) if draw(st.booleans()) else ()
    return Example(draw(st.sampled_from(["7", "x-1"])), draw(TEXT), candidates, labels[0])


@st.composite
def with_labels(draw: st.DrawFn) -> Example:
    labels = draw(st.lists(LABEL, max_size=3, unique=True))
    return Example("7", draw(TEXT), labels=tuple(labels))


def written_and_read(folder: Path, examples: list[Example], form: str, task: TaskName) -> list[Example]:
    suffix = {"label-studio": ".json", "conll": ".conll"}.get(form, ".jsonl")
    path = folder / f"rows{suffix}"
    path.write_bytes("".join(WRITERS[form](examples)).encode())
    data = DataConfig(entities="nested")
    columns = columns_of_file(path, task, data)
    found = []
    for number, record in enumerate(columns.records(iter_records(path, "utf-8", reading_of(data, task)))):
        example, faults = parse_record(record, number, task, columns.columns, nested=True)
        assert example is not None, faults
        found.append(example)
    return found


def same(one: list[Example], other: list[Example], ids: bool) -> None:
    def plain(examples: list[Example]) -> list[Any]:
        return [(e.id if ids else "", e.text, e.candidates, e.label, e.labels, e.entities) for e in examples]

    assert plain(one) == plain(other)


PAIRS = {
    "ner": list(product(["rows", "label-studio", "doccano", "conll", "cluener"], repeat=2)),
    "classification": list(product(["rows", "label-studio", "doccano"], repeat=2)),
    "multilabel": list(product(["rows", "label-studio", "doccano"], repeat=2)),
}


@pytest.mark.parametrize("task", list(PAIRS))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path: Path, task: TaskName, data: st.DataObject) -> None:
    strategy = {"ner": with_entities(), "classification": with_label(), "multilabel": with_labels()}[task]
    # A file's content tells its format: one row with an answer stands first.
    told = {
        "ner": Example("0", "Ada left", entities=(Entity("Ada", "PER", 0, 3),)),
        "classification": Example("0", "Ada", ("PER", "x"), "PER"),
        "multilabel": Example("0", "Ada", labels=("PER",)),
    }[task]
    examples = [told, *data.draw(st.lists(strategy, max_size=4))]
    for first, second in PAIRS[task]:
        ids = "conll" not in (first, second)
        once = written_and_read(tmp_path, examples, first, task)
        same(once, examples, ids)
        same(written_and_read(tmp_path, once, second, task), examples, ids)


def test_nested_entities_are_written_where_the_format_holds_them(tmp_path: Path) -> None:
    inner = (Entity("Oslo", "LOC", 0, 4), Entity("Oslo Opera", "ORG", 0, 10))
    example = Example("1", "Oslo Opera", entities=inner, source="a.jsonl:1")
    for form in ("rows", "label-studio", "doccano", "cluener"):
        same(written_and_read(tmp_path, [example], form, "ner"), [example], True)
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: 'Oslo' and 'Oslo Opera' overlap, which CoNLL cannot hold"
    ):
        list(WRITERS["conll"]([example]))
    with pytest.raises(DataError, match="CLUENER is for entities"):
        list(WRITERS["cluener"]([Example("1", "a", label="b", source="a.jsonl:1")]))
    soft = Example("1", "a", label="b", shares=(("b", 0.6), ("c", 0.4)), source="a.jsonl:1")
    with pytest.raises(DataError, match="soft label"):
        list(WRITERS["label-studio"]([soft]))


def test_predictions_are_tasks_to_start_from() -> None:
    row = {
        "id": "1",
        "text": "😀 Ada",
        "entities": [
            {"start_idx": 2, "end_idx": 5, "entity_text": "Ada", "entity_label": "PER", "score": -0.1}
        ],
    }
    found = prediction_of(row, "run-1")
    assert (found["model_version"], round(found["score"], 4)) == ("run-1", 0.9048)
    (region_found,) = found["result"]
    assert region_found["value"] == {"start": 2, "end": 5, "text": "Ada", "labels": ["PER"]}
    (line,) = predicted_prodigy([row], "run-1")
    assert json.loads(line)["spans"] == [{"start": 2, "end": 5, "label": "PER", "score": 0.904837}]
    several = {
        "id": "2",
        "text": "t",
        "labels": ["a"],
        "ranking": [{"label": "a", "probability": 0.9}, {"label": "b", "probability": 0.2}],
    }
    assert prediction_of(several, "v")["score"] == 0.8
    assert (
        prediction_of(several, "v", {"choices": "topic", "text": "body"})["result"][0]["from_name"] == "topic"
    )


def test_the_format_is_found_by_the_content_and_may_be_overridden(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada", "label": [[0, 3, "PER"]]}])
    assert "entities" in first_values(path, DataConfig())[0]
    assert first_values(path, DataConfig(format="rows")) == [{"text": "Ada", "label": [[0, 3, "PER"]]}]
    own = write_jsonl(
        tmp_path / "b.jsonl", [{"text": unicodedata.lookup("LATIN SMALL LETTER A"), "labels": ["x"]}]
    )
    assert first_values(own, DataConfig()) == [{"text": "a", "labels": ["x"]}]
