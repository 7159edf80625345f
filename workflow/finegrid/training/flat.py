"""Training without padding: a batch's rows lie end to end, and attention alone puts them beside each other.

All of a decoder but attention works on each token by itself, so padding is computed for nothing. Rows are therefore
laid end to end, as one row of S tokens with each token's position in its own row, and the attention function here,
registered with transformers, lets each row see itself alone. On the CPU torch's causal attention is called for one row
after the other. On a GPU, where many small calls cost more than what they save, queries, keys and values of shape (1,
heads, S, width) are set into the (B, T) grid of the padded batch, attention is called without any mask (what fills a
row's end is behind all of its tokens, none sees it), and the tokens are taken out again. Rows of one length are only
viewed otherwise, nothing is copied. FlashAttention has kernels for rows end to end, it gets its own arguments.

Tokens with which all rows of a batch begin, as those of a chat template's system message, are computed once: they lie
in the first row alone, whose queries, keys and values are set before the other rows' own for attention. Tokens from
which no label is predicted, behind a row's last one, are left out.

Batches are those of :class:`finegrid.training.collation.Collator` with ``flat``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "finegrid_flat"
ROW_BY_ROW = "cpu"  # the type of device where attention is computed so
DRAWN = ("drop", "noise", "jitter")  # in the names of config keys that have something drawn for each token
# What an architecture may raise that can't have rows end to end.
TROUBLE = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
# What the attention of some models does besides; `sliding_window` is seen to below.
NOT_DONE = ("softcap", "s_aux", "position_bias", "cache")


def layout_of(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that tell a model how a batch's rows lie: a mask if they are padded."""
    if "cells" not in batch:
        return {"attention_mask": batch["attention_mask"]}
    longest = batch["grid"][1]
    return {
        "position_ids": batch["position_ids"],
        "use_cache": False,
        "cells": batch["cells"],
        "grid": batch["grid"],
        "shared": batch["shared"],
        "cu_seq_lens_q": batch["starts"],
        "cu_seq_lens_k": batch["starts"],
        "max_length_q": longest,
        "max_length_k": longest,
    }


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cells: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    shared: tuple[tuple[int, int, int], ...] = (),
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a flat batch; see transformers' ``AttentionInterface`` for the arguments.

    Args:
        query: (1, heads, S, width); key and value may have fewer heads.
        cells: (S,), where each token stands in the flattened grid; None is a padded batch, with torch's attention.
        grid: rows, and tokens of the longest one.
        shared: rows that begin with the same tokens, see :class:`finegrid.training.collation.Collator`.
        cu_seq_lens_q: (rows + 1,), where each row begins, and S.

    Returns:
        (1, S, heads, width), and no weights.

    Raises:
        ValueError: the model's attention does more than is done here.
    """
    more = [name for name in NOT_DONE if options.get(name) is not None]
    if more:
        raise ValueError(f"attention with {', '.join(more)}")
    if cells is None:
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = _window(query.shape[2], sliding_window, query.device)
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=mask is None
        )
        return output  # (rows, tokens, heads, width)

    if has_16_bits_on_cpu(query):
        # Of 16 bits torch's attention takes a CPU four times as long backward.
        query, key, value = query.float(), key.float(), value.float()
        precision = torch.autocast("cpu", enabled=False)
    else:
        precision = contextlib.nullcontext()
    with precision:
        if query.device.type == ROW_BY_ROW and len(cells) < grid[0] * grid[1]:
            lengths = cu_seq_lens_q.diff().tolist()
            rows = zip(*(_rows(states, lengths, shared) for states in (query, key, value)), strict=True)
            return torch.cat([attend(*row)[:, -own:] for row, own in zip(rows, lengths, strict=True)], dim=1), None
        output = attend(*(_into_grid(states, cells, grid, shared) for states in (query, key, value))).flatten(0, 1)
    return (output if len(output) == len(cells) else output.index_select(0, cells))[None], None


def has_16_bits_on_cpu(x: torch.Tensor) -> bool:
    """Return whether products of x would now be computed on a CPU in 16 bits, by autocast."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _window(length: int, size: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask of a sliding window, (T, T), if it is shorter than a row of so many tokens."""
    if size is None or length <= size:
        return None
    column = torch.arange(length, device=device)
    distance = column[:, None] - column[None, :]
    return (distance >= 0) & (distance < size)


