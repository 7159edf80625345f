# Training strategy: the plan of a study, and one job a run.
#
# Training and evaluation wait for the plan, which is not made of a study with an error in it. What a run hangs on is in
# its id, so a newer plan reruns nothing.


rule study_plan:
    input:
        study=study_files,
        reports=plan_reports,
        models=plan_manifests,
    output:
        "results/{study}/plan.json",
        "results/{study}/plan.tsv",
    log:
        "logs/plan/{study}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        settings=study_plan,
        gpus=planned_gpus,
        code=code_fingerprint("finegrid.plan"),
    message:
        "Plan study {wildcards.study}."
    shell:
        "finegrid plan {wildcards.study} --log {log}"


# The runs that share base and tokens, in one process; their own jobs put the results in place. It runs only if one of
# these runs does: see finegrid.pack_jobs.
rule train_pack:
    input:
        plan=ancient("results/{study}/plan.json"),
        tokens=pack_tokens,
        model=pack_manifest,
    output:
        temp(touch(pack_jobs.marker("train", "{study}", "{pack}"))),
    log:
        "logs/train_pack/{study}/{pack}.log",
    benchmark:
        "benchmarks/train_pack/{study}/{pack}.tsv"
    conda:
        "../../envs/finegrid.yaml"
    threads: config["threads"]
    resources:
        mem_mb=pack_training_memory,
        gpu=pack_training_gpus,
        runtime=pack_training_minutes,
    message:
        "Train pack {wildcards.pack} of study {wildcards.study}."
    shell:
        "env $KEEPS_MEMORY finegrid train-pack {wildcards.study} {wildcards.pack} --log {log}"


rule train_adapter:
    input:
        plan=ancient("results/{study}/plan.json"),
        tokens=training_tokens,
        model=run_manifest,
        configs=training_configs,
        pack=training_pack,
    output:
        weights=directory("results/{study}/runs/{run}/adapter"),
        history="results/{study}/history/{run}.csv",
        summary="results/{study}/training/{run}.json",
        settings="results/{study}/settings/{run}.json",
        provenance="results/{study}/provenance/{run}.json",
    log:
        "logs/train/{study}/{run}.log",
    benchmark:
        "benchmarks/train/{study}/{run}.tsv"
    wildcard_constraints:
        run=r"(?!full-|base-)[a-z0-9_]+-[0-9a-f]{8}",
    conda:
        "../../envs/finegrid.yaml"
    threads: config["threads"]
    resources:
        mem_mb=training_memory,
        gpu=training_gpus,
        nodes=training_nodes,
        runtime=training_minutes,
    params:
        settings=training_settings,
        code=code_fingerprint("finegrid.training.train"),
    message:
        "Train {wildcards.run} of study {wildcards.study}."
    shell:
        "env $KEEPS_MEMORY finegrid train {wildcards.study} {wildcards.run} --log {log}"


use rule train_adapter as train_model with:
    output:
        weights=directory("results/{study}/runs/{run}/model"),
        history="results/{study}/history/{run}.csv",
        summary="results/{study}/training/{run}.json",
        settings="results/{study}/settings/{run}.json",
        provenance="results/{study}/provenance/{run}.json",
    wildcard_constraints:
        run=r"full-[0-9a-f]{8}",
