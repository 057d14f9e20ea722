"""transformers' Trainer with packed steps: one batch of the data loader is one optimizer step, on every process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from labeltune.errors import DivergedError, ModelError
from labeltune.progress import begin
from labeltune.ranks import add_up_gradients, in_step, reduced
from labeltune.run_folder import RunInfo, checkpoints
from labeltune.training import sharded
from labeltune.training.balance import PAIRS_PER_TOKEN
from labeltune.training.batches import StepBatches, to_rows
from labeltune.training.checkpoints import clear_staging, failures_named, publish, staging_folder
from labeltune.training.loss import answer_loss
from labeltune.training.memory import memory_in_use
from labeltune.training.packs import attention_for, make_batch
from labeltune.training.planner import Pack, Packing, Row, plan_step, step_order
from labeltune.training.resuming import LogSums, best_loss, is_finished

#: Rows of one planning unit in validation; sorted rows are alike, so many share much.
EVALUATION_ROWS = 64

Say = Callable[[str], None]


@dataclass
class StepPlan:
    """How steps are computed. `max_tokens` shrinks when the device runs out of memory.

    Attributes:
        head: output layer that is run in chunks, or None (see `answer_loss`).
        pairs_per_token: see `labeltune.training.balance`.
    """

    packing: Packing
    max_tokens: int
    pad_id: int
    head: Any
    pairs_per_token: int = PAIRS_PER_TOKEN


class PackTrainer(Trainer):  # type: ignore[misc]
    """Computes a step as the sum over its packs.

    The loss is the sum over answer tokens divided by the answer tokens of the whole step on all processes, so neither the
    cut into packs nor the number of processes changes it. Gradients are added up over processes once, after the last pack.
    """

    def __init__(
        self,
        plan: Callable[[Any], StepPlan],
        batch_size: int,
        seed: int,
        say: Say,
        info: RunInfo,
        where: Callable[[int], str],
        measure: Callable[[], dict[str, float]] | None = None,
        files: Mapping[str, bytes] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_collator=to_rows, **options)
        self.info, self.where, self.files = info, where, files
        self._saving_into: Path | None = None
        self._make_plan, self.batch_size, self.seed, self.say, self.measure = (
            plan,
            batch_size,
            seed,
            say,
            measure,
        )
        self._plan: StepPlan | None = None
        self._given = self._computed = 0

    @property
    def plan(self) -> StepPlan:
        """How steps are computed; decided once, with the model as it is then: sharded when it will be."""
        if self._plan is None:
            self._plan = self._make_plan(self.model)
        return self._plan

    def _prepare_for_training(self, *given: Any) -> Any:
        """Trainer's own; the plan is made before the model is wrapped, or after it where it is cut into shards."""
        if not self.is_fsdp_enabled:
            self.model.to(self.args.device)
            _ = self.plan
        prepared = super()._prepare_for_training(*given)
        _ = self.plan
        return prepared

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process reads every step and takes its own packs from it."""
        batches: Any = StepBatches(len(self.train_dataset), self.batch_size, self.seed)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=to_rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Rows in the order of their tokens, so that those read together share as much as they can."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        columns = dataset["input_ids"][:]
        order = sorted(range(len(dataset)), key=lambda i: columns[i])
        units = [order[at : at + EVALUATION_ROWS] for at in range(0, len(order), EVALUATION_ROWS)]
        batches: Any = units
        return DataLoader(dataset, batch_sampler=batches, collate_fn=to_rows)

    def get_total_train_batch_size(self, args: Any) -> int:
        """`batch_size` counts the examples of all processes."""
        return self.batch_size

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: Trainer's formula counts every token of every row."""
        return 0

    def training_step(self, model: Any, inputs: list[Row], num_items_in_batch: Any = None) -> Any:
        """Forward and backward of this process's packs; a step that runs out of memory is repeated in smaller ones."""
        model.train()
        while True:
            before = torch.get_rng_state()
            try:
                total = self._sum_over_packs(model, inputs)
                full = False
            except torch.OutOfMemoryError:
                full = True
            # All processes repeat the step, or none does; where weights are shared out the others wait inside a pass.
            if not (full if self._reduces_by_itself else self._any_process(full)):
                break
            self._shrink(model, max(len(row.ids) for row in inputs))
            torch.set_rng_state(before)
        if not self._reduces_by_itself:
            add_up_gradients(model)
        # The loss of the whole step, so that all processes stop together; Trainer logs the mean over them.
        (loss,) = reduced([float(total)], "sum")
        self._stop_unless_finite("loss", loss)
        return total.new_tensor(loss)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Trainer's own; a gradient that is no number stops the run before it reaches the weights."""
        norm = super()._clip_grad_norm(model)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        # A loss scaler leaves out steps whose gradients overflow by itself.
        if norm is not None and getattr(self.accelerator, "scaler", None) is None:
            self._stop_unless_finite("gradient's norm", float(norm))
        return norm

    def _stop_unless_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        steps = -(-len(self.train_dataset) // self.batch_size)
        epoch, at = divmod(self.state.global_step, steps)
        order = step_order(len(self.train_dataset), self.batch_size, self.seed, epoch)
        rows = next(numbers for number, numbers in enumerate(order) if number == at)
        saved = checkpoints(Path(self.args.output_dir))
        kept = f"{saved[-1]} is the last good checkpoint" if saved else "no checkpoint had been saved"
        raise DivergedError(
            f"training diverged at step {self.state.global_step + 1}: the {what} is {value}. Rows of this step: "
            f"{', '.join(map(self.where, rows))}. {kept}. Lower training.learning_rate (it is "
            f"{self.args.learning_rate:g}) or add training.warmup_steps, and look at these rows"
        )

    @property
    def _reduces_by_itself(self) -> bool:
        """FSDP2 and DeepSpeed take the mean of gradients over processes in the backward pass of every pack."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _sum_over_packs(self, model: Any, rows: list[Row]) -> Any:
        """This process's share of the loss of `rows`, with gradients."""
        plan, processes = self.plan, self.accelerator.num_processes
        answers = sum(len(row.answer) for row in rows)
        total = torch.zeros((), device=self.args.device)
        shares = plan_step(rows, plan.max_tokens, plan.packing, processes, plan.pairs_per_token)
        packs = shares[self.accelerator.process_index]
        self._given += sum(len(rows[i].ids) for pack in packs for i in pack.rows)
        self._computed += sum(pack.tokens(rows, plan.packing) for pack in packs)
        quiet = contextlib.nullcontext() if self._reduces_by_itself else self.accelerator.no_sync(model)
        with attention_for(self.model, plan.packing), quiet:
            for number, pack in enumerate(packs, start=1):
                loss = self._pack_loss(model, rows, pack, plan.packing) * (float(pack.counted) / answers)
                # DeepSpeed makes its optimizer step in the backward pass of the last pack.
                self.accelerator.gradient_state._set_sync_gradients(number == len(packs))
                self.accelerator.backward(loss * processes if self._reduces_by_itself else loss)
                total += loss.detach()
        return total

    def _pack_loss(self, model: Any, rows: list[Row], pack: Pack, packing: Packing) -> Any:
        """Sum of the cross-entropies of a pack's answer tokens."""
        batch = make_batch(rows, pack, packing, self.plan.pad_id).to(self.args.device)
        with self.compute_loss_context_manager():
            return answer_loss(model, self.plan.head, batch.inputs, batch.index, batch.targets)

    def _shrink(self, model: Any, longest: int) -> None:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self._reduces_by_itself:
            raise ModelError(
                f"out of memory with packs of {self.plan.max_tokens} tokens; set training.max_tokens_per_pack="
                f"{max(longest, self.plan.max_tokens // 2)} and start again with --resume (a step of sharded weights cannot "
                "be repeated by one process alone)"
            )
        if self.plan.max_tokens <= longest:
            raise ModelError(
                f"an example of {longest} tokens does not fit into the device's memory; lower prompt.max_length, set "
                "training.gradient_checkpointing=true, or use training.method=qlora"
            )
        self.plan.max_tokens = max(longest, self.plan.max_tokens // 2)
        self.say(
            f"warning: out of memory; the step is repeated with packs of {self.plan.max_tokens} tokens, and so are the "
            f"ones after it (training.max_tokens_per_pack={self.plan.max_tokens} starts that way)"
        )

    def _any_process(self, flag: bool) -> bool:
        return bool(reduced([float(flag)], "max")[0])

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean cross-entropy over all answer tokens of the rows, and the figures that the recipe measures.

        Each unit of rows is computed by one process as it would be by a single one; sums are added in the order of units.
        """
        begin(f"validating at step {self.state.global_step}")
        model = self.model
        was_training = model.training
        model.eval()
        sums: list[float] = []
        answers = count = 0
        with torch.no_grad(), in_step(model):
            for number, rows in enumerate(dataloader):
                mine = number % self.accelerator.num_processes == self.accelerator.process_index
                sums.append(self._evaluated(model, rows) if mine else 0.0)
                answers += sum(len(row.answer) for row in rows)
                count += len(rows)
        total = math.fsum(reduced(sums, "sum"))
        # Whoever ran out of memory went on with smaller packs.
        self.plan.max_tokens = int(reduced([self.plan.max_tokens], "min")[0])
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / answers}
        for name, value in (self.measure() if self.measure is not None else {}).items():
            metrics[f"{metric_key_prefix}_{name}"] = value
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=count)

    def _run_epoch(self, **options: Any) -> None:
        """Trainer's own; a run that was killed behind its last checkpoint has nothing left to do."""
        if self._is_finished():
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def _finalize_training(self, *values: Any) -> Any:
        """Trainer's own; with `save_total_limit=1` it removes all but the best checkpoint, which a stopped run goes on from."""
        limit = self.args.save_total_limit
        if not self._is_finished():
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*values)
        finally:
            self.args.save_total_limit = limit

    def _is_finished(self) -> bool:
        return is_finished(self.state, self.callback_handler.callbacks)

    def mean_loss(self) -> float:
        """The mean over all steps of the run, also those before it was resumed."""
        return float(self._total_loss_scalar / max(self.state.global_step, 1))

    def continue_sums(self, sums: LogSums) -> None:
        """Go on adding up where a checkpoint was saved."""
        self._tr_loss.fill_(sums.loss)
        self._total_loss_scalar, self._globalstep_last_logged = sums.total, sums.logged_step
        self._given, self._computed = sums.given, sums.computed

    def _sums(self) -> LogSums:
        loss = self._tr_loss
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.gather(loss).mean()
        return LogSums(
            float(loss), self._total_loss_scalar, self._globalstep_last_logged, self._given, self._computed
        )

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer asks where a checkpoint goes: aside, until it is whole."""
        return str(self._saving_into or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's own, written aside and then published; old checkpoints are removed behind that, not before."""
        output, state = Path(self.args.output_dir), self.state
        name = f"checkpoint-{state.global_step}"
        # Trainer looks for the best one where it writes, and would not find it there.
        best = f"checkpoint-{state.best_global_step}" if state.best_global_step else None
        found = checkpoints(output)
        with failures_named(output, name, found[-1].name if found else None):
            if self.args.should_save:
                clear_staging(output)
            self.accelerator.wait_for_everyone()
            self._saving_into = staging_folder(output)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_into = None
            state.best_model_checkpoint = str(output / best) if best else None
            sums = self._sums()
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                state.save_to_json(str(staging_folder(output) / name / "trainer_state.json"))
                sums.save(staging_folder(output) / name)
                publish(output, name, self.info, self.files)
                rotate_checkpoints(
                    output_dir=str(output),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=state.best_model_checkpoint,
                )
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's own; of sharded weights only the trained ones are collected, on the main process."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = sharded.trained_weights(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's own; FSDP2's state is put together into the files of one process."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharded.optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            sharded.load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        sharded.load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of checkpoints with the same figure the one with the least loss: macro-F1 on few rows often stands still."""
        name, state = f"{self.args.metric_for_best_model}", self.state
        tied = metrics.get(name) is not None and metrics[name] == state.best_metric
        if tied and metrics["eval_loss"] < best_loss(state):
            state.best_global_step = state.global_step
            return True
        return bool(super()._determine_best_metric(metrics, trial))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a line of training the share of tokens that sharing saved since the last one, and memory.

        Trainer's mean loss of a resumed run is that of its last part.
        """
        if "train_loss" in logs:
            logs["train_loss"] = self.mean_loss()
        if "loss" in logs and self._given:
            logs["tokens_saved"] = round(1 - self._computed / self._given, 4)
            logs["memory_gb"] = round(memory_in_use(self.args.device) / 1e9, 3)
            self._given = self._computed = 0
        super().log(logs, start_time)

    def _evaluated(self, model: Any, rows: list[Row]) -> float:
        """Sum of the cross-entropies of a unit's answer tokens, by this process alone."""
        while True:
            packing = self.plan.packing
            try:
                with attention_for(self.model, packing):
                    (packs,) = plan_step(rows, self.plan.max_tokens, packing)
                    return math.fsum(float(self._pack_loss(model, rows, pack, packing)) for pack in packs)
            except torch.OutOfMemoryError:
                self._shrink(model, max(len(row.ids) for row in rows))
