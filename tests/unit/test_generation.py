"""Generated answers: greedy by default, the same in every batch, started from the prompt, ended by the turn's end."""

from __future__ import annotations

import random

import pytest
import torch
from finegrid.errors import UserError
from finegrid.evaluation.generation import generate_answers, generation_config
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PAD = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def model(tiny_model_dir):
    """The tiny model with weights so large that what it writes depends on all before, and on where it stands."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, std=0.25)
    return model


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 49_000) for _ in range(draw.randint(1, 40))] for _ in range(count)]


@torch.no_grad()
def by_hand(model, tokenizer, prompt: list[int], new_tokens: int, ends: list[int]) -> str:
    """Greedy search of one prompt with nothing but the model's forward pass."""
    ids = list(prompt)
    for _ in range(new_tokens):
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best in ends:
            break
        ids.append(best)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_answers_are_greedy_and_in_order(model, tokenizer):
    prompts = make_prompts(9)
    answers, new_tokens = generate_answers(model, tokenizer, prompts, generation_config({}, 12, [2], PAD), 4)
    assert answers == [by_hand(model, tokenizer, prompt, 12, [2]) for prompt in prompts]
    assert len(set(answers)) == 9  # the rows differ, so that the order is tested
    assert new_tokens == 9 * 12


@pytest.mark.parametrize("batch_size", [1, 2, 7, 48])
def test_answers_are_the_same_for_any_batch_size(model, tokenizer, batch_size):
    prompts, config = make_prompts(15, seed=1), generation_config({}, 16, [2], PAD)
    expected = generate_answers(model, tokenizer, prompts, config, 5)
    assert generate_answers(model, tokenizer, prompts, config, batch_size) == expected


def test_answer_ends_before_its_end_token_and_costs_it(model, tokenizer):
    """The end is a token of our choice, no special one: it would stay in the text if it were not cut."""
    prompts = make_prompts(6, seed=2)
    with torch.no_grad():
        first = model.generate(torch.tensor([prompts[0]]), max_new_tokens=8, do_sample=False)
    end = int(first[0, len(prompts[0]) + 3])
    config = generation_config({}, 8, [end, 2], PAD)
    answers, new_tokens = generate_answers(model, tokenizer, prompts, config, 6)
    assert answers == [by_hand(model, tokenizer, prompt, 8, [end, 2]) for prompt in prompts]
    assert len(tokenizer(answers[0], add_special_tokens=False).input_ids) < 8
    assert new_tokens < 6 * 8


def test_end_at_once_is_an_empty_answer(model, tokenizer):
    prompt = make_prompts(1)[0]
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    answers, new_tokens = generate_answers(model, tokenizer, [prompt], generation_config({}, 8, [first], PAD), 1)
    assert (answers, new_tokens) == ([""], 1)


def test_settings_that_came_with_the_model_change_nothing(model, tokenizer):
    prompts, config = make_prompts(4), generation_config({}, 8, [2], PAD)
    expected = generate_answers(model, tokenizer, prompts, config, 4)
    shipped = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0, max_length=3, eos_token_id=7)
    model.generation_config = shipped
    assert generate_answers(model, tokenizer, prompts, config, 4) == expected
    assert model.generation_config is shipped


def test_recipe_overrides_the_defaults(model, tokenizer):
    config = generation_config({"max_new_tokens": 3, "repetition_penalty": 1.5, "eos_token_id": 11}, 64, [2], PAD)
    assert (config.max_new_tokens, config.repetition_penalty, config.eos_token_id) == (3, 1.5, 11)
    assert generate_answers(model, tokenizer, make_prompts(2), config, 2)[1] == 2 * 3
    assert generation_config({"max_length": 20}, 64, [2], PAD).max_new_tokens is None
    assert generation_config({}, 64, [5, 2, 5], None).to_diff_dict()["eos_token_id"] == [2, 5]


