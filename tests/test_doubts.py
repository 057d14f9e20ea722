"""Rows that a tuned model contradicts: what counts, in which order, with which row against them, and where they go."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.commands import command
from helpers.rows import classification_rows, ner_rows, read_jsonl, write_jsonl
from helpers.runs import make_run
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.commands.doubts import judge
from labeltune.data.loading import load_rows
from labeltune.data.near_duplicates import NearDuplicate
from labeltune.evaluation.label_doubts import Judged, find_doubts
from labeltune.types import Entity, Example, Prediction


def judged(number: int, text: str, label: str, ranking: dict[str, float], loss: float = 1.0) -> Judged:
    order = tuple(sorted(ranking.items(), key=lambda pair: -pair[1]))
    example = Example(str(number), text, label=label, source=f"a.jsonl:{number}")
    return Judged(example, Prediction(str(number), order[0][0], label=order[0][0], ranking=order), loss)


def test_labels_that_are_surely_contradicted() -> None:
    rows = [
        judged(1, "one", "a", {"a": 0.9, "b": 0.1}),
        judged(2, "two", "a", {"b": 0.8, "a": 0.2}, loss=1.6),
        judged(3, "three", "a", {"b": 0.6, "a": 0.4}),  # not sure enough
        judged(4, "four", "a", {"b": 0.99, "a": 0.01}, loss=4.6),
        judged(5, "four", "b", {"b": 0.99, "a": 0.01}),  # the same text, with the other answer
    ]
    found = find_doubts(rows)
    assert [(d.where, d.given, d.suggested) for d in found] == [
        ("a.jsonl:4", "a", "b"),
        ("a.jsonl:2", "a", "b"),
    ]
    assert found[0].against == "a.jsonl:5" and found[1].against == ""
    pair = NearDuplicate("a.jsonl:2", "a.jsonl:5", 0.9, "two", "four", (0, 0), (1, 4))
    assert find_doubts(rows, [pair])[1].against == "a.jsonl:5"


def test_several_labels_and_entities() -> None:
    several = Example("1", "t", labels=("a", "b"), source="a:1")
    said = Prediction("1", "", labels=("c",), ranking=(("c", 0.9), ("a", 0.6), ("b", 0.1)))
    (doubt,) = find_doubts([Judged(several, said, 2.0)])
    assert (doubt.given, doubt.suggested, doubt.sure) == ("b", "c", 0.9)
    right = (Entity("Ada", "PER", 0, 3),)
    example = Example("1", "Ada left Oslo", entities=right, source="a:1")

    def told(*entities: Entity, certainty: float = 0.9) -> list[tuple[str, str]]:
        found = Prediction("1", "", entities=entities, certainty=certainty)
        return [(d.given, d.suggested) for d in find_doubts([Judged(example, found, 1.0)])]

    sure, unsure = math.log(0.95), math.log(0.3)
    ada = Entity("Ada", "PER", 0, 3, sure)
    assert told(ada) == []
    assert told(ada, Entity("Oslo", "LOC", 9, 13, sure)) == [("-", "Oslo (LOC)")]
    assert told(ada, Entity("Oslo", "LOC", 9, 13, unsure), certainty=0.3) == []
    assert told(Entity("Ada", "LOC", 0, 3, sure)) == [("Ada (PER)", "Ada (LOC)")]
    assert told() == [("Ada (PER)", "-")] and told(certainty=0.4) == []


@pytest.mark.parametrize("task", ["classification", "ner"])
def test_the_loss_is_that_of_the_answer(task: Any, model_folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_folder, task, seed=2)
    rows = classification_rows(4) if task == "classification" else ner_rows(4)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = load_rows(str(path), task).examples()
    with load_predictor(run, merge=True) as predictor:
        found = list(judge(predictor, examples))
        for each in found:
            if task == "classification":
                p = dict(predictor.predict([each.example])[0].ranking)[str(each.example.label)]
                assert each.loss == pytest.approx(-math.log(p), rel=1e-4)
            else:
                import torch

                encoded = predictor.builder.training(each.example)
                start, end = encoded.answer_span
                with torch.inference_mode():
                    logits = (
                        predictor.model(input_ids=torch.tensor([encoded.ids]))
                        .logits[0]
                        .float()
                        .log_softmax(-1)
                    )
                right = sum(float(logits[at - 1, encoded.ids[at]]) for at in range(start, end))
                assert each.loss == pytest.approx(-right, rel=1e-4)


def test_the_commands(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(in_folder, model_folder)
    rows = classification_rows(24)
    path = write_jsonl(in_folder / "rows.jsonl", rows)
    run = make_run(in_folder / "run", model_folder, seed=1)
    done = command(
        monkeypatch, capsys, "data", "check", str(path), "--run", str(run), "--suspects", "suspects.jsonl"
    )
    assert done.code == 0, done.err
    assert "of 24 that the model contradicts" in done.out
    found = read_jsonl(Path("suspects.jsonl"))
    assert done.out.count("and the model says") == min(20, len(found))
    losses = [row["loss"] for row in found]
    assert losses == sorted(losses, reverse=True) and all(row["given"] == row["output"] for row in found)
    tasks = command(
        monkeypatch,
        capsys,
        "data",
        "check",
        str(path),
        "--run",
        str(run),
        "--suspects",
        "s.json",
        "--to",
        "label-studio",
    )
    assert tasks.code == 0, tasks.err
    told = json.loads(Path("s.json").read_text(encoding="utf-8"))
    assert (
        len(told) == len(found) and {"annotations", "predictions", "data"} == set(told[0])
        if told
        else not found
    )
    values = {**config.model_dump(mode="json"), "data": {"train": str(path)}}
    Path("c.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    folds = command(
        monkeypatch, capsys, "data", "check", "c.yaml", "--folds", "2", "--report", "page.html", "--json"
    )
    assert folds.code == 0, folds.err
    report = json.loads(folds.out)["report"]
    assert report["doubts"]["judged_rows"] == 24
    lines = read_jsonl(Path("page.losses.jsonl"))
    assert len(lines) == 24 and all(line["loss"] >= 0 for line in lines)
    assert "What the tuned model contradicts" in Path("page.html").read_text(encoding="utf-8")
    for arguments, part in (
        (["rows.jsonl", "--folds", "2"], "--folds trains, so it needs a config"),
        (["rows.jsonl", "--run", str(run), "--folds", "2"], "two ways"),
        (["rows.jsonl", "--suspects", "x.jsonl"], "needs a judge"),
        (["rows.jsonl", "--run", str(run), "--to", "label-studio"], "name the file"),
        (["rows.jsonl", "--run", str(run), "--to", "csv", "--suspects", "x"], "written for label-studio"),
    ):
        refused = command(monkeypatch, capsys, "data", "check", *arguments)
        assert refused.code == 2 and part in refused.err, refused.err
