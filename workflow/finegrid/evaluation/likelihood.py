"""How likely a model finds the reference answers: the negative log-likelihood of each row's label tokens.

Used by :mod:`finegrid.evaluation.evaluate`; reads token rows, writes no files. Batches, their form and the way a layer
is computed are those of validation (:mod:`finegrid.training.validation`), so that on the CPU a run's last validation
and the losses scored with its saved weights are the same to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finegrid.training.collation import Collator
from finegrid.training.flat import make_flat
from finegrid.training.loss import find_head, label_logits, label_states
from finegrid.training.low_rank import written_out
from finegrid.training.validation import batches, sums_of_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@torch.no_grad()
def label_nll(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Return for each row the sum over its label tokens of -ln p(token | all before it), in nats, in the rows' order.

    Divided by :func:`finegrid.training.validation.label_tokens` it is transformers' own loss of that row. Batches are
    sorted by length and start with the longest, so that a lack of memory shows at once.

    Args:
        model: in evaluation mode.
        rows: token rows with `id`, `input_ids` and `labels`, aligned; label -100 is no loss.
        batch_size: at most so many rows a batch; changes results by rounding only.
        progress: called after each batch with the number of rows done.
    """
    with scoring(model) as nll:
        return nll(rows, batch_size, progress)


@contextlib.contextmanager
def scoring(model: PreTrainedModel | PeftModel) -> Iterator[Callable[..., list[float]]]:
    """Give :func:`label_nll` of a model for any number of calls; find out but once what its architecture allows."""
    head, _ = find_head(model)
    own = model.config._attn_implementation
    shares, note = make_flat(model, lambda batch: label_logits(model, head, batch)[0])
    collate = Collator(flat=note is None, shares=shares, cuts=True)
    with written_out(model):
        try:
            yield functools.partial(_nll, model, head, collate)
        finally:
            if collate.flat:
                model.set_attn_implementation(own)  # generation has batches of its own kind


@torch.no_grad()
def _nll(
    model, head, collate: Collator, rows, batch_size: int, progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    found = [0.0] * len(rows)
    done = 0
    for indices in batches(rows, batch_size):
        batch = collate([rows[index] for index in indices])
        if len(batch["targets"]):
            batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
            for index, nll in zip(indices, sums_of_rows(label_states(model, head, batch), batch), strict=True):
                found[index] = nll
        done += len(indices)
        progress(done)
    return found
