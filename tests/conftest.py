"""Surroundings of every test, and the fixtures that many of them share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("helpers")

from helpers.browsing import chromium  # noqa: E402
from helpers.commands import Result, command  # noqa: E402
from helpers.tiny_models import make_model, make_tokenizer  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# What a shell begins in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["LABELTUNE_LANG"] = "en"  # whatever the locale of who tests
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many threads as cores would wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip whatever trains or starts a process")


def pytest_configure(config: pytest.Config) -> None:
    """`thorough`: random examples for comparisons with other libraries."""
    examples = 30 if config.getoption("--quick") else 250
    settings.register_profile("thorough", max_examples=examples, deadline=None)


#: A file's tests stay together, so one that takes a minute must not be the last: a core would have nothing left to do.
LONG_FILES = (
    "test_docs.py",
    "test_marked.py",
    "test_engines.py",
    "test_client.py",
    "test_training.py",
    "test_ray_engine.py",
    "test_pretended_gpu.py",
    "test_label_studio.py",
    "test_tracking.py",
    "test_sweep.py",
    "test_ranks.py",
    "test_cli.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(scope="session", autouse=True)
def only_what_is_quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --quick, a test or fixture is skipped where it begins to train or to start a process: no list to keep."""
    if not request.config.getoption("--quick"):
        yield
        return

    def skip(*_: Any, **__: Any) -> Any:
        pytest.skip("not quick: it trains or starts a process")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("transformers.Trainer.train", skip)
        for name in ("subprocess.Popen.__init__", "os.fork", "multiprocessing.Process.start"):
            patched.setattr(name, skip)
        yield


@pytest.fixture(scope="module", autouse=True)
def collections_pass_over_what_is_there() -> None:
    """Half a million objects of imported modules: accelerate collects at the end of every training, which took a third of it."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; nobody is logged in to SwanLab there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    yield tmp_path


@pytest.fixture
def labeltune(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run a command in this process, in an empty folder."""
    return lambda *arguments: command(monkeypatch, capsys, *arguments)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two random layers, whatever is loaded."""
    from helpers.runs import predictor_for

    monkeypatch.setattr("labeltune.inference.load.load_predictor", lambda *_, **__: predictor_for())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless; the test is skipped where none is installed."""
    with chromium() as opened:
        yield opened
