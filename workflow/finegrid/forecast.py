"""How long a training will take: from earlier runs of the same kind where there are any, else from its FLOPs.

:class:`Throughputs` reads what runs of any study measured (``results/*/training``, ``results/*/settings``);
:func:`training_seconds` uses that, or :func:`training_flops` over what the card does at a stated efficiency. Each
number says where it is from. Pure Python; read by the plan.

Where the estimate's constants come from:

* **GPU.** QwenLM/Qwen, README, "Profiling of Memory and Speed": seconds an iteration on A100-80GB cards of LoRA,
  Q-LoRA and full fine-tuning of 1.8 to 72 billion parameters at 256 to 8,192 tokens, with transformers' Trainer, peft
  and checkpointed activations, the stack used here. By the count below its LoRA runs do 41 to 54 % of the card's peak
  at 1,024 and 2,048 tokens from 7 billion parameters on, and never less than 4.7 ms a layer and micro-batch: small
  models and short rows wait for kernels to be launched.
* **4 bits.** Lightning-AI/litgpt, tutorials/resource-tables.md: LoRA with and without bitsandbytes' nf4 on an
  A100-40GB; the difference is 12 to 15 ms for each 10^9 parameters and micro-batch, which is 2.5 bytes a parameter,
  forward and backward, at 25 % of the card's bandwidth.
* **CPU.** This project's demo on one thread with AVX-512 (``results/insurance/training``).
* Several GPUs, offloading to the host, DoRA: assumed.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finegrid import layout
from finegrid.precision import cpu_chooses_bf16

if TYPE_CHECKING:
    from finegrid.decoder import Shape
    from finegrid.gpus import Gpu
    from finegrid.settings import RunSettings

GPU_EFFICIENCY = 0.45  # of the peak, when a micro-batch is large enough
LAUNCH_SECONDS = 4.5e-3  # a layer and micro-batch at least, with adapters
LAUNCH_SECONDS_FULL = 3.0e-3  # the same without: litgpt's adapters that wrap no layer come to 2.8 ms
DECODED_BYTES = 2.5  # read and written for a parameter of 4 bits
DECODING_EFFICIENCY = 0.25  # of the card's bandwidth
CPU_FLOPS = 53e9  # a second and thread, float32
SEVERAL_GPUS = 0.9  # of one GPU's speed each: assumed
OFFLOADED = 0.5  # of the speed without: assumed
DORA = 0.6  # of LoRA's speed: assumed
START_SECONDS = 20.0  # imports, loading a small model and saving it: the demo's
LOADED_BYTES = 1e9  # a second: assumed, a local disk
CPU_BYTES = 10e9  # a second: weights read for each generated token; the demo's, batch 1
GENERATING_LAYER_SECONDS = 1e-3  # a layer and generated token on a GPU at least: 30 to 40 ms a token at 32 layers
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Forecast:
    """How long a run will take, wall clock: start-up, training and the evaluations in it.

    Attributes:
        seconds: None where it can't be told.
        gpu_hours: of all GPUs together; 0 on the CPU.
        source: where the number is from, one phrase.
        cpu_hours: of the process; 0 on GPUs.
    """

    seconds: float | None
    gpu_hours: float | None
    source: str
    cpu_hours: float | None = 0.0


# ---------------------------------------------------------------- FLOPs


def training_flops(settings: RunSettings, shape: Shape, tokens: float, label_tokens: float, length: float) -> float:
    """Return the floating-point operations of a training's matrix products, forward and backward.

    A product of an (m, k) and a (k, n) matrix counts 2 m k n. The head counts on label positions only, attention in
    full (without the half that a causal kernel may spare), padding and de-quantisation not at all. Backward costs
    twice the forward pass where weights are trained, once where only gradients pass through, and one more forward of
    the layers with checkpointed activations.

    Args:
        tokens: seen over the run, without padding.
        label_tokens: of these, the ones with a label.
        length: tokens of a row, the mean.
    """
    layers, attention, head = _forward_flops(shape, tokens, label_tokens, length)
    adapters = 2.0 * tokens * adapter_parameters(settings, shape)
    if settings.peft_config is None:
        total = 3 * (layers + attention + head)
    else:
        head_passes = 3 if "lm_head" in (settings.peft_config.get("modules_to_save") or ()) else 2
        total = 2 * layers + 3 * attention + head_passes * head + 3 * adapters
    if settings.training_arg("activation_checkpointing"):
        total += layers + attention + adapters - _spared(settings, shape, tokens)
    return total


def evaluation_flops(settings: RunSettings, shape: Shape, tokens: float, label_tokens: float, length: float) -> float:
    """Return the operations of a forward pass over ``tokens``, counted as :func:`training_flops` does."""
    return sum(_forward_flops(shape, tokens, label_tokens, length)) + 2.0 * tokens * adapter_parameters(settings, shape)


def adapter_parameters(settings: RunSettings, shape: Shape) -> int:
    """Return how many parameters an adapter puts into matrix products: not those of whole modules trained beside."""
    if settings.peft_config is None:
        return 0
    from finegrid.memory import trainable_parameters

    alone = {key: value for key, value in settings.peft_config.items() if key != "modules_to_save"}
    return trainable_parameters(settings.model_copy(update={"peft_config": alone}), shape)


def linear_parameters(shape: Shape) -> int:
    """Return the parameters of the layers' matrices, embeddings and head left out."""
    return shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)


