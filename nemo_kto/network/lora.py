"""LoRA (arXiv 2106.09685) beside Megatron's column- and row-parallel projections, as PEFT defines it.

Megatron computes query, key and value as one projection, gate and up as another. Adapters are those that PEFT gives
the Hugging Face model all the same: where it has one projection for each of these parts, each has an A and a B of its
own (a shared A could not hold three different ones); where its projections are fused too, their parts have one A
together. So every PEFT adapter can be continued exactly, and one trained here is one PEFT could have trained.

An adapted projection computes `W x + scale * B A dropout(x)` (eq. 3 of the paper), W frozen. With tensor parallelism
A and B are divided as W is: of a column-parallel projection B's rows, of a row-parallel one A's columns. The other of
the two is whole on every rank. What crosses ranks is `A x`, `r` numbers per token.

Tensor legend: `T` tokens of a packed row on this rank, `i/o` input and output channels of a projection (on this rank),
`r` rank of the adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_kto.algorithms.dropout import drop_out
from nemo_kto.network.attention import DocumentParams
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.gpt import KTOGPTModel, tensor_generator
from nemo_kto.network.latent_attention import WholeLinear
from nemo_kto.network.projections import (
    LoRASettings,
    has_projection,
    linear_layers,
    linear_of,
    parts_of,
    place_in_layer,
)
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.network.sharded import sharded_leaves


@dataclass(kw_only=True)
class RowParams(DocumentParams):
    """The description of a packed row, and what the adapters' dropout depends on.

    Attributes:
        dropout_keys: `[T]` int32, a number for each token of this context-parallel rank, the same under every layout;
            None where nothing is dropped.
    """

    dropout_keys: torch.Tensor | None = None


@dataclass
class _Switch:
    """What all adapters of a chunk share.

    Attributes:
        on: Whether they add anything.
        dropout_keys: Those of the row that is computed, see `RowParams`.
    """

    on: bool = True
    dropout_keys: torch.Tensor | None = field(default=None, repr=False)


class Adapter(torch.nn.Module):
    """The adapters of one projection, values still to be set.

    Attributes:
        lora_a: `[r, i]`.
        lora_b: `[o, r]`; of a fused projection `lora_b_<part>` for each part, `o` being that part's channels.
    """

    def __init__(self, like: torch.Tensor, *, inputs: int, outputs: Mapping[str, int], rank: int) -> None:
        super().__init__()
        self.lora_a = torch.nn.Parameter(like.new_zeros(rank, inputs))
        self.b_names = {part: f"lora_b_{part}" if len(outputs) > 1 else "lora_b" for part in outputs}
        for part, name in self.b_names.items():
            self.register_parameter(name, torch.nn.Parameter(like.new_zeros(outputs[part], rank)))

    @property
    def lora_bs(self) -> dict[str, torch.nn.Parameter]:
        """Part -> its B."""
        return {part: getattr(self, name) for part, name in self.b_names.items()}

    def forward(self) -> tuple[torch.Tensor, dict[str, torch.nn.Parameter]]:
        """Return A and each part's B.

        They are had by a call, as Megatron hooks to that what has their values gathered first.
        """
        return self.lora_a, self.lora_bs


class _Adapted:
    """Gives a linear layer of Megatron adapters; the layer's class is replaced by one that derives from this one too.

    The layer itself, its weight and the weight's name stay what they are.

    Attributes:
        adapters: Projection -> its `Adapter`.
    """

    adapters: torch.nn.ModuleDict
    _switch: _Switch
    _settings: LoRASettings
    _parts: tuple[tuple[str, int], ...]  # (projection, rows of each group) of all the layer is made of
    _groups: int
    _dropout_salt: int
    _sharded_dim: dict[str, int]  # parameter -> the dimension that tensor-parallel ranks share

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's (output, bias) with the adapters' share added to the output."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        if self._switch.on:
            # as matrices: of tensors with more dimensions torch chooses another kernel where gradients are wanted, and
            # the policy would not be scored in training as the reference is
            change = self._adapter_output(input_.flatten(0, 1)) * self._settings.scale
            output = output + change.reshape(output.shape)
        return output, bias

    def _adapter_output(self, input_: torch.Tensor) -> torch.Tensor:
        """Return the adapters' part of the output `[T, o]` for an input `[T, i]`, not scaled."""
        matrices = [adapter() for adapter in self.adapters.values()]
        inner = F.linear(self._dropped(input_), torch.cat([lora_a for lora_a, _ in matrices]))
        inners = self._exchange(inner).split(self._settings.rank, dim=-1)
        return self._join(
            {
                part: F.linear(inner, lora_b)
                for (_, lora_bs), inner in zip(matrices, inners, strict=True)
                for part, lora_b in lora_bs.items()
            }
        )

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        """Return `A x` as B needs it, from what this rank has of it."""
        raise NotImplementedError

    def _tokens_of_input(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the part of `keys` that belongs to the tokens of the layer's input on this rank."""
        return keys

    @property
    def _first_input_channel(self) -> int:
        return 0

    def _join(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the parts `[..., o]` in the order of the fused layer's outputs; missing ones are 0."""
        like = next(iter(parts.values()))
        pieces = [
            parts[name].unflatten(-1, (self._groups, rows))
            if name in parts
            else like.new_zeros(*like.shape[:-1], self._groups, rows)
            for name, rows in self._parts
        ]
        return torch.cat(pieces, dim=-1).flatten(-2)

    def weight_change(self) -> torch.Tensor:
        """Return `scale * B A` `[o, i]` float32, with the rows in the order of this layer's weight."""
        changes = {
            part: (lora_b.float() @ lora_a.float()).T
            for lora_a, lora_bs in (adapter() for adapter in self.adapters.values())
            for part, lora_b in lora_bs.items()
        }
        return self._join(changes).T * self._settings.scale

    def _dropped(self, input_: torch.Tensor) -> torch.Tensor:
        keys = self._switch.dropout_keys
        if keys is None:
            return input_
        return drop_out(
            input_,
            self._tokens_of_input(keys),
            range(self._first_input_channel, self._first_input_channel + input_.shape[-1]),
            salt=self._dropout_salt,
            probability=self._settings.dropout,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with the adapters divided as they are."""
        assert metadata is not None
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        adapters = make_sharded_tensors_for_checkpoint(
            self.adapters.state_dict(keep_vars=True),
            f"{prefix}adapters.",
            self._sharded_dim,
            sharded_offsets,
            tp_group=self.tp_group,  # type: ignore[attr-defined]
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state | adapters


class AdaptedColumnParallelLinear(_Adapted, ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel layer with adapters: A is whole on each rank, B divided by rows."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(inner, group=self.tp_group)

    def _tokens_of_input(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else keys


class AdaptedRowParallelLinear(_Adapted, RowParallelLinear):  # type: ignore[misc]
    """A row-parallel layer with adapters: A is divided by columns, B whole on each rank."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)

    @property
    def _first_input_channel(self) -> int:
        return int(self.tp_group.rank() * self.input_size_per_partition)


class AdaptedWholeLinear(_Adapted, WholeLinear):
    """A layer that every rank has all of, with adapters that are so too."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        return inner

    def _tokens_of_input(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else keys


def add_adapters(model: KTOGPTModel, settings: LoRASettings) -> None:
    """Freeze `model` and give the chosen projections adapters, whose values are still to be set.

    Set them with `initialize_adapters`, `import_adapter` or a checkpoint. Layers are Megatron's own
    (`build_gpt(..., unfused=True)`).

    Args:
        model: A chunk on any rank, not wrapped.
        settings: Which adapters; layers of other chunks and ranks are passed over.
    """
    model.requires_grad_(False)
    switch, sizes = _Switch(), dimensions_of(model.hf_config)
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        if number not in settings.layers:
            continue
        for name, parts in linear_layers(model.hf_config).items():
            chosen = [
                projection
                for projection in settings.projections
                if linear_of(projection, sizes) == name and has_projection(projection, number, sizes)
            ]
            if chosen:
                places, names = zip(*(place_in_layer(projection, number, sizes) for projection in chosen), strict=True)
                linear = layer.get_submodule(places[0])
                _adapt(linear, parts, names=names, settings=settings, switch=switch)
                linear._dropout_salt = zlib.crc32(f"{number}.{places[0]}".encode())
        layer.register_forward_pre_hook(_note_dropout_keys(switch), with_kwargs=True)
    model.adapter_switch = switch
    if model.config.recompute_granularity == "full" and model.pre_process:
        # recomputed layers take part in the backward pass only if an input of theirs has a gradient
        model.embedding.register_forward_hook(lambda module, inputs, output: _with_gradient(output))


def _with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.requires_grad_() if torch.is_grad_enabled() else tensor


def _note_dropout_keys(switch: _Switch) -> Any:
    """Return a hook of a transformer layer: it runs before the layer, also when the layer is recomputed."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        switch.dropout_keys = getattr(kwargs["packed_seq_params"], "dropout_keys", None)

    return hook


def _adapt(
    linear: Any, parts: Sequence[str], *, names: Sequence[str], settings: LoRASettings, switch: _Switch
) -> None:
    """Give a linear layer adapters; see `linear_layers` for its parts, `place_in_layer` for the names."""
    classes = {
        ColumnParallelLinear: AdaptedColumnParallelLinear,
        RowParallelLinear: AdaptedRowParallelLinear,
        WholeLinear: AdaptedWholeLinear,
    }
    kind = type(linear)
    linear.__class__ = classes[kind]
    config, tp_size = linear.config, linear.tp_group.size()
    outputs, inputs = linear.weight.shape
    linear._groups = 1
    rows = dict.fromkeys(parts, outputs // len(parts))
    if "k_proj" in parts:  # Megatron keeps each key/value head with those of its queries
        linear._groups = config.num_query_groups // tp_size
        per_group = config.num_attention_heads // config.num_query_groups
        per_query = config.kv_channels * (2 if config.attention_output_gate else 1)
        rows = {"q_proj": per_group * per_query, "k_proj": config.kv_channels, "v_proj": config.kv_channels}
    linear._parts = tuple(rows.items())
    linear._switch, linear._settings = switch, settings
    linear._sharded_dim = {}
    adapters = torch.nn.ModuleDict()
    for projection in names:
        own = {part: rows[part] * linear._groups for part in parts_of(projection)}
        adapter = Adapter(linear.weight, inputs=inputs, outputs=own, rank=settings.rank)
        a_name, b_names = ["lora_a"], list(adapter.b_names.values())
        divided, whole, dim = {
            ColumnParallelLinear: (b_names, a_name, 0),
            RowParallelLinear: (a_name, b_names, 1),
            WholeLinear: ([], a_name + b_names, 0),
        }[kind]
        for matrix in divided:
            linear._sharded_dim[f"{projection}.{matrix}"] = dim
            set_tensor_model_parallel_attributes(getattr(adapter, matrix), is_parallel=True, dim=dim, stride=1)
        for matrix in whole:  # under sequence parallelism each rank has the gradient of its tokens only
            getattr(adapter, matrix).sequence_parallel = linear.sequence_parallel
        adapters[projection] = adapter
    linear.adapters = adapters


@torch.no_grad()
def initialize_adapters(model: KTOGPTModel, *, seed: int) -> None:
    """Fill A with random numbers that depend on `seed` only, never on the layout, and B with zeros.

    A is uniform between +-1/sqrt(i), as in PEFT. Each full tensor is drawn from a generator of its own.
    """
    for leaf in sharded_leaves(model, adapters=True):
        if ".lora_b" in leaf.key:
            leaf.data.zero_()
            continue
        full = torch.rand(leaf.global_shape, generator=tensor_generator(seed, leaf.key), device="cpu")
        bound = 1 / math.sqrt(leaf.global_shape[1])
        leaf.data.copy_((2 * full - 1).mul_(bound)[leaf.region])


@torch.no_grad()
def clear_adapters(model: KTOGPTModel) -> None:
    """Set all adapters to zero: the model is then the base model."""
    for leaf in sharded_leaves(model, adapters=True):
        leaf.data.zero_()


@contextmanager
def adapters_off(models: Iterable[KTOGPTModel]) -> Iterator[None]:
    """Make models compute what their base models compute, to the last bit, inside a `with` block."""
    switches = [model.adapter_switch for model in models]
    for switch in switches:
        switch.on = False
    try:
        yield
    finally:
        for switch in switches:
            switch.on = True


@contextmanager
def adapters_merged(models: Iterable[KTOGPTModel]) -> Iterator[None]:
    """Add the adapters to the weights beside them inside a `with` block; restore those exactly at its end.

    The sums are made in float32 and rounded once to the weights' dtype. Memory: a copy of the adapted weights of this
    rank in CPU memory; of those in fewer bits none, as their sums are made when they are looked at.
    """
    models = list(models)
    layers: list[Any] = [module for model in models for module in model.modules() if isinstance(module, _Adapted)]
    originals = [_put_aside(layer.weight) for layer in layers]
    try:
        with adapters_off(models), torch.no_grad():
            for layer in layers:
                if isinstance(layer.weight, QuantisedWeight):
                    merged = layer.weight.plus(layer.weight_change)
                    layer.weight = torch.nn.Parameter(merged, requires_grad=False)
                else:
                    layer.weight.copy_(layer.weight.float() + layer.weight_change())
            yield
    finally:
        with torch.no_grad():
            for layer, original in zip(layers, originals, strict=True):
                if isinstance(original, QuantisedWeight):
                    layer.weight = original
                else:
                    layer.weight.copy_(original)


def _put_aside(weight: torch.Tensor) -> torch.Tensor:
    return weight if isinstance(weight, QuantisedWeight) else weight.detach().to("cpu", copy=True)
