"""What happens around the steps: progress, Ctrl-C, divergence, the best checkpoint so far and early stopping."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich import progress
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from labeltune.config import higher_is_better
from labeltune.distributed import all_reduce, world_size
from labeltune.errors import Interrupted
from labeltune.evaluation.summary import validation_figures
from labeltune.io.outputs import write_jsonl
from labeltune.io.progress import SLOW, bar_shown, begin, silent_for, spoke
from labeltune.messages import localize
from labeltune.training.checkpoints import diverged
from labeltune.training.record import best_loss, unimproved_in

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


#: Steps that a loss has to be beyond all reason before a run counts as diverged.
DIVERGED_STEPS = 10

#: Seconds within which a second signal is the same press of Ctrl-C.
SAME_PRESS = 1.0


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C finishes the step, saves and stops; the second one, or one before any step, stops at once.

    Attributes:
        interrupted: this process got a signal, or another one did.
        stopping: all processes know of it, and stop after this step.
    """

    def __init__(self) -> None:
        self.interrupted = self.stopping = False
        self._pressed = 0.0
        self._previous: Any = None
        self._installed = self._inside_epoch = self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes over SIGINT and SIGTERM, where this is the main thread."""
        try:
            self._previous = (
                signal.signal(signal.SIGINT, self.handle),
                signal.signal(signal.SIGTERM, self.handle),
            )
            self._installed = True
        except ValueError:
            self._installed = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted, a second one raises KeyboardInterrupt."""
        if not self._begun and world_size() == 1:  # nothing to finish, and nothing to save
            self.restore()
            raise KeyboardInterrupt
        if self.interrupted:
            # Ctrl-C reaches a process twice when torchrun hands on what the terminal has sent already.
            if world_size() > 1 and time.monotonic() - self._pressed < SAME_PRESS:
                return
            self.restore()
            raise KeyboardInterrupt
        self.interrupted, self._pressed = True, time.monotonic()
        print(
            "\nlabeltune: stopping after this step and saving; press Ctrl-C again to stop at once",
            file=sys.stderr,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """From now on there is something to finish."""
        self._begun = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Asks the Trainer for a checkpoint and the end: on all processes after the same step, whoever got the signal."""
        if all_reduce([float(self.interrupted)], "max")[0]:
            self.interrupted = self.stopping = True
            # What ends an epoch, or the run, is validated and saved behind it, as without the signal.
            ends = state.epoch.is_integer() or state.global_step >= state.max_steps
            self._inside_epoch = args.save_strategy == "epoch" and not ends
            if self._inside_epoch or args.save_strategy != "epoch":
                control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An epoch that is cut short has been saved; the resumed run validates at its end."""
        if self._inside_epoch:
            control.should_evaluate = control.should_save = False

    def tell(self, state: TrainerState, then: str) -> None:
        """Raise `Interrupted` where a signal ended the training; `then` is how to go on."""
        if self.interrupted:
            raise Interrupted(f"stopped at step {state.global_step} of {state.max_steps}; {then}")

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        if self._installed:
            signal.signal(signal.SIGINT, self._previous[0])
            signal.signal(signal.SIGTERM, self._previous[1])
            self._installed = False


class StopOnDivergence(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss has exploded without becoming infinite.

    The rule: every loss logged over `DIVERGED_STEPS` steps in a row (three lines at least) is above twice the first logged
    loss and above log(vocabulary), which is what guessing among all tokens costs. No run that learns is there for so long;
    one whose learning rate is far too high stays there. It reads Trainer's history alone, so a resumed run decides alike.

    Args:
        vocabulary: number of tokens that the model chooses from.
    """

    def __init__(self, vocabulary: int, say: Callable[[str], None]) -> None:
        self.vocabulary, self.say = vocabulary, say

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raises `DivergedError` by the rule."""
        losses = _losses(state)
        if not losses:
            return
        bound = max(2 * losses[0][1], math.log(self.vocabulary))
        begun = losses[0][0]
        high: list[int] = []
        for step, loss in reversed(losses):
            if loss <= bound:
                begun = step
                break
            high.append(step)
        if len(high) < 3 or high[0] - begun < DIVERGED_STEPS:
            return
        raise diverged(
            f"training diverged: the loss was {losses[0][1]:.2f} at step {losses[0][0]}, and since step {high[-1]} it has been "
            f"above {bound:.2f} (now {losses[-1][1]:.2f} at step {high[0]}), worse than guessing among all tokens",
            args,
            begun,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Warns when the last quarter of the losses is above the first one."""
        losses = _losses(state)
        last = [loss for _, loss in losses[-max(1, len(losses) // 4) :]]
        if len(losses) < 4 or not state.is_world_process_zero:
            return
        mean = sum(last) / len(last)
        if mean > 1.1 * losses[0][1]:
            self.say(
                f"warning: the loss rose from {losses[0][1]:.2f} to {mean:.2f}: training.learning_rate={args.learning_rate:g} "
                "is probably too high"
            )


def _losses(state: TrainerState) -> list[tuple[int, float]]:
    """(step, training loss) of every logged line."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry]


class WriteMetrics(TrainerCallback):  # type: ignore[misc]
    """Keeps `metrics.jsonl` in the run folder: what was logged, one step a line.

    It is written anew from Trainer's history, which checkpoints hold, so a resumed run has no step twice and none missing.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """With every checkpoint, and at the end; on the main process."""
        if state.is_world_process_zero:
            write_jsonl(Path(args.output_dir) / "metrics.jsonl", state.log_history)

    on_train_end = on_save


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar with loss, examples/s and time left; plain lines where there is no terminal."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._bar: Any = None
        self._shown: Any = None
        self._task: Any = None
        self._started: float | None = None
        self._first_step = 0
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the bar on a terminal."""
        if not state.is_world_process_zero:
            return
        self._started = None
        if 0 < state.global_step < state.max_steps:
            self.say(f"resuming at step {state.global_step} of {state.max_steps}")
        begin_step(state)
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                progress.TextColumn(f"[bold]{localize('train')}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[info]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn(localize("left")),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=console, redirect_stdout=False)
            self._bar.start()
            self._shown = bar_shown()
            self._shown.__enter__()
            self._task = self._bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, info=""
            )

    def rate(self, state: TrainerState) -> float | None:
        """Examples a second since the first step ended, which waits for what is done once; None until then."""
        rows = (state.global_step - self._first_step) * self.batch_size
        if self._started is None or not rows:
            return None
        return float(rows / max(time.monotonic() - self._started, 1e-9))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Moves the bar, and starts the clock behind the first step."""
        if self._started is None:
            self._started, self._first_step = time.monotonic(), state.global_step
        if self._bar is not None:
            rate = self.rate(state)
            info = ("" if rate is None else localize(f"{rate:.1f} examples/s")) + self._loss
            self._bar.update(self._task, completed=state.global_step, info=info)
        elif state.is_world_process_zero and silent_for() >= SLOW and not control.should_log:
            self.say(self.line(state))  # without a loss: the last one that was logged is of an earlier step
        begin_step(state)

    def line(self, state: TrainerState, loss: str = "") -> str:
        """Where the run is, in one line."""
        rate = self.rate(state)
        at = f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}{loss}"
        if rate is None:
            return at
        left = (state.max_steps - state.global_step) * self.batch_size / max(rate, 1e-9)
        return f"{at}  {rate:.2f} examples/s  {left:.0f} s left"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Adds examples/s to what is logged (trackers read the same mapping), and prints a plain line."""
        if not logs or not state.is_world_process_zero or "loss" not in logs:
            return
        rate = self.rate(state)
        if rate is not None:
            logs["examples_per_second"] = round(rate, 3)
        self._loss = f"  loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.2e}"
        if self._bar is None:
            self.say(self.line(state, self._loss))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Prints the figures of a validation."""
        if state.is_world_process_zero and metrics and "eval_loss" in metrics:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in validation_figures(metrics).items())
            self.say(f"step {state.global_step}: validation (used for selection): {figures}")
            begin_step(state)

    def say(self, line: str) -> None:
        """A line above the bar."""
        line = localize(line)
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)
            spoke()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes the bar down."""
        self.close()

    def close(self) -> None:
        """Takes the bar down, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._shown.__exit__(None, None, None)


def begin_step(state: TrainerState) -> None:
    """Tells what is being done, should it take long."""
    begin(f"in step {state.global_step + 1} of {state.max_steps}")


class ShowPredictions(TrainerCallback):  # type: ignore[misc]
    """Calls `show(step, when)` before training, at every epoch and at the end, on all processes; not once Ctrl-C was pressed."""

    def __init__(self, show: Callable[[int, str], None], stopper: StopOnInterrupt) -> None:
        self.show, self.stopper = show, stopper
        self._last_step = -1

    def show_once(self, state: TrainerState, when: str) -> None:
        """Unless they were shown at this step, or Ctrl-C ends the run."""
        if self._last_step != state.global_step and not self.stopper.stopping:
            self._last_step = state.global_step
            self.show(state.global_step, when)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The untuned model; a resumed run has shown it already."""
        if state.global_step == 0:
            self.show_once(state, "before training")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After each whole pass over the rows."""
        if state.epoch is not None and state.epoch.is_integer():
            self.show_once(state, f"epoch {state.epoch:.0f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The last weights."""
        self.show_once(state, "after training")


class TrackBest(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the best figure and its step in Trainer's state, and ends a run that no longer improves.

    Of checkpoints with the same figure the one with the least loss is the best: macro-F1 on few rows often stands still.

    Args:
        metric: name of the figure (`macro_f1`, `span_f1`, `accuracy` or `loss`).
        patience: validations in a row without improvement that end the run; never when None.
        min_delta: what counts as an improvement is larger than this.

    Attributes:
        unimproved: validations in a row without improvement, counted while there is a patience; kept in checkpoints.
    """

    def __init__(self, metric: str, patience: int | None, min_delta: float) -> None:
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.unimproved = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"unimproved": self.unimproved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Takes the count of the checkpoint that is resumed."""
        self.unimproved = unimproved_in(state.stateful_callbacks)
        # Trainer saves the state of callbacks that the checkpoint knows, and fails at a new one.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The last step is validated, as it is saved; transformers 5.0 does not ask for that."""
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Compares a validation with the best one before it."""
        assert metrics is not None
        value, loss, best = metrics[f"eval_{self.metric}"], metrics["eval_loss"], state.best_metric
        sign = 1 if higher_is_better(self.metric) else -1
        better = best is None or sign * value > sign * best
        if self.patience is not None:
            enough = best is None or (better and abs(value - best) > self.min_delta)
            self.unimproved = 0 if enough else self.unimproved + 1
            if self.unimproved >= self.patience:
                control.should_training_stop = True
        if better or (value == best and loss < best_loss(state.log_history, state.best_global_step)):
            state.best_metric, state.best_global_step = value, state.global_step
