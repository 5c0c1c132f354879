"""Configurations read, checked and made; the model's construction, its output weight and its random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch._dynamo.utils import counters as dynamo_counters
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3MoeConfig

from nemo_kto.errors import CheckpointError, ConfigError
from nemo_kto.network import megatron_config
from nemo_kto.network.attention import DocumentAttention
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import KTOGPTModel, build_gpt, initialize_weights
from nemo_kto.network.hf_config import hf_config_from_sizes, load_hf_config
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.norms import SequenceParallelRMSNorm
from nemo_kto.runtime import parallel
from nemo_kto.runtime.cpu_megatron import enable_cpu
from nemo_kto.runtime.layout import Layout, padded_vocabulary
from tests.network import tiny_hf

# a Llama 3.1 configuration as transformers 4 wrote it
OLD_STYLE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "vocab_size": 131,
}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """Write config.json and return its folder."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# reading and checking


def test_configuration_of_transformers_4_is_understood(tmp_path: Path) -> None:
    config = load_hf_config(write_config(tmp_path, OLD_STYLE))
    assert config.rope_parameters == {**OLD_STYLE["rope_scaling"], "rope_theta": 500000.0}
    assert config.dtype == torch.bfloat16


def test_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no config.json"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_broken_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(tmp_path / "config.json")):
        load_hf_config(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "deepseek_v2", "llama4", "no_such_model", None])
def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path, model_type: str | None) -> None:
    with pytest.raises(
        ConfigError, match=f"{model_type!r} is not supported.*llama, .*mistral, mixtral, .*phi3, qwen2, .*qwen3, "
    ):
        load_hf_config(write_config(tmp_path, {**OLD_STYLE, "model_type": model_type}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "axial", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_unsupported_feature_is_named(tmp_path: Path, field: str, value: object) -> None:
    config = {**OLD_STYLE, field: value}
    if field == "rope_parameters":
        del config["rope_scaling"], config["rope_theta"]
    with pytest.raises(ConfigError, match="partial_rotary|rope_type" if "rope" in field else field[:5]):
        load_hf_config(write_config(tmp_path, config))


SPARSE: dict[str, Any] = {
    **{key: value for key, value in OLD_STYLE.items() if not key.startswith("rope")},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
}


@pytest.mark.parametrize(
    ("field", "value"), [("router_jitter_noise", 0.1), ("num_experts_per_tok", 1), ("num_experts_per_tok", 5)]
)
def test_unsupported_feature_of_a_router_is_named(tmp_path: Path, field: str, value: object) -> None:
    load_hf_config(write_config(tmp_path, SPARSE))
    with pytest.raises(ConfigError, match=f"{field} is not supported with the value {value}"):
        load_hf_config(write_config(tmp_path, {**SPARSE, field: value}))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [True, True, True, True]),
        ({"mlp_only_layers": [0, 2]}, [False, True, False, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [False, True, False, False]),
        ({"num_experts": 0}, [False] * 4),
    ],
)
def test_which_layers_of_qwen3_moe_hold_experts(fields: dict[str, Any], expected: list[bool]) -> None:
    """As Qwen3MoeDecoderLayer of transformers chooses."""
    config = Qwen3MoeConfig(**tiny_hf.SIZES, **fields)
    sizes = dimensions_of(config)
    sparse = () if sizes.mixture is None else sizes.mixture.sparse_layers
    assert [layer in sparse for layer in range(4)] == expected
    assert sizes.divided.num_experts == (128 if any(expected) else 0)


def test_configuration_of_qwen3_moe_as_published_is_understood(tmp_path: Path) -> None:
    """Published folders say `num_experts`; transformers 5 writes `num_local_experts`."""
    published = {
        **{key: value for key, value in SPARSE.items() if key != "num_local_experts"},
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
        "mlp_only_layers": [],
    }
    config = load_hf_config(write_config(tmp_path, published))
    sizes = dimensions_of(config).divided
    assert (sizes.num_experts, sizes.expert_ffn_hidden_size) == (16, 24)


