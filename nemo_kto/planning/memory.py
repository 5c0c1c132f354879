"""What a rank takes of its GPU's memory in a training step, by formula: in no time, for any model.

Weights, gradients and optimizer's state are counted (`counts.py`). Activations follow Korthikanti et al.
(arXiv 2205.05198, section 4): what each layer keeps of a token for the backward pass, times the tokens of a row, times the
rows that a pipeline stage holds at once. What this package's layers keep is less than there: norms, SwiGLU and rotary
embedding keep what goes in (`algorithms/pointwise.py`), attention no scores, and the output layer is applied at
responses only. `runs.memory.step_memory` finds the same by running the step, which takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from nemo_kto.algorithms.logprobs import LOGITS_MEMORY
from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.family import Dimensions
from nemo_kto.network.projections import LoRASettings
from nemo_kto.planning.counts import ModelParts
from nemo_kto.runs.memory import Rows
from nemo_kto.runs.model import params_dtype_of
from nemo_kto.runtime.layout import Layout, stage_layers


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        weights: Parameters, adapters included.
        gradients: Their buffers, in float32.
        optimizer: Adam's moments, and float32 copies of parameters that are no float32.
        reference: A `resident` reference.
        activations: What the step's greatest peak has besides.
        host: What a `cpu_swap` reference takes of the host's memory.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    host: int = 0

    @property
    def held(self) -> int:
        """Return the bytes of the GPU between steps."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> int:
        """Return the most bytes of the GPU within a step."""
        return self.held + self.activations


def held_memory(
    config: KTOConfig, parts: ModelParts, layout: Layout, stage: int, reference: str
) -> RankMemory:
    """Return what a rank of a pipeline stage holds between steps; its activations are 0.

    Args:
        config: The run's configuration, for precision.
        parts: The model's parameters.
        layout: The checked layout.
        stage: Which of its pipeline stages.
        reference: How the reference is held, as `model.kto.reference.mode` has it.
    """
    part = parts.of_stage(layout, stage)
    size = params_dtype_of(config).itemsize
    all_of_rank = part.all.of_rank(layout)
    outside, experts = part.trained.outside_experts(layout), part.trained.in_experts(layout)
    # of replicas each has a share of the optimizer's state; context-parallel ranks are replicas of weights as well
    replicas = layout.data * layout.context
    expert_replicas = layout.world_size // (layout.pipeline * layout.expert * layout.expert_tensor_size)
    state = 8 + (4 if size < 4 else 0)
    copy = part.trained.of_rank(layout) * size
    return RankMemory(
        weights=all_of_rank * size,
        gradients=4 * (outside + experts),
        optimizer=state * (-(-outside // replicas) - (-experts // expert_replicas)),
        reference=copy if reference == "resident" else 0,
        activations=0,
        host=copy if reference == "cpu_swap" else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a model's step keeps and makes, of a rank under a layout.

    Attributes:
        config: The run's configuration.
        sizes: The model's.
        layout: The checked layout.
        lora: Whether adapters are trained, not the model.
    """

    config: KTOConfig
    sizes: Dimensions
    layout: Layout
    lora: bool

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
        total = kept + self._in_passing(tokens, layers)
        if layout.sequence:
            total += 2 * tokens * self.sizes.hidden  # see `StepMemory.optimizer`
        if stage == layout.pipeline - 1:
            total += self._head(tokens, responses)
        return total

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
        sizes, norms = self.sizes, 4  # what goes into two norms, and what comes of them
        return norms * self._hidden() + self._size * (self._of_attention(layer) + self._of_feed_forward(layer))

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
        if sizes.head_norms:
            total += queries + keys
        if sizes.output_gates:
            total += 2 * queries
        return total / tensor

    def _of_feed_forward(self, layer: int) -> float:
        """Return the numbers of a token that a feed-forward part keeps: gates and units, and their product."""
        sizes, layout = self.sizes, self.layout
        if layer in sizes.dense_layers:
            return 3 * sizes.feed_forward / layout.tensor
        mixture = sizes.mixture
        assert mixture is not None
        sequence = layout.tensor if layout.sequence else 1
        etp = layout.expert_tensor_size
        # tokens sent and received, in the order of the experts; logits and probabilities are float32
        routed = mixture.chosen * (3 * sizes.hidden * etp + 3 * mixture.feed_forward) + 2 * mixture.experts * 4 / self._size
        shared = 0 if mixture.shared is None else 3 * mixture.shared.feed_forward
        return routed / sequence + shared / layout.tensor

    def _gradients(self, layer: int) -> float:
        """Return the bytes of a token that the gradients of a feed-forward part have, and what is gathered for it."""
        return self._size * (2 * self.sizes.hidden) + self._size * self._of_feed_forward(layer)

    def _weight_gradient(self) -> float:
        """Return the bytes of the greatest weight's gradient, before it is added to what there is."""
        if self.lora:
            return 0
        return self._size * 2 * self.sizes.hidden * self.sizes.feed_forward / self.layout.tensor

    def _head(self, tokens: int, responses: int) -> float:
        """Return the bytes that the output layer takes (`algorithms/logprobs.py`)."""
        sizes, layout = self.sizes, self.layout
        rows = -(-sizes.vocabulary // layout.tensor)
        logits = min(LOGITS_MEMORY, responses * rows * (4 + self._size))
        weight = 0 if self.lora else rows * sizes.hidden * (4 + self._size)
        return logits + weight + self._size * sizes.hidden * (tokens + 2 * responses)
