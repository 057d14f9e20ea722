"""Runs the trials of a sweep: here one after the other, or in several processes that share the study."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import labeltune
from labeltune.config import RunConfig, higher_is_better
from labeltune.data.loading import load_splits
from labeltune.errors import ConfigError, Interrupted, LabeltuneError, SweepError, first_line
from labeltune.io.lock import alone_with
from labeltune.io.outputs import write_text
from labeltune.io.processes import end_with_parent, worker_count
from labeltune.io.progress import Say, tell
from labeltune.models.hub import resolve_model
from labeltune.sweep.report import Trial, shown_value, write_results
from labeltune.sweep.space import Choices, Sweep, with_values
from labeltune.sweep.study import Study, trial_name

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from labeltune.training.record import TrainResult


def run_sweep(sweep: Sweep, say: Say = tell) -> list[Trial]:
    """Train until as many trials as were asked for are finished; those of an earlier call count.

    Args:
        say: takes lines about the sweep; with several workers those about trials go to standard error.

    Returns:
        all trials; `trials.csv` and `best.yaml` in the sweep's folder say the same.

    Raises:
        DataError: the rows have faults.
        ModelError: there is no such model.
        ConfigError: there are no validation rows.
        OutputError: the folder holds another sweep, is in use by another process, or cannot be written.
        SweepError: the workers ended too early.
        Interrupted: Ctrl-C; finished trials are kept.
    """
    _check_inputs(sweep)
    running = f"another sweep is running in {sweep.folder}"
    with alone_with(sweep.folder / ".lock", running, "wait for it, or give --output"):
        study = Study(sweep, say)
        study.prepare()
        say(f"sweep: {sweep.trials} trials in {sweep.folder}, {study.done()} of them are there already")
        try:
            if sweep.workers == 1:
                _train_trials(study)
            elif study.done() < sweep.trials:
                _run_workers(study)
        except (Interrupted, KeyboardInterrupt):
            study.requeue(stopping=True)
            write_results(sweep, study.trials())
            raise Interrupted(
                f"stopped; {study.done()} of {sweep.trials} trials are finished and kept in {sweep.folder}, "
                "the same command goes on"
            ) from None
        if study.done() < sweep.trials:
            raise SweepError(
                f"the workers ended before all trials were finished; the same command goes on in {sweep.folder}"
            )
        return study.trials()


def _check_inputs(sweep: Sweep) -> None:
    """Faults of the data and a missing model would fail every trial in the same way; they are said once, before the first."""
    config = sweep.config
    if load_splits(config.task, config.data, config.hub, config.training.seed).validation is None:
        raise ConfigError(
            "no row is left for validation, and a sweep compares trials on validation rows; "
            "set data.validation or raise data.validation_fraction"
        )
    tried = [d.texts for d in sweep.space.dimensions if isinstance(d, Choices) and d.key == "model"]
    for model in tried[0] if tried else (config.model,):
        resolve_model(model, config.hub)


def _train_trials(study: Study, *, log: bool = False) -> None:
    """Train one trial after the other until there is none.

    Args:
        log: what training prints goes into the trial's `log.txt`.
    """
    sweep = study.sweep
    while (trial := study.ask()) is not None:
        study.say(
            f"trial {trial.number}: " + ", ".join(f"{key}={text}" for key, text in trial.values.items())
        )
        if log:
            with _printed_into(sweep.folder / trial_name(trial.number) / "log.txt"):
                ended = run_trial(sweep, trial, print)
        else:
            ended = run_trial(sweep, trial, study.say)
        study.tell(ended)


@contextlib.contextmanager
def _printed_into(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _run_workers(study: Study) -> None:
    """Train the trials in processes; one that dies in a trial is replaced.

    Raises:
        SweepError: a worker cannot go on, for a reason that it has said.
        KeyboardInterrupt: Ctrl-C; the workers are stopped at once.
    """
    sweep, devices = study.sweep, _devices(study.sweep.workers)
    workers: dict[int, SpawnProcess] = {}
    try:
        for number, device in enumerate(devices):
            workers[number] = _start_worker(sweep, device)
        while workers:
            wait([worker.sentinel for worker in workers.values()])
            for number, worker in list(workers.items()):
                if worker.exitcode is None:
                    continue
                del workers[number]
                if worker.exitcode > 0:
                    raise SweepError(
                        f"a worker stopped, see above; the same command goes on in {sweep.folder}"
                    )
                if worker.exitcode < 0 and study.requeue(worker.pid):
                    workers[number] = _start_worker(sweep, devices[number])
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()


def _start_worker(sweep: Sweep, device: str | None) -> SpawnProcess:
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(sweep, device))
    # Ctrl-C reaches all processes of a terminal; it is this one's to handle, from the children's first moment on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker.start()
    finally:
        signal.signal(signal.SIGINT, before)
    return worker


def _work(sweep: Sweep, device: str | None) -> None:
    """What a worker process does."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    end_with_parent()
    torch.set_num_threads(max(1, worker_count("auto") // sweep.workers))
    try:
        _train_trials(Study(sweep, tell), log=True)
    except LabeltuneError as error:
        tell(f"error: {error}")
        sys.exit(1)


def _devices(workers: int) -> list[str | None]:
    """The GPU of each worker, as `CUDA_VISIBLE_DEVICES` names it; None where there is none."""
    count = torch.cuda.device_count()
    if not count:
        return [None] * workers
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [names[number % count] for number in range(workers)]


def run_trial(sweep: Sweep, trial: Trial, say: Say) -> Trial:
    """Train with a trial's values; whatever goes wrong belongs to this trial alone, which then has failed.

    Raises:
        Interrupted, KeyboardInterrupt: Ctrl-C.
    """
    started = time.monotonic()
    try:
        config = trial_config(sweep.config, sweep.folder, trial.number, trial.values)
        metric, value, score = validation_metric(labeltune.train(config, overwrite=True, say=say))
        trial = replace(trial, state="finished", metric=metric, value=value, score=score)
    except Interrupted:
        raise
    except LabeltuneError as error:
        trial = replace(trial, state="failed", reason=" ".join(str(error).split()))
    except Exception as error:
        # Out of memory at this rank, a layer name that peft does not find: the others go on, and the whole story is kept.
        write_text(sweep.folder / trial_name(trial.number) / "error.txt", traceback.format_exc())
        trial = replace(trial, state="failed", reason=first_line(error))
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return replace(trial, seconds=time.monotonic() - started)


def trial_config(config: RunConfig, folder: Path, number: int, values: Mapping[str, str]) -> RunConfig:
    """The config of a trial: its values, an output folder and a SwanLab experiment of its own.

    Raises:
        ConfigError: the values do not go together.
    """
    changed = with_values(config, values, trial_name(number))
    shown = " ".join(f"{key}={shown_value(text)}" for key, text in values.items())
    tracker = changed.swanlab.model_copy(
        update={
            "experiment": f"{trial_name(number)} {shown}"[:200],
            "group": config.swanlab.group or folder.resolve().name,
        }
    )
    output = str(folder / trial_name(number))
    return changed.model_copy(update={"output_dir": output, "swanlab": tracker})


def validation_metric(result: TrainResult) -> tuple[str, float, float]:
    """Name and value of the metric that picked the run's best checkpoint, and a score of which more is better.

    Raises:
        SweepError: there is none, or it is not finite: the training has diverged.
    """
    name, value = result.metric_name, result.metric
    if name is None or value is None:
        raise SweepError("the run measured nothing on validation rows")
    if not math.isfinite(value):
        raise SweepError(f"{name} is {value}: the training diverged")
    if not math.isfinite(result.train_loss):
        raise SweepError(f"the training loss is {result.train_loss}: the training diverged")
    return name, value, value if higher_is_better(name) else -value
