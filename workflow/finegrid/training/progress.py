"""What a run says while it trains, and where its log, evaluations and checkpoints fall."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from finegrid.times import duration

SECONDS_BETWEEN_LINES = 10.0
STEPS_OF_THROUGHPUT = 20


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


class FactsTold(TrainerCallback):
    """Gives ``tell`` what the run is doing, its step, losses, tokens per second of the last steps and seconds left."""

    def __init__(self, tell: Callable[..., None], trainer: Any):
        self.tell = tell
        self.trainer = trainer
        self.first_step = 0
        self.started = self.mark = time.monotonic()
        self.tokens = 0
        self.steps: deque[tuple[float, int]] = deque(maxlen=STEPS_OF_THROUGHPUT)  # seconds and tokens of each

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self.tokens = self.trainer.counters.tokens
        self.steps.clear()
        doing = "evaluating" if args.eval_on_start else "training"
        self.tell(state=doing, step=state.global_step, steps=state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first_step:
            self.started = self.mark = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        now, tokens = time.monotonic(), self.trainer.counters.tokens
        self.steps.append((now - self.mark, tokens - self.tokens))
        self.mark, self.tokens = now, tokens
        seconds, tokens = (sum(part) for part in zip(*self.steps, strict=True))
        done = state.global_step - self.first_step
        self.tell(
            state=_next_doing(control, control.should_evaluate),
            step=state.global_step,
            loss=self.trainer.last_loss,
            tokens_per_second=tokens / seconds if seconds else None,
            seconds_left=(now - self.started) / done * (state.max_steps - state.global_step),
        )

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.mark = time.monotonic()  # evaluations and checkpoints are no training time
        self.tell(state=_next_doing(control, False), eval_loss=metrics["eval_loss"])

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.monotonic()
        self.tell(state="training")

    def on_train_end(self, args, state, control, **kwargs):
        self.tell(state="evaluating", seconds_left=0.0)


def _next_doing(control, evaluates: bool) -> str:
    if evaluates:
        return "evaluating"
    return "saving" if control.should_save else "training"
