"""Rotary embeddings (arXiv 2104.09864) in transformers' kinds, by each token's position in its own document.

Tensor legend: `T` tokens of a packed row on this rank, `r` channels of a head that are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_kto.network.families import family_of

SUPPORTED_TYPES = ("default", "linear", "llama3", "longrope")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding's parameters, into which transformers has put those of older configurations."""
    return dict(config.rope_parameters or {})


def unsupported_fields(config: PretrainedConfig, *, partial: bool) -> dict[str, Any]:
    """Return field of the configuration -> value, of those values that cannot be expressed here.

    Args:
        config: The model's configuration.
        partial: Whether its family rotates a share of each head's channels.
    """
    rope = rope_parameters(config)
    if "rope_type" not in rope:  # one for each kind of layer
        return {"rope_parameters": rope}
    if rope["rope_type"] not in SUPPORTED_TYPES:
        return {"rope_parameters.rope_type": rope["rope_type"]}
    factor = rope.get("partial_rotary_factor")
    if not partial and factor not in (None, 1.0):
        return {"rope_parameters.partial_rotary_factor": factor}
    return {}


class RotaryEmbedding:
    """The rotary embedding of a model.

    Args:
        config: The model's configuration.
        head_channels: Channels of a head.

    Attributes:
        inverse_frequencies: `[r / 2]` float32, radians per position.
        long_inverse_frequencies: `[r / 2]` float32, those of documents longer than `switch`; None for the same.
        switch: Longest document, in tokens, with the first kind; None without another.
        factor: What cosines and sines are multiplied with.
    """

    def __init__(self, config: PretrainedConfig, head_channels: int) -> None:
        rope = rope_parameters(config)
        self.long_inverse_frequencies: torch.Tensor | None = None
        self.switch: int | None = None
        self.factor = 1.0
        if rope["rope_type"] == "default":
            share = rope.get("partial_rotary_factor", 1.0) if family_of(config).partial_rotary else 1.0
            channels = int(head_channels * share)
            exponents = torch.arange(0, channels, 2, dtype=torch.float32) / channels
            self.inverse_frequencies = 1.0 / (rope["rope_theta"] ** exponents)
            return
        compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        self.inverse_frequencies, self.factor = compute(config, torch.device("cpu"))
        if rope["rope_type"] == "longrope":
            self.switch = int(rope["original_max_position_embeddings"])
            self.long_inverse_frequencies, _ = compute(config, torch.device("cpu"), seq_len=self.switch + 1)

    @property
    def depends_on_length(self) -> bool:
        """Whether documents of different lengths have different tables, or one that Megatron's does not know."""
        return self.switch is not None or self.factor != 1.0

    def table(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return cosines, then sines, of the angles of each token, `[T, 1, 1, r]` float32; see `pointwise.rotate`.

        Args:
            positions: `[T]` int64, places of the tokens in their documents.
            lengths: `[T]` int64, tokens of their documents.
        """
        where = positions.float()[:, None]
        # once: each copy from ordinary memory would wait for the device
        self.inverse_frequencies = self.inverse_frequencies.to(where.device)
        angles = where * self.inverse_frequencies
        if self.long_inverse_frequencies is not None:
            self.long_inverse_frequencies = self.long_inverse_frequencies.to(where.device)
            is_long = (lengths > self.switch)[:, None]
            angles = torch.where(is_long, where * self.long_inverse_frequencies, angles)
        return (torch.cat([angles.cos(), angles.sin()], dim=-1) * self.factor)[:, None, None]
