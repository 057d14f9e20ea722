"""The first steps of a run, timed with the Trainer that trains; nothing is saved."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from labeltune.config import RunConfig
from labeltune.distributed import connect, peer_errors
from labeltune.io.progress import begin
from labeltune.models.precision import Precision, memory_in_use
from labeltune.training.packing import Packing, pack_step, run_order, to_rows
from labeltune.training.preflight import prepare_steps, training_arguments
from labeltune.training.run import check_fsdp
from labeltune.training.sharded import WhenSharded
from labeltune.training.trainer import LabelTrainer

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]

#: Steps that are timed, after one that is not: memory is allocated and kernels are chosen in the first.
TIMED_STEPS = 3
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class TimedSteps:
    """What the first steps of a run took.

    Attributes:
        seconds: of each timed step.
        computed: tokens of these steps as one process would compute them.
        packing: how examples go through the model.
        max_tokens: tokens of a pack.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    seconds: tuple[float, ...]
    computed: int
    packing: Packing
    max_tokens: int
    checkpointing: bool


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Notes when the training loop began and when each step ended; stops the run when enough are timed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def _note(self, args: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.times.append(perf_counter())
        begin(f"timing step {len(self.times)}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where the first step begins."""
        self._note(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where a step ends and the next one begins."""
        self._note(args)
        if len(self.times) > 1 + TIMED_STEPS:
            control.should_training_stop = True

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of every step but the first; of the first where there is no other."""
        found = tuple(end - start for start, end in zip(self.times, self.times[1:], strict=False))
        return found[1:] or found


def time_steps(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    precision: Precision,
    train: Dataset,
    *,
    say: Say,
    where: Callable[[int], str],
) -> TimedSteps:
    """Train the first steps of a run; weights change, and no file is written.

    Args:
        train: tokens of the training rows.
        where: number of a training row -> its place, for messages.

    Raises:
        DivergedError, ModelError: as in training.
    """
    timeout = config.training.collective_timeout
    if precision.device == "cpu":
        connect(timeout)
    clock = StepClock()
    with tempfile.TemporaryDirectory(prefix="labeltune-dry-run-") as nowhere:
        unsaved = config.model_copy(update={"output_dir": nowhere, "tracking": "none"})
        arguments = training_arguments(unsaved, precision, has_validation=False)
        arguments.save_strategy = SaveStrategy.NO

        def plan_steps(ready: Any) -> None:
            trainer.plan = prepare_steps(
                ready, tokenizer, config, precision, train, device=arguments.device, say=say
            )

        trainer = LabelTrainer(
            say=say,
            where=where,
            model=model,
            args=arguments,
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        check_fsdp(trainer.accelerator.state)
        with peer_errors(timeout, lambda: "Nothing was saved"):
            if trainer.sharded:
                trainer.callback_handler.callbacks.insert(0, WhenSharded(plan_steps))
            else:
                plan_steps(model.to(arguments.device))
            trainer.train()
    plan = trainer.plan
    steps = islice(run_order(len(train), config.training), 1 + TIMED_STEPS)
    rows = [to_rows([train[i] for i in numbers]) for numbers in steps][-len(clock.seconds) :]
    return TimedSteps(
        seconds=clock.seconds,
        computed=sum(
            pack.tokens(step, plan.packing)
            for step in rows
            for pack in pack_step(step, plan.max_tokens, plan.packing)[0]
        ),
        packing=plan.packing,
        max_tokens=plan.max_tokens,
        checkpointing=any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    )


@contextlib.contextmanager
def peak_memory(device: Any) -> Iterator[list[int]]:
    """Inside, memory of a device (on the CPU: of this process) is watched; the yielded list's one number is the most bytes that
    were taken beyond those at the beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, most, ended = memory_in_use(device), [0], threading.Event()

    def look() -> None:
        most[0] = max(most[0], memory_in_use(device) - before)

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=watch, name="labeltune-memory", daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        look()
