"""The memory model against transformers' and peft's own counts, and against all live tensors of real training steps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from calls import counted_calls
from finegrid.errors import UserError
from finegrid.memory import (
    ALLOCATOR,
    allocator,
    evaluation_memory,
    shape_of,
    trainable_parameters,
    training_memory,
)
from finegrid.settings import RunSettings, resolve
from finegrid.shapes import model_shapes
from live_memory import LiveMemory

TINY = {
    "vocab_size": 4000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILY_KEYS = {
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
LORA = {"r": 8, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
METHODS = {
    "full": {},
    "lora": {"peft_config": LORA},
    "lora, dropout": {"peft_config": {**LORA, "lora_dropout": 0.1}},
    "dora": {"peft_config": {**LORA, "use_dora": True}},
    "dora, dropout": {"peft_config": {**LORA, "use_dora": True, "lora_dropout": 0.1}},
    "ia3": {"peft_config": {"peft_type": "IA3"}},
    "qlora": {"peft_config": LORA, "quantization_config": NF4},
    "qlora, dropout": {"peft_config": {**LORA, "lora_dropout": 0.1}, "quantization_config": NF4},
    "qdora, dropout": {"peft_config": {**LORA, "use_dora": True, "lora_dropout": 0.1}, "quantization_config": NF4},
}
# Published by their authors; the code of these models is not in transformers.
REMOTE = {"zai-org/chatglm3-6b": 6_243_584_000, "zai-org/glm-4-9b-chat": 9_399_951_360}


def settings_of(model: dict | None = None, gpus: int = 1, validation: bool = False, **sections) -> RunSettings:
    """Return settings; training arguments as ``training_args={…}``."""
    sections["training_args"] = {"max_steps": 2, **sections.get("training_args", {})}
    mapping = {
        "model": {"model_name_or_path": "data/models/tiny", **(model or {})},
        "data_config": {"train_file": "train.jsonl", "test_size": 1, **({"validation_size": 1} if validation else {})},
        "gpus": gpus,
        **sections,
    }
    return resolve(json.loads(json.dumps(mapping)), place="test", project=Path())[0]


# ---------------------------------------------------------------- parameters


# One hub id for each distinct shape.
SHAPES = {json.dumps(entry["config"], sort_keys=True): hub_id for hub_id, entry in model_shapes().items()}


@pytest.mark.parametrize("hub_id", sorted(SHAPES.values()))
def test_parameters_are_those_that_transformers_counts(hub_id: str):
    config = model_shapes()[hub_id]["config"]
    published = REMOTE.get(hub_id.replace("THUDM", "zai-org"))
    assert shape_of(config).parameters == (published or meta_model(config).num_parameters())


@pytest.mark.parametrize(
    "peft",
    [
        {"r": 8, "target_modules": "all-linear"},
        {"r": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
        {"r": 8, "target_modules": r".*\.layers\.[01]\.mlp\.(up|down)_proj"},
        {"r": 8, "target_modules": "all-linear", "rank_pattern": {"q_proj": 32, r"layers\.1\.mlp\.up_proj": 2}},
        {"r": 8, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"r": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"r": 8, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"r": 8},
        {"peft_type": "IA3"},
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_trainable_parameters_are_those_that_peft_counts(family: str, peft: dict):
    from finegrid.training.model import attach_adapter

    config = {"model_type": family, **TINY, "tie_word_embeddings": False}
    settings = settings_of(peft_config=peft)
    model = attach_adapter(settings, meta_model(config))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable_parameters(settings, shape_of(config)) == trainable


def test_full_fine_tuning_trains_every_parameter():
    shape = shape_of({"model_type": "llama", **TINY})
    assert trainable_parameters(settings_of(), shape) == shape.parameters


def test_an_unknown_architecture_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'qwen3'"):
        shape_of({"model_type": "qwen33", **TINY})


def test_a_missing_width_is_named():
    with pytest.raises(UserError, match="hidden_size"):
        shape_of({"model_type": "llama", **{key: value for key, value in TINY.items() if key != "hidden_size"}})


def meta_model(config: dict):
    """Return transformers' model of a config without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))


# ---------------------------------------------------------------- a step, against its live tensors

