"""Rows, a tokenizer and models made up for benchmarks: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT = {"system": "Sort the text.", "user": "Text: {text}\nLabels: {category}"}
LABELS = ["Sports", "Space", "Art", "Economy"]
SYLLABLES = [
    "ka",
    "to",
    "mi",
    "ren",
    "sol",
    "ba",
    "lu",
    "ner",
    "vi",
    "dor",
    "pe",
    "shan",
    "qi",
    "wo",
    "ty",
    "ze",
]

#: A Qwen2 of two layers.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2_000,
}


def words(generator: random.Random, count: int) -> str:
    """That many words of two to four syllables."""
    return " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(2, 4))) for _ in range(count))


def write_rows(path: Path, count: int, shortest: int = 5, longest: int = 25, seed: int = 0) -> Path:
    """Rows for classification, all different, with one list of candidates."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{number} {words(generator, generator.randint(shortest, longest))}"
            row = {"text": text, "category": LABELS, "output": LABELS[number % len(LABELS)]}
            file.write(json.dumps(row) + "\n")
    return path


def make_tokenizer() -> Any:
    """Byte-level BPE of about 1,500 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = random.Random(1)
    frame = " system user assistant\n ['kato', 'miren', 'solba', 'luner']"
    tokenizer.train_from_iterator([words(generator, 50) + frame for _ in range(200)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_model(folder: Path) -> Path:
    """A model folder with random weights and the tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SIZES, max_position_embeddings=8192, eos_token_id=2, pad_token_id=0, bos_token_id=None
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run_config(model: Path, data: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Values of a config that trains on all rows."""
    return {
        "task": "classification",
        "model": str(model),
        "output_dir": str(output),
        "tracking": "none",
        "data": {"train": str(data), "validation_fraction": 0.0},
        "prompt": PROMPT,
        "training": {"packing": "shared_prefix", "save_steps": 100_000, "logging_steps": 1000, **training},
    }
