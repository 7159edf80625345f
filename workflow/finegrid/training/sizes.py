"""How much of a batch is worked on at a time; read by training and by the prediction of its memory."""

# 512 MiB in float32. In parts of less than a few hundred rows the head's matrix is read too often.
LOGITS_AT_ONCE = 2**27


def rows_of_logits(vocabulary: int, targets: int) -> int:
    """Return for how many of a batch's targets logits are made at a time: one at least."""
    return max(1, min(LOGITS_AT_ONCE // vocabulary, targets))
