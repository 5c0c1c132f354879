"""What families say of their models: without torch as with transformers, and frequencies as transformers has them."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from nemo_kto.errors import ConfigError, KTOError
from nemo_kto.network import families
from nemo_kto.network.families import SUPPORTED_MODEL_TYPES, dimensions_of, model_types, sizes_of_folder
from nemo_kto.network.family import Family
from nemo_kto.network.hf_config import load_hf_config
from nemo_kto.network.rotary import RotaryEmbedding, unsupported_fields
from nemo_kto.network.weight_rules import Piece, expected_shapes, stacked
from tests.network import tiny_hf, tiny_vision

MODELS = tiny_hf.families()
cases = pytest.mark.parametrize("name", MODELS)


def test_every_file_is_a_family_with_a_model_that_is_tried() -> None:
    files = {file.stem for file in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    parts = {config.text_config.model_type for config in tiny_vision.configs().values()}
    assert files == set(SUPPORTED_MODEL_TYPES) == {config.model_type for config in MODELS.values()} | parts
    assert set(model_types()) == {config.model_type for config in MODELS.values()}
    for name in files:
        assert isinstance(importlib.import_module(f"{families.__name__}.{name}").FAMILY, Family)


@cases
def test_sizes_from_a_file_are_those_of_the_loaded_configuration(tmp_path: Path, name: str) -> None:
    """transformers writes all that is needed, under its own names or older ones, but for experts of Qwen3-MoE."""
    MODELS[name].save_pretrained(tmp_path)
    found, loaded = sizes_of_folder(tmp_path), dimensions_of(load_hf_config(tmp_path)).divided
    assert found == loaded or (found is None and loaded.num_experts)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, '
         '"num_attention_heads": 2, "num_key_value_heads": null, "vocab_size": 9}', True),
        # transformers' defaults are not known here
        ('{"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2}', False),
        ('{"model_type": "llama", "num_hidden_layers": "two", "hidden_size": 8, "intermediate_size": 16}', False),
        ('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, '
         '"num_attention_heads": 0, "num_key_value_heads": 2, "vocab_size": 9}', False),
        ('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4, '
         '"num_attention_heads": "2", "num_key_value_heads": "2", "vocab_size": 9}', False),
        ('{"model_type": "gpt2"}', False),
        ("[]", False),
        ("{", False),
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_enough_is_left_to_transformers(tmp_path: Path, text: str, known: bool) -> None:
    (tmp_path / "config.json").write_text(text)
    sizes = sizes_of_folder(tmp_path)
    assert (sizes is not None) is known
    assert sizes is None or (sizes.num_query_groups, sizes.ffn_hidden_size) == (2, 16)
    assert sizes_of_folder(tmp_path / "none") is None


@cases
def test_the_table_names_what_transformers_saves(tmp_path: Path, name: str) -> None:
    tiny_hf.make_folder(tmp_path, MODELS[name])
    stored = {key: tuple(tensor.shape) for key, tensor in tiny_hf.stored_tensors(tmp_path).items()}
    assert expected_shapes(families.family_of(MODELS[name]).rules(MODELS[name])) == stored


def test_pieces_of_one_tensor_by_hand() -> None:
    """Rows 0-1, 2-4 and 5 of a tensor of six rows."""
    pieces = stacked("w", (2, 7), (3, 7), (1, 7))
    assert pieces == (Piece("w", (2, 7), 0, 6), Piece("w", (3, 7), 2, 6), Piece("w", (1, 7), 5, 6))
    assert {piece.tensor_shape for piece in pieces} == {(6, 7)}
    assert pieces[1].within((slice(1, 3), slice(0, 4))) == (slice(3, 5), slice(0, 4))
    assert Piece("w", (2, 7)).tensor_shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma2", "hidden_activation", "gelu"),
        ("glm4_moe", "norm_topk_prob", False),
        ("glm4_moe", "num_experts_per_tok", 1),
        ("glm4_moe_groups", "topk_group", 1),
        ("olmo3", "sliding_window", 0),
        ("exaone4", "sliding_window", None),
        ("ministral3", "sliding_window", -1),
        ("minimax_m2", "router_jitter_noise", 0.1),
        ("gpt_oss", "swiglu_alpha", 1.5),
        ("gpt_oss", "swiglu_limit", 0.0),
        ("deepseek_v3", "num_key_value_heads", 2),
        ("deepseek_v3", "topk_group", 1),
        ("deepseek_v3", "norm_topk_prob", False),
        ("granite", "hidden_act", "relu"),
        ("granitemoe", "hidden_act", "gelu_pytorch_tanh"),
        ("granitemoe", "num_experts_per_tok", 1),
        ("starcoder2", "sliding_window", 0),
        ("starcoder2", "hidden_act", "gelu"),
    ],
)
def test_what_cannot_be_expressed_is_named(tmp_path: Path, name: str, field: str, value: object) -> None:
    MODELS[name].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    load_hf_config(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    wanted = f"{field} is not supported with the value {value!r} in a model of the architecture "
    wanted += f"{MODELS[name].model_type!r}. [A-Z].*"
    with pytest.raises(ConfigError, match=wanted):
        load_hf_config(tmp_path)


def test_a_language_model_that_transformers_knows_within_a_whole_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_vision.configs()["qwen2_5_vl"].text_config.to_dict()))
    with pytest.raises(ConfigError, match="a qwen2_5_vl_text is the language model of qwen2_5_vl, and transformers"):
        load_hf_config(tmp_path)


def test_what_an_older_transformers_knows_of_gpt_oss_is_enough() -> None:
    """transformers 5.8 has no fields for the activation: its experts have 1.702 and 7, as is published."""
    keys = MODELS["gpt_oss_plain"].to_dict()
    hf = SimpleNamespace(**{name: value for name, value in keys.items() if not name.startswith("swiglu")})
    family = families.family_of(hf)
    assert family.unsupported(hf) == {}
    assert family.fields(hf)["activation_func_clamp_value"] == 7.0


def theirs(config: PretrainedConfig, length: int) -> torch.Tensor:
    """Return transformers' cosines and sines `[length, r / 2]` each, side by side, of a document of some length."""
    rotary, positions = AutoModelForCausalLM.from_config(config).model.rotary_emb, torch.arange(length)[None]
    kinds = [{}]
    if isinstance(rotary.rope_type, dict):
        kinds = [{"layer_type": kind} for kind in sorted(rotary.rope_type)]
    tables = []
    for kind in kinds:
        cos, sin = rotary(torch.zeros(1), positions, **kind)
        half = cos.shape[-1] // (1 if config.model_type == "gpt_oss" else 2)  # which has each angle once
        tables.append(torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1))
    return torch.stack(tables)


