"""Imports point down the layers of the design; files stay short enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "labeltune"

#: From low to high; a module may import from its own layer and the ones below it.
LAYERS = (
    ("types", "errors", "messages", "client"),
    ("io.safe_yaml",),
    ("config", "config_table", "config_values", "default_prompts", "other_names"),
    ("io", "distributed"),
    ("data",),
    ("prompts",),
    ("models",),
    ("evaluation", "training", "inference", "tracking"),
    ("export",),
    ("sweep", "serve"),
    ("commands",),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
#: The package itself (lazy names), its `python -m`, and the starter files stand outside.
OUTSIDE = {"__init__", "__main__", "starter"}
STRANGERS = {
    "training": {"tracking", "inference"},
    "inference": {"training", "tracking"},
    "serve": {"training", "tracking", "sweep"},
    "sweep": {"serve"},
    "tracking": {"training", "inference"},
    "prompts.classification": {"prompts.ner"},
    "prompts.ner": {"prompts.classification"},
}
MODULES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, package: str) -> Iterator[str]:
    """Every module imported anywhere in a file, also for types only, with what is taken from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) + "." if node.level else ""
            found = (base + (node.module or "")).rstrip(".")
            yield found
            yield from (f"{found}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    package = ".".join(("labeltune", *path.relative_to(SOURCE).parent.parts))
    found = imports(path.read_text(encoding="utf-8"), package)
    return {name.removeprefix("labeltune.") for name in found if name.startswith("labeltune.")}


def test_the_reader_of_imports_sees_every_kind() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    assert set(imports(source, "p.q")) == {"a.b", "c", "c.d", "p.q", "p.q.e", "p.g", "p.g.h"}


def height(module: str) -> int | None:
    """Of a module, or of what is taken from it: a layer's name may be that of one file in a room."""
    parts = module.split(".")
    return HEIGHT.get(".".join(parts[:2]), HEIGHT.get(parts[0]))


def test_every_module_has_a_layer() -> None:
    assert {module_name(path).split(".")[0] for path in MODULES} == {
        name.split(".")[0] for name in HEIGHT
    } | OUTSIDE


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    own = height(name)
    if own is None:
        return
    for imported in own_imports(path):
        other = height(imported)
        if other is not None:
            assert other <= own, f"{name} imports {imported}"
        else:  # a verb of the public API
            assert imported in ("__version__", "train"), f"{name} imports {imported}"
        for part, strangers in STRANGERS.items():
            if name == part or name.startswith(f"{part}."):
                for stranger in strangers:
                    assert not f"{imported}.".startswith(f"{stranger}."), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_one_module_knows_each_tracker(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), "labeltune")}
    for name in ("swanlab", "wandb"):
        assert (name in found) == (module_name(path) == f"tracking.{name}")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_one_module_knows_gradio(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), "labeltune")}
    assert ("gradio" in found) == (module_name(path) == "serve.playground")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_one_module_knows_ray(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), "labeltune")}
    assert ("ray" in found) == (module_name(path) == "inference.ray")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_the_lazy_names_are_the_only_imports_of_the_package() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    loaded = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {name for node in loaded for name in imports(ast.unparse(node), "labeltune")} <= {
        "__future__",
        "__future__.annotations",
        "importlib",
        "typing",
        "typing.TYPE_CHECKING",
        "typing.Any",
    }


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_member_of_trainer_is_overridden_or_called() -> None:
    """Neither its methods nor the attributes that it sets on itself."""
    import inspect

    import transformers

    from labeltune.training.trainer import LabelTrainer

    source = ast.parse(inspect.getsource(transformers.Trainer))
    members = {name for name in dir(transformers.Trainer) if private(name)}
    members |= {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and private(node.attr)
    }
    assert {"_save_checkpoint", "_inner_training_loop", "_train_batch_size"} <= members, "the walk sees them"
    ours = [kind for kind in LabelTrainer.__mro__ if kind.__module__.startswith("labeltune.")]
    assert ours and not [name for kind in ours for name in vars(kind) if private(name)]
    for path in (SOURCE / "training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in members, f"{path.name}:{node.lineno} uses {ast.unparse(node)}"


def test_no_test_imports_another() -> None:
    """What several tests need is in tests/helpers."""
    for path in Path(__file__).parent.rglob("*.py"):
        found = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), "tests")}
        strange = {name for name in found if name == "conftest" or name.startswith("test_")}
        assert not strange, f"{path.name} imports {strange}"
