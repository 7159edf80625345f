"""The likelihood of references against transformers' own loss, row by row."""

from __future__ import annotations

import math
import random

import pytest
import torch
from finegrid.evaluation.likelihood import label_nll
from finegrid.training import validation
from finegrid.training.validation import label_tokens
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel


def token_rows(count: int, words: int, seed: int = 0) -> list[dict]:
    """Rows of 5 to 60 tokens; the first third or more is prompt, two rows have a second taught part."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        ids = [draw.randrange(words) for _ in range(draw.randint(5, 60))]
        prompt = draw.randint(len(ids) // 3, len(ids) - 1)
        labels = [-100] * prompt + ids[prompt:]
        if number < 2:
            labels[1:2] = ids[1:2]
        rows.append({"id": str(number), "input_ids": ids, "labels": labels})
    return rows


@torch.no_grad()
def own_loss(model, row: dict) -> float:
    """transformers' (or peft's) own mean loss of one row alone."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.item()


@pytest.fixture(scope="module")
def tiny(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def test_nll_is_transformers_own_loss_of_each_row(tiny):
    rows = token_rows(12, tiny.config.vocab_size)
    for row, nll in zip(rows, label_nll(tiny, rows, batch_size=5), strict=True):
        assert nll / label_tokens(row) == pytest.approx(own_loss(tiny, row), abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 5, 48])
def test_batches_give_what_rows_give_alone(tiny, batch_size):
    rows = token_rows(12, tiny.config.vocab_size)
    alone = [label_nll(tiny, [row], batch_size=1)[0] for row in rows]
    assert label_nll(tiny, rows, batch_size) == pytest.approx(alone, rel=1e-6)


def test_uniform_model_costs_ln_vocabulary_a_token(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    rows = token_rows(4, model.config.vocab_size)
    expected = [label_tokens(row) * math.log(model.config.vocab_size) for row in rows]
    assert label_nll(model, rows, 2) == pytest.approx(expected, rel=1e-6)


def test_rows_without_labels_cost_nothing_and_first_tokens_are_not_predicted(tiny):
    rows = token_rows(2, tiny.config.vocab_size)
    bare = {"id": "bare", "input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    first = {"id": "first", "input_ids": [5, 6, 7], "labels": [5, -100, 7]}
    last = {"id": "last", "input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    found = label_nll(tiny, [rows[0], bare, first, last, rows[1]], 5)
    assert (found[1], label_tokens(bare), label_tokens(first)) == (0, 0, 1)
    assert found[2] == pytest.approx(found[3], rel=1e-6)
    assert label_nll(tiny, [bare], 1) == [0]
    assert label_nll(tiny, [], 1) == []


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    ],
    ids=["lora", "prompt tuning", "prefix tuning"],
)
def test_adapters_are_scored_as_peft_scores_them(tiny_model_dir, config):
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).eval()
    rows = token_rows(6, model.config.vocab_size)
    for row, nll in zip(rows, label_nll(model, rows, 4), strict=True):
        assert nll / label_tokens(row) == pytest.approx(own_loss(model, row), abs=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        # Gemma 2 caps its logits after the head; this cap is low enough to matter.
        lambda: Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                final_logit_softcapping=0.05,
                initializer_range=1.0,
            )
        ),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, initializer_range=1.0)),
    ],
    ids=["gemma2", "gpt2"],
)
def test_other_architectures_keep_their_own_loss(model):
    torch.manual_seed(0)
    model = model().eval()
    rows = token_rows(6, 99)
    for row, nll in zip(rows, label_nll(model, rows, 4), strict=True):
        assert nll / label_tokens(row) == pytest.approx(own_loss(model, row), abs=1e-5)


def test_batches_are_bounded_by_rows_and_label_tokens_and_start_with_the_longest(monkeypatch):
    monkeypatch.setattr(validation, "LABEL_TOKENS_PER_BATCH", 40)
    rows = token_rows(20, 99)
    batches = list(validation.batches(rows, 4))
    assert sorted(index for batch in batches for index in batch) == list(range(20))
    lengths = [len(rows[index]["input_ids"]) for batch in batches for index in batch]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or sum(label_tokens(rows[index]) for index in batch) <= 40


def test_progress_counts_rows(tiny):
    seen = []
    label_nll(tiny, token_rows(7, 99), 3, seen.append)
    assert seen == [3, 6, 7]


@pytest.mark.slow
def test_real_model_has_transformers_own_loss(smollm2_dir):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()
    rows = token_rows(4, model.config.vocab_size)
    for row, nll in zip(rows, label_nll(model, rows, 4), strict=True):
        assert nll / label_tokens(row) == pytest.approx(own_loss(model, row), abs=1e-5)
