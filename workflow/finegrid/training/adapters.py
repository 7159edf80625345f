"""Several adapters on one base in one forward pass: what is frozen is computed once over the rows of all.

The rows, or tokens, of an adapter stand side by side. At each linear layer that an adapter changes, its low-rank update
is added on its own part, as peft computes it; nothing of one part gets into another, and what is no number in one stays
in it. peft's own ``adapter_names`` do this for inference alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from finegrid.training.low_rank import WrittenOut

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PLAIN = ("Linear", "Linear4bit")  # peft's LoRA layers whose update is B(A(dropout(x))) * scaling
Drawing = Callable[[], contextlib.AbstractContextManager]


class ManyAdapters:
    """The adapters of one base.

    Args:
        base: modules for this object alone; the weights are shared with the models that the adapters come from.

    Attributes:
        base: gives the logits of all adapters' rows within :meth:`parts`.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self._layers: dict[str, dict[str, nn.Module]] = {}
        self._hooked: set[str] = set()
        self._names: Sequence[str] = ()
        self._sizes: list[int] = []
        self._labels: list[int] = []
        self._dim = 0
        self._drawing: dict[str, Drawing] = {}

    def add(self, name: str, model: PeftModel) -> None:
        """Take in the adapter of a model for which :func:`why_not_plain` has nothing to say."""
        self._layers[name] = adapted_layers(model)
        for layer in self._layers[name].keys() - self._hooked:
            self.base.get_submodule(layer).register_forward_hook(self._adding(layer))
            self._hooked.add(layer)

    def __contains__(self, name: str) -> bool:
        return name in self._layers

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._layers.pop(name, None)

    @contextlib.contextmanager
    def parts(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        dim: int,
        drawing: dict[str, Drawing] | None = None,
        labels: Sequence[int] = (),
    ) -> Iterator[None]:
        """Say whose the inputs are while the block runs.

        Args:
            names: of the adapters, in the order of their parts.
            sizes: of the parts along ``dim`` of each layer's input.
            drawing: for each adapter the context that its dropout draws in.
            labels: sizes of the parts where only label positions are computed.
        """
        self._names, self._sizes, self._dim, self._drawing = names, list(sizes), dim, drawing or {}
        self._labels = list(labels)
        try:
            yield
        finally:
            self._names, self._sizes = (), []

    def now(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Say anew whose the inputs are, within :meth:`parts`."""
        self._names, self._sizes = names, list(sizes)

    def _adding(self, name: str) -> Callable:
        def add_updates(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
            layers = [self._layers[adapter].get(name) for adapter in self._names]
            if all(layer is None for layer in layers):
                return None
            whole = inputs[0].shape[self._dim] == sum(self._sizes)
            parts = inputs[0].split(self._sizes if whole else self._labels, dim=self._dim)
            updates = [
                self._update(adapter, layer, part, output)
                for adapter, layer, part in zip(self._names, layers, parts, strict=True)
            ]
            return output + torch.cat(updates, dim=self._dim)

        return add_updates

    def _update(self, name: str, layer: nn.Module | None, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return an adapter's update of its part x of shape (..., in_features); zeros where it has none."""
        if layer is None:
            return output.new_zeros(*x.shape[:-1], output.shape[-1])
        (adapter,) = layer.active_adapters
        down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
        x = layer._cast_input_dtype(x, down.weight.dtype)
        if getattr(dropout, "p", 0.0) and dropout.training:
            with self._drawing[name]():
                x = dropout(x)
        return (up(down(x)) * layer.scaling[adapter]).to(output.dtype)


def why_not_plain(model: nn.Module) -> str | None:
    """Return why a model's adapter can't be computed beside others; None if it can."""
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != "LORA":
        return "its adapter is not LoRA"
    layers = adapted_layers(model)
    if any(hasattr(module, "init_8bit_state") for module in model.modules()):
        # On a GPU bitsandbytes computes a column in 16 bits where any row of the batch has an outlier in it.
        return "its base has 8-bit layers, in which a row's numbers hang on the others'"
    others = [
        name
        for name, module in layers.items()
        if not _is_plain(module) or module.lora_variant or len(module.active_adapters) != 1
    ]
    if others or not layers:
        return f"its adapter is no plain low-rank update ({others[0] if others else 'no layers'})"
    return None


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, WrittenOut) or type(layer).__name__ in PLAIN


def adapted_layers(model: PeftModel) -> dict[str, nn.Module]:
    """Return peft's LoRA layers of a model by the names that they have in the base."""
    from peft.tuners.lora import LoraLayer

    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}
