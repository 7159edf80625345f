"""4-bit layers on the CPU against ordinary linears over weights decoded here, in plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from finegrid.training.quantisation import ExactLinear4bit, make_exact_on_cpu
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

# QLoRA (Dettmers et al. 2023), appendix E: the 16 values of NF4.
NEGATIVE = "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
NEGATIVE += "-0.18477343022823334 -0.09105003625154495"
POSITIVE = "0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
POSITIVE += "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
NF4 = torch.tensor([float(value) for value in f"{NEGATIVE} 0.0 {POSITIVE}".split()])
BOTH = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def decode(weight: bnb.nn.Params4bit) -> torch.Tensor:
    """NF4 by its definition: two codes a byte, the high half first; one scale per block of the flattened matrix."""
    state = weight.quant_state
    codes = torch.stack([weight.data.reshape(-1) >> 4, weight.data.reshape(-1) & 15], -1).reshape(-1)
    count = state.shape.numel()
    scales = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = state.state2.code[scales.long()] * outer + state.offset
    return (NF4[codes[:count].long()] * scales.repeat_interleave(state.blocksize)[:count]).view(state.shape)


def load_4bit(folder: Path, double_quant: bool = False, dtype=torch.float32, compute_dtype=torch.float32, **options):
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantisation, **options)


def reference(folder: Path, quantised: torch.nn.Module, **options) -> torch.nn.Module:
    """The same model in fp32 with nn.Linear layers that hold the decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    stored = dict(quantised.named_parameters())
    for name, parameter in model.named_parameters():
        value = stored[name]
        parameter.data.copy_(decode(value) if isinstance(value, bnb.nn.Params4bit) else value.data)
    return model


def with_lora(model: torch.nn.Module) -> PeftModel:
    """LoRA on all linears, both factors away from zero so that all gradients are."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.train()


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 40_000, (2, 24), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return (
        output.loss.detach(),
        output.logits.detach(),
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


def assert_same_pass(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Loss, logits and each adapter gradient agree to fp32 rounding (relative to the gradient's largest element)."""
    loss, logits, gradients = loss_and_gradients(model)
    expected_loss, expected_logits, expected_gradients = loss_and_gradients(expected)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5 * float(expected_logits.abs().max()))
    assert gradients.keys() == expected_gradients.keys()
    assert any("lora_A" in name for name in gradients)
    for name, gradient in gradients.items():
        wanted = expected_gradients[name]
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=name)


def eval_logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 40_000, (1, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@BOTH
def test_adapter_gradients_equal_the_dequantised_reference_also_after_an_evaluation(tiny_model_dir, double_quant):
    quantised = load_4bit(tiny_model_dir, double_quant)
    expected = with_lora(reference(tiny_model_dir, quantised))
    notes = make_exact_on_cpu(quantised)
    model = with_lora(quantised)
    assert_same_pass(model, expected)
    assert torch.equal(eval_logits(model), eval_logits(expected))
    assert_same_pass(model.train(), expected.train())
    assert len(notes) == 1
    assert "14 layers" in notes[0]


def test_eval_mode_computes_what_train_mode_computes(tiny_model_dir):
    model = load_4bit(tiny_model_dir)
    make_exact_on_cpu(model)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        trained, evaluated = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    assert torch.equal(trained, evaluated)


def test_layers_already_wrapped_by_peft_are_made_exact(tiny_model_dir):
    quantised = load_4bit(tiny_model_dir)
    expected = with_lora(reference(tiny_model_dir, quantised))
    model = with_lora(quantised)
    assert make_exact_on_cpu(model)
    eval_logits(model)
    assert_same_pass(model.train(), expected)


def test_a_checkpoint_loaded_in_bf16_has_the_same_weights_in_forward_and_backward(tiny_model_dir):
    quantised = load_4bit(tiny_model_dir, dtype=torch.bfloat16)
    expected = with_lora(reference(tiny_model_dir, quantised))
    make_exact_on_cpu(quantised)
    for parameter in quantised.parameters():  # what peft.prepare_model_for_kbit_training does
        if parameter.dtype == torch.bfloat16 and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.float()
    assert_same_pass(with_lora(quantised), expected)


@BOTH
def test_gradient_checkpointing_changes_nothing(tiny_model_dir, double_quant):
    quantised = load_4bit(tiny_model_dir, double_quant)
    expected = with_lora(reference(tiny_model_dir, quantised))
    make_exact_on_cpu(quantised)
    model = with_lora(quantised)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_pass(model, expected)


def test_autocast_to_bf16_equals_autocast_of_the_dequantised_reference(tiny_model_dir):
    quantised = load_4bit(tiny_model_dir)
    expected = with_lora(reference(tiny_model_dir, quantised))
    make_exact_on_cpu(quantised)
    model = with_lora(quantised)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = loss_and_gradients(model), loss_and_gradients(expected)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-2, atol=1e-2 * float(wanted[1].abs().max()))
    for name, gradient in wanted[2].items():
        assert float((got[2][name] - gradient).norm() / gradient.norm()) < 1e-2, name


