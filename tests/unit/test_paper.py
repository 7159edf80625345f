"""The minimal paper in docs/paper compiles with a study's numbers, tables and figures, and nothing sticks out."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from finegrid.publication.numbers import write_numbers
from finegrid.publication.tables import write_tables
from study_results import make_results


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
def test_the_paper_compiles_and_every_number_figure_and_table_is_in_it(project: Path, tmp_path: Path):
    study = make_results(tmp_path, seeds=3, examples=60)
    source = (project / "docs/paper/paper.tex").read_text(encoding="utf-8").replace("insurance", "synthetic")
    for name in re.findall(r"\\figurefile\{(\w+)\}", source):
        importlib.import_module(f"finegrid.figures.{name}").draw(study, study / "figures" / name)
    write_tables(study, study / "tables")
    write_numbers(study, study / "tables/numbers.tex")
    paper = tmp_path / "docs/paper"
    paper.mkdir(parents=True)
    (paper / "paper.tex").write_text(source, encoding="utf-8")

    for _ in range(2):  # references are known in the second
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(command, cwd=paper, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-3000:]

    assert "Overfull" not in done.stdout
    assert "undefined" not in done.stdout
    assert len(re.findall(r"\\(?:synthetic)\w+", source)) > 20
