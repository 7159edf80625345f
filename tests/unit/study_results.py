"""A synthetic `results/<study>/`: every git-tracked file and every predictions.jsonl, with plausible numbers.

Not a mock of a stage: figures, tables and report read files, and this writes such files in a second, with known
effects, for any number of arms, seeds and examples. `make_results` is all that tests need.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np

SCORES = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
STEPS, LOG_EVERY, EVAL_EVERY = 40, 2, 10
DATA, TOKENS = "insuranceqa-5e1f0a2b", "insuranceqa-5e1f0a2b-77aa10cd"
TOPICS = ("term life insurance", "a home policy", "car insurance", "Medicare Part B", "an annuity", "disability cover")
VERBS = ("paid up", "cancelled early", "worth its price", "tax deductible", "transferred", "renewed each year")
# What full, LoRA and QLoRA do here: gain in loss, gain in rougeL, memory in MB, seconds, trainable parameters.
METHODS = {
    "full": ("Full", 0.27, 0.035, 4200.0, 215.0, 134_515_008),
    "lora": ("LoRA", 0.27, 0.037, 2100.0, 180.0, 2_442_240),
    "qlora": ("QLoRA (nf4)", 0.06, 0.012, 1500.0, 330.0, 2_442_240),
}
BASES = {"base": ("Base", 3.266, 0.145), "base (nf4)": ("Base (nf4)", 3.494, 0.130)}


def make_results(
    folder: Path,
    arms: int = 3,
    seeds: int = 2,
    examples: int = 48,
    *,
    levels: int = 2,
    factors: dict[str, list[str]] | None = None,
    one_at_a_time: bool = False,
    effects: dict[str, float] | None = None,
    diverged: str | None = None,
    chinese: bool = False,
    rng_seed: int = 7,
) -> Path:
    """Write a study's results and return its folder, `folder/results/synthetic`.

    Args:
        arms: trained arms; the first three are full, LoRA and QLoRA, further ones are LoRA at other ranks.
        seeds: seeds of each arm; every tuned level is trained with each.
        examples: rows of the test split; validation has as many.
        levels: learning rates tried in each arm (tuned factor `learning_rate`); 0 for none.
        factors: factor -> levels of a study whose arms are all LoRA, in place of `arms`: the grid of the levels, or
            with `one_at_a_time` the first level of each and then every other level alone.
        effects: rougeL gain by arm, in place of the built-in one (equal gains make an A/A study).
        diverged: arm whose first run breaks off with a loss that is not finite.
        chinese: labels and answers in Chinese, to see that fonts render.
    """
    study = folder / "results" / "synthetic"
    rng = np.random.default_rng(rng_seed)
    arm_rows = _factor_arms(factors, one_at_a_time) if factors else _method_arms(arms, chinese)
    plan = _plan(arm_rows, list(range(seeds)), levels, chinese)
    arms_factors = {arm["arm"]: arm["factors"] for arm in plan["arms"]}
    gains = {row["arm"]: row["gain"] for row in arm_rows} | (effects or {})
    _json(study / "plan.json", plan)
    _table(
        study / "plan.tsv",
        [{k: v for k, v in run.items() if k not in ("tuned", "memory", "device")} for run in plan["runs"]],
    )
    _json(study / "data" / f"{TOKENS}.json", _token_report(rng))
    difficulty = {split: rng.normal(0, 1, examples) for split in ("test", "validation")}
    for run in _unique(plan["runs"]):
        _write_run(study, run, arms_factors[run["arm"]], difficulty, gains, diverged, chinese, rng)
    _write_comparison(study, plan)
    return study


def _method_arms(arms: int, chinese: bool) -> list[dict]:
    """Full, LoRA, QLoRA, then LoRA at other ranks."""
    rows = []
    for index in range(arms):
        method = list(METHODS)[index] if index < 3 else "lora"
        rank = 8 if index < 3 else 2 * index + 4
        label = METHODS[method][0] if index < 3 else f"LoRA, rank {rank}"
        if chinese:
            label = {"full": "全参数微调", "lora": "低秩适配", "qlora": "量化低秩适配"}[method] + f" {index}"
        factors = {"method": method} if arms <= 3 else {"method": method, "rank": str(rank)}
        rows.append({"arm": method if index < 3 else f"lora-r{rank}", "label": label, "factors": factors})
        rows[-1] |= {"method": method, "gain": METHODS[method][2]}
    return rows


def _factor_arms(factors: dict[str, list[str]], one_at_a_time: bool) -> list[dict]:
    """Arms named as the study loader names them; each factor's later levels are better, the first factor's most."""
    first = {factor: levels[0] for factor, levels in factors.items()}
    combinations = [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]
    rows = []
    for combination in combinations:
        own = {factor: level for factor, level in combination.items() if level != first[factor]}
        named = own if one_at_a_time else combination
        if one_at_a_time and len(own) > 1:
            continue
        label = {f: f"{f.replace('_', ' ')} {v}" if v[0].isdigit() else v for f, v in named.items()}
        name = "-".join(f"{f}_{v}" if v[0].isdigit() and one_at_a_time else v for f, v in named.items())
        shares = [
            factors[factor].index(level) / max(1, len(factors[factor]) - 1) / 2**place
            for place, (factor, level) in enumerate(combination.items())
        ]
        row = {"arm": name or "baseline", "label": ", ".join(label.values()) or "Baseline", "factors": combination}
        rows.append(row | {"method": "lora", "gain": METHODS["lora"][2] + 0.03 * sum(shares)})
    return rows


def _plan(arms: list[dict], seeds: list[int], levels: int, chinese: bool) -> dict:
    rates = ["0.0005", "0.001", "0.002", "0.004"][:levels]
    table, runs = [], []
    for name, (label, _, _) in BASES.items():
        run = _run_id("base", name)
        table.append({"arm": name, "label": label, "factors": {}, "base": run})
        runs.append(_planned(run, name, "base", {}, None, run, train=False))
    for arm in arms:
        method, name = arm["method"], arm["arm"]
        base = _run_id("base", "base (nf4)" if method == "qlora" else "base")
        table.append({"arm": name, "label": arm["label"], "factors": arm["factors"], "base": base})
        for rate in rates or [None]:
            for seed in seeds:
                tuned = {"learning_rate": rate} if rate else {}
                run = _planned(_run_id(method, name, rate, seed), name, method, tuned, seed, base, train=True)
                runs.append(run | {"device": "cpu", "memory": _memory(arm)})
    title = "哪种方法回答得最好?" if chinese else "Which method answers insurance questions best?"
    return {
        "study": "synthetic",
        "title": title,
        "compare": {"baseline": arms[0]["arm"], "metric": "rougeL", "margin": 0.01, "select": "loss"},
        "seeds": seeds,
        "tune": {"learning_rate": rates} if rates else {},
        "arms": table,
        "runs": runs,
        "findings": [
            {
                "severity": "warning",
                "place": "config/studies/synthetic.yaml: seeds",
                "message": f"{len(seeds)} seeds: small differences will not be distinguishable",
                "mend": "add seeds",
            }
        ],
    }


def _memory(arm: dict) -> dict:
    """The plan's estimate in bytes; training takes some percent more."""
    total = int(_peak(arm["method"], arm["factors"]) * 2**20 * 0.94)
    return {"weights": total // 3, "activations": total // 2, "runtime": total // 10, "total": total, "host": 0}


def _peak(method: str, factors: dict) -> float:
    """MB that training takes: more with the rank."""
    return METHODS[method][3] * (1 + 0.002 * float(factors.get("rank", 8)))


def _run_id(method: str, *parts) -> str:
    return f"{method}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _planned(run: str, arm: str, method: str, tuned: dict, seed, base: str, train: bool) -> dict:
    training = {
        "effective_batch_size": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gpus": 1,
        "steps": STEPS,
        "epochs": 1.0,
        "label_tokens": STEPS * 4 * 80,
    }
    planned = {"run": run, "arm": arm, "method": method, "tuned": tuned, "seed": seed, "base": base}
    planned |= {"data": DATA, "tokens": TOKENS, "train": train}
    return planned | (training if train else dict.fromkeys(training))


def _unique(runs: list[dict]) -> list[dict]:
    return list({run["run"]: run for run in runs}.values())


def _write_run(
    study: Path, run: dict, factors: dict, difficulty: dict, gains: dict, diverged: str | None, chinese: bool, rng
) -> None:
    bad = run["arm"] == diverged and run["seed"] == 0 and run["tuned"].get("learning_rate") in (None, "0.0005")
    level = float(run["tuned"].get("learning_rate", 0.001))
    penalty = 0.02 * abs(math.log2(level / 0.001))  # the best level is 0.001
    if run["train"]:
        _, gain, quality, memory, seconds, trainable = METHODS[run["method"]]
        base_loss, base_quality = BASES["base (nf4)" if run["method"] == "qlora" else "base"][1:]
        quality, memory = gains.get(run["arm"], quality), _peak(run["method"], factors)
        trainable = int(trainable * float(factors.get("rank", 8)) / 8) if run["method"] != "full" else trainable
    else:
        base_loss, base_quality = BASES[run["arm"]][1:]
        gain = quality = penalty = 0.0
    seed_effect = rng.normal(0, 0.004) if run["train"] else 0.0
    loss = base_loss - gain + penalty + seed_effect + (1.5 if bad else 0.0)
    mean = base_quality + quality - penalty / 4 - seed_effect / 2
    rows = [
        row for split in ("test", "validation") for row in _predictions(split, loss, mean, difficulty, chinese, rng)
    ]
    predictions = study / "runs" / run["run"] / "predictions.jsonl"
    predictions.parent.mkdir(parents=True, exist_ok=True)
    predictions.write_text(
        "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows), "utf-8"
    )
    _json(study / "metrics" / f"{run['run']}.json", _metrics(run["run"], rows))
    _json(study / "settings" / f"{run['run']}.json", _settings(run))
    _json(study / "provenance" / f"{run['run']}.json", _provenance(run))
    if run["train"]:
        validation = [row for row in rows if row["split"] == "validation"]
        final = sum(row["nll"] for row in validation) / sum(row["label_tokens"] for row in validation)
        base_loss += final - loss  # the validation rows are a little easier or harder than all rows
        _history(study / "history" / f"{run['run']}.csv", level, base_loss, final, seconds, memory, bad, rng)
        summary = {"run": run["run"], "method": run["method"], "steps": STEPS, "epochs": 1.0}
        summary |= {
            "label_tokens": STEPS * 320,
            "tokens": STEPS * 480,
            "train_seconds": round(seconds * rng.uniform(0.95, 1.05), 1),
        }
        summary |= {
            "tokens_per_second": round(STEPS * 480 / seconds, 1),
            "peak_memory_mb": round(memory * rng.uniform(0.99, 1.01), 1),
        }
        summary |= {
            "trainable_parameters": trainable,
            "total_parameters": 136_957_248,
            "device": "cpu",
            "dtype": "float32",
        }
        summary |= {"compute_dtype": "float32", "effective_batch_size": 4, "train_loss": round(final + 0.05, 4)}
        summary |= {
            "base_eval_loss": base_loss,
            "final_eval_loss": final,
            "best_eval_loss": final,
            "resumed_from": None,
        }
        summary["notes"] = ["diverged: the loss was not finite at step 12"] if bad else []
        _json(study / "training" / f"{run['run']}.json", summary)


def _predictions(split: str, loss: float, mean: float, difficulty: dict, chinese: bool, rng) -> list[dict]:
    rows = []
    for index, hard in enumerate(difficulty[split]):
        fixed = np.random.default_rng(index)
        tokens = int(fixed.integers(30, 97))
        topic, verb = TOPICS[index % len(TOPICS)], VERBS[index // len(TOPICS) % len(VERBS)]
        prompt, reference = (
            f"Can {topic} be {verb}?",
            f"No, {topic} is not usually {verb}; ask your agent about rule {index}.",
        )
        answer = f"Yes, {topic} can be {verb}. It depends on your state and on clause {rng.integers(9)}."
        if chinese:
            prompt, reference, answer = f"保险第{index}条是什么?", "请咨询您的代理人。", "这取决于您所在的州。"
        row = {
            "id": f"{split}-{index:04d}",
            "split": split,
            "prompt": prompt,
            "reference": reference,
            "prediction": None,
        }
        row |= {"nll": tokens * (loss + 0.35 * hard + rng.normal(0, 0.05)), "label_tokens": tokens, "scores": None}
        if split == "test":
            score = float(np.clip(mean - 0.04 * hard + rng.normal(0, 0.03), 0, 1))
            row["prediction"] = answer
            row["scores"] = {
                "exact_match": float(score > 0.27),
                "f1": min(1.0, score * 1.25),
                "rouge1": min(1.0, score * 1.3),
                "rouge2": score * 0.35,
                "rougeL": score,
                "bleu": score * 0.2,
                "chrf": min(1.0, score * 1.5),
            }
        rows.append(row)
    return rows


def _metrics(run: str, rows: list[dict]) -> dict:
    splits = {}
    for split in ("test", "validation"):
        chosen = [row for row in rows if row["split"] == split]
        tokens = sum(row["label_tokens"] for row in chosen)
        loss = sum(row["nll"] for row in chosen) / tokens
        splits[split] = {"examples": len(chosen), "label_tokens": tokens, "loss": loss, "perplexity": math.exp(loss)}
        if split == "test":
            means = {m: float(np.mean([row["scores"][m] for row in chosen])) for m in SCORES}
            splits[split] |= means | {"corpus_bleu": 100 * means["bleu"], "corpus_chrf": 100 * means["chrf"]}
            splits[split]["empty_predictions"] = 0
    signatures = {"bleu": "nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:2.6.0", "rouge_score": "0.1.2"}
    return {
        "run": run,
        "metrics_version": "1",
        "signatures": signatures,
        "data": {"examples": "5b2f6a90" * 4, "tokens": "0c7e91d2" * 4},
        "splits": splits,
        "seconds": {"loss": 11.0, "generate": 42.0},
        "peak_memory_mb": 1400.0,
    }


def _settings(run: dict) -> dict:
    lora = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    return {
        "model": {"model_name_or_path": "data/models/SmolLM2-135M-Instruct", "revision": None, "dtype": "float32"},
        "data_config": {"train_file": "data/raw/insuranceqa/train.jsonl.gz", "num_proc": 1},
        "max_input_length": 64,
        "max_output_length": 96,
        "training_args": {
            "max_steps": STEPS,
            "learning_rate": float(run["tuned"].get("learning_rate", 0.001)),
            "lr_scheduler_type": "cosine",
            "warmup_steps": 4,
            "weight_decay": 0.01,
            "per_device_train_batch_size": 4,
            "seed": run["seed"],
        },
        "peft_config": lora if run["method"] in ("lora", "qlora") else None,
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        if run["method"] == "qlora"
        else None,
        "generation_config": {"max_new_tokens": 96, "do_sample": False},
        "evaluation": {"split": "test", "generate": True, "batch_size": 16, "language": "auto"},
    }


def _provenance(run: dict) -> dict:
    return {
        "outputs": {f"results/peft/runs/{run['run']}/adapter/adapter_model.safetensors": run["run"][-8:] * 8},
        "data_version": {"data/raw/insurance_2.1/train.jsonl": "5a" * 32},
        "commit": "c12167a0000000000000000000000000000000ff",
        "dirty": False,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "machine": {"cpu": "x86_64", "cores": 2, "gpus": []},
        "inputs": {TOKENS: "0c7e91d2" * 8},
    }


def _history(path: Path, rate: float, base: float, final: float, seconds: float, memory: float, bad: bool, rng) -> None:
    """Exponential fall from the base's loss to the final one; warmup over 4 steps, then cosine."""
    columns = [
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "eval_loss",
        "label_tokens",
        "tokens",
        "seconds",
        "memory_mb",
    ]
    rows = [
        {"step": 0, "epoch": 0.0, "eval_loss": base, "label_tokens": 0, "tokens": 0, "seconds": 0.0, "memory_mb": 900.0}
    ]
    for step in range(LOG_EVERY, STEPS + 1, LOG_EVERY):
        share = (1 - math.exp(-3 * step / STEPS)) / (1 - math.exp(-3))
        level = base + (final - base) * share
        warmed = step / 4 if step <= 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))
        common = {"step": step, "epoch": step / STEPS, "label_tokens": step * 320, "tokens": step * 480}
        common |= {"seconds": round(seconds * step / STEPS, 2), "memory_mb": round(memory, 1)}
        loss = float("nan") if bad and step >= 12 else level + 0.03 + rng.normal(0, 0.06)
        rows.append(common | {"loss": loss, "learning_rate": rate * warmed, "grad_norm": float(rng.uniform(0.8, 1.6))})
        if bad and step >= 12:
            break
        if step % EVAL_EVERY == 0:
            rows.append(common | {"eval_loss": level})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _token_report(rng) -> dict:
    def lengths(mean: float, sigma: float, n: int) -> dict:
        drawn = np.exp(rng.normal(mean, sigma, n))
        counts, edges = np.histogram(drawn, bins=40)
        quantiles = {str(q): round(float(np.percentile(drawn, q)), 1) for q in (50, 90, 99)} | {
            "max": float(drawn.max())
        }
        return {"counts": counts.tolist(), "edges": edges.tolist(), "quantiles": quantiles}

    splits = {}
    for split, n in (("train", 400), ("validation", 48), ("test", 48)):
        splits[split] = {
            "rows_in": n,
            "rows": n - 2,
            "truncated_prompts": 0,
            "truncated_answers": n // 20,
            "dropped": {"no_label_tokens": 2},
            "label_tokens": n * 80,
            "tokens": n * 120,
            "prompt_lengths": lengths(3.4, 0.25, n),
            "answer_lengths": lengths(4.0, 0.35, n),
        }
    clean = _clean_report({split: facts["rows_in"] for split, facts in splits.items()})
    limits = {"max_input_length": 64, "max_output_length": 96}
    return {"data": "insuranceqa", "limits": limits, "splits": splits, "clean": clean, "findings": []}


