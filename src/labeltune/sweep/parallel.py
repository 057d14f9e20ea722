"""Trials side by side, through Ray Tune. Only the driver writes to the study, so resuming is the same with any number of workers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labeltune.ray_session import local_cores, ray_session

# Ray Tune reads these when it is imported: relative paths keep their meaning in workers, and Ctrl-C is ours to handle.
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"

from ray import tune
from ray.tune.search import Searcher

from labeltune.config import build_config
from labeltune.errors import LabeltuneError, SweepError, first_line
from labeltune.sweep.ledger import Ledger
from labeltune.sweep.trial import Outcome, run_trial, trial_name


class LedgerSearcher(Searcher):  # type: ignore[misc]
    """Hands Ray Tune the ledger's trials and takes back their outcomes, in the driver.

    Ray's own OptunaSearch would keep a second account of the trials: it tells a study no reasons, and after a kill it leaves
    running trials in the database for ever.
    """

    def __init__(self, ledger: Ledger, threads: int) -> None:
        super().__init__()
        self._ledger, self._threads = ledger, threads
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The next trial, or that there is none."""
        trial = self._ledger.ask()
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = trial.number
        plan = self._ledger.plan
        job = {
            "config": plan.config.model_dump(mode="json"),
            "folder": str(plan.folder),
            "number": trial.number,
            "values": trial.values,
            "threads": self._threads,
            "cwd": str(Path.cwd()),
        }
        # As one text: Ray Tune looks for search spaces inside mappings.
        return {"job": json.dumps(job)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Keep the outcome; a worker that died has none."""
        number = self._numbers.pop(trial_id)
        if error or not result or "outcome" not in result:
            self._ledger.tell(number, Outcome(0.0, failure="its worker process died (out of memory?)"))
        else:
            self._ledger.tell(number, Outcome(**json.loads(result["outcome"])))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its searcher into a folder that nobody reads; the ledger's database stays out of it."""
        return {}


class TrialWorker(tune.Trainable):  # type: ignore[misc]
    """Trains one trial after the other in a process of its own, in its main thread."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self._job = json.loads(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; importing everything anew would cost more than a small trial."""
        self._job = json.loads(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        """Train; what is printed goes into the trial's `log.txt`."""
        import torch

        job = self._job
        os.chdir(job["cwd"])
        torch.set_num_threads(job["threads"])
        folder = Path(job["folder"])
        log = folder / trial_name(job["number"]) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            log.open("w", encoding="utf-8", buffering=1) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            config = build_config(job["config"])
            outcome = run_trial(config, folder, job["number"], job["values"], print)
        return {"outcome": json.dumps(asdict(outcome)), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial that is interrupted is run again from its beginning."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See `save_checkpoint`."""


def run_parallel(ledger: Ledger, workers: int) -> None:
    """Train the ledger's trials, `workers` at a time, in a Ray of their own on this machine that is shut down afterwards.

    Raises:
        SweepError: Ray itself failed.
        KeyboardInterrupt: Ctrl-C; the workers are stopped at once.
    """
    import torch

    threads, gpus = max(1, local_cores() // workers), torch.cuda.device_count()
    resources = {"cpu": threads, "gpu": 1 / math.ceil(workers / gpus) if gpus else 0}
    try:
        with ray_session(cpus=threads * workers, gpus=gpus):
            _train_all(ledger, workers, threads, resources)
    except Exception as error:
        # What our own code raised inside Ray Tune comes out as its cause.
        cause = error.__cause__ if isinstance(error.__cause__, LabeltuneError) else error
        raise SweepError(f"Ray Tune stopped: {first_line(cause)}; the same command goes on") from error


def _train_all(ledger: Ledger, workers: int, threads: int, resources: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory(prefix="labeltune-ray-") as scratch:
        tune.Tuner(
            tune.with_resources(TrialWorker, resources),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(ledger, threads),
                num_samples=-1,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
