"""The parameters of a Megatron model as blocks of full tensors, whatever the layout.

The names are those of Megatron's *sharded* state dict. There every parameter carries its layer number, its place in
the full tensor and, for the fused gate and up projections, its half; the names are the same for the local and the
Transformer Engine layers. So whoever asks here knows nothing about tensor or pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from nemo_kto.network.weight_rules import Region

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
        adapters: Yield the parameters of its adapters (`lora.py`) instead of its own.
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


def own_state(
    module: Any, prefix: str, offsets: Sequence[Any], metadata: Mapping[str, Any] | None, *, divided: Mapping[str, int]
) -> dict[str, Any]:
    """Return a module's parameters as `sharded_state_dict` has them, for one that Megatron does not know.

    Args:
        module: With `tp_group`, the tensor-parallel ranks, and without modules in it.
        prefix: Megatron's.
        offsets: Megatron's.
        metadata: Megatron's.
        divided: Parameters of which each rank has a part -> the dimension that is divided.
    """
    assert metadata is not None
    found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        {name: parameter for name, parameter in module.named_parameters(recurse=False)},
        prefix,
        dict(divided),
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return found


def mark_divided(parameter: torch.Tensor, *, dim: int) -> None:
    """Say, in Megatron's way, that each rank holds a part of its own of a parameter, divided along `dim`."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim, parameter.partition_stride = dim, 1  # type: ignore[attr-defined]
