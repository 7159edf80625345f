"""Times of `dvc status`, `dvc repro` with nothing to do, and `finegrid restore`, for a study of 100 runs.

    python tests/benchmarks/versions.py [--runs 100] [--weights-kb 300]

Nothing is trained: the results of the study are small files of random bytes, which snakemake and DVC can't tell from
real ones. The project, its remote and its clone are made in a temporary folder. Printed are wall and CPU seconds
(children's too).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")
STUDY = """\
recipe: config/recipes/many.yaml
factors:
  rank: {{key: peft_config.r, levels: {ranks}}}
  rate: {{key: training_args.learning_rate, levels: {rates}}}
compare: {{metric: rougeL, margin: 0.01}}
"""
RECIPE = """\
model: {model_name_or_path: data/models/many}
data_config:
  train_file: data/raw/many/train.jsonl
  val_file: data/raw/many/validation.jsonl
  test_file: data/raw/many/test.jsonl
training_args: {max_steps: 100}
peft_config: {peft_type: LORA, target_modules: all-linear}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--weights-kb", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        make_project(project, arguments.runs)
        make_results(project, arguments.weights_kb)
        size = sum(path.stat().st_size for path in (project / "results").rglob("*") if path.is_file())
        print(f"{arguments.runs} runs, {size / 1e6:.0f} MB of results")
        measure(project, "snakemake --touch --forceall", "snakemake", "--touch", "--forceall", "--config", "study=many")
        records = project / "results/many/jobs.jsonl"
        print(f"jobs.jsonl: {records.stat().st_size / 1e6:.2f} MB")
        measure(project, "snakemake -n", "snakemake", "-n", "--config", "study=many")
        measure(project, "dvc repro, first: writes dvc.lock", "dvc", "repro", "study@many")
        measure(project, "dvc push", "dvc", "push")
        run(project, "git", "add", "-A")
        run(project, "git", "commit", "-q", "-m", "results")
        measure(project, "dvc status", "dvc", "status")
        measure(project, "dvc repro, nothing to do", "dvc", "repro", "study@many")
        clone = Path(folder) / "clone"
        run(project, "git", "clone", "-q", str(project), str(clone))
        said = measure(clone, "finegrid restore", "finegrid", "restore", "many")
        assert "nothing is left to do" in said, said
        run_id = sorted(path.name for path in (clone / "results/many/runs").glob("lora-*"))[0]
        shutil.rmtree(clone / "results/many/runs")
        measure(clone, "finegrid restore --run", "finegrid", "restore", "many", "--run", run_id)


