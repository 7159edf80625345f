"""What the curves of one training say: signs, each with its numbers. Pure functions of a run's history.

A history has a training loss every few steps, noisy because each batch is another text, and an evaluation now and
then. Training losses are therefore read in bins, and a change counts only beyond the bins' own noise; validation
losses are means over the same rows each time and are read as they are. Thresholds:

==============  ======================================================================================================
`diverged`      a loss that is no finite number; or validation ends 10 % above the untrained model's; or the last bin
                lies 10 % and 4 standard errors above the first
`slow`          validation gained less than 2 %; or at no evaluation was the share of its gain more than 10 points
                ahead of the share of the learning rate that was spent (the area under the schedule). A run that
                gains in proportion to the rate it spends is nowhere near what the data can teach it
`swings`        a bin rises 3 % and 4 standard errors above the lowest before it; or validation rises 1 % and falls
                again; or, where the schedule ends low, losses jump 2.5 times as far from step to step as at its end
`overfitting`   validation ends 1 % above its lowest while the training loss fell by 1 % and 2 standard errors
`plateau`       validation made its gain, and less than 2 % of it in the second half of the steps
`unfinished`    validation ends at its lowest, and the last stretch of evaluations (at least a quarter of the steps)
                still made gain at half the average pace or more
`spikes`        gradient norms above 5 times the median of the 20 before them, after the warm-up
==============  ======================================================================================================

Swings and slowness are signs of the learning rate; a run that diverged shows nothing else. Fewer than 9 training losses
are no curve, fewer than 3 evaluations (the one before training counts) no trend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

DIVERGED = 0.10
SLOW_GAIN = 0.02
SLOW_LEAD, SLOW_LOOK = 0.10, 0.75
RISE, EVAL_RISE = 0.03, 0.01
ERRORS = 4.0  # standard errors of a bin: ten bins have 45 pairs, and chance should not find one among them
JUMPS = 2.5
OVERFITTING = 0.01
PLATEAU = 0.02
PACE = 0.5
SPIKE, SPIKE_WINDOW = 5.0, 20
BINS, SMALLEST_BIN, FEWEST = 10, 3, 9


@dataclass(frozen=True)
class Curve:
    """One run's history: training losses with the learning rate and gradient norm at each, and evaluations."""

    run: str
    steps: np.ndarray
    loss: np.ndarray
    rate: np.ndarray
    norm: np.ndarray
    eval_steps: np.ndarray
    eval_loss: np.ndarray


@dataclass(frozen=True)
class Sign:
    """Something that a curve shows: the case, in words, and the numbers it rests on."""

    case: str
    run: str
    step: int | None
    message: str
    evidence: list[dict] = field(default_factory=list)


def read_curve(run: str, history: pd.DataFrame) -> Curve:
    """Return the curve of a history's table (`history/<run>.csv`)."""
    trained, evaluated = history[history["loss"].notna()], history[history["eval_loss"].notna()]
    # A loss that is not finite is written as `nan` or `inf`: an empty field is none of them.
    broken = history[history["eval_loss"].isna() & history["loss"].isna()]
    trained = pd.concat([trained, broken]).sort_values("step", kind="stable")
    columns = (trained[name].to_numpy(float) for name in ("step", "loss", "learning_rate", "grad_norm"))
    return Curve(run, *columns, evaluated["step"].to_numpy(float), evaluated["eval_loss"].to_numpy(float))


def signs(curve: Curve) -> list[Sign]:
    """Return what a curve shows; a run that diverged shows that alone."""
    found = _diverged(curve)
    if found:
        return [found]
    swings = _swings(curve)
    slow = None if swings else _slow(curve)
    rest = [_overfitting(curve), None if slow else _plateau(curve), None if slow else _unfinished(curve)]
    return [sign for sign in (slow, swings, *rest, _spikes(curve)) if sign]


