"""The documentation is true: its commands run, its table is current, and both languages say the same commands."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import zoo.table
from helpers.rows import classification_rows, ner_rows, write_jsonl
from labeltune.config import config_keys
from labeltune.config_table import PAGES as TABLE_PAGES
from labeltune.config_table import Language, chinese_meanings, replace_table
from zoo.families import BY_NAME

ROOT = Path(__file__).resolve().parents[1]
#: Topics that have a page in each language.
TOPICS = (
    "accuracy",
    "config",
    "data",
    "evaluate",
    "export",
    "labelling",
    "models",
    "predict",
    "scale",
    "serve",
    "sweep",
    "train",
)
#: English page -> the same in Chinese.
PAGES = {"README.md": "README.zh-CN.md", **{f"docs/{t}.md": f"docs/zh/{t}.md" for t in TOPICS}}
#: Pages that begin with a trained run, `output/classification`.
ABOUT_A_RUN = ("evaluate", "export", "labelling", "predict", "serve")
#: What is not run here: installations, Ray, whose start takes longer than all else (tests/test_ray_engine.py), and Label Studio
#: (tests/label_studio).
NOT_RUN = re.compile(r"^(make|pip) |--engine ray| label-studio start")
README_LINES = 140

FAKE_MODELSCOPE = """
import os, sys, types
fake = types.ModuleType("modelscope")
fake.snapshot_download = lambda repo, **_: os.environ["LABELTUNE_TEST_MODEL"]
sys.modules["modelscope"] = fake
"""


def blocks(page: str, language: str) -> list[list[str]]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block.splitlines() for block in found]


def without_comments(found: list[list[str]]) -> list[list[str]]:
    stripped = [[re.sub(r"(^|\s+)# .*", "", line) for line in block] for block in found]
    return [[line for line in block if line.strip()] for block in stripped]


def commands(page: str) -> list[list[str]]:
    return [[line.strip() for line in block] for block in without_comments(blocks(page, "bash"))]


#: Runs commands in a folder.
Run = Callable[[Sequence[str], Path], None]


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Where commands run: `pocket` and ModelScope give a two-layer model, and nobody is logged in to SwanLab."""
    folder = tmp_path_factory.mktemp("surroundings")
    shutil.copytree(model_folder, folder / "cache" / "pocket-1")
    (folder / "sitecustomize.py").write_text(FAKE_MODELSCOPE, encoding="utf-8")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "SWANLAB_API_KEY"},
        "HOME": str(folder),
        "LABELTUNE_CACHE": str(folder / "cache"),
        "LABELTUNE_TEST_MODEL": str(model_folder),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
    }
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "helpers" / "run_page.py"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def in_folder(lines: Sequence[str], folder: Path) -> None:
            log = folder / "printed.txt"
            task = {"folder": str(folder), "commands": list(lines), "log": str(log)}
            print(json.dumps(task), file=process.stdin, flush=True)
            failed = json.loads(process.stdout.readline())
            printed = log.read_text(encoding="utf-8")
            assert failed is None, f"{failed}\n{printed[-3000:]}"
            assert "Traceback" not in printed, printed[-3000:]

        yield in_folder
        process.stdin.close()


