"""A small tokenizer and two-layer models, made here: tests need no network and no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LABELTUNE_LANG"] = "en"  # whatever the locale of who tests
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many threads as cores would wait for each other

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


def make_model(vocabulary: int, kind: str = "qwen2", seed: int = 0) -> Any:
    """Two layers, random weights."""
    import torch
    import transformers

    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    name, extra = (MODEL_KINDS | HYBRID_KINDS)[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**shape, **extra)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


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


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen2 with its tokenizer, as a local model folder."""
    folder = tmp_path_factory.mktemp("qwen") / "Qwen2-1___5B-Instruct"
    made = make_tokenizer()
    make_model(len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


LABELS = ["Sports", "Space", "Art"]


def classification_rows(count: int) -> list[dict[str, Any]]:
    """Rows that a two-layer model can learn: the first word tells the label."""
    words = {"Sports": "match", "Space": "rocket", "Art": "paint"}
    rows = []
    for index in range(count):
        label = LABELS[index % 3]
        rows.append(
            {"text": f"{words[label]} number {index} {words[label]}", "category": LABELS, "output": label}
        )
    return rows


def ner_rows(count: int) -> list[dict[str, Any]]:
    """Rows with one entity each, every third with none."""
    rows: list[dict[str, Any]] = []
    for index in range(count):
        if index % 3 == 2:
            rows.append({"text": f"今天下雨 {index}", "entities": []})
            continue
        text = f"他在南京 {index}"
        entity = {"start_idx": 2, "end_idx": 4, "entity_text": "南京", "entity_label": "GPE"}
        rows.append({"text": text, "entities": [{**entity, "entity_names": ["地缘政治实体", "地理实体"]}]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; nobody is logged in to SwanLab there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    yield tmp_path
