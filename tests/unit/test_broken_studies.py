"""Study files with one mistake each, as a user may write them, and the words that the user then reads."""

from __future__ import annotations

import re

import pytest
from finegrid.errors import UserError
from finegrid.gpus import gpu
from planned import MEMORY, all_findings, report, sentences, write_study

SHARED = """\
model: {model_name_or_path: data/models/tiny}
settings:
  data_config: {train_file: data/raw/qa/train.jsonl, val_file: data/raw/qa/dev.jsonl, test_file: data/raw/qa/test.jsonl}
  training_args: {max_steps: 100, learning_rate: 2e-4, save_steps: 50, logging_steps: 10}
  peft_config: {r: 8}
compare: {margin: 0.02}
seeds: [0, 1, 2]
"""

# --- mistakes in the design: nothing can be planned ---

DESIGNS = {
    "a misspelt setting": (
        """
factors:
  rate: {key: training_args.learning_rat, levels: [1e-4, 1e-3]}
""",
        "factors.rate.key: 'training_args.learning_rat' is no setting; did you mean "
        "'training_args.learning_rate'? (line 9)",
    ),
    "a factor that changes nothing": (
        """
factors:
  processes: {key: data_config.num_proc, levels: [1, 4]}
""",
        "factors.processes: changes nothing: its levels 1, 4 come to the same runs; expected levels that "
        "change what is learned, and not only how it is computed or logged (line 9)",
    ),
    "two factors on one key": (
        """
factors:
  method:
    small: {peft_config.r: 8}
    large: {peft_config.r: 64}
  rank: {key: peft_config.r, levels: [8, 64]}
""",
        "factors.rank: sets 'peft_config.r', which 'factors.method' sets too; take it out of one of them (line 12)",
    ),
    "an arm without runs": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}}
tune:
  rate:
    key: training_args.learning_rate
    levels: [1e-4, 2e-4]
    in_arms: [{arms: {method: full}, levels: []}]
""",
        "tune.rate.in_arms[0].levels: is empty; expected at least one value, else there is nothing to run (line 14)",
    ),
    "every arm excluded": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
exclude: [{rank: 8}, {rank: 64}]
""",
        "exclude: leaves no arm; a study needs at least one (line 10)",
    ),
    "an excluded baseline": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}, dora: {peft_config.use_dora: true}}
exclude: [{method: full}]
compare: {baseline: {method: full}}
""",
        "compare.baseline: {method: full} is no arm of this study: exclude[0] leaves it out; expected the "
        "levels of exactly one of lora, dora (line 10)",
    ),
    "a start that is excluded": (
        """
design: one-at-a-time
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
  decay: {key: training_args.weight_decay, levels: [0.01, 0.1]}
exclude: [{rank: 8, decay: 0.01}]
""",
        "exclude[0]: leaves out {rank: 8, decay: 0.01}, the first level of each factor, which 'design: "
        "one-at-a-time' starts from; take the entry out, or name another start with compare.baseline (line 12)",
    ),
    "a level given twice": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64, 8]}
""",
        "factors.rank.levels: '8' is given twice; expected different values (line 9)",
    ),
    "a rank for full fine-tuning": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}}
  rank: {key: peft_config.r, levels: [8, 64]}
""",
        "factors: level 'full' of method sets 'peft_config', and rank sets 'peft_config.r': they can't be "
        "combined; write 'exclude: [{method: full}]' to leave the combinations out, and 'include: [{method: "
        "full}]' to have full once, without any rank (line 8)",
    ),
    "a list that names no arm": (
        """
design: list
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
""",
        "include: is missing; 'design: list' runs only the arms named there, {factor: level} each",
    ),
    "a level that isn't there": (
        """
design: list
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
include: [{rank: 46}]
""",
        "include[0].rank: '46' is no level of 'rank'; expected one of 8, 64 (line 11)",
    ),
    "an effective batch that can't be": (
        """
effective_batch_size: 24
factors:
  batch: {key: training_args.per_device_train_batch_size, levels: [8, 16]}
