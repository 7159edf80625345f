# Analysis: the comparison of a study's arms.


def all_metrics(wildcards):
    return results(
        wildcards.study, "metrics/{run}.json", study_of(wildcards.study).all_runs
    )


def all_predictions(wildcards):
    return results(
        wildcards.study,
        "runs/{run}/predictions.jsonl",
        study_of(wildcards.study).all_runs,
    )


def all_summaries(wildcards):
    return results(
        wildcards.study, "training/{run}.json", study_of(wildcards.study).runs
    )


def all_histories(wildcards):
    return results(wildcards.study, "history/{run}.csv", study_of(wildcards.study).runs)


rule compare:
    input:
        plan="results/{study}/plan.json",
        metrics=all_metrics,
        predictions=all_predictions,
        summaries=all_summaries,
    output:
        arms="results/{study}/comparison/arms.tsv",
        comparisons="results/{study}/comparison/comparisons.tsv",
        comparison="results/{study}/comparison/comparison.json",
    log:
        "logs/compare/{study}.log",
    benchmark:
        "benchmarks/compare/{study}.tsv"
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        code=code_fingerprint("finegrid.analysis.compare"),
    message:
        "Compare the arms of study {wildcards.study}."
    shell:
        "finegrid compare {wildcards.study} --log {log}"
