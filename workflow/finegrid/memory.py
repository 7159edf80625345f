"""How much memory a run will need, from the model's config.json alone: bytes on each GPU, or of the process on the CPU.

:func:`training_memory` walks through an optimiser step (forward with its saved activations, loss on the label
positions, backward with activations that go and gradients that come, the optimiser's own temporaries, the validation
pass) and takes the moment of most memory. What the operations of each family of models keep is noted, operation by
operation, in :mod:`finegrid.decoder`; here stand weights, adapters, optimisers, ZeRO and the runtime. The tests hold it
against a count of every live tensor of real training steps, ``tests/benchmarks/memory.py`` against the memory of whole
training processes.

Pure Python: a model and a way of training are played once, any batch is then priced in microseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finegrid.decoder import (
    FLOAT,
    HALF,
    Adapter,
    Adapters,
    Linear,
    Numerics,
    Shape,
    head_timeline,
    layer_timeline,
    shape_of,
)
from finegrid.errors import UserError
from finegrid.precision import cpu_chooses_bf16
from finegrid.tape import NOTHING, Size
from finegrid.training.sizes import rows_of_logits

if TYPE_CHECKING:
    from finegrid.settings import RunSettings

__all__ = ["Memory", "Shape", "evaluation_memory", "shape_of", "trainable_parameters", "training_memory"]

MIB = 2**20
# The process on the CPU without tensors: 530 MiB once torch, transformers, peft and datasets are imported (145 of them
# pages of the libraries' files), and 30 more of kernels and graph after a step (Linux x86-64, torch 2.13).
CPU_PROCESS = 560 * MIB
# Free pieces of the heap between live ones, as a share of the tensors. Measured with MALLOC_MMAP_THRESHOLD_=262144,
# where a tensor's memory goes back when the tensor goes; glibc's default keeps it: 1.1 to 2.2 times as much is held.
CPU_FRAGMENTATION = 0.03
# Settings of glibc's allocator for a process that trains on the CPU: what is freed stays in the process, else it is
# fetched from the system again, page by page, in every step. Read before a process starts; the rules set them. As much
# is held as by default (tests/benchmarks/memory.py --allocator keeping; measured before it asked for large pages).
# Where the system has large pages for who asks, they save looking up addresses: 0 to 4 % of a step.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",  # a pack's runs have a thread each, and would leave each other's freed memory unused
}
# A CUDA context with the kernels of torch and cuBLAS's workspace.
CUDA_CONTEXT = 600 * MIB
# Share of torch's blocks that lies between tensors, of what comes and goes in a step.
CUDA_FRAGMENTATION = 0.05
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def allocator(own: Mapping[str, str]) -> dict[str, str]:
    """Return :data:`ALLOCATOR` for a process with an environment of its own, whose settings hold."""
    found = {name: value for name, value in ALLOCATOR.items() if name not in own}
    if own.get("GLIBC_TUNABLES"):  # the last of two of a name holds
        found["GLIBC_TUNABLES"] = f"{ALLOCATOR['GLIBC_TUNABLES']}:{own['GLIBC_TUNABLES']}"
    return found


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, or of the process on the CPU.

    Each component is the most that it ever takes; they are not all full at once, so ``total``, the most that is needed
    at any moment, is at most their sum.

    Attributes:
        weights: the base model's, as stored, and a frozen head's copy where a CPU computes in 16 bits; under ZeRO 3
            this GPU's part and the layer that is gathered.
        adapters: the adapter's weights.
        gradients: of the trained parameters, with the buckets of a distributed run.
        optimiser: states, 32-bit master weights, and the temporaries of its step.
        activations: what is kept for backward, with the temporaries of the layer at work.
        logits: those on label positions; where they are not made and used up at once (see
            :mod:`finegrid.training.loss`), their 32-bit copy, log-probabilities and gradients too.
        quantisation: scales of quantised weights and the decoded weights of the layer at work.
        runtime: the CUDA context and the share lost between blocks; on the CPU the process itself, and the part of the
            checkpoint's file by which loading needs more than any step.
        total: the peak.
        host: what offloading moves into the host's memory, for this GPU.
    """

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    quantisation: int
    runtime: int
    total: int
    host: int = 0


def training_memory(
    settings: RunSettings,
    shape: Shape,
    *,
    rows: int,
    length: int,
    labels: int,
    device: str,
    deepspeed: Mapping[str, Any] | None = None,
    padded: bool | None = None,
    whole_logits: bool = False,
) -> Memory:
    """Return what a training step needs on each GPU, or on the CPU.

    Args:
        rows: rows of a batch on one device.
        length: tokens of the longest row; shorter rows are padded to it.
        labels: label tokens of the batch.
        device: ``cpu`` or ``cuda``.
        deepspeed: its configuration; None reads the file that ``training_args.deepspeed`` names, relative to the
            working directory.
        padded: whether rows differ in length, so that the attention gets a mask; None: with more than one row.
        whole_logits: the logits of all label positions are made at once, as by trainers other than Finegrid's.

    Raises:
        UserError: the DeepSpeed file can't be read.
    """
    plan = _plan(settings, shape, device, rows > 1 if padded is None else padded, deepspeed, whole_logits)
    return plan.price(rows, length, labels)


def evaluation_memory(
    settings: RunSettings, shape: Shape, *, rows: int, prompt: int, new_tokens: int, device: str
) -> Memory:
    """Return what generating and scoring answers needs: weights, adapter, key-value cache and logits.

    Args:
        rows: rows of a batch.
        prompt: tokens of the longest prompt.
        new_tokens: tokens of an answer at most; reference answers are taken to be as long.
        device: ``cpu`` or ``cuda``.
    """
    how = _way(settings, shape, device, rows > 1, None)
    # Losses one by one.
    numerics = how.numerics(evaluates=True, autocast=False, flat=False, fused=False, half_loss=False)
    adapters, length = how.adapters[0][0], prompt + new_tokens

    def most(moments: Iterable[Size], columns: int, labels: int) -> float:
        form = (rows * columns, rows * columns**2, labels, 1, 1, rows_of_logits(shape.vocabulary, labels), labels)
        return max(_price(moment, form) for moment in moments)

    layer = layer_timeline(shape, numerics, adapters, False).forward
    head = head_timeline(shape, numerics, False, False).forward
    position = 2 * shape.kv_heads * shape.head_dim * numerics.stream * rows
    cache = shape.layers * position * length
    # A layer's new keys and values lie beside the old ones until those go; eager attention repeats them for each head.
    repeats = shape.heads // shape.kv_heads if numerics.attention == "eager" else 0
    growing = position * length * (1 + repeats)
    last = rows * shape.vocabulary * (numerics.stream + 2 * FLOAT)  # logits, in 32 bits, and processed
    generating = cache + max(most(layer, prompt, 0), growing + last)
    # The references' likelihood: finegrid.training.validation bounds a batch to so many label tokens.
    labels = max(min(rows * new_tokens, 1024), new_tokens)
    scoring = max(most(layer, length, 0), most(head, length, labels))
    chunk = rows_of_logits(shape.vocabulary, labels)
    logits = max(last, max(moment.label * labels + moment.chunk * chunk for moment in head))
    dynamic = max(generating, scoring)
    static = how.weights + how.adapter_bytes + how.scales
    runtime = max(_runtime(device, dynamic, static + dynamic), _loading(how, device) - static - dynamic)
    return Memory(
        weights=round(how.weights),
        adapters=round(how.adapter_bytes),
        gradients=0,
        optimiser=0,
        activations=round(cache + max(most(layer, length, 0), growing)),
        logits=round(logits),
        quantisation=round(how.scales + how.decoded),
        runtime=round(runtime),
        total=round(static + dynamic + runtime),
    )


def trainable_parameters(settings: RunSettings, shape: Shape) -> int:
    """Return how many parameters are trained: peft's own count of an adapter, all of them for full fine-tuning."""
    if settings.peft_config is None:
        return shape.parameters
    return _count(_adaptation(settings, shape).tensors)


def trained_tensors(settings: RunSettings, shape: Shape) -> Matrices:
    """Return the trained tensors as (how many, rows, columns); columns are 0 for a vector."""
    return _adaptation(settings, shape).tensors


def optimiser_bytes(settings: RunSettings, shape: Shape, itemsize: int) -> int:
    """Return the bytes of the optimiser's states over all GPUs, of parameters of `itemsize` bytes an element."""
    optim = str(settings.training_args.get("optim") or "adamw_torch")
    embedding = shape.vocabulary * shape.hidden if settings.peft_config is None else 0
    return round(_optimiser(optim, trained_tensors(settings, shape), itemsize, embedding, "cpu")[0])


