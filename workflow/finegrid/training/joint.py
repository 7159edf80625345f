"""One forward and backward pass for several runs that adapt one base.

The rows of all runs lie end to end, those of a run side by side (:mod:`finegrid.training.adapters`). The loss is the
sum of the runs' losses, each over its own label tokens, so each adapter gets the gradient of its own loss alone: rows
see each other neither in attention nor elsewhere.

Per token the arithmetic is that of a run alone, in products of other shapes: numbers are equal up to rounding, and so
they are where the same run has other runs beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finegrid.training.adapters import ManyAdapters, adapted_layers, why_not_plain
from finegrid.training.loss import Head, find_head, label_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finegrid.training.lockstep import Lane
    from finegrid.training.trainer import LabelTokenTrainer


class JointPass:
    """Passes for the lanes of a pack; see the module.

    Args:
        load: gives the runs' base with modules for this object alone; the weights are shared with the runs' own models.
    """

    def __init__(self, load: Callable[[LabelTokenTrainer], PreTrainedModel]):
        self._load = load
        self._adapters: ManyAdapters | None = None
        self._head: Head | None = None
        self._trainers: dict[str, LabelTokenTrainer] = {}
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._no_room = False

    def join(self, lane: Lane, trainer: LabelTokenTrainer) -> str | None:
        """Take a run in; or say why its steps can't be made with others'."""
        reason = why_not(trainer)
        if reason is None and self._adapters is None:
            reason = self._begin(trainer)
        if reason is not None:
            return reason
        self._trainers[lane.name] = trainer
        self._trained[lane.name] = [each for each in trainer.model.parameters() if each.requires_grad]
        self._adapters.add(lane.name, trainer.model)
        return None

    def _begin(self, trainer: LabelTokenTrainer) -> str | None:
        base = self._load(trainer)
        base.set_attn_implementation(trainer.model.config._attn_implementation)
        self._head, reason = find_head(base)
        if reason is None:
            self._adapters = ManyAdapters(base.train())
        return reason

    def leave(self, lane: Lane) -> None:
        """Forget a run."""
        if self._trainers.pop(lane.name, None) is not None:
            del self._trained[lane.name]
            self._adapters.remove(lane.name)

    def __call__(self, lanes: Sequence[Lane]) -> None:
        """Make a pass: gradients are added to the adapters' parameters, and each lane's answer is its batch's share
        of its window's loss, detached.

        A pass that fails leaves no gradient, and every lane to make its step by itself: so a bad batch is one run's
        own. After one for which the memory wasn't enough there are no more.
        """
        if self._no_room:
            return
        started = time.monotonic()
        sizes = [lane.batch[0]["input_ids"].shape[1] for lane in lanes]
        parameters = [each for lane in lanes for each in self._trained[lane.name]]
        try:
            with contextlib.ExitStack() as stack:
                for lane in lanes:
                    stack.enter_context(lane.undrawn_on_failure())
                losses = self._losses(lanes, sizes)
                gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        except (RuntimeError, ValueError, IndexError) as error:
            self._no_room = isinstance(error, torch.OutOfMemoryError)
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        seconds = time.monotonic() - started
        for lane, loss, size in zip(lanes, losses.detach(), sizes, strict=True):
            lane.answer = loss
            lane.add_seconds(seconds * size / sum(sizes))

    def _losses(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> torch.Tensor:
        batches = [lane.batch[0] for lane in lanes]
        trainers = [self._trainers[lane.name] for lane in lanes]
        drawing = {lane.name: lane.drawing for lane in lanes}
        labels = [len(batch["targets"]) for batch in batches]
        with (
            trainers[0].compute_loss_context_manager(),
            self._adapters.parts([lane.name for lane in lanes], sizes, dim=1, drawing=drawing, labels=labels),
        ):
            states = label_states(self._adapters.base, self._head, merged(batches))
            parts = states.split(labels)
            losses = [
                part.loss(trainer.args.label_smoothing_factor) / lane.batch[1]
                for part, trainer, lane in zip(parts, trainers, lanes, strict=True)
            ]
        return torch.stack(losses)


def keep_company(trainer: LabelTokenTrainer, lane: Lane, joint: JointPass) -> list[str]:
    """Let a run's steps be made together with others' if they can be; return notes for its summary."""
    reason = joint.join(lane, trainer)
    if reason is not None:
        return [f"its steps were made by themselves: {reason}"]
    trainer.lane = lane
    return ["its steps were made together with other runs' ones: its seconds are a share, its memory is all of theirs"]


def why_not(trainer: LabelTokenTrainer) -> str | None:
    """Return why a run's steps can't be made together with others'; None if they can."""
    model, args = trainer.model, trainer.args
    if trainer.head is None or not trainer.data_collator.flat:
        return "its batches are padded, or all logits are computed"
    if args.activation_checkpointing:
        return "activations are computed again in backward"
    if args.fp16:
        return "fp16 scales the loss of each run"
    if getattr(model.config, "output_router_logits", False):
        return "the loss has a part for the balance of experts"
    if getattr(model.config, "attention_dropout", 0) or any(_base_dropouts(model)):
        return "the base itself has dropout"
    if any(trainer.head.module in (layer, layer.get_base_layer()) for layer in adapted_layers(model).values()):
        return "its adapter changes the head, which sees label positions alone"
    return why_not_plain(model)


def _base_dropouts(model: nn.Module) -> list[float]:
    modules = model.get_base_model().named_modules()
    return [module.p for name, module in modules if isinstance(module, nn.Dropout) and "lora_" not in name]


def merged(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return flat batches of :class:`finegrid.training.collation.Collator` as one, in their order."""
    device = batches[0]["input_ids"].device
    sizes = torch.tensor([0, *(batch["input_ids"].shape[1] for batch in batches)]).cumsum(0).tolist()
    longest = max(batch["grid"][1] for batch in batches)
    cells, starts, shared, above = [], [torch.zeros(1, dtype=torch.int32, device=device)], [], 0
    for batch, before in zip(batches, sizes, strict=False):
        rows, columns = batch["grid"]
        row, column = batch["cells"].div(columns, rounding_mode="floor"), batch["cells"] % columns
        cells.append((row + above) * longest + column)
        starts.append(batch["starts"][1:] + before)
        shared += [(first + above, count, tokens) for first, count, tokens in batch["shared"]]
        above += rows
    return {
        "input_ids": torch.cat([batch["input_ids"] for batch in batches], dim=1),
        "position_ids": torch.cat([batch["position_ids"] for batch in batches], dim=1),
        "positions": torch.cat([batch["positions"] + n for batch, n in zip(batches, sizes, strict=False)]),
        "targets": torch.cat([batch["targets"] for batch in batches]),
        "cells": torch.cat(cells),
        "starts": torch.cat(starts),
        "grid": (above, longest),
        "shared": tuple(shared),
    }
