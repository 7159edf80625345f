"""Shapes of well-known models: parameter counts against the published ones, and where a config.json is found."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from finegrid.errors import UserError
from finegrid.settings import ModelSettings
from finegrid.shapes import GEMMA3_DEFAULTS, display_name, model_config, model_shapes, positions, read_config


def vision(hidden: int) -> int:
    return 416_866_032 + 1_152 * hidden + 1_152


# Parameter counts as the model cards and the hub's safetensors metadata state them. Of a multimodal Gemma 3 the text
# part: the published count less the vision tower (416,866,032) and its projector (1,152 x hidden size + 1,152).
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "huggyllama/llama-30b": 32_528_943_616,
    "huggyllama/llama-65b": 65_285_660_672,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472 - vision(2560),
    "google/gemma-3-12b-it": 12_187_325_040 - vision(3840),
    "google/gemma-3-27b-it": 27_432_406_640 - vision(5376),
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "zai-org/glm-4-9b-chat-hf": 9_399_951_360,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "zai-org/GLM-4-32B-0414": 32_566_081_536,
}


def count_by_transformers(config: dict) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys)).num_parameters()


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_shape_has_the_published_number_of_parameters(hub_id):
    assert count_by_transformers(model_shapes()[hub_id]["config"]) == PUBLISHED[hub_id]


@pytest.mark.parametrize(("hub_id", "published"), [("chatglm3-6b", 6_243_584_000), ("glm-4-9b-chat", 9_399_951_360)])
def test_chatglms_own_names_give_the_published_number_of_parameters(hub_id, published):
    """transformers has no ``chatglm``: its layers are counted by hand."""
    shape = model_shapes()[f"zai-org/{hub_id}"]["config"]
    hidden, inner, layers = shape["hidden_size"], shape["ffn_hidden_size"], shape["num_layers"]
    queries = shape["num_attention_heads"] * shape["kv_channels"]
    qkv = queries + 2 * shape["multi_query_group_num"] * shape["kv_channels"]
    layer = (hidden + 1) * qkv + queries * hidden + hidden * 2 * inner + inner * hidden + 2 * hidden
    assert layers * layer + 2 * shape["padded_vocab_size"] * hidden + hidden == published


def test_every_other_entry_is_a_sibling_of_a_counted_one():
    """A chat model, or the same model under another name, has the sizes of the one whose parameters were counted."""
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_key_value_heads", "head_dim")

    def shape(config):
        return config["model_type"], *(config.get(key) for key in sizes), config["tie_word_embeddings"]

    counted = {shape(model_shapes()[hub_id]["config"]) for hub_id in PUBLISHED}
    uncounted = [
        hub_id
        for hub_id, entry in model_shapes().items()
        if entry["config"]["model_type"] != "chatglm" and shape(entry["config"]) not in counted
    ]
    assert uncounted == []


def test_revisions_are_commits_or_unknown():
    for hub_id, entry in model_shapes().items():
        assert entry["revision"] is None or (len(entry["revision"]) == 40 and int(entry["revision"], 16)), hub_id


def test_folder_of_the_model_comes_before_everything(tmp_path):
    (tmp_path / "data/models/Qwen--Qwen2.5-7B--abcdef12").mkdir(parents=True)
    (tmp_path / "data/models/Qwen--Qwen2.5-7B--abcdef12/config.json").write_text('{"hidden_size": 1}')
    config, source = model_config(hub_model("Qwen/Qwen2.5-7B", "abcdef12" * 5), tmp_path)
    assert config == {"hidden_size": 1}
    assert source == "data/models/Qwen--Qwen2.5-7B--abcdef12/config.json"


def test_hub_cache_comes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--Qwen--Qwen2.5-7B/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"hidden_size": 2}')
    assert model_config(hub_model("Qwen/Qwen2.5-7B", "c" * 40), tmp_path)[0] == {"hidden_size": 2}
    assert model_config(hub_model("Qwen/Qwen2.5-7B", "d" * 40), tmp_path)[0]["hidden_size"] == 3584


def test_table_says_that_it_is_the_source(tmp_path):
    config, source = model_config(hub_model("Qwen/Qwen2.5-7B", "d" * 40), tmp_path)
    assert config["intermediate_size"] == 18944
    assert source == "shape from Finegrid's own table (Qwen/Qwen2.5-7B)"


def test_folder_that_is_not_there_yet_is_found_by_its_name(tmp_path):
    model = ModelSettings(model_name_or_path="data/models/SmolLM2-135M-Instruct")
    config, source = model_config(model, tmp_path)
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    assert source.endswith("(HuggingFaceTB/SmolLM2-135M-Instruct)")


# A multimodal config says so at its top, beside the language model's own.
GEMMA3_QUANTISED = {"model_type": "gemma3", "text_config": {}, "quantization_config": {"quant_method": "awq"}}


def test_unknown_model_is_asked_of_the_hub_and_its_failure_is_no_error(tmp_path, monkeypatch):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "known" in self.path else 404)
            self.end_headers()
            if "known" in self.path:
                stored = GEMMA3_QUANTISED if "quantised" in self.path else {}
                self.wfile.write(json.dumps({"hidden_size": 3} | stored).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
    try:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert model_config(hub_model("some/known", "e" * 40), tmp_path) == (
            {"hidden_size": 3},
            "config.json from the hub",
        )
        with pytest.raises(UserError, match="some/known-quantised: the model's weights are stored quantised"):
            model_config(hub_model("some/known-quantised", "e" * 40), tmp_path)
        assert model_config(hub_model("some/other", "e" * 40), tmp_path) is None
        assert model_config(hub_model("some/other", "e" * 40), tmp_path) is None
        assert len(asked) == 3  # a failure is remembered: a plan asks for the same model a thousand times
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert model_config(hub_model("some/third", "e" * 40), tmp_path) is None
        assert len(asked) == 3
    finally:
        server.shutdown()
        server.server_close()


def test_unknown_folder_has_no_shape(tmp_path):
    assert model_config(ModelSettings(model_name_or_path="data/models/mine"), tmp_path) is None


def test_multimodal_gemma_3_is_read_as_its_language_model(tmp_path):
    """As on the hub: what equals transformers' default is left out."""
    from transformers import Gemma3TextConfig

    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    hub = {"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": {"model_type": "gemma3_text", **text}}
    (tmp_path / "config.json").write_text(json.dumps(hub | {"vision_config": {"hidden_size": 1152}}))
    assert read_config(tmp_path / "config.json") == model_shapes()["google/gemma-3-4b-it"]["config"]
    defaults = Gemma3TextConfig().to_dict()
    defaults["sliding_window_pattern"] = defaults["_sliding_window_pattern"]
    assert {key: defaults[key] for key in GEMMA3_DEFAULTS} == GEMMA3_DEFAULTS


@pytest.mark.parametrize(("text", "problem"), [("{", "not JSON"), ("[1]", "holds list; expected an object")])
def test_broken_config_is_told(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: {problem}"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_model_that_is_stored_quantised_is_refused_before_anything_is_planned(tmp_path, method):
    config = {"hidden_size": 1, "quantization_config": {"quant_method": method, "load_in_4bit": True}}
    (tmp_path / "data/models/mine").mkdir(parents=True)
    (tmp_path / "data/models/mine/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"stored quantised .*quant_method: {method}.*set model.model_name_or_path"):
        model_config(ModelSettings(model_name_or_path="data/models/mine"), tmp_path)


def test_longest_row_is_read_under_either_name():
    shapes = model_shapes()
    assert positions(shapes["zai-org/chatglm3-6b"]["config"]) == 8192
    assert positions(shapes["meta-llama/Llama-3.1-8B"]["config"]) == 131072
    assert positions({}) is None


def test_display_name_is_the_hub_id_without_its_organisation():
    assert display_name("Qwen/Qwen2.5-7B") == "Qwen2.5-7B"


def hub_model(hub_id: str, revision: str) -> ModelSettings:
    return ModelSettings(model_name_or_path=hub_id, revision=revision)
