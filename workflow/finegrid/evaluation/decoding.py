"""Greedy decoding in which a row that has ended leaves the batch.

transformers keeps a finished row until the last one ends, and computes padding for it. Answers of a batch differ in
length by far, so :func:`decode` lets them go, and the key-value cache with them. It is given to ``generate`` as
``custom_generate``: all that stands around the loop (settings, logits processors, stopping criteria, caches) stays
transformers' own, and so does what is computed for a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

SHARE = 8  # rows leave when one in so many has ended: each time what is left of the cache is copied

WITHOUT_STATE = (  # logits processors that look at nothing but the ids so far
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
)

Keep = Callable[[torch.Tensor], None]


def can_decode(config: GenerationConfig) -> bool:
    """Return whether :func:`decode` gives what ``generate`` would: greedy answers with a cache that grows."""
    return (
        config.get_generation_mode() == GenerationMode.GREEDY_SEARCH
        and config.cache_implementation in (None, "dynamic")
        and config.guidance_scale in (None, 1)
        and config.use_cache is not False
        and not config.stop_strings  # `generate` keeps the tokenizer that they need from loops of others
    )


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    keep: Keep = lambda rows: None,
    **arguments: Any,
) -> torch.Tensor:
    """Return ids of shape (rows, prompt + longest answer), padded on the right; see ``GenerationMixin._sample``.

    Args:
        keep: called with the indices of the rows that stay in the batch, whenever some leave it.
    """
    for name in ("synced_gpus", "streamer"):
        arguments.pop(name, None)
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    finished: dict[int, torch.Tensor] = {}
    rows = list(range(len(input_ids)))
    outputs = model._prefill(input_ids, generation_config, arguments)
    while True:
        arguments = model._update_model_kwargs_for_generation(outputs, arguments, is_encoder_decoder=False)
        scores = logits_processor(input_ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
        input_ids = torch.cat([input_ids, scores.argmax(dim=-1, keepdim=True)], dim=-1)
        del outputs
        ended = stopping_criteria(input_ids, None).tolist()
        for row, ids, end in zip(rows, input_ids, ended, strict=True):
            if end:
                finished.setdefault(row, ids)  # what comes after an end doesn't count
        staying = [place for place, row in enumerate(rows) if row not in finished]
        if not staying:
            break
        if len(rows) - len(staying) >= max(1, len(rows) // SHARE) and _can_leave(arguments, logits_processor):
            kept = torch.tensor(staying, device=input_ids.device)
            rows, input_ids, arguments = [rows[place] for place in staying], input_ids[kept], _of(arguments, kept)
            keep(kept)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **arguments)
        outputs = model(**inputs, return_dict=True)
    answers = [finished[row] for row in range(len(finished))]
    return torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad)


def _can_leave(arguments: dict[str, Any], logits_processor: Any) -> bool:
    cache = arguments.get("past_key_values")
    if any(type(each).__name__ not in WITHOUT_STATE for each in logits_processor):
        return False  # it knows how many rows there were
    return type(cache) is DynamicCache and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def _of(arguments: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Return the model's arguments for these rows alone."""
    cache = arguments["past_key_values"]
    batch = cache.layers[0].keys.shape[0]
    cache.batch_select_indices(rows)
    return {
        name: value[rows] if torch.is_tensor(value) and value.dim() and len(value) == batch else value
        for name, value in arguments.items()
    }
