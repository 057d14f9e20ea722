"""Label scoring against brute force: one plain forward pass for every label."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import CACHE_KINDS, HYBRID_KINDS, make_model
from labeltune.inference.engine import Engine, predicting, questions_to_check
from labeltune.inference.scoring import (
    LabelTrie,
    Question,
    own_prefix,
    plan_passes,
    score_answers,
    score_by_cache,
    score_one_by_one,
    score_side_by_side,
    segment_prefix,
)
from labeltune.models import precision, tree_attention
from labeltune.models.own_cache import OwnCache

VOCABULARY = 300
END = 2


def brute_force(model: Any, question: Question) -> list[float]:
    """Nothing of labeltune but the paths of the trie."""
    scores = []
    for path in question.trie.paths:
        answer = [token for _, token in path]
        ids = torch.tensor([[*question.prompt, *answer]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(question.prompt) - 1 : -1].double()
        scores.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
    return scores


def decided(model: Any) -> Any:
    """Weights that make answers as certain as training does."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model


def questions(
    seed: int, count: int = 12, labels: int = 5, shared: tuple[int, ...] = (15, 9)
) -> list[Question]:
    """Prompts behind common beginnings; labels of 1 to 5 tokens, beginnings of each other among them."""
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(3, VOCABULARY) for _ in range(generator.randint(low, high))]

    heads = [tokens(length, length) for length in shared]
    found = []
    for number in range(count):
        answers = {(*tokens(1, 4), END) for _ in range(labels)}
        longest = max(answers, key=len)
        answers |= {(*longest[:k], END) for k in range(1, len(longest) - 1)}
        found.append(Question(heads[number % len(heads)] + tokens(1, 20), LabelTrie.of(sorted(answers))))
    return found


def assert_close(found: list[list[float]], right: list[list[float]], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, right, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
        assert max(range(len(a)), key=a.__getitem__) == max(range(len(b)), key=b.__getitem__)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "glm4", "gemma3"])
def test_scores_equal_brute_force(kind: str) -> None:
    model, asked = make_model(VOCABULARY, kind).eval(), questions(0)
    right = [brute_force(model, question) for question in asked]
    for budget in (1, 60, 10_000):
        assert_close(score_answers(model, asked, budget, segment_prefix()), right)
    assert_close([score_one_by_one(model, question) for question in asked], right)


@pytest.mark.parametrize("window", [3, 8, 20])
def test_sliding_windows_are_exact(window: int) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    shape = make_model(VOCABULARY, "gemma3").config.to_dict()
    shape.update(sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**shape), dtype=torch.float32).eval()
    asked = questions(1)
    right = [brute_force(model, question) for question in asked]
    assert_close(score_answers(model, asked, 200, segment_prefix()), right)


def test_five_hundred_labels() -> None:
    model = make_model(VOCABULARY).eval()
    generator = random.Random(0)
    answers = sorted(
        {(*(generator.randrange(3, 40) for _ in range(generator.randint(1, 4))), END) for _ in range(900)}
    )[:500]
    assert len(answers) == 500
    asked = [Question([5, 6, 7, 8], LabelTrie.of(answers)), Question([5, 6, 9], LabelTrie.of(answers[:3]))]
    assert_close(
        score_answers(model, asked, 1024, segment_prefix()),
        [brute_force(model, question) for question in asked],
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40))
def test_any_questions_equal_brute_force(seed: int, count: int, labels: int) -> None:
    model = make_model(VOCABULARY).eval()
    asked = questions(seed, count, labels, shared=(seed % 7,))
    right = [brute_force(model, question) for question in asked]
    assert_close(score_answers(model, asked, 80 + seed % 300, segment_prefix()), right)


def test_neither_order_nor_company_changes_a_score() -> None:
    model, asked = make_model(VOCABULARY).eval(), questions(2)
    right = score_answers(model, asked, 500, segment_prefix())
    shuffled = list(range(len(asked)))
    random.Random(0).shuffle(shuffled)
    found = score_answers(model, [asked[i] for i in shuffled], 90, segment_prefix())
    assert_close(found, [right[i] for i in shuffled])
    assert_close([score_answers(model, [q], 500, segment_prefix())[0] for q in asked], right)


def test_a_kept_beginning_serves_later_calls() -> None:
    model = make_model(VOCABULARY).eval()
    asked = questions(3, count=8, shared=(40,))
    right = [brute_force(model, question) for question in asked]
    cache = segment_prefix()
    assert_close(score_answers(model, asked[:4], 500, cache), right[:4])
    kept = cache.ids
    assert len(kept) >= 40
    assert_close(score_answers(model, asked[4:], 500, cache), right[4:])
    assert cache.ids == kept[: len(cache.ids)]
    assert_close(score_answers(model, asked[:1], 500, cache), right[:1])


def test_passes_hold_every_row_once_within_the_budget() -> None:
    asked = questions(4, count=40)
    for budget, nodes in ((1, 10_000), (120, 10_000), (10_000, 30), (10_000, 10_000)):
        passes = list(plan_passes(asked, 0, budget, nodes))
        assert sorted(itertools.chain.from_iterable(rows for rows, _ in passes)) == list(range(40))
        for rows, shared in passes:
            assert len({tuple(asked[row].prompt[:shared]) for row in rows}) == 1
            assert all(shared < len(asked[row].prompt) for row in rows)
            size = shared + sum(len(asked[r].prompt) - shared + len(asked[r].trie) - 1 for r in rows)
            assert len(rows) == 1 or (size <= budget and sum(len(asked[row].trie) for row in rows) <= nodes)


def test_the_trie_shares_beginnings() -> None:
    trie = LabelTrie.of([(7, 8, END), (7, END), (7, 8, 9, END), (5, END)])
    assert trie.tokens == (-1, 7, 8, 9, 5)
    assert trie.parents == (-1, 0, 1, 2, 0)
    assert trie.depths == (0, 1, 2, 3, 1)
    assert trie.ancestors() == [[1], [1, 2], [1, 2, 3], [4]]
    assert trie.paths[2] == ((0, 7), (1, 8), (2, 9), (3, END))


@pytest.mark.parametrize("answers", [[()], [(1, 2), (1, 2)], [(1,), (1, 2)], [(1, 2), (1,)]])
def test_answers_that_cannot_be_told_apart_are_refused(answers: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError):
        LabelTrie.of(answers)


def test_a_backend_that_ignores_the_segments_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignores(module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any) -> tuple[Any, None]:
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=True
        )
        return found.transpose(1, 2), None

    model, asked = make_model(VOCABULARY).eval(), questions(5, count=3)
    right = [brute_force(model, question) for question in asked]
    monkeypatch.setattr(tree_attention, "segment_attention", ignores)
    engine = Engine(model)
    with pytest.warns(UserWarning, match="uses the model's own cache; .*replaced attention: logits change"):
        assert_close(engine.score(asked), right)


def test_where_no_experts_are_the_least_effect_of_another_row_is_a_leak() -> None:
    model, asked = make_model(VOCABULARY).eval(), questions(5, count=3)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, given, found: found + 1e-6 * found.mean(1, keepdim=True))
    with pytest.warns(UserWarning, match="replaced attention: logits change by .* of another row"):
        Engine(model).score(asked)


def test_the_engine_uses_the_fast_way_for_a_sound_model(recwarn: pytest.WarningsRecorder) -> None:
    model, asked = make_model(VOCABULARY).eval(), questions(6, count=3)
    engine = Engine(model)
    assert_close(engine.score(asked), [brute_force(model, question) for question in asked])
    assert not [w for w in recwarn if "prediction uses" in str(w.message)]
    assert engine._scoring == "segments"


#: Models whose attention cannot be replaced.
OWN_CACHE = [*HYBRID_KINDS, *CACHE_KINDS]


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", *OWN_CACHE])
def test_scores_through_the_own_cache_equal_brute_force(kind: str) -> None:
    """Prompts of many lengths and of the same one, labels that begin alike; however it is cut into passes."""
    model, asked = make_model(VOCABULARY, kind).eval(), questions(0)
    asked += [replace(asked[0], prompt=[*asked[0].prompt[:-1], token]) for token in (5, 6, 7)]
    right = [brute_force(model, question) for question in asked]
    for budget in (1, 60, 10_000):
        assert_close(score_by_cache(model, asked, budget, own_prefix()), right)
        assert_close(score_side_by_side(model, asked, budget), right)


@pytest.mark.parametrize("kind", ["gemma2", "lfm2", "qwen3_5", "falcon_h1", "mamba2"])
def test_a_beginning_kept_in_the_own_cache_serves_later_calls(kind: str) -> None:
    model = make_model(VOCABULARY, kind).eval()
    asked = questions(3, count=8, shared=(40,))
    right = [brute_force(model, question) for question in asked]
    cache = own_prefix()
    assert_close(score_by_cache(model, asked[:4], 500, cache), right[:4])
    kept = cache.ids
    assert len(kept) >= 40
    for _ in range(2):
        assert_close(score_by_cache(model, asked[4:], 500, cache), right[4:])
    assert cache.ids == kept[: len(cache.ids)]
    assert_close(score_by_cache(model, asked[:1], 500, cache), right[:1])


@pytest.mark.parametrize(
    "answers", [[(END,)], [(5, END)], [(5, 6, END)], [(5,), (6,)], [(5, END), (5, 6, 7, END)]]
)
def test_few_and_short_answers(answers: list[tuple[int, ...]]) -> None:
    model = make_model(VOCABULARY, "lfm2").eval()
    asked = [Question(prompt, LabelTrie.of(answers)) for prompt in ([7], [7, 8], [9, 9, 9])]
    right = [brute_force(model, question) for question in asked]
    assert_close(score_by_cache(model, asked, 100, own_prefix()), right)
    assert_close(score_side_by_side(model, asked, 100), right)


