"""What a run was trained with: kept in its checkpoints, so that a resumed run goes on with the same, and a finished one is
recognised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import KEPT_AND_SHOWN, RunConfig, is_among, leaves
from labeltune.errors import ConfigError, ModelError, clipped
from labeltune.io.outputs import write_json
from labeltune.io.run_folder import ADAPTER_FILE, RECORD_FILE, SELECTION_FILE, RunInfo, validation_file
from labeltune.training.packing import chosen, steps_in_all

if TYPE_CHECKING:
    from labeltune.data.loading import Splits

#: In a run folder, once everything is done: where training ended.
FINISHED_FILE = "finished.json"

#: Keys and sections that a resumed run may change: how long it trains, what is kept and shown, and what never changes a
#: result. The rows are compared by their content, so the keys of `data` may change as long as the rows do not.
MAY_CHANGE = (
    *KEPT_AND_SHOWN,
    "data",
    "training.epochs",
    "training.max_steps",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.packing",
    "training.max_tokens_per_pack",
    "training.gradient_checkpointing",
    "training.compile",
    "training.collective_timeout",
    "eval.patience",
    "eval.min_delta",
    "generation.batch_size",
    "calibrate.linear",
    "calibrate.temperature",
    "calibrate.thresholds",
)
#: Keys that runs of labeltune 0.1.0 could not set, and what they did.
_CAME_LATER: dict[str, Any] = {
    "training": {"class_weights": "none", "label_smoothing": 0.0, "negatives": "all", "objective": "tokens"},
    "calibrate": {"thresholds": "label"},
    "data": {"columns": {"labels": "labels"}},
}
#: Figures that Trainer's log ends with.
_LAST_LOGGED = "train_runtime"


def run_record(config: RunConfig, splits: Splits) -> bytes:
    """Content of `RECORD_FILE`: the config, and number and fingerprint of the rows on each side of the split."""
    record = {"config": config.model_dump(mode="json"), "rows": _rows(splits)}
    return (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode()


def _rows(splits: Splits) -> dict[str, dict[str, Any]]:
    sides = {"train": splits.train, "validation": splits.validation}
    return {
        name: {"rows": len(side), "fingerprint": splits.fingerprints[name]}
        for name, side in sides.items()
        if side is not None
    }


def check_unchanged(checkpoint: Path, config: RunConfig, splits: Splits, summary: Mapping[str, Any]) -> None:
    """Whether config and rows are those that a checkpoint was trained with, but for `MAY_CHANGE`.

    A checkpoint written by labeltune 0.1.0 has no record; then what it does tell is compared.

    Args:
        summary: the rows as a model card tells of them (`RunInfo.data`).

    Raises:
        ConfigError: they are not; the message names every key with both values.
        ModelError: the checkpoint is damaged.
    """
    info = RunInfo.load(checkpoint)
    record = _read(checkpoint / RECORD_FILE)
    now = leaves(config.model_dump(mode="json"))
    if record is not None:
        # A record of an earlier version lacks the keys that came later.
        later = {"prompt": info.prompt.model_dump(mode="json"), "data": {"entities": info.entities}}
        then = leaves(_CAME_LATER) | leaves(later) | leaves(record["config"])
        same_rows = record["rows"] == _rows(splits)
    else:
        then = _told(checkpoint, info)
        counted = ("train_rows", "validation_rows", "labels")
        same_rows = all(info.data.get(key, summary[key]) == summary[key] for key in counted)
    differing = [
        (key, then[key], now[key])
        for key in now
        if key in then and not is_among(key, MAY_CHANGE) and not _same(key, then[key], now[key])
    ]
    if not same_rows:
        differing += [
            (key, then[key], now[key])
            for key in now
            if key.startswith("data.") and then.get(key, now[key]) != now[key]
        ]
    lines = [f"{key}: {_shown(old)} in {checkpoint.name}, {_shown(new)} now" for key, old, new in differing]
    if info.labels != splits.labels:
        old, new = ", ".join(info.labels), ", ".join(splits.labels)
        lines.append(f"labels: {clipped(old, 200)} in {checkpoint.name}, {clipped(new, 200)} now")
    if not same_rows:
        old = _counted(record["rows"]) if record is not None else _counted_in(info.data)
        lines.append(
            f"rows of {config.data.train}: {old} in {checkpoint.name}, {_counted(_rows(splits))} now, not the same ones"
        )
    if lines:
        raise ConfigError(
            f"--resume goes on with what {checkpoint} was trained with, and this is something else:\n  "
            + "\n  ".join(lines)
            + "\nTake the old values, or train anew with --overwrite or another output_dir"
        )


def _counted(rows: Mapping[str, Any]) -> str:
    return _counted_in(
        {f"{name}_rows": rows.get(name, {}).get("rows", 0) for name in ("train", "validation")}
    )


def _counted_in(data: Mapping[str, Any]) -> str:
    return f"{data.get('train_rows')} for training and {data.get('validation_rows')} for validation"


def _told(checkpoint: Path, info: RunInfo) -> dict[str, Any]:
    """What a checkpoint without a record tells of its config."""
    known = {
        "task": info.task,
        "model": info.model,
        "hub": {"revision": info.hub.revision},
        "data": {"entities": info.entities},
        "prompt": info.prompt.model_dump(mode="json"),
        "generation": info.generation.model_dump(mode="json"),
        "calibrate": info.calibrate.model_dump(mode="json"),
    }
    adapter = _read(checkpoint / ADAPTER_FILE) if info.adapter else None
    if adapter is not None:
        names = {
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "rslora": "use_rslora",
            "dora": "use_dora",
        }
        known["lora"] = {ours: adapter[theirs] for ours, theirs in names.items() if theirs in adapter}
    known["training"] = _CAME_LATER if info.adapter else {**_CAME_LATER, "method": "full"}
    return leaves(known)


def _same(key: str, old: Any, new: Any) -> bool:
    if key == "model" and old != new:
        return Path(old).is_dir() and Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


def _shown(value: object) -> str:
    return clipped(json.dumps(value, ensure_ascii=False), 200)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error


@dataclass(frozen=True)
class TrainResult:
    """Where the run ended.

    Attributes:
        last: the last checkpoint.
        best: `output_dir/best`, the checkpoint with the best `metric` on validation rows (the last one without such rows).
        metric_name: what picked it (`macro_f1`, `span_f1`, `accuracy` or `loss`), None without validation rows.
        metric: its value there.
        validation_loss: the loss there.
        seconds: time spent in the training loop.
        unimproved: checkpoints in a row without improvement at the end, where `eval.patience` counts them.
    """

    last: Path
    best: Path
    steps: int
    train_loss: float
    metric_name: str | None
    metric: float | None
    validation_loss: float | None
    seconds: float
    unimproved: int = 0


@dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
        last: name of the last checkpoint that is kept.
        unimproved: checkpoints in a row without improvement at its end, where `eval.patience` counts them.
    """

    steps: int
    last: str
    train_loss: float
    metric_name: str | None
    metric: float | None
    validation_loss: float | None
    unimproved: int = 0

    @staticmethod
    def of(result: TrainResult) -> Finished:
        """What to note of a run that ended like this."""
        return Finished(last=result.last.name, **{name: getattr(result, name) for name in _AS_IN_A_RESULT})

    def result(self, output_dir: Path) -> TrainResult:
        """The same as the result of a training that had nothing to do."""
        known = {name: getattr(self, name) for name in _AS_IN_A_RESULT}
        return TrainResult(last=output_dir / self.last, best=output_dir / "best", seconds=0.0, **known)

    def save(self, output_dir: Path) -> None:
        """Write it, when everything is done."""
        write_json(output_dir / FINISHED_FILE, vars(self))


