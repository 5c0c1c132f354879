"""What is said of a family of models, in its file `families/<model_type>.py`.

A family says which of its configurations are supported, what its fields are to Megatron, and which of its tensors
become which. What it leaves out is as in Llama: RMS norms before attention and feed-forward part, SwiGLU, rotary
embedding over whole heads, biases where `attention_bias` and `mlp_bias` ask for them.

The files of families import no torch, Megatron or transformers at module level: a layout is judged before those are
loaded. `hf` is a model's configuration, transformers' or, until that is loaded, the plain keys of its config.json; a
key that config.json leaves out then raises an AttributeError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nemo_kto.network.weight_rules import Rule, within_whole
from nemo_kto.runtime.layout import ModelSizes

PART_OF = "part_of"
"""Field of a language model's configuration, which no file has: see `whole_of`."""

SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Llama's projections."""


@dataclass(frozen=True, kw_only=True)
class SharedExpert:
    """What every token goes through in a mixture, beside the experts it is routed to.

    Attributes:
        name: Hugging Face's name of it in a mixture.
        feed_forward: Its channels; of several that are stored as one, all together.
        gate: Hugging Face's name of the layer whose sigmoid its output is multiplied with; None for no such gate.
    """

    name: str
    feed_forward: int
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mixtures of experts in a model.

    Attributes:
        experts: Number of experts of each layer that has some.
        chosen: How many of them a token goes through.
        feed_forward: Channels inside an expert.
        sparse_layers: Numbers of the layers that have some, from 0.
        normalized: Whether the probabilities of the chosen experts are made to sum to one.
        shared: The shared expert of each such layer; None without any.
        scores: What makes probabilities of a router's logits: `softmax` over experts, or `sigmoid` of each.
        chosen_with_bias: Whether experts are chosen by their probability plus a bias of their own, which is a number
            that no gradient reaches.
        scale: What the probabilities of the chosen experts are multiplied with in the end.
        groups: Experts come in so many equal groups.
        chosen_groups: Only the experts of so many groups are eligible: of those whose best two are best together.
        biased: Whether routers and experts have biases as other linear layers have.
    """

    experts: int
    chosen: int
    feed_forward: int
    sparse_layers: tuple[int, ...]
    normalized: bool
    shared: SharedExpert | None = None
    scores: str = "softmax"
    chosen_with_bias: bool = False
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    biased: bool = False


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which linear layers outside mixtures of experts have a bias.

    Attributes:
        inputs: Those of attention that return queries, keys and values.
        output: The one behind attention.
        feed_forward: Those of the feed-forward part.
    """

    inputs: bool = False
    output: bool = False
    feed_forward: bool = False


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The sizes of multi-head latent attention (arXiv 2405.04434, section 2.1), in channels.

    Attributes:
        queries: What queries are compressed to; None where they are not.
        keys_and_values: What keys and values together are compressed to.
        plain: Of each head's queries and keys, without a position.
        rotated: Of each head's queries, and of the keys of all heads together, with the rotary embedding.
        values: Of each head's values.
        norm_epsilon: Epsilon of the norms of what is compressed.
    """

    queries: int | None
    keys_and_values: int
    plain: int
    rotated: int
    values: int
    norm_epsilon: float = 1e-6

    @property
    def scored(self) -> int:
        """Channels of a head's queries and keys."""
        return self.plain + self.rotated


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The layers of linear attention in a model, and its sizes, see `delta_net.py`.

    Attributes:
        layers: Their numbers, from 0.
        key_heads: Heads of queries and keys.
        value_heads: Heads of values, so many for each key head.
        key_channels: Channels of a query and of a key.
        value_channels: Channels of a value.
        window: Tokens that the convolution before it sees.
    """

    layers: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_channels: int
    value_channels: int
    window: int

    @property
    def values_of_key_head(self) -> int:
        """Channels of all values that belong to a key head."""
        return self.value_heads // self.key_heads * self.value_channels


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The sizes of a model, and which of the smaller parts it has.

    Attributes:
        layers: Transformer layers.
        hidden: Channels of the hidden states.
        feed_forward: Channels inside a dense feed-forward part.
        heads: Query heads.
        groups: Key/value heads.
        head_channels: Channels of a head; with latent attention those that the rotary embedding is of.
        vocabulary: Tokens, without padding.
        tied: Whether the output layer is the embedding.
        biases: Biases of linear layers.
        norm_biases: Whether norms have a bias: they are LayerNorms, not RMSNorms.
        head_norms: Whether queries and keys are normed.
        norms_of_all_heads: Whether over the channels of all heads together, rather than head by head.
        mixture: The mixtures of experts; None for a dense model.
        latent: Sizes of latent attention; None for the usual one.
        delta: The layers of linear attention, in the place of the usual one; None for no such layer.
        output_gates: Whether each head of the usual attention has a gate, which comes from the projection of queries.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    head_channels: int
    vocabulary: int
    tied: bool
    biases: Biases
    norm_biases: bool
    head_norms: bool
    norms_of_all_heads: bool
    mixture: Mixture | None
    latent: Latent | None = None
    delta: Delta | None = None
    output_gates: bool = False

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with attention that is not linear."""
        linear = () if self.delta is None else self.delta.layers
        return tuple(layer for layer in range(self.layers) if layer not in linear)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Numbers of the layers without experts."""
        sparse = () if self.mixture is None else self.mixture.sparse_layers
        return tuple(layer for layer in range(self.layers) if layer not in sparse)

    @property
    def divided(self) -> ModelSizes:
        """What a layout has to divide."""
        mixture, latent, delta = self.mixture, self.latent, self.delta
        shared = 0 if mixture is None or mixture.shared is None else mixture.shared.feed_forward
        attention = self.heads * (self.head_channels if latent is None else latent.values)
        divided = [attention if self.attention_layers else 0, self.feed_forward if self.dense_layers else 0, shared]
        if delta is not None:
            divided.append(delta.value_heads * delta.value_channels)
        return ModelSizes(
            num_layers=self.layers,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            ffn_hidden_size=self.feed_forward if self.dense_layers else None,
            num_experts=0 if mixture is None else mixture.experts,
            expert_layers=() if mixture is None else mixture.sparse_layers,
            expert_ffn_hidden_size=0 if mixture is None else mixture.feed_forward,
            expert_biases=mixture is not None and mixture.biased,
            linear_key_heads=0 if delta is None else delta.key_heads,
            shared_ffn_hidden_size=shared,
            whole_inputs=(self.hidden, *(() if latent is None else (latent.keys_and_values, latent.queries or 0))),
            divided_inputs=divided,
            expert_inputs=() if mixture is None else (mixture.feed_forward,),
        )


def own_fields(hf: Any) -> frozenset[str]:
    """Return the fields of transformers' configuration `hf` that its architecture has.

    It keeps other keys of config.json too, such as the `sliding_window` of a llama model, and computes nothing with
    them.
    """
    # the channels of a head are looked for in every architecture
    return frozenset({"model_type", "head_dim", *inspect.signature(type(hf).__init__).parameters})


def own_field(hf: Any, name: str) -> Any:
    """Return a field of transformers' configuration `hf`; None where its architecture has none of this name."""
    return getattr(hf, name, None) if name in own_fields(hf) else None