# making


def test_sizes_become_a_llama_configuration() -> None:
    config = hf_config_from_sizes(
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=None,
        vocab_size=99,
        max_position_embeddings=256,
        rotary_base=5e5,
        layernorm_epsilon=1e-6,
        share_embeddings_and_output_weights=True,
    )
    assert isinstance(config, LlamaConfig)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 48, 80)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 6, 8)
    assert (config.vocab_size, config.max_position_embeddings) == (99, 256)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (5e5, 1e-6)
    assert config.tie_word_embeddings is True
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ConfigError, match="hidden_size=50.*num_attention_heads=4"):
        hf_config_from_sizes(
            num_layers=1,
            hidden_size=50,
            ffn_hidden_size=8,
            num_attention_heads=4,
            num_query_groups=None,
            vocab_size=9,
            max_position_embeddings=8,
        )


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tensor", "padded"),
    [(1, 128, 1, 128), (128, 128, 2, 128), (129, 128, 2, 256), (49152, 128, 3, 49152), (10, 1, 1, 10)],
)
def test_vocabulary_is_padded_to_the_multiple(vocab_size: int, multiple: int, tensor: int, padded: int) -> None:
    assert padded_vocabulary(vocab_size, multiple=multiple, tensor_model_parallel_size=tensor) == padded


def test_vocabulary_must_be_divisible() -> None:
    with pytest.raises(ConfigError, match="131 tokens, padded to 256 .*=128, .*tensor_model_parallel_size=3"):
        padded_vocabulary(131, multiple=128, tensor_model_parallel_size=3)


# the model


def build(config: Any, **options: Any) -> KTOGPTModel:
    """Build the whole model in this process."""
    return build_gpt(config, Layout(world_size=1), **options)


def check_construction() -> None:
    """Everything about one rank's model, in one process."""
    enable_cpu()
    parallel.initialize(Layout(world_size=1), seed=1)
    sizes = tiny_hf.families()

    model = build(sizes["llama"])
    assert (model.vocab_size, model.padded_vocab_size) == (131, 256)
    assert model.output_weight() is model.output_layer.weight
    tied = build(sizes["llama_tied"], vocab_pad_multiple=1)
    assert tied.output_weight() is tied.embedding.word_embeddings.weight
    assert tied.output_weight().shape == (131, 32)
    assert build(sizes["llama"], params_dtype=torch.bfloat16).output_weight().dtype == torch.bfloat16

    # Hugging Face's window counts the token itself, Megatron's the tokens before it
    windows = [
        (MistralConfig(**tiny_hf.SIZES, sliding_window=7), [6, 6, 6, 6]),
        (MistralConfig(**tiny_hf.SIZES, sliding_window=None), [None] * 4),
        (Qwen2Config(**tiny_hf.SIZES, sliding_window=7), [None] * 4),
        (
            Qwen2Config(**tiny_hf.SIZES, sliding_window=7, use_sliding_window=True, max_window_layers=3),
            [None] * 3 + [6],
        ),
    ]
    for config, expected in windows:
        layers = build(config).decoder.layers
        assert [layer.self_attention.core_attention.window for layer in layers] == expected

    with pytest.raises(ConfigError, match="transformer_impl=fast is unknown. Use auto, local or transformer_engine"):
        build(sizes["llama"], transformer_impl="fast")
    with pytest.raises(ConfigError, match="transformer_impl=transformer_engine needs .*Use auto or local"):
        build(sizes["llama"], transformer_impl="transformer_engine")
    check_shard_marks(sizes["qwen2_tied"])
    check_shard_marks(sizes["qwen3_moe_mixed"])
    check_shard_marks(sizes["llama_biases"])
    check_shard_marks(sizes["qwen2_moe"])
    check_shard_marks(sizes["gemma3_text"])
    check_shard_marks(sizes["glm4_moe"])
    check_shard_marks(sizes["olmo3"])
    check_shard_marks(sizes["minimax_m2"])
    check_shard_marks(sizes["gpt_oss"])
    check_shard_marks(sizes["deepseek_v3"])
    check_shard_marks(sizes["deepseek_v3_plain"])
    check_random_weights(sizes["olmo2"])
    check_experts(sizes["qwen3_moe_mixed"], norms_chosen=False)
    check_experts(sizes["mixtral"], norms_chosen=True)
    check_random_weights(sizes["qwen2_tied"])
    check_random_weights(sizes["llama_biases"])
    check_random_weights(sizes["gemma3_text"], norm=0.0)  # one is added
    whole = kept_activations(sizes["llama"])
    selective = kept_activations(sizes["llama"], Recompute(granularity="selective"))
    assert selective < whole <= needed_activations(sizes["llama"], norms=0)
    assert kept_activations(sizes["qwen3"]) <= needed_activations(sizes["qwen3"], norms=1)
    kept_activations(sizes["mixtral"])
    # of the norms behind attention and feed-forward part what goes in, of all norms the sums of their weights and one;
    # another rotary table; of the three layers with windows the masks of the documents that are longer
    lengths = [length for length in tiny_hf.DOCUMENT_LENGTHS if length > 6]
    masks = 3 * sum(length * length for length in lengths) / sum(tiny_hf.DOCUMENT_LENGTHS)
    around = 4 * (2 * 32 + 2 + 3) + 16 + masks
    assert kept_activations(sizes["gemma3_text"]) <= needed_activations(sizes["gemma3_text"], norms=1) + around
    for name in ("llama", "olmo2"):  # with a norm before the first projection, and without
        assert_recomputed_layers_compute_alike(sizes[name])
    for name in ("gemma3_text", "granite"):
        assert_nothing_is_kept_without_gradients(sizes[name])
    assert not dynamo_counters["frames"], "a forward pass needs no compiler, with experts neither"


