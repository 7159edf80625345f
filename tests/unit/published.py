"""Published measurements of GPU memory, and what Finegrid predicts for the same runs: the tables of docs/memory.md.

    python tests/unit/published.py --write      # writes the tables and the printed command into docs/memory.md again

Every number under ``published`` stands in the named source. GB is 10^9 bytes, GiB is 2^30. What is measured differs:
nvidia-smi counts the whole process (``total``), torch's *reserved* leaves the CUDA context away, its *allocated* the
gaps between blocks too.
"""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finegrid.fit import NF4, print_fit
from finegrid.memory import CUDA_CONTEXT, Memory, shape_of, training_memory
from finegrid.settings import RunSettings
from finegrid.shapes import model_shapes

DOCS = Path(__file__).parents[2] / "docs/memory.md"
UNITS = {"GiB": 2**30, "GB": 10**9, "MB": 10**6, "MiB": 2**20}
CLAIM = "Llama-3.1-70B"  # the model of the claim about 24 GB


def qwen1(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    """Qwen's first generation: Qwen2's layers without grouped keys and values."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": heads}
    return {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False, **sizes, **heads_of}


SHAPES = {hub_id.split("/")[1]: entry["config"] for hub_id, entry in model_shapes().items()} | {
    "Qwen-1.8B": qwen1(2048, 5504, 24, 16, 151936),
    "Qwen-7B": qwen1(4096, 11008, 32, 32, 151936),
    "Qwen-14B": qwen1(5120, 13696, 40, 40, 152064),
}
ALL = "all-linear"
QV = ("q_proj", "v_proj")
QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Run:
    """A published run.

    Args:
        source: key of ``SOURCES``.
        what: as the source names it.
        model: key of ``SHAPES``.
        rows, length: its batch.
        published: the number in the source, in ``unit``.
        measure: ``smi``, ``reserved`` or ``allocated``; ``base`` is the quantised model alone, ``paged`` leaves away
            the optimiser states that a paged optimiser can move to the host.
        rank, targets: of LoRA; rank 0 is full fine-tuning.
        labels: positions whose logits are computed at once; None: all of them.
        within: how far off our number may be, as a share; None: explained in the text, not promised. A limit ("under
            48 GB") has 0: ours must be below.
    """

    source: str
    what: str
    model: str
    rows: int
    length: int
    published: float
    unit: str = "GiB"
    measure: str = "smi"
    rank: int = 8
    targets: Any = ALL
    quantised: dict | None = None
    checkpointing: bool = True
    autocast: bool = True
    accumulation: int = 1
    optim: str = "adamw_torch"
    attention: str | None = "flash_attention_2"
    labels: int | None = None
    zero: int = 0
    limit: bool = False
    within: float | None = None
    more: dict = field(default_factory=dict)

    def memory(self) -> Memory:
        """Return our estimate of the run."""
        adapter = {"peft_type": "LORA", "r": self.rank, "target_modules": self.targets}
        adapter["target_modules"] = self.targets if isinstance(self.targets, str) else list(self.targets)
        settings = RunSettings(
            model={"model_name_or_path": "any", "dtype": "bfloat16", "attn_implementation": self.attention},
            training_args={
                "bf16": self.autocast,
                "activation_checkpointing": self.checkpointing,
                "gradient_accumulation_steps": self.accumulation,
                "optim": self.optim,
            },
            peft_config=adapter if self.rank else None,
            quantization_config=self.quantised,
        )
        deepspeed = {"bf16": {"enabled": True}, "zero_optimization": {"stage": self.zero}} if self.zero else {}
        return training_memory(
            settings,
            shape_of(SHAPES[self.model]),
            rows=self.rows,
            length=self.length,
            labels=self.labels or self.rows * self.length,
            device="cuda",
            deepspeed=deepspeed,
            whole_logits=True,
        )

    def predicted(self) -> float:
        """Return our number for what was measured, in the source's unit."""
        memory = self.memory()
        size = {
            "smi": memory.total,
            "reserved": memory.total - CUDA_CONTEXT,
            "allocated": memory.total - memory.runtime,
            "base": memory.weights + memory.quantisation,
            "paged": memory.total - memory.host,
        }[self.measure]
        return size / UNITS[self.unit]

    def deviation(self) -> float:
        return self.predicted() / self.published - 1


# Where each number stands.
SOURCES = {
    "QLoRA": "Dettmers et al., *QLoRA* (arXiv 2305.14314): section 2 (memory requirement of parameter-efficient "
    "fine-tuning: the 4-bit base model), abstract and section 4 (33B and 65B on a single GPU of 24 and 48 GB with "
    "paged optimisers; our number is what is left on the GPU when those are paged out)",
    "LLaMA-Factory": "hiyouga/LLaMA-Factory, wiki page *Performance comparison* (revision of 15 April 2024): both "
    "tables, columns HF and FlashAttention2",
    "fsdp_qlora": "AnswerDotAI/fsdp_qlora, `benchmarks_03_2024.md`, *Starting at 7B*, the rows with DDP (a whole copy "
    "on each GPU); rank and targets from `train.py`",
    "LitGPT": "Lightning-AI/litgpt, `tutorials/resource-tables.md`, *Finetuning with LoRA on 1 GPU*",
    "PEFT": "huggingface/peft, `method_comparison/MetaMathQA/results/`, `cuda_memory_max` of "
    "`lora--llama-3.2-3B-rank32.json` and `full-finetuning--llama-3.2-3B-lr_0.00001.json` at commit 0a179c1e",
    "Qwen": "QwenLM/Qwen, `README.md`, *Profiling of Memory and Speed*",
    "GLM-4": "THUDM/GLM-4, `finetune_demo/README_en.md`, *Hardware check*; settings from `configs/lora.yaml`",
    "torchtune": "pytorch/torchtune, `README.md`, *Memory and training speed*",
    "ms-swift": "modelscope/ms-swift, `docs/source_en/LLM/Benchmark.md`, *Model Type & Max Length* and *Batch Size*",
}
LITGPT = {"length": 1304, "unit": "GB", "measure": "allocated", "targets": QV, "checkpointing": False, "within": 0.05}
PEFT = {"rows": 4, "length": 768, "unit": "GB", "measure": "reserved", "checkpointing": False, "autocast": False}
PEFT |= {"attention": None, "within": 0.05, "model": "Llama-3.2-3B"}
FACTORY = {"source": "LLaMA-Factory", "model": "Llama-2-7b-hf", "within": 0.12}
QWEN = {"source": "Qwen", "rank": 64, "accumulation": 8}
PAPER = {"source": "QLoRA", "rank": 64, "quantised": NF4, "optim": "paged_adamw_32bit", "measure": "paged"}
PAPER |= {"accumulation": 16}
SINGLE = NF4 | {"bnb_4bit_use_double_quant": False}
RUNS = [
    Run("QLoRA", "4-bit 7B base model", "llama-7b", 1, 512, 5048, "MB", "base", quantised=SINGLE, within=0.1),
    Run(
        what="65B on one 48 GB GPU", model="llama-65b", rows=1, length=512, published=48, limit=True, within=0, **PAPER
    ),
    Run(
        what="33B on one 24 GB GPU", model="llama-30b", rows=1, length=512, published=24, limit=True, within=0, **PAPER
    ),
    *(
        Run(what="QLoRA 7B", rows=1, length=length, published=published, quantised=NF4, accumulation=4, **FACTORY)
        for length, published in ((1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32))
    ),
    Run(what="QLoRA 7B", rows=4, length=1024, published=9, quantised=NF4, accumulation=2, **FACTORY),
    Run(what="LoRA 7B", rows=4, length=1024, published=17, accumulation=2, **FACTORY),
    *(
        Run("fsdp_qlora", what, "Llama-2-7b-hf", rows, 2048, published, "GiB", "reserved", 64, QKV + MLP, quantised)
        for what, rows, published, quantised in (("QLoRA 7B", 8, 20.94, NF4), ("LoRA 7B", 4, 22.04, None))
    ),
    Run("LitGPT", "LoRA 7B", "Llama-2-7b-hf", 1, published=21.30, autocast=False, **LITGPT),
    Run("LitGPT", "LoRA 7B", "Llama-2-7b-hf", 2, published=29.07, autocast=False, **LITGPT),
    Run("LitGPT", "LoRA 7B, nf4", "Llama-2-7b-hf", 1, published=14.14, quantised=SINGLE, **LITGPT),
    Run("LitGPT", "LoRA 7B, nf4-dq", "Llama-2-7b-hf", 1, published=13.84, quantised=NF4, **LITGPT),
    Run("LitGPT", "LoRA 13B", "Llama-2-13b-hf", 1, published=38.12, autocast=False, **LITGPT),
    Run("LitGPT", "LoRA 13B, nf4-dq", "Llama-2-13b-hf", 1, published=22.55, quantised=NF4, **LITGPT),
    Run("PEFT", "LoRA 3B", published=22.27, rank=32, targets=QV, **PEFT),
    Run("PEFT", "full 3B, bf16", published=37.24, rank=0, **PEFT),
    Run(
        "GLM-4",
        "lora (PEFT)",
        "glm-4-9b-chat",
        1,
        1024,
        21531,
        "MiB",
        targets=("query_key_value",),
        autocast=False,
        attention=None,
        labels=512,
        within=0.12,
    ),
    *(
        Run(what=f"LoRA {size}", model=f"Qwen-{size}", rows=1, length=length, published=published, within=0.14, **QWEN)
        for size, length, published in (
            ("7B", 1024, 21.5),
            ("7B", 8192, 36.6),
            ("14B", 1024, 35.3),
            ("14B", 8192, 55.2),
        )
    ),
    Run(
        what="full 1.8B, ZeRO 3", model="Qwen-1.8B", rows=1, length=1024, published=43.5, zero=3, **(QWEN | {"rank": 0})
    ),
    Run(
        "torchtune",
        "LoRA 8B",
        "Llama-3.1-8B",
        2,
        2048,
        16.2,
        "GiB",
        "reserved",
        8,
        (*QV, "o_proj", *MLP),
        autocast=False,
        labels=512,
        within=0.12,
    ),
    Run(
        "torchtune",
        "QLoRA 8B",
        "Llama-3.1-8B",
        2,
        2048,
        7.4,
        "GiB",
        "reserved",
        8,
        (*QV, "o_proj", *MLP),
        NF4,
        labels=512,
    ),
    Run("ms-swift", "LoRA 7B", "Qwen-7B", 1, 512, 18.01, targets=QKV),
    Run("ms-swift", "LoRA 7B", "Qwen-7B", 1, 2048, 27.74, targets=QKV),
    Run("ms-swift", "LoRA 7B", "Qwen-7B", 4, 2048, 63.81, targets=QKV),
    Run("ms-swift", "LoRA ChatGLM3", "chatglm3-6b", 1, 1024, 12.99, targets=("query_key_value",), attention=None),
    Run("ms-swift", "LoRA ChatGLM3", "chatglm3-6b", 1, 8192, 66.82, targets=("query_key_value",), attention=None),
]


def published_table() -> str:
    """Return the Markdown table of ``RUNS``."""
    lines = ["| source | run | batch × tokens | published | ours | off by |", "|---|---|---|---|---|---|"]
    for run in RUNS:
        digits = 0 if run.unit in ("MB", "MiB") else 1
        published = f"{run.published:,.{digits}f}" if run.published % 1 or digits == 0 else f"{run.published:.0f}"
        ours = f"{run.predicted():,.{digits}f} {run.unit}"
        off = "below" if run.limit and run.deviation() < 0 else f"{run.deviation():+.0%}".replace("-", "−")
        batch = "" if run.measure == "base" else f"{run.rows} × {run.length:,}"
        limit = "under " if run.limit else ""
        lines.append(f"| {run.source} | {run.what} | {batch} | {limit}{published} {run.unit} | {ours} | {off} |")
    return "\n".join(lines)


def sources_list() -> str:
    """Return the sources as a Markdown list."""
    return "\n".join(f"- **{name}**: {where}." for name, where in SOURCES.items())


def printed(**options: Any) -> str:
    """Return what ``finegrid fit`` prints, as it looks in a document."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_fit(**options)
    return "```text\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n```"


def claim_table() -> str:
    """Return the Markdown table of a 70B QLoRA run's memory, component by component."""
    shape = shape_of(SHAPES[CLAIM])
    settings = Run("", "", CLAIM, 1, 512, 1, rank=16, quantised=NF4, optim="adamw_torch_fused", attention=None)
    memory = settings.memory()
    elements = shape.layers * sum(linear.inputs * linear.outputs for linear in shape.linears)
    codes, scales = elements / 2, elements / 64 * (1 + 4 / 256)
    rows = {
        "nf4 codes of the linear layers: half a byte each": codes,
        "their scales, quantised too: a byte for 64 and 4 bytes for 64 × 256": scales,
        "embedding, head and norms in 32 bits (in 16 bits: half)": memory.weights - codes,
        "**the model alone**": memory.weights + scales,
        "**peak of training a LoRA of rank 16 on one row of 512 tokens**": memory.total,
    }
    lines = ["| what | GiB |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {size / 2**30:.1f} |" for what, size in rows.items()])


def blocks() -> dict[str, str]:
    """Return the generated parts of docs/memory.md by the name in their marks."""
    return {
        "published": published_table(),
        "sources": sources_list(),
        "claim": claim_table(),
        "24GB": printed(gpu_memory="24GB"),
        "48GB 70B": printed(gpu_memory="48GB", model="70B"),
        "2 x 24GB": printed(gpu_memory="24GB", model=CLAIM, gpus=2, zero=3, offload=True),
    }


def write(text: str) -> str:
    """Return the document with its generated parts made anew.

    Raises:
        ValueError: a part's marks are missing.
    """
    for name, block in blocks().items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        head, found, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{DOCS}: no {start.strip()} … {end.strip()}")
        text = head + start + block + end + tail
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOCS.write_text(write(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(blocks().values()))
