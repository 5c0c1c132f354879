"""The parts that families make their tables of weights of; the names are those of Llama unless an argument says so.

Tensor legend: `h` hidden size, `f` feed-forward size, `a` query heads, `g` key/value heads, `d` channels of a head,
`v` vocabulary, `e` experts, `m` feed-forward size of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nemo_kto.network.family import Dimensions, Mixture
from nemo_kto.network.weight_rules import ByHead, PaddedVocab, Piece, Rule, stacked

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

_OURS = "decoder.layers.{layer}."
_THEIRS = "model.layers.{layer}."
_EXPERT = _OURS + "mlp.experts.experts.{expert}."


def outer(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the rules of what is outside the layers: embedding, final norm, output layer."""
    h, vocabulary = sizes.hidden, PaddedVocab(sizes.vocabulary)
    output = Piece(OUTPUT, (sizes.vocabulary, h))
    embedding = Piece(EMBEDDING, (sizes.vocabulary, h), elsewhere=(output,) if sizes.tied else ())

    yield Rule("embedding.word_embeddings.weight", (embedding,), vocabulary)
    for suffix in ("weight", "bias") if sizes.norm_biases else ("weight",):
        yield Rule(f"decoder.final_layernorm.{suffix}", (Piece(f"model.norm.{suffix}", (h,)),))
    if not sizes.tied:
        yield Rule("output_layer.weight", (output,), vocabulary)