@pytest.mark.parametrize("keeps_kinds", [False, True])
def test_what_olmo3_says_of_full_attention_is_not_taken_for_all_layers(keeps_kinds: bool) -> None:
    """transformers 5.8 keeps an older configuration's parameters as they are, and adds a default to newer ones'."""
    right, old = copy.deepcopy(MODELS["olmo3"]), copy.deepcopy(MODELS["olmo3"])
    kinds = {kind: right.rope_parameters[kind] for kind in ("full_attention", "sliding_attention")}
    kinds["sliding_attention"] = {"rope_type": "default", "rope_theta": kinds["full_attention"]["rope_theta"]}
    right.rope_parameters = kinds
    old.rope_parameters = {**kinds, **kinds["sliding_attention"]} if keeps_kinds else kinds["full_attention"]
    rows = torch.arange(16), torch.full((16,), 16)
    ours, expected = (RotaryEmbedding(each, dimensions_of(each).head_channels) for each in (old, right))
    assert torch.equal(ours.table(*rows), expected.table(*rows))
    assert ours.tables_of_layers == expected.tables_of_layers == (1, 1, 1, 0)
    assert unsupported_fields(old) == {}


@cases
def test_rotary_embedding_is_transformers(name: str) -> None:
    """Two documents in a row; with longrope the first, of 16 tokens, has the short factors, the second the long."""
    config = MODELS[name]
    tiny_hf.skip_where_wrong(config)
    positions = torch.cat([torch.arange(16), torch.arange(17)])
    lengths = torch.tensor([16] * 16 + [17] * 17)
    rotary = RotaryEmbedding(config, dimensions_of(config).head_channels)
    table = rotary.table(positions, lengths)
    expected = torch.cat([theirs(config, 16), theirs(config, 17)], dim=1)
    assert table.dtype == torch.float32 and table.shape[-3:-1] == (1, 1)
    if families.family_of(config).rotary_scales_queries:
        table = table[0]  # that of keys; the other has factors
    torch.testing.assert_close(table.view(expected.shape), expected, rtol=0, atol=1e-6)
    tables = rotary.tables_of_layers
    assert (tables is None) == (len(expected) == 1)
    if tables is not None:
        kinds = sorted(config.rope_parameters)
        assert [kinds[table] for table in tables] == config.layer_types
    if "longrope" in name:
        assert not torch.allclose(table[1], table[17])


def test_factors_of_queries_by_hand() -> None:
    """1 + beta log(1 + floor(position / length)), of queries only."""
    config = MODELS["ministral3_window"]
    table = RotaryEmbedding(config, 8).table(torch.tensor([0, 4, 5, 14]), torch.tensor([15] * 4))
    factors = torch.tensor([1.0, 1.0, 1 + 0.2 * math.log(2), 1 + 0.2 * math.log(3)])
    torch.testing.assert_close(table[1], table[0] * factors[:, None, None, None])
    expected = theirs(config, 15)[0][[0, 4, 5, 14]]
    torch.testing.assert_close(table[0, :, 0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_factors_of_queries_have_to_be_said(tmp_path: Path, name: str) -> None:
    MODELS["ministral3"].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    keys = json.loads(file.read_text())
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 9,
    }
    keys["rope_parameters"] = rope
    file.write_text(json.dumps(keys))
    load_hf_config(tmp_path)
    del rope[name]
    file.write_text(json.dumps(keys))
    with pytest.raises(KTOError, match=name):
        load_hf_config(tmp_path)


def test_json_of_a_published_folder_is_read_without_defaults(tmp_path: Path) -> None:
    """Llama 3.1 8B's config.json, as published."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    sizes = sizes_of_folder(tmp_path)
    assert sizes is not None
    assert (sizes.num_layers, sizes.num_attention_heads, sizes.num_query_groups) == (32, 32, 8)
    assert sizes.num_experts == 0
