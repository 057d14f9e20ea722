"""The names the package gives away, and what it says about them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import labeltune

SOURCE = Path(__file__).resolve().parents[1] / "src" / "labeltune"
HEAVY = ("torch", "transformers", "datasets", "peft", "swanlab", "modelscope", "pandas", "numpy", "pydantic")


def test_every_name_resolves() -> None:
    assert len(labeltune.__all__) == len(set(labeltune.__all__)) > 8
    for name in labeltune.__all__:
        assert getattr(labeltune, name) is not None
        assert not (SOURCE / name).is_dir(), "a package of that name would hide it once it is imported"
        assert name in dir(labeltune)
    assert {"train", "evaluate", "predict", "load_predictor", "load_config", "Example", "Entity"} <= set(
        labeltune.__all__
    )


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        (alias.asname, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == {(name, f"labeltune.{home}") for name, home in labeltune._HOMES.items()}


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = labeltune.nothing


def test_the_version_is_the_distributions() -> None:
    pyproject = (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{labeltune.__version__}"\n' in pyproject


def test_importing_the_package_is_quick() -> None:
    code = f"import sys, labeltune; print([name for name in {HEAVY!r} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield path.name, tree
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_names_have_docstrings(path: Path) -> None:
    missing = [name for name, node in public_definitions(path) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing
