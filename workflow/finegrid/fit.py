"""``finegrid fit``: what can be fine-tuned on a GPU, model by method, from the package's own table of shapes.

For each model and method: the largest batch of rows of a given length, and the longest row in a batch of one. It reads
nothing but the package's tables and runs on any machine.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finegrid import gpus as cards
from finegrid.errors import UserError, nearest
from finegrid.memory import Memory, shape_of, training_memory
from finegrid.settings import RunSettings
from finegrid.shapes import display_name, model_shapes, positions, read_config

WIDTH = 100  # of the printed table
MOST_ROWS = 1024
STEP = 64  # tokens; a longest row is a multiple of it
GIB = 2**30
# Not in the key by which equal models are one row of the table.
OTHER_KEYS = {"architectures", "torch_dtype", "dtype", "max_position_embeddings", "seq_length"}
FULL_8BIT = "full-8bit"
METHODS = {
    "full": "full, fp32\nAdamW",
    FULL_8BIT: "full, bf16\n8-bit AdamW",
    "lora": "LoRA\nbf16 base",
    "qlora": "QLoRA\nnf4 base",
}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Fit:
    """What fits of one model by one method.

    Attributes:
        model: hub id, or the folder the user named.
        parameters: of the model.
        method: a key of ``METHODS``.
        batch: most rows of the asked length in a batch on one GPU; 0 where one row is too much.
        batch_is_more: the search ended at ``MOST_ROWS``: more would fit.
        longest: tokens of the longest row in a batch of one, at most what the model was made for; 0 where none fits.
        needs: bytes on one GPU for a batch of one row of the asked length.
        host: bytes of host memory that offloading takes then, for this GPU.
        memory: the columns of that estimate.
    """

    model: str
    parameters: int
    method: str
    batch: int
    batch_is_more: bool
    longest: int
    needs: int
    host: int
    memory: Memory


def print_fit(
    gpu_memory: str | None = None,
    gpu: str | None = None,
    length: int = 1024,
    model: str | None = None,
    rank: int = 16,
    checkpointing: bool = True,
    gpus: int = 1,
    zero: int = 0,
    offload: bool = False,
    label_share: float = 1.0,
    as_json: bool = False,
) -> None:
    """Print what fits, as a table of at most 100 columns or as JSON.

    Args:
        gpu_memory: of one GPU, such as ``24GB``.
        gpu: a card of ``gpus.json`` instead; with neither, this machine's first card.
        length: tokens of a row, for the largest batch.
        model: part of a hub id, or a folder with a config.json; None shows every model of the table.
        rank: of LoRA and QLoRA, on all linear layers.
        checkpointing: of activations.
        gpus: that train together.
        zero: DeepSpeed's stage, 0 without DeepSpeed; QLoRA is left out at stage 3.
        offload: keep optimiser states (and the parameters under ZeRO 3) in host memory.
        label_share: share of the tokens that carry loss; 1 is the most that it can be.
        as_json: print a list of objects instead of the table.

    Raises:
        UserError: an option that makes no sense, an unknown card or model.
    """
    _check(length, rank, gpus, zero, offload, label_share)
    card = _card(gpu_memory, gpu)
    recipes = recipes_of(rank, checkpointing, gpus)
    if zero == 3:  # bitsandbytes' weights are placed whole while they load
        del recipes["qlora"]
    deepspeed = _deepspeed(zero, offload)
    found = [
        fit(name, config, method, recipe, card.memory, length, deepspeed, label_share)
        for name, config in _chosen(model)
        for method, recipe in recipes.items()
    ]
    if as_json:
        print(json.dumps([asdict(one) | {"gpu": card.name, "gpu_memory": card.memory} for one in found], indent=1))
        return
    _print_table(found, _title(card, gpus, zero, offload), _notes(length, rank, checkpointing, offload, label_share))


def recipes_of(rank: int = 16, checkpointing: bool = True, gpus: int = 1) -> dict[str, RunSettings]:
    """Return the settings of each method; the base model's name in them is of no account."""
    adapter = {"peft_type": "LORA", "r": rank, "target_modules": "all-linear"}
    arguments = {"bf16": True, "activation_checkpointing": checkpointing, "gradient_accumulation_steps": 1}
    kinds: dict[str, dict[str, Any]] = {
        # fp32 weights are the master weights; the fused AdamW is transformers' own choice on a GPU.
        "full": {"dtype": "float32", "optim": "adamw_torch_fused"},
        FULL_8BIT: {"dtype": "bfloat16", "optim": "adamw_8bit"},
        "lora": {"dtype": "bfloat16", "optim": "adamw_torch_fused", "peft": adapter},
        "qlora": {"dtype": "bfloat16", "optim": "adamw_torch_fused", "peft": adapter, "quantised": NF4},
    }
    return {
        method: RunSettings(
            model={"model_name_or_path": "any", "dtype": kind["dtype"]},
            training_args=arguments | {"optim": kind["optim"]},
            peft_config=kind.get("peft"),
            quantization_config=kind.get("quantised"),
            gpus=gpus,
        )
        for method, kind in kinds.items()
    }


