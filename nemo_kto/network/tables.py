"""The parts that families make their tables of weights of; the names are those of Llama unless an argument says so.

Tensor legend: `h` hidden size, `f` feed-forward size, `a` query heads, `g` key/value heads, `d` channels of a head,
`v` vocabulary, `e` experts, `m` feed-forward size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_kto.network.family import Dimensions
from nemo_kto.network.weight_rules import FusedQKV, PaddedVocab, Piece, Rule, stacked

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

_OURS = "decoder.layers.{layer}."
_THEIRS = "model.layers.{layer}."


def outer(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the rules of what is outside the layers: embedding, final norm, output layer."""
    h, vocabulary = sizes.hidden, PaddedVocab(sizes.vocabulary)
    output = Piece(OUTPUT, (sizes.vocabulary, h))
    embedding = Piece(EMBEDDING, (sizes.vocabulary, h), elsewhere=(output,) if sizes.tied else ())

    yield Rule("embedding.word_embeddings.weight", (embedding,), vocabulary)
    yield Rule("decoder.final_layernorm.weight", (Piece("model.norm.weight", (h,)),))
    if not sizes.tied:
        yield Rule("output_layer.weight", (output,), vocabulary)


def attention(
    sizes: Dimensions, *, bias: bool = False, head_norms: bool = False, fused: str | None = None
) -> Iterator[Rule]:
    """Yield the rules of each layer's attention, with the norm before it.

    Args:
        sizes: Of the model.
        bias: Whether queries, keys and values have a bias.
        head_norms: Whether each head's queries and keys are normed.
        fused: Name of the one projection that returns queries, keys and values, in this order; None where there are
            three, `q_proj`, `k_proj` and `v_proj`.
    """
    h, d = sizes.hidden, sizes.head_channels
    queries, keys = sizes.heads * d, sizes.groups * d
    layout, layers = FusedQKV(sizes.heads // sizes.groups, d), range(sizes.layers)
    ours, theirs = _OURS + "self_attention.", _THEIRS + "self_attn."

    def projection(suffix: str, *columns: int) -> tuple[Piece, ...]:
        shapes = [(rows, *columns) for rows in (queries, keys, keys)]
        if fused is not None:
            return stacked(f"{theirs}{fused}.{suffix}", *shapes)
        return tuple(Piece(f"{theirs}{part}_proj.{suffix}", shape) for part, shape in zip("qkv", shapes, strict=True))

    yield _one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", layers, h)
    yield Rule(ours + "linear_qkv.weight", projection("weight", h), layout, layers)
    yield _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", layers, h, queries)
    if bias:
        yield Rule(ours + "linear_qkv.bias", projection("bias"), layout, layers)
    if head_norms:
        yield _one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", layers, d)
        yield _one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", layers, d)


def feed_forward(sizes: Dimensions, *, fused: str | None = None) -> Iterator[Rule]:
    """Yield the rules of the gated feed-forward part of each dense layer, with the norm before it.

    Args:
        sizes: Of the model.
        fused: Name of the one projection that returns gate and up, in this order; None where there are two,
            `gate_proj` and `up_proj`.
    """
    h, f, layers = sizes.hidden, sizes.feed_forward, sizes.dense_layers
    if not layers:
        return
    gate, up = Piece(f"{_THEIRS}mlp.gate_proj.weight", (f, h)), Piece(f"{_THEIRS}mlp.up_proj.weight", (f, h))
    if fused is not None:
        gate, up = stacked(f"{_THEIRS}mlp.{fused}.weight", (f, h), (f, h))
    yield _one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", layers, h)
    yield Rule(_OURS + "mlp.linear_fc1.weight_w", (gate,), layers=layers)
    yield Rule(_OURS + "mlp.linear_fc1.weight_v", (up,), layers=layers)
    yield _one("mlp.linear_fc2.weight", "mlp.down_proj.weight", layers, h, f)


def experts(sizes: Dimensions, *, block: str, gate: str, up: str, down: str) -> Iterator[Rule]:
    """Yield the rules of the router and the experts of each layer that has some, with the norm before them.

    transformers 5 calls the block `mlp` in every family, and keeps each layer's experts in two tensors, in which it
    saves them too, if told so.

    Args:
        sizes: Of the model.
        block: Name of the mixture in a layer.
        gate: Name of an expert's gate projection.
        up: Name of its up projection.
        down: Name of its down projection.
    """
    mixture = sizes.mixture
    if mixture is None:
        return
    h, m, e, layers = sizes.hidden, mixture.feed_forward, mixture.experts, mixture.sparse_layers
    ours, blocks = _OURS + "mlp.experts.experts.{expert}.", list(dict.fromkeys([block, "mlp"]))
    yield _one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", layers, h)
    routers = [Piece(f"{_THEIRS}{place}.gate.weight", (e, h)) for place in blocks]
    yield Rule(_OURS + "mlp.router.weight", (_anywhere(*routers),), layers=layers)
    for key, name, fused, shapes, part in (
        ("linear_fc1.weight_w", gate, "gate_up_proj", ((m, h), (m, h)), 0),
        ("linear_fc1.weight_v", up, "gate_up_proj", ((m, h), (m, h)), 1),
        ("linear_fc2.weight", down, "down_proj", ((h, m),), 0),
    ):
        single = [Piece(f"{_THEIRS}{place}.experts.{{expert}}.{name}.weight", shapes[part]) for place in blocks]
        all_in_one = [stacked(f"{_THEIRS}{place}.experts.{fused}", *shapes)[part] for place in blocks]
        places = [*single, *(replace(piece, stacked=e) for piece in all_in_one)]
        yield Rule(ours + key, (_anywhere(*places),), layers=layers, experts=e)


def _anywhere(first: Piece, *others: Piece) -> Piece:
    """Return the first of the places that a piece may be at; it knows the others."""
    return replace(first, elsewhere=others)


def _one(key: str, name: str, layers: range | tuple[int, ...], *shape: int) -> Rule:
    return Rule(_OURS + key, (Piece(_THEIRS + name, shape),), layers=layers)
