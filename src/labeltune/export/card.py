"""The model card: data, measured figures, prompt, limits, licence, and how to load it. Nothing of the user's machine."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from labeltune.errors import ConfigError, DataError
from labeltune.evaluation.summary import SELECTION, shown_headline
from labeltune.export.ollama import model_name
from labeltune.export.parity import Parity
from labeltune.export.vllm import Adapter, adapter_command, base_name, merged_command
from labeltune.io.outputs import is_hub_name
from labeltune.io.run_folder import RunInfo, public_name
from labeltune.io.safe_yaml import read_yaml
from labeltune.models.pocket import POCKET_MODELS

CARD_FILE = "README.md"
#: Labels that a card lists with their rows.
_SHOWN_LABELS = 50


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
    fields = _front_matter(folder / CARD_FILE)
    found = fields.get("license_name") or fields.get("license")
    if found:
        return str(found)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE")):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            first = next((line.strip() for line in lines if line.strip()), "")
            if first:
                return f"{first[:100]} (the base's {path.name})"
    return None


def _front_matter(card: Path) -> dict[str, Any]:
    """The metadata of somebody's card; empty where there is none that can be read."""
    if not card.is_file():
        return {}
    block = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8", errors="replace"))
    try:
        found = read_yaml(block[2], str(card)) if block else None
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


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
    classifies = info.task != "ner"
    metadata = ModelCardData(
        library_name="peft" if facts.kind == "adapter" else "transformers",
        base_model=base_name(info.model) if is_hub_name(info.model) else None,
        pipeline_tag="text-generation",
        tags=["labeltune", "text-classification" if classifies else "token-classification"],
    )
    figures: list[tuple[Mapping[str, Any], str, str | None]] = []
    if facts.validation is not None:
        figures.append((facts.validation, facts.validation.get("rows_are", SELECTION), None))
    if facts.test is not None:
        # Rows that chose the checkpoint stay that, also in a file that was given as a test.
        source = public_name(str(facts.test.get("data", "")))
        figures.append((facts.test, facts.test.get("rows_are", "test"), source))
    made = ModelCard.from_template(
        metadata,
        template_str=resources.files(__package__)
        .joinpath("templates/card.md.j2")
        .read_text(encoding="utf-8"),
        info=info,
        facts=facts,
        base=public_name(info.model),
        figures=figures,
        most_labels=_SHOWN_LABELS,
        number="{:,}".format,
        shown_headline=shown_headline,
        fence=_fence,
    )
    return f"{made.content}\n"


def _fence(text: str) -> str:
    """A code block, with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _download(push: str, folder: str) -> str:
    """The shell command that fetches an adapter: vLLM takes its chat template from a file of this machine only."""
    tool = "hf" if push.startswith("hf:") else "modelscope"
    return shlex.join([tool, "download", base_name(push), "--local-dir", folder])


def usage(
    info: RunInfo,
    adapter: Adapter | None,
    ollama: bool,
    push: str | None,
    called: str,
    text_only: bool = False,
) -> dict[str, str]:
    """How to load it, by heading; the folder is called by the hub's name or by its own.

    Args:
        adapter: None for a merged model.
        text_only: the model reads images too, and was trained on texts.
    """
    where = push or called
    found = {
        "With labeltune": f'from labeltune import load_predictor\n\nwith load_predictor("{where}") as predictor:\n'
        '    print(predictor.predict("..."))'
    }
    if adapter is None:
        place = where.removeprefix("hf:")
        found["With transformers"] = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\nmodel = AutoModelForCausalLM.from_pretrained("{place}")'
        )
        found["With vLLM"] = merged_command(where, called, info.hub.trust_remote_code, text_only)
    else:
        command = adapter_command(public_name(info.model), info.hub, called, called, adapter, text_only)
        found["With vLLM"] = command if push is None else f"{_download(push, called)}\n{command}"
    found["Request to vLLM"] = "the body is in vllm_request.json"
    if ollama:
        found["With Ollama"] = f"ollama create {model_name(called)} -f Modelfile"
    return found