def fit(
    model: str,
    config: dict[str, Any],
    method: str,
    recipe: RunSettings,
    memory: int,
    length: int,
    deepspeed: dict[str, Any] | None = None,
    label_share: float = 1.0,
) -> Fit:
    """Return what fits of one model by one method into ``memory`` bytes, see :class:`Fit`."""
    shape = shape_of(config)

    def estimate(rows: int, tokens: int) -> Memory:
        labels = max(1, round(rows * tokens * label_share))
        return training_memory(
            recipe, shape, rows=rows, length=tokens, labels=labels, device="cuda", deepspeed=deepspeed or {}
        )

    one = estimate(1, length)
    batch = _most(lambda rows: estimate(rows, length).total, memory, MOST_ROWS)
    limit = positions(config) or 2**20
    longest = _most(lambda steps: estimate(1, steps * STEP).total, memory, limit // STEP) * STEP
    return Fit(model, shape.parameters, method, batch, batch == MOST_ROWS, longest, one.total, one.host, one)


def _most(size: Callable[[int], int], memory: int, limit: int) -> int:
    """Return the largest number of 1..limit whose size fits, 0 where 1 does not; the size must grow with the number.

    Memory grows all but linearly, so a straight line between what fits and what doesn't finds it in a few steps.
    """
    low, small = 1, size(1)
    if small > memory:
        return 0
    high, large = limit, size(limit)
    if large <= memory:
        return limit
    while high - low > 1:
        middle = low + round((memory - small) / (large - small) * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        between = size(middle)
        if between <= memory:
            low, small = middle, between
        else:
            high, large = middle, between
    return low


# ---------------------------------------------------------------- options


def _check(length: int, rank: int, gpus: int, zero: int, offload: bool, label_share: float) -> None:
    problems = [
        f"--{name} {value}: expected 1 or more"
        for name, value in (("length", length), ("rank", rank), ("gpus", gpus))
        if value < 1
    ]
    if zero not in (0, 1, 2, 3):
        problems.append(f"--zero {zero}: no such stage; there are 0 (without DeepSpeed), 1, 2 and 3")
    if offload and zero < 2:
        problems.append("--offload: needs DeepSpeed; add --zero 2 (optimiser states) or --zero 3 (parameters too)")
    if not 0 < label_share <= 1:
        problems.append(f"--label-share {label_share}: expected a share above 0 and up to 1")
    if problems:
        raise UserError(*problems)


def _card(gpu_memory: str | None, gpu: str | None) -> cards.Gpu:
    if gpu_memory and gpu:
        raise UserError(f"--gpu-memory {gpu_memory} and --gpu {gpu}: give one of the two")
    if gpu_memory:
        return cards.Gpu(gpu_memory, cards.parse_bytes(gpu_memory))
    if gpu:
        return cards.gpu(gpu)
    found = cards.detected()
    if not found:
        raise UserError(
            "no GPU here: say which, such as --gpu-memory 24GB or --gpu rtx-4090; "
            f"known are {', '.join(cards.gpu_names())}"
        )
    return found[0]


def _deepspeed(zero: int, offload: bool) -> dict[str, Any] | None:
    """The configuration of ``config/deepspeed`` at that stage, as far as memory hangs on it."""
    if not zero:
        return None
    stage: dict[str, Any] = {"stage": zero}
    if offload:
        stage["offload_optimizer"] = {"device": "cpu"}
        if zero == 3:
            stage["offload_param"] = {"device": "cpu"}
    return {"bf16": {"enabled": True}, "zero_optimization": stage}


def _chosen(model: str | None) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (name, config) of the models to show, one of those whose sizes are equal."""
    table = {hub_id: entry["config"] for hub_id, entry in model_shapes().items()}
    if model is None:
        return _without_twins(table)
    file = Path(model) / "config.json"
    if file.is_file():
        return [(model, read_config(file))]
    wanted = _squash(model)
    exact = {hub_id: config for hub_id, config in table.items() if wanted in (_squash(hub_id), _squash_name(hub_id))}
    found = exact or {hub_id: config for hub_id, config in table.items() if wanted and wanted in _squash(hub_id)}
    if not found:
        close = nearest(display_name(model), [display_name(hub_id) for hub_id in table])
        raise UserError(
            f"--model {model}: no model of Finegrid's table and no folder with a config.json{close}; "
            "without --model every model is shown"
        )
    return _without_twins(found)


def _without_twins(table: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Keep one of models with equal sizes (base and chat models, mirrors), with the longest row any was made for."""
    kept: dict[str, tuple[str, dict[str, Any]]] = {}
    for hub_id, config in table.items():
        key = json.dumps({name: value for name, value in config.items() if name not in OTHER_KEYS}, sort_keys=True)
        first = kept.setdefault(key, (hub_id, config))
        if (positions(config) or 0) > (positions(first[1]) or 0):
            kept[key] = (first[0], config)
    return list(kept.values())


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9./]", "", name.lower())


def _squash_name(hub_id: str) -> str:
    return _squash(display_name(hub_id))


# ---------------------------------------------------------------- the table


def _print_table(found: list[Fit], title: str, notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for header in METHODS.values():
        table.add_column(header, justify="right", no_wrap=True)
    rows: dict[str, dict[str, Fit]] = {}
    for one in found:
        rows.setdefault(one.model, {})[one.method] = one
    names = _names(list(rows))
    for model, by_method in rows.items():
        table.add_row(names[model], *(_cell(by_method.get(method)) for method in METHODS))
    console.print(title, style="bold")
    console.print(table)
    for note in notes:
        console.print(note)


def _names(models: list[str]) -> dict[str, str]:
    """Return a row's name: a model's without what tells the base from the chat model, for a row stands for both."""
    short = {model: re.sub(r"-(Instruct|Base|hf|it|pt)(?=-|$)", "", display_name(model)) for model in models}
    counts = Counter(short.values())
    return {model: name if counts[name] == 1 else display_name(model) for model, name in short.items()}


def _cell(one: Fit | None) -> str:
    if one is None:
        return "[dim]not with ZeRO 3[/dim]"
    host = f"\nhost {_size(one.host)}" if one.host else ""
    if not one.longest:
        return f"[dim]needs {_size(one.needs)}{host}[/dim]"
    return f"{'≥' if one.batch_is_more else ''}{one.batch} · {_tokens(one.longest)}{host}"


def _size(size: int) -> str:
    """Rounded up: what is needed is never said to be less than it is."""
    gib = math.ceil(size / GIB)
    return f"{gib} GiB" if gib < 1000 else f"{math.ceil(size / GIB / 102.4) / 10:.1f} TiB"


def _tokens(count: int) -> str:
    """`8192`, `18.4k`, `131k`: three digits, rounded down."""
    if count < 10_000:
        return str(count)
    return f"{count // 100 / 10:.1f}k" if count < 100_000 else f"{count // 1000}k"


def _title(card: cards.Gpu, gpus: int, zero: int, offload: bool) -> str:
    size = f"{card.memory / GIB:.1f}".removesuffix(".0") + " GiB"
    name = "" if card.name[:1].isdigit() else f"{card.name}, "
    one = f"one GPU ({name}{size})" if gpus == 1 else f"{gpus} GPUs ({name}{size} each)"
    return f"What fits on {one}" + (f" with ZeRO {zero}{' and offload' if offload else ''}" if zero else "")


def _notes(length: int, rank: int, checkpointing: bool, offload: bool, label_share: float) -> list[str]:
    labels = "every token carries loss" if label_share == 1 else f"{label_share:.0%} of the tokens carry loss"
    notes = [
        f"rows of {length:,} tokens that fit in a batch of one GPU · tokens of the longest row that fits alone",
        f"needs: on each GPU, for one row of {length:,} tokens, where no row fits",
        f"activation checkpointing {'on' if checkpointing else 'off'}; {labels}; LoRA of rank {rank} on all linear "
        "layers",
        "how it is estimated, and how far off it may be: docs/memory.md",
    ]
    if offload:
        notes.insert(2, "host: memory that offloading takes of the host, for each GPU")
    return notes
