"""One family through training, prediction, evaluation, a resumed training and a merged export, each compared with brute force."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from helpers.rows import write_jsonl
from labeltune.commands import main
from labeltune.inference.load import load_predictor
from labeltune.inference.predictor import Predictor
from labeltune.types import Entity, Example
from zoo.brute import PlainRow, answer_scores, distance, loss_and_gradients, plain_model
from zoo.families import Family, save_family

Task = Literal["classification", "ner"]
Format = Literal["fp32", "bf16"]
TASKS: tuple[Task, ...] = ("classification", "ner")
FORMATS: tuple[Format, ...] = ("fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

LABELS = ["Sports", "Space", "Space travel", "Art"]
TYPES = ["地点", "地理实体"]
STEPS = 3


@dataclass
class Case:
    """How one task ran in one number format. Errors are distances from plain rows in fp32; `plain_...` are those of plain rows in the run's own
    format, which rounding alone explains.

    Attributes:
        refused: what the first command that refused said; empty where all ran.
        crashed: the traceback of the first command that ended in one.
        training: `packing=` of the steps.
        reason: why it is not what was asked for.
        predicting: the engine's way.
    """

    task: Task
    format: Format
    refused: str = ""
    crashed: str = ""
    training: str = ""
    reason: str = ""
    predicting: str = ""
    loss_error: float = 0.0
    plain_loss_error: float = 0.0
    gradient_error: float = 0.0
    plain_gradient_error: float = 0.0
    score_error: float = 0.0
    plain_score_error: float = 0.0
    same_answers: bool = True
    resumed_same: bool = True
    parity: str = ""
    adapted: list[str] = field(default_factory=list)
    files_missing: list[str] = field(default_factory=list)


class Stopped(Exception):
    """A command did not do what it was asked for; the case says why."""


def run_family(
    family: Family, folder: Path, tasks: Sequence[Task] = TASKS, formats: Sequence[Format] = FORMATS
) -> dict[str, Any]:
    """Everything about one family, ready for JSON."""
    started = time.monotonic()
    cases, gone = [], ""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            save_family(family, folder / "fp32")
            kind = class_for_text(family, folder / "fp32")
        except Exception as error:  # what transformers itself cannot do is a finding too
            gone = f"{type(error).__name__}: {error}".splitlines()[0]
        for task in tasks if not gone else ():
            for number_format in formats:
                cases.append(_run_case(family, kind, folder, task, number_format))
                # The commands collect garbage many times; what imports made is not looked through again.
                gc.collect()
                gc.freeze()
    return {
        "family": family.name,
        "attends": family.attends,
        "template": family.template,
        "unavailable": gone,
        "seconds": round(time.monotonic() - started, 1),
        "cases": [asdict(case) for case in cases],
    }


def class_for_text(family: Family, folder: Path) -> str | None:
    """The class that a family's folder is loaded with: None for transformers' causal language model, which is asked where it knows the
    family. Of a model that reads images too it may be the text part alone, which must then answer as the whole does.
    """
    if family.model is None:
        plain_model(folder, None, None, torch.float32)
        return None
    if type(AutoConfig.from_pretrained(folder)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return family.model
    text, whole = (plain_model(folder, None, kind, torch.float32) for kind in (None, family.model))
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        found, right = (model(input_ids=ids, use_cache=False).logits for model in (text, whole))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    return None


def _run_case(family: Family, kind: str | None, folder: Path, task: Task, number_format: Format) -> Case:
    case = Case(task, number_format)
    base = folder / number_format
    if not base.is_dir():
        shutil.copytree(folder / "fp32", base)
        plain_model(folder / "fp32", None, family.model, DTYPES[number_format]).save_pretrained(base)
    place = folder / f"{task}-{number_format}"
    place.mkdir()
    try:
        _Walk(kind, base, place, case).everything()
    except Stopped:
        pass
    except Exception:  # outside of a command: the library itself, or the brute force beside it
        case.crashed = traceback.format_exc()
    return case


@dataclass
class _Walk:
    """The commands of one case, one after the other."""

    kind: str | None
    base: Path
    place: Path
    case: Case

    def everything(self) -> None:
        rows = classification(10) if self.case.task == "classification" else ner(10)
        # All training rows are one step, so that their order is nobody's concern.
        self.train_rows, self.other_rows = rows[:6], rows[6:]
        write_jsonl(self.place / "train.jsonl", self.train_rows)
        write_jsonl(self.place / "other.jsonl", self.other_rows)
        self.train()
        self.compare_steps()
        self.predict()
        self.resume()
        self.export()

    @property
    def run(self) -> Path:
        return self.place / "run"

    def command(self, *arguments: str) -> str:
        """What a command printed on standard error.

        Raises:
            Stopped: it refused, or crashed.
        """
        code, err = run_command(*arguments)
        if code is None:
            self.case.crashed = err
            raise Stopped
        if code != 0:
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            said = err[err.index("error: ") + 7 :].strip() if errors else err
            self.case.refused = f"{arguments[0]}: {said}"
            if code != 2 or len(errors) != 1:
                self.case.crashed = f"exit code {code}: {err}"
            raise Stopped
        return err

    def training_arguments(self) -> list[str]:
        task, number_format = self.case.task, self.case.format
        values = {
            "task": task,
            "model": str(self.base),
            "output_dir": str(self.run),
            "tracking": "none",
            "data.train": str(self.place / "train.jsonl"),
            "data.validation": str(self.place / "other.jsonl"),
            "data.workers": 1,
            "data.labels": LABELS if task == "classification" else TYPES,
            "prompt.system": "Read the text and answer, as you have learned to answer: 你是一个文本分类领域的专家",
            "prompt.max_length": 256,
            "lora.dropout": 0.0,
            "lora.r": 4,
            "training.precision": number_format,
            "training.batch_size": 6,
            "training.epochs": STEPS,
            "training.learning_rate": 5e-3,
            "training.scheduler": "constant",
            "training.max_grad_norm": 1e9,
            "training.save_steps": 1,
            "training.save_total_limit": STEPS,
            "training.logging_steps": 1,
            "eval.metric": "loss",
            "generation.max_new_tokens": 24,
        }
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]

    def train(self) -> None:
        self.said = self.command(
            "train", "--data", str(self.place / "train.jsonl"), *self.training_arguments()
        )
        found = re.search(r"steps: packing=(\w+), at most ([\d,]+) tokens", self.said)
        assert found is not None, self.said
        self.case.training = "one_by_one" if found[2] == "1" else found[1]
        warned = re.search(
            r"does not compute what this model computes row by row \((.*)\); training goes on", self.said
        )
        self.case.reason = warned[1] if warned else ""
        weights = load_file(self.run / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
        self.case.adapted = sorted(
            {re.sub(r"\d+", "*", name).replace("base_model.model.", "") for name in weights}
        )

    def compare_steps(self) -> None:
        """Loss and gradients of every step, with the weights that it began with."""
        log = json.loads((self.run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        losses = {line["step"]: line["loss"] for line in log if "loss" in line}
        with load_predictor(self.run, device="cpu", precision="fp32") as predictor:
            rows = [training_row(predictor, example(self.case.task, row)) for row in self.train_rows]
        mixed = None if self.case.format == "fp32" else torch.bfloat16
        momentum: dict[str, torch.Tensor] = {}
        for step in range(1, STEPS + 1):
            # The adapter's second matrix is zero at first, so that the first step leaves the first one as it was.
            checkpoint = self.run / f"checkpoint-{max(1, step - 1)}"
            model = plain_model(self.base, checkpoint, self.kind, torch.float32)
            if step == 1:
                _zero_second_matrices(model)
            loss, gradients = loss_and_gradients(model, rows)
            before, momentum = momentum, adam_momentum(self.run / f"checkpoint-{step}", model)
            used = {n: (m - 0.9 * before.get(n, torch.zeros_like(m))) / 0.1 for n, m in momentum.items()}
            self._note("loss_error", abs(losses[step] - loss) / abs(loss))
            self._note("gradient_error", distance(used, gradients))
            if mixed:
                rough = plain_model(self.base, checkpoint, self.kind, mixed)
                if step == 1:
                    _zero_second_matrices(rough)
                own_loss, own = loss_and_gradients(rough, rows, mixed)
                self._note("plain_loss_error", abs(own_loss - loss) / abs(loss))
                self._note("plain_gradient_error", distance(own, gradients))

    def _note(self, name: str, value: float) -> None:
        setattr(self.case, name, max(getattr(self.case, name), value if value == value else float("inf")))

    def predict(self) -> None:
        data = str(self.place / "other.jsonl")
        self.command("predict", str(self.run), data, "--output", str(self.place / "answers.jsonl"))
        self.command("evaluate", str(self.run), "--data", data, "--output", str(self.place / "report"))
        examples = [example(self.case.task, row) for row in [*self.other_rows, *self.train_rows]]
        with load_predictor(self.run, device="cpu", precision=self.case.format) as predictor:
            if self.case.task == "classification":
                self._compare_scores(predictor, examples)
            else:
                self._compare_entities(predictor, examples)
            self.case.predicting = way_of(predictor)

    def _compare_scores(self, predictor: Predictor, examples: list[Example]) -> None:
        scores = [row.log_probabilities for row in predictor.log_probabilities(examples)]
        asked = []
        for row in examples:
            answers = [tuple(predictor.builder.answer_ids(label)) for label in LABELS]
            asked.append((predictor.builder.prompt(row).ids, answers))
        best = self.run / "best"
        exact = plain_model(self.base, best, self.kind, torch.float32)
        right = [answer_scores(exact, *each) for each in asked]
        self.case.score_error = _largest(scores, right)
        if self.case.format == "bf16":
            rough = plain_model(self.base, best, self.kind, torch.bfloat16)
            self.case.plain_score_error = _largest([answer_scores(rough, *each) for each in asked], right)
        else:
            self.case.same_answers = [_first(row) for row in scores] == [_first(row) for row in right]

    def _compare_entities(self, predictor: Predictor, examples: list[Example]) -> None:
        given = [each.answer for each in predictor.predict(examples)]
        with load_predictor(self.run, device="cpu", precision=self.case.format) as plain:
            run_plainly(plain)
            self.case.same_answers = given == [each.answer for each in plain.predict(examples)]

    def resume(self) -> None:
        """As if killed before the last checkpoint."""
        last = self.run / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
        before = load_file(last)
        shutil.rmtree(last.parent)
        for name in ("finished.json", "best"):
            (self.run / name).unlink()
        self.command(
            "train", "--data", str(self.place / "train.jsonl"), *self.training_arguments(), "--resume"
        )
        after = load_file(last)
        self.case.resumed_same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    def export(self) -> None:
        target = self.place / "merged"
        # Rounding may turn the answers of random weights; the shift of the probabilities is looked at.
        tolerance = ["--tolerance", "0.99"] if self.case.format == "bf16" else []
        data = ["--verify", str(self.place / "other.jsonl")]
        said = self.command("export", str(self.run), str(target), "--merged", *data, *tolerance)
        self.case.parity = next((line for line in said.splitlines() if "parity in" in line), "").strip()
        whole = "vision_config" in json.loads((target / "config.json").read_text("utf-8"))
        kept = {path.name for path in self.base.iterdir() if whole and "processor" in path.name}
        self.case.files_missing = sorted(kept - {path.name for path in target.iterdir()})


def run_command(*arguments: str) -> tuple[int | None, str]:
    """A command's exit code and standard error; None and the traceback where it crashed."""
    err, argv = io.StringIO(), sys.argv
    sys.argv = ["labeltune", *arguments]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            main.run()
    except SystemExit as ended:
        return int(ended.code or 0), err.getvalue()
    except Exception:
        return None, traceback.format_exc()
    finally:
        sys.argv = argv
    return 0, err.getvalue()


