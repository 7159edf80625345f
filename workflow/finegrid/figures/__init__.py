"""Figures: one module a figure, drawn from tidy tables that are saved beside them."""
