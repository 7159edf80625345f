# Evaluation: one job a run, the untrained base models included.


def evaluation_settings(wildcards):
    return run_of(wildcards).settings.evaluation_settings()


def evaluation_tokens(wildcards):
    return token_files(run_of(wildcards), "validation", "test")


def references(wildcards):
    folder = layout.clean_folder(run_of(wildcards))
    return [(folder / f"{split}.jsonl").as_posix() for split in ("validation", "test")]


def trained_weights(wildcards):
    """What the run trained; its summary, which names its content, tells whether it changed."""
    run = run_of(wildcards)
    return (
        ancient(layout.weights_folder(wildcards.study, run).as_posix())
        if run.train
        else []
    )


def training_summary(wildcards):
    return (
        results(wildcards.study, "training/{run}.json", [run_of(wildcards)])
        if run_of(wildcards).train
        else []
    )


def evaluation_memory(wildcards, attempt):
    """Megabytes: the base model and a generation batch."""
    return int(
        memory_estimate(run_of(wildcards).settings, Path.cwd(), train=False)
        * (1 + (attempt - 1) / 2)
    )


rule evaluate:
    input:
        study=study_files,
        tokens=evaluation_tokens,
        clean=references,
        model=run_manifest,
        weights=trained_weights,
        summary=training_summary,
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
    params:
        settings=evaluation_settings,
        code=code_fingerprint("finegrid.evaluation.evaluate"),
    message:
        "Evaluate {wildcards.run} of study {wildcards.study}."
    shell:
        "finegrid evaluate {wildcards.study} {wildcards.run} --log {log}"
