"""Tiny random Hugging Face models of every supported family, transformers' logits for them, and ours."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from packaging.version import Version
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from nemo_kto.network.attention import DocumentParams
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.runtime import parallel, row_shapes
from tests.integration.assets import TINY_SIZES

VOCAB_SIZE = 131
DOCUMENT_LENGTHS = (9, 1, 24, 40)  # 74 tokens: two ranks can divide them

SIZES: dict[str, Any] = {**TINY_SIZES, "vocab_size": VOCAB_SIZE}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# frequencies that matter within 40 tokens are scaled, with factors Megatron's own option cannot express
_LLAMA3_OTHER = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 3.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 6.5,
}
# documents of up to 16 tokens have the short factors, longer ones the long
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 1.7, 2.9, 4.5],
    "original_max_position_embeddings": 16,
}
# cosines and sines have a factor, here 1.14
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN_EXACT = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.3, "truncate": False, "beta_fast": 4.0, "beta_slow": 0.5}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
_PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
_NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 2}  # else beyond these
_GRANITE = {
    "embedding_multiplier": 7.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
_GLM4_EXPERTS: dict[str, Any] = {
    **_NO_TOKENS,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
_GEMMA: dict[str, Any] = {**_NO_TOKENS, "head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 6}
_TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
}
_LATENT: dict[str, Any] = {
    **{**SIZES, "num_key_value_heads": 4},
    **{**_NO_TOKENS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
}
_GPT_OSS: dict[str, Any] = {**_NO_TOKENS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
_PHI3: dict[str, Any] = {"pad_token_id": None, "eos_token_id": 2}  # by default beyond these models' vocabulary
_QWEN3_EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_QWEN2_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
_DELTA: dict[str, Any] = {
    **_NO_TOKENS,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    # its outputs are small where a query and a document's first keys hardly agree, and the norm behind would make much
    # of their rounding
    "rms_norm_eps": 1e-2,
}


def families() -> dict[str, PretrainedConfig]:
    """Return a configuration for each family and each feature that changes what is computed."""
    return {
        "llama": LlamaConfig(**SIZES),
        "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "llama3_rope": LlamaConfig(**SIZES, rope_parameters={**_LLAMA3, "original_max_position_embeddings": 8192}),
        "llama3_rope_other": LlamaConfig(
            **SIZES, rope_parameters={**_LLAMA3_OTHER, "original_max_position_embeddings": 32}
        ),
        "linear_rope": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}),
        "yarn_rope": LlamaConfig(**SIZES, rope_parameters=_YARN),
        "yarn_rope_exact": Qwen3Config(**SIZES, head_dim=16, rope_parameters=_YARN_EXACT),
        "dynamic_rope": LlamaConfig(**SIZES, rope_parameters=_DYNAMIC),
        "proportional_rope": LlamaConfig(**SIZES, rope_parameters=_PROPORTIONAL),
        "llama_biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
        "llama_mlp_bias": LlamaConfig(**SIZES, mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
        "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=None),
        "mistral_yarn": MistralConfig(**SIZES, sliding_window=None, rope_parameters=_YARN),
        "ministral3": Ministral3Config(
            **SIZES,
            **_NO_TOKENS,
            head_dim=16,
            rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        ),
        "ministral3_window": Ministral3Config(
            **SIZES,
            **_NO_TOKENS,
            head_dim=8,
            sliding_window=7,
            tie_word_embeddings=True,
            rope_parameters={**_YARN, "original_max_position_embeddings": 5, "llama_4_scaling_beta": 0.2},
        ),
        "mistral_window": MistralConfig(**SIZES, sliding_window=7),
        "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
        "qwen2_window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
        "qwen3": Qwen3Config(**SIZES, head_dim=16),
        "qwen3_bias": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
        "qwen3_moe": Qwen3MoeConfig(**SIZES, **_QWEN3_EXPERTS, norm_topk_prob=True),
        "qwen3_moe_mixed": Qwen3MoeConfig(
            **SIZES, **_QWEN3_EXPERTS, norm_topk_prob=False, mlp_only_layers=[1], decoder_sparse_step=2
        ),
        "qwen3_moe_bias": Qwen3MoeConfig(**SIZES, **_QWEN3_EXPERTS, norm_topk_prob=True, attention_bias=True),
        "qwen3_moe_one": Qwen3MoeConfig(
            **SIZES, **{**_QWEN3_EXPERTS, "num_experts_per_tok": 1}, norm_topk_prob=False, mlp_only_layers=[0, 3]
        ),
        "qwen2_moe": Qwen2MoeConfig(**SIZES, **_QWEN2_EXPERTS, norm_topk_prob=False),
        "qwen2_moe_mixed": Qwen2MoeConfig(
            **SIZES,
            **_QWEN2_EXPERTS,
            norm_topk_prob=True,
            qkv_bias=False,
            mlp_only_layers=[2],
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=3,
        ),
        "granite": GraniteConfig(**SIZES, **_GRANITE, attention_bias=True),
        "granite_tied": GraniteConfig(
            **SIZES, **{**_GRANITE, "residual_multiplier": 1.0}, mlp_bias=True, tie_word_embeddings=True
        ),
        "granitemoe": GraniteMoeConfig(**SIZES, **_GRANITE, num_local_experts=4),
        "granitemoe_bias": GraniteMoeConfig(
            **SIZES, **_GRANITE, num_local_experts=6, num_experts_per_tok=3, attention_bias=True
        ),
        "starcoder2": Starcoder2Config(**SIZES, **_NO_TOKENS),
        "starcoder2_window": Starcoder2Config(
            **SIZES, **_NO_TOKENS, sliding_window=6, use_bias=False, tie_word_embeddings=False, hidden_act="silu"
        ),
        "starcoder2_no_bias": Starcoder2Config(**SIZES, **_NO_TOKENS, use_bias=False, norm_epsilon=1e-3),
        "gemma2": Gemma2Config(**SIZES, **_GEMMA, attn_logit_softcapping=0.5, final_logit_softcapping=2.0),
        "gemma2_uncapped": Gemma2Config(
            **SIZES,
            **_GEMMA,
            layer_types=["full_attention"] * 4,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
        "gemma3_text": Gemma3TextConfig(
            **SIZES, **_GEMMA, layer_types=[*["sliding_attention"] * 3, "full_attention"], rope_parameters=_TWO_ROPES
        ),
        "gemma3_text_linear": Gemma3TextConfig(
            **SIZES,
            **_GEMMA,
            rope_parameters={
                **_TWO_ROPES,
                "full_attention": {"rope_type": "linear", "rope_theta": 2e3, "factor": 3.0},
            },
            layer_types=["full_attention", "sliding_attention"] * 2,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=0.5,
        ),
        "glm4": Glm4Config(**SIZES, **_NO_TOKENS, head_dim=16),
        "glm4_tied": Glm4Config(
            **SIZES,
            **_NO_TOKENS,
            head_dim=8,
            attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.75},
            tie_word_embeddings=True,
        ),
        "glm4_moe": Glm4MoeConfig(**SIZES, **_GLM4_EXPERTS, use_qk_norm=True, routed_scaling_factor=1.7),
        "glm4_moe_groups": Glm4MoeConfig(
            **SIZES,
            **{**_GLM4_EXPERTS, "num_experts_per_tok": 4, "n_routed_experts": 8, "n_shared_experts": 2},
            attention_bias=True,
            n_group=4,
            topk_group=2,
        ),
        "glm4_moe_lite": Glm4MoeLiteConfig(
            **_LATENT,
            mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
            rope_parameters={"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0},
        ),
        "deepseek_v3": DeepseekV3Config(
            **{**_LATENT, "num_experts_per_tok": 4, "n_routed_experts": 8, "n_shared_experts": 2},
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            num_mtp_layers=0,
            rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        ),
        "deepseek_v3_plain": DeepseekV3Config(  # as Moonlight; values are wider than queries
            **{**_LATENT, "q_lora_rank": None, "v_head_dim": 28},
            first_k_dense_replace=0,
            n_group=1,
            topk_group=1,
            num_mtp_layers=0,
            attention_bias=True,
            rope_interleave=False,
            tie_word_embeddings=True,
        ),
        "deepseek_v3_dense": DeepseekV3Config(
            **_LATENT, first_k_dense_replace=4, n_group=1, topk_group=1, num_mtp_layers=0, attention_bias=True
        ),
        "olmo2": Olmo2Config(**SIZES, **_NO_TOKENS, head_dim=16),
        "olmo2_bias": Olmo2Config(
            **{**SIZES, "num_key_value_heads": 4},
            **_NO_TOKENS,
            attention_bias=True,
            rope_parameters=_YARN,
            tie_word_embeddings=True,
        ),
        "olmo3": Olmo3Config(
            **SIZES,
            **_NO_TOKENS,
            sliding_window=6,
            rope_parameters={**_TWO_ROPES, "full_attention": {**_YARN, "attention_factor": 1.2}},
        ),
        "olmo3_pattern": Olmo3Config(
            **SIZES,
            **_NO_TOKENS,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention"] * 2,
            rope_parameters={**_TWO_ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 1e5}},
        ),
        "exaone4": Exaone4Config(**SIZES, **_NO_TOKENS, head_dim=16, sliding_window=6),
        "exaone4_full": Exaone4Config(  # as the small one: then all layers have the rotary embedding
            **SIZES,
            **_NO_TOKENS,
            sliding_window=None,
            layer_types=["full_attention"] * 4,
            rope_parameters={**_LLAMA3_OTHER, "original_max_position_embeddings": 32},
            tie_word_embeddings=True,
        ),
        "minimax_m2": MiniMaxM2Config(
            **SIZES,
            **_NO_TOKENS,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        "minimax_m2_more": MiniMaxM2Config(
            **SIZES, **_NO_TOKENS, head_dim=8, num_local_experts=6, num_experts_per_tok=3, tie_word_embeddings=True
        ),
        "gpt_oss": GptOssConfig(
            **SIZES,
            **_GPT_OSS,
            sliding_window=7,
            swiglu_limit=0.4,  # which a share of these models' channels exceeds
            rope_parameters={**_YARN, "truncate": False},
        ),
        "gpt_oss_plain": GptOssConfig(
            **SIZES,
            **{**_GPT_OSS, "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8},
            layer_types=[*["full_attention"] * 2, "sliding_attention", "full_attention"],
            sliding_window=5,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "qwen3_next": Qwen3NextConfig(
            **SIZES,
            **_DELTA,
            **_QWEN2_EXPERTS,
            norm_topk_prob=True,
            layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        ),
        "qwen3_next_mixed": Qwen3NextConfig(
            **SIZES,
            **{**_DELTA, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 2, "head_dim": 32},
            **_QWEN2_EXPERTS,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            layer_types=["full_attention", "linear_attention"] * 2,
            attention_bias=True,
            rope_parameters={**_YARN, "partial_rotary_factor": 0.5},
            tie_word_embeddings=True,
        ),
        "qwen3_5_moe_text": Qwen3_5MoeTextConfig(
            **{key: size for key, size in SIZES.items() if key != "intermediate_size"},
            **_DELTA,
            **_QWEN2_EXPERTS,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        "qwen3_5_text": Qwen3_5TextConfig(**SIZES, **_DELTA),
        "qwen3_5_text_tied": Qwen3_5TextConfig(
            **SIZES,
            **{**_DELTA, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3},
            layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        "phi3": Phi3Config(**SIZES, **_PHI3, sliding_window=7),
        "phi3_partial": Phi3Config(
            **SIZES, **_PHI3, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        "phi3_longrope": Phi3Config(**SIZES, **_PHI3, rope_parameters=_LONGROPE, original_max_position_embeddings=16),
        "phi3_longrope_partial": Phi3Config(
            **SIZES,
            **_PHI3,
            rope_parameters={
                **_LONGROPE,
                "short_factor": [1.0, 1.2, 1.4],
                "long_factor": [1.0, 2.1, 3.3],
                "partial_rotary_factor": 0.75,
            },
            original_max_position_embeddings=16,
            tie_word_embeddings=True,
        ),
        "smollm3": SmolLM3Config(**SIZES, pad_token_id=None, bos_token_id=None, eos_token_id=2),
        "smollm3_pattern": SmolLM3Config(
            **SIZES,
            no_rope_layers=[0, 1, 1, 0],
            use_sliding_window=True,
            sliding_window=7,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=2,
        ),
    }


def make_folder(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> Path:
    """Save a model of `config` with random weights, biases and norms included, and return its folder."""
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        biases = [(name, bias) for name, bias in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *biases]:
            centre = parameter.mean() if name.endswith("norm.weight") else 0.0  # one, or zero where one is added
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + centre)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def documents() -> list[torch.Tensor]:
    """Return token sequences of different lengths, one of a single token."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in DOCUMENT_LENGTHS]


