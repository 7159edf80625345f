"""The loss over label tokens, with the head run on label positions only, and so the MLP of the last layer.

A causal language model of vocabulary V gives B * T * V logits, most of them for prompt and padding. Here a hook in
front of the head keeps the N positions that predict a label, so head and cross-entropy cost N * V. Where nothing is
done to the logits after the head, it isn't run at all: torch's ``linear_cross_entropy`` makes loss and gradient of its
matrix, in parts if N * V is large (:mod:`finegrid.training.sizes`); under autocast on a CPU, where that one is slow,
:class:`HalfCrossEntropy` does. After the last attention no position sees another one: the last layer's MLP, the largest
part of a layer, is run on the N positions, too. Everything else of the model's own forward pass stays: wrappers (DDP,
DeepSpeed, peft, autocast), and whatever the architecture does to its logits (Gemma's soft cap, Cohere's and Granite's
scale).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import LinearCrossEntropyOptions, functional
from torch.utils.checkpoint import checkpoint

from finegrid.training.collation import IGNORED, ROWS_OF_A_KERNEL
from finegrid.training.flat import has_16_bits_on_cpu, layout_of
from finegrid.training.sizes import rows_of_logits


@dataclass(frozen=True)
class Head:
    """The module that makes logits of hidden states.

    Attributes:
        plain: whether it is a matrix, whose products are the model's logits.
        mlp: that of the last layer, if it can be run on label positions alone.
    """

    module: nn.Module
    plain: bool = False
    mlp: nn.Module | None = field(default=None, compare=False)


class LabelStates:
    """What a batch's N targets are predicted from: hidden states of a plain head, or logits.

    Attributes:
        states: (N, hidden) or (N, V).
        targets: int64 (N,).
        outputs: of the model; the logits in it are none where the head is plain.
        half: the type that autocast computes the head in; None: that of its weights.
    """

    def __init__(
        self,
        states: torch.Tensor,
        head: nn.Linear | None,
        targets: torch.Tensor,
        outputs: Any,
        half: torch.dtype | None = None,
    ):
        self.states, self._head, self.targets, self.outputs, self.half = states, head, targets, outputs, half

    def split(self, sizes: list[int]) -> list[LabelStates]:
        """Return the states of so many targets each, in their order."""
        parts = zip(self.states.split(sizes), self.targets.split(sizes), strict=True)
        return [LabelStates(states, self._head, targets, self.outputs, self.half) for states, targets in parts]

    def losses(self) -> torch.Tensor:
        """Return the cross-entropy (natural logarithm) of each target, (N,); not to be differentiated."""
        return torch.cat([self._loss(*part, reduction="none") for part in self._parts()])

    def loss(self, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy (natural logarithm) summed over the targets.

        Args:
            label_smoothing: share of the target spread over the whole vocabulary, as transformers' ``LabelSmoother``
                does.
        """
        head, states = self._head, self.states
        if head is None:
            return self._loss(states, self.targets, label_smoothing=label_smoothing)
        fused = not label_smoothing and states.dtype == head.weight.dtype and self.half is None
        fused &= states.dtype in (torch.float32, torch.float64)  # of fewer bits it is slow on a CPU
        if fused and len(states):
            options = LinearCrossEntropyOptions(batch_chunk_size=self._rows(), chunking_method=None)
            return functional.linear_cross_entropy(
                states, head.weight, self.targets, linear_bias=head.bias, reduction="sum", options=options
            )
        if self._in_half_on_cpu() and not label_smoothing and len(states):
            cast = [None if each is None else each.detach() for each in _half_of(head, self.half)]
            return HalfCrossEntropy.apply(states, head.weight, head.bias, self.targets, *cast, self._rows())
        parts = list(self._parts())
        if len(parts) == 1:
            return self._loss(*parts[0], label_smoothing=label_smoothing)
        again = [checkpoint(self._loss, *part, label_smoothing=label_smoothing, use_reentrant=False) for part in parts]
        return torch.stack(again).sum()

    def _loss(self, states: torch.Tensor, targets: torch.Tensor, reduction="sum", label_smoothing=0.0) -> torch.Tensor:
        count, logits = len(states), states
        if self._in_half_on_cpu():
            states = _filled_to_kernel(states.to(self.half))
            logits = functional.linear(states, *_half_of(self._head, self.half))
        elif self._head is not None:
            with torch.autocast(states.device.type, self.half, enabled=self.half is not None):
                logits = self._head(states)
        targets = functional.pad(targets, (0, len(states) - count), value=IGNORED)
        losses = functional.cross_entropy(
            _at_least_float32(logits), targets, reduction=reduction, label_smoothing=label_smoothing
        )
        return losses[:count] if reduction == "none" else losses

    def _in_half_on_cpu(self) -> bool:
        return self._head is not None and self.half is not None and self.states.device.type == "cpu"

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from zip(self.states.split(self._rows()), self.targets.split(self._rows()), strict=True)

    def _rows(self) -> int:
        width = self.states.shape[1] if self._head is None else self._head.out_features
        return rows_of_logits(width, len(self.targets))


class HalfCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of a head's products in 16 bits, as autocast makes them: softmax in float32.

    Gradients are made with the loss, as ``linear_cross_entropy`` does, so that nothing as large as the logits is kept,
    and the head's matrix is cast once.
    """

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        matrix: torch.Tensor,
        offset: torch.Tensor | None,
        rows: int,
    ) -> torch.Tensor:
        """Return the loss of states (N, hidden) and targets (N,).

        Args:
            matrix: the weight (V, hidden) in 16 bits.
            offset: the bias in 16 bits.
            rows: how many have their logits made at a time.
        """
        half = matrix.dtype
        made = [
            torch.zeros_like(each) if needed else None
            for each, needed in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), rows):
            own = slice(start, start + rows)
            part, picked = _filled_to_kernel(states[own].to(half)), targets[own, None]
            logits = functional.linear(part, matrix, offset).float()
            shares = logits.softmax(-1)
            count = len(picked)
            # log(sum(exp(x))) is x - log(softmax(x)) of any x; of the largest one nothing underflows.
            largest, at = logits[:count].max(-1, keepdim=True)
            total += (largest - shares[:count].gather(1, at).log() - logits[:count].gather(1, picked)).sum()
            del logits
            shares[:count].scatter_add_(1, picked, shares.new_full((count, 1), -1))
            shares[count:] = 0
            gradient = shares.to(half)
            del shares
            to_states, to_weight, to_bias = made
            if to_states is not None:
                to_states[own] = (gradient @ matrix)[:count]
            if to_weight is not None:
                to_weight += gradient.t() @ part
            if to_bias is not None:
                to_bias += gradient.sum(0)
        ctx.made = made
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made = [None if each is None else each.mul_(gradient) for each in ctx.made]
        ctx.made = None
        return *made, None, None, None, None


def _half_of(head: nn.Linear, half: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a head's weight and bias in 16 bits.

    The copy of a frozen weight stays with it: memory as large as this takes a process longer to get than to fill.
    """
    weight, bias = head.weight, None if head.bias is None else head.bias.to(half)
    if weight.requires_grad:
        return weight.to(half), bias
    of = (weight._version, weight.data_ptr(), half)
    if getattr(weight, "in_half", (None, None))[0] != of:
        weight.in_half = (of, weight.to(half))
    return weight.in_half[1], bias


def label_states(model: nn.Module, head: Head | None, batch: dict[str, Any]) -> LabelStates:
    """Run the model on a batch up to what its label tokens are predicted from.

    Args:
        head: None computes all logits and then picks.
        batch: of :class:`finegrid.training.collation.Collator`.
    """
    if head is None or not head.plain:
        logits, outputs = label_logits(model, head, batch)
        return LabelStates(logits, None, batch["targets"], outputs)
    kept: list[tuple[torch.Tensor, torch.dtype | None]] = []

    def keep_states(hidden: torch.Tensor) -> torch.Tensor:
        kind = hidden.device.type  # some wrappers autocast the model's forward pass alone
        kept.append((hidden, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None))
        stack.enter_context(torch.autocast(kind, enabled=False))  # it would cast the matrix, for no row
        return hidden[:0].detach().to(head.module.weight.dtype)

    with contextlib.ExitStack() as stack, _head_given(head, batch, keep_states):
        hook = head.module.register_forward_hook(lambda *_: stack.close())
        try:
            outputs = model(input_ids=batch["input_ids"], **layout_of(batch))
        finally:
            hook.remove()
    (states, half), *_ = kept
    return LabelStates(states, head.module, batch["targets"], outputs, half)


