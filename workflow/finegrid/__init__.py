"""Finegrid: from a declared study of fine-tuning settings to trained runs, honest comparisons and paper figures."""
