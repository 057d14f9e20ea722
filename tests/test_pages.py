"""The three pages in a browser: both languages, a phone, a wide window, light and dark."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import labeltune
from helpers.browsing import broken_names, english_words, faint, overflow, own_words
from helpers.rows import classification_rows, ner_rows, write_jsonl
from helpers.tiny_models import make_tokenizer
from labeltune.commands.evaluate import all_metrics
from labeltune.config import build_config
from labeltune.data.schemas import FAULT_KINDS
from labeltune.evaluation import pages as page_module
from labeltune.evaluation.compare import compare_predictions, comparison_page, p_value
from labeltune.evaluation.data_report import data_page, make_report
from labeltune.evaluation.pages import both, environment, name
from labeltune.evaluation.report import report_page
from labeltune.messages import chinese
from labeltune.types import Entity, Example, Prediction

LABELS = ["退款与退货处理", "物流配送", "Agriculture", "投诉建议"]
RUN = "/home/zhangwei/projects/customer-service/output/意图分类-qwen2-1.5b-lora-r8/best"
ABOUT = {"run": RUN, "base": False, "data": "意图识别数据/意图_test.jsonl", "rows_are": "test"}
CHINESE = re.compile("[\u3400-\u9fff]")
#: Latin words that a Chinese reader expects as they are: names of figures, keys, commands, kinds of fault.
LATIN = {
    *FAULT_KINDS,
    "F1",
    "MCC",
    "ECE",
    "Brier",
    "mAP",
    "NLL",
    "Top",
    "token",
    "Token",
    "max_length",
    "prompt.max_length",
    "json",
    "gram",
}
LATIN |= {
    "training.packing",
    "shared_prefix",
    "packed",
    "padded",
    "predictions.jsonl",
    "changed.jsonl",
    "cleanlab",
}
LATIN |= {"labeltune", "data", "check", "limit", "Jaccard", "MinHash"}


def label_rows(count: int = 48) -> tuple[list[Example], list[Prediction], list[Prediction]]:
    """Rows with the answers of a poor and of a better model."""
    examples, poor, better = [], [], []
    for i in range(count):
        right, wrong = LABELS[i % 7 % 4], LABELS[(i % 7 + 1) % 4]
        text = "我上周三在旗舰店买的鞋子尺码不合适，想换成大一码的。" * (1 + i % 5)
        examples.append(
            Example(str(1000 + i), text, tuple(LABELS), right, source=f"意图识别数据/意图_test.jsonl:{i + 1}")
        )
        for answers, good in ((poor, i % 3 == 0), (better, i % 6 > 0)):
            given, other = (right, wrong) if good else (wrong, right)
            rest = (1 - 0.6) / 3
            ranking = ((given, 0.6), *((label, rest) for label in [other, *LABELS] if label != given))
            answers.append(Prediction(str(1000 + i), given, label=given, ranking=ranking[:4]))
    return examples, poor, better


def entity_rows() -> tuple[list[Example], list[Prediction], list[Prediction]]:
    text = "Ask Maria Lopez about 王建国."
    right = (Entity("Maria Lopez", "person", 4, 15), Entity("王建国", "人名", 22, 25))
    wrong = (Entity("A", "person", 0, 1), Entity("As", "organization", 0, 2), Entity("Maria", "person", 4, 9))
    examples = [Example(str(i), text, entities=right, source=f"实体.jsonl:{i + 1}") for i in range(6)]
    answers = [Prediction(str(i), "", entities=wrong if i % 2 else right) for i in range(6)]
    return examples, [Prediction(str(i), "", entities=()) for i in range(6)], answers


def set_rows(count: int = 36) -> tuple[list[Example], list[Prediction], list[Prediction]]:
    """Rows with none to three labels, one of which never occurs; the first answers give none, the second miss every third row."""
    examples, none, some = [], [], []
    for i in range(count):
        right = tuple(label for n, label in enumerate(LABELS[:3]) if i >> n & 1)
        given = tuple(LABELS[3:]) if i % 3 == 0 else right
        ranking = [(label, 0.8 if label in given else 0.1 * (n + 1)) for n, label in enumerate(LABELS)]
        examples.append(
            Example(str(i), f"第 {i} 条：鞋子尺码不合适，想退货。", labels=right, source=f"a.jsonl:{i + 1}")
        )
        none.append(Prediction(str(i), "", labels=(), ranking=tuple((label, 0.1) for label in LABELS)))
        some.append(Prediction(str(i), "", labels=given, ranking=tuple(sorted(ranking, key=lambda p: -p[1]))))
    return examples, none, some


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of page, from rows made up here."""
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    kinds = {"labels": label_rows(), "several labels": set_rows(), "entities": entity_rows()}
    for task, (examples, first, second) in kinds.items():
        metrics = all_metrics(ABOUT, examples, second, () if task == "entities" else LABELS)
        made[f"report of {task}"] = report_page(metrics, examples, second)
        for base in (True, False):
            names = {"first": f"{RUN} without its adapter" if base else "output/意图-a/best", "second": RUN}
            found = {
                **names,
                "base": base,
                "data": ABOUT["data"],
                **compare_predictions(examples, first, second),
            }
            made[f"comparison of {task}, {base}"] = comparison_page(found, examples, first, second)
    rows = classification_rows(40)
    rows[4]["output"] = rows[5]["output"]
    for row in rows:
        row["text"] *= 12
    config = build_config({"prompt": {"max_length": 200}})
    broken = [{**rows[0], "text": ""}, rows[1], {**rows[2], "text": rows[2]["text"] + "!"}]
    path = write_jsonl(folder / "意图_train.jsonl", [*rows, *broken])
    checked = labeltune.check_data(config, str(path))
    made["data of labels"] = data_page(make_report(checked, config, make_tokenizer()))
    path = write_jsonl(folder / "实体_train.jsonl", ner_rows(12))
    config = build_config({"task": "ner"})
    made["data of entities"] = data_page(make_report(labeltune.check_data(config, str(path)), config))
    for number, html in enumerate(made.values()):
        (folder / f"{number}.html").write_text(html, encoding="utf-8")
    return {each: folder / f"{number}.html" for number, each in enumerate(made)}


