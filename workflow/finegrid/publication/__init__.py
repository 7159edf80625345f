"""Publication: LaTeX tables, numbers.tex and the HTML report."""