def skip_where_wrong(model: PretrainedConfig | Path) -> None:
    """Skip a comparison with transformers where the installed version does something else than its later ones."""
    config = AutoConfig.from_pretrained(model) if isinstance(model, Path) else model
    if config.model_type == "olmo3":
        rope = config.rope_parameters
        if rope.get("rope_type", "default") != "default" or ("rope_type" in rope and "full_attention" in rope):
            pytest.skip("this transformers has one rotary embedding for all layers of OLMo 3")
    if config.model_type == "gpt_oss" and "swiglu_limit" not in inspect.signature(GptOssConfig).parameters:
        if getattr(config, "swiglu_limit", 7.0) != 7.0:
            pytest.skip("this transformers clamps gate and up of gpt-oss to 7, whatever config.json says")
    if getattr(config, "quantization_config", {}) is None and Version(transformers.__version__) < Version("5.9"):
        pytest.skip("this transformers loads no folder whose config.json says that there is no quantisation")


EXPERTS_TOGETHER = (
    *("deepseek_v3", "glm4_moe", "glm4_moe_lite", "minimax_m2", "mixtral", "qwen2_moe", "qwen3_5_moe_text"),
    *("qwen3_moe", "qwen3_next"),
)
"""Architectures whose experts transformers puts together when it loads them, also a model's that has none."""


