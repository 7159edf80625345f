# Analysis: the comparison of a study's arms, and advice on what to try next.


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


rule advice:
    input:
        rules.compare.output,
        study_files,
        plan="results/{study}/plan.json",
        data=study_token_reports,
    output:
        advice="results/{study}/comparison/advice.json",
        next_study="results/{study}/comparison/next_study.yaml",
    log:
        "logs/advice/{study}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        code=code_fingerprint("finegrid.analysis.advice"),
    message:
        "Say what to try after study {wildcards.study}."
    shell:
        "finegrid advice {wildcards.study} --log {log}"
