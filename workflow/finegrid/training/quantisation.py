"""Exact 4-bit base layers on the CPU: works around what bitsandbytes gets wrong there.

Reads and changes a model in memory; called once after loading, by training and by evaluation. What bitsandbytes 0.50.2
does on a CPU with AVX512-BF16 (measured on SmolLM2-135M; read in nn/modules.py, functional.py, backends/cpu/ops.py):

1. The first forward pass in eval mode repacks the weights for `gemv_4bit`, and they stay packed in training mode.
   That operator has no derivative: every frozen linear passes a gradient of zero, adapters learn from the residual
   stream alone (relative error of their gradients: median 100 %, the worst matrices point the wrong way). A run which
   evaluates its base before step 1 hardly learns.
2. Packing rounds scales and outputs to bf16 (logits off by 0.6 to 0.7 %) and can't be undone: a packed model is saved
   with its scales transposed, or quantised once more. It fails for an output width that is no multiple of 32.
3. Backward de-quantises in the dtype the checkpoint was loaded in, not in the compute dtype: loaded in bf16, a model
   has other weights in backward than in forward (gradients off by 0.5 to 0.7 % in the median).
4. Rows whose width is even but no multiple of the block size are decoded with wrong scales (weights off by 12 to 26 %).
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch.nn import functional

from finegrid.training.low_rank import WrittenOut


class ExactLinear4bit(bnb.nn.Linear4bit):
    """A Linear4bit whose CPU path is an ordinary linear over the de-quantised weight, the same in train and eval mode.

    The weight stays packed in 4 bits and is decoded in the compute dtype for forward and again for backward. Under
    autocast it behaves like `torch.nn.Linear`: it computes and answers in the autocast dtype. On any other device it is
    bitsandbytes' own layer.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        if x.device.type != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            compute_dtype = output_dtype = torch.get_autocast_dtype("cpu")
        else:
            compute_dtype, output_dtype = self.compute_dtype or x.dtype, x.dtype
        y = _DequantisedLinear.apply(x.to(compute_dtype), self)
        if self.bias is not None:
            y = y + self.bias.to(compute_dtype)
        return y.to(output_dtype)

    def dequantised_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Decode the weight: shape (out_features, in_features) in `dtype`."""
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
        state = self.weight.quant_state
        # The kernel starts a block at each row; as one row of all elements the blocks are where quantisation put them.
        flat = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.weight.data, self._scales(state), state.blocksize, state.quant_type, (state.shape.numel(),), dtype
        )
        return flat.view(state.shape)

    def _scales(self, state: bnb.functional.QuantState) -> torch.Tensor:
        """The blocks' scales in fp32; those of a double quantisation are decoded once and kept."""
        if not state.nested:
            return state.absmax
        if self.__dict__.get("_decoded_for") is not state:
            scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2)
            self._decoded_scales = scales.float() + state.offset
            self._decoded_for = state
        return self._decoded_scales


class LowRankLinear4bit(WrittenOut, PeftLinear4bit):
    """peft's LoRA layer around a Linear4bit; see :mod:`finegrid.training.low_rank`."""


class _DequantisedLinear(torch.autograd.Function):
    """x @ W.T for a frozen 4-bit W: decodes W again in backward rather than keeping it between the passes."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: ExactLinear4bit) -> torch.Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dequantised_weight(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dequantised_weight(gradient.dtype), None


def make_exact_on_cpu(model: torch.nn.Module) -> list[str]:
    """Give a model's 4-bit layers on the CPU an exact forward and backward pass, in place.

    Call it right after loading, before the first forward pass; whether peft has wrapped the layers makes no difference.
    Parameters, state dict and saved files stay bitsandbytes' own. Layers on other devices, and models without 4-bit
    layers, are left alone.

    Args:
        model: any model, possibly wrapped by peft.

    Returns:
        Notes for the run's summary; empty if nothing was changed.

    Raises:
        RuntimeError: a layer was already repacked by a forward pass in eval mode, which lost its exact scales.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in _PLAIN_LAYERS and module.weight.device.type == "cpu"
    }
    packed = [name for name, layer in layers.items() if _is_packed(layer)]
    if packed:
        raise RuntimeError(
            f"make_exact_on_cpu: {len(packed)} 4-bit layers (first: {packed[0]}) were already repacked by a forward "
            "pass in eval mode, which rounds their scales; call it right after loading the model"
        )
    for layer in layers.values():
        # A new class, not a new `forward` on the instance: copies, peft's isinstance checks and hooks keep working.
        layer.__class__ = ExactLinear4bit
    if not layers:
        return []
    return [
        f"4-bit on the CPU: {len(layers)} layers are de-quantised exactly in forward and backward, because "
        f"bitsandbytes {bnb.__version__} loses gradients and precision there once a model was evaluated."
    ]


def _is_packed(layer: bnb.nn.Linear4bit) -> bool:
    return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


_PLAIN_LAYERS = (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4)
