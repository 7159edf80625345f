"""The evaluation stage: what it writes, from what it starts, and that it scores each kind of run as it was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import sacrebleu
import torch
from finegrid.data.tokenising import tokenise
from finegrid.errors import UserError
from finegrid.evaluation import evaluate as module
from finegrid.evaluation.evaluate import evaluate
from finegrid.evaluation.metrics import SCORES
from finegrid.evaluation.together import answers_of_all
from finegrid.settings import RunSettings
from finegrid.training import resident
from finegrid.training.train import train
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from token_rows import plain_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

LORA = {"r": 4, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
LIMIT = 12  # tokens of an answer, its end included


def talk(*texts: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


TEST = {
    "short": talk("Does Medicare pay for eye exams?", "Not for routine ones."),
    "long": talk("What is term life insurance? " * 3, "It pays if you die within the term. " * 5),
    "turns": talk("Hi", "Hello!", "What is an SR22?", "A certificate that you are insured.", system="Be brief."),
    "zh": talk("医疗保险支付眼科检查吗?", "通常不支付。"),
}
VALIDATION = {f"v{number}": talk(f"Question number {number}?", f"Answer {number}.") for number in range(5)}


def write_clean(folder: Path, **splits: dict[str, list[dict]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text("{}")
    for split in ("train", "validation", "test"):
        rows = [
            {"id": id, "messages": messages, "source": f"{split}:1", "meta": {}}
            for id, messages in splits.get(split, {}).items()
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def recipe(**sections) -> RunSettings:
    evaluation = {"batch_size": 3} | sections.pop("evaluation", {})
    training_args = {"use_cpu": True} | sections.pop("training_args", {})
    return RunSettings(
        model={"model_name_or_path": "data/models/tiny"},
        data_config={"limits": {"truncated_answers": 1}},
        max_output_length=LIMIT,
        training_args=training_args,
        evaluation=evaluation,
        **sections,
    )


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with weights so large that its answers depend on the whole prompt."""
    folder = tmp_path_factory.mktemp("lively") / "tiny"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(model_dir, tmp_path_factory) -> tuple[Path, Path]:
    """(tokens, clean) of the conversations above."""
    folder = tmp_path_factory.mktemp("data")
    clean = write_clean(folder / "clean", train=VALIDATION, validation=VALIDATION, test=TEST)
    tokenise(recipe(), clean, model_dir, folder / "tokens")
    return folder / "tokens", clean


def run(
    settings: RunSettings, data: tuple[Path, Path], model: Path, output: Path, adapter=None, progress=None, **how
) -> dict:
    """Evaluate into `output`; return the metrics and, as "rows", the predictions by (split, id)."""
    tokens, clean = data
    predictions, metrics = output / "predictions.jsonl", output / "metrics.json"
    lines: list[str] = []
    said = evaluate(
        settings, "lora-1a2b3c4d", tokens, clean, model, adapter, predictions, metrics, progress or lines.append, **how
    )
    assert json.loads(metrics.read_text(encoding="utf-8")) == said
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    return said | {"rows": {(row["split"], row["id"]): row for row in rows}}


@pytest.fixture(scope="module")
def base(data, model_dir, tmp_path_factory) -> dict:
    return run(recipe(), data, model_dir, tmp_path_factory.mktemp("base"))


def token_rows(tokens: Path, split: str) -> list[dict]:
    from datasets import Dataset

    return Dataset.from_file(str(tokens / f"{split}.arrow")).to_list()


# ---------------------------------------------------------------- what is written


def test_every_example_of_both_splits_is_there_in_order(base):
    assert list(base["rows"]) == [("test", id) for id in TEST] + [("validation", id) for id in VALIDATION]
    fields = ["id", "split", "prompt", "reference", "prediction", "nll", "label_tokens", "scores", "statistics"]
    assert all(list(row) == fields for row in base["rows"].values())


