"""The table that ties Megatron's sharded tensors to tensors of a Hugging Face folder.

The table is keyed by the names of Megatron's *sharded* state dict. There every parameter carries its layer number, its
place in the full tensor and, for the fused gate and up projections, its half; the names are the same for the local and
the Transformer Engine layers. So nothing here knows about tensor or pipeline parallelism.

Tensor legend: `h` hidden size, `f` feed-forward size, `a` query heads, `g` key/value heads, `d` channels of a head,
`v` vocabulary, `e` experts, `m` feed-forward size of an expert.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nemo_kto.network import moe

Region = tuple[slice, ...]
"""A block of a full tensor, one slice with start and stop per dimension."""

Reader = Callable[[str, Region], torch.Tensor]
"""Reads a block of the named Hugging Face tensor."""


ADAPTERS = ".adapters."
"""What the names of all adapters' parameters hold."""


@dataclass(frozen=True)
class Leaf:
    """One block of one full Megatron tensor, as this rank holds it.

    Attributes:
        key: Name of the full tensor in the sharded state dict.
        global_shape: Shape of the full tensor.
        region: Where the block lies in it.
        data: The block: a view of the live parameter.
    """

    key: str
    global_shape: tuple[int, ...]
    region: Region
    data: torch.Tensor


def sharded_leaves(model: Any, *, adapters: bool = False) -> Iterator[Leaf]:
    """Yield every block of `model`'s parameters that this rank holds, in the model's order.

    The metadata gives every layer its own name instead of one stacked tensor, and the gate and up halves theirs.

    Args:
        model: A KTOGPTModel.
        adapters: Yield the parameters of its adapters (`models/lora.py`) instead of its own.
    """
    metadata = {"singleton_local_shards": True, "non_homogeneous_layers": True}
    for value in model.sharded_state_dict(metadata=metadata).values():
        for tensor in value.build() if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(tensor, ShardedTensor) and (ADAPTERS in tensor.key) == adapters:
                region = tuple(
                    slice(start, start + size)
                    for start, size in zip(tensor.global_offset, tensor.local_shape, strict=True)
                )
                assert tensor.prepend_axis_num == 0, tensor
                yield Leaf(tensor.key, tuple(tensor.global_shape), region, tensor.data)


