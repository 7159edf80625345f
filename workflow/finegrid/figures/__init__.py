"""Figures: one module a figure, drawn from tidy tables that are saved beside them."""

# The figures of every study, in the report's order; each is a module here with `draw(study_dir, output)`.
FIGURES = ("quality", "loss_curves", "cost", "learning_rate", "lengths")
