"""The families of the zoo: a tiny random model of each, its tokenizer, and what is particular about it.

All have the same shape where their config allows it: two layers of width 32, 600 tokens. Weights are drawn ten times as wide as
usual, because layers that hardly change what they are given would hide what goes wrong in them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from helpers.tiny_models import CHATML, make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "sliding_window": 96,
    "initializer_range": 0.2,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # gated delta rule
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # state spaces
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "chunk_size": 16,
}
TOKENS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}

_ROLES = "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
#: Chat templates with one peculiarity each.
TEMPLATES = {
    "ChatML": CHATML,
    "no system role": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{{ '<turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
        "{{ (first if loop.first else '') + (message['content'] | trim) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
    ),
    "a date": (
        "{{ '<|system|>\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
        + _ROLES
        + "{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "no space before answers": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (first if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
}


@dataclass(frozen=True)
class Family:
    """A tiny model of one architecture.

    Attributes:
        name: transformers' `model_type` or a name of ours.
        config: name of the config class.
        attends: how its layers see other tokens.
        shape: what its config needs beside `SHAPE`.
        template: its chat template, of `TEMPLATES`.
        model: the class that the published weights have where it is not the causal language model.
        text: `model_type` of its text part where its config does not name one.
        image: what its config says beside the text part, of which `shape` speaks.
        fast: it is run by `make test`.
    """

    name: str
    config: str
    attends: str
    shape: dict[str, Any] = field(default_factory=dict)
    template: str = "ChatML"
    model: str | None = None
    text: str | None = None
    image: dict[str, Any] = field(default_factory=dict)
    fast: bool = False


FULL, WINDOW = "full_attention", "sliding_attention"
LINEAR = {"layer_types": ["linear_attention", FULL]}
MIXED = {"layer_types": [WINDOW, FULL]}
#: Latent attention has a key of its own for every head.
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
DENSE_THEN_EXPERTS = {"first_k_dense_replace": 1}
SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES = (
    # Full attention, or windows of it.
    Family(
        "qwen2",
        "Qwen2Config",
        "full",
    ),
    Family("qwen3", "Qwen3Config", "full"),
    Family("llama", "LlamaConfig", "full", template="a date"),
    Family("mistral", "MistralConfig", "windows", template="no space before answers"),
    Family("ministral", "MinistralConfig", "windows and full", MIXED, template="no space before answers"),
    Family("phi3", "Phi3Config", "windows", {"sliding_window": 96}),
    Family("phi", "PhiConfig", "full"),
    Family("gemma", "GemmaConfig", "full", template="no system role"),
    Family(
        "gemma2",
        "Gemma2Config",
        "windows and full, logits capped",
        MIXED,
        template="no system role",
    ),
    Family("gemma3_text", "Gemma3TextConfig", "windows and full", MIXED, template="no system role"),
    Family(
        "gemma4_text",
        "Gemma4TextConfig",
        "windows and full, heads of two sizes",
        {**MIXED, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600},
        template="no system role",
    ),
    Family("glm", "GlmConfig", "full"),
    Family("glm4", "Glm4Config", "full"),
    Family(
        "granite",
        "GraniteConfig",
        "full, logits scaled",
        {"logits_scaling": 8.0, "attention_multiplier": 0.3},
        template="a date",
    ),
    Family("olmo", "OlmoConfig", "full"),
    Family("olmo2", "Olmo2Config", "full"),
    Family("olmo3", "Olmo3Config", "windows and full", MIXED),
    Family("starcoder2", "Starcoder2Config", "windows"),
    Family("stablelm", "StableLmConfig", "full"),
    Family("cohere", "CohereConfig", "full, logits scaled"),
    Family("cohere2", "Cohere2Config", "windows and full, logits scaled", MIXED),
    Family("nemotron", "NemotronConfig", "full"),
    Family("exaone4", "Exaone4Config", "windows and full", MIXED),
    Family("ernie4_5", "Ernie4_5Config", "full"),
    Family("smollm3", "SmolLM3Config", "full", template="a date"),
    Family("seed_oss", "SeedOssConfig", "full", {"residual_dropout": 0.0, "attention_dropout": 0.0}),
    Family("hunyuan_v1_dense", "HunYuanDenseV1Config", "full"),
    Family("apertus", "ApertusConfig", "full"),
    Family("arcee", "ArceeConfig", "full"),
    Family("helium", "HeliumConfig", "full"),
    Family(
        "gpt2",
        "GPT2Config",
        "full, positions learned",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 2048,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    Family("gpt_neox", "GPTNeoXConfig", "full"),
    Family(
        "opt",
        "OPTConfig",
        "full, positions learned",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
    ),
    Family("bloom", "BloomConfig", "full, positions by bias"),
    Family("falcon", "FalconConfig", "full"),
    Family(
        "mpt",
        "MptConfig",
        "full, positions by bias",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
    ),
    Family("gptj", "GPTJConfig", "full", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Family("minicpm3", "MiniCPM3Config", "latent", LATENT),
    Family("youtu", "YoutuConfig", "latent", LATENT),
    # Mixtures of experts.
    Family("qwen2_moe", "Qwen2MoeConfig", "full, experts"),
    Family("qwen3_moe", "Qwen3MoeConfig", "full, experts", fast=True),
    Family("mixtral", "MixtralConfig", "windows, experts", template="no space before answers"),
    Family("glm4_moe", "Glm4MoeConfig", "full, experts", DENSE_THEN_EXPERTS),
    Family("deepseek_v2", "DeepseekV2Config", "latent, experts", {**LATENT, **DENSE_THEN_EXPERTS}),
    Family("deepseek_v3", "DeepseekV3Config", "latent, experts", {**LATENT, **DENSE_THEN_EXPERTS}),
    Family("ernie4_5_moe", "Ernie4_5_MoeConfig", "full, experts", {"moe_num_experts": 4, "moe_k": 2}),
    Family("minimax_m2", "MiniMaxM2Config", "full, experts"),
    Family(
        "gpt_oss", "GptOssConfig", "windows and full, sinks, experts", MIXED, template="a date", fast=True
    ),
    Family("granitemoe", "GraniteMoeConfig", "full, experts"),
    Family("olmoe", "OlmoeConfig", "full, experts"),
    Family("phimoe", "PhimoeConfig", "windows, experts", {"router_jitter_noise": 0.0}),
    Family(
        "llama4_text",
        "Llama4TextConfig",
        "chunks and full, experts",
        {"layer_types": ["chunked_attention", FULL], "attention_chunk_size": 96},
    ),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Config", "full, experts"),
    Family(
        "glm_moe_dsa",
        "GlmMoeDsaConfig",
        "latent (2,048 tokens at most), experts",
        {**LATENT, "index_head_dim": 16, "index_n_heads": 2, **DENSE_THEN_EXPERTS},
    ),
    Family(
        "longcat_flash",
        "LongcatFlashConfig",
        "latent, experts",
        {
            **LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 1,
            "moe_topk": 2,
        },
    ),
    Family("mimo_v2_flash", "MiMoV2FlashConfig", "windows and full, sinks, experts"),
    # Layers with a state of their own.
    Family("qwen3_next", "Qwen3NextConfig", "gated delta rule and full, experts", LINEAR),
    Family(
        "qwen3_5_text",
        "Qwen3_5TextConfig",
        "gated delta rule and full",
        LINEAR,
    ),
    Family("qwen3_5_moe_text", "Qwen3_5MoeTextConfig", "gated delta rule and full, experts", LINEAR),
    Family("olmo_hybrid", "OlmoHybridConfig", "gated delta rule and full", LINEAR),
    Family(
        "kimi_linear",
        "KimiLinearConfig",
        "delta attention and latent, experts",
        {**LATENT, "layer_types": ["linear_attention", FULL], "linear_head_dim": 8, "linear_num_heads": 4},
    ),
    Family("minimax", "MiniMaxConfig", "lightning attention and full, experts"),
    Family("lfm2", "Lfm2Config", "short convolutions and full", {"layer_types": ["conv", FULL]}),
    Family(
        "lfm2_moe",
        "Lfm2MoeConfig",
        "short convolutions and full, experts",
        {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    ),
    Family("lfm3", "Lfm3Config", "short convolutions, windows", {"layer_types": ["conv", WINDOW]}),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        "Mamba-2 and full, experts",
        {"layer_types": ["mamba", "attention"]},
        template="a date",
    ),
    Family("falcon_h1", "FalconH1Config", "Mamba-2 beside full"),
    Family("bamba", "BambaConfig", "Mamba-2 and full", {"attn_layer_indices": [1]}),
    Family(
        "nemotron_h",
        "NemotronHConfig",
        "Mamba-2 and full, experts",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 32,
        },
        fast=True,
    ),
    Family(
        "zamba2",
        "Zamba2Config",
        "Mamba-2 and shared full",
        {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 4, "num_key_value_heads": 4},
    ),
    Family(
        "jamba",
        "JambaConfig",
        "Mamba and full, experts",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    ),
    Family("mamba", "MambaConfig", "Mamba"),
    Family("mamba2", "Mamba2Config", "Mamba-2", {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    Family("falcon_mamba", "FalconMambaConfig", "Mamba"),
    Family(
        "recurrent_gemma",
        "RecurrentGemmaConfig",
        "linear recurrence and windows",
        {"block_types": ["recurrent", "attention"], "attention_window_size": 96, "num_key_value_heads": 1},
    ),
    Family("xlstm", "xLSTMConfig", "mLSTM"),
    Family("rwkv", "RwkvConfig", "linear recurrence"),
    # As they are published: language models that read images too.
    Family(
        "gemma3",
        "Gemma3Config",
        "windows and full",
        MIXED,
        "no system role",
        "Gemma3ForConditionalGeneration",
        None,
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
        fast=True,
    ),
    Family(
        "gemma4",
        "Gemma4Config",
        "windows and full, heads of two sizes",
        {**MIXED, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 600},
        "no system role",
        "Gemma4ForConditionalGeneration",
        None,
        {"vision_config": {**SIGLIP, "num_key_value_heads": 2, "head_dim": 8}},
    ),
    Family(
        "mistral3",
        "Mistral3Config",
        "windows",
        {},
        "no space before answers",
        "Mistral3ForConditionalGeneration",
        "mistral",
        {"vision_config": {"model_type": "pixtral", **SIGLIP, "head_dim": 8}},
    ),
    Family(
        "llama4",
        "Llama4Config",
        "chunks and full, experts",
        {"layer_types": ["chunked_attention", FULL], "attention_chunk_size": 96},
        "ChatML",
        "Llama4ForConditionalGeneration",
        None,
        {
            "vision_config": {
                **SIGLIP,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        },
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLConfig",
        "full",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "ChatML",
        "Qwen2_5_VLForConditionalGeneration",
        None,
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [0],
            }
        },
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLConfig",
        "full",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "ChatML",
        "Qwen3VLForConditionalGeneration",
        None,
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    Family(
        "qwen3_5",
        "Qwen3_5Config",
        "gated delta rule and full",
        LINEAR,
        "ChatML",
        "Qwen3_5ForConditionalGeneration",
        None,
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
            }
        },
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}


def make_zoo_model(family: Family, seed: int = 0) -> PreTrainedModel:
    """Random weights in fp32, always the same; a test that asks for a family is skipped where transformers lacks it."""
    kind = getattr(transformers, family.config, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.name}")
    torch.manual_seed(seed)
    if family.model is None:
        return transformers.AutoModelForCausalLM.from_config(
            kind(**_shape(kind, family)), dtype=torch.float32
        )
    text = CONFIG_MAPPING[family.text] if family.text else kind.sub_configs["text_config"]
    config = kind(text_config=text(**_shape(text, family)), **family.image)
    model = getattr(transformers, family.model)(config)
    # What a config of several parts says of the width of its weights is not asked by all of them.
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=SHAPE["initializer_range"])
    return model  # type: ignore[no-any-return]


def _shape(kind: type[transformers.PreTrainedConfig], family: Family) -> dict[str, Any]:
    # Configs are dataclasses in newer releases of transformers alone.
    own = getattr(kind, "__dataclass_fields__", None) or inspect.signature(kind.__init__).parameters
    known = {*own, *kind.attribute_map}
    common = {key: value for key, value in SHAPE.items() if key in known}
    return {**common, **TOKENS, **family.shape}


def save_family(family: Family, folder: Path) -> Path:
    """The model with its tokenizer, as a local model folder; one that reads images has a processor too."""
    model = make_zoo_model(family)
    model.save_pretrained(folder)
    make_tokenizer(TEMPLATES[family.template]).save_pretrained(folder)
    if family.image:
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}\n')
        (folder / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}\n')
    return folder
