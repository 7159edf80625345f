"""Guards: a loss or a gradient that is no number stops the run before it spoils a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finegrid.errors import UserError

SHOWN = 16


def check_step(
    step: int, losses: Sequence[float], batches: Sequence[Sequence[str]], grad_norm: float | None = None
) -> None:
    """Stop the run if the step's loss or gradient is NaN or infinite.

    Args:
        step: number of the optimiser step about to be made, from 1.
        losses: loss of each micro-batch of the step.
        batches: row ids of each micro-batch.
        grad_norm: norm of the whole gradient; None if it isn't known, or may overflow by design (fp16 with a scaler).

    Raises:
        UserError: names the step, the value and the rows.
    """
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        rows = [row for number in bad for row in batches[number]]
        raise UserError(
            f"training: step {step}: the loss of rows {_names(rows)} is {losses[bad[0]]}; expected a finite number; "
            "look at these rows, or lower training_args.learning_rate"
        )
    if grad_norm is not None and not math.isfinite(grad_norm):
        rows = [row for batch in batches for row in batch]
        raise UserError(
            f"training: step {step}: the gradient's norm on rows {_names(rows)} is {grad_norm}; expected a finite "
            "number; lower training_args.learning_rate"
        )


def check_evaluation(step: int, loss: float) -> None:
    """Stop the run if the validation loss after ``step`` optimiser steps is NaN or infinite.

    Raises:
        UserError: names the step and the value.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"training: the validation loss after step {step} is {loss}; expected a finite number; "
            "lower training_args.learning_rate"
        )


def _names(rows: Sequence[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(rows[:SHOWN]) + more
