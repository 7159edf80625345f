"""dvc.yaml and the study files, what add-data makes of a user's files, and the records that git keeps of jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finegrid import add_data, provenance, records, verify, versions
from finegrid.errors import UserError

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=check)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(project, tmp_path, monkeypatch) -> Path:
    """A project under DVC, without git, with the shipped studies."""
    shutil.copytree(project / "config", tmp_path / "config")
    (tmp_path / ".dvc").mkdir()
    config = (project / ".dvc/config").read_text()
    (tmp_path / ".dvc/config").write_text(config.replace("[core]", "[core]\n    no_scm = true"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- dvc.yaml


def test_dvc_yaml_is_that_of_the_studies_that_snakemake_reads(project):
    assert (project / "dvc.yaml").read_text() == versions.pipeline(versions.all_studies(project)), "run `finegrid dvc`"


def test_every_study_is_a_stage_that_dvc_knows_and_a_new_one_needs_one_command(folder):
    study = (folder / "config/studies/insurance.yaml").read_text()
    (folder / "config/studies/mine.yaml").write_text(study)
    run(folder, "finegrid", "dvc")
    stages = run(folder, "dvc", "stage", "list", "--name-only").stdout.split()
    studies = {path.stem for path in (folder / "config/studies").glob("*.yaml")}
    assert {name.partition("@")[2] for name in stages if name.startswith("study@")} == studies
    assert "mine" in studies
    assert run(folder, "finegrid", "dvc").stdout == "dvc.yaml is that of config/studies already\n"


def test_outputs_outlive_their_stage_and_git_keeps_the_small_ones(project):
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for entry in stage.get("do", stage)["outs"]:
            assert next(iter(entry.values()))["persist"] is True
    study = stages["study"]["do"]
    cached = [path for entry in study["outs"] for path, how in entry.items() if how.get("cache", True)]
    assert cached == ["results/${key}/runs"]


def test_a_stale_dvc_yaml_stops_the_build_before_anything_runs(folder):
    (folder / "dvc.yaml").write_text("stages: {}\n")
    done = run(folder, "finegrid", "build", "insurance", check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "error: dvc.yaml: not that of the studies in config/studies; run `finegrid dvc`, then this again\n"
    )
    done = run(folder, "finegrid", "build", "insurence", check=False)
    assert "did you mean 'insurance'" in done.stderr
    done = run(folder, "finegrid", "build", "data/tokens/none-00000000", check=False)
    assert "no study of config/studies uses data/tokens/none-00000000" in done.stderr


def test_page_of_dvc_plots_fits_figures_beside_each_other(project):
    from dvc.config import Config
    from dvc_render.html import HTML

    template = project / ".dvc" / Config(project / ".dvc")["plots"]["html_template"]
    page = HTML(template.read_text()).with_scripts("<script></script>").with_element("<img>").embed()
    assert "<img>" in page
    assert "<script></script>" in page
    assert "max-width: 46vw" in page


def test_profile_is_a_parameter(folder):
    assert versions._profile() == []
    (folder / "params.yaml").write_text("profile: slurm\n")
    assert versions._profile() == ["--profile", "slurm"]


# ---------------------------------------------------------------- add-data


def test_own_files_are_checked_versioned_and_named_in_a_recipe(folder, tmp_path):
    train = write_rows(tmp_path / "mine/sums_train.jsonl", ROWS)
    dev = write_rows(tmp_path / "mine/sums_dev.jsonl", ROWS[:4])
    said: list[str] = []
    add_data.add_data("sums", [train, dev], {}, {}, Path("config/recipes/lora.yaml"), said.append)
    assert "20 rows, columns (prompt: question, answer: answer)" in said[0]
    recipe = yaml.safe_load((folder / "config/recipes/sums.yaml").read_text())
    assert recipe["data_config"] == {
        "train_file": "data/raw/sums/sums_train.jsonl",
        "val_file": "data/raw/sums/sums_dev.jsonl",
        "test_size": 0.1,
    }
    lora = yaml.safe_load((folder / "config/recipes/lora.yaml").read_text())
    assert recipe | {"data_config": None} == lora | {"data_config": None}
    first = yaml.safe_load((folder / "data/raw/sums/sums_train.jsonl.dvc").read_text())["outs"][0]["md5"]

    write_rows(train, ROWS[:10])
    said.clear()
    add_data.add_data("sums", [train, dev], {}, {}, Path("config/recipes/lora.yaml"), said.append)
    assert any("sums_train.jsonl: a new version" in line for line in said)
    assert said[-1] == "add-data sums: config/recipes/sums.yaml names these files already"
    assert yaml.safe_load((folder / "data/raw/sums/sums_train.jsonl.dvc").read_text())["outs"][0]["md5"] != first


def test_files_that_the_import_could_not_read_are_refused_and_not_kept(folder, tmp_path):
    broken = write_rows(tmp_path / "mine/train.jsonl", [*ROWS[:3], {"question": "What?"}])
    with pytest.raises(UserError, match=r"mine/train\.jsonl:4: .*answer"):
        add_data.add_data("sums", [broken], {}, {}, Path("config/recipes/lora.yaml"))
    assert not (folder / "data").exists()
    with pytest.raises(UserError, match=r"other\.jsonl: no split shows in its name"):
        add_data.add_data("sums", [broken, tmp_path / "mine/other.jsonl"], {}, {}, Path("config/recipes/lora.yaml"))
    with pytest.raises(UserError, match="no such file"):
        add_data.add_data("sums", [tmp_path / "train.csv"], {}, {}, Path("config/recipes/lora.yaml"))
    with pytest.raises(UserError, match="mine: a folder; expected a file"):
        add_data.add_data("sums", [tmp_path / "mine"], {}, {}, Path("config/recipes/lora.yaml"))
    with pytest.raises(UserError, match="is no name of a data set"):
        add_data.add_data("a/b", [broken], {}, {}, Path("config/recipes/lora.yaml"))
    with pytest.raises(UserError, match="there is no recipe"):
        add_data.add_data("sums", [broken], {}, {}, Path("none.yaml"))


def test_what_a_file_does_not_tell_is_an_option_and_goes_into_the_recipe(folder, tmp_path):
    chinese = tmp_path / "mine/train.csv"
    chinese.parent.mkdir()
    chinese.write_bytes(("asked,told\n" + "".join(f"何时 {n}？,今天\n" for n in range(20))).encode("gb18030"))
    recipe = Path("config/recipes/lora.yaml")
    with pytest.raises(UserError, match="`--encoding NAME` sets"):
        add_data.add_data("zh", [chinese], {}, {}, recipe)
    with pytest.raises(UserError, match="`--prompt NAME --answer NAME` sets"):
        add_data.add_data("zh", [chinese], {}, {"encoding": "gb18030"}, recipe)
    options = ("--encoding", "gb18030", "--prompt", "asked", "--answer", "told")
    run(folder, "finegrid", "add-data", "zh", str(chinese), *options)
    written = yaml.safe_load((folder / "config/recipes/zh.yaml").read_text())["data_config"]
    assert (written["encoding"], written["columns"]) == ("gb18030", {"prompt": "asked", "answer": "told"})


# ---------------------------------------------------------------- records


RESULT, SOURCE, TOKENS = "results/s/metrics/r.json", "data/raw/train.jsonl", "data/tokens/t/train.arrow"
DROPPED = "data/tokens/t/dropped.jsonl"


@pytest.fixture
def recorded(folder) -> Path:
    """Two jobs as Snakemake remembers them, written to git's records; the memory is then lost, as in a clone."""
    from snakemake.persistence import MetadataRecord
    from snakemake.persistence.file import FilePersistence

    for path in (RESULT, SOURCE, TOKENS, DROPPED, "results/s/plan.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    store = FilePersistence(nolock=True)
    digest = f"sha256:{records.file_hash(Path(SOURCE))}"
    job = {"rule": "tokenise", "params": ["'1'"], "record_format_version": 6}
    for path in (TOKENS, DROPPED):  # of one job; nothing reads the second
        store._write_record(path, MetadataRecord(**job, input=[SOURCE], input_checksums={SOURCE: digest}))
    digest = f"sha256:{records.file_hash(Path(TOKENS))}"
    job = {"rule": "evaluate", "params": ["'2'"], "record_format_version": 6}
    store._write_record(RESULT, MetadataRecord(**job, input=[TOKENS], input_checksums={TOKENS: digest}))
    records.write("s")
    shutil.rmtree(".snakemake")
    return folder


def test_records_put_back_are_those_that_snakemake_wrote(recorded):
    assert records.put_back("s") == ["study s: took over 2 finished jobs from results/s/jobs.jsonl"]
    record = records._persistence()._read_record(RESULT)
    assert (record.rule, record.params, record.input) == ("evaluate", ["'2'"], [TOKENS])
    assert record.input_checksums == {TOKENS: f"sha256:{records.file_hash(Path(TOKENS))}"}
    assert records._persistence()._read_record(DROPPED).input == [SOURCE]
    assert records.put_back("s") == []  # until git brings others
    text = records.records_file("s").read_text()
    records.write("s")
    assert records.records_file("s").read_text() == text


def test_a_result_that_is_another_file_stops_and_nothing_is_taken_over(recorded):
    Path(RESULT).write_text("another")
    with pytest.raises(UserError, match=f"{RESULT}: not the file that results/s/jobs.jsonl tells of"):
        records.put_back("s")
    assert records._persistence()._read_record(TOKENS) is None
    Path(RESULT).unlink()
    assert len(records.put_back("s")) == 1


def test_a_changed_source_gets_a_new_date_so_that_snakemake_compares_it(recorded):
    Path(SOURCE).write_text("another")
    os.utime(SOURCE, (0, 0))
    assert records.put_back("s")[1] == f"{SOURCE}: not the version that study s was made from"
    assert os.stat(SOURCE).st_mtime > 0


def test_damaged_records_are_named_with_their_line(recorded):
    with records.records_file("s").open("a") as file:
        file.write("<<<<<<< HEAD\n")
    with pytest.raises(UserError, match=r"results/s/jobs\.jsonl:3: not a record of a job"):
        records.put_back("s")


# ---------------------------------------------------------------- verify


def test_metrics_are_held_to_the_record_within_the_tolerance_and_costs_are_not():
    before = {"splits": {"test": {"loss": 2.0, "corpus_bleu": 10.0, "examples": 8}}, "generation": {"seconds": 3.0}}
    now = {"splits": {"test": {"loss": 2.01, "corpus_bleu": 11.0, "examples": 8}}, "generation": {"seconds": 9.0}}
    assert list(verify._differences(before, now, 0.02)) == []
    assert list(verify._differences(before, now, 0.0)) == [
        "splits.test.corpus_bleu: 10.0 on record, 11.0 now",
        "splits.test.loss: 2.0 on record, 2.01 now",
    ]
    now["splits"]["test"]["examples"] = 9
    assert list(verify._differences(before, now, 0.02)) == ["splits.test.examples: 8 on record, 9 now"]


# ---------------------------------------------------------------- provenance


def test_what_is_drawn_again_of_the_same_keeps_its_record(tmp_path):
    (tmp_path / "plan.json").write_text("1")
    record, inputs = tmp_path / "quality.json", {"plan": Path("plan.json")}
    made_at = {"commit": "c0ffee", "dirty": False}
    provenance.write(record, tmp_path, inputs=inputs, made_at=made_at, keep=True, command="snakemake's")
    before = record.read_bytes()
    provenance.write(record, tmp_path, inputs=inputs, made_at=made_at, keep=True, command="mine")
    assert record.read_bytes() == before
    (tmp_path / "plan.json").write_text("2")
    provenance.write(record, tmp_path, inputs=inputs, made_at=made_at, keep=True, command="mine")
    assert json.loads(record.read_text())["command"] == "mine"


def test_runs_trained_on_different_versions_of_a_file_are_not_compared(tmp_path):
    versions_of = {"a": {"train.jsonl": "1" * 64}, "b": {"train.jsonl": "2" * 64, "test.jsonl": "3" * 64}, "old": {}}
    for name, files in versions_of.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"data_version": files}))
    made = {name: tmp_path / f"{name}.json" for name in ("a", "b", "old", "absent")}
    (problem,) = provenance.other_versions(made)
    assert problem.startswith("run b: trained on version 222222222222 of train.jsonl, but a on 111111111111")
    assert provenance.other_versions({"a": made["a"], "old": made["old"]}) == []
