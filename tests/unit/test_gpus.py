"""The table of GPUs, sizes of memory, and what nvidia-smi says."""

import json
import os
from pathlib import Path

import pytest
from finegrid import gpus
from finegrid.errors import UserError
from finegrid.gpus import Gpu, detected, gpu, gpu_names, parse_bytes

GIB = 2**30


def test_card_of_the_table():
    assert gpu("rtx-4090") == Gpu("rtx-4090", 24564 * 2**20, 165.2, 82.6, 1008, True)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", "NVIDIA GeForce RTX 4090", "rtx4090"])
def test_card_is_found_however_people_write_it(name):
    assert gpu(name).name == "rtx-4090"


def test_size_is_part_of_a_name_with_two_sizes():
    assert gpu("A100 80 GB") == gpu("a100-80gb")
    assert gpu("A100-40GB").memory == 40 * GIB


def test_unknown_card_names_the_nearest():
    with pytest.raises(UserError, match=r"gpu 'rtx-4900'.*did you mean 'rtx-4090'\?.*there are .*a100-40gb"):
        gpu("rtx-4900")


def test_name_that_leaves_the_size_open_is_told_a_size():
    with pytest.raises(UserError, match=r"did you mean 'a100-40gb'\?"):
        gpu("A100")


def test_card_may_be_described():
    assert gpu({"name": "mine", "memory": "96GB", "bf16_tflops": 500}) == Gpu("mine", 96 * GIB, 500)


def test_all_mistakes_of_a_described_card_are_told_at_once():
    with pytest.raises(UserError) as error:
        gpu({"memory": "96GB", "bf16_tflop": 500, "fp32_tflops": "fast"})
    problems = "\n".join(error.value.problems)
    assert "'bf16_tflop' is no key of a card; did you mean 'bf16_tflops'?" in problems
    assert "no 'name'" in problems
    assert "fp32_tflops is 'fast'; expected a positive number" in problems


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GIB),
        ("24 GiB", 24 * GIB),
        ("24g", 24 * GIB),
        ("0.5gb", GIB // 2),
        ("16000MB", 16000 * 2**20),
        ("1T", 1024 * GIB),
    ],
)
def test_size_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24 apples", "", "GB", "24", "-1GB", "0GB", "1e3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="not a size; write a number and its unit, such as 24GB"):
        parse_bytes(text)


def test_every_card_is_plausible():
    """fp32 never beats the matrix cores; ratios of peak to bandwidth are those of known GPUs; memory is positive."""
    for name in gpu_names():
        card = gpu(name)
        assert 8 * GIB < card.memory < 200 * GIB, name
        assert 1.9 < card.bf16_tflops / card.fp32_tflops < 17, name
        assert 50 < card.bf16_tflops * 1e12 / (card.bandwidth_gb * 1e9) < 450, name


def test_memory_is_at_most_what_the_name_promises():
    for name in gpu_names():
        if name.endswith("gb"):
            promised = parse_bytes(name.rsplit("-", 1)[1])
            assert 0.93 * promised <= gpu(name).memory <= promised, name


def test_cards_that_compute_in_fp16_alone_say_so():
    assert [name for name in gpu_names() if not gpu(name).bf16] == ["rtx-2080-ti", "t4", "v100-16gb", "v100-32gb"]


# Names as nvidia-smi prints them.
SMI = {
    "NVIDIA GeForce RTX 4090, 24564": "rtx-4090",
    "NVIDIA GeForce RTX 3060, 12288": "rtx-3060-12gb",
    "NVIDIA GeForce RTX 4060 Ti, 16380": "rtx-4060-ti-16gb",
    "Tesla T4, 15360": "t4",
    "Tesla V100-SXM2-16GB, 16384": "v100-16gb",
    "Tesla V100-SXM2-32GB, 32768": "v100-32gb",
    "NVIDIA A10, 23028": "a10",
    "NVIDIA A10G, 23028": "a10g",
    "NVIDIA L4, 23034": "l4",
    "NVIDIA L40S, 46068": "l40s",
    "NVIDIA RTX A6000, 49140": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation, 49140": "rtx-6000-ada",
    "NVIDIA A100-SXM4-40GB, 40960": "a100-40gb",
    "NVIDIA A100-PCIE-40GB, 40960": "a100-40gb",
    "NVIDIA A100-SXM4-80GB, 81920": "a100-80gb",
    "NVIDIA A100 80GB PCIe, 81920": "a100-80gb",
    "NVIDIA H100 80GB HBM3, 81559": "h100-80gb",
    "NVIDIA H100 PCIe, 81559": "h100-pcie",
    "NVIDIA H200, 143771": "h200",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition, 97887": "rtx-pro-6000",
}


def test_what_nvidia_smi_names_is_found_in_the_table(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "\n".join(SMI))
    assert [card.name for card in detected()] == list(SMI.values())
    assert detected()[4].memory == 16384 * 2**20  # the driver's word, not the table's


def test_card_that_no_table_knows_has_its_memory(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA Future 9, 300000")
    assert detected() == [Gpu("NVIDIA Future 9", 300000 * 2**20)]


def test_card_without_a_number_is_left_out(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA A100-SXM4-80GB, [N/A]\nNVIDIA L4, 23034")
    assert [card.name for card in detected()] == ["l4"]


def test_no_nvidia_smi_no_cards(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detected() == []


def test_nvidia_smi_that_fails_finds_no_cards(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA-SMI has failed", status=9)
    assert detected() == []


def test_patterns_tell_every_card_of_the_table_apart():
    table = json.loads(Path(gpus.FILE).read_text())
    assert len({card["pattern"] for card in table.values()}) == len(table)


def nvidia_smi(folder: Path, monkeypatch, answer: str, status: int = 0) -> None:
    """Put a program of that name first on the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
