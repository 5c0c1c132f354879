"""Embedding and output layer trained whole beside adapters: PEFT's `modules_to_save`, for tokens that are new, say.

As in PEFT what is trained is a copy, and the original stays where it is and as it is: with the adapters off, the model
is the base model. Copies are divided among tensor-parallel ranks as the originals are, and padded like them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from nemo_kto.network.low_rank import Switch
from nemo_kto.network.sharded import ADAPTERS, mark_divided

PLACES = {"embed_tokens": "embedding.word_embeddings", "lm_head": "output_layer"}
"""Module, by its name in Hugging Face -> by its name in Megatron's model."""


def key_of_copy(name: str) -> str:
    """Return what the copy of a module of `PLACES` is called in the sharded state dict."""
    return f"{PLACES[name]}{ADAPTERS}{name}.weight"


class TrainedCopy(torch.nn.Module):
    """A copy of a weight, values still to be set.

    Attributes:
        weight: `[v/t, h]`.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros_like(like))
        mark_divided(self.weight, dim=0)

    def forward(self) -> torch.nn.Parameter:
        """Return the weight: by a call, as Megatron hooks to that what has its values gathered first."""
        return self.weight


class Copied:
    """Gives a module of `PLACES` a trained copy; the module's class is replaced by one that derives from this one too.

    Attributes:
        adapters: Its name in Hugging Face -> its copy.
    """

    adapters: torch.nn.ModuleDict
    weight: torch.nn.Parameter
    tp_group: Any
    _switch: Switch

    @property
    def _copy(self) -> TrainedCopy:
        (copy,) = self.adapters.values()
        assert isinstance(copy, TrainedCopy)
        return copy

    def weight_in_use(self) -> torch.nn.Parameter:
        """Return the copy, or where adapters are off the original."""
        found: torch.nn.Parameter = self._copy() if self._switch.on else self.weight
        return found

    def merged_weight(self) -> torch.Tensor:
        """Return the weight of a module without a copy that computes the same."""
        return self._copy()

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Make the copy what the original is."""
        self._copy.weight.copy_(self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[Any] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's, with the copy divided as the original is."""
        assert metadata is not None
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        (name,) = self.adapters
        key = f"{prefix}adapters.{name}.weight"
        state[key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self._copy.weight,
            key=key,
            allow_shape_mismatch=True,  # a checkpoint may have other padding
            prepend_offsets=sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class CopiedEmbedding(Copied, VocabParallelEmbedding):  # type: ignore[misc]
    """An embedding with a trained copy."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Return Megatron's output for the weight in use."""
        original = self.weight
        self._parameters["weight"] = self.weight_in_use()  # type: ignore[index]
        try:
            output: torch.Tensor = super().forward(input_)
        finally:
            self._parameters["weight"] = original  # type: ignore[index]
        return output


class CopiedOutputLayer(Copied, ColumnParallelLinear):  # type: ignore[misc]
    """An output layer with a trained copy; it is never called, see `KTOGPTModel.output_weight`."""


def add_copy(module: Any, name: str, switch: Switch) -> None:
    """Give a module a trained copy.

    Args:
        module: What `PLACES` names, of a model whose output layer is not its embedding.
        name: Its name in Hugging Face.
        switch: What all adapters of the chunk share.
    """
    module.__class__ = {VocabParallelEmbedding: CopiedEmbedding, ColumnParallelLinear: CopiedOutputLayer}[type(module)]
    module.adapters = torch.nn.ModuleDict({name: TrainedCopy(module.weight)})
    module._switch = switch
