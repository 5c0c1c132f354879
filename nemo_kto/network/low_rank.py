"""The parameters of an adapter, and the switch that a model's adapters share.

Tensor legend: `i/o` input and output channels of a projection (on this rank), `r` rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass
class Switch:
    """What all adapters of a chunk share.

    Attributes:
        on: Whether they add anything.
        dropout_keys: Those of the row that is computed, see `RowParams`.
    """

    on: bool = True
    dropout_keys: torch.Tensor | None = field(default=None, repr=False)


class Matrices(NamedTuple):
    """What an adapter is made of.

    Attributes:
        lora_a: `[r, i]`.
        lora_bs: Part -> its B `[o, r]`.
        magnitudes: Part -> its magnitudes `[o]` float32; empty without DoRA.
        scale: What `B A` is multiplied by.
    """

    lora_a: torch.Tensor
    lora_bs: dict[str, torch.Tensor]
    magnitudes: dict[str, torch.Tensor]
    scale: float


class Adapter(torch.nn.Module):
    """The adapters of one projection, values still to be set.

    Attributes:
        lora_a: `[r, i]`.
        lora_b: `[o, r]`; of a fused projection `lora_b_<part>` for each part, `o` being that part's channels.
        lora_m: With DoRA the magnitudes `[o]` float32, likewise.
        scale: What `B A` is multiplied by.
    """

    def __init__(
        self, like: torch.Tensor, *, inputs: int, outputs: Mapping[str, int], rank: int, scale: float, dora: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.lora_a = torch.nn.Parameter(like.new_zeros(rank, inputs))
        self.b_names = {part: f"lora_b_{part}" if len(outputs) > 1 else "lora_b" for part in outputs}
        for part, name in self.b_names.items():
            self.register_parameter(name, torch.nn.Parameter(like.new_zeros(outputs[part], rank)))
        self.m_names = {part: name.replace("lora_b", "lora_m") for part, name in self.b_names.items() if dora}
        for part, name in self.m_names.items():
            magnitudes = like.new_zeros(outputs[part], dtype=torch.float32)
            self.register_parameter(name, torch.nn.Parameter(magnitudes))

    def matrices(self) -> Matrices:
        """Return its parameters, whose values are there."""
        lora_bs, magnitudes = (
            {part: getattr(self, name) for part, name in names.items()} for names in (self.b_names, self.m_names)
        )
        return Matrices(self.lora_a, lora_bs, magnitudes, self.scale)

    def forward(self) -> Matrices:
        """Return its parameters.

        They are had by a call, as Megatron hooks to that what has their values gathered first.
        """
        return self.matrices()
