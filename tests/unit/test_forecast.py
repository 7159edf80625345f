"""The forecast: FLOPs as torch counts them, seconds near what was measured and published, and always their source."""

from __future__ import annotations

import json
import math

import pytest
from calls import counted_calls
from finegrid import precision
from finegrid.forecast import (
    Forecast,
    Throughputs,
    adapter_parameters,
    compute_dtype,
    evaluation_flops,
    evaluation_seconds,
    linear_parameters,
    training_flops,
    training_seconds,
)
from finegrid.gpus import gpu
from finegrid.memory import shape_of
from finegrid.settings import DataConfig, Evaluation, ModelSettings, RunSettings
from finegrid.shapes import model_shapes

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TINY = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, LABELS = 3, 96, 41


@pytest.fixture(autouse=True)
def a_cpu_that_computes_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)  # as the demo was measured


def settings(peft=None, quantization=None, dtype="float32", gpus=1, name="no/model", limits=(512, 512), **arguments):
    return RunSettings(
        model=ModelSettings(model_name_or_path=name, dtype=dtype),
        data_config=DataConfig(train_file="train.jsonl"),
        max_input_length=limits[0],
        max_output_length=limits[1],
        training_args={"per_device_train_batch_size": 1, "max_steps": 10} | arguments,
        peft_config=peft,
        quantization_config=quantization,
        gpus=gpus,
    )


def known(hub_id):
    return shape_of(model_shapes()[hub_id]["config"])


def forecast(run, shape, measured=None, **options) -> Forecast:
    values = {"tokens": 1e6, "label_tokens": 6e5, "length": 200, "evaluations": 0, "validation_tokens": 0, "gpu": None}
    return training_seconds(run, shape, measured=measured or Throughputs(), **values | options)


# ---------------------------------------------------------------- FLOPs


def counted_flops(run, backward=True) -> int:
    """What torch counts in a real step of a real model, its attention written out in matrix products."""
    import torch
    from finegrid.training.loss import Head, label_states
    from finegrid.training.model import attach_adapter
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values = {key: value for key, value in TINY.items() if key != "model_type"}
    model = attach_adapter(run, LlamaForCausalLM(LlamaConfig(**values, attn_implementation="eager"))).train()
    if run.training_args.get("activation_checkpointing"):
        model.gradient_checkpointing_enable()
        if run.peft_config:
            model.enable_input_require_grads()
    batch = {
        "input_ids": torch.randint(1000, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64),
        "positions": torch.arange(LABELS) * 2,
        "targets": torch.arange(LABELS),
    }
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        loss = label_states(model, Head(model.get_output_embeddings()), batch).loss()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "peft",
    [None, LORA, LORA | {"target_modules": ["q_proj", "v_proj"], "r": 32}, LORA | {"modules_to_save": ["lm_head"]}],
    ids=["full", "all-linear", "query-value", "head"],
)
def test_flops_are_those_that_torch_counts(peft, checkpointing):
    run = settings(peft, activation_checkpointing=checkpointing)
    counted = counted_flops(run)
    found = training_flops(run, shape_of(TINY), ROWS * LENGTH, LABELS, LENGTH)
    # Above a frozen embedding three matrices need no gradient of their input.
    assert found == pytest.approx(counted, rel=0.02 if peft else 1e-6)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_flops_of_an_evaluation_are_those_that_torch_counts(peft):
    run = settings(peft)
    found = evaluation_flops(run, shape_of(TINY), ROWS * LENGTH, LABELS, LENGTH)
    assert found == pytest.approx(counted_flops(run, backward=False), rel=1e-6)


def test_a_large_models_flops_are_six_a_parameter_and_token():
    shape = known("meta-llama/Meta-Llama-3-70B")
    found = training_flops(settings(), shape, 1000, 1000, 1)
    assert found == pytest.approx(6 * shape.parameters * 1000, rel=0.02)
    assert linear_parameters(shape) < shape.parameters
    assert adapter_parameters(settings(), shape) == 0


# ---------------------------------------------------------------- against published seconds

