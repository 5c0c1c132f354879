"""What a training step takes of a device's memory, for a configuration, model and layout that need not be at hand.

It is found out by a dry run (`runtime/dry_run.py`) of the very step that trains, `MegatronGPTKTOModel.training_step`:
the KL set's pass, the reference's, the gradient pass and the optimizer. Needed is PyTorch, also without CUDA, and a
process that sees no GPU (CUDA_VISIBLE_DEVICES=''); the model's weights are not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from transformers import PretrainedConfig

from nemo_kto.config.objective_checks import has_kl_set
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.packed_rows import Document, KTOBatch
from nemo_kto.errors import ConfigError
from nemo_kto.network.families import dimensions_of
from nemo_kto.runs.dry_step import StepMemory, dry_step
from nemo_kto.runs.reference import lora_settings, reference_settings
from nemo_kto.runtime.layout import Layout, stage_sizes

Rows = Sequence[Sequence[tuple[int, int]]]
"""For each micro-batch of a rank, the tokens of prompt and response of each of its documents."""

_LEAST_DEPTH = 2
"""Layers of a chunk in the shallower model: with one alone, tensors between layers would not show."""


def step_memory(
    config: KTOConfig,
    hf_config: PretrainedConfig,
    layout: Layout,
    rank: int,
    *,
    rows: Rows | None = None,
    every_layer: bool = False,
) -> StepMemory:
    """Return what a rank takes in a training step, in a minute whatever the depth: two shallow models tell.

    The second step is counted, as in the first one there is no optimizer's state yet. Layers are Megatron's own with
    torch's kernels, and attention is flash attention where CUDA has it (from Ampere on); Transformer Engine's differ a
    little. float16 takes what bfloat16 takes. Not counted: CUDA's context, NCCL's buffers, what libraries keep for
    themselves, and what is lost between blocks of memory.

    Args:
        config: The run's configuration, for precision, batch, objective, reference, adapters and recomputation.
        hf_config: The model's.
        layout: The checked layout.
        rank: Which of its ranks.
        rows: The rank's share of a global batch; None for documents as long as the configuration allows.
        every_layer: Whether to run all layers instead of going on from two shallow models.

    Raises:
        ConfigError: The model is a mixture of experts: which of them the tokens go to, nobody knows. Or see `alone`.
    """
    if dimensions_of(hf_config).mixture is not None:
        raise ConfigError("The memory of a mixture of experts depends on where its router sends the tokens.")
    config = _settled(config)
    reference = reference_settings(config, hf_config, lora_settings(config, hf_config), accelerator="gpu")
    if rows is not None:
        batch = _batch(rows, rows, config)
    else:  # passes that keep nothing take the same for any number of rows
        rows = longest_rows(config, layout)
        batch = _batch(rows, _least_rows(rows, config, layout), config)
    least = _least_rows(rows, config, layout)
    first = _batch(least, least, config)

    def traced(hf: PretrainedConfig, divided: Layout) -> StepMemory:
        lora = lora_settings(config, hf)
        return dry_step(config, hf, divided, rank, first=first, batch=batch, lora=lora, reference=reference)

    layers = stage_sizes(layout, dimensions_of(hf_config).layers)[_stage(layout, rank)] // layout.virtual
    least = _shallow_depth(config, hf_config, layers)
    if every_layer or least is None:
        return traced(hf_config, layout)
    even = replace(layout, first_stage_layers=None, last_stage_layers=None)
    chunks = layout.pipeline * layout.virtual
    shallow, deeper = (traced(_of_depth(hf_config, depth * chunks), even) for depth in (least, 2 * least))
    return _extended(shallow, deeper, (layers - least) / least)


def longest_rows(config: KTOConfig, layout: Layout) -> Rows:
    """Return micro-batches of documents of `model.data.seq_length` tokens, of which half are the response.

    As many as a pipeline holds at once, and one of the KL set, are enough to know the peak.
    """
    model, length = config.model, config.model.data.seq_length
    size, kl_size = (_fitting(config, length, forward_only=forward_only) for forward_only in (False, True))
    at_once = layout.pipeline * (2 if layout.virtual > 1 else 1) + layout.micro_batch_multiple
    number = min(max(at_once, -(-kl_size // size)), model.global_batch_size // layout.data // size)
    return [[(length - length // 2, length // 2)] * size] * max(number, 1)


def _least_rows(rows: Rows, config: KTOConfig, layout: Layout) -> Rows:
    """Return the first rows that the passes of samples and KL set can be made of, a round of the pipeline's each."""
    size, of_kl = len(rows[0]), _fitting(config, max(map(sum, chain.from_iterable(rows))), forward_only=True)
    return rows[: layout.micro_batch_multiple * max(-(-of_kl // size), 1)]


def _fitting(config: KTOConfig, length: int, *, forward_only: bool) -> int:
    """Return how many documents of a length a micro-batch has, of the samples or, `forward_only`, the KL set."""
    model = config.model
    if model.micro_batch_tokens is not None:
        return max(model.micro_batch_tokens // length, 1)
    return (model.kto.log_prob_forward_micro_batch_size if forward_only else None) or model.micro_batch_size


def _settled(config: KTOConfig) -> KTOConfig:
    """Return the configuration without what a dry run has no need of, or cannot have."""
    config = copy.deepcopy(config)
    config.model.transformer_impl = "local"
    config.model.peft.lora_tuning.restore_from_path = None  # what is in it does not matter
    for name in ("desirable_loss_weight", "undesirable_loss_weight"):
        setattr(config.model.kto, name, 1.0)  # the data would tell what "auto" is
    if config.trainer.precision == "16-mixed":  # takes the same, and nobody knows whether its gradients overflow
        config.trainer.precision = "bf16-mixed"
    return config


def _stage(layout: Layout, rank: int) -> int:
    """Return a rank's pipeline stage: ranks of a stage are consecutive."""
    return rank // (layout.world_size // layout.pipeline)


def _shallow_depth(config: KTOConfig, hf_config: PretrainedConfig, layers: int) -> int | None:
    """Return how many layers a chunk of the shallower model has; None where the whole is as quickly run.

    Args:
        config: The run's configuration.
        hf_config: The model's.
        layers: Layers of a chunk.
    """
    model, lora = config.model, config.model.peft.lora_tuning
    if config.model.peft.peft_scheme == "lora" and (lora.layer_selection is not None or lora.rank_pattern):
        return None  # layers differ as somebody wanted
    unit = _period(hf_config)
    if model.activations_checkpoint_granularity == "full":
        group = model.activations_checkpoint_num_layers or 1
        if model.activations_checkpoint_method == "block":  # so many layers in each chunk, and all others not
            return None if layers > group else unit * -(-_LEAST_DEPTH // unit)
        unit = math.lcm(unit, group)
    least = unit * -(-_LEAST_DEPTH // unit)
    return least if 2 * least < layers else None


def _period(hf_config: PretrainedConfig) -> int:
    """Return after how many layers the model's kinds of layers come again; its depth if they do not."""
    depth = hf_config.num_hidden_layers
    lists = [value for value in vars(hf_config).values() if isinstance(value, list) and len(value) == depth]

    def comes_again(period: int) -> bool:
        return all(value[i] == value[i % period] for value in lists for i in range(depth))

    return next(period for period in range(1, depth + 1) if comes_again(period))


def _of_depth(hf_config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the configuration with as many layers; what it says of each layer is repeated or cut."""
    shallow, depth, period = copy.deepcopy(hf_config), hf_config.num_hidden_layers, _period(hf_config)
    for name, value in vars(hf_config).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(shallow, name, [value[layer % period] for layer in range(layers)])
    shallow.num_hidden_layers = layers
    return shallow


def _extended(shallow: StepMemory, deeper: StepMemory, factor: float) -> StepMemory:
    """Return what is `factor` times as far from `shallow` as `deeper` is: each number is linear in the layers."""

    def further(least: int, more: int) -> int:
        return round(least + factor * (more - least))

    return StepMemory(
        parameters=further(shallow.parameters, deeper.parameters),
        reference=further(shallow.reference, deeper.reference),
        gradients=further(shallow.gradients, deeper.gradients),
        optimizer=further(shallow.optimizer, deeper.optimizer),
        peaks={phase: further(peak, deeper.peaks[phase]) for phase, peak in shallow.peaks.items()},
    )


def _batch(rows: Rows, of_kl: Rows, config: KTOConfig) -> KTOBatch:
    """Return a rank's share of a global batch, every other sample desirable.

    Args:
        rows: The micro-batches of samples.
        of_kl: Those whose documents the KL set has, if there is one.
        config: The run's configuration.
    """
    lengths = list(chain.from_iterable(rows))
    size = _fitting(config, max(map(sum, lengths)), forward_only=True)
    kl_lengths = list(chain.from_iterable(of_kl)) if has_kl_set(config.model.kto) else []
    number, kl_number = len(lengths), len(kl_lengths)
    return KTOBatch(
        samples=[_document(*each) for each in lengths],
        kl_samples=[_document(*each) for each in kl_lengths],
        row_sizes=[len(row) for row in rows],
        kl_row_sizes=[min(size, kl_number - start) for start in range(0, kl_number, size)],
        pairs=torch.zeros(number, 2, dtype=torch.int64),
        kl_pairs=torch.zeros(kl_number, 2, dtype=torch.int64),
        places=torch.arange(number),
        kl_places=torch.arange(kl_number),
        desirable=torch.arange(number) % 2 == 0,
        weights=torch.ones(number),
        kl_weights=torch.ones(kl_number),
        loss_weights=torch.ones(number),
    )


def _document(prompt: int, response: int) -> Document:
    return torch.zeros(prompt, dtype=torch.int64), torch.zeros(response, dtype=torch.int64)
