"""A base that stays in memory: its weights and scales are shared, with the numbers of a base for each run alone."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from finegrid.errors import UserError
from finegrid.settings import RunSettings
from finegrid.training import resident
from finegrid.training.adapters import why_not_plain
from finegrid.training.model import attach_adapter, load_base
from finegrid.training.resident import ResidentBase

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
IDS = torch.arange(7, 31).reshape(2, 12)


def recipe(quantised: dict | None) -> RunSettings:
    return RunSettings(
        model={"model_name_or_path": "data/models/tiny"},
        peft_config={"target_modules": "all-linear", "r": 4, "init_lora_weights": False},
        quantization_config=quantised,
        training_args={"use_cpu": True},
    )


def numbers(settings: RunSettings, base: torch.nn.Module, seed: int) -> list[torch.Tensor]:
    """Return the logits and the adapter's gradients of a run with start values of its own."""
    torch.manual_seed(seed)
    model = attach_adapter(settings, base).train()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return [output.logits.detach(), *(each.grad for each in model.parameters() if each.requires_grad)]


@pytest.mark.parametrize("quantised", [NF4, INT8], ids=["nf4", "int8"])
def test_run_after_run_has_the_numbers_of_a_base_of_its_own(tiny_model_dir, quantised):
    settings, shared = recipe(quantised), ResidentBase()
    for seed in (1, 2, 1):
        found = numbers(settings, shared.base(settings, tiny_model_dir, "cpu"), seed)
        expected = numbers(settings, load_base(settings, tiny_model_dir, "cpu"), seed)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        assert found[0].isfinite().all()
        assert any(each.any() for each in found[1:])


def test_bitsandbytes_own_4_bit_layers_share_weights_and_scales(tiny_model_dir, monkeypatch):
    # Those that a GPU has: on a CPU other ones take their place.
    monkeypatch.setattr("finegrid.training.quantisation.make_exact_on_cpu", lambda model: [])
    settings, shared = recipe(NF4), ResidentBase()
    first, second = (shared.base(settings, tiny_model_dir, "cpu") for _ in range(2))
    expected = [numbers(settings, load_base(settings, tiny_model_dir, "cpu"), seed) for seed in (1, 2)]
    layers = [
        {name: module for name, module in base.named_modules() if type(module) is bnb.nn.Linear4bit}
        for base in (first, second)
    ]
    assert len(layers[0]) == 7 * first.config.num_hidden_layers
    for name, layer in layers[0].items():
        assert layer is not layers[1][name]
        assert layer.weight is layers[1][name].weight
        assert layer.weight.quant_state is layers[1][name].weight.quant_state is layer.quant_state
    for base, seed, own in zip((first, second), (1, 2), expected, strict=True):
        for one, other in zip(numbers(settings, base, seed), own, strict=True):
            assert torch.equal(one, other)


def test_8_bit_layers_share_weights_and_scales_before_and_after_a_first_pass(tiny_model_dir):
    settings, shared = recipe(INT8), ResidentBase()
    bases = [shared.base(settings, tiny_model_dir, "cpu")]
    numbers(settings, bases[0], seed=1)
    bases.append(shared.base(settings, tiny_model_dir, "cpu"))
    first, second = ([each for each in base.modules() if type(each) is bnb.nn.Linear8bitLt] for base in bases)
    assert len(first) == 7 * bases[0].config.num_hidden_layers
    for layer, other in zip(first, second, strict=True):
        assert layer.state is not other.state
        assert layer.state.CB is other.state.CB
        assert layer.state.SCB is other.state.SCB


@pytest.mark.parametrize("quantised", [None, NF4, INT8], ids=["fp32", "nf4", "int8"])
def test_rows_of_several_runs_are_not_computed_together_in_8_bits(tiny_model_dir, quantised):
    settings = recipe(quantised)
    reason = why_not_plain(attach_adapter(settings, load_base(settings, tiny_model_dir, "cpu")))
    assert (reason is None) is (quantised is not INT8)
    assert reason is None or "8-bit" in reason


@pytest.mark.parametrize("quantised", [None, NF4, INT8], ids=["fp32", "nf4", "int8"])
def test_one_base_is_loaded_for_all_runs(tiny_model_dir, monkeypatch, quantised):
    loaded = []
    monkeypatch.setattr(resident, "load_base", lambda *given: loaded.append(load_base(*given)) or loaded[-1])
    shared = ResidentBase()
    for _ in range(3):
        shared.base(recipe(quantised), tiny_model_dir, "cpu")
    assert len(loaded) == 1


@pytest.mark.parametrize("given", [None, NF4], ids=["none", "nf4"])
def test_a_base_that_was_saved_quantised_is_refused_whatever_the_recipe_says(tiny_model_dir, tmp_path, given):
    load_base(recipe(NF4), tiny_model_dir, "cpu").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: the model's weights are stored quantised .*bitsandbytes"):
        load_base(recipe(given), tmp_path, "cpu")
