"""The check at the start of a run: what ignores the layout is caught, and training goes on another way."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.lfm2 import modeling_lfm2

import labeltune
from helpers.packing import FP32, VOCABULARY, assert_equal, lora_model, packed, plain, random_rows
from helpers.tiny_models import HYBRID_KINDS, make_model, make_tokenizer
from helpers.training import adapter_weights, config_for, without_dropout
from labeltune.config import LoraConfig
from labeltune.models import precision, shared_prefix
from labeltune.models.lora import attach_adapter
from labeltune.models.precision import Precision
from labeltune.training import self_check
from labeltune.training.packing import Row, pack_step
from labeltune.training.preflight import compile_layers
from labeltune.training.self_check import Choice, choose_packing, sample_rows
from zoo.families import BY_NAME, make_zoo_model

BF16 = Precision("bf16", torch.bfloat16, "cpu")


def ignores_layout(
    module: Any, query: Any, key: Any, value: Any, *_: Any, **options: Any
) -> tuple[Any, None]:
    """A backend that takes any keyword argument and looks at none: causal over the whole row."""
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=True
    )
    return found.transpose(1, 2), None


def use_everywhere(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own attention ignores masks and positions too, so that not even a padded batch is right."""
    from transformers import AttentionInterface

    AttentionInterface.register("ignores_everything", ignores_layout)
    model.config._attn_implementation = "ignores_everything"
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)


def choose(
    model: Any, wanted: Any = "shared_prefix", precision: Precision = FP32
) -> tuple[Choice, list[str]]:
    said: list[str] = []
    rows = sample_rows(random_rows(prefixes=(12,)))
    return choose_packing(model, rows, wanted, precision, 0, head=None, say=said.append), said


@pytest.mark.parametrize("precision", [FP32, BF16])
@pytest.mark.parametrize("wanted", ["shared_prefix", "packed", "padded"])
def test_a_sound_model_gets_what_was_asked_for(wanted: Any, precision: Precision) -> None:
    model = lora_model()
    if precision is BF16:
        model.to(torch.bfloat16)
    assert choose(model, wanted, precision) == (Choice(wanted), [])


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_a_backend_that_ignores_the_layout_is_caught(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)
    model = lora_model()
    if precision is BF16:
        model.to(torch.bfloat16)
    choice, (said,) = choose(model, precision=precision)
    assert choice == Choice("shared_cache")
    assert said.startswith("the shared prefix goes through the model's own cache")
    assert "shared_prefix: relative difference" in said


@pytest.mark.parametrize("memory", [1 << 40, 0])
def test_rounding_alone_is_no_reason_to_go_another_way(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far right ways of computing come apart differs between models and machines; wrong ones are much farther off."""
    monkeypatch.setattr(self_check, "TOLERANCE", 1e-12)
    monkeypatch.setattr(precision, "free_memory", lambda _: memory)
    assert choose(lora_model()) == (Choice("shared_prefix"), [])
    assert next(lora_model().parameters()).dtype == torch.float32
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)
    choice, (said,) = choose(lora_model())
    assert choice == Choice("shared_cache") and "shared_prefix: relative difference" in said


def test_a_model_that_drops_the_layout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward takes unknown arguments and hands them to nobody."""
    model = lora_model()
    inner = model.get_base_model().model
    plain_forward = inner.forward

    def forward(*args: Any, prefix_layout: Any = None, **options: Any) -> Any:
        return plain_forward(*args, **options)

    monkeypatch.setattr(inner, "forward", forward)
    choice, (said,) = choose(model)
    assert choice == Choice("shared_cache")
    assert "needs prefix_layout" in said


def test_a_model_for_which_no_batch_is_exact_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model()
    use_everywhere(model, monkeypatch)
    choice, (warning,) = choose(model)
    assert choice == Choice("padded", one_by_one=True)
    assert "one example at a time" in warning


def test_capped_attention_shares_through_the_cache() -> None:
    import peft
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = make_model(VOCABULARY, "gemma3").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Gemma2Config(
        **{key: shape[key] for key in keys},
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
        attn_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    choice, (said,) = choose(model)
    assert choice == Choice("shared_cache")
    assert "softcap" in said


def test_a_state_that_runs_along_the_row_falls_back() -> None:
    """Mamba knows neither layout nor restarting positions, and begins a text of several tokens with an empty state."""
    import peft
    from transformers import AutoModelForCausalLM, MambaConfig

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["in_proj"], task_type="CAUSAL_LM")
    )
    choice, (warning,) = choose(model)
    assert choice.packing == "padded"
    assert all(f"{way}: " in warning for way in ("shared_prefix", "shared_cache", "packed"))


def test_nothing_is_left_behind() -> None:
    """Random states, modes, dropout rates, gradients and the model's own attention are as before."""
    model = lora_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    attention = model.get_base_model().model.layers[0].self_attn
    attention.attention_dropout = 0.25
    model.get_base_model().model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    choose(model)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected
    assert [module.training for module in model.modules()] == modes
    assert attention.attention_dropout == 0.25
    assert model.config._attn_implementation == implementation
    assert all(p.grad is None for p in model.parameters())


def check_of(model: Any, rows: Any, precision: Precision) -> self_check._Check:
    return self_check._Check(model, rows, precision, 0, None)


def test_the_reference_in_bf16_is_the_model_in_fp32_and_leaves_the_weights_alone() -> None:
    model = lora_model().to(torch.bfloat16)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    rows = random_rows(prefixes=(12,))
    exact = check_of(model, rows, BF16).exact
    assert exact is not None
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    right = plain(model.float(), rows)
    assert_equal((exact.loss, exact.weights), right)


