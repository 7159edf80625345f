"""The loss over label tokens, with the head run on label positions only.

A causal language model of vocabulary V gives B * T * V logits, most of them for prompt and padding. Here a hook in
front of the head keeps the N positions that predict a label, so head and cross-entropy cost N * V. Everything else of
the model's own forward pass stays: wrappers (DDP, DeepSpeed, peft, autocast), and whatever the architecture does to
its logits after the head (Gemma's soft cap, Cohere's and Granite's scale).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from finegrid.training.flat import layout_of


def label_logits(model: nn.Module, head: nn.Module | None, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Return logits of shape (N, V), one row for each of the batch's ``targets``, and the model's output.

    Logits are float32, or float64 of a model in float64.

    Args:
        head: the module that makes logits of hidden states; None computes all logits and then picks.
        batch: of :class:`finegrid.training.collation.Collator`.
    """
    positions, columns = batch["positions"], batch["input_ids"].shape[1]

    def keep_label_positions(module: nn.Module, inputs: tuple) -> tuple | None:
        hidden = inputs[0]
        # Virtual tokens of prompt tuning stand before the row's own: count columns from the right.
        return (hidden[:, -columns:].flatten(0, 1).index_select(0, positions), *inputs[1:])

    handle = head.register_forward_pre_hook(keep_label_positions) if head is not None else None
    try:
        outputs = model(input_ids=batch["input_ids"], **layout_of(batch))
    finally:
        if handle is not None:
            handle.remove()
    logits = outputs["logits"]
    if logits.dim() == 3:
        logits = logits[:, -columns:].flatten(0, 1).index_select(0, positions)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), outputs


def sum_of_losses(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy (natural logarithm) summed over the targets.

    Args:
        label_smoothing: share of the target spread over the whole vocabulary, as in transformers' ``LabelSmoother``.
    """
    return functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


@torch.no_grad()
def find_head(model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Return the model's head if the hook in front of it works for this architecture, else None and a note why not.

    Tried out on six tokens rather than looked up by the architecture's name: logits of picked positions must be the
    picked logits.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None, "all logits are computed: the model has no separate head"
    device = next(model.parameters()).device
    columns = torch.arange(3, device=device)
    batch = {
        "input_ids": torch.stack([columns, columns + 1]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64, device=device),
        "positions": torch.tensor([1, 3, 5], device=device),
    }
    training = model.training
    model.eval()
    try:
        expected, _ = label_logits(model, None, batch)
        found, _ = label_logits(model, head, batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return None, f"all logits are computed: the head can't be run on label positions alone ({error})"
    finally:
        model.train(training)
    # Kernels for other shapes round otherwise; a lost soft cap or scale is far beyond this.
    if found.shape != expected.shape or (found - expected).abs().max() > 1e-2 * expected.abs().max():
        return None, "all logits are computed: the head on label positions alone gives other logits"
    return head, None