def whole_of(hf: Any) -> str | None:
    """Return the `model_type` of the model with images that `hf` describes the language model of, or None."""
    return getattr(hf, PART_OF, None)


Refusals = dict[str, tuple[Any, str]]
"""Field of a configuration -> its value, and why it cannot be expressed here, as a sentence."""

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
"""Hugging Face's name of an activation -> Megatron's function, see `megatron_config.py`."""


def activation_field(hf: Any) -> str:
    """Return the field that names the activation of the feed-forward parts."""
    return "hidden_activation" if "hidden_activation" in own_fields(hf) else "hidden_act"


def unlike_llama(hf: Any) -> Refusals:
    """Return what a family like Llama cannot have here: another activation, windows of less than a token or none."""
    found: Refusals = {}
    field = activation_field(hf)
    if getattr(hf, field) not in ACTIVATIONS:
        found[field] = (getattr(hf, field), f"Supported are {', '.join(ACTIVATIONS)}.")
    window, kinds = own_field(hf, "sliding_window"), own_field(hf, "layer_types") or ()
    if window is None and "sliding_window" in own_fields(hf) and "sliding_attention" in kinds:
        found["sliding_window"] = (None, "There are layers with windows in layer_types.")
    elif window is not None and window < 1 and sliding_window(hf):
        found["sliding_window"] = (window, "A token sees at least itself.")
    return found


def biases_of_fields(hf: Any) -> Biases:
    """Return the biases that `attention_bias`, of all four projections, and `mlp_bias` ask for."""
    attention = bool(own_field(hf, "attention_bias"))
    return Biases(inputs=attention, output=attention, feed_forward=bool(own_field(hf, "mlp_bias")))


def _nothing(hf: Any) -> dict[str, Any]:
    return {}


def _none(hf: Any) -> None:
    return None


def _no(hf: Any) -> bool:
    return False


