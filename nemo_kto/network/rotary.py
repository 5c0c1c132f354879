"""Rotary embeddings (arXiv 2104.09864) in transformers' kinds, by each token's position in its own document.

Tensor legend: `T` tokens of a packed row on this rank, `r` channels of a head that are rotated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.family import Refusals

SUPPORTED_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""`dynamic` has other frequencies in documents longer than `max_position_embeddings` only, which do not exist here."""

_CPU = torch.device("cpu")

_SECTIONS = (16, 24, 24)


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary embedding's parameters, into which transformers has put those of older configurations."""
    rope = dict(config.rope_parameters or {})
    if family_of(config).rotary_by_layer_type and "rope_type" in rope:
        # transformers 5.8 takes what an older configuration says of full attention (OLMo 3) for all layers, and adds
        # such a default to parameters that have kinds; later ones do as the authors' own code
        usual = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        kinds = {kind: rope[kind] for kind in config.layer_types if kind in rope}
        return kinds or {"full_attention": rope, "sliding_attention": usual}
    return rope


def _entries(config: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Return kind of layer -> its parameters, for the kinds that there are; of None where all have the same."""
    rope = rope_parameters(config)
    if not family_of(config).rotary_by_layer_type:
        return {None: rope}
    return {kind: rope.get(kind) or {} for kind in sorted(set(config.layer_types))}


def unsupported_fields(config: PretrainedConfig) -> Refusals:
    """Return what cannot be expressed here of a model's rotary embedding."""
    found: Refusals = {}
    partial = family_of(config).partial_rotary
    for kind, rope in _entries(config).items():
        name = "rope_parameters" if kind is None else f"rope_parameters.{kind}"
        if "rope_type" not in rope or any(isinstance(value, dict) for value in rope.values()):
            found[name] = (rope, "A rope_type is needed, and one for all layers in most architectures.")
            continue
        if rope["rope_type"] not in SUPPORTED_TYPES:
            found[f"{name}.rope_type"] = (rope["rope_type"], f"Supported are {', '.join(SUPPORTED_TYPES)}.")
        factor = rope.get("partial_rotary_factor")
        # a "proportional" embedding has angles for all channels, of which some are zero
        if not partial and factor not in (None, 1.0) and rope["rope_type"] != "proportional":
            found[f"{name}.partial_rotary_factor"] = (factor, "This architecture rotates all channels of a head.")
        sections, angles = _sections(config, rope), dimensions_of(config).head_channels // 2
        if sections and sum(sections) != angles:
            found[f"{name}.mrope_section"] = (list(sections), f"The sections have {angles} angles together.")
    return found


def _sections(config: PretrainedConfig, rope: dict[str, Any]) -> tuple[int, ...]:
    """Return how many angles of a model, a section behind the other, go by time, rows, columns, time again ...

    None where a token has one position. Those that are not named are transformers' own.
    """
    return tuple(rope.get("mrope_section", _SECTIONS)) if family_of(config).rotary_sections else ()


def _axes(config: PretrainedConfig, rope: dict[str, Any]) -> torch.Tensor | None:
    """Return by which of three positions each angle goes, `[r / 2]` int64; None where a token has one."""
    sections = _sections(config, rope)
    if not sections:
        return None
    return torch.arange(len(sections)).remainder(3).repeat_interleave(torch.tensor(sections))


@dataclass(frozen=True, kw_only=True)
class _Frequencies:
    """The rotary embedding of a kind of layers.

    Attributes:
        usual: `[r / 2]` float32, radians per position.
        long: `[r / 2]` float32, those of documents longer than `switch`; None for the same.
        switch: Longest document, in tokens, with the first kind; None without another.
        factor: What cosines and sines are multiplied with.
        axes: `[r / 2]` int64, whether it is multiplied with a position in time, 0, rows or columns; None where a token
            has one position.
    """

    usual: torch.Tensor
    long: torch.Tensor | None = None
    switch: int | None = None
    factor: float = 1.0
    axes: torch.Tensor | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, head_channels: int, kind: str | None, rope: dict[str, Any]) -> _Frequencies:
        """Return those that transformers computes of the parameters `rope` of a kind of layers."""
        if rope["rope_type"] == "default":
            share = (rope.get("partial_rotary_factor") or 1.0) if family_of(config).partial_rotary else 1.0
            channels = int(head_channels * share)
            exponents = torch.arange(0, channels, 2, dtype=torch.float32) / channels
            return cls(usual=1.0 / (rope["rope_theta"] ** exponents), axes=_axes(config, rope))
        compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        usual, factor = compute(config, _CPU, layer_type=kind)
        if rope["rope_type"] != "longrope":
            return cls(usual=usual, factor=factor, axes=_axes(config, rope))
        switch = int(rope["original_max_position_embeddings"])
        long, _ = compute(config, _CPU, seq_len=switch + 1, layer_type=kind)
        return cls(usual=usual, long=long, switch=switch, factor=factor)

    def on(self, device: torch.device) -> _Frequencies:
        """Return them on a device; themselves if they are there."""
        if self.usual.device == device:
            return self
        tensors = {"usual": self.usual, "long": self.long, "axes": self.axes}
        return replace(
            self, **{name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
        )

    def table(
        self, positions: torch.Tensor, lengths: torch.Tensor, in_images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return cosines, then sines, `[T, r]` float32; see `RotaryEmbedding.table`."""
        where = positions.float()[:, None]
        if in_images is not None:
            assert self.axes is not None, "no family but those with mrope_section has such positions"
            where = in_images.float()[self.axes].T
        angles = where * self.usual
        if self.long is not None:
            is_long = (lengths > self.switch)[:, None]
            angles = torch.where(is_long, where * self.long, angles)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * self.factor


@dataclass(frozen=True)
class _QueryScale:
    """The factors of Llama 4's queries: 1 + beta log(1 + floor(position / length)).

    Attributes:
        beta: How fast they grow.
        length: They are 1 before this position.
    """

    beta: float
    length: int

    def factors(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the factors `[T]` float32 of queries at these positions."""
        return 1 + self.beta * torch.log1p(positions.div(self.length, rounding_mode="floor").float())


class RotaryEmbedding:
    """The rotary embedding of a model.

    Args:
        config: The model's configuration.
        head_channels: Channels of a head.

    Attributes:
        tables_of_layers: Which of the tables each layer takes; None where there is one.
        switches: Lengths of documents, in tokens, beyond which tables have other frequencies.
    """

    def __init__(self, config: PretrainedConfig, head_channels: int) -> None:
        entries = _entries(config)
        settled = copy.copy(config)
        settled.rope_parameters = rope_parameters(config)  # which transformers looks up by the kind of layer
        self._kinds = [_Frequencies.of(settled, head_channels, kind, rope) for kind, rope in entries.items()]
        self.tables_of_layers: tuple[int, ...] | None = None
        if len(entries) > 1:
            self.tables_of_layers = tuple(list(entries).index(kind) for kind in config.layer_types)
        self._query_scale: _QueryScale | None = None
        if family_of(config).rotary_scales_queries:
            rope = rope_parameters(config)
            self._query_scale = _QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
        self.switches = frozenset(kind.switch for kind in self._kinds if kind.switch is not None)

    @property
    def inverse_frequencies(self) -> torch.Tensor:
        """`[r / 2]` float32, radians per position, where Megatron's own embedding will do."""
        return self._kinds[0].usual

    @property
    def is_beyond_megatron(self) -> bool:
        """Whether tables depend on a document's length, differ between layers or for queries, or have a factor."""
        kinds = self._kinds
        return len(kinds) > 1 or bool(self.switches) or kinds[0].factor != 1.0 or self._query_scale is not None

    @property
    def has_sections(self) -> bool:
        """Whether tokens of images have positions in time, rows and columns."""
        return self._kinds[0].axes is not None

    def table(
        self, positions: torch.Tensor, lengths: torch.Tensor, in_images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return cosines, then sines, of the angles of each token, float32; see `pointwise.rotate`.

        Args:
            positions: `[T]` int64, places of the tokens in their documents.
            lengths: `[T]` int64, tokens of their documents.
            in_images: `[3, T]` int64, positions in time, rows and columns; None where all are `positions`.

        Returns:
            `[T, 1, 1, r]`; where layers have different tables `[tables, T, 1, 1, r]`; where queries have a factor
            `[2, T, 1, 1, r]`, for keys and for queries.
        """
        # once: each copy from ordinary memory would wait for the device
        self._kinds = [kind.on(positions.device) for kind in self._kinds]
        tables = torch.stack([kind.table(positions, lengths, in_images) for kind in self._kinds])[:, :, None, None]
        if self._query_scale is not None:
            return torch.cat([tables, tables * self._query_scale.factors(positions)[:, None, None, None]])
        return tables[0] if self.tables_of_layers is None else tables
