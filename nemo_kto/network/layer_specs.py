"""Which modules a transformer layer is made of: Transformer Engine's, or torch's kernels in Megatron's layers."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_kto.errors import ConfigError
from nemo_kto.network import moe
from nemo_kto.network.attention import DocumentAttention
from nemo_kto.network.delta_net import GatedDeltaNet
from nemo_kto.network.latent_attention import LatentAttention
from nemo_kto.network.layers import FamilyAttention, FamilyLayer
from nemo_kto.network.model_config import ModelConfig
from nemo_kto.network.norms import norm_of


def block_spec(
    config: ModelConfig,
    *,
    use_transformer_engine: bool,
    by_document: bool,
    chunk: int | None,
    unfused: bool = False,
    own_experts: bool = False,
) -> TransformerBlockSubmodules:
    """Return the layers of one chunk of a pipeline stage.

    Args:
        config: The model's configuration.
        use_transformer_engine: Whether layers come from Transformer Engine.
        by_document: Whether attention is `DocumentAttention`.
        chunk: Which one; None unless stages are interleaved.
        unfused: See `build_gpt`.
        own_experts: Build experts from Megatron's own linear layers too.
    """
    norm = norm_of(config)
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    last = first + get_num_layers_to_build(config, vp_stage=chunk)
    experts = [config.num_moe_experts if has_experts else None for has_experts in moe.pattern(config)]
    linear = () if config.delta is None else config.delta.layers
    kinds = [(experts[layer], layer in linear) for layer in range(first, last)]
    layers = {}
    for number, is_linear in set(kinds):
        layer = _layer_spec(
            config, use_transformer_engine, number, unfused=unfused, own_experts=own_experts, by_document=by_document
        )
        if is_linear:
            _make_linear(layer)
        layers[number, is_linear] = layer
    return TransformerBlockSubmodules(layer_specs=[layers[kind] for kind in kinds], layer_norm=norm)


def _make_linear(layer: ModuleSpec) -> None:
    """Put linear attention in the place of a layer's own, with the norm before it on its own."""
    layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet)
    del layer.submodules.sharded_state_dict_keys_map["input_layernorm."]


def _layer_spec(
    config: ModelConfig,
    use_transformer_engine: bool,
    num_experts: int | None,
    *,
    unfused: bool,
    own_experts: bool,
    by_document: bool,
) -> ModuleSpec:
    """Return a layer; with `num_experts` one whose feed-forward part is a mixture of experts."""
    engine = None
    if use_transformer_engine:
        engine = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    # Transformer Engine's linear layers have the norm inside that is before them
    fused = not unfused and config.norms_before and config.latent is None and config.delta is None
    if engine is not None and fused:
        layer = engine
    else:
        layer = _unfused_layer(config, num_experts, engine, own_experts=own_experts)
    attention = layer.submodules.self_attention
    if by_document:
        attention.submodules.core_attention = DocumentAttention
    attention.module = FamilyAttention
    if config.latent is None:
        attention.params = {**attention.params, "separate_values": by_document}
    else:
        attention.module = LatentAttention
        del layer.submodules.sharded_state_dict_keys_map["input_layernorm."]  # no layer that could have it inside
    if config.norms_after or config.residual_multiplier != 1.0:
        layer.module = FamilyLayer
    return layer


def _unfused_layer(
    config: ModelConfig, num_experts: int | None, engine: ModuleSpec | None, *, own_experts: bool
) -> ModuleSpec:
    """Return a layer of Megatron's own linear layers and torch's norms.

    Transformer Engine's attention and experts, where there is such an `engine`, are as good here; not so experts whose
    weights only Megatron's own layers can have.
    """
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    _set_norms(layer, config)
    if num_experts:  # Transformer Engine's name: only its dense layers have the norm inside their first projection
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    if engine is not None:
        attention, engines = (spec.submodules.self_attention.submodules for spec in (layer, engine))
        attention.core_attention = engines.core_attention
        if num_experts and not own_experts:
            layer.submodules.mlp = engine.submodules.mlp
    return layer


def attends_by_document(config: ModelConfig, use_transformer_engine: bool) -> bool:
    """Return whether attention is `DocumentAttention`; linear attention then gets the lengths of documents too.

    None of Transformer Engine's kernels takes packed rows in float32, or with sinks; its context parallelism wants
    another order of tokens; it has no caps. Latent attention has keys that all heads share.
    """
    return (
        not use_transformer_engine
        or config.params_dtype == torch.float32
        or config.context_parallel_size > 1
        or config.attention_cap is not None
        or config.softmax_type != "vanilla"
        or config.latent is not None
        or config.delta is not None
    )


def _set_norms(layer: ModuleSpec, config: ModelConfig) -> None:
    """Put the model's norms where the local specification has norms."""
    norm, attention = norm_of(config), layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm if config.norms_before else IdentityOp
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm


def check_transformer_impl(transformer_impl: str) -> bool:
    """Return whether `transformer_impl` (see `build_gpt`) means Transformer Engine here.

    Raises:
        ConfigError: It needs what this machine does not have, or is unknown.
    """
    available: bool = gpt_layer_specs.HAVE_TE and torch.cuda.is_available()
    if transformer_impl == "transformer_engine" and not available:
        missing = "a CUDA device" if gpt_layer_specs.HAVE_TE else "the package transformer_engine"
        raise ConfigError(f"model.transformer_impl=transformer_engine needs {missing}. Use auto or local.")
    if transformer_impl not in ("auto", "local", "transformer_engine"):
        raise ConfigError(
            f"model.transformer_impl={transformer_impl} is unknown. Use auto, local or transformer_engine."
        )
    return available and transformer_impl != "local"