def way_of(predictor: Predictor) -> str:
    """How the predictor runs its model."""
    return str(predictor.engine._scoring or predictor.engine._decoding)


def run_plainly(predictor: Predictor) -> None:
    """One plain forward pass after the other."""
    predictor.engine._scoring = predictor.engine._decoding = "one_by_one"


def adam_momentum(checkpoint: Path, model: Any) -> dict[str, torch.Tensor]:
    """Adam's first moments, by the names of the trained weights."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: state[at]["exp_avg"] for at, name in enumerate(names) if at in state}


def _zero_second_matrices(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)


def training_row(predictor: Predictor, row: Example) -> PlainRow:
    """Prompt, answer and end of turn as training reads them."""
    encoded = predictor.builder.training(row)
    start, end = encoded.answer_span
    return PlainRow(tuple(encoded.ids[:start]), tuple(encoded.ids[start:end]))


def _largest(found: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    differences = [
        abs(x - y) for xs, ys in zip(found, right, strict=True) for x, y in zip(xs, ys, strict=True)
    ]
    return max(differences) if all(d == d for d in differences) else float("inf")


def _first(row: Sequence[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def classification(count: int) -> list[dict[str, Any]]:
    """Texts of several lengths, whose first word tells the label."""
    words = {"Sports": "match", "Space": "rocket", "Space travel": "crew", "Art": "paint"}
    rows = []
    for number in range(count):
        label = LABELS[number % len(LABELS)]
        text = f"{words[label]} {number} " + "and then it rained " * (number % 3)
        rows.append({"id": str(number), "text": text.strip(), "category": LABELS, "output": label})
    return rows


def ner(count: int) -> list[dict[str, Any]]:
    """Texts with one entity, every third with none."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        text = f"今天下雨 {number}" if number % 3 == 2 else f"他在南京 {number} " + "看比赛" * (number % 2)
        entity = {
            "start_idx": 2,
            "end_idx": 4,
            "entity_text": "南京",
            "entity_label": "GPE",
            "entity_names": TYPES[1:],
        }
        rows.append({"id": str(number), "text": text, "entities": [] if number % 3 == 2 else [entity]})
    return rows


def example(task: Task, row: dict[str, Any]) -> Example:
    """The row as labeltune reads it."""
    if task == "classification":
        return Example(row["id"], row["text"], tuple(row["category"]), label=row["output"])
    entities = tuple(
        Entity(e["entity_text"], TYPES[1], e["start_idx"], e["end_idx"]) for e in row["entities"]
    )
    return Example(row["id"], row["text"], entities=entities)
