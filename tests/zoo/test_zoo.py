"""Every family through every command, against brute force. All of it: `make zoo`, which writes docs/zoo-results.json."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from labeltune.models.kernels import missing_kernels
from zoo.families import BY_NAME, FAMILIES, make_zoo_model
from zoo.run import run_family

#: Largest distance from plain rows in fp32: of a loss and of gradients relative, of scores in nats.
FP32 = {"loss_error": 1e-5, "gradient_error": 1e-3, "score_error": 1e-3}
#: In bf16 this many times what plain rows in bf16 are off, and never more than the last number; but for models that are further
#: off by themselves, as experts are chosen otherwise: there no more than a tenth further than plain rows.
TIMES = 3
BF16 = {"loss_error": (5e-3, 5e-2), "gradient_error": (5e-2, 0.3), "score_error": (0.1, 0.8)}


def faults(case: dict[str, Any]) -> list[str]:
    """What is wrong in a case."""
    if case["crashed"]:
        return [case["crashed"]]
    if case["refused"]:
        return []
    found = []
    for name, allowed in FP32.items():
        if case["format"] == "bf16":
            least, cap = BF16[name]
            plain = case[f"plain_{name}"]
            allowed = max(min(max(TIMES * plain, least), cap), 1.1 * plain)
        if not case[name] <= allowed:
            found.append(f"{name} is {case[name]:.1e}, allowed {allowed:.1e}")
    if case["format"] == "fp32":
        found += ["answers differ from brute force"] if not case["same_answers"] else []
        found += (
            [f"the merged model differs: {case['parity']}"] if "4 of 4 rows" not in case["parity"] else []
        )
    found += ["the resumed run differs"] if not case["resumed_same"] else []
    found += [f"the merged model lacks {case['files_missing']}"] if case["files_missing"] else []
    return found


def check(result: dict[str, Any]) -> None:
    """No case of a family is wrong."""
    wrong = {(case["task"], case["format"]): faults(case) for case in result["cases"]}
    assert not any(wrong.values()), "\n".join(
        f"{key}: {fault}" for key, each in wrong.items() for fault in each
    )


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.fast])
def test_a_family_that_stands_for_others(name: str, tmp_path: Path) -> None:
    tasks = ("classification", "ner") if name == "qwen3_moe" else ("classification",)
    result = run_family(BY_NAME[name], tmp_path, tasks, ("fp32",))
    assert not result["unavailable"]
    check(result)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("qwen3", []),
        ("lfm2", ["causal-conv1d"]),
        ("qwen3_5", ["causal-conv1d", "flash-linear-attention"]),
        ("kimi_linear", ["causal-conv1d", "flash-linear-attention"]),
        ("falcon_h1", ["causal-conv1d", "mamba-ssm"]),
        ("jamba", ["causal-conv1d", "mamba-ssm"]),
    ],
)
def test_kernels_that_a_model_wants_are_known(
    name: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert missing_kernels(make_zoo_model(BY_NAME[name])) == wanted


@pytest.mark.zoo
@pytest.mark.parametrize("name", BY_NAME)
def test_a_family(name: str, tmp_path: Path) -> None:
    result = run_family(BY_NAME[name], tmp_path)
    if "ZOO_RESULTS" in os.environ:
        folder = Path(os.environ["ZOO_RESULTS"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    check(result)
    if result["unavailable"]:
        pytest.skip(result["unavailable"])
