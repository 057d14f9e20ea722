"""The shared-prefix step against its plain twin: every row by itself, full logits, torch's own cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from helpers.packing import VOCABULARY, assert_equal, lora_model, packed, plain, random_rows
from helpers.tiny_models import MODEL_KINDS, make_model
from labeltune.config import LoraConfig
from labeltune.models.lora import attach_adapter
from labeltune.models.shared_prefix import (
    NAME,
    Attend,
    _one_by_one,
    _side_by_side,
    make_layout,
    shared_prefix_attention_on,
)
from labeltune.prompts.builder import common_prefix
from labeltune.training.collate import attention_for, make_batch
from labeltune.training.loss import chunkable_head, chunked_cross_entropy
from labeltune.training.packing import Group, Pack, Row, pack_step, to_rows
from labeltune.training.preflight import enable_checkpointing
from zoo.families import BY_NAME, make_zoo_model

KINDS = list(MODEL_KINDS)


@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_lora_gradient_are_those_of_single_rows(kind: str, packing: Any) -> None:
    model, rows = lora_model(kind), random_rows()
    right = plain(model, rows)
    head = chunkable_head(model, torch.tensor([rows[0].ids]))
    assert head is not None
    for budget in (25, 60, 10_000):
        packs = pack_step(rows, budget, packing)[0]
        assert_equal(packed(model, rows, packs, packing, head), right)
        assert_equal(packed(model, rows, packs, packing, None), right)


def test_prefixes_of_different_lengths_stand_in_one_pack() -> None:
    model, rows = lora_model(), random_rows(prefixes=(20, 9, 14), text=30)
    (pack,) = pack_step(rows, 10_000)[0]
    assert len({group.prefix for group in pack.groups}) >= 3
    assert_equal(packed(model, rows, [pack], "shared_prefix", None), plain(model, rows))


def test_packs_of_one_and_of_all_agree() -> None:
    model, rows = lora_model(), random_rows(prefixes=(20,), each=8)
    ones = [Pack((Group(0, (i,)),)) for i in range(len(rows))]
    with_prefix = [Pack((Group(20, (i,)),)) for i in range(len(rows))]
    together = pack_step(rows, 10_000)[0]
    assert len(together) == 1
    right = packed(model, rows, ones, "shared_prefix", None)
    assert_equal(packed(model, rows, with_prefix, "shared_prefix", None), right)
    assert_equal(packed(model, rows, together, "shared_prefix", None), right)


def test_a_prefix_that_is_the_whole_prompt_and_answers_of_one_token() -> None:
    model = lora_model()
    prompt = [5, 6, 7, 8, 9]
    answers = ([10], [11], [10, 12], [13])
    rows = [Row.of([*prompt, *answer], len(prompt), len(prompt) + len(answer)) for answer in answers]
    (pack,) = pack_step(rows, 10_000)[0]
    assert [group.prefix for group in pack.groups] == [5]
    assert pack.tokens(rows) == 6
    assert_equal(packed(model, rows, [pack], "shared_prefix", None), plain(model, rows))


def test_hidden_states_do_not_depend_on_neighbours() -> None:
    """Example k keeps its hidden states, to the last bit, when the examples around it change."""
    model = make_model(VOCABULARY).eval()
    prefix = list(range(3, 15))
    mine = [*prefix, 40, 41, 42, 43]

    def hidden(others: list[list[int]]) -> Any:
        rows = [
            Row.of([*prefix, *other, 7], len(prefix) + len(other), len(prefix) + len(other) + 1)
            for other in others
        ]
        rows.insert(1, Row.of([*mine, 7], len(mine), len(mine) + 1))
        pack = Pack((Group(len(prefix), tuple(range(len(rows)))),))
        (call,) = make_batch(rows, pack, "shared_prefix", 0).calls
        with torch.no_grad(), shared_prefix_attention_on(model):
            states = model.model(**call.inputs).last_hidden_state[0]
        start = len(prefix) + len(others[0])
        assert call.inputs["input_ids"][0, start : start + 4].tolist() == mine[-4:]
        return states[start : start + 4]

    first = hidden([[50, 51, 52], [60, 61]])
    assert torch.equal(first, hidden([[90, 91, 92], [5, 6]]))
    with torch.no_grad():
        alone = model.model(torch.tensor([mine]), use_cache=False).last_hidden_state[0, -4:]
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model, rows = lora_model(kind), random_rows()
    packs = pack_step(rows, 10_000)[0]
    right = packed(model, rows, packs, "shared_prefix", None)
    enable_checkpointing(model)
    assert_equal(packed(model, rows, packs, "shared_prefix", None), right, rtol=1e-6)


@pytest.mark.parametrize("window", [4, 7, 16, 64])
def test_sliding_windows_are_exact(window: int) -> None:
    """Windows shorter than the prefix, than a text, and longer than everything."""
    from transformers import Gemma3TextConfig

    shape = make_model(VOCABULARY, "gemma3").config.to_dict()
    shape.update(sliding_window=window, layer_types=["sliding_attention", "full_attention"])
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**shape), dtype=torch.float32)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    ).train()
    rows = random_rows(text=25)
    assert_equal(packed(model, rows, pack_step(rows, 10_000)[0], "shared_prefix", None), plain(model, rows))


def test_frozen_embeddings_get_no_gradient() -> None:
    """Nothing is propagated below the lowest layer with an adapter, checkpointed or not."""
    import peft

    for checkpointing in (False, True):
        model = peft.get_peft_model(
            make_model(VOCABULARY),
            peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"),
        ).train()
        if checkpointing:
            enable_checkpointing(model)
        below: list[bool] = []

        def note(module: Any, inputs: Any, output: Any, seen: list[bool] = below) -> None:
            seen.append(output.requires_grad)

        for module in (model.get_input_embeddings(), model.get_base_model().model.layers[0]):
            module.register_forward_hook(note)
        rows = random_rows()
        packed(model, rows, pack_step(rows, 10_000)[0], "shared_prefix", None)
        assert len(below) == 2 and not any(below)


def test_the_attention_function_is_on_only_while_asked_for() -> None:
    model = make_model(VOCABULARY)
    before = model.config._attn_implementation
    with shared_prefix_attention_on(model):
        assert model.config._attn_implementation == NAME
        with pytest.raises(ValueError, match="prefix_layout"):
            model(torch.tensor([[1, 2]]), use_cache=False)
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="stop"), shared_prefix_attention_on(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


def test_a_layout_covers_its_row() -> None:
    layout = make_layout([(3, [2, 0, 4]), (0, [1]), (5, [0, 0])])
    assert [(g.start, g.prefix, g.tokens) for g in layout.groups] == [(0, 3, 9), (9, 0, 1), (10, 5, 5)]
    assert [g.rests for g in layout.groups] == [(2, 4), (1,), ()]
    assert layout.groups[0].gather.tolist() == [0, 1, 0, 0, 2, 3, 4, 5]
    assert layout.groups[0].scatter.tolist() == [0, 1, 4, 5, 6, 7]
    assert layout.groups[2].gather.numel() == layout.groups[2].scatter.numel() == 0


@pytest.mark.parametrize("window", [None, 3, 6])
def test_examples_side_by_side_equal_one_by_one(window: int | None) -> None:
    """What a GPU and compiled code run, against what the CPU runs: outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    for prefix, rests in ((5, [3, 0, 7, 1]), (0, [4, 2]), (6, []), (1, [1])):
        whole = make_layout([(prefix, rests)])
        layout, shapes = whole.groups[0], (4, 2, 2)
        first = [torch.randn(1, h, layout.tokens, 8, generator=generator, requires_grad=True) for h in shapes]
        second = [x.detach().clone().requires_grad_() for x in first]
        attend = Attend(whole, 0.0, 0.5, window)
        right = torch.cat(list(_one_by_one(*first, layout, attend)), dim=2)
        found = torch.cat(list(_side_by_side(*second, layout, attend)), dim=2)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
        direction = torch.randn(right.shape, generator=generator)
        (right * direction).sum().backward()
        (found * direction).sum().backward()
        for a, b in zip(second, first, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("trained", [False, True])
def test_chunked_cross_entropy_equals_the_plain_one(chunk: int, trained: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).requires_grad_(trained)
    hidden, targets = torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    right = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    right.backward()
    expected = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters() if trained)]
    hidden.grad = None
    head.zero_grad()
    found = chunked_cross_entropy(head, hidden, targets, chunk)
    (found * 3).backward()
    torch.testing.assert_close(found, right)
    got = [hidden.grad, *(p.grad for p in head.parameters() if trained)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b * 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_chunked_cross_entropy_weighs_positions(trained: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).requires_grad_(trained)
    hidden, targets = torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 3.5, 1e-3])
    right = (torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    right.backward()
    expected, hidden.grad = hidden.grad, None
    found = chunked_cross_entropy(head, hidden, targets, 3, weights=weights)
    (found * 3).backward()
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(hidden.grad, expected * 3, rtol=1e-5, atol=1e-6)


def records(rows: list[Row], each: int) -> list[dict[str, Any]]:
    """Examples of several questions each, as a data set has them."""
    found = []
    for at in range(0, len(rows), each):
        first, *others = rows[at : at + each]
        found.append(
            {
                "input_ids": [*first.ids, first.answer[-1]],
                "answer_start": first.answer_start,
                "answer_end": len(first.ids) + 1,
                "weight": first.weight,
                "others": [
                    {
                        "begin": (begin := common_prefix(first.prompt, row.prompt)),
                        "ids": [*row.ids[begin:], row.answer[-1]],
                        "start": row.answer_start - begin,
                        "weight": row.weight,
                    }
                    for row in others
                ],
            }
        )
    return found


@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded", "shared_cache"])
@pytest.mark.parametrize("max_tokens", [40, 10_000])
@pytest.mark.parametrize("in_head", [True, False])
def test_several_weighted_questions_of_an_example_are_those_of_single_rows(
    packing: Any, max_tokens: int, in_head: bool
) -> None:
    model = lora_model()
    weights = [1.0, 0.25, 3.0, 0.5]
    rows = [replace(row, weight=weights[at % 4]) for at, row in enumerate(random_rows(prefixes=(20, 9, 14)))]
    found = to_rows(records(rows, 4))
    assert [replace(row, record=-1) for row in found] == rows
    assert [row.record for row in found] == [at // 4 for at in range(12)]
    head = chunkable_head(model, torch.tensor([rows[0].ids])) if in_head else None
    assert (head is not None) == in_head
    (packs,) = pack_step(found, max_tokens, packing)
    assert_equal(packed(model, found, packs, packing, head), plain(model, rows), rtol=2e-5)


def test_the_questions_of_an_example_stay_together_unless_they_are_too_long() -> None:
    prompts = [[number, *range(10, 30)] for number in range(3)]
    rows = to_rows(
        [
            {
                "input_ids": [*prompt, 40, 50],
                "answer_start": 22,
                "answer_end": 23,
                "weight": 1.0,
                "others": [
                    {"begin": 21, "ids": [41 + label, 50], "start": 1, "weight": 1.0} for label in range(9)
                ],
            }
            for prompt in prompts
        ]
    )
    (packs,) = pack_step(rows, 10_000)
    assert [(g.prefix, len(g.rows)) for pack in packs for g in pack.groups] == [(21, 10)] * 3
    assert sum(pack.tokens(rows) for pack in packs) == 3 * (21 + 10)
    (packs,) = pack_step(rows, 26)
    assert all(pack.tokens(rows) <= 26 for pack in packs)
    assert sorted(row for pack in packs for row in pack.rows) == list(range(30))


def test_very_unlikely_answers_have_a_finite_loss() -> None:
    head = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.tensor([[500.0, 0.0]], requires_grad=True)
    loss = chunked_cross_entropy(head, hidden, torch.tensor([1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(500.0)
    assert torch.isfinite(hidden.grad).all()


def test_a_capped_output_layer_stays_inside_the_model() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = make_model(VOCABULARY, "gemma3").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Gemma2Config(
        **{key: shape[key] for key in keys}, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert chunkable_head(model, torch.tensor([[5, 6, 7]])) is None


@pytest.mark.parametrize("packing", ["shared_prefix", "packed", "padded"])
def test_cudnn_is_kept_out_of_attention_over_changing_shapes(packing: Any) -> None:
    """It would make a plan for every new shape; what a program has set is there again afterwards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_for(make_model(VOCABULARY), packing):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize(
    "name",
    [
        "recurrent_gemma",  # caps its logits, which are small
        "xlstm",  # keeps all positions, whatever it is asked for
    ],
)
def test_the_loss_is_that_of_the_answers_whatever_a_model_does_with_logits(name: str) -> None:
    if name == "xlstm" and transformers.__version__ == "5.0.0":
        pytest.skip("transformers 5.0.0 cannot compute its own xLSTM: 'Tensor' object is not callable")
    model = attach_adapter(make_zoo_model(BY_NAME[name]), LoraConfig(r=4, dropout=0.0)).train()
    rows = random_rows(each=2)
    head = chunkable_head(model, torch.tensor([rows[0].ids]))
    one_by_one = [Pack((Group(0, (at,)),)) for at in range(len(rows))]
    found, right = packed(model, rows, one_by_one, "padded", head), plain(model, rows)
    assert found[0] == pytest.approx(right[0], rel=1e-5)
    for key, gradient in right[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-5)
