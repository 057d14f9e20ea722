"""The launch files are what the libraries that read them accept."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from labeltune.config import build_config
from labeltune.models.precision import Precision
from labeltune.training.preflight import training_arguments

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "distributed"


def test_every_file_says_how_to_launch_it() -> None:
    files = sorted(p for p in FOLDER.iterdir() if p.suffix != ".json")
    assert [p.stem for p in files] == ["ddp", "fsdp2", "slurm", "two_nodes", "zero2", "zero3"]
    for path in files:
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert f"configs/distributed/{path.name}" in head, path
        assert "labeltune train" in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")],
)
def test_accelerate_reads_its_files(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == (kind, 4)
    # `accelerate launch` passes over keys that it does not know.
    known = vars(launch_command_parser().parse_args(["-m", "labeltune"]))
    for key in {**config.fsdp_config, **config.deepspeed_config}:
        assert key in known, key
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert (FOLDER.parents[1] / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_reads_the_deepspeed_files(stage: int) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    found = HfDeepSpeedConfig(str(FOLDER / f"zero{stage}.json"))
    assert found.is_zero2() == (stage == 2) and found.is_zero3() == (stage == 3) and not found.is_offload()
    left_open = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "bf16.enabled")
    assert all(found.get_value(key) == "auto" for key in left_open), "labeltune's config decides"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_accepts_its_files_as_transformers_fills_them(stage: int, tmp_path: Path) -> None:
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = build_config(
        {"output_dir": str(tmp_path), "tracking": "none", "training": {"max_grad_norm": 0.7}}
    )
    arguments = training_arguments(config, Precision("fp32", torch.float32, "cpu"), False)
    filled = HfTrainerDeepSpeedConfig(json.loads((FOLDER / f"zero{stage}.json").read_text(encoding="utf-8")))
    filled.trainer_config_process(arguments)
    assert '"auto"' not in json.dumps(filled.config), "nothing is left open"
    found = DeepSpeedConfig(filled.config)
    assert found.zero_optimization_stage == stage and found.gradient_clipping == 0.7
    assert found.gradient_accumulation_steps == 1


@pytest.mark.parametrize("name", ["slurm.sh", "two_nodes.sh"])
def test_the_scripts_are_shell(name: str) -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    done = subprocess.run([shell, "-n", str(FOLDER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
