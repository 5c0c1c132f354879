"""How long a training step would take on GPUs that are not at hand, and what it sends over which links.

An estimate, to rank layouts with: operations (`network/flops.py`) over the GPU's peak, bytes over the bandwidth of the
link that carries them, and the pipeline's bubble (arXiv 2104.04473, section 2.2). Nothing is taken to overlap. Of
peaks a share is reached, see the constants; they are assumptions, not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_kto.config.schema import KTOConfig
from nemo_kto.network.family import Dimensions
from nemo_kto.network.flops import ModelFlops
from nemo_kto.planning.counts import ModelParts
from nemo_kto.planning.memory import RankMemory, moments_bytes
from nemo_kto.runs.layout import kl_fraction
from nemo_kto.runs.model import params_dtype_of
from nemo_kto.runtime.devices import Device
from nemo_kto.runtime.layout import Layout, stage_sizes

OF_PEAK = 0.55
"""Share of the GPU's peak that a stage's own passes reach, communication apart."""
OF_LINKS = 0.7
"""Share of a link's bandwidth that collectives reach."""
HOST_BANDWIDTH = 25e9
"""Bytes per second between a GPU and its host's memory, in each direction; and between that and its processors."""


@dataclass(frozen=True, kw_only=True)
class DocumentFlops:
    """Operations of a document of average length, half of which is its response.

    Attributes:
        layers: Of a forward pass, in the layers.
        forward: With the output layer.
        layers_backward: Of a backward pass, in the layers.
        backward: With the output layer.
    """

    layers: int
    forward: int
    layers_backward: int
    backward: int

    @classmethod
    def of(cls, flops: ModelFlops, length: int) -> DocumentFlops:
        """Return those of a model.

        Args:
            flops: Counts its operations.
            length: Tokens of the document.
        """
        responses = length // 2
        return cls(
            layers=flops.forward([length], 0),
            forward=flops.forward([length], responses),
            layers_backward=flops.backward([length], 0),
            backward=flops.backward([length], responses),
        )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on its slowest rank, by what they are spent on.

    Attributes:
        training: Operations of the pass that makes gradients, of what is recomputed too.
        scoring: Those of the passes of KL set and reference.
        plain: Making plain numbers of weights in fewer bits, in each pass of each row.
        tensor: Exchange among tensor-parallel ranks.
        context: Among context-parallel ranks.
        experts: Among expert-parallel ranks.
        pipeline: Hidden states sent from stage to stage.
        bubble: Waiting for other stages.
        gradients: Summing up gradients over replicas.
        parameters: Gathering updated parameters from replicas.
        reference: Exchanging weights with the host's memory, for `cpu_swap`.
        optimizer: Reading gradients, reading and writing state, on the GPU and its host; and what goes between them.
    """

    training: float
    scoring: float
    plain: float
    tensor: float
    context: float
    experts: float
    pipeline: float
    bubble: float
    gradients: float
    parameters: float
    reference: float
    optimizer: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a rank sends in a step.

    Attributes:
        kind: Whose exchange it is: `tensor`, `context`, `experts`, `pipeline`, `gradients` or `parameters`.
        bytes: How much.
        within_node: Whether it stays inside of a node.
    """

    kind: str
    bytes: float
    within_node: bool


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Estimates of a layout's step.

    Attributes:
        config: The run's configuration.
        sizes: The model's.
        flops: Operations of a document.
        parts: Its parameters.
        layout: The checked layout.
        device: The GPUs.
        node_size: How many of them a node has.
        length: Tokens of a document on average.
        reference: How the reference is held, as `model.kto.reference.mode` has it.
    """

    config: KTOConfig
    sizes: Dimensions
    flops: DocumentFlops
    parts: ModelParts
    layout: Layout
    device: Device
    node_size: int
    length: int
    reference: str

    @property
    def documents(self) -> int:
        """Return the documents of a data-parallel rank."""
        return self.config.model.global_batch_size // self.layout.data

    @property
    def rows(self) -> int:
        """Return the micro-batches of a data-parallel rank."""
        model = self.config.model
        at_once = model.micro_batch_size
        if model.micro_batch_tokens is not None:
            at_once = max(model.micro_batch_tokens // self.length, 1)
        return max(-(-self.documents // at_once), 1)

    @property
    def _scored(self) -> float:
        """Return how many documents the passes without gradients score for each one that is trained on."""
        of_kl = kl_fraction(self.config.model.kto)
        return of_kl + (0 if self.reference == "cached" else 1 + of_kl)

    @property
    def model_flops(self) -> float:
        """Return the operations of a step that all ranks together have to do, nothing recomputed."""
        each = self.flops.forward * (1 + self._scored) + self.flops.backward
        return self.config.model.global_batch_size * each

    def time(self, memory: RankMemory) -> StepTime:
        """Return how long the step takes.

        Args:
            memory: What the fullest rank holds.
        """
        layout, flops = self.layout, self.flops
        rate = self.device.flops * OF_PEAK * layout.tensor * layout.context / self.documents
        forward = self._of_slowest(flops.layers, flops.forward)
        backward = self._of_slowest(flops.layers_backward, flops.backward)
        again = self._recomputed * self._of_slowest(flops.layers, flops.layers)
        training, scoring = (forward + backward + again) / rate, forward * self._scored / rate
        spent = {traffic.kind: traffic.bytes / self._bandwidth(traffic) for traffic in self.traffic()}
        plain = self._made_plain()
        working = training + scoring + plain + spent["tensor"] + spent["context"] + spent["experts"]
        return StepTime(
            training=training,
            scoring=scoring,
            plain=plain,
            bubble=working * (layout.pipeline - 1) / (layout.virtual * self.rows),
            reference=self._swapping(memory),
            optimizer=self._updating(memory),
            **spent,
        )

    def _of_slowest(self, layers: float, whole: float) -> float:
        """Return what the stage with most work has of it.

        Args:
            layers: Work of all layers.
            whole: With the output layer's.
        """
        stages = [layers * each / self.sizes.layers for each in stage_sizes(self.layout, self.sizes.layers)]
        stages[-1] += whole - layers
        return max(stages)

    @property
    def _recomputed(self) -> float:
        """Return the share of a forward pass that the backward pass does again."""
        model = self.config.model
        if model.activations_checkpoint_granularity != "full":
            return 0.0
        if model.activations_checkpoint_method == "uniform":
            return 1.0
        of_chunk = self.sizes.layers / (self.layout.pipeline * self.layout.virtual)
        return min((model.activations_checkpoint_num_layers or 1) / of_chunk, 1.0)

    def _made_plain(self) -> float:
        """Return the seconds in which weights in fewer bits are read and written as plain numbers."""
        of_rank = [self.parts.of_stage(self.layout, stage) for stage in range(self.layout.pipeline)]
        moved = max(
            part.quantised_bytes.of_rank(self.layout) + part.quantised.of_rank(self.layout) * self._size
            for part in of_rank
        )
        return self.rows * self._passes * moved / self.device.memory_bandwidth

    def _swapping(self, memory: RankMemory) -> float:
        """Return the seconds in which policy and reference change places, twice a step and both ways at once."""
        return 2 * memory.host / HOST_BANDWIDTH

    def _updating(self, memory: RankMemory) -> float:
        """Return the seconds of the update, which the host begins when it has the gradients of what it updates."""
        on_device = (2 * memory.optimizer + memory.gradients) / self.device.memory_bandwidth
        numbers = memory.host_optimizer / (4 + moments_bytes(self.config.model.optim))
        # gradients in float32 come, and parameters go
        return on_device + (2 * memory.host_optimizer + (4 + self._size) * numbers) / HOST_BANDWIDTH

    def traffic(self) -> list[Traffic]:
        """Return what a rank sends in a step, of each kind of exchange."""
        layout = self.layout
        inner = layout.tensor * layout.context
        stage_ranks = layout.world_size // layout.pipeline
        return [
            Traffic(kind="tensor", bytes=self._tensor(), within_node=layout.tensor <= self.node_size),
            Traffic(kind="context", bytes=self._context(), within_node=inner <= self.node_size),
            Traffic(kind="experts", bytes=self._experts(), within_node=self._expert_ranks <= self.node_size),
            Traffic(kind="pipeline", bytes=self._pipeline(), within_node=layout.world_size <= self.node_size),
            *(
                Traffic(kind=kind, bytes=size, within_node=stage_ranks <= self.node_size)
                for kind, size in (("gradients", self._replicated(4)), ("parameters", self._replicated(self._size)))
            ),
        ]

    def _bandwidth(self, traffic: Traffic) -> float:
        if traffic.within_node and self.device.nvlink_bandwidth:
            return OF_LINKS * self.device.nvlink_bandwidth / 2  # the sheet counts both directions
        return OF_LINKS * self.device.network_bandwidth

    @property
    def _size(self) -> int:
        return params_dtype_of(self.config).itemsize

    @property
    def _expert_ranks(self) -> int:
        return self.layout.expert * self.layout.expert_tensor_size

    @property
    def _passes(self) -> float:
        """Return how many times a rank's samples go through the layers in a step: forward, backward, scored, again."""
        return 2 + self._scored + self._recomputed

    @property
    def _layer_tokens(self) -> float:
        """Return the tokens of a rank's samples, times the layers of its stage."""
        return self.documents * self.length / self.layout.context * self.sizes.layers / self.layout.pipeline

    def _tensor(self) -> float:
        """Two sums of hidden states a layer and pass, each in two parts (arXiv 2205.05198, section 4.2.2).

        With sequence parallelism the backward pass gathers what went into both products once more.
        """
        size = self.layout.tensor
        once = self._size * self.sizes.hidden * (size - 1) / size
        again = 2 if self.layout.sequence else 0
        return self._layer_tokens * once * (4 * self._passes + again)

    def _context(self) -> float:
        """Queries, keys, values and outputs change from parts of the row to parts of the heads, and back."""
        sizes, layout = self.sizes, self.layout
        channels = 2 * sizes.head_channels * (sizes.heads + sizes.groups) / layout.tensor
        return self._layer_tokens * self._size * channels * (layout.context - 1) / layout.context * self._passes

    def _experts(self) -> float:
        """Each token's hidden state is sent to its experts, and back."""
        mixture, ranks = self.sizes.mixture, self._expert_ranks
        if mixture is None:
            return 0.0
        share = len(mixture.sparse_layers) / self.sizes.layers
        tokens = self._layer_tokens * share / (self.layout.tensor if self.layout.sequence else 1)
        return 2 * tokens * mixture.chosen * self._size * self.sizes.hidden * (ranks - 1) / ranks * self._passes

    def _pipeline(self) -> float:
        """Hidden states go on to the next stage, and gradients back, once for each chunk."""
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0
        tokens = self.documents * self.length / layout.context / (layout.tensor if layout.sequence else 1)
        return tokens * self._size * self.sizes.hidden * layout.virtual * (2 + self._scored)

    def _replicated(self, size: int) -> float:
        """Return the bytes that a rank sends to its replicas when each sums up, or gathers, its share.

        Args:
            size: Bytes of a parameter.
        """
        layout = self.layout
        replicas = layout.data * layout.context
        expert_replicas = layout.world_size // (layout.pipeline * self._expert_ranks)
        trained = self.parts.of_stage(layout, 0).trained
        outside = trained.outside_experts(layout) * (replicas - 1) / replicas
        return size * (outside + trained.in_experts(layout) * (expert_replicas - 1) / expert_replicas)
