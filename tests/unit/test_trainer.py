"""The loss over label tokens: against hand-written references, under any split of a batch, for any architecture."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from finegrid.training.collation import Collator
from finegrid.training.flat import make_flat
from finegrid.training.loss import find_head, label_logits, label_states
from finegrid.training.trainer import LabelTokenTrainer, walked_once
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from token_rows import plain_loss, random_rows
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Seq2SeqTrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gemma2 with a soft cap": lambda: Gemma2Config(**SMALL, final_logit_softcapping=0.05),
    "cohere with a scale": lambda: CohereConfig(**SMALL, logit_scale=7.0),
    "granite with a divisor": lambda: GraniteConfig(**SMALL, logits_scaling=0.05),
    "mixtral": lambda: MixtralConfig(**EXPERTS),
    "mixtral with balance": lambda: MixtralConfig(**EXPERTS, output_router_logits=True, router_aux_loss_coef=0.5),
    "gpt2": lambda: GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
}


def make(name: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()


def arguments(folder, **values) -> Seq2SeqTrainingArguments:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": False,
    }
    return Seq2SeqTrainingArguments(output_dir=str(folder), **defaults | values)


# ---------------------------------------------------------------- a plain loop


class RecordingCollator(Collator):
    """Notes the rows it was asked for, in order."""

    seen: list[str]

    def __call__(self, rows):
        self.__dict__.setdefault("seen", []).extend(row["id"] for row in rows)
        return super().__call__(rows)


def plain_loop(model, windows: list[list[dict]], max_grad_norm: float, learning_rate: float) -> list[tuple]:
    """Train by hand, one row at a time: (loss, gradient norm, learning rate) of each window."""
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimiser, 2, len(windows))
    curve = []
    for window in windows:
        label_tokens = sum(label != -100 for row in window for label in row["labels"])
        loss_of_window = 0.0
        for row in window:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / label_tokens
            loss.backward()
            loss_of_window += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        curve.append((loss_of_window, norm, optimiser.param_groups[0]["lr"]))
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return curve


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_any_split_of_a_batch_gives_the_loss_curve_of_a_plain_loop(tmp_path, method, batch, accumulation):
    rows = random_rows(22)  # windows of 8, 8 and a last one of 6
    model = make()
    if method == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    reference = copy.deepcopy(model)
    args = arguments(
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        max_grad_norm=0.15,
    )
    trainer = LabelTokenTrainer(model, args, Dataset.from_list(rows))
    trainer.data_collator = RecordingCollator(flat=trainer.data_collator.flat)
    trainer.train()
    found = [
        (row["loss"], row["grad_norm"], row["learning_rate"]) for row in trainer.state.log_history if "loss" in row
    ]

    by_id = {row["id"]: row for row in rows}
    order = [by_id[row] for row in trainer.data_collator.seen]
    windows = [order[start + cut : start + min(cut + 8, 22)] for start in (0, 22) for cut in (0, 8, 16)]
    expected = plain_loop(reference, windows, 0.15, 1e-2)
    assert len(order) == 44
    assert any(norm > 0.15 for _, norm, _ in expected), "the clipping is part of what is compared"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for (name, weight), (_, wanted) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-4, msg=name)


def test_a_log_row_holds_the_mean_over_the_label_tokens_since_the_last_one(tmp_path):
    def losses(logging_steps):
        args = arguments(
            tmp_path, per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, logging_steps=logging_steps
        )
        trainer = LabelTokenTrainer(make(), args, Dataset.from_list(random_rows(30)))
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    each, third = losses(1), losses(3)
    counts = [each[0]["label_tokens"]] + [b["label_tokens"] - a["label_tokens"] for a, b in itertools.pairwise(each)]
    for number, row in enumerate(third):
        part = slice(3 * number, 3 * number + 3)
        weighted = sum(n * entry["loss"] for n, entry in zip(counts[part], each[part], strict=True)) / sum(counts[part])
        assert row["loss"] == pytest.approx(weighted, rel=1e-12)
        assert row["label_tokens"] == sum(counts[: part.stop])


# ---------------------------------------------------------------- the head on label positions

CHANGED_LOGITS = ("gemma2 with a soft cap", "cohere with a scale", "granite with a divisor")


def mean_loss(model, head, batch) -> float:
    return label_states(model, head, batch).loss().item() / len(batch["targets"])


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "balance" not in name])
def test_the_head_on_label_positions_gives_the_architectures_own_loss(name):
    model, batch = make(name), Collator()(random_rows(5))
    head, note = find_head(model)
    assert head is not None, note
    assert note is None
    assert head.plain == (name not in CHANGED_LOGITS)
    logits, _ = label_logits(model, head, batch)
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert logits.shape == (len(batch["targets"]), 256)
    assert mean_loss(model, head, batch) == pytest.approx(own.item(), rel=1e-5)


def test_the_soft_cap_and_scales_of_the_test_models_matter():
    for name in CHANGED_LOGITS:
        model, batch = make(name), Collator()(random_rows(5))
        logits, _ = label_logits(model, find_head(model)[0], batch)
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        bare = model.lm_head(hidden).flatten(0, 1)[batch["positions"]]
        assert (logits - bare).abs().max() > 0.1 * bare.abs().max(), name


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["prompt tuning", "prefix tuning", "lora on the head", "a trained copy of the head"],
)
def test_the_loss_of_an_adapted_model_is_pefts_own(config):
    model, batch = get_peft_model(make(), config).eval(), Collator()(random_rows(5))
    head, note = find_head(model)
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert note is None
    assert mean_loss(model, head, batch) == pytest.approx(own.item(), rel=1e-5)


WITH_MLP = [name for name in ARCHITECTURES if "mixtral" not in name]


@pytest.mark.parametrize(
    ("name", "flat"),
    [(name, False) for name in WITH_MLP] + [(name, True) for name in WITH_MLP if "gemma2" not in name],
)
def test_the_last_mlp_on_label_positions_changes_neither_loss_nor_gradients(name, flat, monkeypatch):
    model = make(name).double()
    batch = Collator(flat=flat)(random_rows(5))
    head, _ = find_head(model)
    if flat:
        assert make_flat(model, lambda batch: label_logits(model, head, batch)[0]) == (True, None)
    found, seen = [], []
    kind = type(head.mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: seen.append(x.shape[:-1].numel()) or forward(self, x))
    for each in (head, replace(head, mlp=None)):
        model.zero_grad()
        loss = label_states(model, each, batch).loss()
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (loss, gradients), (whole, expected) = found
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    everywhere = batch["input_ids"].numel()
    assert seen == [everywhere, len(batch["targets"]), everywhere, everywhere]


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "mixtral" in name])
def test_experts_in_the_last_layer_see_all_tokens(name):
    assert find_head(make(name))[0].mlp is None  # the router's balance is that of all


def test_a_last_mlp_that_looks_at_neighbours_runs_everywhere():
    model = make()
    forward = model.model.layers[-1].mlp.forward
    model.model.layers[-1].mlp.forward = lambda x: forward(x + x.roll(1, dims=1))
    assert find_head(model)[0].mlp is None


@pytest.mark.parametrize(
    ("values", "padding_free", "narrow"),
    [({}, True, True), ({}, False, False), ({"activation_checkpointing": True}, True, False)],
)
def test_the_last_mlp_is_run_on_label_positions_where_rows_lie_end_to_end(tmp_path, values, padding_free, narrow):
    rows = Dataset.from_list(random_rows(8))
    trainer = LabelTokenTrainer(make(), arguments(tmp_path, **values), rows, padding_free=padding_free)
    assert (trainer.head.mlp is not None) == narrow


def test_a_head_that_needs_all_positions_is_found_out_and_told():
    class Head(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden - hidden.mean(dim=-2, keepdim=True))

    model = make()
    head = Head(32, 256, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    found, note = find_head(model)
    assert found is None
    assert "other logits" in note
    batch = Collator()(random_rows(5))
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert mean_loss(model, None, batch) == pytest.approx(own.item(), rel=1e-5)


def test_finding_the_head_draws_no_random_number_and_leaves_the_model_as_it_was():
    model = make().train()
    before = torch.get_rng_state()
    find_head(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_label_smoothing_is_that_of_transformers(tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    model, batch = make(), Collator()(random_rows(5))
    args = arguments(tmp_path, label_smoothing_factor=0.2)
    trainer = LabelTokenTrainer(model, args, Dataset.from_list(random_rows(5)))
    count = torch.tensor(len(batch["targets"]))
    found = trainer.compute_loss(model, batch, num_items_in_batch=count)
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    expected = LabelSmoother(epsilon=0.2)(outputs, batch["labels"], shift_labels=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert any("smoothed" in note for note in trainer.notes)


def test_the_balance_loss_of_a_mixture_of_experts_is_kept(tmp_path):
    model, batch = make("mixtral with balance"), Collator()(random_rows(5))
    trainer = LabelTokenTrainer(model, arguments(tmp_path), Dataset.from_list(random_rows(5)))
    found = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(len(batch["targets"])))
    own = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    assert own.aux_loss > 0.1
    assert found.item() == pytest.approx(own.loss.item(), rel=1e-5)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_validation_loss_is_over_label_tokens_whatever_the_batch(tmp_path, size):
    model, rows = make(), random_rows(10, seed=3)
    args = arguments(tmp_path, per_device_eval_batch_size=size)
    trainer = LabelTokenTrainer(model, args, Dataset.from_list(rows), Dataset.from_list(rows))
    total, count = plain_loss(model, rows)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    mean_of_rows = sum(loss / n for loss, n in (plain_loss(model, [row]) for row in rows)) / len(rows)
    assert abs(mean_of_rows - total / count) > 1e-4, "the rows tell a mean of means apart"


def test_an_evaluation_changes_neither_the_random_state_nor_the_training(tmp_path):
    def weights(eval_steps):
        set_seed(1)
        model = make()
        args = arguments(
            tmp_path, max_steps=4, learning_rate=1e-2, eval_strategy="steps", eval_steps=eval_steps, seed=1
        )
        model.config.attention_dropout = 0.5
        rows = Dataset.from_list(random_rows(12))
        LabelTokenTrainer(model, args, rows, rows).train()
        return torch.cat([weight.flatten() for weight in model.parameters()])

    assert torch.equal(weights(1), weights(4))


def test_a_step_goes_over_the_model_only_where_its_mode_changes(tmp_path, monkeypatch):
    walks = []
    train = torch.nn.Module.train

    def counted(module, mode=True):
        if isinstance(module, LlamaForCausalLM):
            walks.append(mode)
        return train(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", counted)
    rows, model = Dataset.from_list(random_rows(8)), make()
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=4)
    trainer = LabelTokenTrainer(model, args, rows, rows)
    walks.clear()
    trainer.train()
    assert walks == [True, False, True, False]
    assert not {"train", "zero_grad"} & model.__dict__.keys()


def test_a_model_walked_over_once_has_its_modes_and_gradients_as_ever():
    model = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    def modes() -> set[bool]:
        return {module.training for module in model.modules()}

    assert modes() == {True, False}  # transformers loads for inference, peft wraps for training
    with walked_once(model) as trained:
        assert [id(each) for each in trained] == [id(each) for each in model.parameters() if each.requires_grad]
        for _ in range(2):
            assert model.train() is model
            assert modes() == {True}
            model.eval()
            assert modes() == {False}
        model.train()
        model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
        assert all(each.grad is not None for each in trained)
        model.zero_grad(set_to_none=False)
        assert not any(each.grad.any() for each in trained)
        model.zero_grad()
        assert all(each.grad is None for each in trained)
    assert not {"train", "zero_grad"} & model.__dict__.keys()


def test_a_perplexity_of_the_untrained_model_is_near_the_vocabulary(tmp_path):
    rows = Dataset.from_list(random_rows(10))
    trainer = LabelTokenTrainer(make(), arguments(tmp_path), rows, rows)
    assert math.exp(trainer.evaluate()["eval_loss"]) == pytest.approx(256, rel=0.1)