def _rows(states: torch.Tensor, lengths: list[int], shared: tuple[tuple[int, int, int], ...]) -> list[torch.Tensor]:
    """Return (1, heads, S, width) as whole rows of (1, heads, length, width)."""
    rows = list(states.split(lengths, dim=2))
    for first, count, tokens in shared:
        before = rows[first][:, :, :tokens]
        for row in range(first + 1, first + count):
            rows[row] = torch.cat([before, rows[row]], dim=2)
    return rows


def _into_grid(
    states: torch.Tensor, cells: torch.Tensor, grid: tuple[int, int], shared: tuple[tuple[int, int, int], ...]
) -> torch.Tensor:
    """Return (1, heads, S, width) as (B, heads, T, width); zeros where a row has ended."""
    tokens = states[0].transpose(0, 1)
    size = grid[0] * grid[1]
    if len(tokens) < size:
        tokens = tokens.new_zeros(size, *tokens.shape[1:]).index_copy(0, cells, tokens)
    placed = tokens.unflatten(0, grid)
    for first, count, length in shared:
        placed[first + 1 : first + count, :length] = placed[first, :length]
    return placed.transpose(1, 2)


def flat_mask(*args: Any, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """Return a padded batch's mask, as for torch's attention; none for a flat one, whose rows share no cell."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, flat_attention)
AttentionMaskInterface.register(NAME, flat_mask)


def make_flat(model: torch.nn.Module, compare: Any) -> tuple[bool, str | None]:
    """Let a model take flat batches, if its architecture can; else leave it as it was and say why not.

    Tried out rather than looked up by the architecture's name, as :func:`finegrid.training.loss.find_head` does: rows
    end to end must have the padded rows' logits, and none may hang on its neighbour.

    Args:
        compare: ``compare(batch)`` gives the float32 logits of a batch's label positions.

    Returns:
        Whether flat batches may have once what all rows begin with, and why they can't be flat at all.
    """
    from finegrid.training.collation import WORTH_SHARING, Collator

    config = model.config
    if getattr(config, "attention_chunk_size", None):
        return False, "batches are padded: the model attends in chunks"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False, "batches are padded: virtual tokens stand before each row"
    own = config._attn_implementation
    before = [*range(5, 5 + WORTH_SHARING), 8]  # a token more: from the last one a label is predicted
    rows = [[*before, 6, 7], [*before, 9, 10, 11], [*before, 13]]
    others = [rows[0], [14, *rows[1][:0:-1]], rows[2]]
    device = next(model.parameters()).device

    def batch(rows: list[list[int]], **form: bool) -> dict[str, Any]:
        labels = [[-100] * len(before) + row[len(before) :] for row in rows]
        parts = [{"id": n, "input_ids": row, "labels": labels[n]} for n, row in enumerate(rows)]
        return _moved(Collator(**form)(parts), device)

    training = model.training
    model.eval()
    try:
        expected = compare(batch(rows))
        if not own.startswith("flash_attention"):
            model.set_attn_implementation(NAME)
        found, beside = (compare(batch(part, flat=True, cuts=True)) for part in (rows, others))
        reason = _difference(expected, found, beside)
        shares = config._attn_implementation == NAME and _shares(compare, expected, batch, rows)
    except TROUBLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        model.train(training)
    if reason is None:
        return shares, None
    model.set_attn_implementation(own)
    return False, f"batches are padded: rows can't lie end to end ({reason})"


def _shares(compare: Any, expected: torch.Tensor, batch: Any, rows: list[list[int]]) -> bool:
    sharing = batch(rows, flat=True, cuts=True, shares=True)
    try:
        return bool(sharing["shared"]) and not _differ(expected, compare(sharing))
    except TROUBLE:  # rows end to end it has taken
        return False


def _difference(expected: torch.Tensor, found: torch.Tensor, beside: torch.Tensor) -> str | None:
    if _differ(expected, found):
        return "the logits are others"
    same = [0, 1, 5]  # of the first and the last row
    if (found - beside)[same].abs().max() > 1e-4 * expected.abs().max():
        return "a row sees its neighbour"
    return None


def _differ(expected: torch.Tensor, found: torch.Tensor) -> bool:
    return found.shape != expected.shape or bool((found - expected).abs().max() > 1e-2 * expected.abs().max())


def draws(model: torch.nn.Module) -> bool:
    """Return whether anything may be drawn for each token while the model trains, by its modules or its configs."""
    if any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()):
        return True
    configs = [model.config, model.config.get_text_config(), getattr(model, "active_peft_config", None)]
    values = [item for config in configs if config is not None for item in config.to_dict().items()]
    return any(isinstance(value, int | float) and value for key, value in values if any(word in key for word in DRAWN))


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
