"""Configurations of published models that tests plan for, beside those of `published_shapes.py`, from config.json."""

from __future__ import annotations

from transformers import GptOssConfig, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from tests.network.published_shapes import PUBLISHED, experts, sizes

LLAMA_8B = LlamaConfig(**sizes(4096, 14336, 32, (32, 8), 128256))
LLAMA_70B = PUBLISHED["llama"].config("llama")
QWEN25_05B = Qwen2Config(**sizes(896, 4864, 24, (14, 2), 151936, tie_word_embeddings=True))
QWEN3_32B = PUBLISHED["qwen3"].config("qwen3")
QWEN3_30B = PUBLISHED["qwen3_moe"].config("qwen3_moe")
QWEN3_235B = Qwen3MoeConfig(**sizes(4096, 12288, 94, (64, 4), 151936, head_dim=128, **experts(128, 8, 1536)))
GPT_OSS_120B = GptOssConfig(
    **sizes(2880, 2880, 36, (64, 8), 201088, head_dim=64, num_local_experts=128, num_experts_per_tok=4)
)
