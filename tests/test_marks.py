"""Answers as marks in the text: what is written is read, training's tokens are those that decoding walks, and nothing crosses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import make_tokenizer
from labeltune.config import PromptConfig
from labeltune.errors import DataError, PromptError
from labeltune.inference.mark_grammar import MarkGrammar, State
from labeltune.prompts import make_task
from labeltune.prompts.builder import PromptBuilder
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.marks import Mark, escape, marks_of, places, read, write
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Entity, Example

LABELS = ("地点", "a|b]")
NONE = "none"

CHARACTERS = st.one_of(
    st.sampled_from("[]|\\ \n\t{}\"'<|im_end|>０１南京大学é😀👩‍👩‍👧e\u0301\u200b\u2028각"),
    st.characters(),
)
TEXTS = st.builds(
    lambda part, times: (part * times)[:5000],
    st.text(CHARACTERS, min_size=1, max_size=60),
    st.sampled_from([1, 1, 3, 100]),
)
#: As a file holds them: no half surrogate pairs.
WRITABLE = st.builds(lambda text: "".join(c for c in text if not "\ud800" <= c <= "\udfff") or "x", TEXTS)


@st.composite
def nested_entities(draw: Any, text: str, labels: tuple[str, ...] = LABELS, most: int = 8) -> list[Entity]:
    """Entities of a text of which none cross."""
    found: list[Entity] = []
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(text) - 1))
        end = draw(st.integers(start + 1, min(len(text), start + 40)))
        entity = Entity(text[start:end], draw(st.sampled_from(labels)), start, end)
        try:
            marks_of([*found, entity])
        except DataError:
            continue
        if entity not in found:
            found.append(entity)
    return found


def spans(entities: Any) -> list[tuple[int, int, str]]:
    return sorted((e.start, e.end, e.label) for e in entities)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.data())
def test_every_text_with_entities_comes_back(text: str, data: st.DataObject) -> None:
    entities = data.draw(nested_entities(text))
    copy = read(write(text, entities))
    assert copy.text == text and copy.well_formed
    assert sorted(copy.spans) == spans(entities)
    assert places(copy.text, text) == [None if c.isspace() else at for at, c in enumerate(text)]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from("[]|\\a b"), st.characters()), max_size=200))
def test_any_answer_is_read(answer: str) -> None:
    copy = read(answer)
    assert all(0 <= start < end <= len(copy.text) and label for start, end, label in copy.spans)
    for one, other in itertools.combinations(copy.spans, 2):
        crossing = one[0] < other[0] < one[1] < other[1] or other[0] < one[0] < other[1] < one[1]
        assert not crossing
    for kind in ("flat", "nested"):
        task = make_task("ner", LABELS, PromptConfig(answer="marks"), kind)  # type: ignore[arg-type]
        prediction = task.parse(Example("0", "a b[c"), answer)
        for entity in prediction.entities or ():
            if entity.start is not None:
                assert "a b[c"[entity.start : entity.end] == entity.text


@pytest.mark.parametrize(
    ("answer", "found", "parsed"),
    [
        ("Mara left [Oslo|地点].", [(10, 14, "地点")], True),
        ("[Mara|地点] left [Oslo|地点].", [(0, 4, "地点"), (10, 14, "地点")], True),
        (
            "Mara  left[ Oslo|地点] .",
            [(10, 14, "地点")],
            True,
        ),  # blanks are not what was asked for, and do no harm
        ("none", [], True),
        ("Mara left Oslo.", [], True),
        ("Mara left [Oslo|Stadt].", [], False),
        ("Mara left [Oslo].", [], False),
        ("Mara left [Oslo|地点", [], False),
        ("Mara left [Oslo|地点] and [", [(10, 14, "地点")], False),
        ("Mary left [Oslo|地点].", [(10, 14, "地点")], False),  # both ends agree
        ("Mary left [Oslo|地点]!", [], False),
        ("[[Oslo|地点]|地点]", [], False),
        ("", [], False),
    ],
)
def test_answers_of_free_decoding(answer: str, found: list[Any], parsed: bool) -> None:
    task = make_task("ner", LABELS, PromptConfig(answer="marks", no_entities=NONE), "nested")
    prediction = task.parse(Example("0", "Mara left Oslo."), answer)
    assert spans(e for e in prediction.entities or () if e.start is not None) == found
    assert prediction.parsed == parsed


def test_a_flat_run_reads_outer_entities_only() -> None:
    answer = "[[Oslo|地点] Opera|a\\|b\\]]"
    for kind, count, parsed in (("flat", 1, False), ("nested", 2, True)):
        task = make_task("ner", LABELS, PromptConfig(answer="marks"), kind)  # type: ignore[arg-type]
        prediction = task.parse(Example("0", "Oslo Opera"), answer)
        assert (len(prediction.entities or ()), prediction.parsed) == (count, parsed)


def test_what_cannot_be_marked_is_one_error() -> None:
    task = make_task("ner", LABELS, PromptConfig(answer="marks"), "nested")
    crossed = (Entity("ab", "地点", 0, 2), Entity("bc", "地点", 1, 3))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: 'ab' at 0:2 and 'bc' at 1:3 cross"):
        task.target(Example("0", "abc", entities=crossed, source="rows.jsonl:3"))
    with pytest.raises(DataError, match="'x' has no place"):
        task.target(Example("0", "abc", entities=(Entity("x", "地点"),)))


class World:
    def __init__(self, lead: str = "", labels: tuple[str, ...] = LABELS) -> None:
        self.tokenizer = make_tokenizer()
        self.template = ChatTemplate(self.tokenizer)
        self.template.answer_lead = lead
        self.tokens = MarkTokens(self.template, labels, NONE)
        self.end = self.template.end_of_turn_ids[0]

    def grammar(self, text: str, nested: bool = True, parts: Any = None) -> MarkGrammar:
        shown = Shown(text, parts or ((0, 0, len(text)),))
        return MarkGrammar(self.tokens, self.tokens.units(shown), nested, self.end)

    def walk(self, grammar: MarkGrammar, ids: list[int]) -> tuple[Mark, ...]:
        """The marks of an answer that the grammar allows, token by token."""
        state = grammar.start()
        for token in ids:
            assert token in grammar.allowed(state)
            state = grammar.after(state, token)
        last = grammar.ended(state, self.end)
        assert last is not None
        return last[0].marks


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@settings(max_examples=150, deadline=None)
@given(WRITABLE, st.data())
def test_training_writes_what_decoding_walks(world: World, text: str, data: st.DataObject) -> None:
    """Every entity of any text can be reached, whatever tokens it begins and ends in."""
    entities = data.draw(nested_entities(text))
    shown = Shown(text, ((0, 0, len(text)),))
    ids = world.tokens.answer(shown, entities)
    marks = world.walk(world.grammar(text), ids)
    assert sorted((m.start, m.at, m.label) for m in marks if m.label) == spans(entities)
    if entities:
        written = "".join(escape(text[u.start : u.end]) for u in world.tokens.units(shown).units)
        assert written == escape(text)
        decoded = world.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        normal = world.tokenizer.backend_tokenizer.normalizer.normalize_str
        # The normalizer composes characters; a mark between two of them keeps them apart.
        assert normal(read(decoded).text) == normal(text)
        plain = [token for unit in world.tokens.units(shown).units for token in unit.ids]
        assert plain == world.template.plain_ids(escape(text))


@settings(max_examples=60, deadline=None)
@given(WRITABLE, st.booleans(), st.data())
def test_a_random_walk_ends_and_is_canonical(
    world: World, text: str, nested: bool, data: st.DataObject
) -> None:
    """No choice leads into a dead end, nothing crosses, and the same marks are always the same tokens."""
    text = text[:200]
    grammar = world.grammar(text, nested)
    random = data.draw(st.randoms(use_true_random=False))
    state, ids, last = grammar.start(), [], None
    while last is None and len(ids) < 4 * len(text.encode()) + 60:
        allowed = grammar.allowed(state)
        further = grammar.going_on(state)
        token = further if further is not None and random.random() < 0.5 else random.choice(allowed)
        last = grammar.ended(state, token)
        if last is None:
            ids.append(token)
            state = grammar.after(state, token)
    if last is None or last[1]:
        return
    marks = last[0].marks
    assert [token for piece, _ in world.tokens.path(grammar.units, marks) for token in piece] == ids
    entities = [Entity(text[m.start : m.at], m.label, m.start, m.at) for m in marks if m.label]
    assert len(set(spans(entities))) == len(entities) and all(e.text for e in entities)
    marks_of(entities)
    if not nested:
        assert all(
            a.end <= b.start for a, b in itertools.pairwise(sorted(entities, key=lambda e: e.start or 0))
        )  # type: ignore[operator]


def sequences(grammar: MarkGrammar, end: int, most: int) -> dict[tuple[int, ...], tuple[Mark, ...]]:
    """Every answer with at most so many entities, and its marks, by trying all tokens."""
    found: dict[tuple[int, ...], tuple[Mark, ...]] = {}
    waiting: list[tuple[tuple[int, ...], State]] = [((), grammar.start())]
    while waiting:
        ids, state = waiting.pop()
        for token in grammar.allowed(state):
            last = grammar.ended(state, token)
            if last is not None:
                found[ids] = last[0].marks
                continue
            further = grammar.after(state, token)
            if min(sum(m.label is None for m in each.place.marks) for each in further) <= most:
                waiting.append(((*ids, token), further))
    return {ids: marks for ids, marks in found.items() if sum(m.label is None for m in marks) <= most}


@pytest.mark.parametrize("text", ["a b", "ab[", "南京", " a", "a  b", "é😀"])
@pytest.mark.parametrize("nested", [True, False])
def test_the_grammar_holds_every_answer_and_no_other(world: World, text: str, nested: bool) -> None:
    """Against a list of all sets of at most two entities of a short text."""
    grammar = world.grammar(text, nested)
    every = [
        Entity(text[a:b], label, a, b)
        for a, b in itertools.combinations(range(len(text) + 1), 2)
        for label in LABELS
    ]
    wanted = {}
    for count in range(3):
        for chosen in itertools.combinations(every, count):
            try:
                marks = marks_of(chosen)
            except DataError:
                continue
            flat = all(a.end <= b.start or b.end <= a.start for a, b in itertools.combinations(chosen, 2))  # type: ignore[operator]
            if nested or flat:
                pieces = world.tokens.path(grammar.units, marks)
                wanted[tuple(token for ids, _ in pieces for token in ids)] = tuple(marks)
    found = sequences(grammar, world.end, 2)
    sentence = world.tokens.none
    assert found.pop(sentence) == ()
    # Of two labels at one place either may be the outer one; training writes them in one order.
    other_order = {ids for ids, marks in found.items() if ids not in wanted}
    for ids in other_order:
        ended = [(m.start, m.at) for m in found[ids] if m.label]
        assert len(set(ended)) == 1 and len(ended) == 2
    assert {ids: found[ids] for ids in found if ids not in other_order} == wanted


def test_entities_lie_in_what_is_shown(world: World) -> None:
    """A text shortened in its middle: nothing is marked across the gap."""
    parts = ((0, 0, 2), (3, 7, 9))
    grammar = world.grammar("ab…cd", parts=parts)
    for marks in sequences(grammar, world.end, 1).values():
        for mark in marks:
            assert mark.label is None or not mark.start <= 2 < mark.at
    shown = Shown("ab…cd", parts)
    inside = shown.inside([Entity("b", "地点", 1, 2), Entity("x", "地点", 3, 4), Entity("cd", "地点", 7, 9)])
    assert spans(inside) == [(1, 2, "地点"), (3, 5, "地点")]
    assert [shown.in_document(at) for at in (0, 1, 3, 5)] == [0, 1, 7, 9]


def test_a_blank_in_front_of_an_entity_goes_with_its_mark(world: World) -> None:
    shown = Shown("left Oslo", ((0, 0, 9),))
    ids = world.tokens.answer(shown, [Entity("Oslo", "地点", 5, 9)])
    blank_and_mark = tuple(world.template.plain_ids(" ["))
    assert world.tokens.open_behind_blank == blank_and_mark
    at = len(world.template.plain_ids("left"))
    assert tuple(ids[at : at + len(blank_and_mark)]) == blank_and_mark


def test_the_space_in_front_of_an_answer_is_no_part_of_it() -> None:
    world = World(lead=" ")
    shown = Shown("Oslo x", ((0, 0, 6),))
    ids = world.tokens.answer(shown, [Entity("Oslo", "地点", 0, 4)])
    marks = world.walk(world.grammar("Oslo x"), ids)
    assert [(m.start, m.at) for m in marks if m.label] == [(1, 5)], "behind the space"
    assert world.tokenizer.decode(ids) == " [Oslo|地点] x"


def test_a_tokenizer_without_marks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(ChatTemplate, "plain_ids", lambda *_: [])
    with pytest.raises(PromptError, match=r"cannot write the marks.*prompt\.answer=json"):
        MarkTokens(world.template, LABELS, NONE)


def builder_for(max_length: int = 400, kind: Any = "nested", **prompt: Any) -> PromptBuilder:
    config = PromptConfig(
        system="Mark {labels}.",
        user="{text}",
        answer="marks",
        max_length=max_length,
        no_entities=NONE,
        **prompt,
    )
    return PromptBuilder(make_task("ner", LABELS, config, kind), ChatTemplate(make_tokenizer()))


def test_a_training_row_is_the_prompt_the_copy_and_the_end_of_turn() -> None:
    builder = builder_for()
    example = Example("0", "Mara left Oslo.", entities=(Entity("Oslo", "地点", 10, 14),))
    encoded = builder.training(example)
    prompt = builder.prompt(example)
    assert encoded.ids[: len(prompt.ids)] == prompt.ids
    answer = encoded.ids[slice(*encoded.answer_span)]
    tokenizer = builder.template.tokenizer
    assert tokenizer.decode(answer) == "Mara left [Oslo|地点].<|im_end|>"
    assert encoded.labels()[encoded.answer_span[0] :][: len(answer)] == answer
    none = builder.training(Example("0", "Mara left.", entities=()))
    assert tokenizer.decode(none.ids[slice(*none.answer_span)]) == "none<|im_end|>"


@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail"])
def test_a_long_text_is_copied_as_far_as_it_is_shown(truncation: Any) -> None:
    builder = builder_for(120, truncation=truncation)
    text = " ".join(f"word{n}" for n in range(60))
    entities = tuple(
        Entity(f"word{n}", "地点", text.index(f"word{n}"), text.index(f"word{n}") + len(f"word{n}"))
        for n in range(30, 60)
    )
    example = Example("0", text, entities=entities)
    encoded = builder.training(example)
    assert len(encoded.ids) <= 120 and encoded.excess > 0
    answer = builder.template.tokenizer.decode(encoded.ids[slice(*encoded.answer_span)])
    shown = builder.prompt(Example("0", encoded.text)).text
    assert shown == encoded.text, "prediction shows as much"
    cut = builder.cut_entities(example, encoded)
    kept = read(answer.removesuffix("<|im_end|>"))
    if cut == len(entities):
        assert answer == "none<|im_end|>"
    else:
        assert kept.text == encoded.text and len(kept.spans) == len(entities) - cut
    assert (truncation == "head") == (cut == len(entities))


def test_windows_are_copied_one_by_one() -> None:
    builder = builder_for(100)
    text = " ".join(f"word{n}" for n in range(60))
    views = builder.views(Example("0", text), "window")
    assert len(views) > 2
    for view in views:
        ((start, end),) = view.parts
        assert text[start:end] == view.text


def test_a_row_needs_room_for_no_answer_but_the_sentence() -> None:
    builder = builder_for()
    example = Example("0", "x" * 200, entities=(Entity("x" * 200, "地点", 0, 200),))
    assert builder.least(example) == builder.least(Example("0", "", entities=()))