# QwenLM/Qwen, README.md, "Profiling of Memory and Speed": seconds an iteration of 8 rows, one after the other, at 256,
# 512, 1024, 2048, 4096, 8192 tokens, A100-SXM4-80GB, activations checkpointed.
QWEN = {"1.8B": (2048, 24, 5504), "7B": (4096, 32, 11008), "14B": (5120, 40, 13696)}
QWEN_LORA = {
    "1.8B": (1.0, 1.0, 1.1, 1.7, 3.3, 6.8),
    "7B": (1.2, 1.5, 2.8, 5.2, 10.1, 21.3),
    "14B": (1.6, 2.4, 4.4, 8.4, 17.0, 36.0),
}
# Lightning-AI/litgpt, tutorials/resource-tables.md: minutes of 1,000 rows of Alpaca, A100-40GB.
LITGPT = {"meta-llama/Llama-2-7b-hf": (2.36, 3.68), "meta-llama/Llama-2-13b-hf": (3.19, 6.38)}


def llama(hidden, layers, intermediate, vocabulary=151_936):
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config |= {"num_attention_heads": hidden // 128, "intermediate_size": intermediate, "tie_word_embeddings": False}
    return shape_of(config)


@pytest.mark.parametrize("size", QWEN_LORA)
def test_lora_on_a_gpu_is_near_qwens_published_seconds(size):
    run = settings(LORA | {"r": 64}, dtype="bfloat16", bf16=True, activation_checkpointing=True)
    ratios, iterations = [], 100_000  # so many that start-up counts for nothing
    for number, published in enumerate(QWEN_LORA[size]):
        length = 256 * 2**number
        tokens = 8 * length * iterations
        options = {"tokens": tokens, "label_tokens": None, "length": length, "gpu": gpu("a100-80gb")}
        found = forecast(run, llama(*QWEN[size]), **options)
        ratios.append(found.seconds / (iterations * published))
    assert all(0.7 < ratio < 1.45 for ratio in ratios), ratios
    assert 0.8 < math.prod(ratios) ** (1 / len(ratios)) < 1.2, ratios


@pytest.mark.parametrize("hub_id", LITGPT)
def test_four_bits_cost_what_litgpt_published(hub_id):
    targets = LORA | {"target_modules": ["q_proj", "v_proj"]}
    options = {"tokens": 110 * 1e6, "length": 110, "micro_batches": 1_000_000, "gpu": gpu("a100-40gb")}
    for quantization, minutes in zip((None, NF4), LITGPT[hub_id], strict=True):
        found = forecast(settings(targets, quantization, dtype="bfloat16", bf16=True), known(hub_id), **options)
        assert found.seconds / 60 == pytest.approx(1000 * minutes, rel=0.15)


# ---------------------------------------------------------------- against the demo

# results/insurance/training of the demo (SmolLM2-135M, 1 thread, AVX-512), seeds 0 and 1, and the seconds of the
# whole job in benchmarks/train/insurance: start-up, three evaluations of 3,440 tokens and two checkpoints included.
DEMO = {
    "full": (None, None, (173.3, 190.2), (226.7, 265.8)),
    "lora": (LORA, None, (116.7, 136.7), (166.8, 210.4)),
    "qlora": (LORA, NF4 | {"bnb_4bit_compute_dtype": "float32"}, (127.6, 130.3), (184.8, 188.7)),
}
DEMO_TOKENS, DEMO_LABELS, DEMO_VALIDATION = 13_036, 8_302, 3_440
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49_152, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def demo(method, measured=None):
    peft, quantization, _, wall = DEMO[method]
    run = settings(peft, quantization, name="data/models/smol", limits=(64, 96), per_device_train_batch_size=4)
    options = {"tokens": DEMO_TOKENS, "label_tokens": DEMO_LABELS, "length": 108}
    options |= {"evaluations": 3, "validation_tokens": DEMO_VALIDATION}
    return forecast(run, shape_of(SMOLLM2), measured, **options), sum(wall) / 2


def finish(project, method, study="insurance", name=None, batch=4, speed=1.0, device="cpu", **summary):
    """Write what a finished run of the demo leaves."""
    peft, quantization, seconds, _ = DEMO[method]
    run = settings(peft, quantization, name="data/models/smol", limits=(64, 96), per_device_train_batch_size=batch)
    for number, second in enumerate(seconds):
        file = f"{name or method}-{number}.json"
        measured = {"method": method, "device": device, "compute_dtype": "float32", "tokens": DEMO_TOKENS}
        measured |= {"tokens_per_second": speed * DEMO_TOKENS / second} | summary
        for folder, content in (("training", measured), ("settings", run.model_dump(mode="json"))):
            path = project / "results" / study / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("method", DEMO)
def test_the_demo_takes_what_its_flops_say(method):
    found, wall = demo(method)
    assert found.seconds == pytest.approx(wall, rel=0.15)
    assert (found.gpu_hours, found.cpu_hours) == (0, pytest.approx(found.seconds / 3600))
    assert "FLOPs at" in found.source


@pytest.mark.parametrize("method", DEMO)
def test_the_demo_takes_what_its_earlier_runs_took(tmp_path, method):
    finish(tmp_path, method)
    found, wall = demo(method, Throughputs.read(tmp_path))
    assert found.seconds == pytest.approx(wall, rel=0.1)
    assert found.source == "measured: median of 2 runs of insurance"


# ---------------------------------------------------------------- which earlier runs count


def test_only_runs_of_the_same_kind_count(tmp_path):
    finish(tmp_path, "full")
    finish(tmp_path, "lora", name="gpu", device="NVIDIA A100-SXM4-80GB")
    finish(tmp_path, "lora", name="bf16", compute_dtype="bfloat16")
    assert "FLOPs" in demo("lora", Throughputs.read(tmp_path))[0].source


def test_runs_in_bf16_count_where_the_cpu_will_compute_in_it(tmp_path, monkeypatch):
    finish(tmp_path, "lora", name="bf16", compute_dtype="bfloat16")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert demo("lora", Throughputs.read(tmp_path))[0].source.startswith("measured")


def test_a_card_is_known_by_the_name_that_torch_gives_it(tmp_path):
    finish(tmp_path, "lora", device="NVIDIA A100-SXM4-80GB")
    run = settings(LORA, name="data/models/smol", limits=(64, 96), per_device_train_batch_size=4, bf16=False)
    measured = Throughputs.read(tmp_path)
    found = forecast(run, shape_of(SMOLLM2), measured, gpu=gpu("a100-80gb"))
    assert found.source.startswith("measured")
    assert found.gpu_hours == pytest.approx(found.seconds / 3600)
    assert measured.of(run, gpu("rtx-4090")) is None


def test_runs_with_the_same_batch_and_lengths_count_before_others(tmp_path):
    finish(tmp_path, "lora", name="other", batch=16, speed=3)
    found, wall = demo("lora", Throughputs.read(tmp_path))
    assert found.source == "measured: median of 2 runs of insurance, at other batches or lengths"
    assert found.seconds < wall / 2
    finish(tmp_path, "lora", study="second")
    found, wall = demo("lora", Throughputs.read(tmp_path))
    assert found.source == "measured: median of 2 runs of second"
    assert found.seconds == pytest.approx(wall, rel=0.1)


def test_a_run_without_tokens_takes_its_start_up(tmp_path):
    finish(tmp_path, "lora")
    run = settings(LORA, name="data/models/smol")
    for measured in (Throughputs(), Throughputs.read(tmp_path)):
        nothing = forecast(run, shape_of(SMOLLM2), measured, tokens=0, label_tokens=0).seconds
        assert 0 < nothing < 60


def test_broken_results_are_passed_over(tmp_path):
    finish(tmp_path, "lora")
    (tmp_path / "results/insurance/training/lora-0.json").write_text("{")
    (tmp_path / "results/insurance/settings/lora-1.json").unlink()
    assert not Throughputs.read(tmp_path).found
    assert not Throughputs.read(tmp_path / "nowhere").found


def test_reading_a_thousand_finished_runs_is_little_work(tmp_path):
    for number in range(500):
        finish(tmp_path, "lora", study=f"study-{number % 5}", name=f"lora-{number}")
    with counted_calls() as calls:
        measured = Throughputs.read(tmp_path)
    assert calls[0] < 400_000  # 160,000 where this was written
    assert sum(map(len, measured.found.values())) == 1000


# ---------------------------------------------------------------- what is said


def test_what_is_not_known_is_said():
    shape = shape_of(TINY)
    unknown = forecast(settings(), shape, tokens=None)
    assert (unknown.seconds, unknown.gpu_hours) == (None, None)
    assert "tokens" in unknown.source
    assert "shape" in forecast(settings(), None).source
    card = gpu({"name": "mine", "memory": "24GB"})
    assert forecast(settings(), shape, gpu=card).seconds is None
    assert "mine" in forecast(settings(), shape, gpu=card).source


def test_assumptions_stand_in_the_source(tmp_path):
    offload = tmp_path / "zero3.json"
    offload.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    run = settings(LORA | {"use_dora": True}, gpus=4, bf16=True, deepspeed=str(offload))
    source = forecast(run, known("Qwen/Qwen2.5-7B-Instruct"), length=4096, gpu=gpu("a100-80gb")).source
    assert "45% of a100-80gb's 312 TFLOP/s" in source
    for word in ("DoRA", "4 GPUs", "offloading"):
        assert word in source


def test_small_batches_on_a_gpu_wait_for_launches():
    run, shape = settings(LORA, bf16=True), shape_of(SMOLLM2)
    options = {"tokens": 1e7, "length": 100, "gpu": gpu("h100-80gb")}
    small = forecast(run, shape, **options)
    large = forecast(settings(LORA, bf16=True, per_device_train_batch_size=64), shape, **options)
    assert "too small to fill h100-80gb" in small.source
    assert small.seconds > 20 * large.seconds


def test_several_gpus_share_the_work_and_cost_their_hours():
    shape, options = known("Qwen/Qwen2.5-7B-Instruct"), {"tokens": 1e8, "length": 4096, "gpu": gpu("h100-80gb")}
    one, four = (forecast(settings(gpus=count, bf16=True), shape, **options) for count in (1, 4))
    assert one.seconds / 4 < four.seconds < one.seconds / 3
    assert four.gpu_hours == pytest.approx(4 * four.seconds / 3600)


def test_evaluations_are_part_of_the_time():
    shape = shape_of(SMOLLM2)
    without, with_ten = (
        forecast(settings(), shape, evaluations=count, validation_tokens=1e5).seconds for count in (0, 10)
    )
    base = forecast(settings(), shape, tokens=0, label_tokens=0).seconds
    assert (with_ten - without) / (without - base) == pytest.approx(1 / 3, rel=0.01)  # a forward pass of as much


@pytest.mark.parametrize(
    ("run", "card", "expected"),
    [
        (settings(), None, "float32"),
        (settings(), "a100-80gb", "bfloat16"),
        (settings(), "v100-16gb", "float32"),
        (settings(bf16=False), "a100-80gb", "float32"),
        (settings(bf16=True), None, "bfloat16"),
        (settings(fp16=True), "a100-80gb", "float16"),
        (settings(LORA, NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}), None, "bfloat16"),
        (settings(dtype="bfloat16"), None, "bfloat16"),
    ],
)
def test_the_compute_type_is_the_one_that_training_will_choose(run, card, expected):
    assert compute_dtype(run, gpu(card) if card else None) == expected


def test_an_evaluation_takes_what_the_demos_took():
    run = settings(limits=(64, 96)).model_copy(
        update={"generation_config": {"max_new_tokens": 48}, "evaluation": Evaluation(batch_size=40)}
    )
    rows = {"rows": 40, "prompt": 33, "tokens": 7300, "label_tokens": 4890}  # test and validation of the demo
    shape = known("HuggingFaceTB/SmolLM2-135M-Instruct")
    on_cpu = evaluation_seconds(run, shape, gpu=None, **rows)
    assert on_cpu - 20 == pytest.approx(46, rel=0.25)  # measured on one thread, start-up left out
    assert evaluation_seconds(run, shape, gpu=None, threads=2, **rows) < on_cpu
    assert evaluation_seconds(run, shape, gpu=gpu("a100-80gb"), **rows) < on_cpu
