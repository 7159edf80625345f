# Evaluation: one job a run, the untrained base models included.


rule evaluate:
    input:
        plan=ancient("results/{study}/plan.json"),
        rows=scored_rows,
        base=untrained_model,
        trained=trained_model,
    output:
        predictions="results/{study}/runs/{run}/predictions.jsonl",
        metrics="results/{study}/metrics/{run}.json",
    log:
        "logs/evaluate/{study}/{run}.log",
    benchmark:
        "benchmarks/evaluate/{study}/{run}.tsv"
    conda:
        "../../envs/finegrid.yaml"
    threads: config["threads"]
    resources:
        mem_mb=evaluation_memory,
        gpu=evaluation_gpus,
        runtime=evaluation_minutes,
    params:
        settings=evaluation_settings,
        code=code_fingerprint("finegrid.evaluation.evaluate"),
    message:
        "Evaluate {wildcards.run} of study {wildcards.study}."
    shell:
        "finegrid evaluate {wildcards.study} {wildcards.run} --gpus {resources.gpu} --log {log}"
