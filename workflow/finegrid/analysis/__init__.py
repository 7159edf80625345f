"""Analysis: scores of all runs, arms with intervals, paired comparisons with verdicts."""