#: Fields that say the same in a `TrainResult`.
_AS_IN_A_RESULT = tuple(field.name for field in fields(Finished) if field.name != "last")


def finished_run(checkpoint: Path, config: RunConfig, rows: int, validated: bool) -> Finished | None:
    """How the run that a checkpoint belongs to ended, when there is nothing left to do for this config; else None.

    Args:
        checkpoint: the one that training would go on from.
        rows: number of training rows.
        validated: the run has validation rows, on which a report is written at its end.
    """
    output = checkpoint.parent
    values = _read(output / FINISHED_FILE)
    try:
        ended = Finished(**values) if values is not None else _finished_before(checkpoint, config, validated)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{output / FINISHED_FILE} is damaged: {error}") from error
    if ended is None or ended.last != checkpoint.name or not (output / "best").exists():
        return None
    return ended if _at_its_end(config, rows, validated, ended.steps, ended.unimproved) else None


def _finished_before(checkpoint: Path, config: RunConfig, validated: bool) -> Finished | None:
    """The same of a run of labeltune 0.1.0, which left no note of its end but its files."""
    state, log = checkpoint / "trainer_state.json", checkpoint.parent / "metrics.jsonl"
    found = _read(state)
    if found is None or not log.is_file():
        return None
    lines = log.read_text(encoding="utf-8").splitlines()
    ended = json.loads(lines[-1]) if lines else {}
    chosen = checkpoint.parent / "best" / SELECTION_FILE
    if _LAST_LOGGED not in ended or ended.get("step") != found["global_step"]:
        return None
    if validated and not (chosen.is_file() and validation_file(checkpoint, "report.html")):
        return None
    best = found["best_global_step"]
    return Finished(
        found["global_step"],
        checkpoint.name,
        ended["train_loss"],
        config.metric if best else None,
        found["best_metric"],
        best_loss(found["log_history"], best) if best else None,
        unimproved_in(found["stateful_callbacks"]),
    )


