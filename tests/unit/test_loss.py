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
    assert found.item() == expected.item()
    assert found.item() != exact.loss().item()


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
