"""`labeltune next`: what is informative, how rows are spread, and which rows are passed over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from helpers.commands import command
from helpers.rows import read_jsonl, write_jsonl
from helpers.runs import make_run
from labeltune import load_predictor
from labeltune.commands.row_hashes import save_selection
from labeltune.inference.acquisition import Candidate, informativeness, most_informative, spread, why
from labeltune.types import Entity, Example, Prediction


def labelled(*probabilities: float) -> Prediction:
    return Prediction("0", "a", label="a", ranking=tuple(zip("abcd", probabilities, strict=False)))


def test_how_much_labels_tell() -> None:
    assert informativeness(labelled(0.5, 0.5), "margin") == 1.0
    assert (
        informativeness(labelled(1.0, 0.0), "margin") == informativeness(labelled(1.0, 0.0), "entropy") == 0.0
    )
    assert informativeness(labelled(0.25, 0.25, 0.25, 0.25), "entropy") == pytest.approx(1.0)
    # The margin looks at two answers, the entropy at all.
    assert informativeness(labelled(0.5, 0.5, 0.0), "entropy") == pytest.approx(1 / math.log2(3))
    gains = {"a": 0.0, "b": 0.5}
    assert informativeness(labelled(0.6, 0.4), "metric", gains) == pytest.approx(0.8 * 0.2)
    assert informativeness(labelled(0.5, 0.5), "metric", {}) == 1.0, "without figures it is the margin"


def test_how_much_several_labels_and_entities_tell() -> None:
    several = Prediction("0", "a", labels=("a",), ranking=(("a", 0.9), ("b", 0.4)))
    assert informativeness(several, "margin") == pytest.approx(1 - 0.2)
    bits = [-(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in (0.9, 0.4)]
    assert informativeness(several, "entropy") == pytest.approx(sum(bits) / 2)
    entities = (Entity("x", "A", 0, 1, math.log(0.9)), Entity("y", "B", 2, 3, math.log(0.5)))
    found = Prediction("0", "", entities=entities, certainty=0.5)
    assert informativeness(found, "margin") == 0.5
    assert informativeness(found, "entropy") == pytest.approx(1 - 0.45)
    assert informativeness(found, "metric", {"A": 0.2, "B": 0.6}) == pytest.approx(0.5 * 0.4)
    nothing = Prediction("0", "", entities=(), certainty=0.7)
    assert informativeness(nothing, "margin") == pytest.approx(0.3) == informativeness(nothing, "entropy")
    assert "no entity was found, at 0.70" in why(Candidate(Example("1", "t"), nothing, 0.3), 1.0)
    assert "unsure of 'y' (B), at 0.50" in why(Candidate(Example("1", "t"), found, 0.5), 1.0)
    assert "unsure of 'b', at 0.40" in why(Candidate(Example("1", "t"), several, 0.8), 1.0)


def candidate(text: str, score: float) -> Candidate:
    return Candidate(Example(text, text), labelled(0.5, 0.5), score)


def test_rows_are_spread_over_the_pool() -> None:
    found = most_informative((candidate(f"text number {n} {n * n}", n / 100) for n in range(100)), 2)
    assert len(found) == 40 and found[0].score == 0.99
    texts = ["alpha one", "alpha two", "beta three", "gamma four"]
    pool = [candidate(text, score) for text, score in zip(texts, [0.9, 0.89, 0.5, 0.4], strict=True)]
    places = {"alpha one": 0.0, "alpha two": 0.1, "beta three": math.pi, "gamma four": math.pi / 2}

    def vectors(given: list[str]) -> Any:
        return numpy.array([[math.cos(places[text]), math.sin(places[text])] for text in given])

    assert [each.example.text for each, _ in spread(pool, 2, vectors)] == ["alpha one", "beta three"]
    chosen = spread(pool, 9, vectors)
    assert len(chosen) == 4 and chosen[0][1] == 1.0 and chosen[1][1] == pytest.approx(1.0)
    assert [each.example.text for each, _ in spread(pool, 2)] == ["alpha one", "alpha two"]
    near = [
        candidate("the rocket landed at sea today", 0.9),
        candidate("the rocket landed at sea today!", 0.8),
        candidate("x", 0.1),
    ]
    assert [each.example.text for each, _ in spread(near, 3)] == [near[0].example.text, "x"]
    assert spread([], 3) == []


def test_the_command(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", model_folder, seed=1)
    save_selection(run / "best", ["a text that chose the checkpoint"])
    texts = [
        f"{word} {n} of the {place}"
        for n, word in enumerate(["match", "rocket", "painting", "goal"])
        for place in ("city", "sea")
    ]
    rows: list[dict[str, Any]] = [{"id": f"p{n}", "text": text} for n, text in enumerate(texts)]
    rows += [
        {"text": "labelled", "output": "Sports"},
        {"text": " "},
        {"text": texts[0]},
        {"text": "a text that chose the checkpoint"},
    ]
    pool = write_jsonl(tmp_path / "pool.jsonl", rows)
    out = tmp_path / "next.jsonl"
    asked = ("next", str(run), "--pool", str(pool), "-o", str(out), "--count", "3")
    done = command(monkeypatch, capsys, *asked, "--why")
    assert done.code == 0, done.err
    assert "3 rows to label next; 8 rows in the pool" in done.err
    for part in (
        "1 passed over: labelled",
        "1 passed over: cannot be predicted",
        "2 passed over: known to the run, or repeated",
    ):
        assert part in done.err
    chosen = read_jsonl(out)
    assert len(chosen) == 3 == done.out.count("away from the rows before it")
    with load_predictor(run) as predictor:
        scores = {
            text: informativeness(p, "margin")
            for text, p in zip(texts, predictor.predict(texts), strict=True)
        }
    assert chosen[0]["text"] == max(scores, key=scores.__getitem__)
    assert chosen[0]["informativeness"] == pytest.approx(scores[chosen[0]["text"]], abs=1e-5)
    tasks = command(
        monkeypatch,
        capsys,
        *asked[:4],
        "-o",
        str(tmp_path / "next.json"),
        "--count",
        "2",
        "--to",
        "label-studio",
    )
    assert tasks.code == 0, tasks.err
    found = json.loads((tmp_path / "next.json").read_text(encoding="utf-8"))
    assert len(found) == 2 and found[0]["predictions"][0]["model_version"].startswith("run-")
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": "x", "output": "Sports"}])
    refused = command(monkeypatch, capsys, "next", str(run), "--pool", str(empty), "-o", str(out))
    assert (
        refused.code == 2
        and "holds no row to label; 0 rows in the pool, 1 passed over: labelled" in refused.err
    )
    wrong = command(monkeypatch, capsys, *asked, "--by", "luck")
    assert wrong.code == 2 and "--by luck: it is one of margin, entropy, metric" in wrong.err
