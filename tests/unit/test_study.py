"""Studies: factors to arms to runs, ids that stay, and mistakes told in the user's words."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import yaml
from finegrid.errors import UserError
from finegrid.study import Study, level_name, load_study

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = {
    "data_config": {"train_file": "data/raw/qa/train.jsonl", "val_file": "dev.jsonl", "test_file": "test.jsonl"},
    "training_args": {"max_steps": 10, "learning_rate": 2e-4},
    "peft_config": {"r": 8, "lora_alpha": 16},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
METHODS = {"full": {"peft_config": None}, "lora": {}, "qlora": {"quantization_config": NF4}}
STUDY = {
    "title": "Which method?",
    "recipe": "recipe.yaml",
    "model": {"model_name_or_path": "data/models/tiny"},
    "factors": {"method": METHODS},
    "seeds": [0, 1],
    "compare": {"baseline": {"method": "full"}, "metric": "rougeL", "margin": 0.01},
}


@pytest.fixture
def load(tmp_path):
    """Write a recipe and a study and load them; None in a change takes a key out."""

    def write(change: dict | None = None, recipe: dict | None = None) -> Study:
        (tmp_path / "config/studies").mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe or RECIPE, sort_keys=False))
        study = {key: value for key, value in (STUDY | (change or {})).items() if value is not None}
        (tmp_path / "config/studies/demo.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        return load_study(Path("config/studies/demo.yaml"), tmp_path)

    return write


@pytest.fixture
def problems(load):
    def collect(change: dict | None = None, recipe: dict | None = None) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(change, recipe)
        return caught.value.problems

    return collect


def ids(study: Study) -> set[str]:
    return {run.id for run in study.all_runs}


# --- from factors to runs ---


def test_bundles_become_arms_and_arms_times_seeds_become_runs(load):
    study = load()
    assert (study.name, study.title, study.seeds) == ("demo", "Which method?", (0, 1))
    assert [arm.name for arm in study.arms] == ["full", "lora", "qlora"]
    assert [(run.method, run.seed) for run in study.runs] == list(itertools.product(["full", "lora", "qlora"], [0, 1]))
    assert study.compare.baseline == "full"
    assert (study.compare.metric, study.compare.margin, study.compare.select) == ("rougeL", 0.01, "loss")
    full, lora, qlora = (study.run(arm.runs[0]).settings for arm in study.arms)
    assert full.peft_config is None
    assert lora.peft_config["r"] == qlora.peft_config["r"] == 8
    assert qlora.quantization_config == NF4
    assert [run.settings.training_args["seed"] for run in study.runs] == [0, 1] * 3
    assert [run.settings.training_args["data_seed"] for run in study.runs] == [0, 1] * 3


def test_an_id_is_the_method_and_a_hash_of_the_canonical_settings(load):
    for run in load().runs:
        text = json.dumps(run.settings.canonical(), sort_keys=True, separators=(",", ":"))
        assert run.id == f"{run.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def test_ids_are_pinned():
    # A changed id orphans every result that users have: change these only with a reason to put into the log.
    study = load_study(PROJECT / "tests/data/pinned_study.yaml", PROJECT)
    pinned = json.loads((PROJECT / "tests/data/pinned_ids.json").read_text())
    assert {run.id: [run.data_id, run.tokens_id, run.base_id] for run in study.all_runs} == pinned


def test_new_levels_factors_seeds_and_comparisons_rename_no_run(load):
    before = ids(load())
    full = {"method": "full"}
    rank = {"key": "peft_config.r", "levels": [8, 64]}  # 8 is what the recipe has
    changes = [
        {"factors": {"method": METHODS | {"ia3": {"peft_config": {"peft_type": "IA3"}}}}},
        {"factors": {"method": dict(reversed(METHODS.items()))}},
        {"factors": {"method": METHODS, "rank": rank}, "exclude": [full], "include": [full]},
        {"tune": {"lr": {"key": "training_args.learning_rate", "levels": ["2e-4", 1e-3]}}},
        {"seeds": [2, 1, 0]},
        {"compare": {"metric": "f1"}, "title": "Another question"},
    ]  # fmt: skip
    for change in changes:
        assert before <= ids(load(change)), change


def test_tuned_levels_are_searched_inside_each_arm(load):
    study = load({"tune": {"lr": {"key": "training_args.learning_rate", "levels": ["2e-5", 2e-4]}}})
    assert [arm.name for arm in study.arms] == ["full", "lora", "qlora"]
    assert len(study.runs) == 3 * 2 * 2
    assert [run.tuned for run in study.runs[:4:2]] == [{"lr": "2e-5"}, {"lr": "0.0002"}]
    assert study.runs[0].settings.training_args["learning_rate"] == 2e-5
    assert all(len(arm.runs) == 4 for arm in study.arms)


def test_levels_of_one_key_and_bundles_make_a_grid_in_the_order_of_the_file(load):
    factors = {
        "rank": {"key": "peft_config.r", "levels": [8, 64]},
        "size": {"small": {"training_args.max_steps": 5}, "large": {"training_args": {"max_steps": 50}}},
    }
    study = load({"factors": factors, "compare": {"baseline": {"rank": 8, "size": "small"}}})
    assert [arm.name for arm in study.arms] == ["8-small", "8-large", "64-small", "64-large"]
    assert study.arms[3].factors == {"rank": "64", "size": "large"}
    assert study.arms[3].label == "rank 64, large"
    assert study.run(study.arms[3].runs[0]).settings.training_args["max_steps"] == 50


def test_one_at_a_time_starts_from_the_baseline(load):
    factors = {
        "rank": {"key": "peft_config.r", "levels": [8, 16, 64]},
        "lr": {"key": "training_args.learning_rate", "levels": ["1e-4", "1e-3"]},
    }
    study = load({"factors": factors, "design": "one-at-a-time", "compare": {"baseline": {"rank": 16, "lr": "1e-3"}}})
    # Named by what differs from the baseline.
    assert [arm.name for arm in study.arms] == ["baseline", "rank_8", "rank_64", "lr_0.0001"]
    assert [arm.label for arm in study.arms] == ["Baseline", "rank 8", "rank 64", "lr 0.0001"]
    assert study.arms[1].factors == {"rank": "8", "lr": "0.001"}
    assert study.compare.baseline == "baseline"


def test_a_list_runs_what_it_names(load):
    rank = {"key": "peft_config.r", "levels": [8, 64]}
    study = load(
        {
            "factors": {"method": METHODS, "rank": rank},
            "design": "list",
            "include": [{"method": "full"}, {"rank": 64, "method": "lora"}],
        }
    )
    assert [arm.name for arm in study.arms] == ["full", "lora-64"]
    assert study.arms[0].factors == {"method": "full"}


def test_excluded_combinations_are_left_out_and_a_partial_arm_comes_in(load):
    rank = {"key": "peft_config.r", "levels": [8, 64]}
    study = load(
        {
            "factors": {"method": METHODS, "rank": rank},
            "exclude": [{"method": "full"}, {"method": "qlora", "rank": 64}],
            "include": [{"method": "full"}],
        }
    )
    assert [arm.name for arm in study.arms] == ["lora-8", "lora-64", "qlora-8", "full"]
    assert study.compare.baseline == "full"


def test_arms_with_the_same_settings_share_their_runs(load):
    methods = {"lora": {}, "rank8": {"peft_config.r": 8}, "rank4": {"peft_config.r": 4}}
    study = load({"factors": {"method": methods}, "compare": {}})
    assert len(study.runs) == 4
    assert study.arms[0].runs == study.arms[1].runs
    assert study.runs[0].arms == ("lora", "rank8")
    assert study.compare.baseline == "lora"


def test_a_study_without_factors_is_one_arm(load):
    study = load({"factors": None, "compare": None, "seeds": None, "title": None})
    assert [arm.name for arm in study.arms] == ["lora"]
    assert (study.title, study.seeds) == ("demo", (42,))


def test_settings_of_the_study_lie_over_the_recipe_and_under_the_factors(load):
    study = load(
        {
            "settings": {"max_input_length": 64, "training_args.max_steps": None, "training_args.num_train_epochs": 2},
            "factors": {"method": {"lora": {}, "short": {"max_input_length": 32}}},
            "compare": None,
        }
    )
    lora, short = (study.run(arm.runs[0]).settings for arm in study.arms)
    assert (lora.max_input_length, short.max_input_length) == (64, 32)
    assert "max_steps" not in lora.training_args
    assert study.runs[0].tokens_id != study.runs[2].tokens_id


def test_another_adapter_replaces_the_recipes(load):
    study = load({"factors": {"method": {"lora": {}, "ia3": {"peft_config": {"peft_type": "IA3"}}}}, "compare": None})
    assert study.run(study.arms[1].runs[0]).settings.peft_config == {"peft_type": "IA3", "task_type": "CAUSAL_LM"}


# --- untrained base models ---


def test_runs_share_the_base_run_of_their_model_quantization_and_tokens(load):
    study = load()
    assert [(run.method, run.arms, run.seed) for run in study.base_runs] == [
        ("base", ("base",), None),
        ("base", ("base (nf4)",), None),
    ]
    plain, quantized = study.base_runs
    assert {run.base_id for run in study.runs if run.method != "qlora"} == {plain.id}
    assert {run.base_id for run in study.runs if run.method == "qlora"} == {quantized.id}
    assert quantized.settings.quantization_config == NF4
    assert plain.settings.peft_config is None
    assert plain.id.startswith("base-")
    assert plain.base_id == plain.id
    assert [arm.name for arm in study.base_arms] == ["base", "base (nf4)"]


def test_a_base_run_hangs_on_no_training_setting(load):
    before = {run.id: run.settings for run in load().base_runs}
    after = load({"settings": {"training_args": {"learning_rate": 1, "max_steps": 3}}, "seeds": [5]}).base_runs
    assert {run.id: run.settings for run in after} == before


def test_base_arms_of_different_data_are_told_apart(load):
    factors = {
        "length": {"short": {"max_output_length": 16}, "long": {"max_output_length": 64}},
        "method": METHODS,
    }
    study = load({"factors": factors, "compare": None})
    names = [arm.name for arm in study.base_arms]
    assert names == ["base (short)", "base (nf4, short)", "base (long)", "base (nf4, long)"]


def test_data_and_token_ids_follow_what_they_hang_on(load):
    factors = {
        "rows": {"all": {}, "few": {"data_config.max_train_samples": 10}},
        "length": {"long": {}, "short": {"max_input_length": 16}},
    }
    study = load({"factors": factors, "compare": None, "seeds": [0]})
    all_long, all_short, few_long, few_short = study.runs
    assert all_long.data_id == all_short.data_id != few_long.data_id == few_short.data_id
    assert len({run.tokens_id for run in study.runs}) == 4
    assert {run.dataset for run in study.runs} == {"qa"}


# --- settings of the evaluation ---


def test_evaluation_settings_of_a_recipe_rename_no_run_but_those_of_a_factor_tell_arms_apart(load):
    before = load()
    after = load({"settings": {"generation_config": {"num_beams": 4}, "evaluation": {"language": "en"}}})
    assert ids(before) == ids(after)
    decoding = {"greedy": {}, "beam": {"generation_config.num_beams": 4}}
    study = load({"factors": {"method": METHODS, "decoding": decoding}, "compare": None})
    assert len(study.runs) == 12
    assert ids(before) <= ids(study)
    assert len(study.base_runs) == 4


# --- every setting can be a factor ---

QLORA_RECIPE = RECIPE | {"quantization_config": NF4}


@pytest.mark.parametrize(
    ("key", "levels", "told_by"),
    [
        ("data_config.cleaning.near_duplicates", [False, True], "data_id"),
        ("data_config.cleaning.exact_duplicates", [True, False], "data_id"),
        ("data_config.cleaning.fix_unicode", [True, False], "data_id"),
        ("data_config.cleaning.white_space", [True, False], "data_id"),
        ("data_config.cleaning.leaked_answers", [True, False], "data_id"),
        ("data_config.cleaning.max_answer_chars", [400, None], "data_id"),
        ("data_config.cleaning.near_duplicate_threshold", [0.7, 0.9], "data_id"),
        ("data_config.train_fraction", [0.25, 0.5, 1.0], "data_id"),
        ("data_config.max_train_samples", [100, 1000], "data_id"),
        ("data_config.sample_seed", [0, 1], "data_id"),
        ("data_config.system_prompt", ["Be brief.", None], "data_id"),
        ("data_config.truncation.input", ["left", "middle"], "tokens_id"),
        ("max_input_length", [128, 256], "tokens_id"),
        ("max_output_length", [128, 256], "tokens_id"),
        ("model.chat_template", ["a.jinja", None], "tokens_id"),
        ("model.dtype", ["float32", "bfloat16"], "id"),
        ("training_args.learning_rate", ["1e-5", 1e-4], "id"),
        ("training_args.lr_scheduler_type", ["cosine", "linear", "constant_with_warmup"], "id"),
        ("training_args.warmup_steps", [0, 0.03, 10], "id"),
        ("training_args.optim", ["adamw_torch", "adafactor", "lion_32bit"], "id"),
        ("training_args.weight_decay", [0, 0.1], "id"),
        ("training_args.max_steps", [10, 20], "id"),
        ("training_args.per_device_train_batch_size", [2, 4], "id"),
        ("training_args.activation_checkpointing", [False, True], "id"),
        ("training_args.gradient_checkpointing", [False, True], "id"),
        ("training_args.deepspeed", ["zero2.json", "zero3.json", None], "id"),
        ("training_args.lr_scheduler_kwargs.num_cycles", [1, 2], "id"),
        ("peft_config.r", [8, 64], "id"),
        ("peft_config.use_rslora", [False, True], "id"),
        ("peft_config.use_dora", [False, True], "id"),
        ("peft_config.target_modules", [["q_proj", "v_proj"], "all-linear"], "id"),
        ("peft_config.rank_pattern.q_proj", [4, 16], "id"),
        ("quantization_config.bnb_4bit_quant_type", ["nf4", "fp4"], "base_id"),
        ("quantization_config.bnb_4bit_use_double_quant", [False, True], "base_id"),
        ("generation_config.num_beams", [1, 4], "id"),
        ("evaluation.language", ["en", "zh"], "id"),
        ("gpus", [1, 4], "id"),
        ("nodes", [1, 2], "id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_nested_key_of_any_section_can_be_a_factor(load, key, levels, told_by):
    study = load({"factors": {"x": {"key": key, "levels": levels}}, "compare": None, "seeds": [0]}, QLORA_RECIPE)
    assert [arm.factors["x"] for arm in study.arms] == [level_name(level) for level in levels]
    assert len({run.id for run in study.runs}) == len(levels)
    assert len({getattr(run, told_by) for run in study.runs}) == len(levels)
    if told_by == "id":
        assert len({run.data_id for run in study.runs}) == 1


# --- one effective batch ---


def accumulations(study: Study) -> dict[str, int]:
    return {run.arms[0]: run.settings.training_arg("gradient_accumulation_steps") for run in study.runs}


BATCHES = {"key": "training_args.per_device_train_batch_size", "levels": [1, 4, 16]}


def test_accumulation_is_solved_for_each_arm(load):
    study = load({"factors": {"batch": BATCHES}, "effective_batch_size": 16, "compare": None})
    assert accumulations(study) == {"1": 16, "4": 4, "16": 1}
    gpus = {"one": {}, "four": {"gpus": 4}}
    study = load({"factors": {"gpus": gpus}, "effective_batch_size": 64, "compare": None})
    assert accumulations(study) == {"one": 8, "four": 2}  # transformers' default batch is 8
    nodes = {"one": {"nodes": 1}, "two": {"gpus": 2, "nodes": 2}}
    study = load({"factors": {"nodes": nodes}, "effective_batch_size": 64, "compare": None})
    assert accumulations(study) == {"one": 8, "two": 2}


def test_a_solved_accumulation_names_runs_as_if_it_were_written(load):
    solved = load({"effective_batch_size": 32})
    written = load({"settings": {"training_args.gradient_accumulation_steps": 4}})
    assert ids(solved) == ids(written)
    assert ids(load({"effective_batch_size": 8})) == ids(load())


def test_a_written_accumulation_is_overridden_with_a_note(load):
    study = load({"settings": {"training_args.gradient_accumulation_steps": 2}, "effective_batch_size": 32})
    assert set(accumulations(study).values()) == {4}
    assert study.notes == (
        "config/studies/demo.yaml: effective_batch_size: 32 decides; "
        "'training_args.gradient_accumulation_steps: 2' is overridden (line 24)",
    )
    same = load({"settings": {"training_args.gradient_accumulation_steps": 4}, "effective_batch_size": 32})
    assert not same.notes


@pytest.mark.parametrize(
    ("wanted", "batches", "nearest"),
    [(50, [8], "48 or 56"), (6, [8], "8, or a smaller"), (50, [8, 12], "48 or 72"), (30, [6, 4], "24 or 36")],
)
def test_an_impossible_effective_batch_names_the_nearest_that_all_arms_can_have(problems, wanted, batches, nearest):
    factors = {"batch": BATCHES | {"levels": batches}}
    told = problems({"factors": factors, "effective_batch_size": wanted, "compare": None})
    assert len(told) == sum(wanted % batch > 0 for batch in batches)
    for problem in told:
        assert "effective_batch_size: " in problem
        assert f"nearest possible: {nearest}" in problem


def test_an_effective_batch_and_a_factor_of_the_accumulation_exclude_each_other(problems):
    factors = {"steps": {"key": "training_args.gradient_accumulation_steps", "levels": [1, 2]}}
    told = problems({"factors": factors, "effective_batch_size": 16, "compare": None})
    assert len(told) == 1
    assert "'steps' sets 'training_args.gradient_accumulation_steps'; expected one of them" in told[0]


# --- tuned levels of some arms ---

RATES = {
    "key": "training_args.learning_rate",
    "levels": ["1e-4", "2e-4", "4e-4"],
    "in_arms": [
        {"arms": {"method": "full"}, "levels": ["1e-5", "2e-5"]},
        {"arms": {"method": "full", "rank": 64}, "levels": ["5e-6"]},
    ],
}


def test_arms_search_levels_of_their_own(load):
    study = load({"tune": {"lr": RATES | {"in_arms": RATES["in_arms"][:1]}}, "seeds": [0]})
    searched = {}
    for run in study.runs:
        searched.setdefault(run.arms[0], {})[run.tuned["lr"]] = run.settings.training_args["learning_rate"]
    lora = {"0.0001": 1e-4, "0.0002": 2e-4, "0.0004": 4e-4}
    assert searched == {"full": {"1e-5": 1e-5, "2e-5": 2e-5}, "lora": lora, "qlora": lora}


def test_the_last_entry_that_fits_an_arm_counts(load):
    factors = {"method": {"full": {}, "lora": {}}, "rank": {"key": "peft_config.r", "levels": [8, 64]}}
    study = load({"factors": factors, "tune": {"lr": RATES}, "seeds": [0], "compare": None})
    counts = {arm.name: len(arm.runs) for arm in study.arms}
    assert counts == {"full-8": 2, "full-64": 1, "lora-8": 3, "lora-64": 3}


@pytest.mark.parametrize(
    ("in_arms", "told"),
    [
        ({"method": "full"}, "in_arms: a mapping found; expected a list of {arms: {factor: level}, levels: [...]}"),
        (["full"], "in_arms[0]: the text 'full' found; expected {arms"),
        ([{"arms": {"method": "full"}}], "in_arms[0]: a mapping with arms found; expected {arms"),
        ([{"arms": {"method": "ful"}, "levels": [1]}], "in_arms[0].arms.method: 'ful' is no level of 'method'; did"),
        ([{"arms": {"kind": "full"}, "levels": [1]}], "in_arms[0].arms.kind: 'kind' is no factor"),
        ([{"arms": {"method": "full"}, "levels": []}], "in_arms[0].levels: is empty; expected at least one value"),
        ([{"arms": {"method": "full"}, "levels": ["x"]}], "in_arms[0].levels 'x': training_args.learning_rate: the"),
    ],
)
def test_mistakes_in_the_levels_of_some_arms_are_told(problems, in_arms, told):
    found = problems({"tune": {"lr": RATES | {"in_arms": in_arms}}})
    assert any(f"tune.lr.{told}" in problem for problem in found), found


def test_levels_for_an_arm_that_was_excluded_are_told(problems):
    change = {"exclude": [{"method": "full"}], "compare": None, "tune": {"lr": RATES | {"in_arms": [
        {"arms": {"method": "full"}, "levels": [1e-5]}]}}}  # fmt: skip
    assert "{method: full} fits no arm of this study" in problems(change)[0]


def test_only_a_tuned_factor_has_levels_of_some_arms(problems):
    told = problems({"factors": {"method": METHODS, "lr": RATES}, "compare": None})
    assert any("factors.lr.in_arms: 'in_arms' is unknown here; only a tuned factor has it" in one for one in told)


# --- hardware ---


def test_hardware_is_the_studys_and_renames_nothing(load):
    assert load().hardware is None
    own = {"name": "mine", "memory": "24GB", "bf16_tflops": 100}
    study = load({"hardware": {"gpus": ["rtx-4090", own]}})
    assert study.hardware == ("rtx-4090", own)
    assert load({"hardware": {"gpus": []}}).hardware == ()
    assert ids(study) == ids(load())


def test_mistakes_in_the_hardware_are_told(problems):
    assert (
        "hardware.gpu: 'gpu' is no setting of hardware; did you mean 'gpus'?" in problems({"hardware": {"gpu": []}})[0]
    )
    assert "hardware.gpus: the text 'a100' found; expected a list" in problems({"hardware": {"gpus": "a100"}})[0]
    assert "hardware.gpus[0]: 3 found; expected a GPU's name" in problems({"hardware": {"gpus": [3]}})[0]
    assert "did you mean 'rtx-4090'?" in problems({"hardware": {"gpus": ["rtx-490"]}})[0]
    assert "hardware.gpus[0]: memory '24'" in problems({"hardware": {"gpus": [{"name": "mine", "memory": 24}]}})[0]


# --- early stopping ---

STOPPING = {
    "early_stopping": {"patience": 3},
    "training_args": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True},
}


def test_early_stopping_tells_runs_apart_and_base_runs_not(load):
    study = load({"factors": {"stop": {"no": {}, "yes": STOPPING}}, "compare": None, "seeds": [0]})
    assert study.runs[1].settings.early_stopping.patience == 3
    assert study.runs[1].settings.canonical()["early_stopping"] == {"patience": 3}
    assert len(study.base_runs) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"early_stopping": {}}, "early_stopping.patience: is missing"),
        ({"early_stopping": {"patience": 0}}, "expected at least 1"),
        ({"early_stopping": {"patience": 3, "threshhold": 1}}, "did you mean 'threshold'?"),
        ({"training_args": {"eval_strategy": "steps"}}, "needs training_args.load_best_model_at_end: true"),
        ({"training_args": {}}, "early_stopping: needs evaluations to stop by"),
    ],
)
def test_mistakes_in_early_stopping_are_told(problems, change, told):
    found = problems({"settings": STOPPING | change})
    assert any(told in problem for problem in found), found


# --- mistakes ---


def test_a_factor_of_an_unknown_key_is_told_as_the_style_asks(problems):
    factors = {"learning_rate": {"key": "training_args.learning_rat", "levels": [1e-4]}}
    told = problems({"factors": factors, "compare": None})
    assert told == [
        "config/studies/demo.yaml: factors.learning_rate.key: 'training_args.learning_rat' is no setting; "
        "did you mean 'training_args.learning_rate'? (line 7)"
    ]


RANK = {"key": "peft_config.r", "levels": [8, 64]}
LEARNING_RATE = {"key": "training_args.learning_rate", "levels": [1e-4, 1e-3]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"facters": {}}, "'facters' is no setting; did you mean 'factors'?"),
        ({"recipe": "recipes/none.yaml"}, "recipe: there is no 'recipes/none.yaml'"),
        ({"model": {"model_name": "x"}}, "did you mean 'model_name_or_path'?"),
        ({"settings": {"training_args.max_step": 1}}, "settings.training_args.max_step"),
        ({"design": "gird"}, "did you mean 'grid'?"),
        ({"seeds": []}, "seeds: is empty"),
        ({"seeds": [1, 1]}, "has a seed twice"),
        ({"seeds": [-1]}, "seeds: -1 found"),
        ({"seeds": ["one"]}, "a list of whole numbers"),
        ({"factors": {"method": 3}}, "factors.method: 3 found"),
        ({"factors": {"method": {"lora": 3}}}, "factors.method.lora: 3 found"),
        ({"factors": {"method": {"lora": {"peft_config.rr": 3}}}}, "factors.method.lora.peft_config.rr"),
        ({"factors": {"method": {"lora": {"peft_config.r": "x"}}}}, "factors.method.lora.peft_config.r"),
        ({"factors": {"rank": {"key": "peft_config.r", "level": [1]}}}, "did you mean 'levels'?"),
        ({"factors": {"rank": {"key": "peft_config.r", "levels": []}}}, "factors.rank.levels"),
        ({"factors": {"rank": {"key": "peft_config.r", "levels": [8, "big"]}}}, "a whole number"),
        ({"factors": {"rank": {"key": "peft_config.r", "levels": [8, 8]}}}, "'8' is given twice"),
        ({"factors": {"rank": RANK, "rank2": RANK}}, "sets 'peft_config.r', which 'factors.rank' sets too"),
        ({"factors": {"method": METHODS}, "tune": {"method": RANK}}, "is the name of a factor too"),
        ({"factors": {"s": {"key": "training_args.seed", "levels": [1, 2]}}}, "which 'seeds' sets too"),
        ({"factors": {"a": {"x": {}, "y": {}}}}, "factors.a: changes nothing"),
        ({"factors": {"p": {"key": "data_config.num_proc", "levels": [1, 4]}}}, "factors.p: changes nothing"),
        ({"tune": {"p": {"key": "data_config.num_proc", "levels": [1, 4]}}}, "tune.p: changes nothing"),
        ({"factors": {"method": METHODS, "rank": RANK}}, "exclude: [{method: full}]"),
        ({"factors": {"rank": RANK, "method": METHODS}}, "exclude: [{method: full}]"),
        ({"factors": {"m": {"full": {"peft_config": None, "quantization_config": NF4}}}}, "arm full: quantization"),
        ({"exclude": [{"method": "lora"}, {"method": "full"}, {"method": "qlora"}]}, "leaves no arm"),
        ({"exclude": [{"method": "lor"}]}, "did you mean 'lora'?"),
        ({"exclude": [{"methods": "lora"}]}, "did you mean 'method'?"),
        ({"exclude": ["lora"]}, "expected {factor: level}"),
        ({"design": "list"}, "include: is missing"),
        ({"factors": {"a": {"x-y": {}, "x": RECIPE}, "b": {"z": {}, "y-z": {"max_input_length": 9}}}}, "them apart"),
        ({"factors": {"a": {"base": {}}}}, "which is the untrained model's"),
        ({"compare": {"baseline": {"method": "lore"}}}, "compare.baseline.method: 'lore' is no level"),
        ({"compare": {"baseline": "lore"}}, "'lore' is no arm; did you mean 'lora'?"),
        ({"compare": {"baseline": {}}}, "matches 3 arms"),
        ({"compare": {"metric": "rouge"}}, "compare.metric"),
        ({"compare": {"margin": -1}}, "at least 0"),
        ({"title": 3}, "title: 3 found; expected a text"),
    ],
)  # fmt: skip
def test_mistakes_are_told(problems, change, told):
    change = {"compare": None} | change if "factors" in change else change
    found = problems(change)
    assert any(told in problem for problem in found), found
    assert all(problem.startswith("config/studies/demo.yaml: ") for problem in found)


def test_a_mistake_in_the_recipe_names_the_recipe_and_shows_beside_those_of_the_study(problems):
    found = problems({"seeds": []}, recipe=RECIPE | {"max_input_lenght": 3})
    assert len(found) == 2
    assert any(problem.startswith("recipe.yaml: max_input_lenght") for problem in found)


def test_a_baseline_that_was_excluded_is_told(problems):
    found = problems({"exclude": [{"method": "full"}]})
    assert any("compare.baseline" in problem and "is no arm of this study" in problem for problem in found)


def test_tuning_needs_validation_rows(problems):
    recipe = RECIPE | {"data_config": {"train_file": "train.jsonl", "test_file": "test.jsonl"}}
    assert any(
        "tune: chooses by the validation loss" in told for told in problems({"tune": {"lr": LEARNING_RATE}}, recipe)
    )


def test_an_unknown_run_is_told(load):
    with pytest.raises(UserError, match="is no run of this study"):
        load().run("lora-00000000")


# --- size ---


def test_a_thousand_runs_have_a_thousand_ids(load):
    factors = {
        "rank": {"key": "peft_config.r", "levels": [4, 8, 16, 32, 64]},
        "alpha": {"key": "peft_config.lora_alpha", "levels": [8, 16, 32, 64, 128]},
        "decay": {"key": "training_args.weight_decay", "levels": [0, 0.01]},
    }
    tune = {"lr": {"key": "training_args.learning_rate", "levels": ["1e-5", "1e-4", "2e-4", "1e-3"]}}
    study = load({"factors": factors, "tune": tune, "seeds": [0, 1, 2, 3, 4], "compare": None})
    assert len(ids(study)) == 1000 + 1
    assert len(study.arms) == 50


# --- names, and what is shipped ---


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("2e-5", "2e-5"), (2e-5, "2e-5"), (0.001, "0.001"), ("1e-3", "0.001"), (8, "8"), (8.0, "8"), (1e20, "1e20"),
        (None, "none"), (True, "true"), (["q_proj", "v_proj"], "q_proj+v_proj"), ("all-linear", "all-linear"),
        ("config/deepspeed/zero3.json", "config_deepspeed_zero3.json"), ({"a": 1}, "a=1"),
    ],
)  # fmt: skip
def test_levels_have_short_names(value, name):
    assert level_name(value) == name


@pytest.mark.parametrize("path", sorted((PROJECT / "config/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_resolve(path):
    study = load_study(path, PROJECT)
    assert study.name == path.stem
    assert study.runs
    assert path.read_text().startswith("#")


def test_the_demo_compares_three_methods_with_two_seeds_at_rates_that_suit_them():
    study = load_study(Path("config/studies/insurance.yaml"), PROJECT)
    rates = {run.method: run.settings.training_args["learning_rate"] for run in study.runs}
    assert rates == {"full": 5e-5, "lora": 1e-3, "qlora": 1e-3}
    assert len(study.seeds) >= 2
    assert not study.notes
    assert [arm.name for arm in study.base_arms] == ["base", "base (nf4)"]
