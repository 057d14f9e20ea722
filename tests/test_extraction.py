"""Constrained extraction: whatever the weights and whatever the document, the answer parses and nothing is invented."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import CACHE_KINDS, HYBRID_KINDS, MODEL_KINDS, make_model, make_tokenizer
from labeltune.errors import ModelError
from labeltune.inference.engine import Engine
from labeltune.inference.extraction import Grammars, escape_units, extract, nothing_left, occurrences
from labeltune.inference.runners import CacheRunner, PlainRunner, Runner, SegmentRunner
from labeltune.inference.scoring import own_prefix, segment_prefix

LABELS = ["地点", 'a "quoted" label', "组织"]
NONE = "没有找到任何实体"


class World:
    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.size = len(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, LABELS, NONE, self.size)
        self.end = [self.tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def prompt(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer("find " + text[:40] + " :", add_special_tokens=False).input_ids
        return ids

    def run(
        self, model: Any, documents: list[tuple[str, ...]], runner: Runner | None = None, **options: int
    ) -> Any:
        runner = runner or SegmentRunner(model, segment_prefix(), 500)
        limits = {"max_new_tokens": 60, "batch_size": 4, **options}
        prompts = [(self.prompt("".join(pieces)), pieces) for pieces in documents]
        return extract(runner, self.grammars, self.end, prompts, **limits)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_space_in_front_of_an_answer_is_decoded_and_left_out(world: World) -> None:
    """Templates that begin answers with one (Mistral): training has a token of it and the first character."""
    space = world.tokenizer(" ", add_special_tokens=False).input_ids
    grammars = Grammars(world.tokenizer, LABELS, NONE, world.size, lead=" ")
    model = make_model(world.size)
    pieces = ("南京 in rain",)
    for runner in (
        PlainRunner(model),
        CacheRunner(model, own_prefix(), 500),
        SegmentRunner(model, segment_prefix(), 500),
    ):
        (found,) = extract(
            runner, grammars, world.end, [(world.prompt(pieces[0]), pieces)], max_new_tokens=60, batch_size=1
        )
        check(found.answer, pieces)
    for first, allowed in ((True, True), (False, False)):
        assert bool(grammars.matcher(pieces, (), first=first).validate_tokens(space)) == allowed
    answer = world.tokenizer(f" {NONE}", add_special_tokens=False).input_ids
    matcher = grammars.matcher(pieces, (), first=True)
    assert matcher.validate_tokens(answer) == len(answer)


def check(answer: str, pieces: tuple[str, ...]) -> int:
    """Number of entities of an answer that is right in form."""
    if answer in ("", NONE):
        return 0
    given: dict[str, int] = {}
    for line in answer.split("\n"):
        value = json.loads(line)
        assert list(value) == ["entity_text", "entity_label"]
        assert line == json.dumps(value, ensure_ascii=False), "the form that training uses"
        assert value["entity_label"] in LABELS
        text = value["entity_text"]
        assert text and any(text in piece for piece in pieces)
        given[text] = given.get(text, 0) + 1
    for text, count in given.items():
        assert count <= occurrences(pieces, text)
    return len(answer.split("\n"))


ALPHABET = st.one_of(
    st.sampled_from('"\\/\n\t\r\x00\x1f\x7f{}[]:,<|im_end|>０１２南京大学😀👩‍👩‍👧é\u2028'),
    st.characters(exclude_categories=["Cs"]),
)


DOCUMENTS = st.lists(
    st.builds(
        lambda part, times: (part * times)[:5000],
        st.text(ALPHABET, min_size=1, max_size=60),
        st.sampled_from([1, 1, 3, 100]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), DOCUMENTS)
def test_nothing_is_invented(world: World, seed: int, documents: list[str]) -> None:
    model = make_model(world.size, seed=seed).eval()
    for text, found in zip(documents, world.run(model, [(d,) for d in documents]), strict=True):
        lines = check(found.answer, (text,))
        assert len(found.scores) == lines or found.answer == NONE
        assert found.truncated or found.answer


@pytest.mark.parametrize("length", [1, 2, 1000, 5000])
def test_short_and_long_documents(length: int, world: World) -> None:
    text = ('南京 "大学" \\ 😀\n' * 500)[:length]
    model = make_model(world.size, seed=3).eval()
    (found,) = world.run(model, [(text,)], max_new_tokens=300)
    check(found.answer, (text,))


def test_entities_are_found_with_a_model_that_wants_them(world: World) -> None:
    """Weights that never end the turn: as many lines as fit or as the document has parts."""
    model = make_model(world.size).eval()
    (found,) = world.run(model, [("ab",)], max_new_tokens=2000)
    assert check(found.answer, ("ab",)) in (0, 1, 2, 3)
    assert not found.truncated


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "gemma3", *HYBRID_KINDS, *CACHE_KINDS])
def test_side_by_side_equals_one_by_one(kind: str, world: World) -> None:
    """Rows of different lengths, entering and leaving a batch of two, against transformers' own cache of one row."""
    documents = [
        (text,) for text in ("他在南京大学。", "a", 'say "hi" \\ twice', "今天下雨 " * 8, "x y z", "😀😀")
    ]
    model = make_model(world.size, kind, seed=5).eval()
    right = world.run(model, documents, PlainRunner(model), batch_size=1)
    runners: list[Runner] = [CacheRunner(model, own_prefix(), 500), CacheRunner(model, own_prefix(), 1)]
    if kind in MODEL_KINDS:
        runners.append(SegmentRunner(model, segment_prefix(), 500))
    for runner, size in itertools.product(runners, (1, 2, 6)):
        found = world.run(model, documents, runner, batch_size=size)
        assert [f.answer for f in found] == [r.answer for r in right]
        assert [f.truncated for f in found] == [r.truncated for r in right]
        for f, r in zip(found, right, strict=True):
            assert f.scores == pytest.approx(r.scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "lfm2", "mamba2"])
