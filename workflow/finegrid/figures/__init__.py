"""Figures: one module a figure, drawn from tidy tables that are saved beside them."""

# Drawn from the plan alone, before anything trains.
PLAN_FIGURES = ("grid",)
# The figures of every study, in the report's order; each is a module here with `draw(study_dir, output)`.
FIGURES = ("quality", "loss_curves", "cost", "learning_rate", "lengths", *PLAN_FIGURES)