def test_the_own_cache_computes_a_prompt_once() -> None:
    """Tokens that go through the model: the common beginning, each row's own part, and the labels."""
    model, asked = make_model(VOCABULARY, "lfm2").eval(), questions(0, count=9, shared=(40,))
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(given["input_ids"].numel()), with_kwargs=True
    )
    score_by_cache(model, asked, 200, own_prefix())
    labels = sum(len(q.trie.branches) * max(map(len, q.trie.branches)) for q in asked)
    assert sum(sizes) <= 40 + sum(len(q.prompt) - 40 for q in asked) + labels
    assert max(sizes) <= 200


@pytest.mark.parametrize("kind", OWN_CACHE)
def test_the_engine_finds_the_own_cache(kind: str) -> None:
    model, asked = make_model(VOCABULARY, kind).eval(), questions(5, count=6)
    engine = Engine(model)
    with pytest.warns(UserWarning, match="prediction uses the model's own cache"):
        assert_close(engine.score(asked), [brute_force(model, question) for question in asked])


def test_a_cache_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of models that begin a state anew behind what they have kept."""
    whole = OwnCache.repeated

    def forgetful(self: OwnCache, rows: Any, *, last: bool = False) -> OwnCache:
        repeated = whole(self, rows, last=last)
        for layer in repeated.cache.layers:
            for state in getattr(layer, "conv_states", {}).values():
                state.zero_()
        return repeated

    model, asked = decided(make_model(VOCABULARY, "lfm2").eval()), questions(5, count=6)
    monkeypatch.setattr(OwnCache, "repeated", forgetful)
    with pytest.warns(UserWarning, match="whole rows side by side.*own cache: log-probabilities differ"):
        found = Engine(model).score(asked)
    assert_close(found, [brute_force(model, question) for question in asked])


def test_a_model_whose_rows_feel_each_other_is_run_one_by_one() -> None:
    model, asked = make_model(VOCABULARY).eval(), questions(5, count=4)

    def mixed(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean((0, 1))
        return output

    model.model.register_forward_hook(mixed)
    right = [score_one_by_one(model, question) for question in asked]
    with pytest.warns(UserWarning, match="every answer by itself"):
        assert Engine(model).score(asked) == right


@pytest.mark.parametrize("memory", [1 << 40, 0])
@pytest.mark.parametrize("kind", [*HYBRID_KINDS, "lfm3", "falcon_h1"])
def test_in_bf16_wrong_scores_are_no_rounding(
    kind: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that runs from row to row shifts labels; with and without memory to compare in fp32, the model's own cache is taken,
    whose error is that of bf16."""
    monkeypatch.setattr(precision, "free_memory", lambda device: memory)
    model, asked = decided(make_model(VOCABULARY, kind).eval()), questions(7, count=8)
    right = [brute_force(model, question) for question in asked]
    model.to(torch.bfloat16)
    plain = farthest([score_one_by_one(model, question) for question in asked], right)
    with pytest.warns(UserWarning, match="prediction uses the model's own cache"):
        found = Engine(model).score(asked)
    assert farthest(found, right) < 2 * plain
    fast = score_answers(model, asked, 1024, segment_prefix())
    assert farthest(fast, right) > 5 * plain


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_in_bf16_a_sound_model_takes_the_fast_way(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda device: memory)
    model, asked = make_model(VOCABULARY).eval().to(torch.bfloat16), questions(6, count=8)
    engine = Engine(model)
    found = engine.score(asked)
    assert engine._scoring == "segments"
    assert farthest(found, [brute_force(model, question) for question in asked]) < 0.1


def test_the_checked_prompts_are_the_shortest_the_longest_and_one_between() -> None:
    trie = LabelTrie.of([(5, END), (6, 7, 8, END), (6, END)])
    prompts = [[9] * length for length in (70, 30, 50, 90, 40)]
    chosen = questions_to_check([Question(prompt, trie) for prompt in prompts])
    assert [len(question.prompt) for question in chosen] == [30, 50, 90]
    assert chosen[0].trie == LabelTrie.of([(6, 7, 8, END), (6, END)])
    (alone, company) = questions_to_check([Question(list(range(3, 100)), trie)])
    assert list(alone.prompt) == list(range(3, 100))
    assert list(company.prompt) == [*range(3, 51), *range(99, 50, -1)]


def farthest(found: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(x - y) for a, b in zip(found, right, strict=True) for x, y in zip(a, b, strict=True))


def test_predicting_leaves_a_model_in_training_as_it_was() -> None:
    """Meanwhile cuDNN's attention is off, and so is the autocast that accelerate puts around a model's forward."""
    model = make_model(VOCABULARY).train()
    unmixed, cudnn = model.forward, torch.backends.cuda.cudnn_sdp_enabled()
    model._original_forward = unmixed
    model.forward = mixed = torch.autocast("cpu", torch.bfloat16)(unmixed)
    with predicting(model):
        assert not model.training and not torch.backends.cuda.cudnn_sdp_enabled()
        assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert model.training and model.forward is mixed
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
