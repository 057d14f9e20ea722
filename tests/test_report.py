"""The pages people look at: what stands in them, that nothing in a text can break out, and a browser that clicks through."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.rows import LABELS, classification_rows, ner_rows, read_jsonl, write_jsonl
from helpers.training import config_for
from labeltune import load_predictor
from labeltune.commands.evaluate import all_metrics, write_evaluation
from labeltune.config import DataConfig
from labeltune.data.loading import load_rows
from labeltune.errors import ConfigError, DataError, ModelError
from labeltune.evaluation.pages import environment, render
from labeltune.evaluation.report import LONGEST, SHORTEST, report_page
from labeltune.io.outputs import write_json
from labeltune.types import Entity, Example, Prediction

ABOUT = {"run": "out", "base": False, "decoding": "exact", "data": "test.jsonl", "rows_are": "test"}
NASTY = "</script><script>alert(1)</script><!-- <b>&amp;\u2028 张三🎉在南京"


def some_labels(count: int = 60) -> tuple[dict[str, Any], list[Example], list[Prediction]]:
    examples, predictions = [], []
    for i in range(count):
        right = LABELS[i % 3]
        answer = right if i % 4 else LABELS[(i + 1) % 3]
        rest = [label for label in LABELS if label != answer]
        ranking = ((answer, 0.6 + i % 3 / 10), (rest[0], 0.2), (rest[1], 0.2 - i % 3 / 10))
        examples.append(
            Example(f"id{i}", f"{NASTY} number {i}", tuple(LABELS), right, source=f"test.jsonl:{i + 1}")
        )
        predictions.append(Prediction(f"id{i}", answer, label=answer, ranking=ranking))
    return all_metrics(ABOUT, examples, predictions, LABELS), examples, predictions


def some_entities() -> tuple[dict[str, Any], list[Example], list[Prediction]]:
    text = "张三🎉在南京见李四"
    right = (Entity("张三", "人名", 0, 2), Entity("南京", "地点", 4, 6), Entity("李四", "人名", 7, 9))
    given = (right[0], Entity("南京", "组织", 4, 6), Entity("见", "人名", 6, 7))
    examples = [Example(str(i), text, entities=right) for i in range(4)]
    predictions = [
        Prediction("0", "", entities=given),
        *(Prediction(str(i), "", entities=right) for i in (1, 2, 3)),
    ]
    return (
        all_metrics({**ABOUT, "rows_are": "validation (used for selection)"}, examples, predictions, ()),
        examples,
        predictions,
    )


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_a_report_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    metrics, examples, predictions = some_labels()
    write_evaluation(tmp_path, metrics, examples, predictions)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", html)
    assert "default-src 'none'" in html
    rows = embedded(html)["rows"]
    assert [row["text"] for row in rows] == [example.text for example in examples]
    assert html.count("<script") == 2 and "alert(1)</script>" not in html
    saved = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert saved["accuracy"]["value"] == 0.75 and f"{saved['macro_f1']['value']:.3f}" in html
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert len(lines) == 60 and json.loads(lines[0])["right"] == "Sports"


def test_long_texts_are_cut_so_that_a_report_opens() -> None:
    metrics, examples, predictions = some_labels(3)
    long = [Example(e.id, "x" * 10_000, e.candidates, e.label) for e in examples]
    rows = embedded(report_page(metrics, long, predictions))["rows"]
    assert {(len(row["text"]), row["cut"]) for row in rows} == {(LONGEST, True)}
    assert SHORTEST < LONGEST


def test_pages_hold_any_text() -> None:
    source = """{% extends "page.html.j2" %}{% from "macros.html.j2" import bars, row, table %}
        {% block title %}{{ text }}{% endblock %}
        {% block body %}{% call table(["<i>"]) %}{{ row([text]) }}{% endcall %}{{ bars([(text, 1), ("b", 0)]) }}{% endblock %}"""
    html = environment().from_string(source).render(text=NASTY, data={"x": NASTY})
    assert "<script>alert" not in html and "<b>" not in html
    assert (
        '<b style="width:100.0%"></b></i><span>1</span>' in html
        and "<span>b</span><i></i><span>0</span>" in html
    )
    assert embedded(html) == {"x": NASTY}
    point = {"confidence": 0.5, "accuracy": 0.5, "rows": 1}
    assert 'cx="170.0" cy="150.0" r="12.0"' in render("reliability.svg.j2", metrics={"reliability": [point]})
    source = '{% from "macros.html.j2" import bars %}{{ bars([]) }}'
    assert environment().from_string(source).render().strip() == '<div class="bars"></div>'


def opened(browser: Any, path: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page from disk without a network, and what its console says."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900}, offline=True)
    found, said = context.new_page(), []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.goto(path.as_uri())
    found.wait_for_selector(".row")
    return found, said


def test_a_browser_clicks_through_labels(browser: Any, tmp_path: Path) -> None:
    metrics, examples, predictions = some_labels()
    write_evaluation(tmp_path, metrics, examples, predictions)
    view, said = opened(browser, tmp_path / "report.html")
    assert view.inner_text("#count") == "15 rows"  # it opens on the wrong ones
    counts = metrics["confusion"]["Sports"]
    view.click('.confusion button[data-right="Sports"][data-given="Space"]')
    assert view.inner_text("#count") == f"{counts['Space']} rows"
    for row in view.query_selector_all(".row"):
        assert "right: Sports · predicted: Space" in row.inner_text()
    view.click("#clear")
    assert view.inner_text("#count") == "60 rows" and len(view.query_selector_all(".row")) == 25
    view.click("#more")
    assert len(view.query_selector_all(".row")) == 50
    view.fill("#search", "NUMBER 59")
    assert view.inner_text("#count") == "1 rows" and NASTY.replace("\u2028", " ")[:40] in view.inner_text(
        ".row .text"
    )
    view.fill("#search", "")
    view.select_option("#order", "unsure")
    assert "0.600" in view.inner_text(".row .bars")
    view.click("#language")
    assert view.inner_text("h1") == "评测报告" and view.inner_text("#count") == "60 行"
    assert said == []


def test_a_browser_shows_entities(browser: Any, tmp_path: Path) -> None:
    write_evaluation(tmp_path, *some_entities())
    view, said = opened(browser, tmp_path / "report.html", "dark")
    assert view.inner_text("#count") == "1 rows"
    assert view.inner_text("#rows-are") == "validation (used for selection)"
    pieces = [
        (m.inner_text(), m.get_attribute("class")) for m in view.query_selector_all(".row mark, .row .chip")
    ]
    assert pieces == [
        ("张三", "right"),
        ("人名", "chip right"),
        ("南京", "missing wrong"),
        ("地点", "chip missing"),
        ("组织", "chip wrong"),
        ("见", "wrong"),
        ("人名", "chip wrong"),
        ("李四", "missing"),
        ("人名", "chip missing"),
    ]
    assert view.inner_text("#legend") == "labelled and predicted labelled only predicted only"
    view.select_option("#state", "spurious")
    assert view.inner_text("#count") == "1 rows" and "spurious: predicted: 见 (人名)" in view.inner_text(
        ".row"
    )
    view.select_option("#state", "wrong_boundary")
    assert view.inner_text("#count") == "0 rows"
    assert said == []


def test_two_runs_are_compared(in_folder: Path, model_folder: Path) -> None:
    result = labeltune.train(config_for(in_folder, model_folder, epochs=4))
    data = str(write_jsonl(in_folder / "test.jsonl", classification_rows(12)))
    found = labeltune.compare("base", result.best, data, output=in_folder / "c", progress=False)
    tuned = labeltune.evaluate(result.best, data, progress=False)
    untuned = labeltune.evaluate(result.best, data, base=True, progress=False)
    accuracy = found["differences"]["accuracy"]
    assert (accuracy["first"], accuracy["second"]) == (
        untuned["accuracy"]["value"],
        tuned["accuracy"]["value"],
    )
    assert found["headline"]["second"]["macro_f1"] == tuned["macro_f1"]["value"]
    changed = read_jsonl(in_folder / "c" / "changed.jsonl")
    assert len(changed) == len(found["changed"]["gained"]) + len(found["changed"]["lost"])
    for row in changed:
        better = row["second"] if row["change"] == "gained" else row["first"]
        assert better["label"] == row["right"]
    assert "Comparison" in (in_folder / "c" / "comparison.html").read_text(encoding="utf-8")
    same = labeltune.compare(result.last, result.last, data, progress=False)
    assert same["changed"] == {"gained": [], "lost": []} and same["differences"]["accuracy"]["p_value"] == 1.0
    with pytest.raises(ConfigError, match="cannot be `base`"):
        labeltune.compare(result.best, "base", data)
    with pytest.raises(ConfigError, match="pocket is a model, not a run; `base` stands for"):
        labeltune.compare("pocket", result.best, data)
    shutil.copytree(result.best.resolve(), in_folder / "others")
    info = json.loads((in_folder / "others" / "labeltune.json").read_text(encoding="utf-8"))
    write_json(in_folder / "others" / "labeltune.json", {**info, "labels": ["x", "y", "z"]})
    with pytest.raises(DataError, match=r"others have no label in common \(Art, Space, Sports; x, y, z\)"):
        labeltune.compare(result.best, in_folder / "others", data, progress=False)
    (in_folder / "ner").mkdir()
    other = labeltune.train(config_for(in_folder / "ner", model_folder, "ner", max_steps=1))
    with pytest.raises(ConfigError, match="cannot be compared"):
        labeltune.compare(other.best, result.best, data, progress=False)
    entities = str(write_jsonl(in_folder / "ner.jsonl", ner_rows(6)))
    found = labeltune.compare("base", other.best, entities, output=in_folder / "n", progress=False)
    assert set(found["differences"]) == {"span_f1", "exact_rows"}
    empty = str(write_jsonl(in_folder / "empty.jsonl", []))
    with pytest.raises(DataError, match="the file holds no rows"):
        labeltune.compare("base", result.best, empty, progress=False)
    with pytest.raises(DataError, match="the file holds no rows"):
        labeltune.compare("base", result.best, empty, on_error="skip", progress=False)
    with pytest.raises(ModelError):
        labeltune.compare("nowhere", result.best, data, progress=False)


def test_a_loaded_predictor_is_measured_and_left_open(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = labeltune.train(config_for(in_folder, model_folder, epochs=4))
    data = str(write_jsonl(in_folder / "test.jsonl", classification_rows(12)))
    metrics = labeltune.evaluate(result.best, data, progress=False)
    comparison = labeltune.compare("base", result.best, data, progress=False)
    with load_predictor(result.best) as predictor:
        free = labeltune.evaluate(predictor, data, progress=False, decoding="free")
        assert free["decoding"] == "free" and predictor.generation.decoding == "exact"
        name = free["run"]
        assert Path(name).samefile(result.best)
        assert labeltune.evaluate(predictor, data, progress=False) == {**metrics, "run": name}
        rows = load_rows(data, "classification", DataConfig())
        answers = predictor.predict([rows.example(i) for i in range(12)])
        asked: list[bool] = []

        def predict(*given: Any, **options: Any) -> Any:
            asked.append(True)
            return type(predictor).predict(predictor, *given, **options)

        monkeypatch.setattr(predictor, "predict", predict)
        found = labeltune.evaluate(
            predictor, data, output=in_folder / "m", progress=False, predictions=answers
        )
        assert asked == [] and found == {**metrics, "run": name}
        lines = (in_folder / "m" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["label"] for line in lines] == [answer.label for answer in answers]
        found = labeltune.compare("base", predictor, data, progress=False, predictions=answers)
        assert len(asked) == 1, "only the untuned model is asked"
        assert found == {**comparison, "first": f"{name} without its adapter", "second": name}
        assert labeltune.compare(predictor, predictor, data, progress=False)["changed"] == {
            "gained": [],
            "lost": [],
        }
        assert len(predictor.predict(["rocket"])) == 1