def trained_already(checkpoint: Path, config: RunConfig, rows: int, validated: bool) -> bool:
    """Whether no step is left to do behind a checkpoint: all are done, or early stopping has ended the run.

    Args:
        rows: number of training rows.
        validated: the run has validation rows.
    """
    state = _read(checkpoint / "trainer_state.json")
    if state is None:
        raise ModelError(f"{checkpoint} holds no trainer_state.json; it cannot be resumed")
    unimproved = unimproved_in(state["stateful_callbacks"])
    return _at_its_end(config, rows, validated, state["global_step"], unimproved)


def _at_its_end(config: RunConfig, rows: int, validated: bool, steps: int, unimproved: int) -> bool:
    patience = config.eval.patience
    stopped = patience is not None and validated and unimproved >= patience
    return stopped or steps >= steps_in_all(rows, config.training)


def best_loss(history: Sequence[Mapping[str, Any]], step: int | None) -> float:
    """Validation loss at the best step so far, from Trainer's log; infinite before there is one."""
    found = [entry["eval_loss"] for entry in history if entry.get("step") == step and "eval_loss" in entry]
    return float(found[-1]) if found else float("inf")


def unimproved_in(saved: Mapping[str, Any]) -> int:
    """Validations in a row without improvement, from the callbacks' state in a checkpoint (labeltune 0.1.0 kept it under the name of
    transformers' own callback)."""
    if "TrackBest" in saved:
        return int(saved["TrackBest"]["attributes"]["unimproved"])
    old = saved.get("EarlyStoppingCallback", {})
    old = old[0] if isinstance(old, list) else old
    return int(old.get("attributes", {}).get("early_stopping_patience_counter", 0))


def nothing_left(ended: Finished, config: RunConfig, rows: int) -> str:
    """What to tell who resumes a finished run."""
    if ended.steps < steps_in_all(rows, config.training):
        return (
            f"nothing to do: training stopped at step {ended.steps}, after {ended.unimproved} checkpoints without "
            f"improvement (eval.patience={config.eval.patience}); to train on, raise it"
        )
    key = "max_steps" if config.training.max_steps else "epochs"
    now = config.training.max_steps or f"{chosen(config.training.epochs):g}"
    return (
        f"nothing to do: all {ended.steps} steps are done; to train on, raise training.{key}, which is {now}: "
        f"--resume training.{key}=..."
    )
