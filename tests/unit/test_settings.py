"""Recipes: what resolves, what is refused and in which words, and which settings a result hangs on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from finegrid import settings, settings_docs
from finegrid.errors import UserError
from finegrid.library_keys import library_keys
from finegrid.settings import RunSettings, check_files, load_recipe, merge, resolve
from finegrid.yaml_file import read_yaml

PROJECT = Path(__file__).resolve().parents[2]
MODEL = {"model": {"model_name_or_path": "data/models/tiny"}}
MINIMAL = MODEL | {
    "data_config": {"train_file": "data/raw/qa/train.jsonl", "val_file": "data/raw/qa/dev.jsonl"},
    "training_args": {"max_steps": 10},
}


def resolved(change: dict | None = None) -> RunSettings:
    return resolve(merge(MINIMAL, change or {}), place="recipe", project=PROJECT)[0]


def notes(change: dict) -> list[str]:
    return resolve(merge(MINIMAL, change), place="recipe", project=PROJECT)[1]


def problems(change: dict | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolved(change)
    return caught.value.problems


# --- the file that a fine-tuner brings along ---


def test_the_example_recipe_resolves_as_it_stands_given_a_model():
    recipe, told = load_recipe(PROJECT / "tests/data/sft.yaml", PROJECT, MODEL)
    arguments = recipe.training_args
    assert (recipe.max_input_length, recipe.max_output_length) == (256, 512)
    assert (recipe.data_config.train_file, recipe.data_config.val_file) == ("train.jsonl", "dev.jsonl")
    assert arguments["learning_rate"] == 2e-5  # PyYAML reads a text there
    assert arguments["max_steps"] == 3000
    assert arguments["eval_strategy"] == "steps"
    assert arguments["deepspeed"] == "configs/ds_zero_3.json"
    assert recipe.method == "full"
    for key in ("evaluation_strategy", "output_dir", "predict_with_generate", "evaluation.split"):
        assert any(key in note for note in told), key
    assert "evaluation_strategy" not in arguments
    assert "output_dir" not in arguments


def test_the_copy_of_the_example_is_the_example():
    shared = PROJECT.parent / "shared/examples/sft.yaml"
    if not shared.exists():
        pytest.skip("only where the shared folder lies beside the checkout")
    assert (PROJECT / "tests/data/sft.yaml").read_bytes() == shared.read_bytes()


def test_the_example_without_a_model_says_what_is_missing():
    with pytest.raises(UserError) as caught:
        load_recipe(PROJECT / "tests/data/sft.yaml", PROJECT)
    assert [problem.split(": ")[:2] for problem in caught.value.problems] == [
        ["tests/data/sft.yaml", "model.model_name_or_path"]
    ]


def test_missing_files_are_listed_apart_from_resolving():
    recipe, _ = load_recipe(PROJECT / "tests/data/sft.yaml", PROJECT, MODEL)
    missing = check_files(recipe, PROJECT, "sft.yaml")
    for key in (
        "data_config.train_file", "data_config.val_file", "model.model_name_or_path", "training_args.deepspeed"
    ):  # fmt: skip
        assert sum(f"sft.yaml: {key}: " in problem for problem in missing) == 1
    assert len(missing) == 4
    assert "'configs/ds_zero_3.json'" in missing[-1]


@pytest.mark.parametrize("path", sorted((PROJECT / "config/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_resolve_and_their_keys_are_taken_by_the_libraries(path, tmp_path):
    recipe, told = load_recipe(path, PROJECT, MODEL)
    assert not told
    assert recipe.method == {"sft": "full"}.get(path.stem, path.stem)
    assert path.read_text().startswith("#")
    _build_library_objects(recipe, tmp_path)


def _build_library_objects(recipe: RunSettings, folder: Path):
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers import BitsAndBytesConfig, GenerationConfig, Seq2SeqTrainingArguments

    arguments = Seq2SeqTrainingArguments(output_dir=str(folder), **{"use_cpu": True} | recipe.training_args)
    GenerationConfig(**recipe.generation_config)
    if recipe.quantization_config:
        BitsAndBytesConfig(**recipe.quantization_config)
    if recipe.peft_config:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(recipe.peft_config["peft_type"])](
            **{key: value for key, value in recipe.peft_config.items() if key != "peft_type"}
        )
        assert isinstance(config, PeftConfig)
    return arguments


# --- defaults ---


def test_defaults_are_adamw_with_decay_cosine_and_three_percent_warmup(tmp_path):
    arguments = _build_library_objects(resolved({"training_args.max_steps": 1000}), tmp_path)
    assert arguments.optim == "adamw_torch"
    assert arguments.weight_decay == 0.01
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.get_warmup_steps(1000) == 30
    assert arguments.max_grad_norm == 1.0
    assert arguments.seed == arguments.data_seed == 42


def test_a_recipe_overrides_the_defaults_and_the_data_seed_follows_the_seed():
    arguments = resolved({"training_args": {"weight_decay": 0, "warmup_steps": 5, "seed": 7}}).training_args
    assert (arguments["weight_decay"], arguments["warmup_steps"], arguments["data_seed"]) == (0, 5, 7)


def test_peft_defaults_to_lora_for_causal_models_and_null_is_full_fine_tuning():
    assert resolved({"peft_config": {"r": 4}}).peft_config == {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4}
    assert resolved({"peft_config": {}}).method == "lora"
    assert resolved({"peft_config": None}).method == "full"
    assert resolved({"peft_config": {}, "quantization_config": {"load_in_4bit": True}}).method == "qlora"


def test_training_arg_falls_back_to_the_library():
    assert resolved().training_arg("per_device_train_batch_size") == 8
    assert resolved({"training_args.per_device_train_batch_size": 2}).training_arg("per_device_train_batch_size") == 2


# --- numbers and other values, however YAML reads them ---


@pytest.mark.parametrize(
    ("text", "value"), [("2e-5", 2e-5), ("'1e-4'", 1e-4), ("2.0e-5", 2e-5), ("1", 1), (".5", 0.5), ("'0.1'", 0.1)]
)
def test_numbers_are_numbers_however_yaml_reads_them(tmp_path, text, value):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + f"peft_config: {{}}\ngeneration_config: {{temperature: {text}}}\n")
    assert load_recipe(file, PROJECT)[0].generation_config["temperature"] == value


def test_whole_numbers_stay_whole():
    arguments = resolved({"training_args": {"max_steps": "1e3", "save_steps": 20, "eval_steps": 10.0}}).training_args
    assert [arguments[key] for key in ("max_steps", "save_steps", "eval_steps")] == [1000, 20, 10]
    assert all(isinstance(arguments[key], int) for key in ("max_steps", "save_steps", "eval_steps"))


@pytest.mark.parametrize("value", ["true", "yes", "no", 1, 0, "on"])
def test_only_true_and_false_are_truth_values(value):
    found = problems({"training_args.bf16": value})
    assert "training_args.bf16" in found[0]
    assert "expected true or false" in found[0]


@pytest.mark.parametrize("value", ["3000", 2.5, True, "ten", [1]])
def test_a_whole_number_is_neither_a_quoted_one_nor_a_broken_one(value):
    assert "expected a whole number" in problems({"training_args": {"max_steps": value}})[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    assert "expected a number" in problems({"training_args.learning_rate": value})[0]


def test_no_is_a_strategy_and_not_a_truth_value(tmp_path):
    file = tmp_path / "recipe.yaml"
    sections = {key: value for key, value in MINIMAL.items() if key != "training_args"}
    file.write_text(yaml.safe_dump(sections) + "training_args: {max_steps: 1, save_strategy: no}\n")
    assert load_recipe(file, PROJECT)[0].training_args["save_strategy"] == "no"
    assert resolved({"training_args.save_strategy": False}).training_args["save_strategy"] == "no"  # YAML 1.1


def test_null_takes_a_key_back():
    recipe = resolved({"training_args": {"max_steps": None, "num_train_epochs": 2}})
    assert "max_steps" not in recipe.training_args


# --- keys of the libraries ---


def test_the_recorded_keys_are_those_of_the_installed_libraries():
    # In a process of its own: `typing` answers with the order of an equal union that was named before.
    code = "import json; from finegrid.library_keys import introspect; print(json.dumps(introspect()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == library_keys()


def test_every_key_that_finegrid_treats_apart_is_one_of_the_library():
    known = library_keys()["training_args"].keys()
    assert known >= settings.OPERATIONAL
    assert known >= settings.CHECKPOINTS
    assert settings.DEFAULT_ARGS.keys() <= known
    assert set(settings.RENAMED_ARGS.values()) <= known
    assert {new for new, _ in settings.FLAGS_NOW_VALUES.values()} <= known
    assert not settings.REMOVED_ARGS.keys() & known
    still_there = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}  # deprecated aliases
    assert not (settings.RENAMED_ARGS.keys() | settings.FLAGS_NOW_VALUES.keys()) & known - still_there
    for section, bounds in settings.BOUNDED.items():
        keys = library_keys()[section]
        keys = {key for kind in keys.values() for key in kind} if section == "peft_config" else keys.keys()
        assert bounds.keys() <= keys


LORA_FLAGS = {
    "r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear", "bias": "none",
    "use_rslora": True, "use_dora": False, "modules_to_save": ["lm_head"], "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"model.layers.0.q_proj": 4}, "alpha_pattern": {}, "layers_to_transform": None, "lora_bias": False,
    "fan_in_fan_out": False, "exclude_modules": ["k_proj"], "layer_replication": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        LORA_FLAGS,
        {"init_lora_weights": False, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"peft_type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8, "prefix_projection": True},
    ],
    ids=["lora", "dora", "eva", "ia3", "prompt", "prefix"],
)
def test_adapter_settings_are_accepted_and_peft_takes_them(config, tmp_path):
    recipe = resolved({"peft_config": config})
    assert recipe.method == config.get("peft_type", "LORA").lower()
    _build_library_objects(recipe, tmp_path)


@pytest.mark.parametrize("kind", sorted(library_keys()["peft_config"]))
def test_every_method_of_peft_can_be_named(kind):
    needed = {"num_virtual_tokens": 4} if "num_virtual_tokens" in library_keys()["peft_config"][kind] else {}
    assert resolved({"peft_config": {"peft_type": kind, **needed}}).method == kind.lower()


@pytest.mark.parametrize(
    ("section", "key", "value", "hint"),
    [
        ("training_args", "learning_rat", 1e-4, "'learning_rate'"),
        ("training_args", "optim", "adamw_troch", "'adamw_torch'"),
        ("training_args", "lr_scheduler_type", "Cosine", "'cosine'"),
        ("training_args", "save_strategy", "step", "'steps'"),
        ("training_args", "report_to", ["tensorbord"], "'tensorboard'"),
        ("training_args", "learning_rate", -1, "more than 0"),
        ("training_args", "per_device_train_batch_size", 0, "at least 1"),
        ("peft_config", "lora_alpa", 16, "'lora_alpha'"),
        ("peft_config", "bias", "lora", "'lora_only'"),
        ("peft_config", "task_type", "causal_lm", "did you mean 'CAUSAL_LM'?"),
        ("peft_config", "init_lora_weights", "pisa", "'pissa'"),
        ("peft_config", "peft_type", "LORE", "'LORA'"),
        ("peft_config", "eva_config", {"rhoo": 1}, "'rho'"),
        ("peft_config", "r", 8.5, "a whole number"),
        ("quantization_config", "bnb_4bit_quant_type", "nf5", "'nf4'"),
        ("quantization_config", "bnb_4bit_compute_dtype", "torch.bfloat16", "'bfloat16'"),
        ("generation_config", "max_new_token", 5, "'max_new_tokens'"),
        ("generation_config", "temperature", "hot", "a number"),
        ("data_config", "trian_file", "x", "'train_file'"),
        ("data_config", "cleaning", {"near_duplicate": True}, "'near_duplicates'"),
        ("evaluation", "split", "tst", "'test'"),
        ("model", "dtype", "bfloat", "'bfloat16'"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_nearest_right_one(section, key, value, hint):
    found = [problem for problem in problems({section: {key: value}}) if f"recipe: {section}.{key}" in problem]
    assert len(found) == 1
    assert hint in found[0]


def test_keys_of_one_method_are_refused_by_another():
    found = problems({"peft_config": {"peft_type": "IA3", "r": 8}})
    assert any("'r' is no setting of peft_config for IA3" in problem for problem in found)


def test_a_key_at_the_wrong_place_is_sent_to_its_own():
    assert "did you mean 'training_args.learning_rate'?" in problems({"learning_rate": 1e-4})[0]


# --- old names ---


@pytest.mark.parametrize(
    ("old", "value", "new", "expected"),
    [
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("no_cuda", True, "use_cpu", True),
        ("warmup_ratio", 0.1, "warmup_steps", 0.1),
        ("per_gpu_train_batch_size", 2, "per_device_train_batch_size", 2),
        ("gradient_checkpointing", True, "activation_checkpointing", True),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("adafactor", True, "optim", "adafactor"),
    ],
)
def test_old_names_are_read_with_a_note(old, value, new, expected):
    change = {"training_args": {old: value}}
    assert resolved(change).training_args[new] == expected
    assert old not in resolved(change).training_args
    assert any(f"training_args.{old}" in note and new in note for note in notes(change))


def test_a_warmup_ratio_means_the_same_share_to_transformers(tmp_path):
    arguments = _build_library_objects(resolved({"training_args.warmup_ratio": 0.1}), tmp_path)
    assert arguments.get_warmup_steps(500) == 50


@pytest.mark.parametrize("old", ["overwrite_output_dir", "save_safetensors", "fp16_backend", "logging_dir"])
def test_arguments_without_successor_are_dropped_with_a_note(old):
    change = {"training_args": {old: True}}
    assert old not in resolved(change).training_args
    assert any(old in note for note in notes(change))


def test_old_and_new_name_together_are_an_error():
    found = problems({"training_args": {"evaluation_strategy": "steps", "eval_strategy": "epoch"}})
    assert "evaluation_strategy" in found[0]
    assert "keep 'eval_strategy'" in found[0]


def test_a_secret_is_neither_kept_nor_shown():
    change = {"training_args": {"hub_token": "hf_secret", "push_to_hub": True}}
    assert "hub_token" not in resolved(change).training_args
    assert "hf_secret" not in resolved(change).model_dump_json() + "".join(notes(change))


# --- what must hold between settings ---


def test_exactly_one_of_steps_and_epochs_decides():
    both = problems({"training_args": {"max_steps": 10, "num_train_epochs": 3}})
    neither = problems({"training_args": {"max_steps": None}})
    for found in (both, neither):
        assert len(found) == 1
        assert "training_args.max_steps" in found[0]
        assert "training_args.num_train_epochs" in found[0]
    off = resolved({"training_args": {"max_steps": -1, "num_train_epochs": 3}})  # transformers' way of saying none
    assert "max_steps" not in off.training_args


def test_streaming_needs_max_steps():
    change = {"data_config.streaming": True, "training_args": {"max_steps": None, "num_train_epochs": 1}}
    assert "data_config.streaming" in problems(change)[0]
    assert resolved({"data_config.streaming": True}).data_config.streaming


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config: is given without peft_config"),
        ({"peft_config": {}, "quantization_config": {"bnb_4bit_quant_type": "nf4"}}, "load_in_4bit: is not true"),
        ({"training_args": {"bf16": True, "fp16": True}}, "training_args.bf16"),
        ({"training_args": {"load_best_model_at_end": True}}, "needs evaluation"),
        (
            {"training_args": {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "epoch"}},
            "to agree",
        ),
        (
            {
                "training_args": {
                    "load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 25, "eval_steps": 10
                }
            },
            "multiple of eval_steps",
        ),
        ({"training_args": {"save_steps": 10.5}}, "whole number of steps"),
        ({"peft_config": {"peft_type": "PROMPT_TUNING"}}, "num_virtual_tokens"),
        ({"peft_config": {"task_type": "SEQ_CLS"}}, "CAUSAL_LM"),
        ({"peft_config": {"inference_mode": True}}, "peft_config.inference_mode"),
        ({"data_config": {"dataset": {"path": "squad", "revision": "ab" * 20}}}, "exactly one"),
        ({"data_config": {"train_file": None}}, "data_config.train_file: is missing"),
        ({"data_config": {"columns": {"prompt": "q", "answer": "a"}}}, "format: columns"),
        ({"data_config": {"format": "columns", "columns": {"prompt": "q"}}}, "data_config.columns.answer"),
        ({"data_config": {"validation_size": 0.1}}, "data_config.validation_size"),
        ({"data_config": {"val_file": None, "validation_size": 1.5}}, "data_config.validation_size"),
        ({"data_config": {"val_file": None}}, "data_config.test_file: is missing"),
        ({"evaluation.split": "test"}, "evaluation.split"),
        ({"model.model_name_or_path": "org/model"}, "model.revision: is missing"),
        ({"model": {"model_name_or_path": "org/model", "revision": "main"}}, "hash of a commit"),
        ({"data_config": {"train_fraction": 0.5, "max_train_samples": 5}}, "max_train_samples"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_told(change, told):
    assert any(told in problem for problem in problems(change)), problems(change)


def test_evaluation_while_training_needs_validation_rows():
    change = {"data_config": {"val_file": None, "test_file": "t.jsonl"}, "training_args": {"eval_strategy": "steps"}}
    assert any("training_args.eval_strategy" in problem for problem in problems(change))


def test_load_best_model_rules_agree_with_transformers(tmp_path):
    good = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 20, "eval_steps": 10}
    assert _build_library_objects(resolved({"training_args": good}), tmp_path).load_best_model_at_end


@pytest.mark.parametrize("name", ["data/models/x", "./x", "/somewhere/x", "config"])
def test_a_folder_needs_no_revision(name):
    assert resolved({"model.model_name_or_path": name}).model.revision is None


def test_a_hub_model_and_data_set_with_revisions_resolve():
    change = {
        "model": {"model_name_or_path": "org/model", "revision": "0123abcd"},
        "data_config": {
            "train_file": None, "val_file": None,
            "dataset": {"path": "org/qa", "revision": "0123abcd", "test_split": "test", "validation_split": "dev"},
        },
    }  # fmt: skip
    assert resolved(change).dataset_name == "qa"


# --- a file full of mistakes ---


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {model_name_or_path: data/models/x, dtyp: float32}\n"
        "data_config:\n"
        "  train_file: train.jsonl\n"
        "  val_file: dev.jsonl\n"
        "  num_proc: four\n"
        "max_input_lenght: 256\n"
        "training_args:\n"
        "  learning_rat: 2e-5\n"
        "  max_steps: 10\n"
        "  num_train_epochs: 3\n"
        "quantization_config: {load_in_4bit: true}\n"
    )
    with pytest.raises(UserError) as caught:
        load_recipe(file, tmp_path)
    assert caught.value.problems == [
        "recipe.yaml: model.dtyp: 'dtyp' is no setting of model; did you mean 'dtype'? (line 1)",
        "recipe.yaml: data_config.num_proc: the text 'four' found; expected a whole number (line 5)",
        "recipe.yaml: max_input_lenght: 'max_input_lenght' is no setting; did you mean 'max_input_length'? (line 6)",
        "recipe.yaml: training_args.learning_rat: 'learning_rat' is no setting of training_args; "
        "did you mean 'learning_rate'? (line 8)",
        "recipe.yaml: training_args.max_steps: is 10 and training_args.num_train_epochs is 3; "
        "expected exactly one of them to decide (line 9)",
        "recipe.yaml: quantization_config: is given without peft_config, but quantized weights can't be trained; "
        "add a peft_config, or set quantization_config to null (line 11)",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: 1\nb:\n  c: 1\n  c: 2\n", "b.c: given twice, on lines 3 and 4"),
        (b"a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        (b"a: 1\n\tb: 2\n", "line 2"),
        (b"", "the file is empty"),
        (b"- a\n- b\n", "expected 'key: value' lines"),
        (b"a: \xe9t\xe9\n", "no UTF-8"),
        (b"a: !!python/object:os.system x\n", "expected plain values"),
    ],
)
def test_broken_yaml_is_told_with_file_and_line(tmp_path, content, told):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml: ") as caught:
        read_yaml(file, "broken.yaml")
    assert told in str(caught.value)


def test_a_missing_file_is_told():
    with pytest.raises(UserError, match="no such file"):
        load_recipe(Path("config/recipes/nothing.yaml"), PROJECT)


def test_anchors_and_merge_keys_work_as_in_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &x {b: 1, c: 010}\nd: {<<: *x, c: 3}\ne: [yes, null, 1:30, 1_000]\n")
    data, lines = read_yaml(file, "a.yaml")
    assert data == {"a": {"b": 1, "c": 10}, "d": {"b": 1, "c": 3}, "e": ["yes", None, "1:30", 1000]}
    assert lines["d.c"] == 2


# --- laying settings over each other ---


def test_merging_is_deep_null_overwrites_and_another_adapter_replaces():
    base = {"peft_config": {"peft_type": "LORA", "r": 8}, "training_args": {"seed": 1, "max_steps": 2}}
    assert merge(base, {"training_args.seed": 3})["training_args"] == {"seed": 3, "max_steps": 2}
    assert merge(base, {"peft_config": None})["peft_config"] is None
    assert merge(base, {"peft_config.r": 4})["peft_config"] == {"peft_type": "LORA", "r": 4}
    assert merge(base, {"peft_config": {"peft_type": "IA3"}})["peft_config"] == {"peft_type": "IA3"}
    assert base["training_args"]["seed"] == 1
    pattern = {"peft_config": {"rank_pattern": {"model.layers.0": 4}}}  # dots inside are names, not paths
    assert merge(base, pattern)["peft_config"]["rank_pattern"] == {"model.layers.0": 4}


# --- what a result hangs on ---


@pytest.mark.parametrize(
    "change",
    [
        {"training_args.output_dir": "./elsewhere"},
        {"training_args.dataloader_num_workers": 4},
        {"training_args.per_device_eval_batch_size": 1},
        {"training_args.report_to": "tensorboard"},
        {"training_args.logging_steps": 1},
        {"training_args": {"save_steps": 3, "save_total_limit": 2}},
        {"training_args.use_cpu": True},
        {"training_args.disable_tqdm": True},
        {"data_config.num_proc": 4},
        {"data_config.limits.dropped": 0.9},
        {"data_config.name": "mine"},
        {"evaluation.batch_size": 2},
        {"evaluation.generate": False},
        {"generation_config.num_beams": 4},
        {"max_input_length": 512},  # the defaults, spelled out
        {"training_args.learning_rate": "5e-5"},
        {"training_args.weight_decay": 0.01},
        {"data_config.cleaning.nfc": True},
        {"model.dtype": "float32"},
        {"data_config.train_file": "./data/raw/qa/train.jsonl"},
    ],
)
def test_settings_that_no_weight_hangs_on_are_not_canonical(change):
    assert repr(resolved(change).canonical()) == repr(resolved().canonical())


@pytest.mark.parametrize(
    ("change", "reached"),
    [
        ({"data_config.cleaning.nfc": False}, "data tokens training"),
        ({"data_config.max_train_samples": 5}, "data tokens training"),
        ({"data_config.truncation.input": "right"}, "tokens training"),
        ({"max_output_length": 64}, "tokens training"),
        ({"model.chat_template": "t.jinja"}, "tokens training"),
        ({"model.dtype": "bfloat16"}, "training"),
        ({"training_args.learning_rate": 1e-4}, "training"),
        ({"training_args.seed": 1}, "training"),
        ({"training_args.bf16": False}, "training"),  # not said, the machine decides
        ({"peft_config": {}}, "training"),
        ({"generation_config.num_beams": 4}, "evaluation"),
        ({"evaluation.generate": False}, "evaluation"),
    ],
)
def test_a_changed_setting_reaches_the_stages_whose_results_hang_on_it(change, reached):
    before, after = resolved(), resolved(change)
    stages = {
        "data": RunSettings.data_settings,
        "tokens": RunSettings.token_settings,
        "training": RunSettings.training_settings,
        "evaluation": RunSettings.evaluation_settings,
    }
    assert " ".join(name for name, stage in stages.items() if stage(before) != stage(after)) == reached


def test_checkpoints_are_canonical_where_they_choose_the_weights():
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    one, other = resolved({"training_args": best}), resolved({"training_args": best | {"save_steps": 10}})
    assert one.canonical() != other.canonical()


def test_canonical_settings_hold_what_differs_from_the_default_and_nothing_else():
    recipe = resolved({"peft_config": {"target_modules": ["v_proj", "q_proj"], "r": 8, "lora_alpha": 16.0}})
    assert recipe.canonical() == {
        "data_config": {"train_file": "data/raw/qa/train.jsonl", "val_file": "data/raw/qa/dev.jsonl"},
        "model": {"model_name_or_path": "data/models/tiny"},
        "peft_config": {
            "lora_alpha": 16,
            "peft_type": "LORA",
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        },
        "training_args": {
            "data_seed": 42,
            "lr_scheduler_type": "cosine",
            "max_steps": 10,
            "optim": "adamw_torch",
            "warmup_steps": 0.03,
            "weight_decay": 0.01,
        },
    }


def test_settings_survive_a_trip_through_json():
    recipe = resolved({"peft_config": LORA_FLAGS, "data_config.train_fraction": 0.5})
    assert RunSettings.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"train_file": "data/raw/insurance qa/train.jsonl"}, "insurance_qa"),
        ({"train_file": "train.jsonl"}, "data"),
        ({"train_file": ["a/b/one.csv", "a/b/two.csv"]}, "b"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_data_set_has_a_name_fit_for_paths(data, name):
    assert resolved({"data_config": data}).dataset_name == name


# --- documentation and the schema ---


def test_generated_documents_are_up_to_date():
    for name, text in settings_docs.documents().items():
        stale = f"{name} is stale: run python -m finegrid.settings_docs"
        assert (PROJECT / name).read_text(encoding="utf-8") == text, stale


def test_every_key_of_ours_is_explained():
    for key, described in settings.setting_keys().items():
        if not key.startswith(("training_args.", "peft_config.", "quantization_config.", "generation_config.")):
            column = key.startswith("data_config.columns.")
            assert described.get("help") or column, key


def test_the_schemas_take_shipped_files_and_refuse_unknown_keys():
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    schemas = {"recipe.schema.json": settings_docs.recipe_schema(), "study.schema.json": settings_docs.study_schema()}
    registry = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in schemas.items())
    recipe, study = (Draft202012Validator(schema, registry=registry) for schema in schemas.values())
    for path in [*(PROJECT / "config/recipes").glob("*.yaml"), PROJECT / "tests/data/sft.yaml"]:
        recipe.validate(read_yaml(path, path.name)[0])
    for path in (PROJECT / "config/studies").glob("*.yaml"):
        study.validate(read_yaml(path, path.name)[0])
    assert not recipe.is_valid({"training_args": {"learning_rat": 1}})
    assert not recipe.is_valid({"training_args": {"optim": "adamw"}})
    assert not study.is_valid({"factors": {"method": {"full": {"peft_confi": None}}}})


def test_importing_the_settings_is_light():
    code = (
        "import sys; import finegrid.settings, finegrid.study, finegrid.fingerprint, finegrid.settings_docs; "
        "print(sorted({'torch', 'transformers', 'peft', 'pandas', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
