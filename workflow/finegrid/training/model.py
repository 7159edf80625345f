"""The model of a run: the base from its folder, quantised if the recipe says so, with the adapter that is trained.

Training and evaluation load through here, so both see the same weights: a run's own evaluation loss and the
evaluation stage's loss of the same adapter agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finegrid.errors import UserError, nearest
from finegrid.shapes import read_config

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from finegrid.settings import RunSettings


def load_base(settings: RunSettings, folder: Path, device: torch.device | str) -> PreTrainedModel:
    """Return the base model on ``device``: weights in ``model.dtype``, quantised if there is a quantization_config.

    The parts of a quantised model that stay unquantised (norms, embeddings, head) are float32, as in peft's
    ``prepare_model_for_kbit_training``; nothing of it requires a gradient. Only safetensors are read.

    Raises:
        UserError: the folder holds no causal language model, or one that is stored quantised, or the quantisation
            does not fit it.
    """
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").is_file():  # for what it refuses: a run's command can be called without a plan
        read_config(folder / "config.json")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    options: dict[str, Any] = {
        "dtype": getattr(torch, settings.model.dtype),
        "trust_remote_code": settings.model.trust_remote_code,
        "use_safetensors": True,
        "local_files_only": True,
    }
    if settings.model.attn_implementation:
        options["attn_implementation"] = settings.model.attn_implementation
    if settings.quantization_config:
        # Quantised weights can't be moved afterwards: they are placed while they are read.
        options |= {"quantization_config": quantization(settings.quantization_config), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.model_name_or_path: {folder} can't be loaded as a causal language model: {error}"
        ) from error
    return _prepare_quantised(model) if settings.quantization_config else model.to(device)


def quantization(config: dict[str, Any]) -> Any:
    """Return transformers' ``BitsAndBytesConfig`` of a recipe's ``quantization_config``; types may be strings.

    Raises:
        UserError: bitsandbytes refuses a value.
    """
    from transformers import BitsAndBytesConfig

    try:
        return BitsAndBytesConfig(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"quantization_config: {error}") from error


def _prepare_quantised(model: PreTrainedModel) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    from finegrid.training.quantisation import make_exact_on_cpu  # bitsandbytes takes a second to import

    model.loading_notes = make_exact_on_cpu(model)  # for the run's summary
    # Checkpointing of activations is the recipe's own setting, never switched on by the way.
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            # A view of the file's memory map would keep the whole file resident, all unquantised weights with it.
            parameter.data = parameter.data.clone()
    return model


def attach_adapter(settings: RunSettings, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """Return ``model`` with a new, trainable adapter of the recipe's ``peft_config``; unchanged for full fine-tuning.

    The adapter's start values are drawn from torch's global generator: seed it before.

    Raises:
        UserError: the config does not fit the model, e.g. its target modules are not in it.
    """
    if settings.peft_config is None:
        return model
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter_config(settings.peft_config))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"peft_config: does not fit the model: {error}") from error


def adapter_config(config: dict[str, Any]) -> PeftConfig:
    """Return peft's config object of a recipe's ``peft_config`` (``peft_type`` default LORA, task CAUSAL_LM).

    Raises:
        UserError: unknown ``peft_type``, or peft refuses a value.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = {"task_type": "CAUSAL_LM", **config}
    kind = str(values.pop("peft_type", "LORA")).upper()
    kinds = [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING]
    if kind not in kinds:
        raise UserError(f"peft_config.peft_type: '{kind}' is no method of peft{nearest(kind, kinds)}")
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"peft_config: {error}") from error


def load_trained(
    settings: RunSettings, folder: Path, adapter: Path | None, device: torch.device | str
) -> PreTrainedModel | PeftModel:
    """Return what a run trained, ready for evaluation (``eval()``, no gradients).

    Args:
        folder: the base model's folder.
        adapter: what training wrote: the adapter's folder, or the whole model's for full fine-tuning; None for the
            untrained base (quantised if the recipe quantises).
    """
    if adapter is None:
        model = load_base(settings, folder, device)
    elif settings.peft_config is None:
        model = load_base(settings, adapter, device)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(settings, folder, device), str(adapter), is_trainable=False)
    return model.eval().requires_grad_(False)
