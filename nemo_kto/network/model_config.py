"""Megatron's configuration of a model, with what it has no fields for."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_kto.network.family import Delta, Latent


@dataclass
class ModelConfig(TransformerConfig):
    """What a model computes; a family sets the fields in which it differs from Llama.

    Attributes:
        attention_output_bias: Whether the projection after attention has a bias; `add_qkv_bias` is of those before it,
            `add_bias_linear` of the feed-forward part.
        norms_before: Whether attention and feed-forward part have a norm before them.
        norms_after: Whether they have one behind them, before their output is added to what went in.
        norms_of_all_heads: Whether queries and keys are normed over the channels of all heads together, rather than
            head by head (`qk_layernorm`).
        embedding_multiplier: What the embedding's vectors are multiplied with.
        embedding_multiplier_is_rounded: Whether the multiplier has the dtype of the parameters.
        residual_multiplier: What the outputs of attention and feed-forward part are multiplied with.
        logits_multiplier: What the products of hidden states and output layer are multiplied with.
        logits_cap: Largest logit after that, see `algorithms.logprobs.LogitShape`; None for no cap.
        latent: Sizes of latent attention, see `latent_attention.py`; None for the usual one.
        delta: The layers of linear attention, see `delta_net.py`; None for no such layer.
        attention_cap: Largest score of attention, see `algorithms.attention.Scoring`; None for no cap.
        rotary_scales_queries: Whether the rotary embedding has a table for keys and one for queries, with a factor.
        images_see_themselves: Whether tokens of one image see each other in both directions.
        rotary_tables: Which of the tables of its rotary embedding each layer takes, see `RotaryEmbedding`; None where
            there is one.
    """

    attention_output_bias: bool = False
    norms_before: bool = True
    norms_after: bool = False
    norms_of_all_heads: bool = False
    embedding_multiplier: float = 1.0
    embedding_multiplier_is_rounded: bool = False
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_cap: float | None = None
    latent: Latent | None = None
    delta: Delta | None = None
    attention_cap: float | None = None
    rotary_scales_queries: bool = False
    images_see_themselves: bool = False
    rotary_tables: tuple[int, ...] | None = None