""",
        "effective_batch_size: 24 found, but arm 16 trains 16 rows at once (per_device_train_batch_size 16 × gpus 1), "
        "and 24 is no multiple of that; nearest possible: 16 or 32 (line 8)",
    ),
    "an effective batch and an accumulation": (
        """
effective_batch_size: 64
factors:
  accumulation: {key: training_args.gradient_accumulation_steps, levels: [1, 8]}
""",
        "effective_batch_size: 64 found, and 'accumulation' sets "
        "'training_args.gradient_accumulation_steps'; expected one of them: the accumulation follows from "
        "the effective batch size, so vary 'training_args.per_device_train_batch_size' instead (line 8)",
    ),
    "tuning without validation rows": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
tune:
  rate: {key: training_args.learning_rate, levels: [1e-4, 1e-3]}
settings:
  data_config: {train_file: data/raw/qa/train.jsonl, test_file: data/raw/qa/test.jsonl}
  training_args: {max_steps: 100}
""",
        "tune: chooses by the validation loss, but there are no validation rows; give data_config.val_file "
        "or validation_size (line 6)",
    ),
    "levels for an arm that isn't there": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}}
exclude: [{method: full}]
tune:
  rate:
    key: training_args.learning_rate
    levels: [1e-4, 2e-4]
    in_arms: [{arms: {method: full}, levels: [1e-5, 2e-5]}]
""",
        "tune.rate.in_arms[0].arms: {method: full} fits no arm of this study; expected levels that one of "
        "them has (line 15)",
    ),
    "a card that nobody makes": (
        """
hardware: {gpus: [rtx-4900]}
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
""",
        "hardware.gpus[0]: gpu 'rtx-4900': not in Finegrid's table; did you mean 'rtx-4090'?; there are rtx-",
    ),
    "stopping early by no evaluation": (
        """
factors:
  stop: {no: {}, yes: {early_stopping: {patience: 3}}}
""",
        "arm yes: early_stopping: needs evaluations to stop by; set training_args.eval_strategy to 'steps' or 'epoch'",
    ),
}


# --- mistakes that only the plan sees: the study, what else the plan knows, and what it says ---

FINDINGS = {
    "unequal tuning effort": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}}
tune:
  rate:
    key: training_args.learning_rate
    levels: [1e-4, 2e-4, 4e-4]
    in_arms: [{arms: {method: full}, levels: [1e-5]}]
""",
        {},
        "warning: tune.rate: arm lora has 3 tuned levels to choose the best of, arm full only 1: the arm that "
        "may try more looks better; give every arm as many levels; in_arms gives an arm levels of its own",
    ),
    "full fine-tuning and LoRA at one learning rate": (
        """
factors:
  method: {full: {peft_config: null}, lora: {}}
""",
        {},
        "warning: training_args.learning_rate: full fine-tuning and adapters are trained at the same learning "
        "rate 0.0002; the best rate of adapters is about ten times higher, so this comparison says little about "
        "the methods; give each method a rate of its own, or search inside each arm with tune: and in_arms",
    ),
    "arms that learn from more label tokens": (
        """
factors:
  length: {short: {}, long: {training_args.max_steps: 300}}
""",
        {},
        "warning: factors: arm short learns from 54,040 label tokens, arm long from 161,560 (67% fewer): the "
        "same data, but other batches, steps or epochs, so one of them simply trains longer; let batch × steps "
        "be the same in all arms, or read the result as that of the longer training too",
    ),
    "checkpoints that are never written": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
settings:
  data_config: {train_file: data/raw/qa/train.jsonl, test_file: data/raw/qa/test.jsonl}
  training_args: {max_steps: 100, save_steps: 1000, logging_steps: 10}
  peft_config: {r: 8}
""",
        {},
        "warning: training_args.save_steps: 1,000 is more than the 100 steps of a run: no checkpoint is written, "
        "and a killed run starts anew; set save_steps to 25, or to 0.25, which is four times a run",
    ),
    "a warmup longer than the run": (
        """
factors:
  warmup: {key: training_args.warmup_steps, levels: [0.05, 500]}
