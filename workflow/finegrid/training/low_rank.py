"""LoRA's linear layers as one operation: x W' + b + s (x A') B', with the backward pass written out.

peft makes a layer's answer of four operations, whose results are as large as the answer, and autograd makes seven of
them backward. Here the update is added to the base's product in place, and products with the rank are written with the
rank first (A x' rather than x A'): a CPU's matrix products of a few columns take two to four times as long as those of
a few rows. The arithmetic is peft's up to rounding; adapters, their files and their configs are peft's own.

Under autocast on a CPU everything here is in its type, as peft's products are; peft's layer casts its input once for
the base and twice for the update, and rounds the update before it adds it.

Used by training and where losses of rows are scored; what generates answers is peft's own. A layer of which more is
asked than this (DoRA and other variants, several adapters at a time, autocast on a GPU, weights kept elsewhere) does it
as peft does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class WrittenOut:
    """What is put before one of peft's LoRA layer classes."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        found = None if args or options else _adapter_of(self, x)
        return super().forward(x, *args, **options) if found is None else _apply(self, x, *found)


class LowRankLinear(WrittenOut, PeftLinear):
    """peft's LoRA layer around ``nn.Linear``."""


def write_out(model: nn.Module) -> list[nn.Module]:
    """Let a model's LoRA layers work as the module says, in place, and return those that did not yet.

    Parameters, state dict and saved files stay peft's own. A model without such layers is left alone.
    """
    changed = []
    for module in model.modules():
        # A new class, not a new `forward` on the instance: copies, peft's isinstance checks and hooks keep working.
        if type(module) is PeftLinear:
            module.__class__ = LowRankLinear
        elif type(module).__name__ == "Linear4bit" and hasattr(module, "lora_A"):
            from finegrid.training.quantisation import LowRankLinear4bit  # bitsandbytes takes a second to import

            module.__class__ = LowRankLinear4bit
        else:
            continue
        changed.append(module)
    return changed


@contextlib.contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Let a model's LoRA layers work as the module says while the block runs."""
    changed = write_out(model)
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = type(module).__bases__[1]


class _LowRank(torch.autograd.Function):
    """See the module; base and update may see another x, where there is dropout."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        base: nn.Module,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the answer to x of shape (..., inputs).

        Args:
            dropped: x after dropout, what the update is made of; None: x itself.
            down: A, (r, inputs).
            up: B, (outputs, r).
            dtype: what is computed in, and the answer's.
        """
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        seen = rows if dropped is None else dropped.reshape(rows.shape).to(dtype)
        a, b, weight = down.to(dtype), up.to(dtype), _weight(base, dtype)
        low = (a @ seen.t()).mul_(scaling)  # (r, rows)
        bias = None if base.bias is None else base.bias.to(dtype)
        answer = functional.linear(rows, weight, bias).addmm_(low.t(), b.t())
        # A weight that was cast is kept, as autocast does; one that was decoded from 4 bits is decoded again.
        keeps = type(base) is nn.Linear and ctx.needs_input_grad[0]
        ctx.save_for_backward(seen, a, b, low, weight if keeps else None)
        ctx.scaling, ctx.base, ctx.shape, ctx.drops = scaling, base, x.shape, dropped is not None
        ctx.types = x.dtype, down.dtype, up.dtype
        return answer.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        seen, a, b, low, weight = ctx.saved_tensors
        of_x, of_down, of_up = ctx.types
        gradient = gradient.reshape(-1, gradient.shape[-1])
        to_low = (b.t() @ gradient.t()).mul_(ctx.scaling)  # (r, rows)
        to_down, to_up = (to_low @ seen).to(of_down), (low @ gradient).t().to(of_up)
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ (_weight(ctx.base, gradient.dtype) if weight is None else weight)
            to_x = (to_x if ctx.drops else to_x.addmm_(to_low.t(), a)).view(ctx.shape).to(of_x)
        if ctx.needs_input_grad[1]:
            to_dropped = (to_low.t() @ a).view(ctx.shape).to(of_down)
        return to_x, to_dropped, to_down, to_up, None, None, None


def _apply(layer: LoraLayer, x: torch.Tensor, adapter: str, dtype: torch.dtype) -> torch.Tensor:
    dropout = layer.lora_dropout[adapter]
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    # In the adapter's type, as peft drops: what is drawn hangs on it.
    dropped = dropout(x.to(down.dtype)) if dropout.training and getattr(dropout, "p", 0.0) else None
    return _LowRank.apply(x, dropped, down, up, layer.scaling[adapter], layer.base_layer, dtype)


def _adapter_of(layer: LoraLayer, x: torch.Tensor) -> tuple[str, torch.dtype] | None:
    """Return the adapter that the layer's answer to x has, if that is all there is to it, and what it computes in."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return None
    down, up, base = layer.lora_A[adapter], layer.lora_B[adapter], layer.base_layer
    parts = (base, down, up, layer.lora_dropout[adapter])
    if any(part._forward_pre_hooks or part._forward_hooks or "forward" in part.__dict__ for part in parts):
        return None  # what somebody hung on a module has to run
    weights = (base.weight, base.bias)
    if down.bias is not None or up.bias is not None or any(w is not None and w.requires_grad for w in weights):
        return None
    dtype = _computes_in(base, x, (down.weight.dtype, up.weight.dtype))
    return None if dtype is None else (adapter, dtype)


def _computes_in(base: nn.Module, x: torch.Tensor, adapters: tuple[torch.dtype, ...]) -> torch.dtype | None:
    """Return the type of the layer's products, if it is one for all of them."""
    plain, on_cpu = type(base) is nn.Linear, x.device.type == "cpu"
    if not (plain or (on_cpu and hasattr(base, "dequantised_weight"))):
        return None
    if torch.is_autocast_enabled(x.device.type):
        # Of 64 bits autocast casts nothing.
        return torch.get_autocast_dtype("cpu") if on_cpu and x.dtype.itemsize <= 4 else None
    dtype = base.weight.dtype if plain else base.compute_dtype or x.dtype
    return dtype if all(dtype == other for other in (x.dtype, *adapters)) else None


def _weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the base's weight (outputs, inputs) in a type, de-quantised where it is 4 bits."""
    return base.weight.to(dtype) if type(base) is nn.Linear else base.dequantised_weight(dtype)
