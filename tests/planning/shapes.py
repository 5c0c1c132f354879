"""Configurations of published models, as far as memory and time depend on them, from their config.json."""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

_LLAMA3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
LLAMA_8B = LlamaConfig(
    **_LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_70B = LlamaConfig(
    **_LLAMA3, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)
QWEN25_05B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128}
QWEN3_32B = Qwen3Config(
    **_QWEN3,
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
)
_EXPERTS: dict[str, Any] = {**_QWEN3, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
QWEN3_30B = Qwen3MoeConfig(
    **_EXPERTS,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    moe_intermediate_size=768,
)
QWEN3_235B = Qwen3MoeConfig(
    **_EXPERTS,
    hidden_size=4096,
    num_hidden_layers=94,
    num_attention_heads=64,
    num_key_value_heads=4,
    moe_intermediate_size=1536,
)
GPT_OSS_120B = GptOssConfig(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=128,
    num_experts_per_tok=4,
    sliding_window=128,
)
