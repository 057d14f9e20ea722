"""Which layers get an adapter, and how it becomes part of the weights: mixtures of experts, state spaces, models that see images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import Result
from labeltune.config import LoraConfig
from labeltune.errors import ModelError
from labeltune.export.merge import save_whole_model
from labeltune.models.hub import load_model, load_tokenizer
from labeltune.models.lora import attach_adapter, linear_layers, load_adapter, merge_adapter
from labeltune.prompts.template import ChatTemplate
from labeltune.training.preflight import attention_width
from zoo.families import BY_NAME, make_zoo_model, save_family

EXPERTS = ("q_proj", "gate_proj", "up_proj", "down_proj")


def adapted(name: str, **options: Any) -> Any:
    """A model with an adapter that changes its answers."""
    model = attach_adapter(make_zoo_model(BY_NAME[name]), LoraConfig(r=4, **options)).eval()
    torch.manual_seed(1)
    for key, weights in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weights, std=0.1)
    return model


def adapter_names(model: Any) -> set[str]:
    found = {key.partition(".lora_A")[0] for key, _ in model.named_parameters() if ".lora_A" in key}
    return {re.sub(r"\.\d+\.", ".*.", key.removeprefix("base_model.model.")) for key in found}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 63)[None]
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        # Experts are whole tensors, which peft adapts under the names of the dense layers too.
        ("qwen3_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("glm4_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt_oss", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        # The router returns two tensors.
        ("llama4_text", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        # Kernels read the weights of out_proj, and in Mamba those of x_proj and dt_proj.
        ("mamba", {"in_proj"}),
        ("mamba2", {"in_proj"}),
        ("falcon_h1", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"}),
        ("nemotron_h", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "in_proj"}),
        # Linear layers with a class of their own.
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        # A gated delta rule calls its output layer.
        ("qwen3_5_text", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"}),
    ],
)  # fmt: skip
def test_all_linear_is_what_can_have_an_adapter(name: str, leaves: set[str]) -> None:
    model = make_zoo_model(BY_NAME[name])
    assert {layer.rpartition(".")[2] for layer in linear_layers(model)} == leaves
    names = adapter_names(attach_adapter(model, LoraConfig(dropout=0.1)))
    assert {layer.rpartition(".")[2] for layer in names} == leaves


def test_every_adapted_layer_feels_its_adapter() -> None:
    for name in ("mamba", "nemotron_h", "longcat_flash", "falcon", "zamba2", "glm_moe_dsa"):
        model = adapted(name, dropout=0.0)
        model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits.square().sum().backward()
        unfelt = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unfelt == [], name


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "mistral3", "llama4"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "k_proj")])
def test_a_model_that_reads_images_too_is_adapted_where_text_goes_through(name: str, targets: Any) -> None:
    names = adapter_names(adapted(name, target_modules=targets))
    assert names and all("language_model." in layer for layer in names), names


def test_experts_that_are_named_need_no_dropout_and_can_be_merged(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"names experts.*lora\.dropout=0\.1 does not work with them\. Set lora\.dropout=0"
    ):
        adapted("qwen3_moe", target_modules=EXPERTS, dropout=0.1)
    model = adapted("qwen3_moe", target_modules=EXPERTS, dropout=0.0)
    assert any("experts" in key for key, p in model.named_parameters() if p.requires_grad)
    right = logits(model)
    base = save_family(BY_NAME["qwen3_moe"], tmp_path / "base")
    assert (logits(load_model(base, torch.float32)) - right).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load_model(base, torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merge_adapter(again, torch.float32)), right, rtol=1e-3, atol=1e-4)


def test_layers_that_do_not_fit_are_refused_before_tokenizing_with_those_that_do(
    tmp_path: Path, labeltune: Any
) -> None:
    base = save_family(BY_NAME["mamba2"], tmp_path / "base")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a,x\nb,y\n" * 10)
    found: Result = labeltune(
        "train",
        "--data",
        str(rows),
        f"model={base}",
        "tracking=none",
        "lora.target_modules=[in_proj, out_proj]",
    )
    assert found.code == 2 and "what fits: all-linear, or some of in_proj" in found.err
    assert "tokens:" not in found.err and "Traceback" not in found.err


def test_a_model_of_another_kind_is_refused_in_one_sentence(tmp_path: Path, labeltune: Any) -> None:
    import transformers

    base = tmp_path / "base"
    save_family(BY_NAME["qwen2"], base)
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(base)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a,x\nb,y\n" * 10)
    found: Result = labeltune("train", "--data", str(rows), f"model={base}", "tracking=none")
    assert (
        found.code == 2
        and "is of the kind 't5', for which transformers has no causal language model" in found.err
    )
    assert "tokens:" not in found.err and "Traceback" not in found.err


def test_mistral_3_as_published_is_loaded(tmp_path: Path) -> None:
    model = load_model(save_family(BY_NAME["mistral3"], tmp_path / "base"), torch.float32)
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    torch.testing.assert_close(logits(model.eval()), logits(make_zoo_model(BY_NAME["mistral3"]).eval()))


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_a_merged_export_has_the_files_that_prepare_images(name: str, tmp_path: Path) -> None:
    base = save_family(BY_NAME[name], tmp_path / "base")
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
    model = load_model(base, torch.float32)
    save_whole_model(model, ChatTemplate(load_tokenizer(base)), tmp_path / "merged", base)
    kept = {path.name for path in (tmp_path / "merged").glob("*processor_config.json")}
    assert kept == ({"preprocessor_config.json", "processor_config.json"} if name == "gemma3" else set())


def test_heads_may_differ_from_layer_to_layer() -> None:
    sizes = {
        name: attention_width(make_zoo_model(BY_NAME[name]).config.get_text_config())
        for name in ("qwen3", "gemma4_text", "mamba")
    }
    assert sizes == {"qwen3": 2 * 4 * 8, "gemma4_text": 4 * 8 + 4 * 16, "mamba": 0}
