"""One `model:` string -> a local folder -> tokenizer and model. Only safetensors weights are loaded."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging

from labeltune.config import HubConfig
from labeltune.errors import MissingExtraError, ModelError, first_line
from labeltune.io.hubs import PICKLES, fetch
from labeltune.io.outputs import is_hub_name
from labeltune.models.pocket import ALTERNATIVES, POCKET_MODELS, check_spec, pocket_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


#: What a snapshot is fetched with: weights in safetensors, configuration, tokenizer; never pickles.
IGNORED_FILES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*"]


@dataclass(frozen=True)
class LocalModel:
    """Where a model's files are, and how to find them again.

    Attributes:
        folder: the files.
        spec: the `model:` string.
        revision: the revision asked for, None for the hub's default.
        cache_dir: the download folder asked for, None for the hub's own.
    """

    folder: Path
    spec: str
    revision: str | None = None
    cache_dir: str | None = None


def resolve_model(spec: str, hub: HubConfig | None = None, *, weights: bool = True) -> LocalModel:
    """Find or fetch the files of a model.

    Args:
        spec: a folder, `ms:org/name` (ModelScope), `hf:org/name` (Hugging Face), `pocket` or `pocket-zh`.
        weights: False where configuration and tokenizer will do; a hub's weights are then not fetched.

    Raises:
        HubError: a hub cannot be reached or has no such model.
        LicenseError: the model's terms have to be accepted first.
        ModelError: the folder is missing, or has no safetensors weights.
    """
    hub = hub or HubConfig()
    check_spec(spec, hub.accept_license)
    if spec in POCKET_MODELS:
        return LocalModel(pocket_folder(spec, hub.accept_license), spec)
    if is_hub_name(spec):
        folder = snapshot(spec, hub, weights=weights)
    else:
        folder = Path(spec).expanduser()
    _check_files(folder, spec, weights)
    return LocalModel(folder, spec, hub.revision, hub.cache_dir)


def snapshot(spec: str, hub: HubConfig, *, weights: bool = True) -> Path:
    """Fetch a hub's model repository, of which only what `IGNORED_FILES` leaves.

    Args:
        spec: `ms:org/name` or `hf:org/name`.

    Raises:
        HubError: the hub cannot be reached or has no such model.
        ModelError: the name has another form.
    """
    check_spec(spec)
    return fetch(
        spec[:2],
        "model",
        spec[3:],
        f"name their folder as model=FOLDER; {ALTERNATIVES}",
        revision=hub.revision,
        cache_dir=hub.cache_dir,
        ignored=IGNORED_FILES if weights else [*IGNORED_FILES, "*.safetensors"],
    )


def _check_files(folder: Path, spec: str, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {spec}: {folder} holds no config.json; it is no model folder")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        found = f"only {', '.join(pickles)}, which are pickles and never loaded" if pickles else "no weights"
        raise ModelError(f"model {spec}: {folder} holds {found}; labeltune reads safetensors")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model or checkpoint folder, with a pad token (its eos where it has none).

    Raises:
        ModelError: the files are missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    # Without its vocabulary transformers makes an empty tokenizer, to which all texts are the same.
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        raise ModelError(f"the tokenizer in {folder} has no vocabulary; tokenizer.json is missing or damaged")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_shape(folder: Path, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, Any]:
    """The config of a model folder, and the auto class that makes its model: a causal language model, or one that reads images
    too, whose text part is used.

    Raises:
        ModelError: the config is damaged or of an unknown kind, or what it describes does not go on with a text.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder:
        return config, AutoModelForImageTextToText
    raise ModelError(
        f"the model in {folder} is of the kind {config.model_type!r}, for which transformers has no causal language model; "
        "choose a model that goes on with a text, such as Qwen3"
    )


def published_shell(folder: Path, trust_remote_code: bool = False) -> torch.nn.Module | None:
    """The model without weights as the class that it is published as, which reads images too, where its text part alone is loaded here
    (Qwen3.5, Llama 4); else None. The layers have other names there: those by which servers know them."""
    config, kind = model_shape(folder, trust_remote_code)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if (
        kind is not AutoModelForCausalLM
        or whole is None
        or whole is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    ):
        return None
    if whole.__name__ not in (config.architectures or ()):
        return None
    import torch

    with torch.device("meta"):
        shell: torch.nn.Module = whole(config)
    return shell


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    published: bool = False,
) -> Any:
    """The causal language model of a folder.

    Args:
        dtype: torch dtype of the weights.
        device: where to put it; None leaves it on the CPU.
        four_bit: quantize to NF4 while loading (bitsandbytes; QLoRA, arXiv:2305.14314).
        published: as the class of `published_shell`, where there is one.

    Raises:
        MissingExtraError: `four_bit` without bitsandbytes.
        ModelError: the files are damaged, or no causal language model.
    """
    logging.disable_progress_bar()
    if trust_remote_code:
        print(f"labeltune: trust_remote_code is on; Python code of {folder} will be run", file=sys.stderr)
    options: dict[str, Any] = {}
    if four_bit:
        options["quantization_config"] = _four_bit(dtype)
    kind = model_shape(folder, trust_remote_code)[1]
    if published and published_shell(folder, trust_remote_code) is not None:
        kind = AutoModelForImageTextToText
    try:
        model = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    return model if device is None or four_bit else model.to(device)


def _four_bit(dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("training.method=qlora", "qlora")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
