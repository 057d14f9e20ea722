"""A small tokenizer and two-layer models, made here: tests need no network and no weights."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


QWEN_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


CORPUS = [
    "The rocket landed on the platform at sea. Engineers inspect the turbine.",
    "你是一个文本分类领域的专家，你会接收到一段文本和几个潜在的分类选项，请输出文本内容的正确类型",
    "文本:今天的比赛在雨中进行,类型选型:['Sports', 'Space', 'Art']",
    '{"entity_text": "南京", "entity_label": "地理实体"}',
    "没有找到任何实体 地点 人名 组织 命名实体识别",
    "system user assistant You are a helpful assistant. Sports Space Art Economy",
] * 4


#: kind -> (config class of transformers, what it needs beside the common shape)
MODEL_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "llama": ("LlamaConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}),
}


#: Models with layers that carry a state along the row, which only the plain ways compute rightly.
HYBRID_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}


_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: More models whose prefix is shared through their own cache: experts, Mamba-2, capped attention, sinks.
CACHE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "attn_implementation": "eager",
            "attn_logit_softcapping": 2.0,
            "sliding_window": 8,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "sliding_window": 8, "rope_parameters": None, **_EXPERTS}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **HYBRID_KINDS["qwen3_5"][1],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, **_MAMBA2, **_EXPERTS},
    ),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 64, "head_dim": 8, **_MAMBA2}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "head_dim": 8,
        },
    ),
    "lfm3": ("Lfm3Config", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    ),
}


def make_tokenizer(template: str | None = CHATML, pad: str = "<|endoftext|>") -> Any:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer and special tokens, about 600 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=pad, chat_template=template
    )


def make_model(vocabulary: int, kind: str = "qwen2", seed: int = 0, layers: int = 2) -> Any:
    """Random weights."""
    import torch
    import transformers

    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    name, extra = (MODEL_KINDS | HYBRID_KINDS | CACHE_KINDS)[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**shape, **extra)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
