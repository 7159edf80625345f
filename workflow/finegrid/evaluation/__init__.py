"""Evaluation: generation and metrics of a trained run or of its base model."""
