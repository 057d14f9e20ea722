"""The commands of the original recipe, over the public functions: same files, same folders, same defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import labeltune
from labeltune.commands.main import run_app, single
from labeltune.commands.options import Overrides, OverwriteRun, ResumeTraining
from labeltune.config import RunConfig, TaskName, load_config
from labeltune.data.labels import named_labels
from labeltune.default_prompts import NER_LABELS
from labeltune.errors import DataError
from labeltune.io.run_folder import find_checkpoint
from labeltune.types import Prediction

TRAIN_FILES = {"classification": "train.jsonl", "ner": "ccfbdci.jsonl"}
#: What `labeltune data download` calls their data.
DATA = {"classification": "fudan", "ner": "ccfbdci"}
PROJECTS = {"classification": "Qwen2-fintune", "ner": "Qwen2-NER-fintune"}

DOCUMENT = (
    "某型可重复使用运载火箭的一级箭体在海上平台平稳着陆，这是该型号第三次完成回收试验。研制团队介绍，新一代箭载计算机"
    "把着陆段的推力调节周期缩短到原来的一半，栅格舵与反推发动机由同一套制导律协同控制，落点误差不超过五米。"
    "下一步，工程师将拆检发动机涡轮泵和贮箱焊缝，评估材料在再入加热与振动条件下的疲劳寿命，为年内的载荷飞行做准备。"
)


def original_config(task: TaskName, overrides: list[str]) -> RunConfig:
    """The original's settings; faulty rows are skipped and counted, because its published files hold some."""
    defaults = [
        f"task={task}",
        f"data.train={TRAIN_FILES[task]}",
        "data.on_error=skip",
        "data.validation_fraction=0.1",
        f"swanlab.project={PROJECTS[task]}",
    ]
    if task == "ner":
        defaults.append(f"data.labels=[{', '.join(NER_LABELS)}]")
    return load_config(None, [*defaults, *overrides])


def train_main(task: TaskName) -> None:
    """`train_qwen2.py` and `train_qwen2_ner.py`."""

    def command(
        overrides: Overrides = None,
        model: Annotated[str, typer.Option(help="Base model.")] = "ms:qwen/Qwen2-1.5B-Instruct",
        resume: ResumeTraining = False,
        overwrite: OverwriteRun = False,
        accept_license: Annotated[str | None, typer.Option(help="Accept a model's terms by name.")] = None,
    ) -> None:
        changes = [f"model={model}", *(overrides or [])]
        if accept_license is not None:
            changes.append(f"hub.accept_license={accept_license}")
        config = original_config(task, changes)
        if config.data.train == TRAIN_FILES[task] and not Path(config.data.train).exists():
            raise DataError(
                f"data file {config.data.train} does not exist; fetch it with: labeltune data download {DATA[task]}"
            )
        labeltune.train(config, resume=resume, overwrite=overwrite)

    command.__doc__ = f"Fine-tune Qwen2 on {TRAIN_FILES[task]}, as the original script did."
    run_app(single(command))


def predict_main() -> None:
    """`predict_qwen2.py`."""

    def command(
        text: Annotated[str, typer.Option("--text", "-t", help="The document.")] = DOCUMENT,
        category: Annotated[
            str | None, typer.Option(help="Candidates, between commas; the adapter's label set when missing.")
        ] = None,
        checkpoint: Annotated[
            str | None, typer.Option(help="Checkpoint; the newest in ./output/Qwen2 when missing.")
        ] = None,
    ) -> None:
        """Load a checkpoint and predict one document."""
        folder = find_checkpoint(checkpoint or "./output/Qwen2", prefer_newest=True)
        labels = named_labels("--category", category) if category else None
        from labeltune.inference.load import load_predictor

        with load_predictor(folder, merge=True) as predictor:
            prediction = predictor.predict([text], labels)[0]
        print(
            prediction.answer
            if prediction.label is None and prediction.entities is None
            else _shown(prediction)
        )

    run_app(single(command))


def _shown(prediction: Prediction) -> str:
    if prediction.entities is None:
        return str(prediction.label)
    return "\n".join(json.dumps(e.to_dict(), ensure_ascii=False) for e in prediction.entities)