def _intermediate_size(hf: Any) -> int:
    size: int = hf.intermediate_size
    return size


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        weights: Returns the table of weights of a model with these sizes, see `tables.py`.
        fields: Returns the fields of `ModelConfig` that differ from Llama's.
        mixture: Returns the mixtures of experts; None for a dense model.
        latent: Returns the sizes of latent attention; None for the usual one.
        delta: Returns the layers of linear attention; None for no such layer.
        output_gates: Whether each head of the usual attention has a gate, which comes from the projection of queries.
        unsupported: Returns what cannot be expressed here.
        biases: Returns which linear layers have a bias.
        activation: The activation of its feed-forward parts, as `ACTIVATIONS` has it; None for the one that a field
            names.
        feed_forward: Returns the channels inside a dense feed-forward part.
        layer_norms: Whether its norms are LayerNorms.
        head_norms: Returns whether queries and keys are normed.
        norms_of_all_heads: Whether over the channels of all heads together, rather than head by head.
        projections: Names of the linear layers outside the experts, see `projections.py`; a function of the
            configuration where they depend on it.
        feed_forward_adapters: Whether those of them that are no part of attention can have adapters. In most mixtures
            PEFT takes their names for those that transformers 4 had for the experts' matrices, in dense layers too.
        partial_rotary: Whether `partial_rotary_factor` says which share of each head's channels is rotated.
        rotary_by_layer_type: Whether `rope_parameters` has an entry for each of `layer_types`.
        rotary_scales_queries: Whether queries have the factors that `llama_4_scaling_beta` asks for.
        rotary_sections: Whether shares of the channels, by `mrope_section`, are rotated by positions in time, rows and
            columns, which differ within an image.
        alone: Whether transformers has such models that are no part of one that sees images.
        part_of: Models that see images (`model_type`) whose language models may be of this family.
        further_layers: Fields that say how many layers a folder has behind those of the model, for guessing several
            tokens at once; transformers computes nothing with them, and here they are left out.
        further_tensors: What the names of their tensors begin with, if not with that of a layer.
    """

    weights: Callable[[Dimensions], Iterable[Rule]]
    fields: Callable[[Any], dict[str, Any]] = _nothing
    mixture: Callable[[Any], Mixture | None] = _none
    latent: Callable[[Any], Latent | None] = _none
    delta: Callable[[Any], Delta | None] = _none
    output_gates: bool = False
    unsupported: Callable[[Any], Refusals] = unlike_llama
    biases: Callable[[Any], Biases] = biases_of_fields
    activation: str | None = None
    feed_forward: Callable[[Any], int] = _intermediate_size
    layer_norms: bool = False
    head_norms: Callable[[Any], bool] = _no
    norms_of_all_heads: bool = False
    projections: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = SEPARATE
    feed_forward_adapters: bool = True
    partial_rotary: bool = False
    rotary_by_layer_type: bool = False
    rotary_scales_queries: bool = False
    rotary_sections: bool = False
    alone: bool = True
    part_of: tuple[str, ...] = ()
    further_layers: tuple[str, ...] = ()
    further_tensors: str | None = None

    def dimensions(self, hf: Any) -> Dimensions:
        """Return the sizes of a model."""
        return Dimensions(
            layers=hf.num_hidden_layers,
            hidden=hf.hidden_size,
            feed_forward=self.feed_forward(hf),
            heads=hf.num_attention_heads,
            groups=hf.num_key_value_heads or hf.num_attention_heads,
            head_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            vocabulary=hf.vocab_size,
            tied=bool(hf.tie_word_embeddings),
            biases=self.biases(hf),
            norm_biases=self.layer_norms,
            head_norms=self.head_norms(hf),
            norms_of_all_heads=self.norms_of_all_heads,
            mixture=self.mixture(hf),
            latent=self.latent(hf),
            delta=self.delta(hf),
            output_gates=self.output_gates,
        )

    def rules(self, hf: Any) -> list[Rule]:
        """Return the table of weights of a model, under the names of the whole that it is a part of, if it is one."""
        rules = self.weights(self.dimensions(hf))
        return list(rules if whole_of(hf) is None else map(within_whole, rules))


def sliding_window(hf: Any) -> dict[str, Any]:
    """Return Megatron's fields of a model with windows of `sliding_window` tokens, on the layers of `layer_types`."""
    size, layer_types = own_field(hf, "sliding_window"), own_field(hf, "layer_types")
    if size is None:
        return {}
    # Hugging Face counts the token itself among the `size` visible ones, Megatron only those before it
    fields: dict[str, Any] = {"window_size": (size - 1, 0)}
    if layer_types is None:
        return fields
    windows = [int(kind == "sliding_attention") for kind in layer_types]
    return {**fields, "window_attn_skip_freq": windows} if any(windows) else {}
