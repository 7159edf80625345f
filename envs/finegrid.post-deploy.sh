#!/usr/bin/env bash
# Snakemake runs this in the project after it has made the conda environment: the package itself goes in.
set -euo pipefail
pip install --no-deps --no-build-isolation -e .