def _spared(settings: RunSettings, shape: Shape, tokens: float) -> float:
    """Return what checkpointing does not compute again: a layer's last product, unless an adapter needs it."""
    last = shape.linears[-1]
    targets = (settings.peft_config or {}).get("target_modules") or ()
    if isinstance(targets, str):
        adapted = targets == "all-linear" or re.fullmatch(targets, f"{shape.layer_name(0)}.{last.name}") is not None
    else:
        adapted = any(f".{last.name}".endswith(f".{target}") for target in targets)
    return 0.0 if adapted else 2.0 * tokens * shape.layers * last.inputs * last.outputs


def _forward_flops(shape: Shape, tokens: float, labels: float, length: float) -> tuple[float, float, float]:
    """Return the operations of layers, attention and head."""
    layers = 2.0 * tokens * linear_parameters(shape)
    attention = 4.0 * tokens * length * shape.heads * shape.head_dim * shape.layers
    return layers, attention, 2.0 * labels * shape.hidden * shape.vocabulary


# ---------------------------------------------------------------- earlier runs


@dataclass(frozen=True)
class Speed:
    """What earlier runs of the same kind did: the median, in tokens a second, and where it is from."""

    tokens_per_second: float
    runs: int
    studies: tuple[str, ...]
    alike: bool

    def describe(self) -> str:
        """Return the source in words: ``measured: 2 runs of insurance``."""
        runs = "1 run" if self.runs == 1 else f"median of {self.runs} runs"
        text = f"measured: {runs} of {', '.join(self.studies[:2])}{' and others' if len(self.studies) > 2 else ''}"
        return text if self.alike else f"{text}, at other batches or lengths"