def run(folder: Path, *command: str) -> str:
    names = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    environment = os.environ | {
        "PYTHONPATH": str(folder / "workflow"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **dict.fromkeys(names, "benchmark@example.org"),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def measure(folder: Path, name: str, *command: str) -> str:
    """Run a command and print its wall and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = run(folder, *command)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:<36} {wall:6.1f} s wall  {cpu:6.1f} s CPU", flush=True)
    return said


def make_project(project: Path, runs: int) -> None:
    """A project under git and DVC with one study, of as many runs as ranks x rates make."""
    project.mkdir()
    for name in ("workflow", "profiles", "envs", "config"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "studies"))
    for name in ("Snakefile", "pyproject.toml", ".gitignore", ".dvcignore", "params.yaml", ".dvc/config"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, project / name)
    shutil.copy(PROJECT / ".dvc/.gitignore", project / ".dvc/.gitignore")
    rates = [round(1e-4 * (number + 1), 8) for number in range(10)]
    ranks = list(range(1, runs // 10 + 1))
    (project / "config/studies").mkdir()
    (project / "config/studies/many.yaml").write_text(STUDY.format(ranks=ranks, rates=rates))
    (project / "config/recipes/many.yaml").write_text(RECIPE)
    (project / "data/models/many").mkdir(parents=True)
    (project / "data/models/many/config.json").write_text(json.dumps(CONFIG))
    (project / "data/models/many/model.safetensors").write_bytes(os.urandom(1000))
    (project / "data/raw/many").mkdir(parents=True)
    for split in SPLITS:
        rows = "".join(json.dumps({"question": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(20))
        (project / f"data/raw/many/{split}.jsonl").write_text(rows)
    run(project, "git", "init", "-q")
    run(project, "dvc", "add", "-q", "data/models/many", *(f"data/raw/many/{split}.jsonl" for split in SPLITS))
    run(project, "dvc", "remote", "add", "--default", "store", str(project.parent / "store"))
    run(project, "finegrid", "dvc")


def make_results(project: Path, weights_kb: int) -> None:
    """Every file that the study's jobs would write: the plan as it is, all others of random bytes."""
    sys.path.insert(0, str(PROJECT / "workflow"))
    from finegrid import layout
    from finegrid.figures import fitting
    from finegrid.models import fetch_model
    from finegrid.plan import plan_settings
    from finegrid.provenance import hashes_of
    from finegrid.study import load_study

    os.chdir(project)
    study = load_study(Path("config/studies/many.yaml"), project)
    results, first = layout.RESULTS / "many", study.runs[0]
    fetch_model(first.settings.model, project, layout.MODELS / "many.json")
    clean, tokens = layout.clean_folder(first), layout.tokens_folder(first)
    names = ["report.json", *(f"{split}.jsonl" for split in SPLITS)]
    files = {f"{clean}/imported/{name}": 2000 for name in names}
    files |= {f"{clean}/{name}": 2000 for name in [*names, "rejects.jsonl"]}
    files |= {f"{tokens}/{split}.arrow": 20_000 for split in SPLITS} | {f"{tokens}/dropped.jsonl": 100}
    files |= {f"{tokens}/report.json": 5000, f"{results}/data/{tokens.name}.json": 5000}
    for each in study.runs:
        files[f"{layout.weights_folder('many', each)}/adapter_model.safetensors"] = weights_kb * 1000
        files |= {f"{results}/{kind}/{each.id}.json": 2000 for kind in ("training", "settings", "provenance")}
        files[f"{results}/history/{each.id}.csv"] = 5000
    for each in study.all_runs:
        files |= {f"{results}/metrics/{each.id}.json": 2000, f"{results}/runs/{each.id}/predictions.jsonl": 40_000}
    for name in fitting(plan_settings(study)):
        files |= {f"{results}/figures/{name}.{kind}": 20_000 for kind in ("pdf", "png", "csv", "json")}
    tables = ("arms.tex", "arms.md", "arms.csv", "settings.tex", "numbers.tex", "provenance.json")
    files |= {f"{results}/tables/{name}": 5000 for name in tables} | {f"{results}/report.html": 500_000}
    files |= {f"{results}/comparison/{name}": 9000 for name in ("arms.tsv", "comparisons.tsv")}
    files[f"{results}/plan.tsv"] = 9000
    for path, size in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(os.urandom(size // 2).hex().encode())
    for each in study.runs:
        outputs = hashes_of(layout.weights_folder("many", each))
        (results / "provenance" / f"{each.id}.json").write_text(json.dumps({"run": each.id, "outputs": outputs}))
    lengths = {"quantiles": {"max": 50}}
    split = {"rows": 20, "label_tokens": 200, "tokens": 400, "prompt_lengths": lengths, "answer_lengths": lengths}
    report = json.dumps({"splits": dict.fromkeys(SPLITS, split)})
    for path in (f"{tokens}/report.json", f"{results}/data/{tokens.name}.json"):
        Path(path).write_text(report)
    rows = ["arm\tlabel\trank\trate\tseeds\trougeL\tloss"]
    rows += [f"{arm.name}\t{arm.label}\t1\t1\t1\t0.5\t2.0" for arm in study.arms]
    (results / "comparison/arms.tsv").write_text("\n".join(rows) + "\n")
    (results / "comparison/comparison.json").write_text(json.dumps({"metric": "rougeL"}))
    (results / "plan.json").write_text(json.dumps({"study": "many"}))
    os.chdir(PROJECT)


if __name__ == "__main__":
    main()
