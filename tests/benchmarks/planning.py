"""CPU seconds to resolve a study of 1,000 runs, and to fingerprint the whole package's code.

python tests/benchmarks/planning.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from finegrid import fingerprint
from finegrid.study import load_study

STUDY = {
    "recipe": "recipe.yaml",
    "factors": {
        "rank": {"key": "peft_config.r", "levels": [4, 8, 16, 32, 64]},
        "alpha": {"key": "peft_config.lora_alpha", "levels": [8, 16, 32, 64, 128]},
        "decay": {"key": "training_args.weight_decay", "levels": [0.0, 0.01]},
    },
    "tune": {"rate": {"key": "training_args.learning_rate", "levels": [1.0e-5, 1.0e-4, 2.0e-4, 1.0e-3]}},
    "seeds": [0, 1, 2, 3, 4],
}
RECIPE = {
    "model": {"model_name_or_path": "./model"},
    "data_config": {"train_file": "train.jsonl", "val_file": "validation.jsonl", "test_file": "test.jsonl"},
    "peft_config": {"r": 8},
    "training_args": {"max_steps": 100},
}


def median(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median of the CPU seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def fingerprint_known() -> None:
    """Fingerprint as a new process does that finds the cache file."""
    fingerprint._known_sources.cache_clear()
    fingerprint.code_fingerprint("finegrid.cli")


def main() -> None:
    """Print one line a figure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        runs = len(load_study(Path("study.yaml"), folder).runs)
        print(f"study of {runs:,} runs: {median(lambda: load_study(Path('study.yaml'), folder)):.2f} CPU s")
    fingerprint_known()
    print(f"fingerprint of the package, warm: {median(fingerprint_known) * 1000:.0f} ms CPU")


if __name__ == "__main__":
    main()