def opened(browser: Any, path: Path, width: int = 1440, locale: str = "en-US", scheme: str = "light") -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": 844}, locale=locale, color_scheme=scheme, offline=True
    )
    view = context.new_page()
    view.on("pageerror", lambda error: pytest.fail(str(error)))
    view.goto(path.as_uri())
    return view


@pytest.mark.parametrize(
    ("width", "locale", "scheme"),
    [(390, "en-US", "light"), (390, "zh-CN", "dark"), (1440, "zh-CN", "light"), (1440, "en-US", "dark")],
)
def test_every_text_can_be_read(
    browser: Any, pages: dict[str, Path], width: int, locale: str, scheme: str
) -> None:
    """No page is wider than its window, no name is broken, and nothing is faint or tiny."""
    for each, path in pages.items():
        view = opened(browser, path, width, locale, scheme)
        assert overflow(view) <= 0, each
        assert broken_names(view) == [], each
        assert faint(view) == [], each
        view.context.close()


def test_a_page_speaks_one_language_at_a_time(browser: Any, pages: dict[str, Path]) -> None:
    """The browser's first, the other one at a click, and the first again at the next."""
    for each, path in pages.items():
        view = opened(browser, path, locale="zh-CN")
        assert view.evaluate("document.documentElement.lang") == "zh"
        told = own_words(view)
        # Names of files, folders and columns stand inside some sentences.
        names = english_words(
            f"{RUN} {path} text train.jsonl --tokenizer FOLDER --json report.near_duplicates.listed report.suspects.listed ms:qwen/Qwen2-1.5B-Instruct"
        )
        assert english_words(told) - LATIN <= names, each
        view.click("#language")
        assert not CHINESE.search(re.sub("意图(分类|_train|-a)", "", own_words(view))), each
        view.click("#language")
        assert own_words(view) == told, each
        view.context.close()
        view = opened(browser, path)
        assert view.evaluate("document.documentElement.lang") == "en"
        view.context.close()


