"""What a rank takes of its GPU's memory in a training step, by formula: in no time, for any model.

Weights, gradients and optimizer's state are counted (`counts.py`). Activations follow Korthikanti et al.
(arXiv 2205.05198, section 4): what each layer keeps of a token for the backward pass, times the tokens of a row, times
the rows that a pipeline stage holds at once. What this package's layers keep is less than there: norms, SwiGLU and
rotary embedding keep what goes in (`algorithms/pointwise.py`), attention no scores, and the output layer is applied at
responses only. Experts are taken to get equally many tokens. `runs.memory.step_memory` finds the same by running the
step, which takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from nemo_kto.algorithms.logprobs import LOGITS_MEMORY
from nemo_kto.config.schema import KTOConfig, OptimConfig
from nemo_kto.kto.reference import ReferenceSettings
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import Dimensions
from nemo_kto.network.projections import LoRASettings, adapted_modules, linear_layers, linear_of, place_in_layer
from nemo_kto.planning.counts import ModelParts
from nemo_kto.runs.memory import Rows
from nemo_kto.runs.model import params_dtype_of
from nemo_kto.runtime.frugal_adam import AT_ONCE
from nemo_kto.runtime.layout import Layout, stage_layers
from nemo_kto.weights.adapter_tensors import linear_sizes


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: Parameters, adapters included.
        gradients: Their buffers, in float32.
        optimizer: Adam's moments, and float32 copies of parameters that are no float32, but for what the host has.
        reference: A `resident` reference.
        activations: What the step's greatest peak has besides.
        update: What the optimizer's update has besides, when activations are gone.
        host: What a `cpu_swap` reference takes of the host's memory.
        host_optimizer: What state of the optimizer takes of it, and what gradients and parameters pass through.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    update: int = 0
    host: int = 0
    host_optimizer: int = 0

    @property
    def held(self) -> int:
        """Return the bytes of the GPU between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """Return the most bytes of the GPU within a step."""
        return self.held + self.activations


def moments_bytes(optim: OptimConfig) -> int:
    """Return the bytes of a trained parameter's two running means."""
    return 2 * getattr(torch, optim.states).itemsize  # type: ignore[no-any-return]


