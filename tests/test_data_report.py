"""Near-duplicates, labels that look wrong, the token account, and the page that shows them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

import labeltune
from helpers.commands import Result, process
from helpers.rows import LABELS, classification_rows, ner_rows, read_jsonl, write_jsonl
from helpers.tiny_models import make_tokenizer
from labeltune.config import RunConfig, TrainingConfig, build_config
from labeltune.data import label_issues, near_duplicates
from labeltune.data.label_issues import find_label_issues
from labeltune.data.loading import Rows, load_rows
from labeltune.data.near_duplicates import THRESHOLD, find_near_duplicates, jaccard, ngrams, share_of
from labeltune.evaluation.data_report import data_page, make_report
from labeltune.models.text_vectors import text_vectors
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.template import ChatTemplate
from labeltune.training.dataset import tokenize_rows
from labeltune.training.packing import Row, pack_step, step_order
from labeltune.training.token_figures import token_figures


@pytest.fixture
def command(labeltune: Callable[..., Result]) -> Callable[..., Result]:
    """By a name that is not the package's."""
    return labeltune


EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "data"


def load(folder: Path, *files: list[dict[str, Any]], task: Any = "classification") -> list[Rows]:
    return [
        load_rows(str(write_jsonl(folder / f"{number}.jsonl", rows)), task)
        for number, rows in enumerate(files)
    ]


# --- planted faults ---


def relabel_class(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "output": next(label for label in row["category"] if label != row["output"])}


def relabel_entity(row: dict[str, Any]) -> dict[str, Any]:
    first, *others = row["entities"]
    return {**row, "entities": [{**first, "entity_label": f"not {first['entity_label']}"}, *others]}