def zero_partitioning(settings: RunSettings, device: str) -> Zero:
    """Return how the run's DeepSpeed configuration divides a model; stage 0 without one.

    Raises:
        UserError: the file that ``training_args.deepspeed`` names can't be read.
    """
    return _zero(settings, device, None)


# ---------------------------------------------------------------- what is trained

Matrices = tuple[tuple[int, int, int], ...]  # (how many, rows, columns); columns 0: a vector
# peft's own choice where a recipe names no target modules (peft/utils/constants.py).
LORA_TARGETS = {"phi3": ("qkv_proj",), "chatglm": ("query_key_value",)}
IA3_TARGETS = {"llama": ("k_proj", "v_proj", "down_proj"), "mistral": ("k_proj", "v_proj", "down_proj")}


class Adaptation(NamedTuple):
    """What a ``peft_config`` adds to a model: the layers' adapters in runs of equal layers, and trained tensors."""

    layers: tuple[tuple[Adapters, int], ...]
    tensors: Matrices


def _adaptation(settings: RunSettings, shape: Shape) -> Adaptation:
    if settings.peft_config is None:
        return Adaptation((((None,) * len(shape.linears), shape.layers),), _all_tensors(shape))
    return _adapter(shape, json.dumps(settings.peft_config, sort_keys=True, default=sorted))


@lru_cache(maxsize=1024)
def _all_tensors(shape: Shape) -> Matrices:
    embedding = (1, shape.vocabulary, shape.hidden)
    tensors = [embedding, (1, shape.hidden, 0)]
    for linear in shape.linears:
        tensors.append((shape.layers, linear.outputs, linear.inputs))
        if linear.bias:
            tensors.append((shape.layers, linear.outputs, 0))
    tensors.append((shape.layers * shape.family.norms, shape.hidden, 0))
    if shape.family.qk_norms:
        tensors.append((shape.layers * 2, shape.head_dim, 0))
    return tuple(tensors if shape.tied else [*tensors, embedding])


@lru_cache(maxsize=1024)
def _adapter(shape: Shape, config: str) -> Adaptation:
    config = json.loads(config)
    layers = _runs([_layer_adapters(shape, config, number) for number in range(shape.layers)])
    tensors: list[tuple[int, int, int]] = []
    for adapters, count in layers:
        for linear, adapter in zip(shape.linears, adapters, strict=True):
            tensors += [(count, rows, columns) for _, rows, columns in _adapter_tensors(linear, adapter, config)]
    copied: list[tuple[int, int, int]] = []
    embedding, head = _ends(shape)
    for name, linear in ((embedding, None), (head, Linear(head, shape.hidden, shape.vocabulary))):
        if _matches(name, config.get("modules_to_save") or ()):
            copied.append((1, shape.vocabulary, shape.hidden))
        elif _kind(config) in ("lora", "dora") and _targeted(name, config, shape, ends=True):
            rank = _rank(name, config)
            tensors += [(1, rank, shape.vocabulary if linear is None else shape.hidden)]
            tensors += [(1, shape.hidden if linear is None else shape.vocabulary, rank)]
            if _kind(config) == "dora":
                tensors.append((1, shape.hidden if linear is None else shape.vocabulary, 0))
    if config.get("peft_type") in ("PROMPT_TUNING", "P_TUNING"):
        tensors.append((1, config.get("num_virtual_tokens") or 0, shape.hidden))
    if config.get("peft_type") == "PREFIX_TUNING":
        width = 2 * shape.layers * shape.kv_heads * shape.head_dim
        tensors.append((1, config.get("num_virtual_tokens") or 0, width))
    return Adaptation(layers, tuple(tensors + copied))