@dataclass(frozen=True)
class Throughputs:
    """Tokens a second of finished runs, by kind: kind -> (batch and lengths, tokens a second, study)."""

    found: Mapping[tuple, list[tuple[tuple, float, str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, project: Path) -> Throughputs:
        """Read every finished run of ``results/*``; files that can't be read are passed over."""
        found: dict[tuple, list] = {}
        for summary in sorted((project / layout.RESULTS).glob("*/training/*.json")):
            study = summary.parent.parent
            measured, settings = _json(summary), _json(study / "settings" / summary.name)
            if measured and settings and measured.get("tokens_per_second"):
                kind = _kind(settings, measured.get("method"), measured.get("compute_dtype"), measured.get("device"))
                found.setdefault(kind, []).append((_sizes(settings), measured["tokens_per_second"], study.name))
        return cls(found)

    def of(self, settings: RunSettings, gpu: Gpu | None, width: int | None = None) -> Speed | None:
        """Return the speed of earlier runs of this kind: same base model, method, types, device, number of GPUs.

        Of these only the runs with the same batch, accumulation and length limits count, if there are any. The model's
        ``width`` is what :func:`compute_dtype` wants to know.
        """
        plain = {
            "model": settings.model.model_dump(),
            "training_args": settings.training_args,
            "peft_config": settings.peft_config,
            "quantization_config": settings.quantization_config,
            "gpus": settings.gpus,
            "nodes": settings.nodes,
            "max_input_length": settings.max_input_length,
            "max_output_length": settings.max_output_length,
        }
        kind = _kind(plain, settings.method, compute_dtype(settings, gpu, width), gpu.name if gpu else "cpu")
        runs = self.found.get(kind)
        if not runs:
            return None
        alike = [run for run in runs if run[0] == _sizes(plain)]
        used = alike or runs
        speed = statistics.median(speed for _, speed, _ in used)
        return Speed(speed, len(used), tuple(dict.fromkeys(study for _, _, study in used)), bool(alike))


def compute_dtype(settings: RunSettings, gpu: Gpu | None, width: int | None = None) -> str:
    """Return the type that the matrix products will compute in, as a run's summary names it.

    Args:
        width: the model's hidden size, see :mod:`finegrid.precision`.
    """
    if settings.training_args.get("bf16"):
        return "bfloat16"
    if settings.training_args.get("fp16"):
        return "float16"
    if gpu is not None and gpu.bf16 and "bf16" not in settings.training_args:
        return "bfloat16"  # training chooses it
    if gpu is None and cpu_chooses_bf16(settings, width):
        return "bfloat16"
    quantization = settings.quantization_config or {}
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return settings.model.dtype


def _kind(settings: Mapping[str, Any], method: Any, compute: Any, device: Any) -> tuple:
    from finegrid.gpus import name_of

    model, arguments = settings.get("model") or {}, settings.get("training_args") or {}
    quantization, peft = settings.get("quantization_config") or {}, settings.get("peft_config") or {}
    return (
        model.get("model_name_or_path"),
        model.get("revision"),
        model.get("dtype", "float32"),
        method,
        compute,
        "cpu" if device == "cpu" else name_of(str(device)),
        settings.get("gpus", 1),
        settings.get("nodes", 1),
        bool(quantization.get("load_in_4bit")),
        bool(quantization.get("bnb_4bit_use_double_quant")),
        bool(peft.get("use_dora")),
        bool(arguments.get("activation_checkpointing")),
        str(arguments.get("deepspeed")),
    )


def _sizes(settings: Mapping[str, Any]) -> tuple:
    arguments = settings.get("training_args") or {}
    return (
        arguments.get("per_device_train_batch_size", 8),
        arguments.get("gradient_accumulation_steps", 1),
        settings.get("max_input_length"),
        settings.get("max_output_length"),
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ---------------------------------------------------------------- seconds


def training_seconds(
    settings: RunSettings,
    shape: Shape | None,
    *,
    tokens: float | None,
    label_tokens: float | None,
    length: float | None,
    evaluations: int | None,
    validation_tokens: float | None,
    gpu: Gpu | None,
    measured: Throughputs,
    micro_batches: int | None = None,
    threads: int = 1,
) -> Forecast:
    """Return how long a run takes: start-up, training, and every evaluation of the validation split in it.

    Args:
        shape: the base model's; None where it is not known, then only a measured speed helps.
        tokens: seen over the run, without padding, all GPUs together; None if it is not known yet.
        label_tokens: of these, the ones with a label; None takes all.
        length: tokens of a row, the mean; None takes the limits' sum.
        evaluations: how often the validation split is evaluated.
        validation_tokens: tokens of the validation split.
        gpu: the card; None trains on the CPU.
        measured: speeds of earlier runs.
        micro_batches: forward and backward passes a GPU makes, optimiser steps times accumulation; None works it out
            of tokens and length.
        threads: of the CPU.
    """
    if tokens is None:
        return Forecast(None, None, "the number of tokens is not known yet", None)
    labels = tokens if label_tokens is None else label_tokens
    length = length or settings.max_input_length + settings.max_output_length
    evaluated = float((evaluations or 0) * (validation_tokens or 0))
    speed = measured.of(settings, gpu, shape.hidden if shape else None)
    if speed is not None:
        seconds, source = tokens / speed.tokens_per_second, speed.describe()
        seconds += (
            evaluated
            / speed.tokens_per_second
            * _evaluation_share(settings, shape, labels / (tokens or labels or 1), length)
        )
    elif shape is None:
        return Forecast(None, None, "the model's shape is not known, and no earlier run is of this kind", None)
    else:
        work = _Work(settings, shape, tokens, labels, length, micro_batches)
        seconds, source = _on_gpu(work, gpu, evaluated) if gpu else _on_cpu(work, threads, evaluated)
        if seconds is None:
            return Forecast(None, None, source, None)
    seconds += start_seconds(settings, shape)
    hours = seconds / 3600
    return Forecast(seconds, hours * settings.processes if gpu else 0.0, source, 0.0 if gpu else hours)


def start_seconds(settings: RunSettings, shape: Shape | None) -> float:
    """Return how long a process takes before its first step: imports, and loading the base."""
    return START_SECONDS + (shape.parameters * DTYPES[settings.model.dtype] / LOADED_BYTES if shape else 0)


def evaluation_seconds(
    settings: RunSettings,
    shape: Shape,
    *,
    rows: int,
    prompt: float,
    tokens: float,
    label_tokens: float,
    gpu: Gpu | None,
    threads: int = 1,
) -> float | None:
    """Return how long an evaluation takes at most: start-up, the references' likelihood, answers of full length.

    Of the demo's evaluations (45 s on one thread without the start-up) it says 55. None where the card's speed is not
    known.

    Args:
        rows: that get an answer; 0 where none is generated.
        prompt: tokens of a prompt, the mean.
        tokens: of all rows whose likelihood is computed, prompts included.
        label_tokens: of these, the ones with a label.
        gpu: the card; None evaluates on the CPU, with so many threads.
    """
    length = settings.max_input_length + settings.max_output_length
    answer = settings.generation_config.get("max_new_tokens") or settings.max_output_length
    batches = math.ceil(rows / settings.evaluation.batch_size)
    scoring = evaluation_flops(settings, shape, tokens, label_tokens, length)
    answering = evaluation_flops(settings, shape, rows * (prompt + answer), rows * answer, length)
    weights = shape.parameters * DTYPES[settings.model.dtype]
    if gpu is None:
        reading = batches * answer * weights / CPU_BYTES
        seconds = (scoring + answering) / (CPU_FLOPS * threads) + reading
    else:
        peak = gpu.fp32_tflops if settings.model.dtype == "float32" else gpu.bf16_tflops
        if not peak:
            return None
        a_token = shape.layers * GENERATING_LAYER_SECONDS
        if gpu.bandwidth_gb:
            a_token = max(a_token, weights / (gpu.bandwidth_gb * 1e9))
        seconds = (scoring + answering) / (peak * 1e12 * GPU_EFFICIENCY) + batches * answer * a_token
    return seconds + start_seconds(settings, shape)


@dataclass(frozen=True)
class _Work:
    settings: RunSettings
    shape: Shape
    tokens: float
    labels: float
    length: float
    micro_batches: int | None

    def flops(self, evaluated: float) -> tuple[float, float]:
        """Return the operations of the training and of the evaluations."""
        training = training_flops(self.settings, self.shape, self.tokens, self.labels, self.length)
        labels = evaluated * self.labels / self.tokens if self.tokens else 0
        return training, evaluation_flops(self.settings, self.shape, evaluated, labels, self.length)

    def passes(self, evaluated: float) -> tuple[float, float]:
        """Return the micro-batches that one GPU trains on and evaluates."""
        gpus, batch = self.settings.processes, self.settings.training_arg("per_device_train_batch_size")
        trained = self.micro_batches or math.ceil(self.tokens / (self.length * batch * gpus))
        batch = self.settings.training_arg("per_device_eval_batch_size")
        return float(trained), evaluated / (self.length * batch * gpus)


def _on_cpu(work: _Work, threads: int, evaluated: float) -> tuple[float, str]:
    speed = CPU_FLOPS * threads * (DORA if _is_dora(work.settings) else 1)
    source = f"FLOPs at {CPU_FLOPS / 1e9:.0f} GFLOP/s a thread (the demo's), {threads} thread{'s' * (threads > 1)}"
    return sum(work.flops(evaluated)) / speed, source


def _on_gpu(work: _Work, gpu: Gpu, evaluated: float) -> tuple[float | None, str]:
    settings, shape = work.settings, work.shape
    half = compute_dtype(settings, gpu) != "float32"
    peak = gpu.bf16_tflops if half else gpu.fp32_tflops
    if not peak:
        return None, f"{gpu.name}: its peak in TFLOP/s is not known, and no earlier run is of this kind"
    factors = _assumed(settings)
    speed = peak * 1e12 * GPU_EFFICIENCY * settings.processes * math.prod(factors.values())
    computing = [flops / speed for flops in work.flops(evaluated)]
    passes = work.passes(evaluated)
    a_layer = LAUNCH_SECONDS_FULL if settings.peft_config is None else LAUNCH_SECONDS
    launching = [passes[0] * shape.layers * a_layer, passes[1] * shape.layers * a_layer / 3]
    seconds = sum(map(max, computing, launching)) + _decoding_seconds(settings, shape, gpu, passes)
    source = f"FLOPs at {GPU_EFFICIENCY:.0%} of {gpu.name}'s {peak:g} TFLOP/s"
    if launching[0] > computing[0]:
        source = f"{shape.layers} layers at {a_layer * 1000:g} ms a micro-batch: too small to fill {gpu.name}"
    return seconds, ", ".join([source, *factors])


def _assumed(settings: RunSettings) -> dict[str, float]:
    """Return what slows a run down by assumption: words -> share of the speed that is left."""
    factors = {}
    if _is_dora(settings):
        factors[f"DoRA at {DORA:.0%} of LoRA's speed (assumed)"] = DORA
    if settings.processes > 1:
        factors[f"{settings.processes} GPUs at {SEVERAL_GPUS:.0%} each (assumed)"] = SEVERAL_GPUS
    if _offloads(settings):
        factors[f"offloading at {OFFLOADED:.0%} (assumed)"] = OFFLOADED
    return factors


def _decoding_seconds(settings: RunSettings, shape: Shape, gpu: Gpu, passes: Iterable[float]) -> float:
    """Return the time in which 4-bit weights are made into 16-bit ones, anew in each forward and backward pass."""
    if not (settings.quantization_config or {}).get("load_in_4bit") or not gpu.bandwidth_gb:
        return 0.0
    once = linear_parameters(shape) * DECODED_BYTES / (gpu.bandwidth_gb * 1e9 * DECODING_EFFICIENCY)
    trained, evaluated = passes
    return once * (trained * (3 if settings.training_arg("activation_checkpointing") else 2) + evaluated)


def _evaluation_share(settings: RunSettings, shape: Shape | None, labels: float, length: float) -> float:
    """Return what a token costs in an evaluation, as a share of what it costs in training."""
    if shape is None:
        return 1 / 3 if settings.peft_config is None else 1 / 2
    training = training_flops(settings, shape, 1.0, labels, length)
    return evaluation_flops(settings, shape, 1.0, labels, length) / training


def _is_dora(settings: RunSettings) -> bool:
    return bool((settings.peft_config or {}).get("use_dora"))


def _offloads(settings: RunSettings) -> bool:
    named = settings.training_args.get("deepspeed")
    config = named if isinstance(named, Mapping) else _json(Path(named)) if isinstance(named, str) else None
    zero = (config or {}).get("zero_optimization") or {}
    parts = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
    return any(part.get("device", "none") != "none" for part in parts)