def bins(curve: Curve) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the last step and the mean loss of each bin, and the standard error of such a mean.

    The noise is that of second differences, which a steady fall leaves out; their median, so that a few jumps do not
    hide themselves.
    """
    count = min(BINS, len(curve.loss) // SMALLEST_BIN)
    if len(curve.loss) < FEWEST:
        return np.array([]), np.array([]), math.nan
    parts = np.array_split(np.arange(len(curve.loss)), count)
    means = np.array([curve.loss[part].mean() for part in parts])
    ends = np.array([curve.steps[part[-1]] for part in parts])
    return ends, means, float(_noise(curve.loss) / math.sqrt(len(curve.loss) / count))


def _noise(loss: np.ndarray) -> float:
    """Standard deviation of a loss around its trend: of normal noise, second differences have 6 times its variance,
    and their median size is 0.6745 of their standard deviation."""
    return float(np.median(np.abs(np.diff(loss, 2))) / (0.6745 * math.sqrt(6)))


def _evidence(curve: Curve, step: float | None, what: str, value: float, threshold: float | None = None) -> dict:
    place = None if step is None else int(step)
    return {"run": curve.run, "step": place, "what": what, "value": float(value), "threshold": threshold}


def _diverged(curve: Curve) -> Sign | None:
    for steps, losses, what in (
        (curve.steps, curve.loss, "training loss"),
        (curve.eval_steps, curve.eval_loss, "validation loss"),
    ):
        broken = np.flatnonzero(~np.isfinite(losses))
        if len(broken):
            step = int(steps[broken[0]])
            message = f"the {what} is no finite number from step {step} on"
            return Sign("diverged", curve.run, step, message, [_evidence(curve, step, what, math.nan)])
    if len(curve.eval_loss) >= 2 and curve.eval_steps[0] == 0:
        first, last, step = curve.eval_loss[0], curve.eval_loss[-1], curve.eval_steps[-1]
        if last > (1 + DIVERGED) * first:
            message = f"validation loss rose from {first:.3f} before training to {last:.3f}"
            numbers = [_evidence(curve, step, "validation loss", last, (1 + DIVERGED) * first)]
            return Sign("diverged", curve.run, int(step), message, numbers)
    ends, means, error = bins(curve)
    if len(means) and means[-1] > means[0] + max(DIVERGED * means[0], ERRORS * math.sqrt(2) * error):
        message = f"training loss rose from {means[0]:.3f} to {means[-1]:.3f}"
        numbers = [_evidence(curve, ends[-1], "training loss, mean of the last bin", means[-1], means[0])]
        return Sign("diverged", curve.run, int(ends[-1]), message, numbers)
    return None


def _slow(curve: Curve) -> Sign | None:
    if len(curve.eval_loss) < 3 or curve.eval_steps[0] != 0:
        return None
    first, last = curve.eval_loss[0], curve.eval_loss[-1]
    gain = (first - curve.eval_loss.min()) / first
    numbers = [_evidence(curve, curve.eval_steps[-1], "share of the loss gained", gain, SLOW_GAIN)]
    if gain < SLOW_GAIN:
        message = f"validation loss went from {first:.3f} to {last:.3f}, a gain of {gain:.1%}: it hardly learned"
        return Sign("slow", curve.run, int(curve.eval_steps[-1]), message, numbers)
    spent, shares = _spent(curve), (first - curve.eval_loss) / (first - curve.eval_loss.min())
    lead = shares - spent
    best = 1 + int(lead[1:-1].argmax())
    # Where nearly all of the rate was spent before the first look, nothing can be ahead of it.
    if lead[best] > SLOW_LEAD or spent[1] > SLOW_LOOK:
        return None
    numbers = [
        _evidence(curve, curve.eval_steps[best], "share of the gain ahead of that of the rate", lead[best], SLOW_LEAD)
    ]
    best = 1 + int(np.abs(spent[1:-1] - 0.5).argmin())  # told where half of it was spent
    step = curve.eval_steps[best]
    message = (
        f"validation loss fell from {first:.3f} to {last:.3f} in proportion to the learning rate spent "
        f"({shares[best]:.0%} of the gain after {spent[best]:.0%} of the rate, step {step:.0f}): it is far from done"
    )
    return Sign("slow", curve.run, int(step), message, numbers)


def _spent(curve: Curve) -> np.ndarray:
    """Share of the area under the learning-rate schedule at each evaluation."""
    if len(curve.steps) < 2 or not np.nansum(curve.rate):
        return curve.eval_steps / curve.eval_steps[-1]
    widths = np.diff(np.concatenate([[0.0], curve.steps]))
    area = np.concatenate([[0.0], np.cumsum(np.nan_to_num(curve.rate) * widths)])
    return np.interp(curve.eval_steps, np.concatenate([[0.0], curve.steps]), area / area[-1])


def _swings(curve: Curve) -> Sign | None:
    ends, means, error = bins(curve)
    if len(means):
        lowest = np.minimum.accumulate(means)
        rises = means - lowest
        worst = int(rises.argmax())
        limit = max(RISE * lowest[worst], ERRORS * math.sqrt(2) * error)
        if rises[worst] > limit:
            message = f"training loss rose from {lowest[worst]:.3f} to {means[worst]:.3f} around step {ends[worst]:.0f}"
            numbers = [_evidence(curve, ends[worst], "rise of the training loss", rises[worst], float(limit))]
            return Sign("swings", curve.run, int(ends[worst]), message, numbers)
    rise = _eval_rise(curve)
    return rise or _jumps(curve)


def _eval_rise(curve: Curve) -> Sign | None:
    """A validation loss that rises above its lowest and comes down again: over-fitting stays up."""
    for place in range(1, len(curve.eval_loss) - 1):
        low, here = curve.eval_loss[:place].min(), curve.eval_loss[place]
        if here > (1 + EVAL_RISE) * low and curve.eval_loss[place + 1 :].min() < here - EVAL_RISE * low:
            step = curve.eval_steps[place]
            message = f"validation loss rose from {low:.3f} to {here:.3f} at step {step:.0f} and fell again"
            numbers = [_evidence(curve, step, "validation loss", here, float((1 + EVAL_RISE) * low))]
            return Sign("swings", curve.run, int(step), message, numbers)
    return None


def _jumps(curve: Curve) -> Sign | None:
    """Losses that jump while the rate is high and are calm where it ends: the same kind of batches, another rate."""
    count = len(curve.loss)
    peak = np.nanmax(curve.rate, initial=0.0)
    late = slice(int(0.75 * count), count)
    if count < 3 * FEWEST or not peak or np.nanmean(curve.rate[late]) > 0.25 * peak:
        return None
    start = int(np.nanargmax(curve.rate))
    early, calm = _noise(curve.loss[start : int(0.6 * count)]), _noise(curve.loss[late])
    if not early > JUMPS * calm:
        return None
    message = (
        f"training loss jumps by {early:.3f} from step to step while the learning rate is high and by {calm:.3f} where "
        "it ends"
    )
    step = curve.steps[start]
    return Sign("swings", curve.run, int(step), message, [_evidence(curve, step, "jumps", early / calm, JUMPS)])


def _overfitting(curve: Curve) -> Sign | None:
    if len(curve.eval_loss) < 3:
        return None
    best = int(curve.eval_loss.argmin())
    low, last, step = curve.eval_loss[best], curve.eval_loss[-1], curve.eval_steps[best]
    before, after = curve.loss[curve.steps <= step], curve.loss[curve.steps > step]
    if not last > (1 + OVERFITTING) * low or len(before) < SMALLEST_BIN or len(after) < SMALLEST_BIN:
        return None
    size = max(SMALLEST_BIN, len(after) // 2)
    then, now = before[-size:].mean(), after[-size:].mean()
    if not then - now > max(OVERFITTING * then, 2 * math.sqrt(2) * _noise(curve.loss) / math.sqrt(size)):
        return None
    message = (
        f"validation loss was lowest at step {step:.0f} ({low:.3f}) and ended at {last:.3f}, while the training loss "
        f"fell from {then:.3f} to {now:.3f}"
    )
    return Sign(
        "overfitting",
        curve.run,
        int(step),
        message,
        [
            _evidence(curve, curve.eval_steps[-1], "validation loss", last, float((1 + OVERFITTING) * low)),
            _evidence(curve, step, "lowest validation loss", low),
            _evidence(curve, curve.steps[-1], "training loss", now, float(then)),
        ],
    )


def _plateau(curve: Curve) -> Sign | None:
    if len(curve.eval_loss) < 4 or curve.eval_steps[0] != 0:
        return None
    first, last, lowest = curve.eval_loss[0], curve.eval_loss[-1], curve.eval_loss.min()
    half = curve.eval_steps <= curve.eval_steps[-1] / 2
    late = (curve.eval_loss[half].min() - lowest) / max(first - lowest, 1e-12)
    if (first - lowest) / first < SLOW_GAIN or late >= PLATEAU or last > (1 + OVERFITTING) * lowest:
        return None
    reached = curve.eval_loss <= lowest + PLATEAU * (first - lowest)
    step = int(curve.eval_steps[reached.argmax()])
    message = (
        f"validation loss was within {PLATEAU:.0%} of its whole gain at step {step} of {curve.eval_steps[-1]:.0f} "
        f"({curve.eval_loss[reached.argmax()]:.3f}, lowest {lowest:.3f})"
    )
    return Sign("plateau", curve.run, step, message, [_evidence(curve, step, "share of the gain since", late, PLATEAU)])


def _unfinished(curve: Curve) -> Sign | None:
    if len(curve.eval_loss) < 3 or curve.eval_steps[0] != 0 or curve.eval_loss.argmin() != len(curve.eval_loss) - 1:
        return None
    first, last, end = curve.eval_loss[0], curve.eval_loss[-1], curve.eval_steps[-1]
    start = int(np.flatnonzero(curve.eval_steps <= 0.75 * end)[-1])
    share = (curve.eval_loss[start] - last) / (first - last) if last < first else 0.0
    pace = share / (1 - curve.eval_steps[start] / end)
    if pace < PACE:
        return None
    message = (
        f"validation loss was still falling at the end, from {curve.eval_loss[start]:.3f} at step "
        f"{curve.eval_steps[start]:.0f} to {last:.3f} at step {end:.0f}, {pace:.0%} of the average pace"
    )
    return Sign("unfinished", curve.run, int(end), message, [_evidence(curve, end, "share of the pace", pace, PACE)])


def _spikes(curve: Curve) -> Sign | None:
    peak = int(np.nanargmax(curve.rate)) if np.isfinite(curve.rate).any() else 0
    found = []
    for place in range(max(peak, SPIKE_WINDOW // 2), len(curve.norm)):
        usual = np.nanmedian(curve.norm[max(0, place - SPIKE_WINDOW) : place])
        if curve.norm[place] > SPIKE * usual > 0:
            found.append((place, usual))
    if not found:
        return None
    place, usual = max(found, key=lambda pair: curve.norm[pair[0]] / pair[1])
    times = f"{len(found)} times, most" if len(found) > 1 else "once,"
    message = (
        f"the gradient norm spiked {times} at step {curve.steps[place]:.0f}: {curve.norm[place]:.3g} where {usual:.3g} "
        "is usual"
    )
    numbers = [_evidence(curve, curve.steps[at], "gradient norm", curve.norm[at], float(SPIKE * u)) for at, u in found]
    return Sign("spikes", curve.run, int(curve.steps[place]), message, numbers[:10])