@pytest.mark.parametrize(
    ("name", "relabel"), [("classification", relabel_class), ("ner", relabel_entity)], ids=["cls", "ner"]
)
def test_planted_faults_are_all_found(
    name: str, relabel: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    rows = read_jsonl(EXAMPLES / f"en_{name}_train.jsonl")
    generator = random.Random(0)
    with_answers = [i for i, row in enumerate(rows) if row.get("output") or row.get("entities")]
    chosen = generator.sample(with_answers, 70)
    again, emptied = chosen[:50], chosen[50:]
    copies = [relabel(rows[i]) for i in again[:25]] + [rows[i] for i in again[25:]]
    planted = [{**row, "text": ""} if i in emptied else row for i, row in enumerate(rows)] + copies
    path = write_jsonl(tmp_path / "planted.jsonl", planted)
    (checked,) = labeltune.check_data(build_config({"task": name}), str(path))

    def places(kind: str) -> list[str]:
        return sorted(fault.where for fault in checked.audit.faults if fault.kind == kind)

    assert places("conflicting_duplicate") == sorted(f"{path}:{len(rows) + i + 1}" for i in range(25))
    assert places("exact_duplicate") == sorted(f"{path}:{len(rows) + i + 1}" for i in range(25, 50))
    assert places("empty_field") == sorted(f"{path}:{i + 1}" for i in emptied)
    assert checked.audit.counts.total() == 70


# --- near-duplicates ---


def sentences(count: int, words: int, seed: int) -> list[str]:
    """Random texts that are alike by chance only."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz的是在了和有我他这中大来上国"
    return [
        " ".join("".join(generator.choices(letters, k=generator.randint(2, 7))) for _ in range(words))
        for _ in range(count)
    ]


def edited(text: str, changes: int, generator: random.Random) -> str:
    characters = list(text)
    for _ in range(changes):
        characters.insert(generator.randrange(len(characters)), generator.choice("xyz中"))
    return "".join(characters)


def as_rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, "output": "A"} for text in texts]


def test_pairs_are_those_of_brute_force(tmp_path: Path) -> None:
    generator = random.Random(1)
    base = sentences(60, 12, seed=2)
    train = base + [edited(text, generator.randint(1, 8), generator) for text in base[:40]]
    test = [edited(text, generator.randint(1, 8), generator) for text in base[20:60]] + sentences(
        20, 12, seed=3
    )
    files = load(tmp_path, as_rows(train), as_rows(test))
    found = find_near_duplicates(files)

    def best(text: str, before: list[str]) -> float:
        return max((jaccard(ngrams(text), ngrams(other)) for other in before), default=0.0)

    expected = {((0, 0), i): best(text, train[:i]) for i, text in enumerate(train)}
    expected |= {((1, 0), i): best(text, train) for i, text in enumerate(test)}
    expected |= {((1, 1), i): best(text, test[:i]) for i, text in enumerate(test)}
    wanted = {key: value for key, value in expected.items() if value >= THRESHOLD}
    assert {(pair.files, pair.rows[0]): pair.similarity for pair in found.pairs} == wanted
    assert 20 < len(wanted) < 80, "the test needs pairs on both sides of the threshold"
    for pair in found.pairs:
        texts = [(train, test)[file][row] for file, row in zip(pair.files, pair.rows, strict=True)]
        assert jaccard(ngrams(texts[0]), ngrams(texts[1])) == pair.similarity
        assert [pair.where, pair.like] == [
            f"{tmp_path}/{file}.jsonl:{row + 1}" for file, row in zip(pair.files, pair.rows, strict=True)
        ]
    assert found.across == sum(files != (0, 0) and files != (1, 1) for files, _ in wanted)
    assert [pair.across for pair in found.pairs] == sorted((p.across for p in found.pairs), reverse=True)


def test_equal_texts_are_left_to_the_audit(tmp_path: Path) -> None:
    text = sentences(1, 12, seed=4)[0]
    files = load(tmp_path, as_rows([text, text, text.upper() + "  "]), as_rows([text]))
    (pair,) = find_near_duplicates(files).pairs
    assert pair.rows == (2, 0) and pair.similarity == 1.0 and not pair.across


def test_rows_of_one_template_are_compared_with_one_of_them(tmp_path: Path) -> None:
    text = sentences(1, 60, seed=5)[0]
    (rows,) = load(tmp_path, as_rows([f"{text} {number}" for number in range(400)]))
    found = find_near_duplicates([rows])
    assert [pair.rows[1] for pair in found.pairs] == [0] * 399


def test_short_and_odd_texts_are_compared_as_they_are(tmp_path: Path) -> None:
    files = load(tmp_path, as_rows(["嗯。", "嗯", "嗯 ", "ａｂｃｄｅ", "abcde", "\u0000", "!"]))
    pairs = {pair.rows for pair in find_near_duplicates(files).pairs}
    assert pairs == {(2, 1), (4, 3)}
    assert ngrams("") == {""} and jaccard(ngrams("abc"), ngrams("abd")) == 0


def test_the_comparison_is_bounded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MAX_ROWS", 30)
    texts = sentences(40, 8, seed=6)
    files = load(tmp_path, as_rows(texts), as_rows(texts[5:10]))
    found = find_near_duplicates(files)
    assert found.compared == (25, 5)
    report = make_report(files, build_config({}), None)
    assert "Only the first 25 of 40 usable rows of 0.jsonl were compared." in data_page(report)
    assert share_of([5, 100, 100], 25) == (5, 10, 10)
    assert share_of([5, 7], 100) == (5, 7) and share_of([], 100) == ()


# --- labels that look wrong ---


def flipped(rows: list[dict[str, Any]], share: float, seed: int) -> tuple[list[dict[str, Any]], set[int]]:
    generator = random.Random(seed)
    chosen = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, "output": generator.choice([x for x in row["category"] if x != row["output"]])}
        if number in chosen
        else row
        for number, row in enumerate(rows)
    ], chosen


@pytest.mark.parametrize(("language", "at_least"), [("en", 0.25), ("zh", 0.5)])
def test_flipped_labels_are_in_the_first_tenth(
    language: str, at_least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short English texts of one label share few n-grams; a tenth would be chance."""
    # The order is measured here; of so few rows the model is sure of none.
    monkeypatch.setattr(label_issues, "SURE", 0.0)
    monkeypatch.setattr(label_issues, "CLEARLY", 0.0)
    monkeypatch.setattr(label_issues, "MIN_TEXTS", 25)
    shares = []
    for seed in (2, 3, 4):
        rows, chosen = flipped(read_jsonl(EXAMPLES / f"{language}_classification_train.jsonl"), 0.05, seed)
        found = find_label_issues(load(tmp_path, rows))
        first = {int(s.where.rpartition(":")[2]) - 1 for s in found.issues[: len(rows) // 10]}
        shares.append(len(first & chosen) / len(chosen))
        assert found.judged == len(rows) and not found.rare
    assert sum(shares) / 3 > at_least, shares


def test_right_labels_are_not_listed(tmp_path: Path) -> None:
    """Few rows a label are not judged, and a model that is unsure keeps quiet."""
    for language in ("en", "zh"):
        rows = read_jsonl(EXAMPLES / f"{language}_classification_train.jsonl")
        found = find_label_issues(load(tmp_path, rows))
        assert found.judged == len(rows) and found.issues == ()
        few = [row for row in rows if row["output"] in sorted({r["output"] for r in rows})[:6]][:120]
        found = find_label_issues(load(tmp_path, few))
        assert found.judged == 0 and found.issues == () and sum(found.rare.values()) == 120


class Words:
    """A tokenizer that numbers words as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, texts: list[str], **_: Any) -> Any:
        ids = [[self.numbers.setdefault(w, len(self.numbers)) for w in text.split()] for text in texts]
        return SimpleNamespace(input_ids=ids)


def test_a_model_at_hand_knows_what_the_rows_do_not_say(tmp_path: Path) -> None:
    """Words that never stand twice, of which the embeddings alone know the label."""
    import torch
    from safetensors.torch import save_file

    rows = [
        {**row, "text": text}
        for row, text in zip(classification_rows(99), sentences(99, 6, seed=8), strict=True)
    ]
    rows[10]["output"] = "Art"
    words = Words()
    words([row["text"] for row in rows])
    torch.manual_seed(0)
    weights = torch.randn(len(words.numbers) - 5, 16)  # a few words have no row
    for number, row in enumerate(rows):
        for word in row["text"].split():
            if words.numbers[word] < len(weights):
                weights[words.numbers[word], number % 3] += 4
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"damaged")
    save_file({"model.embed_tokens.weight": weights.bfloat16()}, tmp_path / "model" / "b.safetensors")
    vectors = text_vectors(tmp_path / "model", words)
    assert vectors is not None
    made = vectors([row["text"] for row in rows])
    assert made.shape == (99, 16) and numpy.linalg.norm(made, axis=1) == pytest.approx(1, abs=1e-3)
    files = load(tmp_path, rows)
    found = find_label_issues(files, vectors)
    assert found.features == label_issues.NGRAMS_AND_VECTORS and found.agreement > 0.9
    assert [(s.where, s.given, s.suggested) for s in found.issues] == [
        (f"{tmp_path}/0.jsonl:11", "Art", "Space")
    ]
    assert find_label_issues(files).agreement < 0.5
    assert "That is little" in data_page(make_report(files, build_config({})))
    assert text_vectors(tmp_path, words) is None


def test_vectors_that_do_not_help_are_left_out(tmp_path: Path) -> None:
    files = load(tmp_path, classification_rows(120))
    generator = numpy.random.default_rng(0)
    assert "That is little" not in data_page(make_report(files, build_config({})))
    noisy = find_label_issues(files, lambda texts: 20 * generator.normal(size=(len(texts), 50)))
    assert noisy == find_label_issues(files) and noisy.features == label_issues.NGRAMS


def test_suspects_say_what_the_label_should_be(tmp_path: Path) -> None:
    rows = [*classification_rows(120), {"text": "once", "category": ["Rare"], "output": "Rare"}]
    rows[10] = {**rows[10], "output": "Art"}
    (loaded,) = load(tmp_path, rows)
    found = find_label_issues([loaded])
    (suspect,) = found.issues
    assert suspect.where == f"{tmp_path}/0.jsonl:11"
    assert (suspect.given, suspect.suggested) == ("Art", "Space")
    assert suspect.suggested_probability > suspect.given_probability
    assert found.rare == {"Rare": 1} and found.judged == 120 and found.agreement > 0.9
    assert find_label_issues([loaded]) == found
    # With two candidates the third label cannot be suggested.
    rows[10] = {**rows[10], "category": ["Art", "Sports"]}
    (suspect,) = find_label_issues(load(tmp_path, rows)).issues or [None]
    assert suspect is None or suspect.suggested == "Sports"


def test_equal_texts_do_not_speak_for_each_other(tmp_path: Path) -> None:
    """A wrong label stays suspicious when its row stands twice."""
    rows = classification_rows(120)
    rows[10] = {**rows[10], "output": "Art"}
    found = find_label_issues(load(tmp_path, [*rows, rows[10]]))
    assert {s.where.rpartition(":")[2] for s in found.issues} == {"11", "121"}


@pytest.mark.parametrize("rows", [classification_rows(3), [], as_rows(["a", "b", "c", "d", "e", "f"])])
def test_too_little_to_judge(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    files = load(tmp_path, rows)
    assert find_label_issues(files).judged == 0
    page = data_page(make_report(files, build_config({}), None))
    assert "Too few texts a label to judge any." in page


def test_judging_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_issues, "MAX_ROWS", 95)
    assert find_label_issues(load(tmp_path, classification_rows(120))).judged == 95


# --- tokens ---


def builder_for(rows: Rows, **prompt: Any) -> PromptBuilder:
    config = build_config({"task": rows.audit.task, "prompt": {"max_length": 512, **prompt}})
    task = make_task(config.task, rows.audit.label_set(), config.prompt)
    return PromptBuilder(task, ChatTemplate(make_tokenizer()))


@pytest.fixture
def cache(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "cache"))
    return in_folder


def long_rows() -> list[dict[str, Any]]:
    return [{**row, "text": row["text"] * (1 + 3 * (i % 4))} for i, row in enumerate(classification_rows(20))]


@pytest.mark.parametrize("layout", ["original", "labels_first"])
def test_the_token_account_adds_up(layout: str, cache: Path) -> None:
    (rows,) = load(cache, long_rows())
    builder = builder_for(rows, layout=layout, max_length=200)
    options = TrainingConfig.model_validate({"batch_size": 8, "max_tokens_per_pack": 600})
    figures = token_figures(rows.dataset, builder, options)
    encoded = [builder.training(rows.example(i)) for i in range(20)]
    prompts = [e.ids[: e.answer_span[0]] for e in encoded]
    prefix = next(i for i in itertools.count() if len({tuple(p[: i + 1]) for p in prompts}) > 1)
    _, account = tokenize_rows(rows.dataset, builder)
    assert figures.prefix_length == prefix and figures.prefix_tokens == 20 * prefix
    assert figures.text_tokens == sum(e.text_span[1] - max(e.text_span[0], prefix) for e in encoded)
    assert figures.answer_tokens == account.answer_tokens and figures.tokens == account.tokens
    assert (
        figures.prefix_tokens + figures.text_tokens + figures.other_tokens + figures.answer_tokens
        == figures.tokens
    )
    assert figures.shortened == account.shortened > 0
    assert figures.shortened == sum(e.text != rows.example(i).text for i, e in enumerate(encoded))
    assert sum(figures.cut_shares) == figures.shortened
    assert figures.cut_characters == sum(
        len(rows.example(i).text) - len(e.text) for i, e in enumerate(encoded)
    )
    steps = [
        [Row.of(encoded[i].ids, *encoded[i].answer_span) for i in numbers]
        for numbers in step_order(20, 8, options.seed, 0)
    ]
    for way in ("shared_prefix", "packed", "padded"):
        computed = sum(p.tokens(step, way) for step in steps for p in pack_step(step, 600, way)[0])  # type: ignore[arg-type]
        assert figures.computed[way] == computed
    assert figures.computed["packed"] == sum(len(row.ids) for step in steps for row in step)
    assert figures.speed_up > 1.1


def test_the_needed_budget_shortens_nothing(cache: Path) -> None:
    (rows,) = load(cache, long_rows())
    needed = token_figures(rows.dataset, builder_for(rows, max_length=200), TrainingConfig()).needed["max"]
    assert token_figures(rows.dataset, builder_for(rows, max_length=needed), TrainingConfig()).shortened == 0
    less = token_figures(rows.dataset, builder_for(rows, max_length=needed - 1), TrainingConfig())
    assert less.shortened > 0 and less.needed["max"] == needed


def test_entities_that_are_cut_away_are_counted(cache: Path) -> None:
    rows = [{**row, "text": row["text"] + "雨" * 400} for row in ner_rows(6)]
    for row in rows[:1]:
        row["text"] += "南京"
        row["entities"].append({**row["entities"][0], "entity_text": "雨南", "start_idx": -1, "end_idx": -1})
        start = row["text"].index("雨南")
        row["entities"][-1] |= {"start_idx": start, "end_idx": start + 2}
    (loaded,) = load(cache, rows, task="ner")
    figures = token_figures(loaded.dataset, builder_for(loaded, max_length=600), TrainingConfig())
    assert (figures.shortened, figures.cut_entities) == (6, 1)
    report = make_report(
        [loaded], build_config({"task": "ner", "prompt": {"max_length": 600}}), make_tokenizer()
    )
    assert "and 1 entities with them" in data_page(report)


def test_a_prompt_that_cannot_fit_is_said_on_the_page(cache: Path) -> None:
    files = load(cache, classification_rows(6))
    report = make_report(files, build_config({"prompt": {"max_length": 8}}), make_tokenizer())
    assert report.tokens is None and "raise prompt.max_length" in data_page(report)


# --- the page and the command ---


def test_texts_and_labels_are_escaped(cache: Path) -> None:
    evil = "<script>alert('x')</script>\"&"
    rows = [
        {**row, "text": f"{row['text']} {evil}", "category": [*LABELS[1:], evil], "output": evil}
        if row["output"] == LABELS[0]
        else row
        for row in classification_rows(30)
    ]
    rows[3]["output"] = "Art"
    config = build_config({"prompt": {"max_length": 512}})
    path = write_jsonl(
        cache / "<b>rows&.jsonl", [*rows, rows[0], {"text": evil, "output": f"{evil}2", "category": [evil]}]
    )
    checked = labeltune.check_data(config, str(path))
    page = data_page(make_report(checked, config, make_tokenizer()))
    assert evil not in page and page.count("<script") == 1 and "<b>" not in page
    assert page.count("&lt;script&gt;") > 10 and "&lt;b&gt;rows&amp;.jsonl" in page


def test_the_page_is_utf_8_whatever_the_path(cache: Path) -> None:
    (rows,) = load(cache, classification_rows(6))
    rows.audit.path = cache / "half\udcff.jsonl"
    data_page(make_report([rows], build_config({}), None)).encode("utf-8")


def test_the_command_writes_page_and_json(command: Any, cache: Path, model_folder: Path) -> None:
    rows = classification_rows(120)
    rows[10] = {**rows[10], "output": "Art"}
    write_jsonl(cache / "train.jsonl", rows)
    near = {**rows[0], "text": rows[0]["text"] + "!"}
    write_jsonl(cache / "test.jsonl", [near])
    found = command(
        "data", "check", "train.jsonl", "--test", "test.jsonl", "--json", "--report", "new/page.html"
    )
    assert found.code == 0, found.err
    report = json.loads(found.out)["report"]
    assert set(report) == {"near_duplicates", "suspects", "tokens", "no_tokens"}
    assert report["near_duplicates"]["across_files"] >= 1
    (across,) = [p for p in report["near_duplicates"]["listed"] if p["where"] == "test.jsonl:1"]
    assert across["like"] == "train.jsonl:1" and across["across"]
    assert "train.jsonl:11" in [s["where"] for s in report["suspects"]["listed"]]
    assert report["tokens"] is None and "--tokenizer FOLDER" in report["no_tokens"]
    assert found.err.endswith(f"to look at for their label; {report['no_tokens']}\n"), "the line says why"
    page = (cache / "new" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "--tokenizer FOLDER" in page
    assert found.err.splitlines()[-1].startswith("report: new/page.html: ")
    options = ("--tokenizer", str(model_folder), "--report", "page.html", "--json")
    report = json.loads(command("data", "check", "train.jsonl", *options).out)["report"]
    assert report["tokens"]["rows"] == 120 and report["tokens"]["speed_up"] > 1
    assert report["no_tokens"] is None


def test_a_config_has_its_validation_rows_compared_too(
    command: Any,
    cache: Path,
    model_folder: Path,
) -> None:
    rows = classification_rows(30)
    write_jsonl(cache / "train.jsonl", rows)
    write_jsonl(cache / "valid.jsonl", [{**rows[0], "text": rows[0]["text"] + "!"}, rows[3]])
    config = f"model: {model_folder}\nprompt: {{max_length: 512}}\ndata: {{train: train.jsonl, validation: valid.jsonl}}\n"
    (cache / "run.yaml").write_text(config)
    found = command("data", "check", "run.yaml", "--json", "--report", "page.html")
    assert found.code == 1, "a validation row stands in the training rows"
    values = json.loads(found.out)
    assert [fault["where"] for fault in values["faults"]] == ["valid.jsonl:2"]
    report = values["report"]
    assert report["tokens"]["rows"] == 30 and report["near_duplicates"]["across_files"] == 1
    assert report["near_duplicates"]["pairs_on_both_sides"] is None


def test_pairs_that_the_held_out_split_parts_are_counted(cache: Path) -> None:
    texts = sentences(40, 10, seed=7)
    (rows,) = load(cache, as_rows([*texts, *(text + "!" for text in texts)]))

    def split_pairs(**data: Any) -> int | None:
        config: RunConfig = build_config({"data": data})
        return make_report([rows], config, None).split_pairs

    assert split_pairs(validation_fraction=0) is None and split_pairs(validation="v.jsonl") is None
    assert 1 <= (split_pairs(validation_fraction=0.2) or 0) <= 16


@pytest.mark.parametrize("missing", ["datasketch", "cleanlab"])
def test_a_missing_extra_is_named(
    missing: str,
    command: Any,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest)
    )
    found = command("data", "check", "rows.jsonl", "--report", "page.html")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: labeltune data check --report needs an extra package")
    assert "pip install -c constraints.txt '.[audit]'" in found.err and not (in_folder / "page.html").exists()


@pytest.mark.parametrize("target", ["folder", "rows.jsonl/page.html"])
def test_a_report_that_cannot_be_written_is_said_at_once(
    target: str,
    command: Any,
    in_folder: Path,
) -> None:
    write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    (in_folder / "folder").mkdir()
    found = command("data", "check", "rows.jsonl", "--report", target)
    assert (found.code, found.out) == (2, "") and found.err.count("\n") == 1
    assert found.err.startswith("error: ") and "Traceback" not in found.err


def test_a_plain_check_loads_nothing_of_the_report(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", classification_rows(6))
    code = (
        "import sys; sys.argv = ['labeltune', 'data', 'check', 'rows.jsonl']\n"
        "from labeltune.commands.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "found = ('torch', 'datasketch', 'cleanlab', 'sklearn', 'labeltune.evaluation.data_report')\n"
        "print([name for name in found if name in sys.modules], file=sys.stderr)"
    )
    done = process(tmp_path, "-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_no_page_is_written_about_a_file_of_which_nothing_can_be_read(
    command: Callable[..., Any], in_folder: Path
) -> None:
    """Such a page looked like a clean result."""
    write_jsonl(in_folder / "rows.jsonl", [{"body": "a", "klass": "x"}] * 3)
    found = command("data", "check", "rows.jsonl", "--report", "page.html")
    assert found.code == 1 and "rows.jsonl: no row can be read, 1 error, 0 warnings" in found.out
    assert found.err == "no report was written, as rows.jsonl cannot be used\n"
    assert not (in_folder / "page.html").exists()