def _kind(config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type", "LORA")).lower()
    if kind == "lora":
        return "dora" if config.get("use_dora") else "lora"
    # Other methods on linear layers are low-rank ones: as LoRA of their rank.
    return kind if kind in ("ia3", "prompt_tuning", "p_tuning", "prefix_tuning") else "lora"


def _layer_adapters(shape: Shape, config: Mapping[str, Any], number: int) -> Adapters:
    kind, adapters = _kind(config), []
    chosen = config.get("layers_to_transform")
    chosen = [chosen] if isinstance(chosen, int) else chosen
    for linear in shape.linears:
        name = f"{shape.layer_name(number)}.{linear.name}"
        if "tuning" in kind or (chosen and number not in chosen) or not _targeted(name, config, shape):
            adapters.append(None)
        elif kind == "ia3":
            inner = config.get("feedforward_modules") or ("down_proj",)
            adapters.append(Adapter("ia3_input" if _matches(name, inner) else "ia3", 0, False))
        else:
            adapters.append(Adapter(kind, _rank(name, config), bool(config.get("lora_dropout"))))
    return tuple(adapters)


def _adapter_tensors(linear: Linear, adapter: Adapter | None, config: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    if adapter is None:
        return []
    if adapter.kind.startswith("ia3"):
        return [(1, linear.inputs if adapter.kind == "ia3_input" else linear.outputs, 0)]
    tensors = [(1, adapter.rank, linear.inputs), (1, linear.outputs, adapter.rank)]
    if config.get("lora_bias"):
        tensors.append((1, linear.outputs, 0))
    if adapter.kind == "dora":
        tensors.append((1, linear.outputs, 0))
    return tensors


def _targeted(name: str, config: Mapping[str, Any], shape: Shape, ends: bool = False) -> bool:
    if _matches(name, config.get("exclude_modules") or ()):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return not ends
    if targets is None:
        if _kind(config) == "ia3":
            targets = IA3_TARGETS.get(shape.model_type, ("q_proj", "v_proj", "down_proj"))
        else:
            targets = LORA_TARGETS.get(shape.model_type, ("q_proj", "v_proj"))
    return _matches(name, targets)


def _matches(name: str, targets: str | Iterable[str]) -> bool:
    """As peft matches: a string is a regular expression of the whole name, a list has names or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _rank(name: str, config: Mapping[str, Any]) -> int:
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return config.get("r") or config.get("init_r") or 8


def _ends(shape: Shape) -> tuple[str, str]:
    if shape.family.remote:
        return "transformer.embedding.word_embeddings", "transformer.output_layer"
    return "model.embed_tokens", "lm_head"


def _runs(layers: list[Adapters]) -> tuple[tuple[Adapters, int], ...]:
    runs: list[list] = []
    for adapters in layers:
        if runs and runs[-1][0] == adapters:
            runs[-1][1] += 1
        else:
            runs.append([adapters, 1])
    return tuple((adapters, count) for adapters, count in runs)


# ---------------------------------------------------------------- optimisers

# Tensors of state for each parameter; AdamW and what is not named here keep two.
STATES = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3, "adafactor": 0, "adalomo": 0, "lomo": 0}
BITSANDBYTES = ("bnb", "paged", "lion", "ademamix", "adamw_8bit")


def _optimiser(optim: str, tensors: Matrices, itemsize: int, embedding: int, device: str) -> tuple[float, float]:
    """Return the bytes of an optimiser's states and the most of its temporaries.

    Read in torch/optim/{adam,sgd,rmsprop,adagrad}.py, transformers/optimization.py (Adafactor),
    bitsandbytes/optim/optimizer.py, and transformers/trainer.py, which keeps embeddings in 32 bits.
    """
    total = _count(tensors)
    kind = next((name for name in STATES if name in optim), "adamw")
    states = STATES.get(kind, 2)
    # One parameter's two temporaries beside the last one's; on CUDA one of all parameters at once.
    sizes = [rows * columns for _, rows, columns in tensors if columns]
    two = max((last + 2 * size for last, size in zip([0, *sizes], sizes, strict=False)), default=0)
    if kind == "adafactor":
        return sum(count * (rows + columns) for count, rows, columns in tensors) * FLOAT, two * FLOAT
    if "8bit" in optim or "4bit" in optim:
        # A byte (or half of one) and the scales of 256 elements; tensors under 4096 elements stay in 32 bits.
        small = sum(count * _size(rows, columns) for count, rows, columns in tensors if _size(rows, columns) < 4096)
        if any(name in optim for name in BITSANDBYTES) and embedding:
            small += embedding
        width = 0.5 if "4bit" in optim else 1
        return states * ((total - small) * (width + FLOAT / 256) + small * FLOAT), 0
    if any(name in optim for name in BITSANDBYTES):
        return states * total * FLOAT, 0
    if "fused" in optim or "lomo" in kind:
        return states * total * itemsize, 0
    one = total if device == "cuda" else max(sizes, default=0) if kind == "sgd" else two
    return states * total * itemsize, one * itemsize


def _count(tensors: Matrices) -> int:
    return sum(count * _size(rows, columns) for count, rows, columns in tensors)


def _size(rows: int, columns: int) -> int:
    return rows * max(columns, 1)


# ---------------------------------------------------------------- how a run computes


class Zero(NamedTuple):
    """DeepSpeed's partitioning: ``stage`` 0 is none."""

    stage: int = 0
    half: bool = False  # computes in 16 bits, with 32-bit master weights
    optimiser_on_host: bool = False
    parameters_on_host: bool = False
    bucket: float = 0  # elements
    live: float = 0  # parameters gathered at once


@dataclass(frozen=True)
class Way:
    """A run's way of computing on one device, and the bytes that do not hang on the batch."""

    shape: Shape
    base: Numerics
    adapters: tuple[tuple[Adapters, int], ...]
    tensors: Matrices
    full: bool
    ends_trained: tuple[bool, bool]  # embedding, head
    weights: float
    adapter_bytes: float
    scales: float
    decoded: float

    def numerics(self, **changes: Any) -> Numerics:
        return replace(self.base, **changes)


def _way(
    settings: RunSettings,
    shape: Shape,
    device: str,
    masked: bool,
    deepspeed: Mapping[str, Any] | None,
    whole_logits: bool = False,
) -> Way:
    arguments, quantised = settings.training_args, settings.quantization_config or {}
    zero = _zero(settings, device, deepspeed)
    chosen = device == "cpu" and cpu_chooses_bf16(settings, shape.hidden)
    autocast = (chosen or _autocast(arguments, device)) and not zero.half
    full = settings.peft_config is None
    adaptation = _adaptation(settings, shape)
    base = "4bit" if quantised.get("load_in_4bit") else "8bit" if quantised.get("load_in_8bit") else "plain"
    stored = FLOAT if base != "plain" else HALF if zero.half else ITEMSIZE[settings.model.dtype]
    compute = ITEMSIZE.get(str(quantised.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."), FLOAT)
    attention = settings.model.attn_implementation or ("eager" if shape.family.eager else "sdpa")
    attention = attention if attention in ("eager", "sdpa") else "flash"
    smoothing, stream = bool(arguments.get("label_smoothing_factor")), FLOAT if base != "plain" else stored
    unwrapped = settings.processes == 1 and not zero.stage
    parts = unwrapped and not whole_logits
    embedding, head = _ends(shape)
    kept = (settings.peft_config or {}).get("modules_to_save") or ()
    weights, scales, decoded = _weights(shape, base, stored, quantised)
    trained = _count(adaptation.tensors)
    adapter_itemsize = HALF if zero.half else FLOAT
    return Way(
        shape=shape,
        base=Numerics(
            itemsize=stored,
            autocast=autocast,
            base=base,
            compute=compute,
            trained=full,
            attention=attention,
            masked=masked,
            cuda=device == "cuda",
            adapter=adapter_itemsize,
            adds_gradients=(arguments.get("gradient_accumulation_steps") or 1) > 1,
            smoothing=smoothing,
            flat=settings.training.padding_free,
            parts=parts,
            narrow=unwrapped
            and settings.training.padding_free
            and not (shape.attention_softcap or arguments.get("activation_checkpointing")),
            fused=parts and stream == FLOAT and not (autocast or smoothing),
            half_loss=parts and autocast and device == "cpu" and not (smoothing or shape.logit_softcap),
        ),
        adapters=adaptation.layers,
        tensors=adaptation.tensors,
        full=full,
        ends_trained=(full or _matches(embedding, kept), full or _matches(head, kept)),
        weights=weights,
        adapter_bytes=0 if full else trained * adapter_itemsize,
        scales=scales,
        decoded=decoded,
    )


def _autocast(arguments: Mapping[str, Any], device: str) -> bool:
    if arguments.get("bf16") or arguments.get("fp16"):
        return True
    return device == "cuda" and "bf16" not in arguments and not arguments.get("use_cpu")


def _weights(shape: Shape, base: str, stored: int, quantised: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return the bytes of the weights, of their quantisation's scales and of the largest matrix decoded."""
    if base == "plain":
        return shape.parameters * stored, 0, 0
    packed = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
    rest = (shape.parameters - packed) * stored
    largest = max(linear.inputs * linear.outputs for linear in shape.linears)
    if base == "8bit":
        scales = shape.layers * sum(linear.outputs for linear in shape.linears) * FLOAT
        return packed + rest, scales, largest * HALF
    blocks = packed / int(quantised.get("bnb_4bit_blocksize") or 64)
    double = quantised.get("bnb_4bit_use_double_quant")
    scales = blocks * (1 + FLOAT / 256) if double else blocks * FLOAT
    compute = ITEMSIZE.get(str(quantised.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."), FLOAT)
    return packed / 2 + rest, scales, largest * compute


def _zero(settings: RunSettings, device: str, deepspeed: Mapping[str, Any] | None) -> Zero:
    config = deepspeed if deepspeed is not None else _deepspeed(settings.training_args.get("deepspeed"))
    if not config:
        return Zero()
    zero = config.get("zero_optimization") or {}
    stage = int(zero.get("stage") or 0)
    bf16 = (config.get("bf16") or {}).get("enabled", False)
    fp16 = (config.get("fp16") or {}).get("enabled", False)
    automatic = _autocast(settings.training_args, device)
    half = any(automatic if value == "auto" else bool(value) for value in (bf16, fp16))

    def number(key: str, default: float) -> float:
        value = zero.get(key, default)
        return default if value == "auto" else float(value)

    def on_host(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") in ("cpu", "nvme")

    return Zero(
        stage=stage,
        half=half,
        optimiser_on_host=on_host("offload_optimizer"),
        parameters_on_host=stage == 3 and on_host("offload_param"),
        bucket=number("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") else 1),
        live=number("stage3_max_live_parameters", 1e9) if stage == 3 else 0,
    )


def _deepspeed(named: Any) -> Mapping[str, Any] | None:
    return _read_deepspeed(named) if isinstance(named, str) else named or None


@lru_cache(maxsize=64)
def _read_deepspeed(path: str) -> Mapping[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"training_args.deepspeed: {path}: can't be read ({error})") from error


# ---------------------------------------------------------------- a step


@dataclass(frozen=True)
class Plan:
    """A run's memory as a function of its batch: what stands, and the moments of a step."""

    way: Way
    static: float  # weights, adapter, scales, optimiser states, what persists
    gradients: float
    states: float
    temporaries: float
    moments: tuple[Size, ...]
    evaluation: tuple[Size, ...]
    evaluation_rows: int | None
    host: float
    device: str
    loading: float  # the peak while the weights are made

    def price(self, rows: int, length: int, labels: int) -> Memory:
        """Return the memory of a step on such a batch, see :func:`training_memory`."""
        way = self.way
        form = (rows * length, rows * length**2, labels, 1, 1, rows_of_logits(way.shape.vocabulary, labels), labels)
        inputs = _inputs(way, rows, length, labels)
        step = max(_price(moment, form) for moment in self.moments) + inputs
        peaks = [step, self.gradients + self.temporaries]
        if self.evaluation_rows:
            share = self.evaluation_rows / rows
            scored = round(labels * share)
            chunk = rows_of_logits(way.shape.vocabulary, scored)
            validation = (form[0] * share, form[1] * share, scored, 1, 1, chunk, scored)
            peaks.append(max(_price(moment, validation) for moment in self.evaluation) + inputs * share)
        dynamic = max(peaks)
        fixed = 0 if way.base.base != "plain" else 1
        kept = (form[0], form[1], 0, fixed, 0, 0, labels)
        activations = max(_price(moment, kept) for moment in self.moments) + inputs
        runtime = _runtime(self.device, dynamic, self.static + dynamic)
        runtime = max(runtime, self.loading - self.static - dynamic)
        return Memory(
            weights=round(way.weights),
            adapters=round(way.adapter_bytes),
            gradients=round(self.gradients),
            optimiser=round(self.states + self.temporaries),
            activations=round(activations),
            logits=round(max(moment.label * labels + moment.chunk * form[5] for moment in self.moments)),
            quantisation=round(way.scales + way.decoded),
            runtime=round(runtime),
            total=round(self.static + dynamic + runtime),
            host=round(self.host),
        )


def _price(moment: Size, form: tuple[float, ...]) -> float:
    return sum([size * count for size, count in zip(moment, form, strict=True)])


def _runtime(device: str, dynamic: float, live: float) -> float:
    return CUDA_CONTEXT + CUDA_FRAGMENTATION * dynamic if device == "cuda" else CPU_PROCESS + CPU_FRAGMENTATION * live


def _loading(way: Way, device: str) -> float:
    """The peak of a process on the CPU while it makes other weights of the checkpoint's: the file stays mapped as a
    whole until the last one is made. Weights of the file's own type are the map; on a GPU it is host memory."""
    if device == "cuda" or (way.base.base == "plain" and way.shape.stored == way.base.itemsize):
        return 0.0
    return CPU_PROCESS + way.shape.parameters * way.shape.stored + way.weights + way.scales


def _inputs(way: Way, rows: int, length: int, labels: int) -> float:
    """The batch itself: ids, mask and labels as int64; the boolean mask; cosines and sines."""
    masks = rows * length**2 if way.base.masked or way.base.attention == "eager" else 0
    return rows * length * 24 + labels * 16 + masks + 2 * length * way.shape.rotary_dim * way.base.stream


def _plan(
    settings: RunSettings,
    shape: Shape,
    device: str,
    masked: bool,
    deepspeed: Mapping[str, Any] | None,
    whole_logits: bool = False,
) -> Plan:
    arguments = settings.training_args
    way = _way(settings, shape, device, masked, deepspeed, whole_logits)
    zero = _zero(settings, device, deepspeed)
    optim = arguments.get("optim") or "adamw_torch"
    data = settings.data_config
    # Validation rows are scored before the first and after the last step, whatever eval_strategy says.
    evaluates = data.val_file or data.validation_size or (data.dataset and data.dataset.validation_split)
    return _build(
        way,
        zero,
        settings.processes,
        str(optim),
        bool(arguments.get("activation_checkpointing")),
        int(arguments.get("per_device_eval_batch_size") or 8) if evaluates else None,
        device,
    )


@lru_cache(maxsize=4096)
def _build(
    way: Way, zero: Zero, gpus: int, optim: str, checkpointing: bool, evaluation_rows: int | None, device: str
) -> Plan:
    trained = _count(way.tensors)
    itemsize = way.base.itemsize if way.full else way.base.adapter
    embedding = way.shape.vocabulary * way.shape.hidden if way.full else 0
    states, temporaries = _optimiser(optim, way.tensors, FLOAT if zero.stage else itemsize, embedding, device)
    gradients = trained * itemsize
    weights, adapters, host, extra = way.weights, way.adapter_bytes, 0.0, 0.0
    share = 1.0  # of a layer's gradients that stays on this GPU
    if zero.stage:
        states = (states + trained * FLOAT) / gpus  # with the 32-bit master weights
        temporaries = trained * FLOAT / gpus  # the gradients of this part in 32 bits
        extra = min(zero.bucket, trained) * itemsize
        if zero.stage >= 2:
            share = 1 / gpus
            gradients *= share
        if zero.stage == 3:
            gathered = min(zero.live, way.shape.parameters) * way.base.itemsize
            if zero.parameters_on_host:
                host += (weights + adapters) / gpus
                weights, adapters = min(gathered, weights), 0.0
            else:
                weights, adapters = min(weights / gpus + gathered, weights), adapters / gpus
        if zero.optimiser_on_host:
            host += states + trained * FLOAT / gpus
            states, temporaries = 0.0, 0.0
            if zero.stage >= 2:
                gradients, share = 0.0, 0.0
    elif gpus > 1:
        extra = gradients  # DistributedDataParallel's buckets
    if "paged" in optim and device == "cuda":
        # Unified memory: it goes to the host when the GPU is full, and torch's allocator does not count it.
        host, states = host + states, 0.0
    loading = _loading(replace(way, weights=weights), device)
    weights += _head_copy(way)
    way = replace(way, weights=weights, adapter_bytes=adapters)
    persistent = gradients if way.base.adds_gradients else 0.0
    moments = list(_step(way, checkpointing, share))
    if persistent:
        moments = [moment + Size(gradient=persistent) for moment in moments]
    return Plan(
        way=way,
        static=weights + adapters + way.scales + states + extra,
        gradients=gradients + extra,
        states=states,
        temporaries=temporaries,
        moments=tuple(moments),
        evaluation=tuple(_validation(way)) if evaluation_rows else (),
        evaluation_rows=evaluation_rows,
        host=host,
        device=device,
        loading=loading,
    )


def _step(way: Way, checkpointing: bool, share: float) -> Iterable[Size]:
    """Yield the moments of forward and backward: bytes beside what stands."""
    shape, numerics = way.shape, way.base
    embedding_trained, head_trained = way.ends_trained
    first = embedding_trained or checkpointing
    runs = _timelines(way, numerics, first)
    kept = Size(token=shape.hidden * numerics.stream)
    head = head_timeline(shape, numerics, head_trained, True)
    before = NOTHING
    for timeline, count, _ in runs:
        before += (kept if checkpointing else timeline.saved) * count
    if checkpointing:
        # Autocast's copies go when the model returns: beside the logits, before their float32 copy.
        copies = Size(fixed=_autocast_copies(way))
        whole = shape.logit_softcap or not numerics.parts
        logits = Size(label=shape.vocabulary) if whole else Size(chunk=shape.vocabulary)
        yield before + copies + Size(token=2 * shape.hidden * FLOAT, label=HALF * 2 * shape.hidden) + logits * HALF
    for moment in (*head.forward, *head.backward):
        yield before + moment
    gradients = NOTHING
    size = shape.vocabulary * shape.hidden * numerics.stream
    if head_trained and not numerics.adds_gradients:
        gradients += Size(gradient=size * (1 if shape.tied else share))
    elif head_trained and shape.tied:
        gradients += Size(gradient=size)  # waits for the embedding's
    if numerics.trained and not numerics.adds_gradients:
        gradients += Size(gradient=shape.hidden * numerics.stream * share)
    for timeline, count, made in reversed(runs):
        own = kept if checkpointing else timeline.saved
        moments = timeline.backward
        if checkpointing:
            moments += tuple(moment + kept for moment in timeline.forward)
        for after in {0, count - 1}:
            rest = before - own * (after + 1)
            for moment in moments:
                yield rest + moment + gradients + made * (after * share)
        before -= own * count
        gradients += made * (count * share)
    if embedding_trained:
        yield gradients + kept + Size(gradient=size)


def _timelines(way: Way, numerics: Numerics, first_has_gradient: bool) -> list[tuple]:
    """Return (timeline, how many layers, bytes of one layer's gradients) for each run of equal layers."""
    runs: list[tuple] = []
    for number, (adapters, count) in enumerate(way.adapters, start=1):
        made = NOTHING
        if not numerics.adds_gradients and not numerics.evaluates:
            made = Size(gradient=_layer_trained(way, adapters))
        if not runs and not first_has_gradient:
            runs.append((layer_timeline(way.shape, numerics, adapters, False, way.shape.layers == 1), 1, made))
            count -= 1
        is_last = number == len(way.adapters) and count > 0
        if count > is_last:
            runs.append((layer_timeline(way.shape, numerics, adapters, True), count - is_last, made))
        if is_last:
            runs.append((layer_timeline(way.shape, numerics, adapters, True, True), 1, made))
    return runs


def _layer_trained(way: Way, adapters: Adapters) -> float:
    if way.full:
        return way.shape.layer_parameters * way.base.itemsize
    total = 0
    for linear, adapter in zip(way.shape.linears, adapters, strict=True):
        total += _count(tuple(_adapter_tensors(linear, adapter, {})))
    return total * way.base.adapter


def _autocast_copies(way: Way) -> float:
    """The 16-bit copies of trained 32-bit weights, which autocast keeps to the end of a forward pass."""
    if not way.base.autocast or (way.base.itemsize if way.full else way.base.adapter) == HALF:
        return 0
    ends = (0 if way.shape.tied else 1) + (1 if way.base.half_loss else 0)
    embedding = way.shape.vocabulary * way.shape.hidden * ends if way.full else 0
    return (sum(count * rows * columns for count, rows, columns in way.tensors) - embedding) * HALF


def _head_copy(way: Way) -> float:
    """The copy of a frozen head in 16 bits, see :class:`finegrid.training.loss.HalfCrossEntropy`."""
    if not way.base.half_loss or way.ends_trained[1] or way.base.stream == HALF:
        return 0
    return way.shape.vocabulary * way.shape.hidden * HALF


def _validation(way: Way) -> Iterable[Size]:
    numerics = way.numerics(evaluates=True)
    copies = Size(fixed=_autocast_copies(way))
    for timeline, _, _ in _timelines(way, numerics, True):
        for moment in timeline.forward:
            yield moment + copies
    if numerics.half_loss and way.ends_trained[1]:
        copies += Size(fixed=way.shape.vocabulary * way.shape.hidden * HALF)  # cast for each batch
    for moment in head_timeline(way.shape, numerics, False, False).forward:
        yield moment + copies
