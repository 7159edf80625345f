# Data strategy: raw files -> one schema -> clean splits -> token rows; and the base model with its manifest.
#
# What may ask a hub runs where snakemake runs: the nodes of a cluster need no internet.


rule demo_model:
    output:
        expand(
            f"{layout.DEMO_MODEL}/{{file}}",
            file=[
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
            ],
        ),
    log:
        "logs/demo_model/SmolLM2-135M-Instruct.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    message:
        "Convert the demo's base model."
    shell:
        f"finegrid demo-model {layout.DEMO_MODEL} --log {{log}}"


rule demo_data:
    output:
        expand(f"{layout.DEMO_DATA}/{{split}}.jsonl.gz", split=SPLITS),
    log:
        "logs/demo_data/insuranceqa.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    message:
        "Write the demo's data set."
    shell:
        f"finegrid demo-data {layout.DEMO_DATA} --log {{log}}"


rule model:
    input:
        model_files,
    output:
        "data/models/{model}.json",
    log:
        "logs/model/{model}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    params:
        settings=model_settings,
        code=code_fingerprint("finegrid.models"),
    message:
        "Base model {wildcards.model}: fetch it if need be, and hash its files."
    shell:
        "finegrid model {wildcards.model} --log {log}"


rule import_data:
    input:
        raw_files,
    output:
        expand("data/clean/{{data}}/imported/{split}.jsonl", split=SPLITS),
        report="data/clean/{data}/imported/report.json",
    log:
        "logs/import/{data}.log",
    benchmark:
        "benchmarks/import/{data}.tsv"
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    threads: data_processes
    params:
        settings=data_settings,
        code=code_fingerprint("finegrid.data.importing"),
    message:
        "Data set {wildcards.data}: import."
    shell:
        "finegrid import {wildcards.data} --log {log}"


rule clean:
    input:
        rules.import_data.output,
    output:
        expand("data/clean/{{data}}/{split}.jsonl", split=SPLITS),
        rejects="data/clean/{data}/rejects.jsonl",
        report="data/clean/{data}/report.json",
    log:
        "logs/clean/{data}.log",
    benchmark:
        "benchmarks/clean/{data}.tsv"
    conda:
        "../../envs/finegrid.yaml"
    threads: data_processes
    params:
        settings=data_settings,
        code=code_fingerprint("finegrid.data.cleaning"),
    message:
        "Data set {wildcards.data}: clean."
    shell:
        "finegrid clean {wildcards.data} --log {log}"


rule tokenise:
    input:
        clean=clean_splits,
        model=tokens_manifest,
        template=chat_template,
    output:
        expand("data/tokens/{{tokens}}/{split}.arrow", split=SPLITS),
        dropped="data/tokens/{tokens}/dropped.jsonl",
        report="data/tokens/{tokens}/report.json",
    log:
        "logs/tokenise/{tokens}.log",
    benchmark:
        "benchmarks/tokenise/{tokens}.tsv"
    conda:
        "../../envs/finegrid.yaml"
    threads: token_processes
    params:
        settings=token_settings,
        code=code_fingerprint("finegrid.data.tokenising"),
    message:
        "Token set {wildcards.tokens}."
    shell:
        "finegrid tokenise {wildcards.tokens} --log {log}"


rule data_report:
    input:
        "data/tokens/{tokens}/report.json",
    output:
        "results/{study}/data/{tokens}.json",
    log:
        "logs/data_report/{study}/{tokens}.log",
    localrule: True
    conda:
        "../../envs/finegrid.yaml"
    message:
        "Keep the report of token set {wildcards.tokens} with study {wildcards.study}."
    shell:
        "cp {input} {output} 2> {log}"