class Layout(Protocol):
    """How Hugging Face tensors make up one Megatron tensor."""

    def read(self, names: Sequence[str], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block `region` of the Megatron tensor, without its rows of padding.

        No more of the named tensors is read than the block holds.
        """
        ...

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hugging Face tensors, in the order of their names, that make up the Megatron tensor `full`."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor, the same in both."""

    def read(self, names: Sequence[str], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block as it is."""
        return reader(names[0], region)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensor as it is."""
        return [full]


@dataclass(frozen=True)
class PaddedVocab:
    """One tensor with a row per token; Megatron's has rows of zeros behind the real ones.

    Attributes:
        vocab_size: Number of real rows.
    """

    vocab_size: int

    def read(self, names: Sequence[str], region: Region, reader: Reader) -> torch.Tensor:
        """Return the real rows of the block."""
        rows, *rest = region
        return reader(names[0], (slice(min(rows.start, self.vocab_size), min(rows.stop, self.vocab_size)), *rest))

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return the real rows."""
        return [full[: self.vocab_size]]


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value projections `[a*d, ...]`, `[g*d, ...]`, `[g*d, ...]`.

    Megatron keeps the rows of each key/value head together with those of its query heads:
    q..q k v | q..q k v | ..., one part per key/value head.

    Attributes:
        queries_per_group: a / g.
        head_dim: d.
    """

    queries_per_group: int
    head_dim: int

    def _heads(self) -> list[int]:
        return [self.queries_per_group, 1, 1]

    def read(self, names: Sequence[str], region: Region, reader: Reader) -> torch.Tensor:
        """Return the block, which holds whole key/value heads, reading those heads of the three tensors."""
        rows, *rest = region
        per_group = sum(self._heads()) * self.head_dim
        first, last = rows.start // per_group, rows.stop // per_group
        assert (first * per_group, last * per_group) == (rows.start, rows.stop), (region, per_group)
        parts = []
        for name, heads in zip(names, self._heads(), strict=True):
            size = heads * self.head_dim
            part = reader(name, (slice(first * size, last * size), *rest))
            parts.append(part.reshape(last - first, size, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Return query, key and value projection."""
        sizes = [heads * self.head_dim for heads in self._heads()]
        grouped = full.reshape(-1, sum(sizes), *full.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        key: Name of the Megatron tensor; `{layer}` and `{expert}` stand for numbers from 0.
        names: Names of the Hugging Face tensors.
        shapes: Their shapes.
        layout: How they make up the Megatron tensor.
        layers: The layers that have it; for a name without `{layer}`, one number that does not matter.
        experts: Number of experts that have it; for a name without `{expert}`, 1.
    """

    key: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    layers: Sequence[int] = (0,)
    experts: int = 1

    def at(self, layer: int | str, expert: int | str) -> Rule:
        """Return the rule of one tensor."""
        names = tuple(name.format(layer=layer, expert=expert) for name in self.names)
        return Rule(self.key.format(layer=layer, expert=expert), names, self.shapes, self.layout)


def rules_for(model: Any) -> list[Rule]:
    """Return the table of `model`, a KTOGPTModel on any rank: it covers all layers of all stages."""
    c = model.config
    h, d = c.hidden_size, c.kv_channels
    queries, keys = c.num_attention_heads * d, c.num_query_groups * d
    vocab, qkv = PaddedVocab(model.vocab_size), FusedQKV(c.num_attention_heads // c.num_query_groups, d)
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention = ours + "self_attention."
    layers = range(c.num_layers)

    def one(key: str, name: str, *shape: int, layout: Layout | None = None) -> Rule:
        return Rule(key, (name,), (shape,), layout or Same(), layers if "{layer}" in key else (0,))

    def fused(key: str, suffix: str, *columns: int) -> Rule:
        names = tuple(f"{theirs}self_attn.{part}_proj.{suffix}" for part in "qkv")
        return Rule(key, names, ((queries, *columns), (keys, *columns), (keys, *columns)), qkv, layers)

    rules = [
        one("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, h, layout=vocab),
        one("decoder.final_layernorm.weight", "model.norm.weight", h),
        one(attention + "linear_qkv.layer_norm_weight", theirs + "input_layernorm.weight", h),
        fused(attention + "linear_qkv.weight", "weight", h),
        one(attention + "linear_proj.weight", theirs + "self_attn.o_proj.weight", h, queries),
        *_feed_forward_rules(model),
    ]
    if not model.share_embeddings_and_output_weights:
        rules.append(one("output_layer.weight", "lm_head.weight", model.vocab_size, h, layout=vocab))
    if c.add_qkv_bias:
        rules.append(fused(attention + "linear_qkv.bias", "bias"))
    if c.qk_layernorm:
        rules.append(one(attention + "q_layernorm.weight", theirs + "self_attn.q_norm.weight", d))
        rules.append(one(attention + "k_layernorm.weight", theirs + "self_attn.k_norm.weight", d))
    return rules


_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe.", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp.", "gate_proj", "up_proj", "down_proj"),
}
"""Family -> its names of a mixture of experts and of an expert's gate, up and down projections."""


def _feed_forward_rules(model: Any) -> Iterator[Rule]:
    """Yield the rules of what follows attention in each layer: one feed-forward network, or a router and experts."""
    c = model.config
    h, f, m, e = c.hidden_size, c.ffn_hidden_size, c.moe_ffn_hidden_size, c.num_moe_experts
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    sparse = [layer for layer, has_experts in enumerate(moe.pattern(c)) if has_experts]
    dense = [layer for layer in range(c.num_layers) if layer not in sparse]

    def one(layers: list[int], key: str, name: str, *shape: int, experts: int = 1) -> Rule:
        return Rule(ours + key, (theirs + name,), (shape,), Same(), layers, experts)

    if dense:
        yield one(dense, "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", h)
        yield one(dense, "mlp.linear_fc1.weight_w", "mlp.gate_proj.weight", f, h)
        yield one(dense, "mlp.linear_fc1.weight_v", "mlp.up_proj.weight", f, h)
        yield one(dense, "mlp.linear_fc2.weight", "mlp.down_proj.weight", h, f)
    if sparse:
        mixture, gate, up, down = _EXPERT_NAMES[model.family]
        expert, name = "mlp.experts.experts.{expert}.", mixture + "experts.{expert}."
        yield one(sparse, "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", h)
        yield one(sparse, "mlp.router.weight", f"{mixture}gate.weight", e, h)
        yield one(sparse, expert + "linear_fc1.weight_w", f"{name}{gate}.weight", m, h, experts=e)
        yield one(sparse, expert + "linear_fc1.weight_v", f"{name}{up}.weight", m, h, experts=e)
        yield one(sparse, expert + "linear_fc2.weight", f"{name}{down}.weight", h, m, experts=e)


_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def match(rules: Sequence[Rule], key: str) -> Rule:
    """Return the rule of the Megatron tensor `key`, with the numbers of layer and expert filled in.

    Raises:
        KeyError: The table has no rule for `key`: it does not describe this model.
    """
    layer, expert = _LAYER.search(key), _EXPERT.search(key)
    generic = _EXPERT.sub("{expert}", _LAYER.sub("{layer}", key))
    for rule in rules:
        if rule.key == generic:
            return rule.at(layer[0] if layer else 0, expert[0] if expert else 0)
    raise KeyError(f"no rule for the Megatron tensor {key}")


def expected_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a Hugging Face folder of `model` must hold, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in rules_for(model):
        for layer, expert in itertools.product(rule.layers, range(rule.experts)):
            shapes.update(zip(rule.at(layer, expert).names, rule.shapes, strict=True))
    return shapes
