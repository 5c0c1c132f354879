"""A tiny model, tokenizer and feedback files, and one training run on them, for tests across layers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
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
    PreTrainedTokenizerFast,
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

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from nemo_kto.config.schema import KTOConfig

WORDS = "red green blue sea sky tree house dog cat sun moon star rain snow wind fire stone river road hill".split()
GLOBAL_BATCH_SIZE = 8
TINY_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "head_dim": 8,
}
SHARED: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
WIDE: dict[str, Any] = {  # blocks of 64 input channels, also of half a layer
    **{"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.08},
}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.8,
}

GLM4_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "use_qk_norm": True,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
}

LATENT: dict[str, Any] = {
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_group": 1, "topk_group": 1},
}

DELTA: dict[str, Any] = {  # linear attention, but for one layer
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"head_dim": 16, "layer_types": [*["linear_attention"] * 2, "full_attention", "linear_attention"]},
    # its outputs are small where a query and a document's first keys hardly agree, and the norm behind would make much
    # of their rounding
    "rms_norm_eps": 1e-2,
}

# the shorter documents of the feedback have the short factors, the longer ones the long
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.0, 2.1, 3.7],
    "original_max_position_embeddings": 8,
}
# cosines and sines have a factor; the longer documents reach positions that are new to the embedding
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e2, "factor": 8.0, "original_max_position_embeddings": 8}
_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}  # not beyond the vocabulary
GEMMA: dict[str, Any] = {**_TOKENS, "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 4}
KINDS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "ministral3": (
        Ministral3Config,
        {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}, **_TOKENS},
    ),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": 4}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "experts": (Qwen3MoeConfig, EXPERTS),  # three sparse layers and a dense one
    "fused": (Phi3Config, {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, **_TOKENS}),
    "wide": (LlamaConfig, WIDE),
    "wide_experts": (Qwen3MoeConfig, {**EXPERTS, **WIDE, "moe_intermediate_size": 128, "head_dim": 32}),
    "shared": (Qwen2MoeConfig, {**SHARED, "mlp_only_layers": [1]}),
    "granite": (GraniteConfig, {**GRANITE, **_TOKENS}),
    "granitemoe": (GraniteMoeConfig, {**GRANITE, **_TOKENS, "num_local_experts": 4}),
    "starcoder2": (Starcoder2Config, {"sliding_window": 6, **_TOKENS}),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0}),
    "gemma3": (Gemma3TextConfig, {**GEMMA, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    "glm4": (Glm4Config, {"head_dim": 8, **_TOKENS}),
    "glm4_moe": (Glm4MoeConfig, {**GLM4_EXPERTS, **_TOKENS}),  # routers with biases of their own
    "olmo2": (Olmo2Config, {"head_dim": 16, **_TOKENS}),
    "olmo3": (Olmo3Config, {"sliding_window": 4, **_TOKENS}),
    "exaone4": (Exaone4Config, {"head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2, **_TOKENS}),
    "minimax_m2": (MiniMaxM2Config, {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_TOKENS}),
    "deepseek_v3": (  # latent attention, scores with a factor
        DeepseekV3Config,
        {
            **{**LATENT, "first_k_dense_replace": 1, "num_mtp_layers": 0},
            **{"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, **_TOKENS},
        },
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig, {**LATENT, "q_lora_rank": None, **_TOKENS}),
    "gpt_oss": (  # sinks, windows, experts with biases, an activation that is clamped
        GptOssConfig,
        {
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 4},
            **{"swiglu_limit": 1.0, "rope_parameters": YARN, **_TOKENS},
        },
    ),
    "qwen3_next": (Qwen3NextConfig, {**DELTA, **SHARED, "mlp_only_layers": [1], **_TOKENS}),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, {**DELTA, **SHARED, **_TOKENS}),
    # as many heads as tensor- and context-parallel ranks together share
    "qwen3_5": (
        Qwen3_5TextConfig,
        {**DELTA, "linear_num_key_heads": 4, "linear_num_value_heads": 8, **_TOKENS},
    ),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "gaps": (SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0], **_TOKENS}),  # layers without rotary embedding
}
"""Kind of model -> its configuration."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word."""
    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def make_model_folder(
    folder: Path, *, seed: int = 0, kind: str = "llama", tied: bool = False, layers: int = 4, **other_sizes: Any
) -> Path:
    """Save a tiny model of a kind in `KINDS` with its tokenizer; with `tied` its output layer is the embedding."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        **TINY_SIZES,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": layers,
        # far from uniform predictions, so that numbers differ between samples, and experts are chosen by clear margins
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    config_class, own = KINDS[kind]
    config = config_class(**{**sizes, **own, **other_sizes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for vector in (*model.parameters(), *model.buffers()):
            # biases and the like, which would do nothing as they begin; of experts together they are matrices
            if vector.dim() <= 2 and not vector.any():
                vector.normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_feedback(file: Path, *, number: int, seed: int, labels: list[bool] | None = None) -> Path:
    """Write records of one to six prompt words and one to nine response words; the first has one of each."""
    generator = random.Random(seed)
    with file.open("w") as stream:
        for index in range(number):
            prompt = generator.choices(WORDS, k=1 if index == 0 else generator.randint(1, 6))
            response = generator.choices(WORDS, k=1 if index == 0 else generator.randint(1, 9))
            label = generator.random() < 0.5 if labels is None else labels[index % len(labels)]
            record = {"prompt": " ".join(prompt), "completion": " " + " ".join(response), "label": label}
            stream.write(json.dumps(record) + "\n")
    return file


def settings(root: Path, log_dir: Path, **changes: Any) -> dict[str, Any]:
    """Return dotted overrides of a short run on the assets in `root`; `changes` use `__` for dots."""
    values: dict[str, Any] = {
        "pretrained_checkpoint.restore_from_path": str(root / "hf"),
        "exp_manager.explicit_log_dir": str(log_dir),
        "trainer.accelerator": "cpu",
        "trainer.kto.max_steps": 10,
        "trainer.kto.max_epochs": 100,
        "trainer.kto.save_interval": 0,
        "model.global_batch_size": GLOBAL_BATCH_SIZE,
        "model.data.data_prefix.train": str(root / "train.jsonl"),
        "model.data.seq_length": 64,
        "model.optim.lr": 1e-3,
        # with a tiny eps Adam turns the rounding noise of near-zero gradients into whole steps
        "model.optim.eps": 1e-5,
        "model.optim.sched.warmup_steps": 0,
        "model.optim.sched.min_lr": 1e-4,
        "model.kto.ref_policy_kl_penalty": 0.5,
        "exp_manager.create_checkpoint_callback": False,
        "export.enabled": False,
        "report.enabled": False,
    }
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def configuration(overrides: dict[str, Any]) -> KTOConfig:
    """Return the configuration that dotted overrides make."""
    from omegaconf import OmegaConf

    from nemo_kto.config.compose import parse_config

    raw = OmegaConf.create({})
    for key, value in overrides.items():
        OmegaConf.update(raw, key, value)
    return parse_config(raw)


def train_on_rank(port: int, overrides: dict[str, Any], *, callbacks: Sequence[Callback] = ()) -> None:
    """Run the training command's inside on one rank of a pool's processes."""
    import torch.distributed as dist

    from nemo_kto.commands.train import train
    from nemo_kto.quiet import silence_loaded_packages

    silence_loaded_packages()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train(configuration({**overrides, "trainer.devices": world_size}), callbacks=callbacks)


def refusal_on_rank(port: int, overrides: dict[str, Any]) -> tuple[str, str]:
    """Return (kind, message) of the error that training is refused with on one rank of a pool."""
    from nemo_kto.errors import KTOError

    try:
        train_on_rank(port, overrides)
    except KTOError as error:
        return type(error).__name__, str(error)
    return "nothing", "the run was not refused"


def read_series(log_dir: Path) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value of a run's TensorBoard logs; a repeated step keeps its latest value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    series: dict[str, dict[int, float]] = {}
    for file in sorted(log_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            series.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return series


RELATIVE = ("train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected", "val/loss")
SMALL = ("train/kl", "train/rewards/chosen", "train/rewards/rejected", "train/rewards/margins", "val/kl")
"""Differences of nearly equal log-probs: their error is that of the log-probs, not of their own size."""


def without_times(series: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Return the series that are the same each time."""
    timed = ("train/step_time", "train/tokens_per_second", "train/mfu", "train/time/")
    return {name: values for name, values in series.items() if not name.startswith(timed)}


def assert_alike(actual: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]) -> None:
    """Compare two series as closely as float32 allows."""
    for name in RELATIVE:
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
    for name in SMALL:
        if name.endswith("/kl") and name not in expected and name not in actual:
            continue  # a loss without a KL set
        assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-5), name
