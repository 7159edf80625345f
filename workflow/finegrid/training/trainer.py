"""transformers' Trainer with a loss over label tokens, exact under any split of a batch.

Schedulers, optimisers, checkpoints, trackers and launchers are the Trainer's own. What differs:

- The loss of an optimiser step is the mean over **all label tokens of its accumulation window** (the last, partial
  window of an epoch and several processes included), so 8x1, 4x2 and 2x4 batches train alike.
- Several processes see each row of an epoch once: the rows that Accelerate repeats to fill the last batches carry no
  loss.
- Logged losses are means over the label tokens since the last log row, and carry the run's cumulative label tokens,
  tokens, seconds and peak memory.
- The validation loss is the sum of all losses over all label tokens, never a mean of batch means.
- A step whose loss or gradient is NaN or infinite stops the run.
- With a lane (:mod:`finegrid.training.lockstep`), forward and backward are made together with other runs' ones.
- Asked to end (:mod:`finegrid.training.stopping`), the processes agree on a step, save a checkpoint at its end and
  leave. An evaluation doesn't hold them up: one that is due there, or is going on, is made when the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finegrid.files import whole
from finegrid.training.adapters import adapted_layers, why_not_plain
from finegrid.training.collation import ROWS_OF_A_KERNEL, Collator, first_rows
from finegrid.training.flat import draws, make_flat
from finegrid.training.guards import check_evaluation, check_step
from finegrid.training.history import peak_memory_mb
from finegrid.training.loss import Head, find_head, label_logits, label_states
from finegrid.training.low_rank import write_out
from finegrid.training.stopping import SIGNALS, Stop, Stopped, held_back, ignore_signals
from finegrid.training.validation import batches, sums_of_rows

if TYPE_CHECKING:
    from finegrid.training.lockstep import Lane

BaseLosses = dict[tuple[int, bool], float]
COUNTERS_FILE = "finegrid_counters.json"


@dataclass
class Counters:
    """What a run has seen, over all its resumes; it travels in the checkpoints."""

    label_tokens: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    logged_label_tokens: int = 0
    logged_loss_sum: float = 0.0
    due: list[str] = field(default_factory=list)  # of "evaluate" and "save": what the step's end still lacks

    @classmethod
    def read(cls, checkpoint: str | Path | None) -> Counters:
        """Return the counters of a checkpoint; of a run's start if there is none."""
        return cls(**json.loads((Path(checkpoint) / COUNTERS_FILE).read_text())) if checkpoint else cls()

    def write(self, checkpoint: Path) -> None:
        """Write the counters into a checkpoint's folder."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / COUNTERS_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def add(self, loss: float, label_tokens: int, tokens: int) -> None:
        """Count an optimiser step: its mean loss, label tokens and tokens."""
        self.label_tokens += label_tokens
        self.tokens += tokens
        self.loss_sum += loss * label_tokens

    def loss_since_log(self) -> float:
        """Return the mean loss over the label tokens since the last call."""
        label_tokens = self.label_tokens - self.logged_label_tokens
        loss = (self.loss_sum - self.logged_loss_sum) / label_tokens if label_tokens else math.nan
        self.logged_label_tokens, self.logged_loss_sum = self.label_tokens, self.loss_sum
        return loss


@contextlib.contextmanager
def walked_once(model: torch.nn.Module) -> Iterator[list[torch.nn.Parameter]]:
    """Give a model's trained parameters; and let its ``train`` and ``zero_grad`` go over all modules when that changes
    something, not in each step: those two and the clipping took 3 of 40 ms of a model of a million parameters.

    While the block runs, what is trained stays the same, and modes are set by the model's own ``train`` and ``eval``.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind, is_training = type(model), False

    def train(mode: bool = True) -> torch.nn.Module:
        nonlocal is_training
        if not (mode and is_training):
            kind.train(model, mode)
        is_training = mode
        return model

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            return kind.zero_grad(model, set_to_none)
        for parameter in trained:
            parameter.grad = None

    model.train, model.zero_grad = train, zero_grad
    try:
        yield trained
    finally:
        del model.train, model.zero_grad


class EvaluationLeft(Exception):
    """The processes were asked to end in the middle of an evaluation."""


