"""Finegrid: from a declared study of fine-tuning settings to trained runs, honest comparisons and paper figures."""

__version__ = "0.1.0"