def test_what_a_phone_shows_of_a_matrix_and_its_labels(browser: Any, pages: dict[str, Path]) -> None:
    view = opened(browser, pages["report of labels"], 390, "zh-CN")
    right = view.evaluate("document.querySelector('#labels th:last-child').getBoundingClientRect().right")
    assert right <= 390 and view.inner_text("#labels th:last-child") == "样本数"
    for head in view.query_selector_all(".confusion th.side .name"):
        assert head.bounding_box()["height"] < 30
    view.context.close()


def test_a_click_through_a_report_of_several_labels(browser: Any, pages: dict[str, Path]) -> None:
    examples, _, answers = set_rows()
    wrong = sum(set(e.labels or ()) != set(a.labels or ()) for e, a in zip(examples, answers, strict=True))
    view = opened(browser, pages["report of several labels"])

    def count() -> int:
        return int(view.inner_text("#count").split()[0])

    assert count() == wrong == len(range(0, 36, 3)), "it opens on what went wrong"
    assert view.locator("#labels svg.curve").count() == 4
    # Rows that hold two labels together, by their cell of the heat map.
    first, second = LABELS[0], LABELS[1]
    both_of = [e for e in examples if {first, second} <= set(e.labels or ())]
    cell = f'#together button[data-right="{first}"][data-given="{second}"]'
    assert view.inner_text(cell) == str(len(both_of)) == "9"
    view.click(cell)
    assert count() == 9 and view.locator("#together td.chosen").count() == 1
    assert view.inner_text("#list .row:first-child .meta").startswith(f"#{both_of[0].id} ")
    # Rows without a label that belongs to them, then all.
    view.select_option("#given", "=" + LABELS[3])
    assert count() == sum(first in (e.labels or ()) for e in examples[::3])
    view.click("#clear")
    assert count() == 36 and view.locator("#together td.chosen").count() == 0
    view.fill("#search", "第 7 条")
    assert count() == 1
    shown = view.inner_text("#list .row")
    assert all(label in shown and f"{p:.3f}" in shown for label, p in answers[7].ranking or ())
    view.context.close()


def test_marks_that_overlap_have_their_types_behind_the_word(browser: Any, pages: dict[str, Path]) -> None:
    view = opened(browser, pages["report of entities"])
    pieces = [
        (m.inner_text(), m.get_attribute("class"))
        for m in view.query_selector_all(".row:first-child mark, .row:first-child .chip")
    ]
    assert pieces == [
        ("A", "wrong"),
        ("s", "wrong"),
        ("person A", "chip wrong"),
        ("organization As", "chip wrong"),
        ("Maria", "missing wrong"),
        (" Lopez", "missing"),
        ("person Maria", "chip wrong"),
        ("person Maria Lopez", "chip missing"),
        ("王建国", "missing"),
        ("人名", "chip missing"),
    ]
    text = view.inner_text(".row:first-child .marked")
    assert text.startswith("Askperson Aorganization As Maria Lopezperson Maria")
    view.context.close()


def test_figures_worth_most_come_first(pages: dict[str, Path]) -> None:
    html = pages["report of labels"].read_text(encoding="utf-8")
    first, minor = html.split('<div class="cards minor">')[:2]
    assert "Accuracy" in first and "Macro-F1" in first and "MCC" not in first and "Top-2" not in first
    assert "MCC" in minor and "Top-2" in minor
    data = pages["data of labels"].read_text(encoding="utf-8").split("</header>")[1]
    shown = re.findall(
        r'<div class="card"><span><span data-zh="[^"]*">([^<]*)</span></span><strong>([^<]*)', data
    )
    assert [each for each, _ in shown[:4]] == ["Rows", "Errors", "Warnings", "Duplicates"]
    assert [value for _, value in shown[:3]] == ["43", "1", "1"]


