"""``finegrid fit``: the largest batch and length, its table, its messages; predictions against published numbers."""

import json
import re
import subprocess
import sys

import published
import pytest
from calls import counted_calls
from finegrid.errors import UserError
from finegrid.fit import METHODS, Fit, _most, fit, print_fit, recipes_of
from finegrid.memory import shape_of, training_memory
from finegrid.shapes import model_shapes, positions

GIB = 2**30
LLAMA_8B = model_shapes()["meta-llama/Llama-3.1-8B"]["config"]
LLAMA_70B = model_shapes()["meta-llama/Llama-3.1-70B"]["config"]
QWEN = model_shapes()["Qwen/Qwen2.5-1.5B"]["config"]


def total(config: dict, method: str, rows: int, length: int, **options) -> int:
    memory = training_memory(
        recipes_of(**options)[method],
        shape_of(config),
        rows=rows,
        length=length,
        labels=rows * length,
        device="cuda",
        deepspeed={},
    )
    return memory.total


def found(config: dict, method: str, memory: float, length: int = 1024, **options) -> Fit:
    return fit("model", config, method, recipes_of(**options)[method], round(memory * GIB), length)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("method", METHODS)
def test_batch_and_length_are_the_largest_that_fit(method):
    for size in (12, 24, 80):
        one = found(QWEN, method, size)
        if one.batch:
            assert total(QWEN, method, one.batch, 1024) <= size * GIB < total(QWEN, method, one.batch + 1, 1024)
        else:
            assert one.needs > size * GIB
        if 0 < one.longest < positions(QWEN):
            assert total(QWEN, method, 1, one.longest) <= size * GIB < total(QWEN, method, 1, one.longest + 64)


def test_search_agrees_with_trying_every_number():
    for memory in range(0, 400, 7):
        for size in (lambda n: 3 * n, lambda n: 50 + n * n, lambda n: max(100, 5 * n) + (9 if n > 10 else 0)):
            expected = max((n for n in range(1, 41) if size(n) <= memory), default=0)
            assert _most(size, memory, 40) == expected


def test_longest_row_is_no_longer_than_the_model_was_made_for():
    assert found(model_shapes()["meta-llama/Llama-2-7b-hf"]["config"], "qlora", 80).longest == 4096


def test_what_does_not_fit_says_what_it_needs():
    one = found(LLAMA_70B, "qlora", 24)
    assert (one.batch, one.longest) == (0, 0)
    assert one.needs == total(LLAMA_70B, "qlora", 1, 1024)


def test_70b_does_not_fit_a_24_gb_card_because_its_4_bit_weights_alone_do_not():
    """70,553,706,496 parameters, of which two tables of 128,256 x 8,192 are embedding and head."""
    linear = 70_553_706_496 - 2 * 128_256 * 8_192
    assert linear / 2 > 24 * GIB
    assert found(LLAMA_70B, "qlora", 24, length=64).batch == 0


# ---------------------------------------------------------------- what is known of each method


def test_full_fine_tuning_takes_16_bytes_a_parameter_and_more():
    assert 16 < found(LLAMA_8B, "full", 24).needs / 8_030_261_248 < 17.5


def test_8_bit_adamw_on_bf16_weights_takes_6_bytes_a_parameter_and_more():
    assert 6 < found(LLAMA_8B, "full-8bit", 24).needs / 8_030_261_248 < 7


def test_lora_takes_the_bf16_weights_and_little_more():
    assert 2 < found(LLAMA_8B, "lora", 24).needs / 8_030_261_248 < 2.6


def test_checkpointing_makes_room():
    kept = found(QWEN, "lora", 24)
    dropped = found(QWEN, "lora", 24, checkpointing=False)
    assert kept.batch > dropped.batch > 0
    assert kept.longest > dropped.longest > 0


def test_fewer_label_tokens_make_room_until_logits_are_made_in_parts():
    recipe = recipes_of()["lora"]
    few, all_of_them = (
        [fit("m", QWEN, "lora", recipe, memory * GIB, 256, label_share=share) for memory in (5, 24)]
        for share in (0.3, 1.0)
    )
    assert few[0].batch > all_of_them[0].batch
    assert few[0].longest > all_of_them[0].longest
    assert few[1].batch == all_of_them[1].batch  # of 883 tokens' logits at a time, either way


def test_zero_divides_over_the_gpus_and_offload_moves_to_the_host(capsys):
    def needs(**options):
        (one,) = (one for one in table(capsys, model="Llama-3.1-8B", **options) if one["method"] == "full")
        return one["needs"], one["host"]

    alone, zero_2, zero_3 = needs(), needs(gpus=8, zero=2), needs(gpus=8, zero=3)
    assert alone[0] > zero_2[0] > zero_3[0]
    offloaded = needs(gpus=8, zero=3, offload=True)
    assert offloaded[0] < zero_3[0]
    assert offloaded[1] > 12 * 8_030_261_248 / 8  # 32-bit master weights and AdamW's two states, an eighth each
    assert zero_3[1] == 0


# ---------------------------------------------------------------- the table and its options