def test_the_engine_finds_the_own_cache(kind: str, world: World) -> None:
    model = make_model(world.size, kind, seed=5).eval()
    prompts = [(world.prompt(text), (text,)) for text in ("他在南京大学。", "a", "x y z")]
    limits = {"max_new_tokens": 40, "batch_size": 3}
    right = extract(PlainRunner(model), world.grammars, world.end, prompts, **limits)
    with pytest.warns(UserWarning, match="prediction uses the model's own cache"):
        found = Engine(model).decode(
            [prompt for prompt, _ in prompts],
            lambda runner: extract(runner, world.grammars, world.end, prompts, **limits),
        )
    assert [f.answer for f in found] == [r.answer for r in right]


def test_a_model_without_a_cache_is_refused(world: World) -> None:
    model = make_model(world.size).eval()

    def drop(_: Any, __: Any, output: Any) -> Any:
        output.past_key_values = None
        return output

    model.register_forward_hook(drop)
    with pytest.raises(ModelError, match=r"returns no cache.*generation\.decoding=free"):
        world.run(model, [("ab",)], PlainRunner(model))


def test_a_bounded_answer_is_closed_and_says_so(world: World) -> None:
    model = make_model(world.size, seed=1).eval()
    text = "abcdefghij" * 30
    cut = [world.run(model, [(text,)], max_new_tokens=n)[0] for n in (1, 5, 20, 60, 200)]
    assert any(found.truncated for found in cut)
    for found in cut:
        check(found.answer, (text,))


def test_an_entity_lies_in_one_piece(world: World) -> None:
    """Of a text shortened in the middle, nothing is found across the gap."""
    pieces = ("ab", "cd")
    for seed in range(8):
        model = make_model(world.size, seed=seed).eval()
        (found,) = world.run(model, [pieces], max_new_tokens=400)
        check(found.answer, pieces)
        assert "abc" not in found.answer and "bc" not in found.answer


def test_a_text_without_characters_has_no_entity(world: World) -> None:
    model = make_model(world.size).eval()
    assert [f.answer for f in world.run(model, [("",), ()])] == [NONE, NONE]


def test_units_are_whole_escapes() -> None:
    assert escape_units('a"\n\x01南') == ["a", '\\"', "\\n", "\\u0001", "南"]
    assert json.loads('"' + "".join(escape_units('a"\n\x01南')) + '"') == 'a"\n\x01南'


def test_occurrences_are_counted_as_a_string_counts() -> None:
    assert occurrences(("aaa", "aa"), "aa") == 2
    assert nothing_left(("aa",), ["a", "aa"]) and not nothing_left(("aa",), ["a"])
    assert not nothing_left(("ab",), ["a", "b"])
