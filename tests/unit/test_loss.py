"""The loss of a plain head, as one and in parts, against torch's own cross-entropy of all logits."""

from __future__ import annotations

import pytest
import torch
from finegrid.training import sizes
from finegrid.training.loss import Head, LabelStates, find_head, label_states
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config

WIDTH, WORDS, TARGETS = 16, 300, 37


def states_of(dtype: torch.dtype, trained: bool, bias: bool) -> LabelStates:
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=draw).requires_grad_(trained)
    states = torch.randn(TARGETS, WIDTH, generator=draw, dtype=dtype).requires_grad_()
    return LabelStates(states, head, torch.randint(WORDS, (TARGETS,), generator=draw), None)


def gradients(states: LabelStates, value: torch.Tensor) -> list[torch.Tensor]:
    trained = [each for each in (states.states, *states._head.parameters()) if each.requires_grad]
    return list(torch.autograd.grad(value / 7, trained))


@pytest.mark.parametrize("at_once", [2**27, 5 * WORDS, 1], ids=["at once", "five rows", "one row"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("trained", "bias"), [(False, False), (True, False), (True, True)])
def test_loss_and_gradients_are_those_of_all_logits(at_once, label_smoothing, trained, bias, monkeypatch):
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", at_once)
    states = states_of(torch.float64, trained, bias)
    logits = states._head(states.states)
    whole = functional.cross_entropy(logits, states.targets, reduction="sum", label_smoothing=label_smoothing)
    found = states.loss(label_smoothing)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(states, found), gradients(states, whole), rtol=1e-10, atol=1e-12)


def test_parts_in_bf16_are_those_of_autocast(monkeypatch):
    states = states_of(torch.float32, True, False)
    states.half = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        logits = states._head(states.states)
    whole = functional.cross_entropy(logits.float(), states.targets, reduction="sum")
    torch.testing.assert_close(states.loss(), whole, rtol=1e-6, atol=0)
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 5 * WORDS)
    found = states.loss()
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(states, found), gradients(states, whole), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        each = functional.cross_entropy(logits.float(), states.targets, reduction="none")
        torch.testing.assert_close(states.losses(), each, rtol=1e-6, atol=0)


def test_losses_of_each_target_sum_to_the_loss(monkeypatch):
    states = states_of(torch.float32, False, False)
    with torch.no_grad():
        expected = functional.cross_entropy(states._head(states.states), states.targets, reduction="none")
        monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 5 * WORDS)
        torch.testing.assert_close(states.losses(), expected)
        torch.testing.assert_close(states.loss(), expected.sum())


def test_parts_of_several_runs_are_their_own_losses():
    states = states_of(torch.float64, False, False)
    one, other = states.split([30, 7])
    assert (len(one.targets), len(other.targets)) == (30, 7)
    assert (one.loss() + other.loss()).item() == pytest.approx(states.loss().item(), rel=1e-12)


def test_no_targets_are_no_loss_and_no_gradient():
    states = states_of(torch.float32, True, False).split([0, TARGETS])[0]
    found = states.loss()
    found.backward()
    assert found.item() == 0
    assert not states._head.weight.grad.any()


def test_the_logits_of_a_part_are_all_that_is_made(monkeypatch):
    made = []
    linear = functional.linear_cross_entropy

    def noting(*arguments, options, **keywords):
        made.append(options.batch_chunk_size)
        return linear(*arguments, options=options, **keywords)

    monkeypatch.setattr(functional, "linear_cross_entropy", noting)
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", 5 * WORDS)
    states_of(torch.float32, True, False).loss()
    assert made == [5]


def test_the_head_computes_in_what_the_model_does():
    """Also where a wrapper, as accelerate's on a GPU, autocasts the forward pass alone."""
    from finegrid.training.collation import Collator
    from token_rows import random_rows
    from transformers import LlamaConfig

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    head, _ = find_head(model)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    batch = Collator()(random_rows(5))
    assert head.plain
    found = label_states(model, head, batch).loss()
    expected = label_states(model, Head(head.module), batch).loss()
    exact = label_states(model, head, batch)
    exact.half = None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # of other sums; each target's, to the bit:
    with torch.no_grad():
        one, other = (label_states(model, each, batch).losses() for each in (head, Head(head.module)))
    assert torch.equal(one, other)
    assert found.item() != exact.loss().item()


