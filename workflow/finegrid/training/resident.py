"""A base model that stays in memory while run after run is trained or scored on it.

Used where one process has several runs (:mod:`finegrid.packing`); reads model and adapter folders, writes nothing.
Every run gets modules of its own, a copy of the base's that shares its weights, so that no run's adapter leaves a trace
in the next one's model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finegrid.training.model import load_base, load_trained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finegrid.settings import RunSettings


class ResidentBase:
    """Loads what runs trained, as :func:`finegrid.training.model.load_trained` does, and the base but once.

    One base is kept: that of the last run. A fully trained model is loaded from its own folder.
    """

    def __init__(self):
        self._model: PreTrainedModel | None = None
        self._key: tuple[str, ...] | None = None

    def load(
        self, settings: RunSettings, folder: Path, adapter: Path | None, device: torch.device | str
    ) -> PreTrainedModel | PeftModel:
        """Return what a run trained, ready for evaluation (``eval()``, no gradients); see ``load_trained``."""
        if adapter is not None and settings.peft_config is None:
            return load_trained(settings, folder, adapter, device)
        model = self.base(settings, folder, device)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=False)
        return model.eval().requires_grad_(False)

    def base(self, settings: RunSettings, folder: Path, device: torch.device | str) -> PreTrainedModel:
        """Return a base model with modules of its own, as ``load_base`` does."""
        return _with_shared_weights(self._loaded(settings, folder, device))

    def _loaded(self, settings: RunSettings, folder: Path, device: torch.device | str) -> PreTrainedModel:
        quantised = json.dumps(settings.quantization_config, sort_keys=True, default=str)
        key = (str(folder), str(device), settings.model.model_dump_json(), quantised)
        if key != self._key:
            self._model = self._key = None  # two bases need not fit side by side
            self._model = load_base(settings, folder, device)
            self._key = key
        return self._model


def _with_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    shared = [*model.parameters(), *model.buffers()]
    # The scales of 4-bit weights, which a layer knows as well as its weight does.
    shared += [weight.quant_state for weight in shared if getattr(weight, "quant_state", None) is not None]
    for layer in model.modules():
        if hasattr(layer, "init_8bit_state"):
            # bitsandbytes takes the scales out of the weight in the first forward pass: a copy would find none there.
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            shared += [layer.state.CB, layer.state.SCB]
    return copy.deepcopy(model, {id(each): each for each in shared})
