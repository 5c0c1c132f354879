"""How many parameters a rank of a layout has, counted on the very model that it would train, without memory for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import Dimensions
from nemo_kto.network.gpt import build_gpt
from nemo_kto.network.lora import add_adapters
from nemo_kto.network.projections import LoRASettings, adapted_modules
from nemo_kto.network.quantised_weight import QuantisedWeight
from nemo_kto.runs.model import params_dtype_of, vision_to_plan
from nemo_kto.runtime.dry_run import alone
from nemo_kto.runtime.layout import Layout, stage_layers


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by who shares them.

    Attributes:
        whole: Those that each tensor-parallel rank has.
        divided: Those that tensor-parallel ranks share.
        experts: Those of experts, which expert-parallel ranks share, and the tensor-parallel ranks of experts.
    """

    whole: int = 0
    divided: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.whole + other.whole, self.divided + other.divided, self.experts + other.experts)

    @property
    def all(self) -> int:
        """Return how many there are in one model."""
        return self.whole + self.divided + self.experts

    def of_rank(self, layout: Layout) -> int:
        """Return how many a rank has of them."""
        return self.outside_experts(layout) + self.in_experts(layout)

    def outside_experts(self, layout: Layout) -> int:
        """Return how many a rank has of those that are no expert's."""
        return self.whole + self.divided // layout.tensor

    def in_experts(self, layout: Layout) -> int:
        """Return how many a rank has of the experts'."""
        return self.experts // (layout.expert * layout.expert_tensor_size)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of a part of a model.

    Attributes:
        trained: Those that are trained.
        frozen: Those that are not.
        quantised: Those among these that are kept in fewer bits.
        quantised_bytes: The bytes they take.
    """

    trained: Parameters = field(default_factory=Parameters)
    frozen: Parameters = field(default_factory=Parameters)
    quantised: Parameters = field(default_factory=Parameters)
    quantised_bytes: Parameters = field(default_factory=Parameters)

    def __add__(self, other: Part) -> Part:
        return Part(
            trained=self.trained + other.trained,
            frozen=self.frozen + other.frozen,
            quantised=self.quantised + other.quantised,
            quantised_bytes=self.quantised_bytes + other.quantised_bytes,
        )

    @property
    def all(self) -> Parameters:
        """Return all parameters."""
        return self.trained + self.frozen

    def bytes_of_rank(self, layout: Layout, size: int) -> int:
        """Return what a rank's share takes, with numbers of so many bytes."""
        plain = self.all.of_rank(layout) - self.quantised.of_rank(layout)
        return plain * size + self.quantised_bytes.of_rank(layout)


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """A model's parameters, part by part.

    Attributes:
        embedding: The embedding, and what sees images.
        output: The last norm, and the output layer if it is another matrix than the embedding.
        layers: Each layer.
        tied: The output layer where it is the embedding, which the last stage then has a copy of.
    """

    embedding: Part
    output: Part
    layers: tuple[Part, ...]
    tied: Part

    @property
    def whole(self) -> Part:
        """Return all of it, once."""
        return sum((*self.layers, self.output), self.embedding)

    def of_stage(self, layout: Layout, stage: int) -> Part:
        """Return what a pipeline stage has."""
        total = sum((self.layers[layer] for layer in stage_layers(layout, len(self.layers))[stage]), Part())
        if stage == 0:
            total += self.embedding
        if stage == layout.pipeline - 1:
            total += self.output
            if stage > 0:
                total += self.tied
        return total


def parts_of(config: KTOConfig, hf_config: PretrainedConfig, lora: LoRASettings | None) -> ModelParts:
    """Return the parameters of a model, of which one layer of each kind is built; it takes a second or two.

    Args:
        config: The run's configuration, for dtype and padding of the vocabulary.
        hf_config: The model's.
        lora: The adapters that are trained; None for the whole model.

    Raises:
        ConfigError: See `alone`.
    """
    sizes = dimensions_of(hf_config)
    apart = Layout(world_size=sizes.layers, pipeline=sizes.layers)
    last = sizes.layers - 1
    kinds = [_kind(hf_config, sizes, lora, layer) for layer in range(sizes.layers)]
    built = {
        layer: list(_parameters(config, hf_config, lora, apart, layer))
        for layer in {0, last, *(kinds.index(kind) for kind in set(kinds))}
    }

    def total(layer: int, *prefixes: str) -> Part:
        return sum((part for name, part in built[layer] if name.startswith(prefixes)), Part())

    head = total(last, "output_layer.")  # of a tied model this is the embedding
    norm = total(last, "decoder.final_layernorm.")
    return ModelParts(
        embedding=total(0, "embedding.", "vision."),
        layers=tuple(total(kinds.index(kind), "decoder.layers.") for kind in kinds),
        output=norm if sizes.tied else norm + head,
        tied=head if sizes.tied else Part(),
    )


def _kind(hf_config: PretrainedConfig, sizes: Dimensions, lora: LoRASettings | None, layer: int) -> tuple[Any, ...]:
    """Return what the parameters of a layer depend on."""
    adapted = {} if lora is None else adapted_modules(lora, hf_config, [layer])
    ranks = tuple((name, lora.rank_of(module)) for (_, name), module in adapted.items()) if lora is not None else ()
    return (layer in sizes.dense_layers, layer in sizes.attention_layers, ranks)


def _parameters(
    config: KTOConfig, hf_config: PretrainedConfig, lora: LoRASettings | None, layout: Layout, rank: int
) -> Iterator[tuple[str, Part]]:
    """Yield the name of each parameter of a rank, and the parameter as a part of its own."""
    with alone(layout, rank):
        for chunk in range(layout.virtual):
            model = build_gpt(
                hf_config,
                layout,
                chunk=chunk,
                transformer_impl="local",
                vocab_pad_multiple=config.model.make_vocab_size_divisible_by,
                params_dtype=params_dtype_of(config),
                unfused=lora is not None,
                quantised=None if lora is None else lora.base,
                vision=vision_to_plan(config, hf_config),
            )
            if lora is not None:
                add_adapters(model, lora)
            for name, parameter in model.named_parameters():
                kind = "divided" if getattr(parameter, "tensor_model_parallel", False) else "whole"
                kind = "experts" if ".experts." in name else kind
                each = Parameters(**{kind: parameter.numel()})
                if isinstance(parameter, QuantisedWeight):
                    taken = Parameters(**{kind: parameter.format.bytes_of(*parameter.shape)})
                    yield name, Part(frozen=each, quantised=each, quantised_bytes=taken)
                else:
                    yield name, Part(trained=each) if parameter.requires_grad else Part(frozen=each)
