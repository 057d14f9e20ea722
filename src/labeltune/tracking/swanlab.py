"""SwanLab: only this module and `swanlab_login` import swanlab.

A tracker must never cost a training run: it does not ask for a login, and when it fails it says so once and is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from labeltune.config import SwanlabConfig
from labeltune.errors import Interrupted
from labeltune.evaluation.summary import SELECTION
from labeltune.io.outputs import write_json
from labeltune.tracking.swanlab_login import logged_in
from labeltune.types import Example, Prediction

#: In the run folder: which run in SwanLab shows it.
IDENTITY_FILE = "swanlab.json"
#: Behind the name of a run that goes on with another.
_RESUMED = " (resumed from step "


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
        self.failed = False
        self.started = False

    def guard(self, action: Callable[[], Any]) -> Any:
        """Run an action of swanlab; the first failure is reported, and nothing is tried after it."""
        if self.failed:
            return None
        try:
            return action()
        except Exception as error:
            self.failed = True
            print(
                f"labeltune: warning: SwanLab failed ({type(error).__name__}: {error}); training goes on without it",
                file=sys.stderr,
                flush=True,
            )
            return None

    def start(self) -> None:
        """Open the run (main process only)."""
        self.guard(self._start)

    def _start(self) -> None:
        import swanlab

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
            step = self.resumed.name.rpartition("-")[2]
            first = name or (before.name.partition(_RESUMED)[0] if before is not None else "")
            name = f"{first or self.output_dir.resolve().name}{_RESUMED}{step})"
        with self._quiet():
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
        self.started = True
        run = swanlab.get_run()
        found = Identity(str(run.id), self.mode, self.settings.project, group, str(run.name or ""))
        write_json(self.output_dir / IDENTITY_FILE, asdict(found))

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

    def callback(self) -> Any:
        """SwanLab's own Trainer callback, guarded."""
        return GuardedCallback(self)

    def log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Show (text, caption) pairs under `Prediction`."""
        if self.started and texts:
            self.guard(lambda: self._log_predictions(step, texts))

    def _log_predictions(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        import swanlab

        swanlab.log(
            {"Prediction": [swanlab.Text(text, caption=caption) for text, caption in texts]}, step=step
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers."""
        if self.started:

            def action() -> None:
                import swanlab

                swanlab.log(values, step=step)

            self.guard(action)

    def log_charts(
        self,
        metrics: Mapping[str, Any],
        examples: Sequence[Example],
        predictions: Sequence[Prediction],
        step: int,
    ) -> None:
        """Show the charts of an evaluation."""
        if self.started:
            self.guard(lambda: self._log_charts(metrics, examples, predictions, step))

    def _log_charts(
        self,
        metrics: Mapping[str, Any],
        examples: Sequence[Example],
        predictions: Sequence[Prediction],
        step: int,
    ) -> None:
        import swanlab

        from labeltune.tracking.charts import charts, texts

        for name, chart in charts(swanlab.echarts, metrics, examples, predictions).items():
            swanlab.log({name: swanlab.ECharts(chart)}, step=step)
        # The local dashboard draws numbers, texts and pictures, but no ECharts.
        for name, lines in texts(metrics).items():
            swanlab.log({name: [swanlab.Text(text, caption=caption) for caption, text in lines]}, step=step)

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run, also one that has failed; an error shows it as crashed, Ctrl-C as aborted."""
        if not self.started:
            return
        self.started = False
        self.failed = False
        self.guard(lambda: self._finish(error))

    def _finish(self, error: BaseException | None) -> None:
        import swanlab

        if not swanlab.has_run():
            return
        with self._quiet():
            if error is None:
                swanlab.finish()
            else:
                state = "aborted" if isinstance(error, Interrupted | KeyboardInterrupt) else "crashed"
                swanlab.finish(state=state, error=type(error).__name__)


class GuardedCallback(TrainerCallback):  # type: ignore[misc]
    """Hands every event to `swanlab.integration.transformers.SwanLabCallback` until it fails once."""

    def __init__(self, tracker: SwanlabTracker) -> None:
        self.tracker = tracker
        self._inner: Any = tracker.guard(self._make)

    @staticmethod
    def _make() -> Any:
        from swanlab.integration.transformers import SwanLabCallback

        return SwanLabCallback()

    def _pass_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._inner is not None and self.tracker.started:
            self.tracker.guard(lambda: getattr(self._inner, event)(args, state, control, **kwargs))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passed on."""
        self._pass_on("on_train_begin", args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passed on, but for the figures of a validation: they get a name that says what they were used for. (They come here
        as well as to `on_evaluate`, where SwanLab would log them under `eval/`.)"""
        logs = logs or {}
        validation = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if validation and state.is_world_process_zero:
            kept = {k: v for k, v in validation.items() if not k.endswith(("runtime", "per_second"))}
            self.tracker.log({f"{SELECTION}/{k}": float(v) for k, v in kept.items()}, state.global_step)
            return
        self._pass_on("on_log", args, state, control, logs=logs, **kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passed on."""
        self._pass_on("on_save", args, state, control, **kwargs)