def test_after_the_head_autocast_is_as_before():
    """For the model's own head, which is given no row, it is switched off."""
    from finegrid.training.collation import Collator
    from token_rows import random_rows
    from transformers import LlamaConfig

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    head, _ = find_head(model)
    casts, own = [], type(model).forward

    def forward(self, *arguments, **keywords):
        outputs = own(self, *arguments, **keywords)
        casts.append(torch.is_autocast_enabled("cpu"))
        return outputs

    model.forward = forward.__get__(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = label_states(model, head, Collator()(random_rows(5)))
        assert torch.is_autocast_enabled("cpu")
    assert casts == [True]
    assert found.outputs["logits"].dtype == torch.float32  # of no row, and not cast for
    assert not torch.is_autocast_enabled("cpu")
    assert not head.module._forward_hooks


@pytest.mark.parametrize("at_once", [2**27, 5 * WORDS], ids=["at once", "five rows"])
@pytest.mark.parametrize(("trained", "bias"), [(False, False), (True, False), (True, True)])
def test_in_16_bits_loss_and_gradients_are_those_of_the_rounded_numbers(at_once, trained, bias, monkeypatch):
    monkeypatch.setattr(sizes, "LOGITS_AT_ONCE", at_once)
    states = states_of(torch.float32, trained, bias)
    states.half = torch.bfloat16
    rounded = [
        each.detach().bfloat16().double().requires_grad_() for each in (states.states, *states._head.parameters())
    ]
    logits = functional.linear(*rounded)
    logits = logits + (logits.detach().bfloat16().double() - logits.detach())  # the products are rounded, too
    exact = functional.cross_entropy(logits, states.targets, reduction="sum")
    found = states.loss()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)
    for one, other in zip(gradients(states, found), torch.autograd.grad(exact / 7, rounded), strict=False):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() < 2**-7 * other.norm()


def test_the_largest_of_unlikely_targets_has_a_finite_loss():
    states = states_of(torch.float32, False, False)
    states.half = torch.bfloat16
    with torch.no_grad():
        states._head.weight *= 100
    found = states.loss()
    with torch.autocast("cpu", torch.bfloat16):
        logits = states._head(states.states)
    torch.testing.assert_close(found, functional.cross_entropy(logits.float(), states.targets, reduction="sum"))
    assert found.isfinite()


def test_the_copy_of_a_frozen_head_follows_its_weight():
    states = states_of(torch.float32, False, False)
    states.half = torch.bfloat16
    first, kept = states.loss().item(), states._head.weight.in_half[1]
    assert states.loss().item() == first
    assert states._head.weight.in_half[1] is kept
    with torch.no_grad():
        states._head.weight.zero_()
    assert states.loss().item() == pytest.approx(TARGETS * torch.tensor(float(WORDS)).log().item(), rel=1e-6)
    trained = states_of(torch.float32, True, False)
    trained.half = torch.bfloat16
    trained.loss()
    assert not hasattr(trained._head.weight, "in_half")


def test_a_soft_cap_that_hardly_shows_is_not_overlooked():
    """Gemma's own cap of 30 leaves the logits of an untrained model as they are, but for some bits."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    for factor in (1.0, 1e-3, 0.0):
        torch.manual_seed(0)
        config = Gemma2Config(**sizes, **heads, final_logit_softcapping=30.0, tie_word_embeddings=False)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            model.lm_head.weight *= factor
        head, note = find_head(model)
        assert note is None
        assert head == Head(model.lm_head, plain=False), factor


def test_a_head_that_somebody_has_hung_something_on_is_run():
    from finegrid.training.collation import Collator
    from token_rows import random_rows
    from transformers import LlamaConfig

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    assert find_head(model)[0].plain
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)
    head, _ = find_head(model)
    assert not head.plain
    batch = Collator()(random_rows(5))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = functional.cross_entropy(
        logits.flatten(0, 1)[batch["positions"]], batch["targets"], reduction="sum"
    ).item()
    assert label_states(model, head, batch).loss().item() == pytest.approx(expected, rel=1e-5)
