# Publication: figures, tables, numbers and the report, from the small files that git tracks.
#
# They read metrics, summaries and histories of the runs as well, but wait for the comparison alone: it names the
# content of all of these, so it changes with them, and no figure has thousands of inputs.


rule figure:
    input:
        rules.compare.output,
        plan="results/{study}/plan.json",
        data=study_token_reports,
    output:
        report(
            "results/{study}/figures/{figure}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        pdf="results/{study}/figures/{figure}.pdf",
        csv="results/{study}/figures/{figure}.csv",
        provenance="results/{study}/figures/{figure}.json",
    log:
        "logs/figure/{study}/{figure}.log",
    wildcard_constraints:
        figure=rf"(?!(?:{'|'.join(PLAN_FIGURES)})\.)\w+",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        code=figure_code,
    message:
        "Draw {wildcards.figure} of study {wildcards.study}."
    shell:
        "finegrid figure {wildcards.study} {wildcards.figure} --log {log}"


use rule figure as plan_figure with:
    input:
        plan="results/{study}/plan.json",
    wildcard_constraints:
        figure="|".join(PLAN_FIGURES),
    localrule: True


rule study_tables:
    input:
        rules.compare.output,
        plan="results/{study}/plan.json",
    output:
        report(
            "results/{study}/tables/arms.csv",
            caption="../report/table.rst",
            category="Tables",
        ),
        [f"results/{{study}}/tables/{name}" for name in TABLES if name != "arms.csv"],
    log:
        "logs/tables/{study}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        code=publication_code("tables", "numbers"),
    message:
        "Write the tables of study {wildcards.study}."
    shell:
        "finegrid tables {wildcards.study} --log {log}"


rule study_report:
    input:
        rules.compare.output,
        advice=rules.advice.output,
        plan="results/{study}/plan.json",
        data=study_token_reports,
        figures=study_figures,
        tables=study_tables,
    output:
        report(
            "results/{study}/report.html",
            caption="../report/report.rst",
            category="Report",
        ),
    log:
        "logs/report/{study}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        code=publication_code("report"),
        template=file_hash(
            Path(workflow.basedir) / "workflow/finegrid/publication/report.html.j2"
        ),
    message:
        "Write the report of study {wildcards.study}."
    shell:
        "finegrid report {wildcards.study} --log {log}"