""",
        {},
        "error: training_args.warmup_steps: a warmup of 500 steps in a run of 100 steps, in 3 of 6 runs (arm "
        "500): the learning rate never gets to its full height; give a share of the steps instead, such as "
        "warmup_steps: 0.05, or train longer",
    ),
    "evaluations that cost more than the training": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
settings:
  data_config: {train_file: data/raw/qa/train.jsonl, val_file: data/raw/qa/dev.jsonl, test_file: data/raw/qa/test.jsonl}
  training_args: {max_steps: 100, eval_strategy: steps, eval_steps: 1, save_steps: 50, logging_steps: 10}
  peft_config: {r: 8}
""",
        {},
        "warning: training_args.eval_steps: 101 evaluations of 5,000 tokens in 100 steps take 66% of the "
        "compute; set eval_steps to 17, or lower data_config.max_validation_samples",
    ),
    "answers that the length limit cuts": (
        """
factors:
  length: {key: max_output_length, levels: [64, 512]}
""",
        {"reports": "short answers"},
        "error: data_config.limits.truncated_answers: 5.0% allowed, but 42 of 100 answers of train are longer "
        "than max_output_length 64 (42.0%) and are cut, in 3 of 6 runs (arm 64); raise max_output_length (99 % "
        "of the answers have at most 180 tokens), drop long rows with data_config.truncation.output: drop, or "
        "raise the limit",
    ),
    "too few examples for the margin": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
compare: {metric: rougeL, margin: 0.005}
""",
        {},
        "warning: compare.margin: 500 examples and 3 seeds show differences in rougeL from about 0.0078 on (if "
        "scores spread as they did in the demo), but the margin is 0.005: smaller ones will end as not "
        "distinguishable; it takes about 1,300 examples with 3 seeds, or 770 examples with 4 seeds, or 630 "
        "examples with 5 seeds",
    ),
    "one seed": (
        """
factors:
  rank: {key: peft_config.r, levels: [8, 64]}
seeds: [0]
""",
        {},
        "warning: seeds: one seed: differences between arms can't be told from the luck of the seed; give at "
        "least three seeds, such as seeds: [0, 1, 2]",
    ),
    "a run that fits no card": (
        """
factors:
  method:
    full: {peft_config: null, training_args.learning_rate: 2e-5}
    lora: {}
hardware: {gpus: [rtx-3090, rtx-4090]}
""",
        {"change": {"full": {"fits": False, "memory": MEMORY}}, "hardware": (gpu("rtx-3090"), gpu("rtx-4090"))},
        "error: hardware.gpus: runs need up to 74.0 GiB on each GPU, in 3 of 6 runs (arm full); the largest GPU "
        "has 24.0 GiB (rtx-3090); most of it is optimiser (32.0 GiB); try an adapter (peft_config) instead of "
        "full fine-tuning, training_args.deepspeed: config/deepspeed/zero3.json with gpus: 2 or more, or a "
        "larger GPU in hardware.gpus",
    ),
}


def merged(text: str) -> str:
    """Return the shared text with the sections that the study's own text does not have."""
    own = set(re.findall(r"^(\w+):", text, re.MULTILINE))
    shared = re.split(r"^(?=\w)", SHARED, flags=re.MULTILINE)
    return "".join(part for part in shared if part.split(":")[0] not in own) + text.lstrip("\n")


def findings(folder, text: str, known: dict) -> list[str]:
    study = write_study(folder, merged(text))
    if known.get("reports"):
        cut = {run.settings.max_output_length == 64: f"{run.dataset}-{run.tokens_id}" for run in study.runs}
        known = {"reports": {cut[False]: report(), cut[True]: report({"truncated_answers": 42})}}
    return sentences(all_findings(study, **known))


@pytest.mark.parametrize("name", DESIGNS)
def test_a_mistake_in_the_design_is_told_with_place_and_mending(name, tmp_path):
    text, told = DESIGNS[name]
    with pytest.raises(UserError) as caught:
        write_study(tmp_path, merged(text))
    (problem,) = caught.value.problems
    assert problem.startswith(f"config/studies/mine.yaml: {told}")


@pytest.mark.parametrize("name", FINDINGS)
def test_a_mistake_that_the_plan_sees_is_told_with_place_and_mending(name, tmp_path):
    text, known, told = FINDINGS[name]
    assert findings(tmp_path, text, known) == [told]