def test_beams_and_stop_strings_work_in_batches(model, tokenizer):
    prompts = make_prompts(3)
    beams = generation_config({"num_beams": 2}, 6, [2], PAD)
    assert (
        generate_answers(model, tokenizer, prompts, beams, 2)[0]
        == (generate_answers(model, tokenizer, prompts, beams, 1)[0])
    )
    answer = generate_answers(model, tokenizer, prompts[:1], generation_config({}, 6, [2], PAD), 1)[0][0]
    stops = generation_config({"stop_strings": [answer[2:4]]}, 6, [2], PAD)
    assert generate_answers(model, tokenizer, prompts[:1], stops, 1)[1] < 6


def plainly(model, prompt: list[int], config: GenerationConfig) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3, "min_new_tokens": 3}, {"no_repeat_ngram_size": 2}], ids=str
)
def test_rows_that_end_leave_the_batch_and_change_no_answer(model, tokenizer, options):
    prompts = make_prompts(16, seed=5)
    free = generate_answers(model, tokenizer, prompts, generation_config({}, 24, [2], PAD), 1)[0]
    firsts = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in free]
    ends = [2, *{ids[3 * number % 20] for number, ids in enumerate(firsts) if len(ids) > 20}]  # early, late and never
    config = generation_config(options, 24, ends, PAD)
    sizes, forward = [], model.forward

    def watched(input_ids, **arguments):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **arguments)

    model.forward = watched
    answers, new_tokens = generate_answers(model, tokenizer, prompts, config, 16)
    del model.forward
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 16
    assert (sizes[-1] < 16) == ("repetition_penalty" not in options)  # which counts the rows that it began with
    written = [plainly(model, prompt, config) for prompt in prompts]
    assert new_tokens == sum(map(len, written))
    kept = [row[:-1] if row[-1] in ends else row for row in written]
    assert answers == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]


def test_sampling_repeats_with_its_seed_and_leaves_the_generator_alone(model, tokenizer):
    prompts, config = make_prompts(4), generation_config({"do_sample": True}, 8, [2], PAD)
    state = torch.get_rng_state()
    first = generate_answers(model, tokenizer, prompts, config, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate_answers(model, tokenizer, prompts, config, 4, seed=1) == first
    assert generate_answers(model, tokenizer, prompts, config, 4, seed=2) != first


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ],
    ids=["lora", "prompt tuning", "prefix tuning"],
)
def test_adapters_answer_as_their_own_forward_pass_does(model, tokenizer, config):
    """Also in a batch of several lengths: padding would part the virtual tokens of prompt tuning from the prompt."""
    prompts, settings = make_prompts(6), generation_config({}, 8, [2], PAD)
    base, _ = generate_answers(model, tokenizer, prompts, settings, 3)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    for name, weight in adapted.named_parameters():
        if "prompt_encoder" in name:
            torch.nn.init.normal_(weight)
    answers, _ = generate_answers(adapted, tokenizer, prompts, settings, 3)
    assert answers == [by_hand(adapted, tokenizer, prompt, 8, [2]) for prompt in prompts]
    assert answers != base


def test_progress_counts_answers(model, tokenizer):
    seen = []
    generate_answers(model, tokenizer, make_prompts(5), generation_config({}, 2, [2], PAD), 2, progress=seen.append)
    assert seen == [2, 4, 5]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"num_return_sequences": 3}, "generation_config.num_return_sequences: 3"),
        ({"max_new_tokens": 0}, "generation_config: "),
        ({"early_stopping": "perhaps"}, "generation_config: "),
    ],
)
def test_settings_that_cannot_be_used_are_the_users_error(options, place):
    with pytest.raises(UserError, match=place):
        generation_config(options, 8, [2], PAD)


@pytest.mark.slow
def test_real_model_answers_the_same_in_every_batch(smollm2_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()
    questions = ["Does Medicare cover eye exams?", "Is term life insurance worth it at my age?", "What is an SR22?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in questions
    ]
    config = generation_config({}, 16, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    together, _ = generate_answers(model, tokenizer, prompts, config, 3)
    assert together == generate_answers(model, tokenizer, prompts, config, 1)[0]
    assert all(len(answer.split()) > 3 for answer in together)