CASES = [
    ("llama", "full", "fp32", False, {}),
    ("llama", "full", "fp32", True, {}),
    ("llama", "full", "autocast", False, {}),
    ("llama", "full", "autocast", True, {}),
    ("llama", "full", "bf16", False, {}),
    ("llama", "full", "fp32", False, {"gradient_accumulation_steps": 2}),
    ("llama", "full", "autocast", True, {"gradient_accumulation_steps": 2}),
    ("llama", "full", "fp32", True, {"optim": "adamw_torch_fused"}),
    ("llama", "full", "fp32", True, {"optim": "adafactor"}),
    ("llama", "full", "fp32", True, {"optim": "sgd"}),
    ("llama", "full", "fp32", True, {"optim": "lion_32bit"}),
    ("llama", "full", "fp32", True, {"optim": "adamw_8bit"}),
    ("llama", "lora", "fp32", False, {}),
    ("llama", "lora", "fp32", True, {}),
    ("llama", "lora", "autocast", False, {}),
    ("llama", "lora", "bf16", False, {}),
    ("llama", "lora, dropout", "fp32", False, {}),
    ("llama", "lora, dropout", "autocast", True, {}),
    ("llama", "dora", "fp32", False, {}),
    ("llama", "dora, dropout", "bf16", False, {}),
    ("llama", "dora", "autocast", True, {}),
    ("llama", "ia3", "fp32", False, {}),
    ("llama", "qlora", "fp32", False, {}),
    ("llama", "qlora", "fp32", True, {}),
    ("llama", "qlora", "autocast", False, {}),
    ("llama", "qlora, dropout", "fp32", False, {}),
    ("llama", "qdora, dropout", "fp32", False, {}),
    *[
        (family, method, *how, {})
        for family in ("qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "glm4")
        for method, *how in (("full", "fp32", False), ("lora", "autocast", True))
    ],
]


@pytest.mark.parametrize(("family", "method", "numerics", "checkpointing", "arguments"), CASES)
def test_the_peak_is_that_of_the_live_tensors(
    family, method, numerics, checkpointing, arguments, tiny_models, tmp_path
):
    rows, length, labels = 4, 96, 40
    arguments = {"activation_checkpointing": checkpointing, "per_device_train_batch_size": rows, **arguments}
    settings = settings_of(
        {"dtype": "bfloat16"} if numerics == "bf16" else None,
        training_args={**arguments, "bf16": numerics == "autocast", "use_cpu": True},
        **METHODS[method],
    )
    folder = tiny_models(family)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    predicted = training_memory(settings, shape, rows=rows, length=length, labels=rows * labels, device="cpu")
    counted = live_bytes_of_training(settings, folder, rows, length, labels, tmp_path)
    assert predicted.total - predicted.runtime == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("method", "numerics"), [("full", "fp32"), ("lora", "fp32"), ("full", "autocast"), ("lora", "autocast")]
)
def test_many_label_tokens_take_no_more_than_the_logits_made_at_a_time(
    method, numerics, tiny_models, tmp_path, monkeypatch
):
    rows, length, labels = 4, 96, 90
    arguments = {"per_device_train_batch_size": rows, "bf16": numerics == "autocast", "use_cpu": True}
    settings = settings_of(training_args=arguments, **METHODS[method])
    folder = tiny_models("llama")
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    batch = {"rows": rows, "length": length, "labels": rows * labels, "device": "cpu"}
    whole = training_memory(settings, shape, **batch, whole_logits=True)
    monkeypatch.setattr("finegrid.training.sizes.LOGITS_AT_ONCE", 60 * shape.vocabulary)
    predicted = training_memory(settings, shape, **batch)
    assert predicted.logits < whole.logits / 4
    counted = live_bytes_of_training(settings, folder, rows, length, labels, tmp_path)
    # Not predicted: with 16 bits each part makes a gradient of a trained head, which is then added.
    tolerance = 0.1 if (method, numerics) == ("full", "autocast") else 0.05
    assert predicted.total - predicted.runtime == pytest.approx(counted, rel=tolerance)
    assert counted < 0.95 * (whole.total - whole.runtime)