def attention(sizes: Dimensions, *, norm: str | None = "input_layernorm", fused: str | None = None) -> Iterator[Rule]:
    """Yield the rules of each layer's attention, with the norm before it.

    Args:
        sizes: Of the model.
        norm: Name of that norm in a layer; None where there is none.
        fused: Name of the one projection that returns queries, keys and values, in this order; None where there are
            three, `q_proj`, `k_proj` and `v_proj`.
    """
    h, d = sizes.hidden, sizes.head_channels
    queries, keys, layers = sizes.heads * d, sizes.groups * d, sizes.attention_layers
    # a head's gate is behind its query
    asked = 2 * queries if sizes.output_gates else queries
    layout = ByHead((asked // sizes.groups, d, d))
    ours, theirs = _OURS + "self_attention.", _THEIRS + "self_attn."

    def projection(suffix: str, *columns: int) -> tuple[Piece, ...]:
        shapes = [(rows, *columns) for rows in (asked, keys, keys)]
        if fused is not None:
            return stacked(f"{theirs}{fused}.{suffix}", *shapes)
        return tuple(Piece(f"{theirs}{part}_proj.{suffix}", shape) for part, shape in zip("qkv", shapes, strict=True))

    if norm is not None:
        yield from _norm("self_attention.linear_qkv.layer_norm_", norm, layers, h, biased=sizes.norm_biases)
    yield Rule(ours + "linear_qkv.weight", projection("weight", h), layout, layers)
    yield _one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", layers, h, queries)
    if sizes.biases.inputs:
        yield Rule(ours + "linear_qkv.bias", projection("bias"), layout, layers)
    if sizes.biases.output:
        yield _one("self_attention.linear_proj.bias", "self_attn.o_proj.bias", layers, h)
    if sizes.head_norms:
        of_queries, of_keys = (queries, keys) if sizes.norms_of_all_heads else (d, d)
        yield _one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", layers, of_queries)
        yield _one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", layers, of_keys)


def latent_attention(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the rules of each layer's latent attention, with the norm before it."""
    latent, layers, h = sizes.latent, range(sizes.layers), sizes.hidden
    assert latent is not None
    ours, theirs = "self_attention.", "self_attn."

    def linear(key: str, name: str, outputs: int, inputs: int, *, biased: bool = False) -> Iterator[Rule]:
        return _linear(f"{ours}{key}.", f"{theirs}{name}.", layers, outputs, inputs, biased=biased)

    yield from _norm("input_layernorm.", "input_layernorm", layers, h, biased=False)
    queries, compressed, biased = sizes.heads * latent.scored, latent.keys_and_values, sizes.biases.inputs
    if latent.queries is None:
        yield from linear("linear_q_proj", "q_proj", queries, h)
    else:
        yield from linear("linear_q_down_proj", "q_a_proj", latent.queries, h, biased=biased)
        yield _one(f"{ours}q_layernorm.weight", f"{theirs}q_a_layernorm.weight", layers, latent.queries)
        yield from linear("linear_q_up_proj", "q_b_proj", queries, latent.queries)
    yield from linear("linear_kv_down_proj", "kv_a_proj_with_mqa", compressed + latent.rotated, h, biased=biased)
    yield _one(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight", layers, compressed)
    yield from linear("linear_kv_up_proj", "kv_b_proj", sizes.heads * (latent.plain + latent.values), compressed)
    yield from linear("linear_proj", "o_proj", h, sizes.heads * latent.values, biased=sizes.biases.output)


def delta_net(sizes: Dimensions, *, by_head: bool) -> Iterator[Rule]:
    """Yield the rules of the layers of linear attention, with the norm before it.

    Args:
        sizes: Of the model.
        by_head: Whether the projections are two, which have the rows of each key head together, rather than four.
    """
    delta = sizes.delta
    if delta is None:
        return
    layers, h, place = delta.layers, sizes.hidden, _THEIRS + "linear_attn."
    keys, values, shared = delta.key_channels, delta.values_of_key_head, delta.value_heads // delta.key_heads

    def pieces(name: str, *rows: int, columns: tuple[int, ...] = (h,)) -> tuple[Piece, ...]:
        return stacked(f"{place}{name}.weight", *((delta.key_heads * each, *columns) for each in rows))

    rows: tuple[int, ...]
    if by_head:
        rows = (2 * keys + 2 * values, 2 * shared)
        inputs = (*pieces("in_proj_qkvz", rows[0]), *pieces("in_proj_ba", rows[1]))
    else:
        rows = (keys, keys, values, values, shared, shared)
        alone = zip("zba", rows[3:], strict=True)
        inputs = (*pieces("in_proj_qkv", *rows[:3]), *(pieces(f"in_proj_{name}", each)[0] for name, each in alone))
    yield from _norm("input_layernorm.", "input_layernorm", layers, h, biased=False)
    ours = _OURS + "self_attention."
    yield Rule(f"{ours}in_proj.weight", inputs, ByHead(rows), layers)
    seen = (keys, keys, values)
    yield Rule(f"{ours}conv_weight", pieces("conv1d", *seen, columns=(1, delta.window)), ByHead(seen), layers)
    for name in ("A_log", "dt_bias"):
        yield _one(f"self_attention.{name}", f"linear_attn.{name}", layers, delta.value_heads)
    yield _one("self_attention.gated_norm_weight", "linear_attn.norm.weight", layers, delta.value_channels)
    yield _one("self_attention.out_proj.weight", "linear_attn.out_proj.weight", layers, h, delta.key_heads * values)


def sinks(sizes: Dimensions) -> Iterator[Rule]:
    """Yield the rules of the sinks of each layer's attention."""
    yield _one("self_attention.core_attention.softmax_offset", "self_attn.sinks", range(sizes.layers), sizes.heads)


def feed_forward(
    sizes: Dimensions, *, norm: str | None = "post_attention_layernorm", fused: str | None = None
) -> Iterator[Rule]:
    """Yield the rules of the gated feed-forward part of each dense layer, with the norm before it.

    Args:
        sizes: Of the model.
        norm: Name of that norm in a layer; None where there is none.
        fused: Name of the one projection that returns gate and up, in this order; None where there are two,
            `gate_proj` and `up_proj`.
    """
    h, f, layers = sizes.hidden, sizes.feed_forward, sizes.dense_layers
    if not layers:
        return
    if norm is not None:
        yield from _norm("mlp.linear_fc1.layer_norm_", norm, layers, h, biased=sizes.norm_biases)
    for suffix, columns in (("weight", (h,)), ("bias", ())) if sizes.biases.feed_forward else (("weight", (h,)),):
        gate, up = (Piece(f"{_THEIRS}mlp.{part}_proj.{suffix}", (f, *columns)) for part in ("gate", "up"))
        if fused is not None:
            gate, up = stacked(f"{_THEIRS}mlp.{fused}.{suffix}", (f, *columns), (f, *columns))
        yield Rule(f"{_OURS}mlp.linear_fc1.{suffix}_w", (gate,), layers=layers)
        yield Rule(f"{_OURS}mlp.linear_fc1.{suffix}_v", (up,), layers=layers)
    yield from _linear("mlp.linear_fc2.", "mlp.down_proj.", layers, h, f, biased=sizes.biases.feed_forward)


def plain_feed_forward(
    sizes: Dimensions, *, up: str, down: str, norm: str = "post_attention_layernorm"
) -> Iterator[Rule]:
    """Yield the rules of a feed-forward part that is not gated, with the norm before it.

    Args:
        sizes: Of the model, all of whose layers are dense.
        up: Name of its first projection.
        down: Name of its second.
        norm: Name of the norm in a layer.
    """
    h, f, layers, biased = sizes.hidden, sizes.feed_forward, sizes.dense_layers, sizes.biases.feed_forward
    yield from _norm("mlp.linear_fc1.layer_norm_", norm, layers, h, biased=sizes.norm_biases)
    yield from _linear("mlp.linear_fc1.", f"mlp.{up}.", layers, f, h, biased=biased)
    yield from _linear("mlp.linear_fc2.", f"mlp.{down}.", layers, h, f, biased=biased)


def norms_after(sizes: Dimensions, *, attention: str, feed_forward: str) -> Iterator[Rule]:
    """Yield the rules of the norms behind attention and feed-forward part, by their names in a layer."""
    layers, h = range(sizes.layers), sizes.hidden
    yield from _norm("post_self_attn_layernorm.", attention, layers, h, biased=sizes.norm_biases)
    yield from _norm("post_mlp_layernorm.", feed_forward, layers, h, biased=sizes.norm_biases)


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What folders call the parts of a mixture of experts, in a layer; the names they are published with come first.

    Attributes:
        router: The router's weight.
        bias: The bias that experts are chosen with, if there is any.
        separate: (gate, up, down) of one expert, where each is a tensor; `{expert}` stands for its number.
        together: (gate and up, down) of all experts, where each is a tensor.
        shared: The shared expert, if there is any.
        alternating: Whether in those tensors input channels come before output channels, and channels of gate and up
            take turns. Biases, where there are any, are called like the weights.
    """

    router: Sequence[str]
    bias: Sequence[str] = ()
    separate: Sequence[tuple[str, str, str]] = ()
    together: Sequence[tuple[str, str]] = ()
    shared: str = ""
    alternating: bool = False

    @classmethod
    def of(cls, block: str, gate: str, up: str, down: str) -> ExpertNames:
        """Return the usual ones, which differ in the names of a `block` and of an expert's projections.

        transformers 5 calls the block `mlp` in every such family, and keeps each layer's experts in two tensors, in
        which it saves them too, if told so.
        """
        blocks = list(dict.fromkeys([block, "mlp"]))
        projections = [f"experts.{{expert}}.{name}.weight" for name in (gate, up, down)]
        return cls(
            router=[f"{place}.gate.weight" for place in blocks],
            bias=[f"{place}.gate.e_score_correction_bias" for place in blocks],
            separate=[tuple(f"{place}.{name}" for name in projections) for place in blocks],  # type: ignore[misc]
            together=[(f"{place}.experts.gate_up_proj", f"{place}.experts.down_proj") for place in blocks],
            shared=block,
        )


def experts(sizes: Dimensions, names: ExpertNames) -> Iterator[Rule]:
    """Yield the rules of each mixture: router, experts, shared expert, with the norm before them."""
    mixture = sizes.mixture
    if mixture is None:
        return
    h, m, e, layers = sizes.hidden, mixture.feed_forward, mixture.experts, mixture.sparse_layers
    yield _one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", layers, h)
    routers = [Piece(_THEIRS + name, (e, h)) for name in names.router]
    yield Rule(_OURS + "mlp.router.weight", (_anywhere(*routers),), layers=layers)
    if mixture.chosen_with_bias:
        biases = [Piece(_THEIRS + name, (e,), keeps_float32=True) for name in names.bias]
        yield Rule(_OURS + "mlp.router.expert_bias", (_anywhere(*biases),), layers=layers)
    for place, (key, shapes, part) in enumerate(
        (
            ("linear_fc1.weight_w", ((m, h), (m, h)), 0),
            ("linear_fc1.weight_v", ((m, h), (m, h)), 1),
            ("linear_fc2.weight", ((h, m),), 0),
        )
    ):
        single = [Piece(_THEIRS + each[place], shapes[part]) for each in names.separate]
        parts = _alternating if names.alternating else stacked
        all_in_one = [parts(_THEIRS + each[place // 2], *shapes)[part] for each in names.together]
        places = [*single, *(replace(piece, stacked=e) for piece in all_in_one)]
        yield Rule(_EXPERT + key, (_anywhere(*places),), layers=layers, experts=e)
    if mixture.biased:
        yield from _expert_biases(sizes.hidden, mixture, names)
    yield from _shared_expert(sizes.hidden, mixture, names.shared)


def _expert_biases(h: int, mixture: Mixture, names: ExpertNames) -> Iterator[Rule]:
    """Yield the rules of the biases of each mixture's router and experts, which are all together."""
    m, e, layers = mixture.feed_forward, mixture.experts, mixture.sparse_layers
    assert names.alternating, "no other family has biases"
    yield _one("mlp.router.bias", names.router[0].replace(".weight", ".bias"), layers, e)
    first, second = (f"{_THEIRS}{name}_bias" for name in names.together[0])
    gate, up = _alternating(first, (m,), (m,))
    for key, piece in (
        ("linear_fc1.bias_w", gate),
        ("linear_fc1.bias_v", up),
        ("linear_fc2.bias", Piece(second, (h,))),
    ):
        yield Rule(_EXPERT + key, (replace(piece, stacked=e),), layers=layers, experts=e)


def _alternating(name: str, *shapes: tuple[int, ...]) -> tuple[Piece, ...]:
    """Return the pieces of equal `shapes` whose rows take turns in the tensor `name`, as columns if they have any."""
    total = sum(shape[0] for shape in shapes)
    return tuple(
        Piece(name, shape, first, total, every=len(shapes), transposed=len(shape) > 1)
        for first, shape in enumerate(shapes)
    )


def _shared_expert(h: int, mixture: Mixture, block: str) -> Iterator[Rule]:
    """Yield the rules of the shared expert of each mixture, which is called `block` in a layer."""
    shared, layers = mixture.shared, mixture.sparse_layers
    if shared is None:
        return
    ours, theirs, f = "mlp.shared_experts.", f"{block}.{shared.name}.", shared.feed_forward
    yield _one(f"{ours}linear_fc1.weight_w", f"{theirs}gate_proj.weight", layers, f, h)
    yield _one(f"{ours}linear_fc1.weight_v", f"{theirs}up_proj.weight", layers, f, h)
    yield _one(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", layers, h, f)
    if shared.gate is not None:
        yield _one(f"{ours}gate_weight", f"{block}.{shared.gate}.weight", layers, 1, h)


def _anywhere(first: Piece, *others: Piece) -> Piece:
    """Return the first of the places that a piece may be at; it knows the others."""
    return replace(first, elsewhere=others)


def _one(key: str, name: str, layers: Sequence[int], *shape: int) -> Rule:
    return Rule(_OURS + key, (Piece(_THEIRS + name, shape),), layers=layers)


def _norm(key: str, name: str, layers: Sequence[int], channels: int, *, biased: bool) -> Iterator[Rule]:
    """Yield the rules of a norm: `key` and a suffix, and its `name` in a layer."""
    for suffix in ("weight", "bias") if biased else ("weight",):
        yield _one(key + suffix, f"{name}.{suffix}", layers, channels)


def _linear(key: str, name: str, layers: Sequence[int], outputs: int, inputs: int, *, biased: bool) -> Iterator[Rule]:
    """Yield the rules of a linear layer, whose names get suffixes."""
    yield _one(f"{key}weight", f"{name}weight", layers, outputs, inputs)
    if biased:
        yield _one(f"{key}bias", f"{name}bias", layers, outputs)
