"""LoRA layers with forward and backward written out, against peft's own."""

import contextlib
import copy
import json

import pytest
import torch
from finegrid.training.low_rank import LowRankLinear, write_out, written_out
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn


class Two(nn.Module):
    """Two layers with an activation between them; the second one has a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=False), nn.Linear(20, 7)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype=torch.float64, **config):
    torch.manual_seed(0)
    model = get_peft_model(Two().to(dtype), LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model.to(dtype)


def written(model):
    changed = copy.deepcopy(model)
    write_out(changed)
    return changed


def numbers(model, x):
    """Return the output and the gradients of x and of every parameter that has one."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # of dropout
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"output": output.detach(), "x": x.grad} | gradients


def calls(monkeypatch):
    """Note the layers that did it as peft does."""
    own, found = PeftLinear.forward, []
    monkeypatch.setattr(PeftLinear, "forward", lambda self, *a, **k: found.append(self) or own(self, *a, **k))
    return found


@pytest.mark.parametrize("shape", [(9, 12), (2, 5, 12), (1, 12)])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=["plain", "rslora", "drops"])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_pefts(shape, config, training, monkeypatch):
    model = adapted(**config).train(training)
    ours = written(model)
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected, as_peft = numbers(model, x), calls(monkeypatch)
    found = numbers(ours, x)
    assert not as_peft
    assert found.keys() == expected.keys()
    assert len(expected) == 6  # two matrices a layer
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)
        assert found[name].stride() == value.stride(), name


def test_an_input_without_gradient_gets_none_and_the_adapter_its_own():
    model = adapted()
    ours = written(model)
    x = torch.randn(4, 12, dtype=torch.float64)
    model(x).sum().backward()
    ours(x).sum().backward()
    for one, other in zip(model.parameters(), ours.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12)


def test_gradients_by_differences():
    model = written(adapted()).train()
    layer = model.base_model.model.second
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    down, up = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, down, up))


def test_four_bits_are_those_of_the_exact_layer(tmp_path):
    from finegrid.training.quantisation import LowRankLinear4bit, make_exact_on_cpu
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32)
    make_exact_on_cpu(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(20)[None]

    def step():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}

    loss, gradients = step()
    write_out(model)
    assert sum(isinstance(module, LowRankLinear4bit) for module in model.modules()) == 14
    again, found = step()
    assert again == pytest.approx(loss, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def hooked(model):
    seen = []
    model.base_model.model.first.base_layer.register_forward_hook(lambda *_: seen.append(1))
    return model


def merged(model):
    model.merge_adapter()
    return model


def two_adapters(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return model.to(torch.float64)


@pytest.mark.parametrize(
    ("config", "change", "count"),
    [
        ({"use_dora": True}, lambda model: model, 2),
        ({"lora_bias": True}, lambda model: model, 2),
        ({"bias": "lora_only"}, lambda model: model, 1),  # the second layer's bias is trained
        ({}, hooked, 1),
        ({}, merged, 2),
        ({}, two_adapters, 2),
    ],
    ids=["dora", "bias of the update", "bias of the base", "hook", "merged", "two adapters"],
)
def test_what_is_more_than_this_peft_does(config, change, count, monkeypatch):
    model = change(adapted(**config))
    ours = written(model)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected, as_peft = numbers(model, x), calls(monkeypatch)
    found = numbers(ours, x)
    assert len(as_peft) == count
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def far(found, exact):
    """Return by what share of its size each number is away from the exact one."""
    return {name: ((found[name].double() - value).norm() / value.norm()).item() for name, value in exact.items()}


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.4}], ids=["plain", "drops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["from float32", "from bfloat16"])
def test_autocast_is_as_near_to_exact_numbers_as_pefts(config, dtype, monkeypatch):
    model = adapted(torch.float32, **config).train()
    ours = written(model)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(64, 12, generator=draw).to(dtype)
    exact = numbers(copy.deepcopy(model), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        pefts, as_peft = numbers(model, x), calls(monkeypatch)
        found = numbers(ours, x)
    assert not as_peft
    assert {name: value.dtype for name, value in found.items()} == {name: each.dtype for name, each in pefts.items()}
    assert found["output"].dtype == torch.bfloat16
    for name, distance in far(pefts, exact).items():
        assert far(found, exact)[name] < max(1.5 * distance, 2**-8), name


def test_autocast_with_checkpoints_gives_the_same_numbers():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    ours = written(adapted(torch.float32))
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = numbers(copy.deepcopy(ours), x)
        found = numbers(Checkpointed(ours), x)
    assert [torch.equal(one, other) for one, other in zip(found.values(), expected.values(), strict=True)] == [True] * 6


def test_of_64_bits_autocast_casts_nothing(monkeypatch):
    model = adapted()
    ours, x, as_peft = written(model), torch.randn(5, 12, dtype=torch.float64), calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), model(x))
    assert len(as_peft) == 4


@pytest.mark.parametrize("context", ["disabled", "another dtype"])
def test_where_the_call_asks_for_more_peft_does_it(context, monkeypatch):
    model = adapted(torch.float32)
    ours = written(model)
    x = torch.randn(5, 12, dtype=torch.float64 if context == "another dtype" else torch.float32)
    as_peft = calls(monkeypatch)
    with contextlib.ExitStack() as stack:
        if context == "disabled":
            stack.enter_context(model.disable_adapter())
            stack.enter_context(ours.disable_adapter())
        if context == "another dtype":
            with pytest.raises(RuntimeError, match="dtype"):  # the base's, as peft says it
                ours(x)
        else:
            assert torch.equal(model(x), ours(x))
    assert as_peft


def test_while_a_block_runs(monkeypatch):
    model, as_peft = adapted(), calls(monkeypatch)
    x = torch.randn(3, 12, dtype=torch.float64)
    with written_out(model):
        found = model(x)
        assert not as_peft
    assert torch.allclose(model(x), found, rtol=1e-12)
    assert len(as_peft) == 2
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_files_configs_and_copies_stay_pefts(tmp_path):
    model = adapted(torch.float32)
    ours = written(model)
    assert isinstance(copy.deepcopy(ours).base_model.model.first, LowRankLinear)
    for name, each in {"peft": model, "ours": ours}.items():
        each.save_pretrained(tmp_path / name)
    weights, configs = (
        [(tmp_path / side / name).read_bytes() for side in ("peft", "ours")]
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert weights[0] == weights[1]
    one, other = (json.loads(config) for config in configs)
    one["target_modules"], other["target_modules"] = sorted(one["target_modules"]), sorted(other["target_modules"])
    assert one == other