def table(capsys, **options) -> list[dict]:
    print_fit(gpu_memory="24GB", as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_json_holds_every_model_and_method_with_its_memory(capsys):
    rows = table(capsys)
    assert {row["method"] for row in rows} == set(METHODS)
    models = {row["model"] for row in rows}
    assert {"meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B", "google/gemma-2-9b", "zai-org/chatglm3-6b"} <= models
    assert len(rows) == len(models) * len(METHODS)
    one = next(row for row in rows if row["model"] == "meta-llama/Llama-3.1-8B" and row["method"] == "lora")
    assert one["memory"]["total"] == one["needs"] == total(LLAMA_8B, "lora", 1, 1024)
    assert one["gpu_memory"] == 24 * GIB


def test_models_of_equal_sizes_are_one_row(capsys):
    models = {row["model"] for row in table(capsys)}
    assert "Qwen/Qwen2.5-7B" in models
    assert "Qwen/Qwen2.5-7B-Instruct" not in models
    assert "meta-llama/Meta-Llama-3-8B" not in models


def test_printed_table_fits_80_columns_and_cuts_nothing(capsys):
    print_fit(gpu_memory="24GB")
    text = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert re.search(r"Llama-3\.1-70B .*needs \d+ GiB", text)
    table_lines = [line.rstrip() for line in text.splitlines() if re.match(r"(Llama|Qwen|gemma|Mistral|glm|GLM)", line)]
    assert len(table_lines) > 30
    assert max(map(len, table_lines)) <= 80


def test_options_are_said_in_the_table(capsys):
    print_fit(gpu="rtx-4090", length=4096, model="Qwen2.5-7B", label_share=0.4, checkpointing=False, rank=64)
    text = capsys.readouterr().out
    assert "one GPU (rtx-4090, 24 GiB)" in text
    assert "rows of 4,096 tokens" in text
    assert "checkpointing off; 40% of the tokens carry loss; LoRA of rank 64" in text
    assert "Qwen2.5-7B" in text
    assert "Llama" not in text


def test_quantised_weights_are_not_offered_with_zero_3(capsys):
    print_fit(gpu_memory="80GB", model="Llama-3.1-8B", gpus=8, zero=3)
    assert "not with ZeRO 3" in capsys.readouterr().out


def test_model_may_be_a_folder(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    rows = table(capsys, model=str(tmp_path))
    assert [row["parameters"] for row in rows] == [8_030_261_248] * 4


def test_part_of_a_name_shows_the_family(capsys):
    assert {row["model"] for row in table(capsys, model="gemma-2")} == {
        "google/gemma-2-2b",
        "google/gemma-2-9b",
        "google/gemma-2-27b",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory": "24 apples"}, "memory '24 apples': not a size; write a number and its unit, such as 24GB"),
        ({"gpu": "rtx-4900"}, "did you mean 'rtx-4090'?"),
        ({"gpu_memory": "24GB", "gpu": "rtx-4090"}, "give one of the two"),
        ({"gpu_memory": "24GB", "model": "Qwen2.5-8B"}, "did you mean 'Qwen2.5-7B'?"),
        ({"gpu_memory": "24GB", "length": 0}, "--length 0: expected 1 or more"),
        ({"gpu_memory": "24GB", "gpus": 0}, "--gpus 0: expected 1 or more"),
        ({"gpu_memory": "24GB", "zero": 4}, "--zero 4: no such stage"),
        ({"gpu_memory": "24GB", "offload": True}, "--offload: needs DeepSpeed"),
        ({"gpu_memory": "24GB", "label_share": 2.0}, "--label-share 2.0: expected a share above 0 and up to 1"),
    ],
)
def test_option_that_makes_no_sense_is_told(options, message):
    with pytest.raises(UserError) as error:
        print_fit(**options)
    assert message in str(error.value)


def test_without_a_gpu_here_it_asks_for_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no GPU here: say which, such as --gpu-memory 24GB or --gpu rtx-4090"):
        print_fit()


def test_whole_table_is_little_work_and_needs_no_heavy_library(capsys):
    code = (
        "import sys\n"
        "from finegrid.fit import print_fit\n"
        "print_fit('24GB')\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == "[]"
    with counted_calls() as calls:
        print_fit("24GB")
    assert calls[0] < 10_000_000  # 5.2 million where this was written


# ---------------------------------------------------------------- published measurements


def named(run: published.Run) -> str:
    return f"{run.source}: {run.what} {run.rows}x{run.length}"


@pytest.mark.parametrize("run", [run for run in published.RUNS if run.within is not None], ids=named)
def test_prediction_is_near_the_published_measurement(run):
    if run.limit:
        assert run.predicted() < run.published
    else:
        assert abs(run.deviation()) <= run.within


def test_most_published_runs_are_predicted_within_a_tenth():
    near = [run for run in published.RUNS if run.limit or abs(run.deviation()) <= 0.1]
    assert len(near) >= 0.7 * len(published.RUNS)


def test_every_source_is_named_and_used():
    assert {run.source for run in published.RUNS} == set(published.SOURCES)


def test_documentation_holds_what_the_code_says():
    """If this fails after a change of the estimate: ``python tests/unit/published.py --write``, and read its text."""
    text = published.DOCS.read_text(encoding="utf-8")
    assert published.write(text) == text