def held_memory(
    config: KTOConfig, parts: ModelParts, layout: Layout, stage: int, reference: ReferenceSettings
) -> RankMemory:
    """Return what a rank of a pipeline stage holds between steps; its activations are 0.

    Args:
        config: The run's configuration, for precision and the optimizer.
        parts: The model's parameters.
        layout: The checked layout.
        stage: Which of its pipeline stages.
        reference: How the reference is held.
    """
    part = parts.of_stage(layout, stage)
    size = params_dtype_of(config).itemsize
    outside, experts = part.trained.outside_experts(layout), part.trained.in_experts(layout)
    # of replicas each has a share of the optimizer's state; context-parallel ranks are replicas of weights as well
    replicas = layout.data * layout.context
    expert_replicas = layout.world_size // (layout.pipeline * layout.expert * layout.expert_tensor_size)
    numbers = -(-outside // replicas) - (-experts // expert_replicas)
    on_host = round(config.model.optim.offload_fraction * numbers)
    moments = moments_bytes(config.model.optim)
    # as `Weights.live_reference`: beside adapters only another model is copied whole
    copy = (part.trained if reference.model_folder is None else part.all).of_rank(layout) * size
    return RankMemory(
        weights=part.bytes_of_rank(layout, size),
        gradients=4 * (outside + experts),
        optimizer=(moments + (4 if size < 4 else 0)) * (numbers - on_host),
        reference=copy if reference.mode == "resident" else 0,
        activations=0,
        update=0 if moments == 8 else 8 * min(numbers - on_host, AT_ONCE),  # moments in float32, for the moment
        host=copy if reference.mode == "cpu_swap" else 0,
        host_optimizer=(moments + 4) * on_host + 2 * 4 * min(on_host, AT_ONCE),
    )


@dataclass(frozen=True)
class LayerAdapters:
    """What a layer's adapters keep for the backward pass.

    Attributes:
        ranks: Their ranks, added up.
        divided: With DoRA, outputs of the linear layers that they are beside and whose outputs ranks share.
        whole: With DoRA, those of the others.
    """

    ranks: int
    divided: int
    whole: int


def adapters_by_layer(lora: LoRASettings | None, hf_config: PretrainedConfig) -> dict[int, LayerAdapters]:
    """Return the number of each layer with adapters -> what they keep."""
    if lora is None:
        return {}
    sizes, channels, parts = dimensions_of(hf_config), linear_sizes(hf_config), linear_layers(hf_config)
    found = {}
    for layer in lora.layers:
        modules = adapted_modules(lora, hf_config, [layer])
        beside = {linear_of(projection, sizes): projection for _, projection in modules} if lora.dora else {}
        outputs = {"divided": 0, "whole": 0}
        for linear, projection in beside.items():
            _, adapter = place_in_layer(projection, layer, sizes)
            block = adapter.removesuffix(projection)
            outputs["whole" if linear in _WHOLE_OUTPUTS else "divided"] += sum(
                channels[block + part][0] for part in parts[linear]
            )
        found[layer] = LayerAdapters(ranks=sum(map(lora.rank_of, modules.values())), **outputs)
    return found


_WHOLE_OUTPUTS = (
    "self_attention.linear_proj",
    "mlp.linear_fc2",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_kv_down_proj",
)
"""Linear layers whose outputs every tensor-parallel rank has, with sequence parallelism of its tokens."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a model's step keeps and makes, of a rank under a layout.

    Attributes:
        config: The run's configuration.
        sizes: The model's.
        fields: What its family says of it, as Megatron has it.
        layout: The checked layout.
        lora: The adapters that are trained; None for the whole model.
        adapters: What `adapters_by_layer` has found of them.
    """

    config: KTOConfig
    sizes: Dimensions
    fields: Mapping[str, Any]
    layout: Layout
    lora: LoRASettings | None
    adapters: Mapping[int, LayerAdapters]

    def peak(self, stage: int, rows: Rows) -> int:
        """Return the bytes that the training pass takes at its peak besides what is held.

        Args:
            stage: Which of the layout's pipeline stages.
            rows: The rank's micro-batches, see `Rows`.
        """
        layout = self.layout
        tokens = max(sum(map(sum, row)) for row in rows) // layout.context
        responses = max(sum(response for _, response in row) for row in rows) // layout.context
        layers = stage_layers(layout, self.sizes.layers)[stage]
        kept = self._kept_by_stage(layers) * self._rows_at_once(stage, len(rows)) * tokens
        passing = self._in_passing(tokens, layers)
        if stage == layout.pipeline - 1:  # the output layer is done before the layers' backward passes begin
            passing = max(passing, self._head(tokens, responses))
        stays = 2 * tokens * self.sizes.hidden if layout.sequence else 0  # see `StepMemory.optimizer`
        return kept + passing + stays

    def _rows_at_once(self, stage: int, rows: int) -> float:
        """Return how many rows a stage keeps activations of at once (1F1B; arXiv 2104.04473, section 2.2)."""
        layout = self.layout
        if layout.virtual == 1:
            return min(layout.pipeline - stage, rows)
        chunks = 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline + 1
        return min(chunks / layout.virtual, rows)

    def _kept_by_stage(self, layers: list[int]) -> float:
        """Return the bytes of a token that the layers of a stage keep."""
        model = self.config.model
        if model.activations_checkpoint_granularity != "full":
            return sum(map(self._kept, layers))
        group = model.activations_checkpoint_num_layers or 1
        if model.activations_checkpoint_method == "uniform":
            return len(layers) / group * self._hidden()
        again = group * self.layout.virtual
        return again * self._hidden() + sum(map(self._kept, layers[again:]))

    def _in_passing(self, tokens: int, layers: list[int]) -> float:
        """Return the bytes that a layer's backward pass has for itself: gradients, gathered tokens, what it redoes."""
        again = 0.0
        if self.config.model.activations_checkpoint_granularity == "full":
            group = self.config.model.activations_checkpoint_num_layers or 1
            uniform = self.config.model.activations_checkpoint_method == "uniform"
            again = sum(sorted(map(self._kept, layers))[-(group if uniform else 1) :])
        return tokens * (again + max(map(self._gradients, layers))) + self._weight_gradient()

    def _kept(self, layer: int) -> float:
        """Return the bytes of a token that a layer keeps: what goes into products, norms and attention."""
        kept = sum(self._has_gradient(layer, name) for name in ("self_attention.linear_qkv", "mlp.linear_fc1"))
        kept += 2 if self.fields.get("norms_before", True) else 0  # what goes into a norm, beside what comes of it
        kept += 2 if self.fields.get("norms_after") else 0
        return kept * self._hidden() + self._size * (
            self._of_attention(layer) + self._of_feed_forward(layer) + self._of_adapters(layer)
        )

    def _of_adapters(self, layer: int) -> float:
        """Return the numbers of a token that adapters keep: inner channels, with DoRA what magnitudes multiply."""
        if self.lora is None or layer not in self.lora.layers:
            return 0.0
        kept = self.adapters[layer]
        whole = kept.whole / (self.layout.tensor if self.layout.sequence else 1)
        return kept.ranks + whole + kept.divided / self.layout.tensor

    def _has_gradient(self, layer: int, linear: str) -> bool:
        """Return whether a layer's linear layer is trained, or adapters beside it: then what goes into it is kept."""
        if self.lora is None:
            return True
        if layer not in self.lora.layers:
            return False
        latent = linear == "self_attention.linear_qkv" and self.sizes.latent is not None
        return latent or linear in {linear_of(projection, self.sizes) for projection in self.lora.projections}

    @property
    def _documents_are_joined(self) -> bool:
        """Whether rows may have several documents."""
        return self.config.model.micro_batch_tokens is not None or self.config.model.micro_batch_size > 1

    @property
    def _size(self) -> int:
        return params_dtype_of(self.config).itemsize

    def _hidden(self) -> float:
        """Return the bytes of a token's hidden state, of which sequence parallelism leaves a rank a part."""
        return self._size * self.sizes.hidden / (self.layout.tensor if self.layout.sequence else 1)

    def _of_attention(self, layer: int) -> float:
        """Return the numbers of a token that attention keeps: queries, keys, values and its output."""
        sizes, tensor = self.sizes, self.layout.tensor
        if layer not in sizes.attention_layers:
            assert sizes.delta is not None
            delta = sizes.delta
            keys, values = delta.key_heads * delta.key_channels, delta.value_heads * delta.value_channels
            # before and behind the convolution, and in it; gate, output, and what its norm makes of that
            return (3 * (2 * keys + values) + 4 * values) / tensor
        if sizes.latent is not None:
            latent = sizes.latent
            compressed = 2 * ((latent.queries or 0) + latent.keys_and_values) + latent.rotated
            return compressed + sizes.heads * (3 * latent.scored + latent.values) / tensor
        queries, keys = sizes.heads * sizes.head_channels, sizes.groups * sizes.head_channels
        total = 2 * queries + 2 * keys + sizes.heads * 4 / self._size
        if self._documents_are_joined and self._has_gradient(layer, "self_attention.linear_proj"):
            total += queries  # the outputs of documents are kept apart by attention, and joined by what comes behind
        if sizes.head_norms:
            total += queries + keys
        if sizes.output_gates:
            total += 2 * queries
        return total / tensor

    def _of_feed_forward(self, layer: int) -> float:
        """Return the numbers of a token that a feed-forward part keeps: gates and units, and their product."""
        sizes, layout = self.sizes, self.layout
        if layer in sizes.dense_layers:
            kept = 1 + self.fields.get("gated_linear_unit", True) + self._has_gradient(layer, "mlp.linear_fc2")
            return kept * sizes.feed_forward / layout.tensor
        mixture = sizes.mixture
        assert mixture is not None
        sequence = layout.tensor if layout.sequence else 1
        etp = layout.expert_tensor_size
        # tokens sent and received, in the order of the experts; logits and probabilities are float32
        routed = (
            mixture.chosen * (3 * sizes.hidden * etp + 3 * mixture.feed_forward) + 2 * mixture.experts * 4 / self._size
        )
        shared = 0 if mixture.shared is None else 3 * mixture.shared.feed_forward
        return routed / sequence + shared / layout.tensor

    def _gradients(self, layer: int) -> float:
        """Return the bytes of a token that the gradients of a feed-forward part have, and what is gathered for it."""
        return self._size * (2 * self.sizes.hidden) + self._size * self._of_feed_forward(layer)

    def _weight_gradient(self) -> float:
        """Return the bytes of the greatest weight's gradient, before it is added to what there is."""
        if self.lora is not None and self.lora.base is None:
            return 0
        # beside adapters that is what a frozen matrix is made plain in
        return self._size * 2 * self.sizes.hidden * self.sizes.feed_forward / self.layout.tensor

    def _head(self, tokens: int, responses: int) -> float:
        """Return the bytes that the output layer takes (`algorithms/logprobs.py`)."""
        sizes, layout = self.sizes, self.layout
        rows = -(-sizes.vocabulary // layout.tensor)
        logits = min(LOGITS_MEMORY, responses * rows * (4 + self._size))
        is_trained = self.lora is None or "lm_head" in self.lora.whole
        weight = rows * sizes.hidden * (4 + self._size) if is_trained else 0
        return logits + weight + self._size * sizes.hidden * (tokens + 2 * responses)
