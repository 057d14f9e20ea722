"""transformers' Trainer with packed steps: every process reads the rows of a whole optimizer step and computes its share.

Only what Trainer documents is used: its public methods are overridden, callbacks do the rest, and no private member is touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from labeltune.distributed import all_reduce, all_reduce_gradients, join_uneven
from labeltune.errors import ModelError
from labeltune.io.progress import Say, begin
from labeltune.models.precision import memory_in_use, random_state, set_random_state
from labeltune.training import sharded
from labeltune.training.checkpoints import Checkpoint, LogSums, diverged
from labeltune.training.collate import (
    AheadLoader,
    PackBatch,
    StepBatches,
    StepRows,
    attention_for,
    make_batch,
)
from labeltune.training.loss import answer_loss, row_losses
from labeltune.training.objective import Objective, Weighed, weighed
from labeltune.training.packing import (
    CALL_TOKENS,
    PAIRS_PER_TOKEN,
    Pack,
    Packing,
    Row,
    pack_step,
    step_order,
    steps_an_epoch,
    to_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, TrainingArguments


#: As many steps in a row with an infinite loss end a run with a loss scaler, which leaves them out.
MOST_OVERFLOWS = 4
#: Rows of one planning unit in validation; sorted rows are alike, so many share much.
EVALUATION_ROWS = 64


@dataclass
class StepSettings:
    """How steps are computed. `max_tokens` shrinks when the device runs out of memory.

    Attributes:
        head: output layer that is run in chunks, or None (see `answer_loss`).
        pairs_per_token: how many attention pairs (query, key) take as long as one token's linear layers; it weighs long rows.
        call_tokens: for `shared_cache`, tokens of padding that take as long as a call of the model.
    """

    packing: Packing
    max_tokens: int
    pad_id: int
    head: torch.nn.Module | None
    pairs_per_token: int = PAIRS_PER_TOKEN
    call_tokens: int = CALL_TOKENS
    objective: Objective = "tokens"

    def packs(self, rows: Sequence[Row], processes: int = 1) -> list[list[Pack]]:
        """The packs of a step for every process."""
        return pack_step(
            rows, self.max_tokens, self.packing, processes, self.pairs_per_token, self.call_tokens
        )

    def batch(self, rows: Sequence[Row], pack: Pack) -> PackBatch:
        """A pack as tensors."""
        return make_batch(rows, pack, self.packing, self.pad_id)

    def computed(self, steps: Sequence[Sequence[Row]]) -> int:
        """Tokens that one process computes for the rows of these steps."""
        return sum(pack.tokens(step, self.packing) for step in steps for pack in self.packs(step)[0])


class LabelTrainer(Trainer):  # type: ignore[misc]
    """Computes a step as the sum over its packs.

    The loss is the weighted sum over answer tokens divided by the weights of all answer tokens of the whole step on all processes, or
    another `objective` of the whole step, so neither the cut into packs nor the number of processes changes it.
    Gradients are added up over processes once, after the last pack.

    Args:
        say: told when packs become smaller.
        where: number of a training row -> its place, for messages.
        settings: how steps are computed; set it before the first step when it is not known yet.
        sums: what log lines are made of; a resumed run goes on with those of its checkpoint.
        checkpoint: what makes a saved folder a checkpoint; None when nothing is saved.
        validate: figures on validation rows by name, the same on all processes; called by all of them at every evaluation.
        options: Trainer's own.

    Attributes:
        sharded: each process holds a part of the weights (FSDP2).
        overflows: steps up to now, in a row, whose loss was infinite and which the loss scaler left out.
    """

    settings: StepSettings

    def __init__(
        self,
        *,
        say: Say,
        where: Callable[[int], str],
        settings: StepSettings | None = None,
        sums: LogSums | None = None,
        checkpoint: Checkpoint | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_collator=to_rows, **options)
        self.say, self.where, self.checkpoint, self.validate = say, where, checkpoint, validate
        self.sums = sums if sums is not None else LogSums()
        self.overflows = 0
        self.batch_size = self.args.per_device_train_batch_size
        self.sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        # accelerate shards the model all the same. Trainer would write and read files of FSDP's own kind; told that there is no
        # FSDP, it loads a checkpoint's weights before the model is sharded, as in one process (see `sharded.py`).
        self.is_fsdp_enabled = False
        sharded.check_fsdp(self.accelerator.state)
        if settings is not None:
            self.settings = settings
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process reads every step and takes its own packs from it."""
        batches: Any = StepBatches(len(self.train_dataset), self.batch_size, self.args.seed)
        options: dict[str, Any] = {"batch_sampler": batches, "collate_fn": to_rows}
        if self.args.device.type == "cpu":  # whose cores are all computing
            return DataLoader(self.train_dataset, **options)
        return AheadLoader(self.train_dataset, make=self.make_packs, **options)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[Any]:
        """Rows in the order of their tokens, so that those read together share as much as they can."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        columns = dataset["input_ids"][:]
        order = sorted(range(len(dataset)), key=lambda i: columns[i])
        units = [order[at : at + EVALUATION_ROWS] for at in range(0, len(order), EVALUATION_ROWS)]
        batches: Any = units
        return DataLoader(dataset, batch_sampler=batches, collate_fn=to_rows)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """`batch_size` counts the examples of all processes."""
        return int(self.batch_size)

    def floating_point_ops(self, inputs: list[Row]) -> int:
        """Not estimated: Trainer's formula counts every token of every row."""
        return 0

    def training_step(
        self, model: PreTrainedModel, inputs: list[Row], num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """Forward and backward of this process's packs; a step that runs out of memory is repeated in smaller ones.

        Raises:
            DivergedError: the loss or the norm of the gradients is no finite number; no weight has been changed by it. With a
                loss scaler (fp16), which leaves such steps out, only after several in a row.
        """
        model.train()
        device = self.args.device
        while True:
            before, full = random_state(device), False
            try:
                total = self.sum_over_packs(model, inputs)
            except torch.OutOfMemoryError:
                full = True
            # All processes repeat the step, or none does. With sharded weights none can ask: the others are inside a forward pass.
            if not (full if self.backend_averages_gradients else all_reduce([float(full)], "max")[0]):
                break
            self.shrink(model, max(len(row.ids) for row in inputs))
            set_random_state(device, before)
        if not self.backend_averages_gradients:
            all_reduce_gradients(model)
        # A loss scaler leaves out steps whose gradients overflow by itself. A bound of infinity only measures the norm; after
        # Trainer's own clipping an infinite norm has made zeros of the gradients.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        norm = None if scaled else self.accelerator.clip_grad_norm_(model.parameters(), math.inf)
        measured = [total] if norm is None else [total, torch.as_tensor(sharded.whole(norm), device=device)]
        # The only place of a step that waits for the device.
        mine, *norms = torch.stack([each.float() for each in measured]).tolist()
        # The loss of the whole step, so that all processes stop together; Trainer logs the mean over them.
        (loss,) = all_reduce([mine], "sum")
        self.overflows = self.overflows + 1 if scaled and not math.isfinite(loss) else 0
        if self.overflows in range(1, MOST_OVERFLOWS):
            self.sums.skipped += 1
            return total.new_zeros(())
        self.stop_unless_finite("loss", loss)
        for each in norms:
            self.stop_unless_finite("gradient's norm", each)
        self.sums.loss += loss
        return total.new_full((), loss)

    def stop_unless_finite(self, what: str, value: float) -> None:
        """Raise `DivergedError`, with the rows of the step, when the value is infinite or no number."""
        if math.isfinite(value):
            return
        count, step = len(self.train_dataset), self.state.global_step
        epoch, at = divmod(step, steps_an_epoch(count, self.batch_size))
        rows = list(step_order(count, self.batch_size, self.args.seed, epoch))[at]
        raise diverged(
            f"training diverged at step {step + 1}: the {what} is {value}. Look at the rows of this step: "
            f"{', '.join(map(self.where, rows))}",
            self.args,
            step,
        )

    @property
    def backend_averages_gradients(self) -> bool:
        """FSDP2 and DeepSpeed take the mean of gradients over processes in the backward pass of every pack."""
        return bool(self.sharded or self.is_deepspeed_enabled)

    def sum_over_packs(self, model: PreTrainedModel, rows: list[Row]) -> torch.Tensor:
        """Forward and backward of this process's packs of a step.

        Args:
            rows: of the whole step, on all processes.

        Returns:
            what these packs add to the step's loss: the sum over their answer tokens, divided by the answer tokens of `rows`; of another
            objective than `tokens`, the same part of it on every process.
        """
        settings, processes, device = self.settings, self.accelerator.num_processes, self.args.device
        answers = sum(row.weight * len(row.answer) for row in rows)
        total = torch.zeros((), device=device)
        packs, batches = self.packs_of(rows)
        objective = None
        if settings.objective != "tokens":
            objective, drawn = self.objective_of(model, rows, packs, batches)
            batches = [batch.weighed(rows, objective.weights) for batch in batches]
            answers = 1.0
        quiet = (
            contextlib.nullcontext() if self.backend_averages_gradients else self.accelerator.no_sync(model)
        )
        with attention_for(self.model, settings.packing), quiet:
            for number, (pack, batch) in enumerate(zip(packs, batches, strict=True), start=1):
                if objective is not None:
                    set_random_state(device, drawn[number - 1])
                loss = self.pack_loss(model, batch) * ((1.0 if pack.counted else 0.0) / answers)
                # DeepSpeed makes its optimizer step in the backward pass of the last pack.
                self.accelerator.sync_gradients = number == len(packs)
                self.accelerator.backward(loss * processes if self.backend_averages_gradients else loss)
                total += loss.detach()
        self.sums.given += sum(len(rows[i].ids) for pack in packs for i in pack.rows)
        self.sums.computed += sum(pack.tokens(rows, settings.packing) for pack in packs)
        return total if objective is None else total.new_full((), objective.value / processes)

    def objective_of(
        self, model: PreTrainedModel, rows: list[Row], packs: list[Pack], batches: list[PackBatch]
    ) -> tuple[Weighed, list[tuple[torch.Tensor, ...]]]:
        """The objective of a step by the token losses of its rows, and what was drawn before each pack, for dropout to be the same again."""
        device, head = self.args.device, self.settings.head
        losses = torch.zeros(len(rows), dtype=torch.float64)
        drawn = []
        with attention_for(self.model, self.settings.packing), self.compute_loss_context_manager():
            for pack, batch in zip(packs, batches, strict=True):
                drawn.append(random_state(device))
                found = list(row_losses(model, head, batch.to(device), rows))
                if pack.counted:
                    numbers, each = zip(*found, strict=True)
                    losses[list(numbers)] = torch.stack(each).double().cpu()
        # Every row was computed by one process.
        everywhere = torch.tensor(all_reduce(losses.tolist(), "sum"), dtype=torch.float64)
        return weighed(self.settings.objective, rows, everywhere), drawn

    def make_packs(self, rows: Sequence[Row]) -> tuple[int, list[Pack], list[PackBatch]]:
        """This process's packs of a step, as tensors of the CPU too, and the most tokens that they may have."""
        most = self.settings.max_tokens
        packs = self.settings.packs(rows, self.accelerator.num_processes)[self.accelerator.process_index]
        return most, packs, [self.settings.batch(rows, pack) for pack in packs]

    def packs_of(self, rows: list[Row]) -> tuple[list[Pack], list[PackBatch]]:
        """What was made a step ahead, unless packs have become smaller since."""
        made = rows.made.result() if isinstance(rows, StepRows) else None
        if made is None or made[0] != self.settings.max_tokens:
            made = self.make_packs(rows)
        return made[1], made[2]

    def pack_loss(self, model: PreTrainedModel, batch: PackBatch) -> torch.Tensor:
        """Sum of the cross-entropies of a pack's answer tokens."""
        with self.compute_loss_context_manager():
            return answer_loss(model, self.settings.head, batch.to(self.args.device))

    def shrink(self, model: PreTrainedModel, longest: int) -> None:
        """Halve the packs, down to the longest row.

        Raises:
            ModelError: they cannot become smaller, or the step cannot be repeated.
        """
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self.backend_averages_gradients:
            raise ModelError(
                f"out of memory with packs of {self.settings.max_tokens} tokens; set training.max_tokens_per_pack="
                f"{max(longest, self.settings.max_tokens // 2)} and start again with --resume (a step of sharded weights cannot "
                "be repeated by one process alone)"
            )
        if self.settings.max_tokens <= longest:
            raise ModelError(
                f"an example of {longest} tokens does not fit into the device's memory; lower prompt.max_length, set "
                "training.gradient_checkpointing=true, or use training.method=qlora"
            )
        self.settings.max_tokens = max(longest, self.settings.max_tokens // 2)
        self.say(
            f"warning: out of memory; the step is repeated with packs of {self.settings.max_tokens} tokens, and so are the "
            f"ones after it (training.max_tokens_per_pack={self.settings.max_tokens} starts that way)"
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean cross-entropy over all answer tokens of the rows, and the figures of `validate`.

        Each unit of rows is computed by one process, exactly as in a run of one process; sums are added in the order of units.
        """
        begin(f"validating at step {self.state.global_step}")
        model = self.model
        was_training = model.training
        model.eval()
        sums: list[float] = []
        answers, count = 0.0, 0
        with torch.no_grad(), join_uneven(model):
            for number, rows in enumerate(dataloader):
                mine = number % self.accelerator.num_processes == self.accelerator.process_index
                sums.append(self.evaluated(model, rows) if mine else 0.0)
                answers += sum(row.weight * len(row.answer) for row in rows)
                count += len(rows)
        total = math.fsum(all_reduce(sums, "sum"))
        # One process may have halved its packs; all take the smallest.
        self.settings.max_tokens = int(all_reduce([self.settings.max_tokens], "min")[0])
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / answers}
        for name, value in (self.validate() if self.validate is not None else {}).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def evaluated(self, model: PreTrainedModel, rows: list[Row]) -> float:
        """Sum of the cross-entropies of a unit's answer tokens, by this process alone."""
        while True:
            # What the failed pass holds is freed when its exception is gone.
            with (
                contextlib.suppress(torch.OutOfMemoryError),
                attention_for(self.model, self.settings.packing),
            ):
                (packs,) = self.settings.packs(rows)
                losses = [self.pack_loss(model, self.settings.batch(rows, pack)) for pack in packs]
                return math.fsum(torch.stack(losses).tolist())
            self.shrink(model, max(len(row.ids) for row in rows))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own, the first thing that it does for a checkpoint. An older folder of that name is moved aside first.

        Of sharded weights only the trained ones are collected, on the main process.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.checkpoint is not None and _internal_call:
            self.checkpoint.begin(folder, self.args.should_save)
            self.accelerator.wait_for_everyone()
        if not self.sharded:
            super().save_model(output_dir, _internal_call)
            return
        weights = sharded.trained_weights(self.model)
        if self.args.should_save:
            self.model.save_pretrained(folder, state_dict=weights)
            self.processing_class.save_pretrained(folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own line, with `loss` (the mean since the last line, also across a resume), `tokens_saved` (the share that
        sharing saved) and `memory_gb`; at the end, the mean loss of all steps."""
        step, sums = self.state.global_step, self.sums
        if "train_loss" in logs:
            logs["train_loss"] = sums.mean(step)
        if "loss" in logs:
            logs["loss"] = sums.loss / max(1, step - sums.logged_step - sums.skipped)
            if sums.given:
                logs["tokens_saved"] = round(1 - sums.computed / sums.given, 4)
                logs["memory_gb"] = round(memory_in_use(self.args.device) / 1e9, 3)
            sums.next_line(step)
        super().log(logs, start_time)
