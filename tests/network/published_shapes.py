"""The shapes of published models, one of each family: what their config.json says of sizes, typed by hand.

Each comes with how many parameters its authors, or the file headers of its folder on the hub, say that it has; of a
model with images or with layers that guess tokens, those of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        model: Its name on the hub.
        parameters: How many it has: a number, or text such as `30.5` for billions, rounded or cut off.
        keys: The keys of its config.json that say sizes.
    """

    model: str
    parameters: int | str
    keys: dict[str, Any]

    def config(self, family: str) -> PretrainedConfig:
        """Return its configuration."""
        return AutoConfig.for_model(family, **{"pad_token_id": None, **self.keys})


def sizes(hidden: int, feed_forward: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any) -> Any:
    """Return the keys that nearly all have; `heads` are those of queries and of keys."""
    return {
        **{"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers},
        **{"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "vocab_size": vocabulary},
        **more,
    }


def experts(number: int, chosen: int, feed_forward: int, *, name: str = "num_experts", **more: Any) -> dict[str, Any]:
    """Return the keys of a mixture."""
    return {name: number, "num_experts_per_tok": chosen, "moe_intermediate_size": feed_forward, **more}


_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}

PUBLISHED: dict[str, Published] = {
    "deepseek_v3": Published(
        "deepseek-ai/DeepSeek-V3",
        "671",
        sizes(
            *(7168, 18432, 61, (128, 128), 129280),
            **experts(256, 8, 2048, name="n_routed_experts", n_shared_experts=1, first_k_dense_replace=3),
            **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            **{"v_head_dim": 128, "n_group": 8, "topk_group": 4, "tie_word_embeddings": False},
        ),
    ),
    "exaone4": Published(
        "LGAI-EXAONE/EXAONE-4.0-32B",
        "32.0",
        sizes(5120, 27392, 64, (40, 8), 102400, head_dim=128, sliding_window=4096),
    ),
    "gemma2": Published("google/gemma-2-27b", 27_227_128_320, sizes(4608, 36864, 46, (32, 16), 256000, head_dim=128)),
    "gemma3_text": Published(
        "google/gemma-3-27b-it",
        "27.0",
        sizes(5376, 21504, 62, (32, 16), 262208, head_dim=128, sliding_window=1024, query_pre_attn_scalar=168),
    ),
    "glm4": Published(
        "zai-org/GLM-4-32B-0414",
        "32.6",
        sizes(6144, 23040, 61, (48, 2), 151552, head_dim=128, attention_bias=False, tie_word_embeddings=False),
    ),
    "glm4_moe": Published(
        "zai-org/GLM-4.5-Air",
        "106",
        sizes(
            *(4096, 10944, 46, (96, 8), 151552),
            **experts(128, 8, 1408, name="n_routed_experts", n_shared_experts=1, first_k_dense_replace=1),
            **{"head_dim": 128, "attention_bias": True, "use_qk_norm": False, "tie_word_embeddings": False},
        ),
    ),
    "glm4_moe_lite": Published(
        "zai-org/GLM-4.7-Flash",
        "30",
        sizes(
            *(2048, 10240, 47, (20, 20), 154880),
            **experts(64, 4, 1536, name="n_routed_experts", n_shared_experts=1),
            **{"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
            **{"v_head_dim": 256, "tie_word_embeddings": False},
        ),
    ),
    "gpt_oss": Published(
        "openai/gpt-oss-20b",
        20_914_757_184,
        sizes(
            *(2880, 2880, 24, (64, 8), 201088),
            **{"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True},
        ),
    ),
    "granite": Published(
        "ibm-granite/granite-3.3-8b-instruct", "8.17", sizes(4096, 12800, 40, (32, 8), 49159, tie_word_embeddings=True)
    ),
    "granitemoe": Published(
        "ibm-granite/granite-3.1-3b-a800m-instruct",
        "3.3",
        sizes(1536, 512, 32, (24, 8), 49155, num_local_experts=40, num_experts_per_tok=8, tie_word_embeddings=True),
    ),
    "llama": Published(
        "meta-llama/Llama-3.1-70B", 70_553_706_496, sizes(8192, 28672, 80, (64, 8), 128256, tie_word_embeddings=False)
    ),
    "minimax_m2": Published(
        "MiniMaxAI/MiniMax-M2",
        "229",
        sizes(3072, 1536, 62, (48, 8), 200064, head_dim=128, num_local_experts=256, num_experts_per_tok=8),
    ),
    "ministral3": Published(
        "mistralai/Ministral-3-8B-Base-2512", "8.4", sizes(4096, 14336, 34, (32, 8), 131072, head_dim=128)
    ),
    "mistral": Published("mistralai/Mistral-7B-v0.3", 7_248_023_552, sizes(4096, 14336, 32, (32, 8), 32768)),
    "mixtral": Published(
        "mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, sizes(4096, 14336, 32, (32, 8), 32000, num_local_experts=8)
    ),
    "olmo2": Published("allenai/OLMo-2-1124-13B", "13.7", sizes(5120, 13824, 40, (40, 40), 100352)),
    "olmo3": Published("allenai/Olmo-3-1125-32B", "32.2", sizes(5120, 27648, 64, (40, 8), 100278)),
    "phi3": Published("microsoft/phi-4", 14_659_507_200, sizes(5120, 17920, 40, (40, 10), 100352)),
    "qwen2": Published("Qwen/Qwen2.5-72B", 72_706_203_648, sizes(8192, 29568, 80, (64, 8), 152064)),
    "qwen2_moe": Published(
        "Qwen/Qwen2-57B-A14B",
        "57.4",
        sizes(3584, 18944, 28, (28, 4), 151936, **experts(64, 8, 2560, shared_expert_intermediate_size=20480)),
    ),
    "qwen3": Published("Qwen/Qwen3-32B", 32_762_123_264, sizes(5120, 25600, 64, (64, 8), 151936, head_dim=128)),
    "qwen3_moe": Published(
        "Qwen/Qwen3-30B-A3B",
        30_532_122_624,
        sizes(2048, 6144, 48, (32, 4), 151936, head_dim=128, **experts(128, 8, 768)),
    ),
    "qwen3_5_moe_text": Published(
        "Qwen/Qwen3.5-35B-A3B",
        "35",
        {
            **{key: value for key, value in sizes(2048, 0, 40, (16, 2), 248320).items() if value},
            **experts(256, 8, 512, shared_expert_intermediate_size=512),
            **{**_DELTA, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
        },
    ),
    "qwen3_5_text": Published(
        "Qwen/Qwen3.5-27B",
        "27",
        sizes(
            *(5120, 17408, 64, (24, 4), 248320),
            **{**_DELTA, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 48},
        ),
    ),
    "qwen3_next": Published(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        "80",
        sizes(
            *(2048, 5120, 48, (16, 2), 151936),
            **experts(512, 10, 512, shared_expert_intermediate_size=512),
            **{**_DELTA, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
        ),
    ),
    "smollm3": Published(
        "HuggingFaceTB/SmolLM3-3B", 3_075_098_624, sizes(2048, 11008, 36, (16, 4), 128256, tie_word_embeddings=True)
    ),
    "starcoder2": Published(
        "bigcode/starcoder2-15b", 15_957_889_024, sizes(6144, 24576, 40, (48, 4), 49152, tie_word_embeddings=False)
    ),
}
"""Family -> one of its models."""
