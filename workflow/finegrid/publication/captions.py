"""What each figure shows, in a sentence: the captions of the report (and, word for word, of `snakemake --report`)."""

CAPTIONS = {
    "quality": (
        "Quality",
        "Mean of the primary metric by arm with its 95 % interval over seeds and examples, each seed as a point; "
        "and the paired difference to the baseline with its verdict and the margin of equivalence. Verdicts and p "
        "are adjusted for all comparisons (Holm), each interval stands for itself: one that leaves out 0 may not be "
        "enough.",
    ),
    "loss_curves": (
        "Loss",
        "Training and validation loss against the optimiser step, one line a seed; the level of the untrained base "
        "model is drawn in. Losses are means over label tokens.",
    ),
    "effects": (
        "Factor effects",
        "The difference that each level makes where it is all that differs: with its 95 % interval and verdict where "
        "the study varied one factor at a time, the verdict adjusted for all comparisons (Holm); else every such pair "
        "of arms as a point, and their mean.",
    ),
    "heatmap": (
        "Two factors",
        "The primary metric by the levels of both factors, a cell an arm; signs say what its difference to the "
        "baseline was shown to be: ▲ better, ▼ worse, = equivalent, none where it is not distinguishable.",
    ),
    "response": (
        "Response to levels",
        "How the arms answer to a factor that is a number. Of a tuned one, such as the learning rate, the value on "
        "validation that the level was chosen by; a chosen level on the edge of its range has an arrow.",
    ),
    "cost": (
        "Quality against cost",
        "The primary metric against trainable parameters, peak memory and training time: up and to the left is "
        "better, and the line joins the arms that no other beats at no more cost. Cost is that of training alone.",
    ),
    "seeds": (
        "Seed spread",
        "How far the seeds of one arm lie from their mean: differences between arms that are smaller than this say "
        "nothing with one seed.",
    ),
    "schedule": (
        "Schedule",
        "The learning rate as it ran, step by step: warmup and decay as they happened, not as they were asked for.",
    ),
    "memory": (
        "Memory",
        "The peak of memory that the plan predicted for each run, before anything trained, against what its training "
        "took.",
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
