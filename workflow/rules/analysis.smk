# Analysis: the comparison of a study's arms.


rule compare:
    input:
        plan="results/{study}/plan.json",
        metrics=all_metrics,
        predictions=all_predictions,
        summaries=all_summaries,
    output:
        arms="results/{study}/comparison/arms.tsv",
        comparisons="results/{study}/comparison/comparisons.tsv",
        pairs="results/{study}/comparison/pairs.tsv",
        mcnemar="results/{study}/comparison/mcnemar.tsv",
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