def test_prompt_and_reference_are_the_uncut_texts(base):
    rows = base["rows"]
    assert rows["test", "short"]["prompt"] == "Does Medicare pay for eye exams?"
    assert rows["test", "long"]["reference"] == TEST["long"][-1]["content"]
    assert rows["test", "long"]["label_tokens"] == LIMIT - 1  # cut to the limit, and its end token lost
    assert rows["test", "turns"]["reference"] == "A certificate that you are insured."
    assert rows["test", "turns"]["prompt"] == (
        "system: Be brief.\n\nuser: Hi\n\nassistant: Hello!\n\nuser: What is an SR22?"
    )


def test_likelihoods_are_those_of_a_plain_loop(base, data, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for split in ("test", "validation"):
        rows = token_rows(data[0], split)
        for row in rows:
            nll, count = plain_loss(model, [row])
            found = base["rows"][split, row["id"]]
            assert (found["nll"] / count, found["label_tokens"]) == (pytest.approx(nll / count, abs=1e-5), count)
        nll, count = plain_loss(model, rows)
        summary = base["splits"][split]
        assert summary["loss"] == pytest.approx(nll / count, abs=1e-5)
        assert summary["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        assert (summary["examples"], summary["label_tokens"]) == (len(rows), count)


def test_metrics_are_means_of_the_predictions_and_sacrebleus_corpus_scores(base):
    rows = [row for (split, _), row in base["rows"].items() if split == "test"]
    summary = base["splits"]["test"]
    for name in SCORES:
        assert summary[name] == pytest.approx(sum(row["scores"][name] for row in rows) / len(rows))
    predictions, references = [row["prediction"] for row in rows], [[row["reference"] for row in rows]]
    assert summary["corpus_chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score)
    assert summary["corpus_bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, references).score)
    assert summary["empty_predictions"] == 0
    assert base["signatures"]["languages"] == {"en": 3, "zh": 1}
    assert (base["run"], base["metrics_version"]) == ("lora-1a2b3c4d", "1")
    assert set(base["seconds"]) == {"load", "likelihood", "generation", "scoring", "total"}
    assert base["peak_memory_mb"] > 50


def test_validation_has_losses_alone_unless_it_is_the_split_to_compare(base, data, model_dir, tmp_path):
    assert all(base["rows"]["validation", id]["prediction"] is None for id in VALIDATION)
    assert set(base["splits"]["validation"]) == {"examples", "label_tokens", "loss", "perplexity"}
    other = run(recipe(evaluation={"split": "validation"}), data, model_dir, tmp_path)
    assert all(other["rows"]["validation", id]["scores"] for id in VALIDATION)
    assert all(other["rows"]["test", id]["scores"] is None for id in TEST)
    assert "rougeL" in other["splits"]["validation"]
    assert other["splits"]["test"]["loss"] == base["splits"]["test"]["loss"]


def test_loss_alone_when_nothing_is_generated(base, data, model_dir, tmp_path):
    found = run(recipe(evaluation={"generate": False}), data, model_dir, tmp_path)
    assert found["splits"]["test"] == {
        name: base["splits"]["test"][name] for name in ("examples", "label_tokens", "loss", "perplexity")
    }
    assert all(row["prediction"] is None for row in found["rows"].values())


def test_same_inputs_give_the_same_predictions_byte_for_byte(base, data, model_dir, tmp_path):
    for name in ("first", "second"):
        run(recipe(), data, model_dir, tmp_path / name)
    assert (tmp_path / "first/predictions.jsonl").read_bytes() == (tmp_path / "second/predictions.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "first").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_changes_no_answer(base, data, model_dir, tmp_path, batch_size):
    found = run(recipe(evaluation={"batch_size": batch_size}), data, model_dir, tmp_path)
    for key, row in base["rows"].items():
        assert found["rows"][key]["prediction"] == row["prediction"]
        assert found["rows"][key]["nll"] == pytest.approx(row["nll"], rel=1e-6)
    assert found["data"] == base["data"]


# ---------------------------------------------------------------- from what it starts


def test_answers_do_not_see_the_references(base, model_dir, tmp_path):
    changed = {id: [*messages[:-1], {"role": "assistant", "content": "No idea."}] for id, messages in TEST.items()}
    clean = write_clean(tmp_path / "clean", train=VALIDATION, validation=VALIDATION, test=changed)
    tokenise(recipe(), clean, model_dir, tmp_path / "tokens")
    found = run(recipe(), (tmp_path / "tokens", clean), model_dir, tmp_path)
    for id in TEST:
        assert found["rows"]["test", id]["prediction"] == base["rows"]["test", id]["prediction"]
        assert found["rows"]["test", id]["reference"] == "No idea."
    assert found["data"]["examples"] != base["data"]["examples"]
    assert found["data"]["tokens"] != base["data"]["tokens"]


def test_other_limits_give_other_tokens_of_the_same_examples(base, data, model_dir, tmp_path):
    settings = recipe().model_copy(update={"max_output_length": LIMIT - 4})
    tokenise(settings, data[1], model_dir, tmp_path / "tokens")
    found = run(settings, (tmp_path / "tokens", data[1]), model_dir, tmp_path)
    assert found["data"]["examples"] == base["data"]["examples"]
    assert found["data"]["tokens"] != base["data"]["tokens"]


def test_other_white_space_and_validation_rows_leave_the_answers_comparable(base, model_dir, tmp_path):
    def spaced(messages: list[dict]) -> list[dict]:
        return [{**message, "content": message["content"].replace(" ", "  ")} for message in messages]

    test = {id: spaced(messages) for id, messages in TEST.items()}
    validation = dict(list(VALIDATION.items())[1:])
    clean = write_clean(tmp_path / "clean", train=VALIDATION, validation=validation, test=test)
    tokenise(recipe(), clean, model_dir, tmp_path / "tokens")
    found = run(recipe(), (tmp_path / "tokens", clean), model_dir, tmp_path)
    assert found["data"]["examples"] == base["data"]["examples"]
    assert found["data"]["tokens"] != base["data"]["tokens"]


def test_answers_start_from_the_templates_prompt_and_stop_at_its_end(base, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for id, messages in TEST.items():
        ids = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=LIMIT, do_sample=False, eos_token_id=2, pad_token_id=2)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert base["rows"]["test", id]["prediction"] == answer
    assert len({row["prediction"] for row in base["rows"].values() if row["prediction"]}) == len(TEST)


def test_generation_settings_of_the_recipe_are_used(base, data, model_dir, tmp_path):
    found = run(recipe(generation_config={"max_new_tokens": 2}), data, model_dir, tmp_path)
    assert found["generation"]["new_tokens"] == 2 * len(TEST)
    for id in TEST:
        whole = base["rows"]["test", id]["prediction"]
        assert whole.startswith(found["rows"]["test", id]["prediction"].rstrip("\ufffd"))


# ---------------------------------------------------------------- each kind of run


def test_adapter_on_its_base_is_scored_as_plain_peft_scores_it(base, data, model_dir, tmp_path):
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA)
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    found = run(recipe(peft_config=LORA), data, model_dir, tmp_path, tmp_path / "adapter")
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "adapter").eval()
    nll, count = plain_loss(reference, token_rows(data[0], "test"))
    assert found["splits"]["test"]["loss"] == pytest.approx(nll / count, abs=1e-5)
    assert abs(found["splits"]["test"]["loss"] - base["splits"]["test"]["loss"]) > 1e-3
    untrained = run(recipe(peft_config=LORA), data, model_dir, tmp_path / "none")
    assert untrained["splits"] == base["splits"]


def test_full_run_is_the_trained_model_and_not_the_base(base, data, model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    model.save_pretrained(tmp_path / "model")
    found = run(recipe(), data, model_dir, tmp_path, tmp_path / "model")
    nll, count = plain_loss(model.eval(), token_rows(data[0], "test"))
    assert found["splits"]["test"]["loss"] == pytest.approx(nll / count, abs=1e-5)
    assert abs(found["splits"]["test"]["loss"] - base["splits"]["test"]["loss"]) > 1e-3


def test_quantised_run_and_its_base_are_scored_quantised(base, data, model_dir, tmp_path):
    settings = recipe(peft_config=LORA, quantization_config=NF4)
    quantised = run(settings, data, model_dir, tmp_path / "base")
    assert quantised["splits"]["test"]["loss"] != pytest.approx(base["splits"]["test"]["loss"], abs=1e-3)
    train_run(settings, data, model_dir, tmp_path, learning_rate=0.0)
    still = run(settings, data, model_dir, tmp_path, tmp_path / "adapter")
    assert still["splits"]["test"]["loss"] == pytest.approx(quantised["splits"]["test"]["loss"], abs=1e-6)
    assert [row["prediction"] for row in still["rows"].values()] == [
        row["prediction"] for row in quantised["rows"].values()
    ]


def train_run(settings: RunSettings, data, model_dir: Path, folder: Path, **training_args) -> dict:
    args = settings.training_args | {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no"} | training_args
    summary = train(
        settings.model_copy(update={"training_args": args}),
        tokens=data[0],
        model=model_dir,
        output=folder / "adapter",
        history=folder / "history.csv",
        summary=folder / "summary.json",
        checkpoints=folder / "scratch" / "run",
    )
    return summary


@pytest.mark.parametrize(
    "sections",
    [{}, {"peft_config": LORA}, {"peft_config": LORA, "quantization_config": NF4}],
    ids=["full", "lora", "qlora"],
)
def test_validation_loss_is_the_one_that_training_saw(data, model_dir, tmp_path, sections):
    settings = recipe(**sections)
    summary = train_run(settings, data, model_dir, tmp_path)
    assert summary["final_eval_loss"] != pytest.approx(summary["base_eval_loss"], abs=1e-3)
    trained = run(settings, data, model_dir, tmp_path, tmp_path / "adapter")
    untrained = run(settings, data, model_dir, tmp_path / "base")
    assert trained["splits"]["validation"]["loss"] == pytest.approx(summary["final_eval_loss"], abs=1e-5)
    assert untrained["splits"]["validation"]["loss"] == pytest.approx(summary["base_eval_loss"], abs=1e-5)


def other_adapters(model_dir: Path, folder: Path) -> dict[str, Path | None]:
    """Write adapters of other ranks, targets and kinds; "base" has none."""
    kinds = {
        "all": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA),
        "dora": LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, r=2, target_modules=["q_proj"], use_dora=True
        ),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in kinds.items():
        torch.manual_seed(7)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder / name)
    return {"base": None} | {name: folder / name for name in kinds}


@pytest.mark.parametrize("quantised", [None, NF4], ids=["fp32", "nf4"])
def test_runs_that_share_a_base_are_scored_as_each_alone(data, model_dir, tmp_path, monkeypatch, quantised):
    adapters = other_adapters(model_dir, tmp_path)
    settings = recipe(peft_config=LORA, quantization_config=quantised)
    expected = {name: run(settings, data, model_dir, tmp_path / "alone", path) for name, path in adapters.items()}
    bases, load_base = [], resident.load_base
    monkeypatch.setattr(resident, "load_base", lambda *given: bases.append(load_base(*given)) or bases[-1])
    resident_base = resident.ResidentBase()
    # The base is first and last: no adapter may leave a trace in it.
    for name, path in [*adapters.items(), *reversed(adapters.items())]:
        found = run(settings, data, model_dir, tmp_path / "shared", path, load=resident_base.load)
        for part in ("rows", "splits", "data", "signatures"):
            assert found[part] == expected[name][part], name
    assert len(bases) == 1
    losses = {found["splits"]["test"]["loss"] for found in expected.values()}
    assert len(losses) == len(adapters)


@pytest.mark.parametrize("quantised", [None, NF4], ids=["fp32", "nf4"])
def test_answers_made_together_are_those_of_each_run_alone(data, model_dir, tmp_path, quantised):
    kinds = {
        "all": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA),
        "few": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, target_modules=["q_proj"]),
        "head": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=2, target_modules=["lm_head"]),
        "dora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True),
    }
    for number, (name, config) in enumerate(kinds.items()):
        torch.manual_seed(number)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path / name)
    settings = recipe(peft_config=LORA, quantization_config=quantised)
    longer = settings.model_copy(update={"generation_config": {"max_new_tokens": 5}})
    runs = {name: (settings, tmp_path / name) for name in kinds} | {"longer": (longer, tmp_path / "all")}
    base = resident.ResidentBase()
    made = answers_of_all(runs, *data, model_dir, base, most_rows=7)
    assert made.keys() == {"all", "few", "head"}  # and `longer` has nobody to share with
    for name, found in made.items():
        alone = run(settings, data, model_dir, tmp_path / "alone", tmp_path / name)
        given = run(settings, data, model_dir, tmp_path / "given", tmp_path / name, load=base.load, answers=found)
        for part in ("rows", "splits", "signatures"):
            assert given[part] == alone[part], name
        assert given["generation"]["new_tokens"] == alone["generation"]["new_tokens"]
        assert len({row["prediction"] for row in alone["rows"].values()}) > 2


