"""Which layouts a job can have, and which of them suits best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

from transformers import PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.errors import ConfigError
from nemo_kto.network.families import dimensions_of, family_of
from nemo_kto.network.flops import ModelFlops
from nemo_kto.planning.counts import parts_of
from nemo_kto.planning.memory import Activations, RankMemory, adapters_by_layer, held_memory
from nemo_kto.planning.speed import DocumentFlops, Speed, StepTime
from nemo_kto.runs.layout import check_divided, requested_layout
from nemo_kto.runs.memory import longest_rows
from nemo_kto.runs.reference import lora_settings, reference_settings
from nemo_kto.runtime.devices import Device
from nemo_kto.runtime.layout import Layout, padded_vocabulary

Keys = Mapping[str, Any]
"""Keys of `model`, which say how a job is divided -> their values."""

SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "mbs": "micro_batch_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}
"""Short names -> keys of `model`."""

RECOMPUTE: dict[str, Keys] = {
    "none": {
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
    },
    "full": {
        "activations_checkpoint_granularity": "full",
        "activations_checkpoint_method": "uniform",
        "activations_checkpoint_num_layers": 1,
    },
}
"""What of activations is computed again -> the keys that say so."""

RESERVE = 3 * 2**30
RESERVE_SHARE = 0.05
"""What is left free on a GPU: CUDA's context, NCCL's buffers, kernels' workspaces; and what lies between blocks."""