def test_a_bf16_compute_dtype_decodes_to_rounded_weights_and_answers_in_the_input_dtype():
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    make_exact_on_cpu(layer)
    x = torch.randn(5, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    rounded = decode(layer.weight).bfloat16()
    assert torch.equal(layer.dequantised_weight(torch.bfloat16), rounded)
    torch.testing.assert_close(y, x.bfloat16().float() @ rounded.float().T, rtol=1e-2, atol=1e-2)


@BOTH
@pytest.mark.parametrize("shape", [(64, 96), (33, 80), (96, 33), (100, 64), (192, 576)], ids=str)
def test_widths_off_the_block_grid_are_decoded_with_their_own_scales(shape, double_quant):
    outputs, inputs = shape
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32, compress_statistics=double_quant)
    layer.weight.quant_type = "nf4"
    layer = layer.to("cpu").eval()
    make_exact_on_cpu(layer)
    weight = decode(layer.weight)
    torch.testing.assert_close(layer.dequantised_weight(torch.float32), weight, rtol=1e-6, atol=1e-7)
    x = torch.randn(2, 3, inputs, requires_grad=True)
    layer.bias.requires_grad_(True)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight.T + layer.bias, rtol=1e-5, atol=1e-6)
    (4 * y).sum().backward()
    torch.testing.assert_close(x.grad, 4 * weight.sum(0).expand(2, 3, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, torch.full((outputs,), 24.0))


def test_fp4_weights_are_exact_too():
    layer = bnb.nn.LinearFP4(64, 32, bias=False, compute_dtype=torch.float32).to("cpu")
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    make_exact_on_cpu(layer)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@BOTH
def test_weights_stay_in_4_bit_and_nothing_large_is_kept_for_backward(double_quant):
    layer = bnb.nn.Linear4bit(576, 1536, bias=False, compress_statistics=double_quant, quant_type="nf4").to("cpu")
    make_exact_on_cpu(layer)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 576, requires_grad=True)).sum()
    held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert layer.weight.data.nbytes == 576 * 1536 // 2
    assert sum(tensor.nbytes for tensor in [*saved, *held]) <= 4 * 576 * 1536 // 64


@BOTH
def test_state_dict_and_saved_model_come_back_with_the_same_weights(tiny_model_dir, tmp_path, double_quant):
    model = load_4bit(tiny_model_dir, double_quant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_exact_on_cpu(model)
    logits = eval_logits(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    make_exact_on_cpu(again)
    torch.testing.assert_close(eval_logits(again), logits, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_gives_the_same_logits_on_a_freshly_quantised_base(tiny_model_dir, tmp_path):
    quantised = load_4bit(tiny_model_dir, double_quant=True)
    make_exact_on_cpu(quantised)
    model = with_lora(quantised)
    logits = eval_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = load_4bit(tiny_model_dir, double_quant=True)
    make_exact_on_cpu(base)
    assert torch.equal(eval_logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits)


def test_a_copy_of_an_exact_model_is_exact(tiny_model_dir):
    model = load_4bit(tiny_model_dir, double_quant=True)
    make_exact_on_cpu(model)
    logits = eval_logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(eval_logits(copied), logits)
    assert any(isinstance(module, ExactLinear4bit) for module in copied.modules())


def test_a_model_without_4bit_layers_is_left_alone(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    classes = [type(module) for module in model.modules()]
    assert make_exact_on_cpu(model) == []
    assert [type(module) for module in model.modules()] == classes


def test_layers_on_another_device_are_left_alone():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", device="meta")
    assert make_exact_on_cpu(torch.nn.Sequential(layer)) == []
    assert type(layer) is bnb.nn.Linear4bit


def test_a_second_call_changes_nothing(tiny_model_dir):
    model = load_4bit(tiny_model_dir)
    assert make_exact_on_cpu(model)
    assert make_exact_on_cpu(model) == []


def test_a_model_that_was_already_repacked_is_refused(tiny_model_dir):
    model = load_4bit(tiny_model_dir)
    eval_logits(model)
    if not any(
        getattr(p.quant_state, "packing_format_for_cpu", False) for p in model.parameters() if hasattr(p, "quant_state")
    ):
        pytest.skip("this CPU has no AVX512-BF16, bitsandbytes repacks nothing here")
    with pytest.raises(RuntimeError, match="right after loading"):
        make_exact_on_cpu(model)


@BOTH
def test_a_model_with_widths_off_the_block_grid_trains_exactly(tmp_path, double_quant):
    """Hidden size 48, intermediate size 80: bitsandbytes fails in eval mode and decodes wrong weights in train mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40_000,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    quantised = load_4bit(tmp_path, double_quant)
    expected = with_lora(reference(tmp_path, quantised))
    make_exact_on_cpu(quantised)
    assert_same_pass(with_lora(quantised), expected)


@pytest.mark.slow
@BOTH
def test_two_layers_of_the_real_model_have_the_reference_gradients(smollm2_dir, double_quant):
    quantised = load_4bit(smollm2_dir, double_quant, num_hidden_layers=2)
    expected = with_lora(reference(smollm2_dir, quantised, num_hidden_layers=2))
    make_exact_on_cpu(quantised)
    model = with_lora(quantised)
    eval_logits(model)
    assert_same_pass(model.train(), expected.train())