def test_validation_of_a_larger_batch_is_the_peak_of_a_run_that_evaluates(tiny_models, tmp_path):
    arguments = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 16, "activation_checkpointing": True}
    settings = settings_of(
        validation=True,
        training_args={**arguments, "eval_strategy": "steps", "eval_steps": 1, "use_cpu": True},
        **METHODS["lora"],
    )
    folder = tiny_models("llama")
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    predicted = training_memory(settings, shape, rows=1, length=96, labels=40, device="cpu", padded=False)
    counted = live_bytes_of_training(settings, folder, 1, 96, 40, tmp_path, validation=16)
    assert predicted.total - predicted.runtime == pytest.approx(counted, rel=0.1)


def live_bytes_of_training(settings, folder, rows, length, labels, tmp_path, validation=0) -> int:
    """Train two steps with the package's own trainer and return the most bytes of tensors alive."""
    import torch
    from datasets import Dataset
    from finegrid.training.model import attach_adapter, load_base
    from finegrid.training.train import _trainer, training_arguments

    torch.manual_seed(0)
    torch.set_num_threads(1)
    accumulated = settings.training_args.get("gradient_accumulation_steps", 1)
    train = Dataset.from_list([row(number, length, labels) for number in range(2 * rows * accumulated)])
    held_out = Dataset.from_list([row(number, length, labels) for number in range(validation)])
    checkpoints = tmp_path / "run"
    checkpoints.mkdir()
    arguments = training_arguments(settings, checkpoints, has_validation=validation > 0, notes=[])
    arguments.save_strategy = "no"
    model = attach_adapter(settings, load_base(settings, folder, "cpu"))
    trainer = _trainer(settings, model, arguments, train, held_out, checkpoints, lambda line: None)
    with LiveMemory(model) as memory:
        trainer.train()
    return memory.peak


def row(number: int, length: int, labels: int) -> dict:
    size = length - number % 2  # so that a batch is padded
    ids = [3 + (number * 31 + position) % 3900 for position in range(size)]
    return {"id": str(number), "input_ids": ids, "labels": [-100] * (size - labels) + ids[size - labels :]}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Return a function: family -> folder of a random model of three layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("memory") / family
            config = AutoConfig.for_model(family, **TINY, **FAMILY_KEYS.get(family, {}))
            AutoModelForCausalLM.from_config(config).save_pretrained(made[family])
        return made[family]

    return folder


# ---------------------------------------------------------------- partitioning, columns, speed


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_partitions_as_its_authors_publish(stage: int, gigabytes: float):
    # Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1: 7.5 billion parameters, 64 GPUs, Adam, mixed precision.
    shape = shape_of({"model_type": "llama", **WIDE})
    deepspeed = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1, "stage3_max_live_parameters": 1},
    }
    memory = training_memory(
        settings_of(gpus=64), shape, rows=1, length=64, labels=8, device="cuda", deepspeed=deepspeed
    )
    share = 7.5e9 / shape.parameters
    # The paper has no temporaries: DeepSpeed's step holds this part's gradients in 32 bits as well.
    states = memory.weights + memory.gradients + memory.optimiser - 4 * shape.parameters / 64
    assert share * states / 1e9 == pytest.approx(gigabytes, rel=0.02)


WIDE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}


def test_offloading_moves_states_to_the_host():
    shape = shape_of({"model_type": "llama", **WIDE})
    zero = {"stage": 2, "reduce_bucket_size": 1}
    moved = {**zero, "offload_optimizer": {"device": "cpu"}}
    here, there = (
        training_memory(
            settings_of(gpus=2), shape, rows=1, length=64, labels=8, device="cuda",
            deepspeed={"bf16": {"enabled": True}, "zero_optimization": config},
        )
        for config in (zero, moved)
    )  # fmt: skip
    assert here.host == 0
    assert there.optimiser == 0
    # Master weights, two states and the gradients of this half in 32 bits.
    assert there.host == pytest.approx(16 * shape.parameters / 2, rel=0.01)
    assert there.total < here.total


def test_quantised_weights_take_half_a_byte_and_their_scales():
    shape = shape_of({"model_type": "llama", **WIDE})
    settings = settings_of(quantization_config={**NF4, "bnb_4bit_use_double_quant": True}, peft_config=LORA)
    memory = training_memory(settings, shape, rows=1, length=64, labels=8, device="cuda")
    packed = shape.layers * (4 * 4096**2 + 3 * 4096 * 11008)
    # Dettmers et al. 2023 (arXiv:2305.14314), section 3: double quantisation leaves 0.127 bits a parameter of scales.
    scales = packed * 0.127 / 8
    assert memory.weights == packed / 2 + 4 * (shape.parameters - packed)
    assert memory.quantisation == pytest.approx(scales + 4 * 4096 * 11008, rel=0.01)