def test_without_memory_for_fp32_the_bf16_rows_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda device: 0)
    assert check_of(lora_model().to(torch.bfloat16), random_rows(), BF16).exact is None
    assert choose(lora_model().to(torch.bfloat16), precision=BF16) == (Choice("shared_prefix"), [])


@pytest.mark.parametrize("memory", [1 << 40, 0])
@pytest.mark.parametrize("number_format", [FP32, BF16])
@pytest.mark.parametrize("kind", list(HYBRID_KINDS))
def test_a_state_that_runs_from_row_to_row_is_no_rounding(
    kind: str, number_format: Precision, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little it changes: in bf16 as in fp32, and with and without memory for a wider format."""
    if not hasattr(transformers, HYBRID_KINDS[kind][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    monkeypatch.setattr(precision, "free_memory", lambda device: memory)
    model = lora_model(kind).to(number_format.weights)
    choice, (warning,) = choose(model, "packed", number_format)
    assert choice == Choice("padded")
    assert "relative difference" in warning or "with the tokens of another row" in warning
    choice, (said,) = choose(model, precision=number_format)
    # transformers 5.0 gives LFM2 a cache of its own, which keeps no layers and cannot be shared.
    shared = not (kind == "lfm2" and hasattr(modeling_lfm2, "Lfm2HybridConvCache"))
    assert choice == Choice("shared_cache" if shared else "padded")
    assert "relative difference" in said or "with the tokens of another row" in said


def test_gradient_checkpointing_leaves_no_cache() -> None:
    said: list[str] = []
    rows = sample_rows(random_rows(prefixes=(12,)))
    found = choose_packing(
        lora_model("lfm2"), rows, "shared_prefix", FP32, 0, head=None, say=said.append, checkpointing=True
    )
    assert found == Choice("padded")
    assert "shared_cache: gradient checkpointing gives up the model's cache" in said[0]


@pytest.mark.parametrize("wanted", ["shared_prefix", "packed", "padded"])
def test_a_model_with_dropout_of_its_own_is_compared_without_it(wanted: Any) -> None:
    """Dropout that is no layer, its rate under any name: computing the same twice differs, by more than any limit here."""
    model = lora_model()
    for layer in model.get_base_model().model.layers:
        plain_forward = layer.mlp.forward

        def forward(hidden: Any, layer: Any = layer, plain_forward: Any = plain_forward) -> Any:
            return torch.nn.functional.dropout(plain_forward(hidden), 0.1, training=layer.mlp.training)

        layer.mlp.forward = forward
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    choice, (said,) = choose(model, wanted)
    assert choice == Choice(wanted)
    assert "dropout of its own" in said
    assert model.training and all(layer.mlp.training for layer in model.get_base_model().model.layers)


def test_wrong_packing_is_caught_in_a_model_with_dropout_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)
    model = lora_model()
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.2
    choice, said = choose(model)
    assert choice == Choice("shared_cache")
    assert len(said) == 2 and "dropout of its own" in said[0]


def test_rows_of_all_lengths_are_checked_but_very_long_ones() -> None:
    rows = [Row.of(range(3, 3 + length), length - 1, length) for length in (50, 9, 2000, 30, 9, 1000)]
    assert [len(row.ids) for row in sample_rows(rows)] == [8, 29, 999]
    assert [len(row.ids) for row in sample_rows(rows[:2])] == [8, 49]
    assert [len(row.ids) for row in sample_rows([rows[2]])] == [1999]


def test_compiled_layers_agree() -> None:
    """One layer, whose kernels are compiled for half a minute; that compiled layers are checked is test_training.py's."""
    torch.compiler.reset()  # what other tests compiled counts towards the limit, behind which nothing is compiled
    model, rows = lora_model(layers=1), random_rows()
    right = plain(model, rows)
    compile_layers(model)
    for budget in (40, 10_000):
        found = packed(model, rows, pack_step(rows, budget)[0], "shared_prefix", None)
        assert_equal(found, right)


def test_a_run_goes_another_way_with_one_sentence_and_the_same_result(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_dropout(config_for(in_folder, model_folder, max_steps=3, save_steps=1000))
    right = adapter_weights(labeltune.train(config).last)
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)
    said: list[str] = []
    found = adapter_weights(labeltune.train(config, overwrite=True, say=said.append).last)
    assert sum("the shared prefix goes through the model's own cache" in line for line in said) == 1
    assert any("steps: packing=shared_cache" in line for line in said)
    for name, tensor in right.items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-3, atol=1e-4)


def test_a_run_that_can_only_go_row_by_row_does(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("ignores_everything", ignores_layout)
    monkeypatch.setattr(shared_prefix, "shared_prefix_attention", ignores_layout)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained(in_folder / "model")
    tokenizer.save_pretrained(in_folder / "model")
    said: list[str] = []
    config = config_for(in_folder, in_folder / "model", max_steps=1)

    from labeltune.training import run

    prepare = run.prepare_steps

    def with_bad_attention(given: Any, *rest: Any, **named: Any) -> Any:
        given.config._attn_implementation = "ignores_everything"
        return prepare(given, *rest, **named)

    monkeypatch.setattr(run, "prepare_steps", with_bad_attention)
    labeltune.train(config, say=said.append)
    assert any("packing=padded, at most 1 tokens at a time" in line for line in said)


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_experts_whose_operator_knows_no_fp64_fall_back_all_the_same(name: str) -> None:
    adapted = attach_adapter(make_zoo_model(BY_NAME[name]), LoraConfig(r=4, dropout=0.0))
    found, said = choose(adapted)
    assert found == Choice("shared_cache")
    assert len(said) == 1 and "Double" not in said[0] and "float64" not in said[0]