def assert_recomputed_layers_compute_alike(config: Any) -> None:
    """As in the forward-only passes, also where they are frozen beside adapters, and their input wants a gradient."""
    whole = Recompute(granularity="full", method="uniform", num_layers=1)
    model, generator = build(config, recompute=whole), torch.Generator().manual_seed(2)
    initialize_weights(model, seed=3, std=0.2)
    model.requires_grad_(False)
    rows = [torch.randint(0, tiny_hf.VOCAB_SIZE, (length,), generator=generator) for length in (9, 10, 11, 20)]

    def outputs() -> list[torch.Tensor]:
        return [
            model(row[None], torch.arange(len(row))[None], None, packed_seq_params=tiny_hf.packed_params([len(row)]))
            for row in rows
        ]

    with torch.no_grad():
        reference = outputs()
    model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    assert all(map(torch.equal, outputs(), reference))


def assert_nothing_is_kept_without_gradients(config: Any) -> None:
    """Megatron adds up residual streams with gradients in any case."""
    model, tokens = build(config), torch.cat(tiny_hf.documents())
    described = tiny_hf.packed_params([len(tokens)])
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        hidden = model(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=described)
    assert not hidden.requires_grad


def kept_activations(config: Any, recompute: Recompute | None = None) -> float:
    """Return the floats for each token that a forward pass keeps for the backward pass."""
    model, tokens = build(config, recompute=recompute), tiny_hf.documents()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # which keeps the address from being given again
        return tensor

    lengths = [len(document) for document in tokens]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(
            input_ids=torch.cat(tokens)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            attention_mask=None,
            packed_seq_params=tiny_hf.packed_params(lengths),
        )
    return sum(storage.nbytes() // 4 for storage in kept.values()) / sum(lengths)


def needed_activations(config: Any, *, norms: int) -> int:
    """Return what the layers' matrix products, attention, norms and activations cannot do without, and a little more.

    Args:
        config: The model.
        norms: Whether queries and keys are normed.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    queries = heads * (getattr(config, "head_dim", None) or hidden // heads)
    keys = queries // heads * config.num_key_value_heads
    attention = 2 * queries + 2 * keys + heads  # queries, output, keys, values; attention's logarithm of sums
    products = 2 * hidden + queries + inner  # what goes into qkv, gate and up; output; down
    norm = 2 * hidden + 2 + norms * (queries + keys + heads + config.num_key_value_heads)
    rest = hidden + 1 + 1 + queries // heads  # the last norm, token ids, angles
    return int(config.num_hidden_layers * (attention + products + norm + 2 * inner) + rest + 8)


def check_shard_marks(config: Any) -> None:
    """Every tensor-parallel weight is marked, or the gradient norm would miss the other ranks' shards."""
    sizes = dimensions_of(config)
    for name, parameter in build(config).named_parameters():
        whole = ("linear_proj.bias", "linear_fc2.bias", "gate_weight", "down_proj.weight", "down_proj.bias")
        of_all_heads = name.endswith(("q_layernorm.weight", "k_layernorm.weight")) and sizes.norms_of_all_heads
        is_whole = ("norm" in name and not of_all_heads) or "router" in name or name.endswith(whole)
        is_whole &= ".experts." not in name  # their optimizer deals its weights to all ranks
        assert not (getattr(parameter, "sequence_parallel", False) and ".experts." in name), name
        assert getattr(parameter, "tensor_model_parallel", False) is not is_whole, name
        # every rank of the data-parallel group holds a copy, but of experts
        assert getattr(parameter, "allreduce", True) is (".experts." not in name), name
        if not is_whole:
            row_parallel = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert parameter.partition_dim == int(row_parallel), name


def check_experts(config: Any, *, norms_chosen: bool) -> None:
    """Every layer scores documents apart; sparse ones route in float32, without dropping tokens."""
    layers = build(config, moe_aux_loss_coeff=0.1).decoder.layers
    sparse = dimensions_of(config).divided.expert_layers
    assert tuple(layer.layer_number - 1 for layer in layers if isinstance(layer.mlp, MoELayer)) == sparse
    for layer in layers:
        assert isinstance(layer.self_attention.core_attention, DocumentAttention)
        assert isinstance(layer.pre_mlp_layernorm, SequenceParallelRMSNorm)
    router = layers[-1].mlp.router.config
    assert (router.moe_router_dtype, router.moe_expert_capacity_factor) == ("fp32", None)
    assert router.moe_router_pre_softmax is not norms_chosen
    assert (router.moe_router_load_balancing_type, router.moe_aux_loss_coeff) == ("aux_loss", 0.1)
    assert build(config).config.moe_router_load_balancing_type == "none"


def check_random_weights(config: Any, norm: float = 1.0) -> None:
    """Normal matrices of the given deviation, norms of this weight, biases and padding zero, all set by the seed."""
    model = build(config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialize_weights(model, seed=5, std=0.02)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, value in first.items():
        if name.endswith("bias"):
            assert (value == 0).all(), name
        elif value.dim() == 1:
            assert (value == norm).all(), name
        else:
            real = value[: model.vocab_size] if "embedding" in name or "output_layer" in name else value
            assert abs(real.std().item() - 0.02) < 0.002, name
            assert abs(real.mean().item()) < 0.002, name
    assert (first["embedding.word_embeddings.weight"][131:] == 0).all()
    matrices = [name for name, value in first.items() if value.dim() == 2]
    assert not torch.equal(
        first["decoder.layers.0.mlp.linear_fc2.weight"], first["decoder.layers.1.mlp.linear_fc2.weight"]
    )

    initialize_weights(model, seed=5, std=0.02)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())
    initialize_weights(model, seed=6, std=0.02)
    other = dict(model.named_parameters())
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_construction(run_ranks: Callable[..., None]) -> None:
    run_ranks(check_construction, 1)


@pytest.mark.parametrize(("cuda", "virtual", "batched"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_stages_exchange_in_batches_where_that_is_right(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, virtual: int, batched: bool
) -> None:
    """In a batch, interleaved stages take each other's activations for gradients, without an error; gloo has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert megatron_config._division(Layout(world_size=2, pipeline=2, virtual=virtual))["batch_p2p_comm"] is batched
