# Finegrid: from a declared study to trained runs, honest comparisons and paper figures.
#
#   snakemake plan                     what the study will do and need, in seconds: no weights, no data, no GPU
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


plan_of(config["study"])  # a mistake in the study is told now

if workflow.is_main_process:
    controllers.tell_of_others(config["study"], sys.argv)
    put_back_records(config["study"])


onstart:
    if workflow.is_main_process:
        controllers.begin(config["study"])
        begin_packs(config["study"])


onsuccess:
    versions.finish(config["study"])


onerror:
    versions.finish(config["study"])


if any(argument.startswith("--report") for argument in sys.argv):
    config["provenance"] = report_metadata(
        config["study"]
    )  # the description below names commit and data


report: "workflow/report/workflow.rst"


rule report:
    default_target: True
    input:
        f"results/{config['study']}/report.html",
    localrule: True
    message:
        "The report of study {config[study]} is results/{config[study]}/report.html."


# Goes by what is there, so it waits for no stage; the job study_plan makes the exact plan before anything trains.
rule plan:
    input:
        study_raw_files,
    log:
        f"logs/plan/{config['study']}/show.log",
    localrule: True
    conda:
        "envs/finegrid.yaml"
    params:
        study=config["study"],
    message:
        "The plan of study {config[study]}; the picture of it is results/{config[study]}/figures/grid.pdf."
    shell:
        "finegrid plan {params.study} && finegrid figure {params.study} grid --log {log} 2> /dev/null"
        " && echo Picture of it: results/{params.study}/figures/grid.png"


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
