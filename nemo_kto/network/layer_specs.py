"""Which modules a transformer layer is made of: Transformer Engine's, or torch's kernels in Megatron's layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_kto.algorithms.pointwise import rms_norm
from nemo_kto.errors import ConfigError
from nemo_kto.network import moe
from nemo_kto.network.attention import DocumentAttention


class SeparateValueAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention whose values have memory of their own.

    They come as a part of what one projection returns for queries, keys and values. The rotary embedding makes the
    first two anew; values that are kept for the backward pass, by attention or by its recomputation, would then keep
    the memory of all three.
    """

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Return queries `[T, 1, a, d]`, keys and values `[T, 1, g, d]`."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return query, key, value.contiguous()


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron adds up its gradient over the ranks that divide the tokens.

    Megatron's own wrapper of torch's norms refuses sequence parallelism.

    Args:
        config: Megatron's configuration.
        hidden_size: Channels.
        eps: Added to the mean square.
        kwargs: What Megatron passes to every norm besides.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the normed `values`, `[..., hidden_size]`: on CUDA by torch's kernel, which a CPU has none of."""
        if values.is_cuda:
            return super().forward(values)
        assert self.eps is not None
        return rms_norm(values, self.weight, self.eps)


def block_spec(
    config: TransformerConfig,
    *,
    use_transformer_engine: bool,
    by_document: bool,
    chunk: int | None,
    unfused: bool = False,
) -> TransformerBlockSubmodules:
    """Return the layers of one chunk of a pipeline stage.

    Args:
        config: Megatron's configuration.
        use_transformer_engine: Whether layers come from Transformer Engine.
        by_document: Whether attention is `DocumentAttention`.
        chunk: Which one; None unless stages are interleaved.
        unfused: See `build_gpt`.
    """
    norm = SequenceParallelRMSNorm
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    last = first + get_num_layers_to_build(config, vp_stage=chunk)
    experts = [config.num_moe_experts if has_experts else None for has_experts in moe.pattern(config)[first:last]]
    layers = {
        number: _layer_spec(config, use_transformer_engine, number, unfused=unfused, by_document=by_document)
        for number in set(experts)
    }
    return TransformerBlockSubmodules(layer_specs=[layers[number] for number in experts], layer_norm=norm)


def _layer_spec(
    config: TransformerConfig,
    use_transformer_engine: bool,
    num_experts: int | None,
    *,
    unfused: bool,
    by_document: bool,
) -> ModuleSpec:
    """Return a layer; with `num_experts` one whose feed-forward part is a mixture of experts."""
    engine = None
    if use_transformer_engine:
        engine = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    if engine is not None and not unfused:
        layer = engine
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
        _replace_norms(layer)
        if num_experts:  # Transformer Engine's name: only its dense layers have the norm inside their first projection
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        if (
            engine is not None
        ):  # its linear layers have the norm inside; its attention and its experts are as good here
            layer.submodules.self_attention.submodules.core_attention = (
                engine.submodules.self_attention.submodules.core_attention
            )
            layer.submodules.mlp = engine.submodules.mlp if num_experts else layer.submodules.mlp
    if by_document:
        layer.submodules.self_attention.module = SeparateValueAttention
        layer.submodules.self_attention.submodules.core_attention = DocumentAttention
    return layer


def attends_by_document(config: TransformerConfig, use_transformer_engine: bool) -> bool:
    """Return whether attention is `DocumentAttention`.

    None of Transformer Engine's kernels takes packed rows in float32; its context parallelism wants another order of
    tokens.
    """
    return not use_transformer_engine or config.params_dtype == torch.float32 or config.context_parallel_size > 1


def _replace_norms(layer: ModuleSpec) -> None:
    """Put `SequenceParallelRMSNorm` where the local specification has torch's norms."""
    for submodules in (layer.submodules, layer.submodules.self_attention.submodules):
        for name, module in vars(submodules).items():
            if module is WrappedTorchNorm:
                setattr(submodules, name, SequenceParallelRMSNorm)


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
