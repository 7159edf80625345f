"""What a run does, counted before it starts: batch, steps, epochs, warmup, tokens, evaluations, checkpoints, disk.

Everything is counted as transformers' Trainer counts it, with what :mod:`finegrid.training.train` adds: a validation
before the first step and after the last one, and no checkpoint at the end that nobody would resume from. Read by the
plan; nothing here needs torch, data or weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finegrid.memory import optimiser_bytes, trainable_parameters, trained_tensors, zero_partitioning

if TYPE_CHECKING:
    from finegrid.memory import Shape
    from finegrid.settings import RunSettings

# Measured on transformers 5.23's files: training arguments, scheduler, random state, trainer's state and configs, in
# every checkpoint; peft's card; DeepSpeed's script and its own state; what stands around a tensor in safetensors and
# around its states in optimizer.pt.
SMALL_FILES, ADAPTER_FILES, DEEPSPEED_FILES = 24_000, 6_000, 65_000
TENSOR, STATES = 125, 850
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def training_arithmetic(
    settings: RunSettings, rows: int | None, label_tokens: int | None, tokens: int | None
) -> dict[str, Any]:
    """Return what training will do, as plain numbers; None where it can't be known yet, then `unknown` says why.

    Args:
        settings: the run's settings.
        rows: rows of the train split; None if they are not counted yet (a stream).
        label_tokens: label tokens of the train split, once through.
        tokens: all tokens of the train split, once through, without padding.

    Returns:
        ``per_device_train_batch_size``, ``gpus`` (of all ``nodes``), ``gradient_accumulation_steps`` and
        ``effective_batch_size``, their product, in rows; ``steps`` of the optimiser, ``warmup_steps`` of them,
        ``epochs``; ``train_rows``; ``label_tokens`` and ``tokens`` seen over the run (exact for whole epochs; for a
        part of an epoch the rows' share; rows that only fill the last batches of several GPUs carry no loss);
        ``evaluations`` of the validation split, the one before the first step and the one after the last included;
        ``checkpoints`` written; ``unknown``: the reason for each None. With early stopping all are the most there can
        be. A run that loads its best model at its end evaluates it once more, unless the best is the last.

    Sources: ``Trainer.set_initial_training_values``, ``TrainerState.compute_steps``, ``DefaultFlowCallback``,
    ``TrainingArguments.get_warmup_steps`` of transformers 5.23; ``BatchSamplerShard`` of accelerate 1.15.
    """
    facts: dict[str, Any] = batch_sizes(settings)
    per_epoch = steps_per_epoch(settings, rows)
    steps = total_steps(settings, per_epoch)
    seen = _rows_seen(settings, rows, steps, per_epoch)
    facts |= {
        "steps": steps,
        "epochs": _epochs(settings, rows, steps),
        "warmup_steps": warmup_steps(settings, steps),
        "train_rows": rows,
        "label_tokens": _share(label_tokens, seen, rows),
        "tokens": _share(tokens, seen, rows),
        "checkpoints": checkpoints(settings, steps, per_epoch),
        "evaluations": evaluations(settings, steps, per_epoch),
    }
    return facts | {"unknown": {key: _reason(key, settings) for key, value in facts.items() if value is None}}


def batch_sizes(settings: RunSettings) -> dict[str, int]:
    """Return the rows of one optimiser step, ``effective_batch_size``, its three factors, and the nodes."""
    batch = settings.training_arg("per_device_train_batch_size")
    accumulation = settings.training_arg("gradient_accumulation_steps")
    return {
        "per_device_train_batch_size": batch,
        "gpus": settings.processes,
        "nodes": settings.nodes,
        "gradient_accumulation_steps": accumulation,
        "effective_batch_size": batch * settings.processes * accumulation,
    }


def steps_per_epoch(settings: RunSettings, rows: int | None) -> int | None:
    """Return the optimiser steps of one pass over `rows`; 0 if `dataloader_drop_last` leaves no batch."""
    if rows is None:
        return None
    return math.ceil(_batches(settings, rows) / settings.training_arg("gradient_accumulation_steps"))


def total_steps(settings: RunSettings, per_epoch: int | None) -> int | None:
    """Return the optimiser steps of the whole run; 0 if an epoch has none."""
    if per_epoch == 0:
        return 0
    steps = settings.training_arg("max_steps")
    if steps > 0:
        return steps
    return None if per_epoch is None else math.ceil(settings.training_arg("num_train_epochs") * per_epoch)


def warmup_steps(settings: RunSettings, steps: int | None) -> int | None:
    """Return the steps of the learning rate's warmup; `warmup_steps` below 1 is a share of all steps."""
    warmup = settings.training_arg("warmup_steps")
    if warmup >= 1:
        return int(warmup)
    return None if steps is None else math.ceil(steps * warmup)


def interval(settings: RunSettings, kind: str, steps: int) -> int:
    """Return after how many steps something happens again: `kind` is ``logging``, ``eval`` or ``save``.

    Below 1 it is a share of all steps; `eval_steps` that isn't given follows `logging_steps`.
    """
    every = settings.training_arg(f"{kind}_steps") or settings.training_arg("logging_steps")
    return max(math.ceil(steps * every) if every < 1 else int(every), 1)


def evaluations(settings: RunSettings, steps: int | None, per_epoch: int | None) -> int | None:
    """Return how often the validation split is evaluated over the run; 0 if there is none."""
    if not has_validation(settings):
        return 0
    strategy, delay = settings.training_arg("eval_strategy"), settings.training_arg("eval_delay") or 0
    if strategy == "no":
        return 2  # before the first step and after the last
    if steps is None or (strategy == "epoch" and not per_epoch):
        return None
    if strategy == "steps":
        every = interval(settings, "eval", steps)
        due = [step for step in (*range(every, steps + 1, every), steps) if step >= delay]
    else:
        ends = (*range(per_epoch, steps + 1, per_epoch), steps)
        due = [step for step in ends if step / per_epoch >= delay]
    # transformers evaluates the last step too; if the delay forbids it, the end of train() does.
    return 1 + len({*due, steps})


def checkpoints(settings: RunSettings, steps: int | None, per_epoch: int | None) -> int | None:
    """Return how many checkpoints are written over the run, those that `save_total_limit` removes again included."""
    strategy = settings.training_arg("save_strategy")
    if strategy == "no":
        return 0
    if steps is None or strategy == "best" or (strategy == "epoch" and not per_epoch):
        return None
    if strategy == "epoch":
        return math.ceil(steps / per_epoch)
    every = interval(settings, "save", steps)
    # The last step's is spared unless it is due anyway, or may be the best.
    last = steps % every > 0 and settings.training_arg("load_best_model_at_end")
    return steps // every + bool(last)


def checkpoint_bytes(settings: RunSettings, shape: Shape) -> int:
    """Return the size of one checkpoint, in bytes: weights or adapter, optimiser, and what is needed to go on.

    With DeepSpeed the optimiser's files hold 32-bit master weights and two moments, those of stages 1 and 2 the whole
    model once more beside them.

    Raises:
        UserError: the DeepSpeed file can't be read.
    """
    size = output_bytes(settings, shape) + SMALL_FILES
    if settings.peft_config is not None:
        size += ADAPTER_FILES
    if settings.training_arg("save_only_model"):
        return size
    zero = _zero(settings)
    itemsize = _itemsize(settings)
    if zero.stage:
        partitions = 12 * trainable_parameters(settings, shape) + DEEPSPEED_FILES
        if zero.stage == 3:
            return size + partitions
        again = shape.parameters * (2 if zero.half else ITEMSIZE[settings.model.dtype])
        tied = shape.vocabulary * shape.hidden * itemsize if shape.tied and settings.peft_config is None else 0
        return size + partitions + again + tied  # DeepSpeed's state has tied weights under both of their names
    states = optimiser_bytes(settings, shape, itemsize)
    return size + states + (STATES * _count(settings, shape) if states else 0)


def output_bytes(settings: RunSettings, shape: Shape) -> int:
    """Return the size of what the run leaves in its results, in bytes: an adapter, or a model without its tokenizer."""
    return trainable_parameters(settings, shape) * _itemsize(settings) + TENSOR * _count(settings, shape)


def disk(settings: RunSettings, shape: Shape, checkpoints: int | None) -> dict[str, int | None]:
    """Return ``checkpoint_bytes`` of one checkpoint, ``disk_bytes`` of all that lie in scratch at once at most, and
    ``output_bytes``.

    Args:
        checkpoints: how many are written over the run; None if that can't be known, then `disk_bytes` is known only
            with a `save_total_limit`.
    """
    one, limit = checkpoint_bytes(settings, shape), settings.training_arg("save_total_limit")
    kept = math.inf
    if limit:
        # The oldest goes when the newest is there; the best stays beside the last.
        kept = max(limit, 2 if settings.training_arg("load_best_model_at_end") else 1) + 1
    most = min(math.inf if checkpoints is None else checkpoints, kept)
    return {
        "checkpoint_bytes": one,
        "disk_bytes": None if most == math.inf else one * most,
        "output_bytes": output_bytes(settings, shape),
    }


def _zero(settings: RunSettings) -> Any:
    return zero_partitioning(settings, "cpu" if settings.training_arg("use_cpu") else "cuda")


def _itemsize(settings: RunSettings) -> int:
    """Return the bytes of a trained element as it is saved: adapters are kept in 32 bits, whatever the base has."""
    if _zero(settings).half:
        return 2
    return ITEMSIZE[settings.model.dtype] if settings.peft_config is None else 4


def _count(settings: RunSettings, shape: Shape) -> int:
    return sum(count for count, _, _ in trained_tensors(settings, shape))


def has_validation(settings: RunSettings) -> bool:
    """Return whether the data has a validation split."""
    data = settings.data_config
    return bool(data.val_file or data.validation_size or (data.dataset and data.dataset.validation_split))


def _batches(settings: RunSettings, rows: int) -> int:
    """Return the batches that each GPU takes in one pass."""
    at_once = settings.training_arg("per_device_train_batch_size") * settings.processes
    return rows // at_once if settings.training_arg("dataloader_drop_last") else math.ceil(rows / at_once)


def _epochs(settings: RunSettings, rows: int | None, steps: int | None) -> float | None:
    """Return the passes over the rows; of the last one the share of its batches."""
    if rows is None or steps is None:
        return None
    batches, accumulation = _batches(settings, rows), settings.training_arg("gradient_accumulation_steps")
    if not batches:
        return 0.0
    whole, part = divmod(steps, math.ceil(batches / accumulation))
    return round(whole + part * accumulation / batches, 4)


def _rows_seen(settings: RunSettings, rows: int | None, steps: int | None, per_epoch: int | None) -> int | None:
    if None in (rows, steps, per_epoch):
        return None
    sizes = batch_sizes(settings)
    in_epoch = rows
    at_once = sizes["per_device_train_batch_size"] * sizes["gpus"]
    if settings.training_arg("dataloader_drop_last"):
        in_epoch = rows // at_once * at_once
    whole, part = divmod(steps, per_epoch) if per_epoch else (0, 0)
    return whole * in_epoch + min(part * sizes["effective_batch_size"], in_epoch)


def _share(tokens: int | None, seen: int | None, rows: int | None) -> int | None:
    if None in (tokens, seen, rows):
        return None
    return round(tokens * seen / rows) if rows else 0


def _reason(key: str, settings: RunSettings) -> str:
    if key == "checkpoints" and settings.training_arg("save_strategy") == "best":
        return "save_strategy 'best' saves at each new best, at most once an evaluation"
    if settings.data_config.streaming:
        return "a stream's rows are counted when the data stage has read them"
    return "the training rows are not counted yet"
