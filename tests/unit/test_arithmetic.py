"""What the plan counts, against what transformers, accelerate and a real training count and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finegrid.arithmetic import checkpoint_bytes, disk, output_bytes, training_arithmetic
from finegrid.memory import shape_of
from finegrid.settings import RunSettings
from token_rows import random_rows, write_tokens

PROJECT = Path(__file__).resolve().parents[2]
ROWS = 22
LORA = {"r": 4, "target_modules": "all-linear"}


def recipe(
    gpus: int = 1, nodes: int = 1, peft_config: dict | None = None, data: dict | None = None, **arguments
) -> RunSettings:
    return RunSettings(
        model={"model_name_or_path": "data/models/tiny"},
        data_config={"train_file": "train.jsonl", "val_file": "val.jsonl"} | (data or {}),
        peft_config=peft_config,
        training_args={"use_cpu": True, "per_device_train_batch_size": 4} | arguments,
        gpus=gpus,
        nodes=nodes,
    )


def count(rows: int | None = ROWS, gpus: int = 1, nodes: int = 1, **arguments) -> dict:
    known = (rows, 10 * rows, 30 * rows) if rows is not None else (None, None, None)
    return training_arithmetic(recipe(gpus, nodes, **arguments), *known)


# --- steps, epochs and batches ---


@pytest.mark.parametrize(
    ("rows", "drop_last"), [(rows, False) for rows in (1, 7, 8, 9, 31, 100)] + [(rows, True) for rows in (4, 7, 9, 100)]
)
@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 3.0}, {"num_train_epochs": 0.4}])
def test_steps_and_epochs_are_the_trainers(rows, drop_last, accumulation, length, tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    given = {"gradient_accumulation_steps": accumulation, "dataloader_drop_last": drop_last, **length}
    data = torch.utils.data.TensorDataset(torch.zeros(rows))
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=4, **given
    )
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
    theirs = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    ours = count(rows, **given)
    assert ours["steps"] == theirs[-1]
    assert ours["effective_batch_size"] == theirs[4]
    # steps_in_epoch are batches: the share of the last epoch is that of its batches, as in Trainer._run_epoch.
    whole, part = divmod(theirs[-1], theirs[1])
    assert ours["epochs"] == pytest.approx(whole + part * accumulation / theirs[5], abs=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 15, 16, 17, 50])
@pytest.mark.parametrize("gpus", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_several_gpus_share_the_rows_as_accelerate_deals_them(rows, gpus, drop_last):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    shards = [
        list(BatchSamplerShard(BatchSampler(range(rows), 4, drop_last), gpus, process)) for process in range(gpus)
    ]
    ours = count(rows, gpus=gpus, dataloader_drop_last=drop_last, num_train_epochs=1)
    assert {len(shard) for shard in shards} == {ours["steps"]}
    # Rows that accelerate repeats to fill the last batches carry no loss.
    assert ours["label_tokens"] == 10 * len({row for shard in shards for batch in shard for row in batch})
    assert ours["effective_batch_size"] == 4 * gpus


def test_a_batch_is_the_product_of_its_three_factors():
    ours = count(gpus=8, gradient_accumulation_steps=3, max_steps=1)
    parts = ("per_device_train_batch_size", "gpus", "gradient_accumulation_steps", "effective_batch_size")
    assert [ours[key] for key in parts] == [4, 8, 3, 96]


def test_several_nodes_count_as_so_many_gpus():
    one, two = count(gpus=8, max_steps=7), count(gpus=4, nodes=2, max_steps=7)
    assert (one.pop("nodes"), two.pop("nodes")) == (1, 2)
    assert one == two


def test_rows_that_make_no_whole_batch_train_nothing():
    assert count(3, dataloader_drop_last=True, max_steps=5)["steps"] == 0
    assert count(3, dataloader_drop_last=True, num_train_epochs=1)["label_tokens"] == 0


@pytest.mark.parametrize("warmup", [0, 0.1, 0.01, 0.999, 1, 7])
def test_warmup_is_transformers(warmup, tmp_path):
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), warmup_steps=warmup, use_cpu=True)
    assert count(max_steps=30, warmup_steps=warmup)["warmup_steps"] == args.get_warmup_steps(30)


def test_tokens_of_whole_and_part_epochs():
    # 10 rows, batch 4: 3 steps an epoch, the last one of 2 rows; 10 label tokens and 30 tokens a row.
    assert [count(10, max_steps=steps)["label_tokens"] for steps in (3, 6, 5)] == [100, 200, 180]
    assert count(10, max_steps=5)["tokens"] == 540


def test_a_stream_says_what_is_unknown():
    ours = training_arithmetic(recipe(data={"streaming": True}, max_steps=50, warmup_steps=0.1), None, None, None)
    assert (ours["steps"], ours["warmup_steps"], ours["effective_batch_size"]) == (50, 5, 4)
    assert set(ours["unknown"]) == {"epochs", "train_rows", "label_tokens", "tokens"}
    assert set(ours["unknown"].values()) == {"a stream's rows are counted when the data stage has read them"}


def test_uncounted_rows_leave_the_steps_of_an_epoch_open():
    ours = count(None, num_train_epochs=2, warmup_steps=0.1, eval_strategy="epoch")
    assert {"steps", "warmup_steps", "checkpoints", "evaluations"} < set(ours["unknown"])
    assert count(None, num_train_epochs=2, warmup_steps=5, save_strategy="no")["warmup_steps"] == 5


# --- a real training ---

SAVES = {"save_strategy": "steps", "save_steps": 4}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 3}
BEST = {"load_best_model_at_end": True}
CASES = {
    "nothing": {"max_steps": 5, "save_strategy": "no"},
    "steps": {"max_steps": 10} | SAVES | EVALUATES,
    "a last step that is due": {"max_steps": 12} | SAVES | EVALUATES,
    "longer than the run": {"max_steps": 3, "save_steps": 50, "eval_strategy": "steps", "eval_steps": 50},
    "shares": {"max_steps": 10, "save_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.3},
    "evaluations where it logs": {"max_steps": 7, "eval_strategy": "steps", "logging_steps": 2, "save_strategy": "no"},
    "delayed": {"max_steps": 7, "eval_delay": 4, "save_strategy": "no"} | EVALUATES,
    "delayed past the end": {"max_steps": 7, "eval_delay": 40, "save_strategy": "no"} | EVALUATES,
    "epochs": {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "part epochs": {"num_train_epochs": 1.5, "save_strategy": "epoch", "eval_strategy": "epoch", "eval_delay": 1},
    "steps of epochs": {"max_steps": 7, "save_strategy": "epoch", "eval_strategy": "epoch"},
    "windows that end an epoch early": {"max_steps": 5, "gradient_accumulation_steps": 4, "save_strategy": "no"},
    "the best of epochs": {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "epoch"} | BEST,
    "the best of steps": {"max_steps": 8, "save_steps": 3} | EVALUATES | BEST,
}


class Written:
    """Counts what a training does: rows of checkpoints and passes over the validation split."""

    def __init__(self, monkeypatch):
        from finegrid.training.trainer import LabelTokenTrainer

        self.checkpoints: list[dict[str, int]] = []  # of each: file name to bytes
        self.validations = 0
        save, validate = LabelTokenTrainer._save_checkpoint, LabelTokenTrainer.validation_loss

        def saved(trainer, *args, **options):
            save(trainer, *args, **options)
            folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
            self.checkpoints.append({file.name: file.stat().st_size for file in folder.iterdir()})

        def validated(trainer, rows):
            self.validations += 1
            return validate(trainer, rows)

        monkeypatch.setattr(LabelTokenTrainer, "_save_checkpoint", saved)
        monkeypatch.setattr(LabelTokenTrainer, "validation_loss", validated)


@pytest.fixture
def written(monkeypatch) -> Written:
    return Written(monkeypatch)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    validation = random_rows(3, seed=1, split="validation")
    return write_tokens(tmp_path_factory.mktemp("tokens"), train=random_rows(ROWS), validation=validation)


def train(settings: RunSettings, tokens: Path, model: Path, folder: Path) -> dict:
    from finegrid.training.train import train as run

    names = ("output", "history", "summary", "checkpoints")
    return run(settings, tokens=tokens, model=model, **{name: folder / name for name in names})


@pytest.mark.parametrize("name", CASES)
def test_a_training_does_what_was_counted(name, written, tokens, tiny_model_dir, tmp_path):
    settings = recipe(peft_config=LORA, **{"learning_rate": 1e-3, "gradient_accumulation_steps": 2} | CASES[name])
    rows = random_rows(ROWS)
    label_tokens = sum(len(row["labels"]) - row["prompt_length"] for row in rows)
    ours = training_arithmetic(settings, ROWS, label_tokens, sum(len(row["input_ids"]) for row in rows))
    summary = train(settings, tokens, tiny_model_dir, tmp_path)
    assert ours["unknown"] == {}
    assert summary["steps"] == ours["steps"]
    assert summary["epochs"] == pytest.approx(ours["epochs"], abs=1e-3)
    assert summary["effective_batch_size"] == ours["effective_batch_size"]
    assert len(written.checkpoints) == ours["checkpoints"]
    best_was_loaded = any("the best by validation loss" in note for note in summary["notes"])
    assert written.validations == ours["evaluations"] + best_was_loaded
    if ours["epochs"] == int(ours["epochs"]):
        assert summary["label_tokens"] == ours["label_tokens"]
        assert summary["tokens"] == ours["tokens"]
    else:
        assert summary["label_tokens"] == pytest.approx(ours["label_tokens"], rel=0.3)


def test_without_validation_rows_nothing_is_evaluated(written, tokens, tiny_model_dir, tmp_path):
    alone = write_tokens(tmp_path / "tokens", train=random_rows(ROWS), validation=[])
    settings = recipe(data={"val_file": None, "test_file": "test.jsonl"}, max_steps=2, save_strategy="no")
    train(settings, alone, tiny_model_dir, tmp_path / "run")
    assert written.validations == training_arithmetic(settings, ROWS, None, None)["evaluations"] == 0


# --- disk ---

DTYPES = {"full": "float32", "full in 16 bits": "bfloat16", "lora": "float32", "lora on 16 bits": "bfloat16"}
KINDS = {
    "full": recipe(),
    "full in 16 bits": recipe(),
    "lora": recipe(peft_config=LORA),
    "lora on 16 bits": recipe(peft_config=LORA | {"r": 16}),
    "dora": recipe(peft_config=LORA | {"use_dora": True}),
    "adafactor": recipe(optim="adafactor"),
    "sgd": recipe(optim="sgd"),
    "weights alone": recipe(save_only_model=True),
}


def with_dtype(settings: RunSettings, dtype: str) -> RunSettings:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_as_large_as_was_counted(kind, written, tokens, tiny_model_dir, tmp_path):
    settings = with_dtype(KINDS[kind], DTYPES.get(kind, "float32"))
    settings = settings.model_copy(update={"training_args": settings.training_args | {"max_steps": 2, "save_steps": 2}})
    train(settings, tokens, tiny_model_dir, tmp_path)
    shape = shape_of(json.loads((tiny_model_dir / "config.json").read_text()))
    assert checkpoint_bytes(settings, shape) == pytest.approx(sum(written.checkpoints[0].values()), rel=0.05)
    weights = next((tmp_path / "output").glob("*.safetensors"))
    assert output_bytes(settings, shape) == pytest.approx(weights.stat().st_size, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "peft_config", "arguments", "measured"),
    [
        ("zero2", None, {}, 77_060_872),
        ("zero3", None, {}, 51_601_888),
        ("zero2", None, {"bf16": True}, 57_890_409),
        ("zero2", LORA | {"r": 8}, {}, 13_015_763),
        ("zero3", LORA | {"r": 8}, {}, 371_001),
    ],
)
def test_a_checkpoint_of_deepspeed_is_as_large_as_one_was(stage, peft_config, arguments, measured, tiny_model_dir):
    # Measured with this model under torchrun --nproc-per-node 1 and DeepSpeed 0.19.8 on the CPU: bytes of all files.
    deepspeed = str(PROJECT / f"config/deepspeed/{stage}.json")
    shape = shape_of(json.loads((tiny_model_dir / "config.json").read_text()))
    settings = recipe(peft_config=peft_config, deepspeed=deepspeed, **arguments)
    assert checkpoint_bytes(settings, shape) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "written", "held"),
    [
        ({}, 7, 7),
        ({"save_total_limit": 2}, 7, 3),
        ({"save_total_limit": 2}, 1, 1),
        ({"save_total_limit": 1, "load_best_model_at_end": True}, 7, 3),
        ({"save_strategy": "best"}, None, None),
        ({"save_strategy": "best", "save_total_limit": 1}, None, 2),
        ({"save_strategy": "no"}, 0, 0),
    ],
)
def test_scratch_holds_the_checkpoints_that_are_not_yet_removed(arguments, written, held, tiny_model_dir):
    shape = shape_of(json.loads((tiny_model_dir / "config.json").read_text()))
    space = disk(recipe(**arguments), shape, written)
    assert space["disk_bytes"] == (None if held is None else held * space["checkpoint_bytes"])