def test_on_the_cpu_weights_are_quantised_beside_their_whole_file():
    settings = settings_of(peft_config=LORA, quantization_config=NF4)
    totals = {}
    for dtype in ("float32", "bfloat16"):
        shape = shape_of({"model_type": "llama", **WIDE, "dtype": dtype})
        totals[dtype] = training_memory(settings, shape, rows=1, length=8, labels=8, device="cpu").total
    assert totals["float32"] - totals["bfloat16"] == pytest.approx(2 * shape.parameters, rel=1e-3)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_peak_is_at_most_the_sum_of_the_columns(method: str):
    shape = shape_of({"model_type": "llama", **TINY})
    for checkpointing in (False, True):
        settings = settings_of(training_args={"activation_checkpointing": checkpointing}, **METHODS[method])
        memory = training_memory(settings, shape, rows=4, length=128, labels=256, device="cuda")
        columns = {name: value for name, value in vars(memory).items() if name not in ("total", "host")}
        assert max(columns.values()) < memory.total <= sum(columns.values())


@pytest.mark.parametrize(("rows", "prompt", "new_tokens"), [(2, 300, 8), (8, 64, 32)])
def test_evaluation_is_the_peak_of_generating_and_scoring(rows, prompt, new_tokens, tiny_models):
    import torch
    from finegrid.evaluation.likelihood import label_nll
    from finegrid.training.model import load_base
    from transformers import GenerationConfig

    folder = tiny_models("llama")
    model = load_base(settings_of(), folder, "cpu").eval()
    exactly = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, "eos_token_id": 2}
    ids = torch.full((rows, prompt), 7)
    with LiveMemory(model) as memory:
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**exactly))
        label_nll(model, [row(number, prompt + new_tokens, new_tokens) for number in range(rows)], batch_size=rows)
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    predicted = evaluation_memory(settings_of(), shape, rows=rows, prompt=prompt, new_tokens=new_tokens, device="cpu")
    assert predicted.total - predicted.runtime == pytest.approx(memory.peak, rel=0.1)


def test_evaluation_is_weights_and_cache_and_grows_with_the_batch():
    shape = shape_of({"model_type": "llama", **WIDE})
    settings = settings_of({"dtype": "bfloat16"})
    small, large = (
        evaluation_memory(settings, shape, rows=rows, prompt=512, new_tokens=512, device="cuda") for rows in (1, 16)
    )
    assert small.weights == 2 * shape.parameters
    # A key and a value of every head and layer for each of 1,024 positions.
    assert large.total - small.total > 15 * 1024 * 2 * 36 * 4096 * 2
    assert large.gradients == large.optimiser == 0


def test_pricing_a_thousand_runs_is_little_work():
    shape = shape_of({"model_type": "llama", **WIDE})
    settings = [settings_of(peft_config={**LORA, "r": 2 ** (number % 7)}) for number in range(21)]
    with counted_calls() as calls:
        for number in range(1000):
            training_memory(settings[number % 21], shape, rows=1 + number % 8, length=512, labels=99, device="cuda")
    assert calls[0] < 3_000_000  # 1.6 million where this was written


def test_settings_of_the_allocator_leave_the_users_own():
    assert allocator({}) == ALLOCATOR
    own = {"MALLOC_TOP_PAD_": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "HOME": "/"}
    found = allocator(own)
    assert "MALLOC_TOP_PAD_" not in found
    assert found["MALLOC_MMAP_MAX_"] == "0"
    assert found["GLIBC_TUNABLES"].endswith(":glibc.malloc.hugetlb=0")


LOADER = next((path for folder in ("/lib64", "/lib") for path in Path(folder).glob("ld-linux*")), None)


@pytest.mark.skipif(LOADER is None, reason="asks glibc's loader, which is on Linux alone")
@pytest.mark.parametrize(("own", "pages"), [({}, "0x1"), ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "0x0")])
def test_of_two_settings_glibc_takes_the_users(own, pages):
    command = [LOADER, "--list-tunables"]
    said = subprocess.run(command, env=own | allocator(own), capture_output=True, text=True, check=True).stdout
    assert f"glibc.malloc.hugetlb: {pages} " in said
