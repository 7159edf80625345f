"""What a run says while it trains, and where its log, evaluations and checkpoints fall."""

from __future__ import annotations

import time
from collections.abc import Callable

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

SECONDS_BETWEEN_LINES = 10.0


class Flow(TrainerCallback):
    """Logs the last step whatever ``logging_steps`` is, and spares the checkpoint that nobody would resume from."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True
            due = state.save_steps > 0 and state.global_step % state.save_steps == 0
            if args.save_strategy == SaveStrategy.STEPS and not due and not args.load_best_model_at_end:
                control.should_save = False
        return control


class EarlyStopping(EarlyStoppingCallback):
    """Ends a run whose validation loss stopped falling; a resumed run remembers how long ago that was."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = kept["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True  # the checkpoint is the one that it stopped at
        return control


class ProgressLines(TrainerCallback):
    """Gives ``progress`` a line like ``step 12/40 · loss 3.02 · lr 8.1e-4 · 41 s left``, every ten seconds at most."""

    def __init__(self, progress: Callable[[str], None], last_loss: Callable[[], float | None]):
        self.progress = progress
        self.last_loss = last_loss
        self.first_step = 0
        self.started = self.spoken = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self.started = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self.started = time.monotonic()  # without the base model's evaluation

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        now = time.monotonic()
        if now - self.spoken < SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        done = state.global_step - self.first_step
        left = (now - self.started) / done * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step}/{state.max_steps}"]
        loss = self.last_loss()
        if loss is not None:
            parts.append(f"loss {loss:.3g}")
        if lr_scheduler is not None:
            parts.append(f"lr {lr_scheduler.get_last_lr()[0]:.1e}")
        self.progress(" · ".join([*parts, f"{duration(left)} left"]))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.progress(f"step {state.global_step}/{state.max_steps} · validation loss {metrics['eval_loss']:.3f}")


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``41 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
