"""How many operations passes over a model take: those of its matrix products, two a multiply-add ("model FLOPs").

What is counted of a forward pass:

* every linear layer, by the shape of its weight in the family's table, for each token; of a mixture's experts those
  that a token goes through (`Mixture.chosen`), the router and the shared expert;
* attention, for each pair of tokens that see each other: those before a token in its own document and itself, within
  the layer's window. What a kernel computes of the others, to throw it away, is not counted;
* linear attention by its recurrence (arXiv 2412.06464, eq. 10), three products of a head's key and value channels a
  token; its chunked forms compute more;
* adapters of low rank, but of a reference that is the model without them; not what DoRA takes besides, the lengths of
  rows, and with dropout the frozen projection once more;
* the output layer at response tokens only, as here (`algorithms/logprobs.py`), or at as many as are asked for.

The backward pass takes each product twice, once for the gradient of what goes in and once for that of the weight.
With adapters a frozen weight has no gradient: its product is taken once, and not at all in the layers before the first
one with adapters. In that first layer all is counted, though what comes before its adapters needs none. What is
recomputed to save memory is not counted, and neither are norms, activations, softmax and the embedding, which are no
matrix products.

A training step has the gradient pass over the samples, a forward and a backward one; the policy's forward pass over
the KL set; and the reference's over both, unless its log-probs are cached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_kto.network.families import family_of
from nemo_kto.network.family import Dimensions
from nemo_kto.network.projections import LoRASettings, module_of
from nemo_kto.network.weight_rules import Rule


@dataclass(frozen=True)
class _Core:
    """What a kind of layer takes forward besides linear layers, in multiply-adds.

    Attributes:
        recurrence: A token, in linear attention.
        pair: Two tokens that see each other, in attention.
        window: Tokens that a token sees, itself included; None for all before it.
    """

    recurrence: int
    pair: int
    window: int | None

    def of(self, length: int) -> int:
        """Return what a document takes."""
        window = length if self.window is None else min(self.window, length)
        pairs = window * (window + 1) // 2 + (length - window) * window
        return length * self.recurrence + pairs * self.pair


class ModelFlops:
    """Counts for one model, whose parts are added up once; documents add up.

    Args:
        hf_config: transformers' configuration of the model.
        lora: Its adapters, which are on; None for none, and the whole model is trained.
    """

    def __init__(self, hf_config: Any, lora: LoRASettings | None = None) -> None:
        family = family_of(hf_config)
        sizes = family.dimensions(hf_config)
        rules = family.rules(hf_config)
        windows = _windows(family.fields(hf_config), sizes.layers)
        adapters = _adapters(rules, lora, hf_config)
        linear = [_linear(rules, sizes, layer) for layer in range(sizes.layers)]
        cores = [_core(sizes, layer, windows[layer]) for layer in range(sizes.layers)]
        products = 2 if lora is None else 1
        first = 0 if lora is not None and "embed_tokens" in lora.whole else min(adapters, default=0)
        self._forward = sum(linear) + sum(adapters.values()), Counter(cores)
        backward = sum(products * each for each in linear[first:]) + 2 * sum(adapters.values())
        self._backward = backward, Counter({core: 2 * number for core, number in Counter(cores[first:]).items()})
        of_output = 2 if lora is None or "lm_head" in lora.whole else 1
        self._output, self._output_backward = (times * sizes.hidden * sizes.vocabulary for times in (1, of_output))

    def forward(self, documents: Sequence[int], responses: int) -> int:
        """Return the operations of a forward pass over documents of so many tokens.

        Args:
            documents: The tokens of each document.
            responses: How many tokens of all documents the output layer is applied at.
        """
        return _summed(documents, *self._forward) + 2 * responses * self._output

    def backward(self, documents: Sequence[int], responses: int) -> int:
        """Return the operations of the backward pass that follows, of what is trained; see `forward`."""
        return _summed(documents, *self._backward) + 2 * responses * self._output_backward


def _summed(documents: Sequence[int], of_token: int, cores: Mapping[_Core, int]) -> int:
    """Return the operations of documents, two a multiply-add.

    Args:
        documents: The tokens of each.
        of_token: Multiply-adds of a token in linear layers and adapters.
        cores: Kind of layer -> how often it counts.
    """
    besides = sum(times * core.of(length) for length in documents for core, times in cores.items())
    return 2 * (sum(documents) * of_token + besides)


class StepFlops:
    """Counts for the documents of a training step, all of its passes together.

    Args:
        hf_config: transformers' configuration of the model.
        lora: The adapters that are trained; None where the whole model is.
        reference_mode: How the reference is held, see `ReferenceSettings`.
    """

    def __init__(self, hf_config: Any, *, lora: LoRASettings | None, reference_mode: str) -> None:
        self._policy = ModelFlops(hf_config, lora)
        without = reference_mode == "adapter_off"
        reference = ModelFlops(hf_config) if without else self._policy
        self._reference = None if reference_mode == "cached" else reference

    def of_sample(self, length: int, response: int) -> int:
        """Return the operations of a sample of so many tokens, of which the last ones are the response."""
        return self.of_kl(length, response) + self._policy.backward([length], response)

    def of_kl(self, length: int, response: int) -> int:
        """Return the operations of a document of the KL set."""
        passes = (self._policy, self._reference)
        return sum(model.forward([length], response) for model in passes if model is not None)


def _linear(rules: Iterable[Rule], sizes: Dimensions, layer: int) -> int:
    """Return the multiply-adds of a token in the linear layers of a layer, the short convolution included."""
    total = 0
    for rule in rules:
        if "{layer}" in rule.key and layer in rule.layers:
            times = sizes.mixture.chosen if sizes.mixture is not None and _is_routed(rule) else 1
            total += times * sum(math.prod(piece.shape) for piece in rule.pieces if len(piece.shape) > 1)
    return total


def _is_routed(rule: Rule) -> bool:
    return "{expert}" in rule.key


def _adapters(rules: Iterable[Rule], lora: LoRASettings | None, hf_config: Any) -> dict[int, int]:
    """Return the number of each layer with adapters -> the multiply-adds of a token in them."""
    if lora is None:
        return {}
    # (layer, tensor of the folder, which is a projection, also where that returns several parts) -> its channels
    inputs: dict[tuple[int, str], int] = {}
    outputs: dict[tuple[int, str], int] = {}
    for rule in rules:
        if "{layer}" not in rule.key or _is_routed(rule):
            continue
        for piece in rule.pieces:
            if len(piece.shape) != 2 or _projection(piece.name) not in lora.projections:
                continue
            for layer in set(rule.layers) & set(lora.layers):
                inputs[layer, piece.name] = piece.shape[1]
                outputs[layer, piece.name] = outputs.get((layer, piece.name), 0) + piece.shape[0]
    found: dict[int, int] = {}
    for (layer, name), channels in inputs.items():
        rank = lora.rank_of(module_of(_projection(name), layer, hf_config))
        found[layer] = found.get(layer, 0) + rank * (channels + outputs[layer, name])
    return found


def _projection(tensor: str) -> str:
    """Return the projection whose weight a tensor is, by the names of both."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _core(sizes: Dimensions, layer: int, window: int | None) -> _Core:
    """Return what a layer takes besides linear layers.

    Attention makes a score and a weighted value for two tokens that see each other. In linear attention a token's key
    finds something, something is written, and something is asked for.
    """
    if layer not in sizes.attention_layers:
        assert sizes.delta is not None
        of_state = sizes.delta.value_heads * sizes.delta.key_channels * sizes.delta.value_channels
        return _Core(3 * of_state, 0, None)
    if sizes.latent is not None:
        return _Core(0, sizes.heads * (sizes.latent.scored + sizes.latent.values), window)
    return _Core(0, sizes.heads * 2 * sizes.head_channels, window)


def _windows(fields: dict[str, Any], layers: int) -> list[int | None]:
    """Return the window of each layer, from a family's fields for Megatron, which counts the tokens before."""
    before = fields.get("window_size")
    if before is None:
        return [None] * layers
    chosen = fields.get("window_attn_skip_freq") or [1] * layers
    return [before[0] + 1 if has_window else None for has_window in chosen]