def test_labels_of_one_frequency_are_not_cut_into_rare_and_frequent() -> None:
    examples, _, answers = label_rows(48)
    even = [Example(e.id, e.text, e.candidates, LABELS[i % 4]) for i, e in enumerate(examples)]
    for rows, shown in ((examples, True), (even, False)):
        html = report_page(all_metrics(ABOUT, rows, answers, LABELS), rows, answers)
        assert ("By frequency of the label" in html) == shown


def test_models_are_called_what_they_are() -> None:
    examples, first, second = label_rows()
    found = {"data": "t.jsonl", **compare_predictions(examples, first, second)}

    def heads(base: bool, one: str, other: str) -> list[tuple[str, str]]:
        about = {**found, "base": base, "first": one, "second": other}
        html = comparison_page(about, examples, first, second)
        head = re.search(r"<thead>(.*?)</thead>", html, re.S)
        assert head is not None
        return re.findall(r'data-zh="([^"]*)">([^<]*)', head[1])[1:3]

    assert heads(True, "r without its adapter", "r") == [("基座模型", "base"), ("微调后", "fine-tuned")]
    assert heads(False, "output/a/best", "output/b/best") == [("“a”", "“a”"), ("“b”", "“b”")]
    assert heads(False, "a", "a") == [("第一个", "first"), ("第二个", "second")]


def test_a_small_p_is_not_zero() -> None:
    assert [p_value(p) for p in (0.0, 0.00009, 0.0001, 0.03125, 1.0)] == [
        "p < 0.0001",
        "p < 0.0001",
        "p = 0.0001",
        "p = 0.0312",
        "p = 1.0000",
    ]


def test_names_break_behind_a_slash_only() -> None:
    assert name("a/意图_b.jsonl:5") == (
        '<span translate="no"><span class="name">a/</span><span class="name">意图_b.jsonl:5</span></span>'
    )


def test_the_pages_tables_hold_both_languages() -> None:
    tables = (
        page_module.FIGURES,
        page_module.BASELINES,
        page_module.ERROR_KINDS,
        page_module.FREQUENCY_SLICES,
        page_module.REPORT,
    )
    for table in tables:
        for english, translated in table.values():
            assert english and not CHINESE.search(english)
            assert CHINESE.search(translated), english
    for _, meaning in FAULT_KINDS.values():
        assert CHINESE.search(chinese(meaning)), meaning
    assert both("<", "“>") == '<span data-zh="“&gt;">&lt;</span>'
    assert both("{n:,} <{a}", "“{a}", n=1000, a='"') == '<span data-zh="“&#34;">1,000 &lt;&#34;</span>'
    assert both("{n}", "“{n}") == '<span data-zh="“{n}">{n}</span>', "somebody's braces stay"


class _Bare(HTMLParser):
    """Words outside of what can be switched and of what comes from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        covered = "data-zh" in names or names.get("translate") == "no" or tag in ("style", "script")
        if tag not in ("meta", "br", "input"):
            self.open.append((tag, covered or bool(self.open and self.open[-1][1])))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1][1]):
            self.found.append(data)


def test_no_word_of_a_page_is_left_out_of_the_switch(pages: dict[str, Path]) -> None:
    """The same without a browser."""
    for each, path in pages.items():
        reader = _Bare()
        reader.feed(path.read_text(encoding="utf-8"))
        bare = " ".join(reader.found).replace("中文", "")
        assert not CHINESE.search(bare), each
        assert english_words(bare) <= LATIN, each


def test_a_page_names_itself_in_both_languages() -> None:
    source = '{% extends "page.html.j2" %}{% block title %}{{ title }}{% endblock %}'
    html = environment().from_string(source).render(title="a <b>")
    assert '<title data-zh="a &lt;b&gt;">a &lt;b&gt;</title>' in html and html.count("<script>") == 1
    html = environment().from_string(source + "{% block title_zh %}甲{% endblock %}").render(title="a")
    assert '<title data-zh="甲">a</title>' in html
