"""Decoding marks many tokens a pass, against plain greedy decoding: the whole row through the model for every token."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.packing import VOCABULARY, assert_equal, lora_model, packed, plain
from helpers.runs import predictor_for
from helpers.tiny_models import CACHE_KINDS, HYBRID_KINDS, MODEL_KINDS, make_model, make_tokenizer
from labeltune.config import PromptConfig
from labeltune.errors import ModelError
from labeltune.inference.engine import Engine
from labeltune.inference.extraction import without_crossing
from labeltune.inference.mark_grammar import MarkGrammar
from labeltune.inference.marked import Marked, Question, extract_marked
from labeltune.inference.runners import CacheRunner, PlainRunner, Runner, SegmentRunner
from labeltune.inference.scoring import own_prefix, segment_prefix
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.marks import Mark, read
from labeltune.prompts.template import ChatTemplate
from labeltune.training.packing import Row, pack_step
from labeltune.types import Entity, Example

LABELS = ("地点", "PER", "a|b]")
DOCUMENTS = (
    "The rocket landed on the platform at sea. Engineers inspect the turbine.",
    "a",
    "他在南京大学学习。今天下雨",
    "say [hi] | \\ twice 😀é",
    "x y z",
    "Mara left Oslo and joined the Red Cross in Geneva " * 3,
)


@dataclass
class Plain:
    """What plain greedy decoding finds."""

    marks: tuple[Mark, ...]
    none: bool
    truncated: bool
    scores: dict[tuple[int, int, str | None], float] = field(default_factory=dict)


class World:
    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.size = len(self.tokenizer)
        self.tokens = MarkTokens(ChatTemplate(self.tokenizer), LABELS, "none")
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def model(self, kind: str, seed: int = 0, patience: float = 0.0) -> Any:
        """Random weights that like long tokens the more, the larger `patience` is: text goes on for a while between marks; from 1 on, no mark comes."""
        model = make_model(self.size, kind, seed=seed).eval()
        texts = [self.tokenizer.decode([token]) for token in range(self.size)]
        liked = torch.tensor([patience * min(len(text), 4 if patience < 1 else 99) for text in texts])
        liked[self.tokens.none[0]] -= 1
        if patience >= 1:
            liked[[self.tokens.open[0], self.tokens.open_behind_blank[0], self.tokens.none[0]]] = -99
        model.get_output_embeddings().register_forward_hook(lambda _, __, output: output + liked.to(output))
        return model

    def question(self, text: str) -> Question:
        ids = self.tokenizer("mark " + text[:40] + " :", add_special_tokens=False).input_ids
        return Question(ids, Shown(text, ((0, 0, len(text)),)))

    def run(self, runner: Runner, texts: Any, nested: bool = True, **options: int) -> list[Marked]:
        limits = {"max_new_tokens": 60, "batch_size": 4, **options}
        questions = [self.question(text) for text in texts]
        return extract_marked(runner, self.tokens, questions, nested=nested, end=self.end, **limits)  # type: ignore[arg-type]

    def plain(self, model: Any, text: str, nested: bool = True, limit: int = 60) -> Plain:
        """One token after the other; the whole row goes through the model for each."""
        question = self.question(text)
        grammar = MarkGrammar(self.tokens, self.tokens.units(question.shown), nested, self.end)
        state, ids, logs = grammar.start(), [], []
        room = max(grammar.units.length, len(self.tokens.none)) + limit
        while True:
            allowed = grammar.allowed(state)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*question.ids, *ids]])).logits[0, -1].float()
            token = max(allowed, key=lambda each: float(logits[each]))
            logs.append(float(logits.log_softmax(-1)[token]) if len(allowed) > 1 else 0.0)
            last = grammar.ended(state, token)
            if last is not None:
                return Plain(last[0].marks, last[1], False, self._scores(grammar, last[0].marks, logs))
            if len(ids) == room:
                marks = state[0].place.marks
                return Plain(marks, False, True, self._scores(grammar, marks, logs))
            ids.append(token)
            state = grammar.after(state, token)

    def _scores(self, grammar: MarkGrammar, marks: tuple[Mark, ...], logs: list[float]) -> dict[Any, float]:
        sums, at = [0.0] * len(marks), 0
        for piece, owner in self.tokens.path(grammar.units, marks):
            if owner is not None:
                sums[owner] += sum(logs[at : at + len(piece)])
            at += len(piece)
        found, opened = {}, []
        for number, mark in enumerate(marks):
            if mark.label is None:
                opened.append(number)
            else:
                found[mark.start, mark.at, mark.label] = sums[opened.pop()] + sums[number]
        return found

    def check(self, found: Marked, right: Plain) -> None:
        assert (found.none, found.truncated) == (right.none, right.truncated)
        assert {(e.start, e.end, e.label) for e in found.entities} == set(right.scores)
        for entity in found.entities:
            assert entity.score == pytest.approx(
                right.scores[entity.start, entity.end, entity.label], abs=2e-3
            )


@pytest.fixture(scope="module")
def world() -> World:
    return World()


KINDS = ("qwen2", "qwen3", "llama", "gemma3", *HYBRID_KINDS, "gemma2", "granitemoehybrid")


@pytest.mark.parametrize(
    ("kind", "nested"), [*((kind, True) for kind in KINDS), ("qwen2", False), ("lfm2", False)]
)
def test_it_is_plain_greedy_decoding(kind: str, nested: bool, world: World) -> None:
    """Rows of different lengths that enter and leave a batch, in every way to run the model."""
    model = world.model(kind, seed=5, patience=0.12)
    right = [world.plain(model, text, nested) for text in DOCUMENTS]
    assert any(each.scores for each in right)
    runners: list[Runner] = [
        PlainRunner(model),
        CacheRunner(model, own_prefix(), 600),
        CacheRunner(model, own_prefix(), 1),
    ]
    if kind in MODEL_KINDS:
        runners += [SegmentRunner(model, segment_prefix(), 600), SegmentRunner(model, segment_prefix(), 1)]
    for runner, size in itertools.product(runners, (1, 3)):
        found = world.run(runner, DOCUMENTS, nested, batch_size=size)
        for each, other in zip(found, right, strict=True):
            world.check(each, other)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=3
    ),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([1, 3, 64]),
)
def test_any_text_with_any_weights(
    world: World, seed: int, texts: list[str], patience: float, lookahead: int
) -> None:
    model = world.model("qwen2", seed, patience)
    runner = SegmentRunner(model, segment_prefix(), 500)
    runner.lookahead = lookahead
    for text, found in zip(texts, world.run(runner, texts), strict=True):
        world.check(found, world.plain(model, text))
        for entity in found.entities:
            assert text[entity.start : entity.end] == entity.text


def test_passes_grow_with_the_marks_and_not_with_the_tokens(world: World) -> None:
    model = world.model("qwen2", patience=2.0)
    text = "The rocket landed on the platform at sea. " * 20
    (found,) = world.run(SegmentRunner(model, segment_prefix(), 2000), [text])
    (plain,) = world.run(PlainRunner(model), [text])
    assert not found.entities and not plain.entities
    units = world.tokens.units(world.question(text).shown)
    assert found.passes <= units.length // 16 + 2 and plain.passes > units.length / 2


@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_too_many_marks_are_cut_off_where_plain_decoding_stops(limit: int, world: World) -> None:
    for seed in range(4):
        model = world.model("qwen2", seed=seed)
        for text in DOCUMENTS[:4]:
            right = world.plain(model, text, limit=limit)
            for runner in (SegmentRunner(model, segment_prefix(), 500), PlainRunner(model)):
                (found,) = world.run(runner, [text], max_new_tokens=limit)
                world.check(found, right)


def test_probabilities_of_beginnings(world: World) -> None:
    """Of every place that was passed over: that of an opening mark there, by plain passes."""
    model = world.model("qwen2", patience=2.0)
    text = "The rocket landed at sea"
    (found,) = world.run(SegmentRunner(model, segment_prefix(), 500), [text])
    question = world.question(text)
    units = world.tokens.units(question.shown)
    assert not found.entities
    ids = list(question.ids)
    for unit in units.units:
        with torch.inference_mode():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        for place, mark in (
            (unit.start, world.tokens.open),
            (unit.start + 1, world.tokens.open_behind_blank),
        ):
            if mark is world.tokens.open or (text[unit.start] == " " and unit.end > unit.start + 1):
                assert found.begins[place] == pytest.approx(math.exp(float(row[mark[0]])), rel=1e-3)
        ids += unit.ids


@pytest.mark.parametrize("kind", ["gemma2", "lfm2"])
def test_the_engine_decodes_marks_through_the_own_cache(kind: str, world: World) -> None:
    model = world.model(kind, seed=5, patience=0.1)
    questions = [world.question(text) for text in DOCUMENTS[:3]]
    with pytest.warns(UserWarning, match="prediction uses the model's own cache"):
        found = Engine(model).decode(
            [question.ids for question in questions],
            lambda runner: extract_marked(
                runner, world.tokens, questions, nested=True, end=world.end, max_new_tokens=60, batch_size=3
            ),
        )
    for each, text in zip(found, DOCUMENTS, strict=False):
        world.check(each, world.plain(model, text))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen3_5"])
def test_packed_rows_of_marks_train_as_single_rows(kind: str) -> None:
    config = PromptConfig(system="Mark {labels}.", user="{text}", answer="marks", no_entities="none")
    builder = PromptBuilder(make_task("ner", LABELS, config, "nested"), ChatTemplate(make_tokenizer()))
    rows = []
    for text in DOCUMENTS:
        entities = tuple(Entity(text[a : a + 3], "PER", a, a + 3) for a in range(0, len(text) - 3, 7))
        encoded = builder.training(Example("0", text, entities=entities))
        assert len(read(builder.task.target(Example("0", text, entities=entities))).spans) == len(entities)
        rows.append(Row.of([token % (VOCABULARY - 3) + 3 for token in encoded.ids], *encoded.answer_span))
    model = lora_model(kind)
    packing: Any = "shared_prefix" if kind in MODEL_KINDS else "shared_cache"
    packs = pack_step(rows, 10_000, packing)[0]
    assert any(group.prefix for pack in packs for group in pack.groups)
    assert_equal(packed(model, rows, packs, packing, None), plain(model, rows), rtol=1e-4)


def marked_predictor(kind: Any = "nested", **options: Any) -> Any:
    predictor = predictor_for("ner", prompt={"answer": "marks", **options.pop("prompt", {})}, **options)
    task = make_task("ner", predictor.task.labels, predictor.task.prompt, kind)
    predictor.task, predictor.builder = task, PromptBuilder(task, predictor.template)
    return predictor


def test_a_predictor_answers_with_marks() -> None:
    predictor = marked_predictor(max_new_tokens=30)
    assert predictor.entities == "nested"
    texts = ["他在南京大学。", "say [hi] twice", "a"]
    for text, prediction in zip(texts, predictor.predict(texts), strict=True):
        again = predictor.task.parse(Example("0", text), prediction.answer)
        assert [(e.start, e.end, e.label) for e in prediction.entities] == [
            (e.start, e.end, e.label) for e in again.entities
        ]
        assert again.parsed
        for entity in prediction.entities:
            assert text[entity.start : entity.end] == entity.text and entity.score <= 0
    for text, places in zip(texts, predictor.spans(texts), strict=True):
        assert 0 in places and all(0 <= at < len(text) and 0 <= p <= 1 for at, p in places.items())
    with pytest.raises(ModelError, match=r"prompt\.answer=marks"):
        predictor_for("ner").spans(texts)


def test_long_texts_are_read_in_windows() -> None:
    text = "The rocket landed on the platform at sea. " * 12
    short = marked_predictor(max_length=220, max_new_tokens=20)
    (prediction,) = short.predict([text])
    assert len(read(prediction.answer).text) < len(text), "only what is shown is copied"
    windows = marked_predictor(max_length=220, max_new_tokens=20, long_text="window")
    (prediction,) = windows.predict([text])
    copy = read(prediction.answer)
    assert copy.well_formed and (copy.text == text or not prediction.entities)
    for entity in prediction.entities:
        assert text[entity.start : entity.end] == entity.text
    assert max(windows.spans([text])[0]) > 200


def test_free_decoding_has_room_for_the_copy() -> None:
    predictor = marked_predictor(decoding="free", max_new_tokens=7)
    text = "The rocket landed on the platform at sea."
    copied = len(predictor.template.plain_ids(text))
    assert predictor._max_new_tokens([Example("0", text)]) == copied + 7
    (prediction,) = predictor.predict([text])
    assert prediction.entities is not None


def test_entities_of_windows_that_cross_are_left_out() -> None:
    first = [Entity("ab", "A", 0, 2, -0.1), Entity("abc", "A", 0, 3, -0.5), Entity("ab", "B", 0, 2, -0.3)]
    second = [Entity("bcd", "A", 1, 4, -0.2), Entity("ab", "A", 0, 2, -0.4)]
    nested = without_crossing([first, second], nested=True)
    assert [(e.start, e.end, e.label, e.score) for e in nested] == [
        (0, 2, "A", -0.1),
        (0, 2, "B", -0.3),
        (0, 3, "A", -0.5),
    ]
    assert [(e.start, e.end, e.label) for e in without_crossing([first, second], nested=False)] == [
        (0, 2, "A")
    ]


@pytest.mark.parametrize("kind", [*CACHE_KINDS])
def test_kinds_with_states_and_caps(kind: str, world: World) -> None:
    model = world.model(kind, seed=3, patience=0.1)
    texts = DOCUMENTS[:3]
    right = world.run(PlainRunner(model), texts, batch_size=1)
    found = world.run(CacheRunner(model, own_prefix(), 600), texts, batch_size=3)
    assert [each.entities for each in found] == [each.entities for each in right]
