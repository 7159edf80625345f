"""Answers generated from the prompts alone, in length-sorted batches.

Used by :mod:`finegrid.evaluation.evaluate`; reads token rows, writes no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from finegrid.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from finegrid.evaluation.decoding import Keep
    from finegrid.training.adapters import ManyAdapters


def generation_config(
    options: dict[str, Any], max_output_length: int, end_ids: Iterable[int], pad_id: int | None
) -> GenerationConfig:
    """Return the generation settings of a run: greedy, at most `max_output_length` new tokens, unless options say else.

    Nothing is taken from the file that came with the model (a temperature, a repetition penalty): what differs between
    two runs is in their recipes.

    Args:
        options: the recipe's `generation_config`, with transformers' keys.
        end_ids: ids of the tokens that end an answer.
        pad_id: id of the padding token; None takes an end token.

    Raises:
        UserError: transformers refuses a value, or the options ask for several answers.
    """
    from transformers import GenerationConfig

    ends = sorted(set(end_ids))
    values = {
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad_id is None else pad_id,
    }
    if "max_length" not in options:
        values["max_new_tokens"] = max_output_length
    if options.get("num_return_sequences") not in (None, 1):
        raise UserError(
            f"generation_config.num_return_sequences: {options['num_return_sequences']}; expected 1, "
            "for one answer an example is scored"
        )
    try:
        # An answer comes back as ids alone, whatever else the recipe would have returned.
        return GenerationConfig(**{**values, **options, "return_dict_in_generate": False})
    except (TypeError, ValueError) as error:
        raise UserError(f"generation_config: {error}") from error


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    batch_size: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[str], int]:
    """Return the answer to each prompt, without special tokens and outer white space, and the number of new tokens.

    Batches are padded on the left (for prompt tuning: not at all), sorted by length and start with the longest, so
    that a lack of memory shows at once. A greedy answer does not depend on its batch (up to rounding); a sampled one
    does, and repeats with the same seed and batch size.

    Args:
        prompts: token ids, each at least one.
        seed: of torch's generators, for sampling; they are left as they were.
        progress: called after each batch with the number of answers done.
    """
    answers = [""] * len(prompts)
    done = new_tokens = 0
    with _only_these_settings(model, config), _seeded(model, seed):
        for batch in _batches(prompts, batch_size, _padding_moves_prompts(model)):
            for index, ids in zip(batch, _generate(model, tokenizer, [prompts[i] for i in batch], config), strict=True):
                new_tokens += len(ids)
                answers[index] = tokenizer.decode(_without_end(ids, config), skip_special_tokens=True).strip()
            done += len(batch)
            progress(done)
    return answers, new_tokens


def generate_answers_of_all(
    adapters: ManyAdapters,
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    rows: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, tuple[list[str], int]]:
    """Return for each adapter what :func:`generate_answers` gives, made in batches of all adapters' rows.

    Args:
        names: of the adapters; each answers all prompts.
        config: greedy, see :func:`finegrid.evaluation.decoding.can_decode`.
        rows: of a batch at most.
        progress: called after each batch with the number of answers done, those of all adapters.
    """
    answers, new_tokens, done = {name: [""] * len(prompts) for name in names}, dict.fromkeys(names, 0), 0
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    pairs = [(name, index) for index in longest_first for name in names]
    with _only_these_settings(adapters.base, config):
        for start in range(0, len(pairs), rows):
            batch = sorted(pairs[start : start + rows], key=lambda pair: names.index(pair[0]))
            for (name, index), ids in zip(batch, _together(adapters, batch, tokenizer, prompts, config), strict=True):
                new_tokens[name] += len(ids)
                answers[name][index] = tokenizer.decode(_without_end(ids, config), skip_special_tokens=True).strip()
            done += len(batch)
            progress(done)
    return {name: (answers[name], new_tokens[name]) for name in names}


def _together(
    adapters: ManyAdapters, batch: list[tuple[str, int]], tokenizer, prompts, config: GenerationConfig
) -> list[list[int]]:
    """Generate for (adapter, prompt) pairs that are sorted by adapter."""
    owners = [name for name, _ in batch]

    def belong_to(owners: list[str]) -> tuple[list[str], list[int]]:
        names = list(dict.fromkeys(owners))
        return names, [owners.count(name) for name in names]

    def keep(rows: torch.Tensor) -> None:
        owners[:] = [owners[row] for row in rows.tolist()]
        adapters.now(*belong_to(owners))

    with adapters.parts(*belong_to(owners), dim=0):
        return _generate(adapters.base, tokenizer, [prompts[index] for _, index in batch], config, keep)


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, same_length: bool) -> Iterator[list[int]]:
    """Yield the prompts' indices, longest first."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        if batch and (len(batch) == batch_size or (same_length and len(prompts[batch[0]]) != len(prompts[index]))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _padding_moves_prompts(model: PreTrainedModel | PeftModel) -> bool:
    """Tell whether padding on the left would change answers: peft puts the virtual tokens of prompt tuning before the
    padding and ignores position ids, so that the prompt would stand further from them than in training."""
    configs = getattr(model, "peft_config", {}).values()
    return any(config.is_prompt_learning and config.peft_type != "PREFIX_TUNING" for config in configs)


@torch.no_grad()
def _generate(
    model, tokenizer, prompts: Sequence[Sequence[int]], config: GenerationConfig, keep: Keep = lambda rows: None
) -> list[list[int]]:
    """Return the new ids of each prompt of one batch, the end token included and padding left out."""
    from finegrid.evaluation.decoding import can_decode

    width = max(len(prompt) for prompt in prompts)
    pad = config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    stops = {"tokenizer": tokenizer} if config.stop_strings else {}
    loop = {"custom_generate": _loop(keep)} if can_decode(config) and not _has_virtual_tokens(model) else {}
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **stops, **loop)
    return [_until_end(row, config) for row in output[:, width:].tolist()]


def _loop(keep: Keep) -> Callable:
    from finegrid.evaluation.decoding import decode

    def loop(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **arguments
    ) -> torch.Tensor:
        return decode(model, input_ids, logits_processor, stopping_criteria, generation_config, keep, **arguments)

    return loop


def _has_virtual_tokens(model: PreTrainedModel | PeftModel) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _until_end(ids: list[int], config: GenerationConfig) -> list[int]:
    ends = _ends(config)
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _without_end(ids: list[int], config: GenerationConfig) -> list[int]:
    # An end token need not be a special one to the tokenizer, which would then leave it in the text.
    return ids[:-1] if ids and ids[-1] in _ends(config) else ids


def _ends(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [ends]  # None: nothing ends an answer but its length


@contextmanager
def _only_these_settings(model, config: GenerationConfig) -> Iterator[None]:
    """Hide the generation settings that came with the model: transformers fills in from them what a config lacks."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = base.generation_config
    base.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    try:
        yield
    finally:
        base.generation_config = kept


@contextmanager
def _seeded(model, seed: int) -> Iterator[None]:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
