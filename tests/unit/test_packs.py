"""Share groups and packs: who trains with whom, known from the study and a name alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from finegrid.errors import UserError
from finegrid.memory import Memory
from finegrid.packs import (
    alone,
    at_once,
    groups,
    most_runs,
    pack_memory,
    pack_of_name,
    packs_here,
    packs_on_cluster,
    why_alone,
)
from finegrid.study import load_study

RECIPE = """\
model: {model_name_or_path: data/models/m}
data_config: {train_file: d/train.jsonl, val_file: d/validation.jsonl, test_file: d/test.jsonl}
training_args: {max_steps: 4, learning_rate: 1.0e-2}
peft_config: {peft_type: LORA, r: 8, lora_alpha: 16, target_modules: all-linear}
"""
STUDY = """\
title: t
recipe: config/recipes/r.yaml
factors:
  method:
    lora: {peft_config.r: 4}
    wide: {peft_config.r: 16}
    full: {peft_config: null}
    dora: {peft_config.use_dora: true}
    half: {model.dtype: bfloat16}
    short: {max_output_length: 64}
seeds: [0, 1, 2]
compare: {baseline: {method: lora}}
"""


@pytest.fixture
def make(tmp_path):
    def study(text: str = STUDY):
        for name, content in {"config/recipes/r.yaml": RECIPE, "config/studies/s.yaml": text}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return load_study(Path("config/studies/s.yaml"), tmp_path)

    return study


def test_runs_share_where_base_tokens_and_numbers_are_the_same(make):
    study = make()
    levels = [{run.arms[0] for run in group} for group in groups(study).values()]
    assert levels == [{"lora", "wide"}, {"half"}, {"short"}]
    reasons = {study.run(run).arms[0]: why for run, why in alone(study).items()}
    assert reasons == {"full": "full fine-tuning changes the base", "dora": "DoRA is not packed"}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("gpus", 2, "2 processes"),
        ("training_args", {"deepspeed": "x.json"}, "deepspeed"),
        ("training_args", {"report_to": ["wandb"]}, "wandb"),
        ("training_args", {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ("peft_config", {"peft_type": "IA3"}, "IA3"),
        ("peft_config", {"peft_type": "LORA", "init_lora_weights": "pissa"}, "pissa"),
        ("peft_config", {"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_not_packed_says_why(make, key, value, reason):
    settings = make().runs[0].settings
    assert why_alone(settings) is None
    assert reason in why_alone(settings.model_copy(update={key: value}))
    tracked = settings.model_copy(update={"training_args": {"report_to": "tensorboard"}})
    assert why_alone(tracked) is None


def test_a_name_alone_tells_the_members_and_every_run_is_in_one_pack(make):
    study = make()
    for side_by_side in (1, 2, 3, 8):
        packs = packs_here(study, side_by_side)
        members = [run.id for pack in packs for run in pack.runs]
        assert len(members) == len(set(members))
        assert all(pack_of_name(study, pack.name) == pack for pack in packs)
        assert all(len(pack.runs) > 1 for pack in packs)
    assert [len(pack.runs) for pack in packs_here(study, 1)] == [6, 3, 3]
    assert [len(pack.runs) for pack in packs_here(study, 2)] == [6, 3, 3]
    assert [len(pack.runs) for pack in packs_here(study, 4)] == [3, 3, 3, 3]
    assert packs_here(study, 12) == []


def test_a_pack_has_no_more_runs_than_asked_for_and_never_one(make):
    study = make()
    assert [len(pack.runs) for pack in packs_here(study, 1, most=2)] == [2, 2, 2, 2, 2]
    assert packs_here(study, 2, most=0) == []


def test_packs_of_a_cluster_stay_short_and_small(make):
    study = make(STUDY.replace("seeds: [0, 1, 2]", f"seeds: {list(range(20))}"))
    quick = packs_on_cluster(study, {run.id: 60.0 for run in study.runs})
    assert max(len(pack.runs) for pack in quick) == 8
    slow = packs_on_cluster(study, {run.id: 1000.0 for run in study.runs})
    assert max(len(pack.runs) for pack in slow) == 3
    assert packs_on_cluster(study, {run.id: 4000.0 for run in study.runs}) == []
    assert max(len(pack.runs) for pack in packs_on_cluster(study, {}, most=5)) == 5


def test_an_added_level_leaves_the_hashes_of_the_others(make):
    more = STUDY.replace("seeds:", "    narrow: {peft_config.r: 2}\nseeds:")
    assert list(groups(make())) == list(groups(make(more)))


@pytest.mark.parametrize("name", ["1a2b3c4d-1of2", "x", "1a2b3c4d-3of2"])
def test_an_unknown_name_is_a_users_mistake(make, name):
    with pytest.raises(UserError, match="pack"):
        pack_of_name(make(), name)


def test_the_key_takes_auto_off_or_a_number():
    given = [None, "auto", "off", False, 4, "4"]
    assert [most_runs(value) for value in given] == [None, None, 0, 0, 4, 4]
    for value, hint in (("aut", "did you mean 'auto'"), (1, "2 or more"), (True, "expected"), (2.5, "expected")):
        with pytest.raises(UserError, match=hint):
            most_runs(value)


def test_as_many_runs_are_in_a_step_as_the_card_holds():
    memory = Memory(10, 1, 1, 2, 4, 1, 0, 5, total=23)
    assert at_once(memory, card=100) == (95 - 15) // 8
    assert at_once(memory, card=20) == 1
    assert at_once(memory, card=None) == 1
    assert pack_memory(memory, runs=6, together=1) == 23 + 5 * 4
    assert pack_memory(memory, runs=6, together=6) == 15 + 6 * 8