class LabelTokenTrainer(Trainer):
    """See the module. Batches are those of :class:`finegrid.training.collation.Collator`.

    Attributes:
        counters: what was seen so far.
        last_loss: mean over the label tokens of the last optimiser step; None before the first.
        notes: sentences for the run's summary.
        stop: who knows whether this process was asked to end.
        lane: who makes forward and backward passes together with other runs' ones; None makes them here.
        base_losses: validation losses of this base on these rows, by the size and the form of batches; runs that
            share both find here what an earlier one has computed, to the bit what they would.
        row_losses: of the last validation: each row's sum of losses, as scoring the same weights gives it; None where
            it would be computed otherwise.

    Raises:
        UserError: from ``train`` and ``evaluate``, when a loss or a gradient is no finite number.
        Stopped: from ``train``, when the process was asked to end and the checkpoint is written.
        EvaluationLeft: from ``evaluate`` and ``validation_loss`` outside of ``train``, for the same reason.
    """

    # The loss is already normalised over the window: the Trainer must not divide it by the accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        padding_free: bool = True,
        **options: Any,
    ):
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=Collator(pad_token_id),
            **options,
        )
        self.counters = Counters()
        self.notes: list[str] = []
        self.stop = Stop()
        self.lane: Lane | None = None
        self.base_losses: BaseLosses = {}
        self.row_losses: list[float] | None = None
        self._batches_of: tuple[Dataset, list[list[int]]] | None = None
        self._stops = False  # as the processes agreed in the step
        self._step_closed = 0
        self._saved_step: int | None = None
        self.head: Head | None = None
        self._flops_of_a_token: int | None = None
        self.padding_free = padding_free
        self._shares_validated = False
        if args.torch_compile:
            self.notes.append("all logits are computed, and batches are padded: torch_compile")
        elif not is_deepspeed_zero3_enabled():
            self._look_at(model)
        if args.label_smoothing_factor:
            self.notes.append("`loss` and `train_loss` are the smoothed loss; the validation loss is not smoothed")
        self.last_loss: float | None = None
        self._clock: float | None = None
        self._training = contextlib.ExitStack()  # what is undone when training ends
        self._trained: list[torch.nn.Parameter] | None = None  # where the model may be walked over once
        self._losses: list[torch.Tensor] = []
        self._batches: list[dict[str, Any]] = []

    def _look_at(self, model: torch.nn.Module) -> None:
        """Find out what this architecture allows: the head on label positions alone, rows without padding."""
        if not (is_deepspeed_zero3_enabled() or self.is_fsdp_enabled):  # whose weights are whole in a module's forward
            write_out(self.model)
        self.head, note = find_head(model)
        wrapped = self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.head is not None and wrapped:  # wrappers see to the weights of modules that run, and to no others
            self.head = replace(self.head, plain=False)
        if note:
            self.notes.append(note)
        if self.padding_free and self.args.n_gpu <= 1:  # more than one in a process: torch divides batches by rows
            with torch.no_grad():
                shares, note = make_flat(self.model, lambda batch: label_logits(model, self.head, batch)[0])
            # A mixture of experts' balance is that of all tokens of all rows.
            all_count = getattr(self.model.config, "output_router_logits", False)
            self.data_collator.flat, self.data_collator.cuts = note is None, not all_count
            self.data_collator.shares = shares and not (all_count or self._draws())
            if not all_count and self.args.device.type == "cpu" and self.accelerator.mixed_precision != "no":
                self.data_collator.multiple = ROWS_OF_A_KERNEL
            self._shares_validated = shares
            if note:
                self.notes.append(note)
        # Padded batches draw for dropout what the Trainer's own draw, and checkpointing computes when hooks are gone.
        if self.head is not None and (wrapped or self.args.activation_checkpointing or not self.data_collator.flat):
            self.head = replace(self.head, mlp=None)

    def _draws(self) -> bool:
        return draws(self.model) or self.args.neftune_noise_alpha is not None

    def _prepare_for_training(self, *args, **options):
        prepared = super()._prepare_for_training(*args, **options)
        if is_deepspeed_zero3_enabled() and self.head is None and not self.args.torch_compile:
            self._look_at(self.model_wrapped)  # before it was wrapped, no process had all weights
        if self.model_wrapped is self.model and self.args.world_size == 1:
            self._trained = self._training.enter_context(walked_once(self.model))
        return prepared

    # ---------------------------------------------------------------- the loss of a step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the micro-batch's share of the window's loss: its sum of losses over the window's label tokens."""
        states = label_states(model, self.head, inputs)
        loss, outputs = states.loss(self.args.label_smoothing_factor) / num_items_in_batch, states.outputs
        if getattr(model.config if hasattr(model, "config") else self.model.config, "output_router_logits", False):
            # A mixture of experts' balance, by the micro-batch's share of the window.
            share = inputs["targets"].numel() / num_items_in_batch
            loss = loss + self.model.config.router_aux_loss_coef * outputs["aux_loss"] * share
        if self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, while the count is that of all of them.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the micro-batches of the next window and its label tokens."""
        # An epoch's first batches start the processes that load them.
        with held_back() if self.args.dataloader_num_workers else contextlib.nullcontext():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and batches:
            batches[-1] = self._without_repeated(batches[-1])
        return batches, self._get_num_items_in_batch(batches, device)

    def _without_repeated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take the loss from the rows which only fill the last batch: the epoch's first rows, once more."""
        size = self._train_batch_size
        left = len(self.train_dataset) % (size * self.args.world_size)
        if not left or self.args.dataloader_drop_last:
            return batch
        return first_rows(batch, min(max(left - self.args.process_index * size, 0), size))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Return the label tokens of the window; of all processes unless ``average_tokens_across_devices`` is off."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(batch["targets"].numel() for batch in batch_samples), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, "sum")
        return count.clamp(min=1)  # a process may have none of the last window's rows

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro-batch; remembers what belongs to the window."""
        if self._clock is None:
            self._clock = self._now()
        self._batches.append(inputs)
        loss = self._step_with_others(model, inputs, num_items_in_batch)
        if loss is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def _step_with_others(self, model, inputs, num_items_in_batch) -> torch.Tensor | None:
        """Hand the micro-batch in for a pass with other runs; None if there is none and it is to be made here."""
        if self.lane is None:
            return None
        model.train()
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        return self.lane.hand_in((self._prepare_inputs(inputs), num_items_in_batch))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return what the Trainer does; it counts the parameters anew in each step, which costs a small model 2 %."""
        if self._flops_of_a_token is None:
            self._flops_of_a_token = super().floating_point_ops({"input_ids": torch.empty(1)})
        return self._flops_of_a_token * inputs["input_ids"].numel()

    def _now(self) -> float:
        return time.monotonic() if self.lane is None else self.lane.now()

    def _clip_grad_norm(self, model):
        if self._trained is None:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the gradient's norm; the Trainer asks for it when a window is whole and no weight has changed yet."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._close_window(grad_norm)
        return grad_norm

    def _close_window(self, grad_norm: torch.Tensor | float | None) -> None:
        losses, batches = torch.stack(self._losses), self._batches
        self._losses, self._batches = [], []
        label_tokens = sum(batch["targets"].numel() for batch in batches)
        tokens = sum(batch["tokens"] for batch in batches)
        if self.args.world_size > 1:
            bad, asked = int(not losses.isfinite().all()), int(self.stop.asked is not None)
            counts = torch.tensor([label_tokens, tokens, bad, asked], device=losses.device)
            label_tokens, tokens, bad, asked = self.accelerator.reduce(counts, "sum").tolist()
            self._stops = asked > 0
            if bad:  # all processes stop, with the rows of the one that met it
                self._check_everywhere(losses.tolist(), [batch["ids"] for batch in batches])
        norm = torch.as_tensor(math.nan if grad_norm is None else grad_norm, device=losses.device).reshape(1)
        # The step's only wait for the device.
        *losses, norm = torch.cat([losses, norm.to(losses.dtype)]).tolist()
        # With a scaler an overflow is ordinary: the scaler skips the step.
        unknown = grad_norm is None or getattr(self.accelerator, "scaler", None) is not None
        check_step(self.state.global_step + 1, losses, [b["ids"] for b in batches], None if unknown else norm)
        loss = sum(losses)
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(torch.tensor(loss, device=self.args.device), "mean").item()
        self.counters.add(loss, label_tokens, tokens)
        self.last_loss = loss

    def _check_everywhere(self, losses: list[float], batches: list[list[str]]) -> None:
        found: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, list(zip(losses, batches, strict=True)))
        together = [pair for part in found for pair in part]
        check_step(self.state.global_step + 1, *zip(*together, strict=True))

    # ---------------------------------------------------------------- validation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return and log ``eval_loss``: the sum of the losses of the validation rows over their label tokens."""
        self._stop_clock()
        start = self._now()
        rows = eval_dataset or self.eval_dataset
        loss = self._loss_of_base(rows) if self._is_base() else self.validation_loss(rows)
        check_evaluation(self.state.global_step, loss)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_runtime": self._now() - start}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock = self._now()
        return metrics

    @torch.no_grad()
    def validation_loss(self, rows: Dataset) -> float:
        """Return the sum of the rows' losses over their label tokens; batches are of rows of like length."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        model.eval()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        groups, found = self._validation_batches(rows), [0.0] * len(rows)
        # Nothing is drawn, and no balance counted here.
        collate = replace(self.data_collator, shares=self._shares_validated, cuts=True)
        with self._untrained(), self.accelerator.autocast():
            # Every process makes as many forward passes as any other: sharded models wait for each other.
            for number in range(
                self.args.process_index, _round_up(len(groups), self.args.world_size), self.args.world_size
            ):
                if self.is_asked_to_stop():
                    raise EvaluationLeft
                indices = groups[min(number, len(groups) - 1)]
                batch = self._prepare_inputs(collate([rows[index] for index in indices]))
                sums = sums_of_rows(label_states(model, self.head, batch), batch)
                if number < len(groups):
                    total += torch.tensor([sum(sums), batch["targets"].numel()], dtype=torch.float64).to(total.device)
                    for index, nll in zip(indices, sums, strict=True):
                        found[index] = nll
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, "sum")
        self.row_losses = found if self._scores_alike() else None
        return (total[0] / total[1]).item()

    def _validation_batches(self, rows: Dataset) -> list[list[int]]:
        if self._batches_of is None or self._batches_of[0] is not rows:
            columns = rows.select_columns(["input_ids", "labels"])
            self._batches_of = rows, list(batches(columns, self.args.eval_batch_size))
        return self._batches_of[1]

    def _scores_alike(self) -> bool:
        """Return whether the losses of rows are those that scoring gives, see :mod:`finegrid.training.validation`."""
        alone = self.args.world_size == 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        exact = self.accelerator.mixed_precision == "no" and not self.args.activation_checkpointing
        return alone and exact and self.data_collator.flat

    def _is_base(self) -> bool:
        """Return whether an adapter leaves the base's numbers as they are, to the bit: no B has moved from zero."""
        if self.state.global_step or self._starts_elsewhere() or why_not_plain(self.model) is not None:
            return False
        layers = adapted_layers(self.model).values()
        return not any(layer.lora_B[name].weight.any() for layer in layers for name in layer.active_adapters)

    def _loss_of_base(self, rows: Dataset) -> float:
        key = (self.args.eval_batch_size, self.data_collator.flat)
        if key not in self.base_losses:
            self.base_losses[key] = self.validation_loss(rows)
        return self.base_losses[key]

    def _untrained(self) -> contextlib.AbstractContextManager:
        """Before the first step, switch off an adapter that doesn't start as the base model: that is the base row."""
        if self._starts_elsewhere() and self.state.global_step == 0:
            return self.accelerator.unwrap_model(self.model).disable_adapter()
        return contextlib.nullcontext()

    def _starts_elsewhere(self) -> bool:
        config = getattr(self.model, "active_peft_config", None)
        return config is not None and (config.is_prompt_learning or getattr(config, "init_lora_weights", True) is False)

    def peak_memory_mb(self) -> float:
        """Return the peak of memory so far in MiB, of the process that needed most; to be called by all of them."""
        peak = torch.tensor(peak_memory_mb(self.args.device), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
        return peak.item()

    # ---------------------------------------------------------------- log, clock and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss over label tokens, and with what the history counts."""
        self._stop_clock(go_on=True)
        if "loss" in logs:
            logs["loss"] = self.counters.loss_since_log()
        if "loss" in logs or "eval_loss" in logs:
            logs |= {
                "label_tokens": self.counters.label_tokens,
                "tokens": self.counters.tokens,
                "seconds": round(self.counters.seconds, 3),
                "memory_mb": round(peak_memory_mb(self.args.device), 1),
            }
        super().log(logs, start_time)

    def _inner_training_loop(self, *args, resume_from_checkpoint=None, **options):
        # Also after auto_find_batch_size gave up a larger batch: that run starts anew.
        self.counters = Counters.read(resume_from_checkpoint)
        self._saved_step = int(Path(resume_from_checkpoint).name.rpartition("-")[2]) if resume_from_checkpoint else None
        self._clock, self._losses, self._batches, self._step_closed = None, [], [], 0
        try:
            with self._training:
                result = super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **options)
        except EvaluationLeft:  # that of the untrained model
            self.stop_here()
        finally:
            self._trained = None
        self._stop_clock()
        return result

    def _run_epoch(self, *args, **options):
        self._finish_step()
        # The Trainer makes one step too many when it resumes from the last step's checkpoint, or from an early stop's.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _finalize_training(self, *args, **options):
        self._finish_step()  # where no epoch was left
        return super()._finalize_training(*args, **options)

    def _save_checkpoint(self, model, trial) -> None:
        self._stop_clock()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            self._save_state(folder)
            return
        # The counters first: a checkpoint counts as complete once the Trainer has written its own state.
        if self.args.should_save:
            self.counters.write(folder)
        super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step
        self._clock = self._now()

    def _save_state(self, folder: Path) -> None:
        """Write what an evaluation has changed into a checkpoint that was written before it."""
        if not self.args.should_save:
            return
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        with whole(folder / "trainer_state.json") as half:
            self.state.save_to_json(str(half))

    # ---------------------------------------------------------------- asked to end

    def is_asked_to_stop(self) -> bool:
        """Return whether any of the processes was asked to end; to be called by all of them."""
        asked = torch.tensor(int(self.stop.asked is not None), device=self.args.device)
        if self.args.world_size > 1:
            asked = self.accelerator.reduce(asked, "sum")
        return bool(asked)

    def stop_here(self, *due: str) -> NoReturn:
        """Save a checkpoint, unless that of this step is there, and end the training; to be called by all processes.

        Args:
            due: what the step's end still lacks, see :class:`Counters`.

        Raises:
            Stopped: always.
        """
        self.stop.no_hurry()
        is_best = self.args.load_best_model_at_end and not self.is_in_train  # and no longer the last step's weights
        if self.state.global_step and self._saved_step != self.state.global_step and not is_best:
            self.counters.due = list(due)
            self.control.should_evaluate = self.control.should_save = self.control.should_log = False
            self.args.save_only_model = False  # it is there to go on from
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()  # the first that ends has the others ended
        raise Stopped(self.stop.asked or SIGNALS[0])

    def _maybe_log_save_evaluate(self, *args, **options) -> None:
        """Log, evaluate and save what is due at the end of a step, or stop there."""
        is_step = self._step_closed != self.state.global_step  # else it is the epoch's end
        self._step_closed = self.state.global_step
        if is_step and (self._stops if self.args.world_size > 1 else self.stop.asked is not None):
            if self.control.should_training_stop or float(self.state.epoch).is_integer():
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            due = self._due()
            self.control.should_evaluate = self.control.should_save = False
            super()._maybe_log_save_evaluate(*args, **options)
            self.stop_here(*due)
        due = self._due()
        try:
            super()._maybe_log_save_evaluate(*args, **options)
        except EvaluationLeft:
            self.stop_here(*due)

    def _due(self) -> list[str]:
        return [name for name in ("evaluate", "save") if getattr(self.control, f"should_{name}")]

    def _finish_step(self) -> None:
        """Make up for what the step lacked that the checkpoint was saved at."""
        due, self.counters.due = self.counters.due, []
        if "evaluate" not in due or any(
            "eval_loss" in entry and entry["step"] == self.state.global_step for entry in self.state.log_history
        ):
            return
        self.control.should_log, self.control.should_evaluate = False, True
        self.control.should_save = "save" in due
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, time.time()
        )
        self.control.should_evaluate = self.control.should_save = False

    def _get_dataloader(self, *args, **options):
        loader = super()._get_dataloader(*args, **options)
        if getattr(loader, "num_workers", 0):
            loader.worker_init_fn = functools.partial(ignore_signals, loader.worker_init_fn)
        return loader

    def _stop_clock(self, go_on: bool = False) -> None:
        """Add the time since the clock was started; evaluations and checkpoints are no training time."""
        now = self._now()
        if self._clock is not None:
            self.counters.seconds += now - self._clock
        self._clock = now if go_on and self._clock is not None else None


def is_complete(checkpoint: Path, processes: int = 1) -> bool:
    """Return whether a checkpoint was written to its end and can be resumed by as many processes.

    The first process writes ``trainer_state.json`` last, while another may still be about to write its random state;
    the optimiser's state is missing under ``save_only_model``.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        json.loads((checkpoint / COUNTERS_FILE).read_text())
    except (OSError, ValueError):
        return False
    whole = all(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    whole &= processes == 1 or len(list(checkpoint.glob("rng_state_*.pth"))) == processes
    return whole and state["global_step"] == int(checkpoint.name.rpartition("-")[2]) and _has_optimiser(checkpoint)


def _has_optimiser(checkpoint: Path) -> bool:
    # A file alone, or DeepSpeed's folder of shards.
    return any(name.startswith(("optimizer", "global_step")) for name in os.listdir(checkpoint))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