@pytest.fixture(scope="module")
def trained(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample of `labeltune init classification` and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    run(["labeltune init classification", "labeltune train classification.yaml training.max_steps=2"], folder)
    return folder


@pytest.fixture
def world(in_folder: Path) -> Path:
    """A working folder with the original's data, and with files of somebody's own."""
    rows = classification_rows(36)
    for name, some in (("train", rows[:24]), ("test", rows[24:30]), ("ccfbdci", ner_rows(24))):
        write_jsonl(in_folder / f"{name}.jsonl", some)
    for name, some, encoding, columns in (
        ("my_data", rows[:24], "utf-8", ("text", "label")),
        ("my_test", rows[24:30], "utf-8", ("text", "label")),
        ("new_texts", rows[30:], "utf-8", ("text",)),
        ("my_body", rows[:24], "gb18030", ("body", "topic")),
    ):
        with (in_folder / f"{name}.csv").open("w", encoding=encoding, newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows((row["text"], row["output"])[: len(columns)] for row in some)
    return in_folder


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_a_page_run(page: str, world: Path, run: Run, request: pytest.FixtureRequest) -> None:
    lines = [line for block in commands(page) for line in block if not NOT_RUN.search(line)]
    lines = [
        line + " prompt.max_length=600 generation.max_new_tokens=8" * ("train_qwen2_ner" in line)
        for line in lines
    ]
    lines += ["\n".join(block) + "\n" for block in blocks(page, "python")]
    if Path(page).stem in ABOUT_A_RUN:
        shutil.copytree(request.getfixturevalue("trained"), world, dirs_exist_ok=True)
    run(lines, world)
    if page == "README.md":
        assert len(lines) >= 10
        assert (world / "output" / "Qwen2-NER" / "best").exists()


@pytest.mark.parametrize(("page", "chinese"), PAGES.items())
def test_both_languages_have_the_same_commands(page: str, chinese: str) -> None:
    for language in ("bash", "python", "console"):
        first, second = (without_comments(blocks(each, language)) for each in (page, chinese))
        if language == "python":  # a reader's own texts are in the reader's language
            first, second = (re.sub(r'"[^"/]*[.。]"', '"TEXT"', str(each)) for each in (first, second))
        assert first == second, language


def test_pages_in_chinese_hold_no_english_comments() -> None:
    for page in PAGES.values():
        for language in ("bash", "python", "yaml"):
            for line in (line for block in blocks(page, language) for line in block):
                comment = re.search(r"(?:^|\s)# (.*)", line)
                assert comment is None or re.search("[\u3400-\u9fff]|->", comment[1]), f"{page}: {line}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_first_page_is_short(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize(("language", "page"), TABLE_PAGES.items())
def test_the_table_of_keys_is_current(language: Language, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert replace_table(text, language) == text, "run: python -m labeltune.config_table"


@pytest.mark.parametrize(("language", "page"), zoo.table.PAGES.items())
def test_the_table_of_models_is_current(language: Language, page: Path) -> None:
    text, results = page.read_text("utf-8"), json.loads(zoo.table.RESULTS.read_text("utf-8"))
    assert {result["family"] for result in results} == set(BY_NAME)
    assert zoo.table.with_table(text, results, language) == text, "run: make zoo"


def test_every_key_is_explained_in_chinese() -> None:
    assert list(chinese_meanings()) == [key for key, *_ in config_keys()], "mend config_keys.zh.yaml"


EVERY_PAGE = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
)


def anchors(page: Path) -> set[str]:
    """What a link can lead to inside a page: its headings, as GitHub names them, and `<a name>`."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings} | set(
        re.findall(r'<a name="([^"]+)">', text)
    )


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = re.sub(r'src="([^"]+)"', r"](\1)", path.read_text(encoding="utf-8"))
    for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", text):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not place or place in anchors(file), f"{target}#{place}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CONTRIBUTING.zh-CN.md"])
def test_places_to_look_at_are_there(page: str) -> None:
    """A link to a source file with a name behind it: the file defines that name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"\]\((src/[^)]+\.py)\), `(\w+)`", text)
    assert len(found) >= 7
    for path, name in found:
        defined = rf"^\s*(def|class) {name}\b"
        assert re.search(defined, (ROOT / path).read_text("utf-8"), re.MULTILINE), f"{path} has no {name}"


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_weights_or_large_files_are_committed() -> None:
    for path in tracked_files():
        assert path.suffix not in {".safetensors", ".gguf", ".bin", ".pt", ".whl"}, path
        assert path.stat().st_size < 1_000_000, path


def test_configs_and_examples_are_valid() -> None:
    from labeltune.config import load_config

    for path in [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")]:
        load_config(path)
        assert "labeltune train" in path.read_text(encoding="utf-8"), f"{path} does not say how to launch it"


def test_the_starter_of_entities_trains(in_folder: Path, run: Run) -> None:
    limits = "training.max_steps=1 generation.max_new_tokens=4 tracking=none"
    lines = ("labeltune init ner", "labeltune data check ner.jsonl", f"labeltune train ner.yaml {limits}")
    run(lines, in_folder)
