"""Shared fixtures: a tiny random Llama with the real tokenizer for speed, the real model for claims about it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from finegrid import layout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# In the background of a shell (`make test &`, nohup) a process is deaf to Ctrl-C, and so is all that it starts: those
# tests would fail that press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROJECT = Path(__file__).resolve().parents[1]
# Files that take minutes, the longest first. They come after all the others, and in this order no worker is left with a
# long one when the other has nothing more to do; pytest-xdist by itself begins with those that have most tests.
LONG = (
    "test_shipped_studies.py",
    "test_slurm.py",
    "test_launch.py",
    "test_versions_travel.py",
    "test_real_packs.py",
    "test_orphans.py",
    "test_faults.py",
    "test_stopping.py",
    "test_reruns.py",
    "test_packed_runs.py",
    "test_orphan_jobs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run short files first, long ones last."""
    items.sort(key=lambda item: LONG.index(item.path.name) + 1 if item.path.name in LONG else 0)


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout's root."""
    return PROJECT


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The real base model, converted once into data/models/."""
    from finegrid.data.demo import convert_model

    folder = PROJECT / layout.DEMO_MODEL
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # tests run in several processes
        if not (folder / "model.safetensors").exists():
            convert_model(folder)
    return folder


@pytest.fixture(scope="session")
def insuranceqa_dir() -> Path:
    """The demo's raw files, made once into data/raw/insuranceqa/."""
    from finegrid.data.demo import export_insuranceqa

    folder = PROJECT / layout.DEMO_DATA
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "test.jsonl.gz").exists():
            export_insuranceqa(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(smollm2_dir: Path, tmp_path_factory) -> Path:
    """A random Llama of 2 layers and hidden size 64 with SmolLM2's tokenizer and chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
