# Finegrid: from a declared study to trained runs, honest comparisons and paper figures.
#
#   snakemake plan                     what the study will do
#   snakemake                          everything, up to the report
#   snakemake figures                  up to the figures
#   snakemake --config study=NAME      another study of config/studies
#
from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/publication.smk"


study_of(config["study"])  # a mistake in it is told now


report: "workflow/report/workflow.rst"


rule report:
    default_target: True
    input:
        f"results/{config['study']}/report.html",
    localrule: True
    message:
        "The report of study {config[study]} is results/{config[study]}/report.html."


rule plan:
    input:
        f"results/{config['study']}/plan.json",
    log:
        f"logs/plan/{config['study']}/show.log",
    localrule: True
    conda:
        "envs/finegrid.yaml"
    params:
        study=config["study"],
    message:
        "The plan of study {config[study]}."
    shell:
        "finegrid show-plan {params.study} 2> {log}"


rule figures:
    input:
        figure_files(config["study"]),
    localrule: True
    message:
        "The figures of study {config[study]} are in results/{config[study]}/figures."


rule tables:
    input:
        table_files(config["study"]),
    localrule: True
    message:
        "The tables of study {config[study]} are in results/{config[study]}/tables."
