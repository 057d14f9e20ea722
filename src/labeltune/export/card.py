"""The model card: data, measured figures, prompt, limits, licence, and how to load it. Nothing of the user's machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labeltune.errors import DataError
from labeltune.evaluation.headline import SELECTION, shown_headline
from labeltune.export.ollama import model_name
from labeltune.export.parity import Parity
from labeltune.modeling.pocket import POCKET_MODELS
from labeltune.run_folder import RunInfo, public_name

CARD_FILE = "README.md"
#: Labels that a card lists with their rows.
_SHOWN_LABELS = 50
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


@dataclass(frozen=True)
class Facts:
    """What a card says beside the run's own settings.

    Attributes:
        name: of the model, as its title.
        kind: what the folder holds, `merged model` or `adapter`.
        dtype: number format of the weights.
        license: of the base model, None when it is not known.
        validation: metrics on the rows that chose the checkpoint, None when there are none.
        test: metrics of `labeltune evaluate`, None when none were given.
        parity: None when the gate was off.
        messages: the prompt around a sample text.
        usage: lines of a shell or of Python, by the heading over them.
    """

    name: str
    kind: str
    dtype: str
    license: str | None
    validation: Mapping[str, Any] | None
    test: Mapping[str, Any] | None
    parity: Parity | None
    messages: Sequence[Mapping[str, str]]
    usage: Mapping[str, str]


def base_license(spec: str, folder: Path | None) -> str | None:
    """The base model's licence: what its card's front matter says, else the first line of its licence file."""
    if spec in POCKET_MODELS:
        model = POCKET_MODELS[spec]
        return f"{model.license} ({model.terms})"
    if folder is None:
        return None
    card = folder / CARD_FILE
    if card.is_file():
        front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
        fields = (
            dict(re.findall(r"^(license(?:_name)?):[ \t]*(\S.*?)[ \t]*$", front[1], re.M)) if front else {}
        )
        found = fields.get("license_name") or fields.get("license")
        if found:
            return str(found).strip("'\"")
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE")):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            first = next((line.strip() for line in lines if line.strip()), "")
            if first:
                return f"{first[:100]} (the base's {path.name})"
    return None


def read_metrics(path: Path, task: str) -> dict[str, Any]:
    """A `metrics.json` of `labeltune evaluate`.

    Raises:
        DataError: it is missing or damaged, is of another task, or measures the untuned model.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shown_headline(found)
        rows, base = int(found["rows"]), bool(found.get("base"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no metrics.json of labeltune evaluate ({type(error).__name__}: {error})"
        ) from error
    if found["task"] != task:
        raise DataError(f"{path} measures {found['task']}, the run does {task}")
    if base:
        raise DataError(f"{path} measures the untuned model (--base); evaluate the run itself ({rows} rows)")
    return dict(found)


def card(info: RunInfo, facts: Facts) -> str:
    """The whole card, Markdown with the front matter that hubs read."""
    base = public_name(info.model)
    parts = [
        _front_matter(info, facts),
        f"# {facts.name}\n",
        f"{_task(info)}, fine-tuned from `{base}` with labeltune. This folder holds the {facts.kind} ({facts.dtype}, safetensors).\n",
        "## Data\n",
        _data(info),
        "## Figures\n",
        _figures(facts),
        "## Prompt\n",
        *(f"{m['role']}:\n\n{_fence(m['content'])}\n" for m in facts.messages),
        "## Use\n",
        *(f"{heading}:\n\n{_fence(text)}\n" for heading, text in facts.usage.items()),
        "## Limits\n",
        _limits(info),
        "## Licence\n",
        _license(base, facts.license),
    ]
    return "\n".join(parts)


def _front_matter(info: RunInfo, facts: Facts) -> str:
    kind = "text-classification" if info.task == "classification" else "token-classification"
    lines = ["library_name: " + ("peft" if facts.kind == "adapter" else "transformers")]
    if info.model.startswith(("ms:", "hf:")):
        lines.append(f"base_model: {info.model[3:]}")
    return "\n".join(
        ["---", *lines, "pipeline_tag: text-generation", "tags:", "- labeltune", f"- {kind}", "---\n"]
    )


def _task(info: RunInfo) -> str:
    if info.task == "ner":
        return f"An extractor of named entities of {len(info.labels)} types"
    return f"A text classifier with {len(info.labels)} labels"


def _data(info: RunInfo) -> str:
    found = info.data
    listed = ", ".join(f"`{label}`" for label in info.labels[:_SHOWN_LABELS])
    listed += f" and {len(info.labels) - _SHOWN_LABELS} more" if len(info.labels) > _SHOWN_LABELS else ""
    lines = [f"Labels: {listed}.\n"]
    if not found:
        return "\n".join([*lines, "Which rows it was trained on was not recorded by the run.\n"])
    held_out = found["validation"] or f"a part of {found['train']}"
    lines.append(
        f"Trained on {found['train_rows']:,} rows of `{found['train']}`; {found['validation_rows']:,} validation rows"
        + (f" ({held_out}).\n" if found["validation_rows"] else ".\n")
    )
    unit = "rows" if info.task == "classification" else "entities"
    lines += [f"| label | training {unit} |", "|---|---:|"]
    counts = list(found["labels"].items())
    lines += [f"| {_cell(label)} | {count:,} |" for label, count in counts[:_SHOWN_LABELS]]
    if len(counts) > _SHOWN_LABELS:
        rest = sum(count for _, count in counts[_SHOWN_LABELS:])
        lines.append(f"| {len(counts) - _SHOWN_LABELS} more | {rest:,} |")
    return "\n".join([*lines, ""])


def _figures(facts: Facts) -> str:
    lines = []
    for metrics, rows_are in ((facts.validation, SELECTION), (facts.test, None)):
        if metrics is None:
            continue
        # Rows that chose the checkpoint stay that, also in a file that was given as a test.
        called = rows_are or metrics.get("rows_are", "test")
        source = "" if rows_are else f" `{public_name(str(metrics.get('data', '')))}`"
        decoding = metrics.get("decoding", "exact")
        lines.append(f"On {metrics['rows']:,} {called} rows{source} (decoding={decoding}):\n")
        lines += [f"- {name}: {value}" for name, value in shown_headline(metrics)]
        lines.append("")
    if facts.validation is None:
        lines.append("The run holds no figures on validation rows for this checkpoint.\n")
    if facts.test is None:
        lines.append("No figures on test rows were given to the export.\n")
    if facts.parity is None:
        lines.append("This export was not compared with the run it was made from.\n")
    else:
        lines.append(
            f"This export against the run it was made from, both in {facts.dtype}: {facts.parity}.\n"
        )
    return "\n".join(lines)


def _limits(info: RunInfo) -> str:
    length = info.prompt.max_length
    lines = [
        f"- Trained on prompts of at most {length} tokens, answer included; labeltune shortens longer texts "
        f"(`{info.prompt.truncation}`), other servers do not.",
        "- The figures hold for texts like those it was measured on.",
        "- labeltune reads special tokens inside a text as text; other servers may take them for structure.",
    ]
    if info.task == "classification":
        lines.append(
            "- labeltune scores all labels exactly. A server that is bound to a choice of labels decides token by token, "
            "which may choose another label where two begin alike, and gives no calibrated probability."
        )
    else:
        lines.append("- Only labeltune makes sure that every entity stands in the text, and gives its place.")
    return "\n".join([*lines, ""])


def _license(base: str, known: str | None) -> str:
    said = (
        f"its files say: {known}"
        if known
        else "unknown here, its files do not say; check it before you share this"
    )
    return (
        f"The terms of the base model `{base}` hold for this {'one' if known else 'model'} as well: {said}.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fence(text: str) -> str:
    """A code block, with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def usage(info: RunInfo, merged: bool, ollama: bool, push: str | None, called: str) -> dict[str, str]:
    """How to load it, by heading; the folder is called by the hub's name or by its own."""
    where = push or called
    found = {
        "With labeltune": f'from labeltune import load_predictor\n\nwith load_predictor("{where}") as predictor:\n'
        '    print(predictor.predict("..."))'
    }
    if merged:
        place = where.removeprefix("hf:")
        found["With transformers"] = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\nmodel = AutoModelForCausalLM.from_pretrained("{place}")'
        )
        found["With vLLM"] = f"vllm serve {place}"
    else:
        base = public_name(info.model).removeprefix("hf:").removeprefix("ms:")
        found["With vLLM"] = (
            f"vllm serve {base} --enable-lora --lora-modules {called}={where.removeprefix('hf:')}"
        )
    found["Request to vLLM"] = "the body is in vllm_request.json"
    if ollama:
        found["With Ollama"] = f"ollama create {model_name(called)} -f Modelfile"
    return found
