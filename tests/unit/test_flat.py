"""Rows end to end: the padded rows' own loss and gradients for any architecture, and a note where that can't be."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from finegrid.training.collation import Collator, first_rows
from finegrid.training.flat import NAME, _rows, draws, flat_attention, layout_of, make_flat
from finegrid.training.joint import merged
from finegrid.training.loss import find_head, label_logits, label_states
from finegrid.training.trainer import LabelTokenTrainer
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_trainer import SMALL, arguments, make
from token_rows import random_rows, with_system_message
from torch.nn import functional
from transformers import AutoModelForCausalLM, BloomConfig, MistralConfig, Qwen2Config, Qwen3Config

ROWS = [
    {"id": "a", "input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
    {"id": "b", "input_ids": [9, 3], "labels": [-100, 3]},
    {"id": "c", "input_ids": [4, 4, 4], "labels": [4, -100, 4]},
]
MODELS = ["llama", "cohere with a scale", "granite with a divisor", "mixtral", "gpt2", "mistral", "qwen2", "qwen3"]


def model_of(name: str) -> torch.nn.Module:
    others = {
        "mistral": lambda: MistralConfig(**SMALL, sliding_window=4),  # shorter than the rows
        "qwen2": lambda: Qwen2Config(**SMALL),
        "qwen3": lambda: Qwen3Config(**SMALL),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(others[name]()).eval() if name in others else make(name)


def flat_note(model: torch.nn.Module) -> str | None:
    return made_flat(model)[1]


def made_flat(model: torch.nn.Module) -> tuple[bool, str | None]:
    head, _ = find_head(model)
    with torch.no_grad():
        return make_flat(model, lambda batch: label_logits(model, head, batch)[0])


def loss_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return label_states(model, find_head(model)[0], batch).loss()


# ---------------------------------------------------------------- batches


def test_rows_lie_end_to_end_each_with_its_own_positions():
    batch = Collator(flat=True)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4, 4, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["cells"].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]  # of a grid of 3 rows by 4 tokens
    assert batch["grid"] == (3, 4)
    assert batch["starts"].tolist() == [0, 4, 6, 9]
    assert batch["targets"].tolist() == [7, 8, 3, 4]  # the label of c's first token has nothing before it
    assert batch["positions"].tolist() == [1, 2, 4, 7]
    assert batch["tokens"] == 9


def test_flat_and_padded_batches_hold_the_same_labels():
    rows = random_rows(13)
    flat, padded = Collator(flat=True)(rows), Collator()(rows)
    assert flat["targets"].tolist() == padded["targets"].tolist()
    assert flat["cells"][flat["positions"]].tolist() == padded["positions"].tolist()
    assert (flat["tokens"], flat["ids"]) == (padded["tokens"], padded["ids"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_without_loss_stay_in_the_batch_and_are_not_counted(count):
    for flat in (False, True):
        whole, part = Collator(flat=flat)(ROWS), Collator(flat=flat)(ROWS[:count]) if count else None
        batch = first_rows(whole, count)
        assert batch["input_ids"].shape == whole["input_ids"].shape
        assert batch["targets"].tolist() == (part["targets"].tolist() if part else [])
        assert batch["tokens"] == (part["tokens"] if part else 0)
        assert batch["ids"] == [row["id"] for row in ROWS[:count]]
        if not flat:
            assert (batch["labels"] != -100).sum() == sum(
                each != -100 for row in ROWS[:count] for each in row["labels"]
            )


def test_what_all_rows_begin_with_is_there_once():
    beginning = [3, 3, 4, 4, 5, 5, 6, 6, 7]
    rows = [
        {"id": "a", "input_ids": [*beginning, 8, 9, 1], "labels": [-100] * 10 + [9, 1]},
        {"id": "b", "input_ids": [*beginning, 9, 2], "labels": [-100] * 10 + [2]},
        {"id": "c", "input_ids": [*beginning, 9], "labels": [-100] * 9 + [9]},  # predicted from the beginning's end
    ]
    batch = Collator(flat=True, shares=True)(rows)
    assert batch["shared"] == ((0, 3, 8),)
    assert batch["input_ids"].tolist() == [[*beginning, 8, 9, 1, 7, 9, 2, 7, 9]]
    assert batch["position_ids"].tolist() == [[*range(12), 8, 9, 10, 8, 9]]
    assert batch["cells"].tolist() == [*range(12), 20, 21, 22, 32, 33]
    assert batch["grid"] == (3, 12)
    assert batch["starts"].tolist() == [0, 12, 15, 17]
    assert batch["targets"].tolist() == [9, 1, 2, 9]
    assert batch["positions"].tolist() == [9, 10, 13, 15]
    assert batch["tokens"] == 12 + 11 + 10
    assert _rows(batch["input_ids"][None, :, :, None], [12, 3, 2], batch["shared"])[1].flatten().tolist() == [
        *beginning,
        9,
        2,
    ]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (random_rows(3), "they begin differently"),
        (with_system_message(random_rows(3), 7), "seven tokens are not worth it"),
        (with_system_message(random_rows(1)), "there is one row"),
        ([row | {"labels": [-100, 101, *row["labels"][2:]]} for row in with_system_message(random_rows(3))], "taught"),
    ],
)
def test_rows_share_nothing_where_that_is_wrong_or_dear(rows, why):
    shared, alone = Collator(flat=True, shares=True)(rows), Collator(flat=True)(rows)
    assert shared["shared"] == (), why
    for key, value in alone.items():
        assert torch.equal(shared[key], value) if torch.is_tensor(value) else shared[key] == value


def test_a_row_ends_where_its_last_label_is_predicted():
    rows = [
        {"id": "a", "input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]},
        {"id": "b", "input_ids": [9, 3, 4], "labels": [-100, -100, -100]},
        {"id": "c", "input_ids": [1, 2], "labels": [-100, 2]},
    ]
    batch = Collator(flat=True, cuts=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 1]]
    assert batch["positions"].tolist() == [1, 2, 4]
    assert batch["targets"].tolist() == [7, 8, 2]
    assert batch["starts"].tolist() == [0, 3, 4, 5]
    assert batch["cells"].tolist() == [0, 1, 2, 3, 6]
    assert batch["grid"] == (3, 3)
    assert (batch["tokens"], batch["lengths"]) == (10, [5, 3, 2])


@pytest.mark.parametrize("shares", [False, True])
def test_a_batch_is_filled_up_behind_its_last_row(shares):
    rows = with_system_message(random_rows(5), 9)
    plain, filled = (Collator(1, flat=True, shares=shares, cuts=True, multiple=size)(rows) for size in (1, 32))
    size = plain["input_ids"].shape[1]
    assert size % 32
    assert filled["input_ids"].shape == filled["position_ids"].shape == (1, size + -size % 32)
    assert filled["input_ids"][0, size:].unique().tolist() == [1]
    for key in ("input_ids", "position_ids"):
        assert torch.equal(filled[key][:, :size], plain[key])
    assert filled["position_ids"].max() == max(len(row["input_ids"]) for row in rows) - 1  # where there are no others
    assert len(filled["cells"].unique()) == filled["starts"][-1] == size + -size % 32
    for key in ("positions", "targets"):
        assert torch.equal(filled[key], plain[key])
    for key in ("ids", "lengths", "tokens", "shared"):
        assert filled[key] == plain[key]
    assert torch.equal(filled["starts"][:-1], plain["starts"][:-1])


def test_a_first_row_without_labels_keeps_what_is_shared():
    first, *others = with_system_message(random_rows(3))
    rows = [first | {"labels": [-100] * len(first["labels"])}, *others]
    batch = Collator(flat=True, shares=True, cuts=True)(rows)
    assert batch["shared"] == ((0, 3, 12),)
    assert batch["starts"].tolist()[1] == 13
    assert batch["targets"].tolist() == [label for row in others for label in row["labels"] if label != -100]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_without_loss_count_no_shared_tokens(count):
    rows = with_system_message(random_rows(4))
    batch = first_rows(Collator(flat=True, shares=True, cuts=True)(rows), count)
    part = Collator(flat=True)(rows[:count]) if count else {"targets": torch.tensor([]), "tokens": 0}
    assert batch["targets"].tolist() == part["targets"].tolist()
    assert batch["tokens"] == part["tokens"]


# ---------------------------------------------------------------- losses and gradients


@pytest.fixture(params=["row by row", "in a grid"])
def attention(request, monkeypatch) -> None:
    """Both ways of computing it: that of the CPU, and that of a GPU without FlashAttention."""
    if request.param == "in a grid":
        monkeypatch.setattr("finegrid.training.flat.ROW_BY_ROW", "nowhere")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", ["mixed", "equal", "with a system message", "filled"])
def test_loss_and_gradients_are_those_of_padded_rows(name, lengths, attention):
    dtype = torch.float32 if name == "mixtral" else torch.float64  # torch's grouped products know no doubles
    padded, flat = model_of(name).to(dtype), model_of(name).to(dtype)
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    assert made_flat(flat) == (True, None)
    assert flat.config._attn_implementation == NAME
    rows = random_rows(6)
    if lengths == "with a system message":
        rows = with_system_message(rows)
    if lengths == "equal":
        rows = [row | {key: row[key][:6] for key in ("input_ids", "labels")} for row in random_rows(30)][:6]
        rows = [row | {"labels": [-100, *row["input_ids"][1:]]} for row in rows if len(row["input_ids"]) == 6]
    collate = Collator(flat=True, shares=True, cuts=True, multiple=64 if lengths == "filled" else 1)
    losses = [loss_of(padded, Collator()(rows)), loss_of(flat, collate(rows))]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)  # the losses are of float32 logits
    for loss in losses:
        loss.backward()
    for (key, one), other in zip(padded.named_parameters(), flat.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None:
            scale = one.grad.abs().max()
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=tolerance * scale.item() + 1e-12, msg=key)


def test_several_runs_rows_share_what_is_their_own(attention):
    model = model_of("qwen3")
    shares, _ = made_flat(model)
    collate = Collator(flat=True, shares=shares, cuts=True)
    rows = random_rows(9)
    parts = [collate(part) for part in (with_system_message(rows[:3], 9), rows[3:5], with_system_message(rows[5:], 14))]
    found = label_logits(model, None, merged(parts))[0]
    torch.testing.assert_close(found, torch.cat([label_logits(model, None, part)[0] for part in parts]))


@pytest.mark.parametrize("lengths", [[5, 3, 4], [4, 4, 4]])
def test_autocast_on_a_cpu_leaves_attention_in_float32(lengths):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 12, 8, dtype=torch.bfloat16).requires_grad_()
    rows = [{"id": n, "input_ids": [7] * size, "labels": [7] * size} for n, size in enumerate(lengths)]
    batch = layout_of(Collator(flat=True)(rows))
    module = make().model.layers[0].self_attn
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = flat_attention(module, query, key, value, None, **batch)
    parts = [states.float().split(lengths, dim=2) for states in (query, key, value)]
    expected = [functional.scaled_dot_product_attention(*row, is_causal=True) for row in zip(*parts, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected, dim=2).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_a_windows_rows_see_the_window_alone(attention):
    model = model_of("mistral")
    assert flat_note(model) is None
    row = random_rows(1)[0] | {"input_ids": list(range(10, 30)), "labels": [-100] * 10 + list(range(20, 30))}
    far = row | {"input_ids": [99, *row["input_ids"][1:]]}  # 2 layers of 4 see 7 tokens back
    beside = {"id": "x", "input_ids": [7, 8], "labels": [-100, 8]}
    one, other = (label_logits(model, None, Collator(flat=True)([each, beside]))[0] for each in (row, far))
    assert torch.equal(one, other)


def curve(folder, padding_free: bool, given=lambda rows: rows, **values) -> tuple[list[tuple], list[str]]:
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = arguments(folder, per_device_train_batch_size=4, max_steps=12, learning_rate=1e-2, **values)
    rows, validation = Dataset.from_list(given(random_rows(22))), Dataset.from_list(given(random_rows(7, seed=1)))
    trainer = LabelTokenTrainer(model, args, rows, validation, padding_free=padding_free)
    trainer.train()
    log = [
        (row.get("loss", row.get("eval_loss")), row["label_tokens"], row["tokens"])
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
    return log, trainer.notes


@pytest.mark.parametrize("given", [list, with_system_message])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_without_padding_has_the_padded_ones_losses(tmp_path, checkpointing, given):
    values = {"eval_strategy": "steps", "eval_steps": 4, "activation_checkpointing": checkpointing, "given": given}
    flat, notes = curve(tmp_path / "flat", True, **values)
    padded, _ = curve(tmp_path / "padded", False, **values)
    assert notes == []
    assert len(flat) == 15
    torch.testing.assert_close(torch.tensor(flat), torch.tensor(padded), rtol=1e-5, atol=0)


def test_16_bits_on_a_cpu_are_computed_in_few_sizes(tmp_path):
    """The curve is the padded Trainer's up to bf16's rounding, and what is computed has multiples of 32 rows."""
    sizes = set()

    def watch(module, inputs):
        if inputs[0].device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            sizes.add(inputs[0].flatten(0, -2).shape[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: watch(module, inputs) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        flat, notes = curve(tmp_path / "flat", True, bf16=True)
    finally:
        hook.remove()
    padded, _ = curve(tmp_path / "padded", False, bf16=True)
    assert notes == []
    assert sizes
    assert all(size % 32 == 0 for size in sizes)
    assert [row[1:] for row in flat] == [row[1:] for row in padded]  # label tokens and tokens
    torch.testing.assert_close([row[0] for row in flat], [row[0] for row in padded], rtol=2e-3, atol=0)
    exact, _ = curve(tmp_path / "exact", True)
    torch.testing.assert_close([row[0] for row in flat], [row[0] for row in exact], rtol=2e-3, atol=0)


DRAWING = {
    "nothing": ({}, {}, False),
    "LoRA's dropout": ({"lora_dropout": 0.1}, {}, True),
    "the base's own": ({}, {"attention_dropout": 0.1}, True),
    "noise on embeddings": ({}, {"neftune_noise_alpha": 5.0}, True),
}


@pytest.mark.parametrize("drawing", DRAWING)
def test_tokens_are_shared_in_training_unless_something_is_drawn_for_them(tmp_path, drawing):
    adapter, values, draws_something = DRAWING[drawing]
    base = make()
    if "attention_dropout" in values:
        base.config.attention_dropout = values.pop("attention_dropout")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **adapter))
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=1, **values)
    rows = Dataset.from_list(with_system_message(random_rows(4)))
    trainer = LabelTokenTrainer(model, args, rows, rows)
    sizes = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[1]))
    trainer.train()
    trainer.evaluate()
    whole = sum(map(len, rows["input_ids"])) - 4  # what predicts no label, the last token of each
    assert sizes == [whole if draws_something else whole - 3 * 12, whole - 3 * 12]


def test_dropout_is_seen_wherever_it_is_told():
    assert not draws(make())
    assert draws(make("gpt2").train()) == (make("gpt2").config.attn_pdrop > 0)
    model = make()
    model.config.attention_dropout = 0.1
    assert draws(model)
    mixture = make("mixtral")
    assert not draws(mixture)
    mixture.config.router_jitter_noise = 0.1
    assert draws(mixture)
    assert not draws(get_peft_model(make(), LoraConfig(r=4, task_type="CAUSAL_LM")))
    assert draws(get_peft_model(make(), LoHaConfig(r=4, target_modules=["q_proj"], rank_dropout=0.1)))


# ---------------------------------------------------------------- where it can't be


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2 with a soft cap", "softcap"), ("bloom", "rows can't lie end to end")],
)
def test_an_architecture_that_needs_padding_is_told_and_stays_as_it_was(name, reason):
    torch.manual_seed(0)
    bloom = BloomConfig(vocab_size=256, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(bloom).eval() if name == "bloom" else make(name)
    before, own = copy.deepcopy(model), model.config._attn_implementation
    note = flat_note(model)
    assert note is not None
    assert note.startswith("batches are padded: ")
    assert reason in note
    assert model.config._attn_implementation == own
    batch = Collator()(random_rows(5))
    assert torch.equal(loss_of(model, batch), loss_of(before, batch))


@pytest.mark.parametrize("trouble", ["an error", "other logits"])
def test_a_model_that_takes_rows_end_to_end_and_no_shared_tokens_is_flat_without_these(trouble, monkeypatch):
    def rows_of(states, lengths, shared):
        if shared and trouble == "an error":
            raise RuntimeError("no")
        return [row * 2 if shared else row for row in _rows(states, lengths, shared)]

    monkeypatch.setattr("finegrid.training.flat._rows", rows_of)
    assert made_flat(model_of("llama")) == (False, None)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_need_padding(kind):
    model = get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    note = flat_note(model)
    assert note is not None
    assert note.startswith("batches are padded: ")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_model_made_flat_still_takes_padded_batches_and_answers_as_before(name):
    model, plain = model_of(name), model_of(name)
    assert flat_note(model) is None
    ids, mask = torch.randint(10, 200, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, 5:], mask[1, :3] = 0, 0  # padded on the right and on the left
    found, expected = (each(input_ids=ids, attention_mask=mask).logits for each in (model, plain))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])
    options = {"attention_mask": mask[1:], "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids[1:], **options), plain.generate(ids[1:], **options))


def test_finding_out_draws_no_random_number_and_a_saved_model_names_its_own_attention(tmp_path):
    model = make().train()
    before = torch.get_rng_state()
    assert flat_note(model) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