def _clean_report(rows: dict[str, int]) -> dict:
    """As the stage clean writes it: in train, five duplicates and four leaks; all white space mended."""
    nothing = {"changed": 0, "rejected": 0}
    report = {"dataset": "insuranceqa", "format": ["columns (prompt: question, answer: answer)"], "encoding": "utf-8"}
    report["rows"] = {split: {"in": n, "out": n, "rejected": 0, "not_sampled": 0} for split, n in rows.items()}
    report["rows"]["train"] |= {"in": rows["train"] + 50, "rejected": 9, "not_sampled": 41}
    report["steps"] = {
        split: {"white_space": {"changed": n, "rejected": 0}, "exact_duplicates": nothing} for split, n in rows.items()
    }
    report["steps"]["train"] |= {
        "exact_duplicates": {"changed": 0, "rejected": 5},
        "leaked_answers": {"changed": 0, "rejected": 4},
    }
    none = {"train_rows": 0, "distinct": 0}
    report["leaks"] = {
        "found": {"question": {"test": none}, "answer": {"test": {"train_rows": 4, "distinct": 3}}},
        "left": {"question": {"test": none}, "answer": {"test": none}},
        "rows_left": 0,
    }
    report["examples"] = {
        "white_space": [{"id": "train-1", "before": "Is  this  it?", "after": "Is this it?"}],
        "leaked_answers": [{"id": "train-2", "reason": "leak: answer in test (test-0003)"}],
    }
    return report


def _write_comparison(study: Path, plan: dict) -> None:
    from finegrid.analysis.compare import compare

    runs = [run["run"] for run in _unique(plan["runs"])]
    compare(
        study / "plan.json",
        [study / "metrics" / f"{run}.json" for run in runs],
        [study / "runs" / run / "predictions.jsonl" for run in runs],
        study / "comparison",
        training=[path for run in runs if (path := study / "training" / f"{run}.json").exists()],
        resamples=500,
    )


def _json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