_MICRO_BATCHES = (1, 2, 4)
_MOST_CHUNKS = 8
_LONG = 4096
"""Tokens of a document from which on ranks may share it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, and what it takes.

    Attributes:
        keys: What it is written as.
        config: The run's configuration with these keys.
        layout: The layout.
        stage: The pipeline stage that takes most memory.
        memory: What a rank of that stage takes.
        speed: What a step computes and sends.
        time: How long it takes.
        traced: Whether `memory` was found by a dry run of the step, not by formula.
    """

    keys: Keys
    config: KTOConfig
    layout: Layout
    stage: int
    memory: RankMemory
    speed: Speed
    time: StepTime
    traced: bool = False

    @property
    def divided(self) -> tuple[int, ...]:
        """Return what the model is divided by: plans with the same are variants of each other."""
        layout = self.layout
        return layout.tensor, layout.pipeline, layout.context, layout.expert, layout.expert_tensor_size

    @property
    def rank(self) -> int:
        """Return a rank of `stage`: those of a stage are consecutive."""
        return self.stage * (self.layout.world_size // self.layout.pipeline)

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens of samples that a GPU works off in a second."""
        tokens = self.config.model.global_batch_size * self.speed.length
        return tokens / self.time.total / self.layout.world_size

    @property
    def utilisation(self) -> float:
        """Return the share of the GPUs' peak that the model's operations take (model FLOPs utilisation)."""
        return self.speed.model_flops / (self.time.total * self.layout.world_size * self.speed.device.flops)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of all layouts.

    Attributes:
        fitting: Those that fit, the fastest first.
        too_large: Those that a GPU has no room for, the fastest first.
        refused: Why others cannot be, in a sentence -> how many.
    """

    fitting: list[Plan]
    too_large: list[Plan]
    refused: Mapping[str, int]


class Planner:
    """Plans a job: a configuration but for what a plan says, a model, and GPUs.

    Args:
        config: The run's configuration.
        hf_config: The model's.
        gpus: How many GPUs there are.
        node_size: How many of them a node has.
        device: What they are.
        length: Tokens of a document on average; `model.data.seq_length` is the most.

    Raises:
        ConfigError: The configuration's adapters or reference cannot be.
    """

    SEARCHED: ClassVar[tuple[str, ...]] = (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "micro_batch_size",
        "activations_checkpoint_granularity",
        "activations_checkpoint_method",
        "activations_checkpoint_num_layers",
    )
    """Keys of `model` that `search` looks for values of."""

    def __init__(
        self, config: KTOConfig, hf_config: PretrainedConfig, *, gpus: int, node_size: int, device: Device, length: int
    ) -> None:
        self.config = config
        self.hf_config = hf_config
        self.gpus = gpus
        self.node_size = node_size
        self.device = device
        self.length = length
        self.sizes = dimensions_of(hf_config)
        self.lora = lora_settings(config, hf_config)
        self.reference = reference_settings(config, hf_config, self.lora, accelerator="gpu")
        self.parts = parts_of(config, hf_config, self.lora)
        self._fields = family_of(hf_config).fields(hf_config)
        self._adapters = adapters_by_layer(self.lora, hf_config)
        self._flops = DocumentFlops.of(ModelFlops(hf_config, self.lora), length)

    @property
    def room(self) -> int:
        """Return the bytes of a GPU that a step may take."""
        return round(self.device.memory_gib * 2**30 * (1 - RESERVE_SHARE)) - RESERVE

    def fits(self, plan: Plan) -> bool:
        """Return whether the GPUs have room for a plan."""
        return plan.memory.peak <= self.room

    def plan(self, keys: Keys) -> Plan:
        """Return what a layout takes.

        Args:
            keys: The layout.

        Raises:
            ConfigError: The trainer would refuse it.
        """
        config = replace(self.config, model=replace(self.config.model, **keys))
        layout = requested_layout(config, self.gpus)
        check_divided(config, layout, self.sizes.divided)
        padded_vocabulary(
            self.sizes.vocabulary,
            multiple=config.model.make_vocab_size_divisible_by,
            tensor_model_parallel_size=layout.tensor,
        )
        activations = Activations(
            config=config,
            sizes=self.sizes,
            fields=self._fields,
            layout=layout,
            lora=self.lora,
            adapters=self._adapters,
        )
        rows = longest_rows(config, layout)
        stages = []
        for stage in sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1}):  # none has more than one of these
            held = held_memory(config, self.parts, layout, stage, self.reference)
            besides = max(round(activations.peak(stage, rows)), held.update)
            stages.append((replace(held, activations=besides), stage))
        memory, stage = max(stages, key=lambda each: each[0].peak)
        speed = Speed(
            config=config,
            sizes=self.sizes,
            flops=self._flops,
            parts=self.parts,
            layout=layout,
            device=self.device,
            node_size=self.node_size,
            length=self.length,
            reference=self.reference.mode,
        )
        return Plan(
            keys=keys, config=config, layout=layout, stage=stage, memory=memory, speed=speed, time=speed.time(memory)
        )

    def search(self, fixed: Keys) -> Found:
        """Return what becomes of all layouts; of variants of one, the best.

        Args:
            fixed: Keys that are not to be changed.
        """
        fitting, too_large, refused = [], [], Counter[str]()
        for keys in self._candidates(fixed):
            try:
                plan = self.plan(keys)
            except ConfigError as error:
                refused[str(error)] += 1
                continue
            (fitting if self.fits(plan) else too_large).append(plan)
        return Found(fitting=_best_variants(fitting), too_large=_best_variants(too_large), refused=refused)

    def _candidates(self, fixed: Keys) -> Iterator[Keys]:
        """Yield layouts that are not obviously nonsense, each with what is fixed."""
        mixture = self.sizes.mixture
        tensor_sizes = _divisors(self.node_size)
        pipelines = [each for each in range(1, self.sizes.layers + 1) if self.gpus % each == 0]
        contexts = _divisors(self.node_size) if self.config.model.data.seq_length > _LONG else [1]
        experts = [1] if mixture is None else [each for each in _divisors(mixture.experts) if each <= self.gpus]
        # what somebody has said of one of these keys goes with the others as they are
        recomputed = [{}] if RECOMPUTE["full"].keys() & fixed.keys() else RECOMPUTE.values()
        sizes = [self.config.model.micro_batch_size] if self.config.model.micro_batch_tokens else _MICRO_BATCHES
        seen = set()
        for tensor, pipeline, context, expert, size, recompute in product(
            tensor_sizes, pipelines, contexts, experts, sizes, recomputed
        ):
            for virtual in self._virtual_sizes(pipeline):
                keys = {
                    "tensor_model_parallel_size": tensor,
                    "sequence_parallel": tensor > 1,
                    "pipeline_model_parallel_size": pipeline,
                    "virtual_pipeline_model_parallel_size": virtual,
                    "context_parallel_size": context,
                    "micro_batch_size": size,
                    **recompute,
                    **self._uneven(pipeline),
                }
                if mixture is not None:
                    keys["expert_model_parallel_size"] = expert
                    keys["expert_tensor_parallel_size"] = 1 if tensor > 1 else None
                keys |= fixed
                if (identity := tuple(keys.items())) not in seen:
                    seen.add(identity)
                    yield keys

    def _virtual_sizes(self, pipeline: int) -> list[int | None]:
        """Return how many chunks each stage may have."""
        layers, left = divmod(self.sizes.layers, pipeline)
        if pipeline == 1 or left:
            return [None]
        return [None, *(each for each in _divisors(layers) if 1 < each <= _MOST_CHUNKS)]

    def _uneven(self, pipeline: int) -> Keys:
        """Return how many layers the first and the last stage have, if stages cannot be equal: no more than others."""
        layers = self.sizes.layers
        others = -(-layers // pipeline)
        at_the_ends = layers - (pipeline - 2) * others
        if layers % pipeline == 0 or pipeline == 1 or at_the_ends < 2:
            return {}
        last = at_the_ends // 2  # which has the output layer, too
        return {"num_layers_in_first_pipeline_stage": at_the_ends - last, "num_layers_in_last_pipeline_stage": last}


def _best_variants(plans: list[Plan]) -> list[Plan]:
    best: dict[tuple[int, ...], Plan] = {}
    for plan in sorted(plans, key=_rank):
        best.setdefault(plan.divided, plan)
    return list(best.values())


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _rank(plan: Plan) -> tuple[int, int, int, float]:
    """Return what plans are sorted by: the time, and where that is the same within 2 %, how little is divided."""
    layout = plan.layout
    same = round(math.log(plan.time.total) / math.log(1.02))
    return same, layout.model_parallel * layout.virtual, plan.memory.peak, plan.time.total