def adapters_are_read(model_type: str) -> bool:
    """Return whether the installed PEFT reads adapters of an architecture beside the installed transformers."""
    return model_type not in EXPERTS_TOGETHER or Version(peft.__version__) >= Version("0.20")


@torch.no_grad()
def transformers_logits(folder: Path, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return transformers' logits `[T, vocab]` of `documents()`, each scored alone, by its plain attention."""
    skip_where_wrong(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return torch.cat([model(document[None]).logits[0] for document in documents()])


@torch.no_grad()
def packed_logits(model: KTOGPTModel) -> torch.Tensor | None:
    """Return our logits `[T, vocab]` of `documents()` as one packed row through all stages; None but on the last."""
    place = parallel.position()
    with rows_known([documents()], model):
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([documents()]),
            model=[model],
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    if not place.is_last_stage:
        return None
    hidden = outputs[0]
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    hidden = torch.cat(_gathered(hidden[:, 0], place.cp_group))
    logits = model.logit_shape.logits(hidden @ model.output_weight().T)
    return torch.cat(_gathered(logits, place.tp_group), dim=1)[:, : model.vocab_size]


def _gathered(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def rows_known(rows: Sequence[Sequence[torch.Tensor]], model: KTOGPTModel) -> AbstractContextManager[None]:
    """Return a context in which Megatron's schedule may run rows of documents through stages of one chunk each."""
    place, parts = (
        parallel.position(),
        model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1,
    )
    return row_shapes.known(
        [sum(map(len, row)) // parts for row in rows],
        hidden_size=model.config.hidden_size,
        stages=place.pp_group.size(),
        chunks=1,
        is_first=place.is_first_stage,
        is_last=place.is_last_stage,
    )


def packed_params(lengths: Sequence[int], device: torch.device | str = "cpu") -> DocumentParams:
    """Return Megatron's description of a row of documents."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = max(lengths)
    return DocumentParams(
        lengths=tuple(lengths),
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _forward_step(rows: Any, model: Any) -> tuple[torch.Tensor, Any]:
    row, device = next(rows), next(model.parameters()).device
    positions = torch.cat([torch.arange(len(document)) for document in row])
    place = parallel.position()
    tokens, positions = (part.chunk(place.cp_group.size())[place.cp_rank] for part in (torch.cat(row), positions))
    hidden = model(
        input_ids=tokens[None].to(device),
        position_ids=positions[None].to(device),
        attention_mask=None,
        packed_seq_params=packed_params([len(document) for document in row], device),
    )
    return hidden, _keep


def _keep(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_zeros(()), hidden


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, read by safetensors itself."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    files = set(json.loads(index.read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