def test_another_base_takes_the_place_of_the_resident_one(base, data, model_dir, tmp_path):
    resident_base = resident.ResidentBase()
    quantised = recipe(peft_config=LORA, quantization_config=NF4)
    first = run(quantised, data, model_dir, tmp_path, load=resident_base.load)
    second = run(recipe(), data, model_dir, tmp_path, load=resident_base.load)
    assert second["rows"] == base["rows"]
    assert first["rows"] != base["rows"]


# ---------------------------------------------------------------- what goes wrong


def test_empty_validation_split_is_no_error(data, model_dir, tmp_path):
    clean = write_clean(tmp_path / "clean", train=VALIDATION, test=TEST)
    tokenise(recipe(), clean, model_dir, tmp_path / "tokens")
    found = run(recipe(), (tmp_path / "tokens", clean), model_dir, tmp_path)
    empty = {"examples": 0, "label_tokens": 0, "loss": None, "perplexity": None}
    assert found["splits"]["validation"] == empty


def test_empty_split_to_compare_is_the_users_error(data, model_dir, tmp_path):
    clean = write_clean(tmp_path / "clean", train=VALIDATION, validation=VALIDATION)
    tokenise(recipe(), clean, model_dir, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"evaluation.split: 'test' has no rows in tokens"):
        run(recipe(), (tmp_path / "tokens", clean), model_dir, tmp_path)


