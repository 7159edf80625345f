"""What each figure shows, in a sentence: the captions of the report (and, word for word, of `snakemake --report`)."""

CAPTIONS = {
    "quality": (
        "Quality",
        "Mean of the primary metric by arm with its 95 % interval over seeds and examples, each seed as a point; "
        "and the paired difference to the baseline with its verdict and the margin of equivalence.",
    ),
    "loss_curves": (
        "Loss",
        "Training and validation loss against the optimiser step, one line a seed; the level of the untrained base "
        "model is drawn in. Losses are means over label tokens.",
    ),
    "cost": (
        "Quality against cost",
        "The primary metric against peak memory and against training time: up and to the left is better. Cost is "
        "that of training alone, without evaluation.",
    ),
    "learning_rate": (
        "Learning rate",
        "The learning rate as it ran, step by step: warmup and decay as they happened, not as they were asked for.",
    ),
    "lengths": (
        "Lengths",
        "Token lengths of prompts and answers before truncation, with the limits drawn in: what lies right of a "
        "limit was cut.",
    ),
    "grid": (
        "The grid",
        "The study as it was planned: the levels of each arm, its tuned levels and seeds, and the estimated cost of "
        "its runs. Levels that differ from the baseline's are shaded.",
    ),
}
