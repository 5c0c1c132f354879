"""Adapters beside one of Megatron's linear layers, and what they make of its output.

With tensor parallelism A and B are divided as the layer's weight W is: of a column-parallel layer B's rows, of a
row-parallel one A's columns. The other of the two is whole on every rank. What crosses ranks is `A x`, `r` numbers per
token.

With DoRA (arXiv 2402.09353, eq. 5) each row of `W + scale * B A` is given a length that is trained, its magnitude `m`.
As PEFT has it, the row's own length `n` is a constant to the backward pass (section 4.3), the bias is left alone, and
where inputs are dropped W's share of what the magnitude changes does not see them either. What is computed is

    y = W x + b + c + (m / n - 1) * (W x + c),    c = scale * B A x,

which is `m / n * (W + scale * B A) x + b`, and exactly the base model's output while `m` is `n` and B is zero: so the
first loss is exactly 0.5. Magnitudes and lengths are float32 whatever the dtype of the model: in bfloat16, steps of
0.8 % would be all there is between them.

Tensor legend: `T` tokens of a packed row on this rank, `i/o` input and output channels of a projection (on this rank),
`r` rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
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
from nemo_kto.algorithms.row_norms import row_squares
from nemo_kto.network.latent_attention import WholeLinear
from nemo_kto.network.low_rank import Adapter, Matrices, Switch
from nemo_kto.network.projections import LoRASettings, parts_of


class Adapted:
    """Gives a linear layer of Megatron adapters; the layer's class is replaced by one that derives from this one too.

    The layer itself, its weight and the weight's name stay what they are.

    Attributes:
        adapters: Projection -> its `Adapter`.
    """

    adapters: torch.nn.ModuleDict
    _switch: Switch
    _settings: LoRASettings
    _parts: tuple[tuple[str, int], ...]  # (projection, rows of each group) of all the layer is made of
    _groups: int
    _dropout_salt: int
    _sharded_dim: dict[str, int]  # parameter -> the dimension that tensor-parallel ranks share

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return Megatron's (output, bias) with what the adapters make of the output."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        if not self._switch.on:
            return output, bias
        matrices = [adapter() for adapter in self.adapters.values()]
        # as matrices: of tensors with more dimensions torch chooses another kernel where gradients are wanted, and
        # the policy would not be scored in training as the reference is
        seen = self._dropped(input_.flatten(0, 1))
        change = self._adapter_output(seen, matrices).reshape(output.shape)
        if not self._settings.dora:
            return output + change, bias
        base = output
        if self._switch.dropout_keys is not None:
            base, _ = super().forward(seen.reshape(input_.shape), *args, **kwargs)  # type: ignore[misc]
        if self.bias is not None and not getattr(self, "skip_bias_add", False):
            base = base - self.bias
        gains = self._gains(matrices).to(output.dtype)
        return output + change + gains * (base + change), bias

    def _adapter_output(self, input_: torch.Tensor, matrices: Sequence[Matrices]) -> torch.Tensor:
        """Return `scale * B A x` `[T, o]` for an input `[T, i]`."""
        inner = F.linear(input_, torch.cat([each.lora_a for each in matrices]))
        inners = self._exchange(inner).split([len(each.lora_a) for each in matrices], dim=-1)
        return self._join(
            {
                part: F.linear(inner, lora_b) * each.scale
                for each, inner in zip(matrices, inners, strict=True)
                for part, lora_b in each.lora_bs.items()
            }
        )

    def _gains(self, matrices: Sequence[Matrices]) -> torch.Tensor:
        """Return by how much more than their own the lengths of rows are: `m / n - 1`, `[o]` float32.

        It is 0 for rows that no adapter changes, and for rows of zeros, which have no direction.
        """
        norms = self._row_norms(matrices)
        return self._join(
            {
                part: torch.where(norms[part] > 0, magnitudes / norms[part].where(norms[part] > 0, 1) - 1, 0)
                for each in matrices
                for part, magnitudes in each.magnitudes.items()
            }
        )

    @torch.no_grad()
    def _row_norms(self, matrices: Sequence[Matrices]) -> dict[str, torch.Tensor]:
        """Return part -> the lengths `[o]` float32 of its rows of `W + scale * B A`.

        Of a row-parallel layer: one all-reduce of `[o]` float64 over the tensor-parallel ranks.
        """
        of_part = {
            part: (each.lora_a, lora_b, each.scale) for each in matrices for part, lora_b in each.lora_bs.items()
        }
        # in one go, as a weight that is kept quantised is dequantised for each operation
        weights = self.weight.detach().unflatten(0, (self._groups, -1)).split([rows for _, rows in self._parts], dim=1)  # type: ignore[attr-defined]
        norms = {}
        for (part, rows), weight in zip(self._parts, weights, strict=True):
            if part in of_part:
                lora_a, lora_b, scale = of_part[part]
                squares = row_squares(weight, lora_a, lora_b.unflatten(0, (self._groups, rows)), scale=scale)
                norms[part] = self._of_all_columns(squares).sqrt().float()
        return norms

    def _of_all_columns(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over all columns of the weight, from those over the columns of this rank."""
        return sums

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Make the magnitudes, if there are any, the lengths that rows have with A and B as they are: B is zero."""
        matrices = [adapter.matrices() for adapter in self.adapters.values() if adapter.m_names]  # type: ignore[operator]
        norms = self._row_norms(matrices) if matrices else {}
        for each in matrices:
            for part, magnitudes in each.magnitudes.items():
                magnitudes.copy_(norms[part])

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
            part: (lora_b.float() @ each.lora_a.float()).T * each.scale
            for each in (adapter() for adapter in self.adapters.values())
            for part, lora_b in each.lora_bs.items()
        }
        return self._join(changes).T

    def merged_weight(self) -> torch.Tensor:
        """Return the weight `[o, i]` float32 of a layer without adapters that computes the same."""
        changed = self.weight.float() + self.weight_change()  # type: ignore[attr-defined]
        if not self._settings.dora:
            return changed
        return changed * (1 + self._gains([adapter() for adapter in self.adapters.values()]))[:, None]

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


class AdaptedColumnParallelLinear(Adapted, ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel layer with adapters: A is whole on each rank, B divided by rows."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(inner, group=self.tp_group)

    def _tokens_of_input(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else keys


class AdaptedRowParallelLinear(Adapted, RowParallelLinear):  # type: ignore[misc]
    """A row-parallel layer with adapters: A is divided by columns, B whole on each rank."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(inner, group=self.tp_group)

    @property
    def _first_input_channel(self) -> int:
        return int(self.tp_group.rank() * self.input_size_per_partition)

    def _of_all_columns(self, sums: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(sums, group=self.tp_group)
        return sums


class AdaptedWholeLinear(Adapted, WholeLinear):
    """A layer that every rank has all of, with adapters that are so too."""

    def _exchange(self, inner: torch.Tensor) -> torch.Tensor:
        return inner

    def _tokens_of_input(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.chunk(self.tp_group.size())[self.tp_group.rank()] if self.sequence_parallel else keys


def adapt(
    linear: Any, parts: Sequence[str], *, modules: Mapping[str, str], settings: LoRASettings, switch: Switch
) -> None:
    """Give a linear layer adapters.

    Args:
        linear: One of Megatron's, or a `WholeLinear`.
        parts: What its rows are made of, see `linear_layers`.
        modules: Name of each adapter, see `place_in_layer` -> the module that it belongs to, see `module_of`.
        settings: Of which ranks and scales they are.
        switch: What all adapters of the chunk share.
    """
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
    for projection, module in modules.items():
        own = {part: rows[part] * linear._groups for part in parts_of(projection)}
        rank, scale = settings.rank_of(module), settings.scale_of(module)
        adapter = Adapter(linear.weight, inputs=inputs, outputs=own, rank=rank, scale=scale, dora=settings.dora)
        a_name, b_names = ["lora_a"], [*adapter.b_names.values(), *adapter.m_names.values()]
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