def test_tokens_of_other_rows_are_refused(data, model_dir, tmp_path):
    clean = write_clean(tmp_path / "clean", validation=VALIDATION, test={"other": TEST["short"]})
    with pytest.raises(UserError, match=r"4 rows \(first: 'short'\) are not in"):
        run(recipe(), (data[0], clean), model_dir, tmp_path)


def test_missing_files_are_named(data, model_dir, tmp_path):
    with pytest.raises(UserError, match=r"test\.arrow: can't be read"):
        run(recipe(), (tmp_path / "nowhere", data[1]), model_dir, tmp_path)
    with pytest.raises(UserError, match=r"test\.jsonl: can't be read"):
        run(recipe(), (data[0], tmp_path / "nowhere"), model_dir, tmp_path)


def test_broken_weights_stop_the_run_and_leave_the_old_files(data, model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "predictions.jsonl").write_text("old")
    with pytest.raises(UserError, match=r"lora-1a2b3c4d: the loss of 9 examples \(first: 'short'\) is not finite"):
        run(recipe(), data, model_dir, tmp_path, tmp_path / "model")
    assert (tmp_path / "predictions.jsonl").read_text() == "old"
    assert not (tmp_path / "metrics.json").exists()


def test_progress_says_how_far_it_is(data, model_dir, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    run(recipe(), data, model_dir, tmp_path / "all", progress=lines.append)
    assert lines[-2:] == ["test: 3/4 answers generated", "test: 4/4 answers generated"]
    assert "validation: 5/5 losses computed" in lines
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 1000.0)
    lines.clear()
    run(recipe(), data, model_dir, tmp_path / "few", progress=lines.append)
    assert len(lines) == 3
