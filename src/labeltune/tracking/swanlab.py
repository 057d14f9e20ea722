"""SwanLab: the only module that imports swanlab. It loads no transformers, so that `labeltune doctor` is quick to ask for a login."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import swanlab

from labeltune.config import SwanlabConfig
from labeltune.errors import Interrupted, message_of
from labeltune.evaluation.summary import Evaluation
from labeltune.io.hubs import why_unanswered
from labeltune.io.outputs import write_json
from labeltune.io.run_folder import checkpoints, step_of
from labeltune.tracking.charts import charts, texts

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: In the run folder: which run in SwanLab shows it.
IDENTITY_FILE = "swanlab.json"
#: Behind the name of a run that goes on with another.
_RESUMED = " (resumed from step "


def logged_in() -> str:
    """`yes`, or why not; asks the server when there is a key, never the user."""
    try:
        from swanlab.sdk.internal.settings import create_settings

        if not swanlab.Settings().api_key and not create_settings().api_key:
            return "no key found; log in with `swanlab login` or set SWANLAB_API_KEY"
        swanlab.login(timeout=5)
    except Exception as error:
        reason = why_unanswered(error)
        return (
            f"cannot be reached: {reason}"
            if reason
            else f"the login failed ({message_of(error)}); check the key"
        )
    return "yes"


def pick_mode(wanted: str) -> str:
    """`online`, `local` or `offline`; `auto` is online when logged in and reachable, else local.

    `SWANLAB_MODE` in the environment decides when `wanted` is `auto`.
    """
    if wanted != "auto":
        return wanted
    from_environment = os.environ.get("SWANLAB_MODE", "")
    if from_environment in {"online", "local", "offline", "disabled"}:
        return from_environment
    return "online" if logged_in() == "yes" else "local"


@dataclass(frozen=True)
class Identity:
    """A run in SwanLab, as a run folder remembers it.

    Attributes:
        id: SwanLab's name for it.
        mode: `online`, `local` or `offline`.
        group: what links the parts of a training that was resumed; a name of its own when the config has none.
        name: how the board calls it; empty when that is not known.
    """

    id: str
    mode: str
    project: str
    group: str
    name: str = ""

    @staticmethod
    def load(output_dir: Path) -> Identity | None:
        """The one that a run folder's training was shown in last; None when that is not known."""
        try:
            return Identity(**json.loads((output_dir / IDENTITY_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """What Ctrl-C does stays as it is: SwanLab would print lines of its own, and end its run before ours is saved."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class SwanlabTracker:
    """One run in SwanLab.

    A resumed training goes on in the same run where the mode is `online` and was so before. SwanLab cannot reopen local and offline runs,
    so there the resumed part is a new run in the group of the earlier one, called `NAME (resumed from step N)`, and its config says
    `resumed_from`.

    Args:
        settings: project, mode, folder.
        run_config: everything about the run; shown in its config.
        output_dir: run folder, where the run's identity is kept.
        resumed: checkpoint that training goes on from.
    """

    def __init__(
        self,
        settings: SwanlabConfig,
        run_config: dict[str, Any],
        output_dir: Path,
        resumed: Path | None = None,
    ) -> None:
        self.settings = settings
        self.run_config = run_config
        self.output_dir, self.resumed = output_dir, resumed
        self.mode = pick_mode(settings.mode)

    def start(self) -> str:
        """Open the run."""
        Path(self.settings.log_dir).mkdir(parents=True, exist_ok=True)
        before = Identity.load(self.output_dir) if self.resumed is not None else None
        same_run = before is not None and self.mode == before.mode == "online"
        same_run = same_run and before is not None and before.project == self.settings.project
        config = dict(self.run_config)
        if self.resumed is not None and not same_run:
            config["resumed_from"] = {
                "run": before.id if before is not None else None,
                "checkpoint": self.resumed.name,
            }
        group = self.settings.group or (before.group if before is not None else self._own_group())
        name = self.settings.experiment
        if self.resumed is not None and not same_run:
            first = name or (before.name.partition(_RESUMED)[0] if before is not None else "")
            name = f"{first or self.output_dir.resolve().name}{_RESUMED}{step_of(self.resumed)})"
        with self._quiet(), _own_interrupt():
            swanlab.init(
                project=self.settings.project,
                name=name,
                group=group,
                mode=self.mode,
                log_dir=self.settings.log_dir,
                id=before.id if before is not None and same_run else None,
                resume="allow" if same_run else None,
                config=config,
                settings=swanlab.Settings(interactive=False),
                reinit=True,
            )
        run = swanlab.get_run()
        found = Identity(str(run.id), self.mode, self.settings.project, group, str(run.name or ""))
        write_json(self.output_dir / IDENTITY_FILE, asdict(found))
        if self.mode == "local":
            folder = self.settings.log_dir
            return f"SwanLab: local run in {folder}; watch it with: labeltune board {folder}"
        return f"SwanLab: {self.mode} run in project {self.settings.project}"

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Keeps back what SwanLab prints of a local run: where it is and how to watch it, which is said once already."""
        from swanlab.sdk.internal.pkg import console

        before = console.c.quiet
        console.c.quiet = before or self.mode != "online"
        try:
            yield
        finally:
            console.c.quiet = before

    def _own_group(self) -> str:
        return f"{self.output_dir.resolve().name}-{secrets.token_hex(3)}"

    def callbacks(self) -> list[TrainerCallback]:
        """SwanLab's own."""
        from swanlab.integration.transformers import SwanLabCallback

        return [SwanLabCallback()]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers."""
        swanlab.log(dict(values), step=step)

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Texts."""
        self._log_texts("Prediction", texts, step)

    def log_charts(self, evaluation: Evaluation, step: int) -> None:
        """Charts, and the same as texts."""
        for name, chart in charts(swanlab.echarts, evaluation).items():
            swanlab.log({name: swanlab.ECharts(chart)}, step=step)
        # The local dashboard draws numbers, texts and pictures, but no ECharts.
        for name, lines in texts(evaluation.metrics).items():
            self._log_texts(name, lines, step)

    def _log_texts(self, name: str, lines: Sequence[tuple[str, str]], step: int) -> None:
        swanlab.log({name: [swanlab.Text(text, caption=caption) for caption, text in lines]}, step=step)

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run; an error shows it as crashed, Ctrl-C as aborted. One without a checkpoint is never gone on with."""
        if error is not None and not checkpoints(self.output_dir):
            (self.output_dir / IDENTITY_FILE).unlink(missing_ok=True)
        if not swanlab.has_run():
            return
        with self._quiet():
            if error is None:
                swanlab.finish()
            else:
                state = "aborted" if isinstance(error, Interrupted | KeyboardInterrupt) else "crashed"
                swanlab.finish(state=state, error=type(error).__name__)
