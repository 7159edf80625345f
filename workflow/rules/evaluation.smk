# Evaluation: one job a run, the untrained base models included.


# The runs that were trained as a pack are scored as one: see train_pack.
rule evaluate_pack:
    input:
        plan=ancient("results/{study}/plan.json"),
        rows=pack_rows,
        model=pack_manifest,
    output:
        temp(touch(pack_jobs.marker("evaluate", "{study}", "{pack}"))),
    log:
        "logs/evaluate_pack/{study}/{pack}.log",
    benchmark:
        "benchmarks/evaluate_pack/{study}/{pack}.tsv"
    conda:
        "../../envs/finegrid.yaml"
    threads: config["threads"]
    resources:
        mem_mb=pack_evaluation_memory,
        gpu=pack_evaluation_gpus,
        runtime=pack_evaluation_minutes,
    message:
        "Score pack {wildcards.pack} of study {wildcards.study}."
    shell:
        "env $KEEPS_MEMORY finegrid evaluate-pack {wildcards.study} {wildcards.pack} --gpus {resources.gpu}"
        " --log {log}"


rule evaluate:
    input:
        plan=ancient("results/{study}/plan.json"),
        rows=scored_rows,
        base=untrained_model,
        trained=trained_model,
        pack=evaluation_pack,
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
        "env $KEEPS_MEMORY finegrid evaluate {wildcards.study} {wildcards.run} --gpus {resources.gpu} --log {log}"