def label_logits(model: nn.Module, head: Head | None, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Return logits of shape (N, V), one row for each of the batch's ``targets``, and the model's output.

    Logits are float32, or float64 of a model in float64. Arguments are those of :func:`label_states`.
    """
    positions, columns = batch["positions"], batch["input_ids"].shape[1]
    with _head_given(head, batch, lambda hidden: hidden):
        outputs = model(input_ids=batch["input_ids"], **layout_of(batch))
    logits = outputs["logits"]
    if logits.dim() == 3:
        logits = logits[:, -columns:].flatten(0, 1).index_select(0, positions)
    return _at_least_float32(logits), outputs


@contextlib.contextmanager
def _head_given(
    head: Head | None, batch: dict[str, Any], given: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """While the block runs, give the head what ``given`` makes of the hidden states of label positions."""
    positions, columns = batch["positions"], batch["input_ids"].shape[1]

    def at_labels(hidden: torch.Tensor) -> torch.Tensor:
        # Virtual tokens of prompt tuning stand before the row's own: count columns from the right.
        return hidden[:, -columns:].flatten(0, 1).index_select(0, positions)

    hooks = []
    if head is not None:
        hooks.append(
            head.module.register_forward_pre_hook(lambda _, inputs: (given(at_labels(inputs[0])), *inputs[1:]))
        )
    if head is not None and head.mlp is not None:
        hooks += _narrowed(head.mlp, at_labels, positions, columns)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrowed(
    mlp: nn.Module, at_labels: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor, columns: int
) -> list[Any]:
    """Let a module work on label positions alone, and answer zeros for the others; return the hooks."""
    shapes: list[torch.Size] = []

    def narrow(module: nn.Module, inputs: tuple) -> tuple:
        shapes.append(inputs[0].shape)
        return (_filled(at_labels(inputs[0]))[None], *inputs[1:])

    def widen(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        rows, length, _ = shapes.pop()
        places = positions + (positions // columns + 1) * (length - columns)
        wide = output.new_zeros(rows * length, output.shape[-1]).index_copy(0, places, output[0, : len(places)])
        return wide.unflatten(0, (rows, length))

    return [mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen)]


def _filled(states: torch.Tensor) -> torch.Tensor:
    """Return (N, width) with rows of zeros behind, see :data:`finegrid.training.collation.ROWS_OF_A_KERNEL`."""
    return _filled_to_kernel(states) if has_16_bits_on_cpu(states) else states


def _filled_to_kernel(states: torch.Tensor) -> torch.Tensor:
    rows = -len(states) % ROWS_OF_A_KERNEL
    return functional.pad(states, (0, 0, 0, rows)) if rows else states


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def find_head(model: nn.Module) -> tuple[Head | None, str | None]:
    """Return the model's head if the hook in front of it works for this architecture, else None and a note why not.

    Tried out on six tokens rather than looked up by the architecture's name: logits of picked positions must be the
    picked logits. A head is plain if they are the products of its matrix, too; the last layer's MLP is in it if the
    logits stay what they are with that one on the picked positions.
    """
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        return None, "all logits are computed: the model has no separate head"
    device = next(model.parameters()).device
    columns = torch.arange(3, device=device)
    batch = {
        "input_ids": torch.stack([columns, columns + 1]),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64, device=device),
        "positions": torch.tensor([1, 3, 5], device=device),
        "targets": columns,
    }
    head = Head(module)
    training = model.training
    model.eval()
    try:
        expected, _ = label_logits(model, None, batch)
        found, _ = label_logits(model, head, batch)
        head, note = _found(model, head, batch, expected, found)
        return _with_mlp(model, head, batch, expected), note
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return None, f"all logits are computed: the head can't be run on label positions alone ({error})"
    finally:
        model.train(training)


def _found(
    model: nn.Module, head: Head, batch: dict[str, Any], expected: torch.Tensor, found: torch.Tensor
) -> tuple[Head | None, str | None]:
    # Kernels for other shapes round otherwise; a lost soft cap or scale is far beyond this.
    if _differ(found, expected):
        return None, "all logits are computed: the head on label positions alone gives other logits"
    # What somebody hung on the module has to run: weights that are elsewhere, a forward of its own.
    if type(head.module) is not nn.Linear or "forward" in head.module.__dict__ or head.module._forward_hooks:
        return head, None
    plain = replace(head, plain=True)
    products = _at_least_float32(head.module(label_states(model, plain, batch).states))
    # To the bit, and of some size: a soft cap leaves small numbers nearly as they are.
    same = torch.equal(products, found) and products.abs().max() > 1e-2
    return (plain if same else head), None


def _with_mlp(model: nn.Module, head: Head | None, batch: dict[str, Any], expected: torch.Tensor) -> Head | None:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    mlp = getattr(max(lists, key=len, default=[None])[-1], "mlp", None)
    # Experts tell the loss how often each was chosen: by all tokens.
    if head is None or not isinstance(mlp, nn.Module) or hasattr(mlp, "experts"):
        return head
    narrow = replace(head, mlp=mlp)
    try:
        found, _ = label_logits(model, narrow, batch)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return head
    return head if _differ(found, expected) else narrow


def _differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape != expected.shape or bool((found - expected).abs().max() > 1e-2 * expected.abs().max())
