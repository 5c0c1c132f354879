"""The training step of `MegatronGPTKTOModel`, taken on one rank without contents, device or other ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from transformers import PretrainedConfig

from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.packed_rows import KTOBatch
from nemo_kto.kto.megatron_gpt_kto_model import MegatronGPTKTOModel
from nemo_kto.kto.reference import LiveReference, ReferenceSettings, Scores
from nemo_kto.kto.scoring import RowScorer
from nemo_kto.kto.starting_weights import Weights
from nemo_kto.network import attention
from nemo_kto.network.gpt import KTOGPTModel
from nemo_kto.network.projections import LoRASettings
from nemo_kto.runs.model import params_dtype_of, recompute_of, vision_to_plan
from nemo_kto.runtime.dry_run import DryRun, alone, replaced
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.optimizer import frugal_adams, make_optimizer, wrap_for_training
from nemo_kto.runtime.steps import step_if_finite


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one rank on its device.

    Attributes:
        parameters: Weights, adapters included.
        reference: What a `resident` reference takes besides.
        gradients: Their buffers.
        optimizer: Its state, of which the host has none: float32 copies of parameters below float32, and Adam's
            moments. And what else stays:
            with sequence parallelism Megatron keeps a row's hidden states, which it gathers into the same memory each
            time, and behind the first stage the row that came last, and its gradient.
        peaks: Phase of a step -> most bytes in it, of all that is held too: `scoring` is the passes of KL set and
            reference, `training` the one that makes gradients, `update` the optimizer, `between` all else.
    """

    parameters: int
    reference: int
    gradients: int
    optimizer: int
    peaks: Mapping[str, int]

    @property
    def held(self) -> int:
        """Bytes between steps."""
        return self.parameters + self.reference + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Most bytes within a step, from the second one on."""
        return max(self.peaks.values())


def dry_step(
    config: KTOConfig,
    hf_config: PretrainedConfig,
    layout: Layout,
    rank: int,
    *,
    first: KTOBatch,
    batch: KTOBatch,
    lora: LoRASettings | None,
    reference: ReferenceSettings,
) -> StepMemory:
    """Return what a rank takes in its second training step.

    Args:
        config: Of a run; what it says of layout, adapters, reference and weights is not looked at.
        hf_config: The model's configuration.
        layout: The layout.
        rank: Which of its ranks.
        first: Its share of the first global batch, after which there is the optimizer's state: as few rows as can be.
        batch: Its share of the second.
        lora: The adapters that are trained; None for the whole model.
        reference: The reference policy.

    Raises:
        ConfigError: See `alone`.
    """
    # attention as on CUDA, where grouped heads are repeated for some kernels
    flash = replaced(attention, "_takes_grouped_heads", attention.suits_flash_attention)
    with alone(layout, rank) as run, flash:
        model = _DryModel(run, config, hf_config, layout=layout, lora=lora, reference=reference)
        model.configure_model()
        resident = model._weights.of_reference
        parameters = run.held - resident
        model.chunks = wrap_for_training(model.chunks, config.model.optim)
        gc.collect()
        gradients = run.held - parameters - resident
        model.make_optimizer()
        every = reference.sync_every or 1
        for step, share in ((0, first), (2 * every - 1, batch)):  # the second one moves a reference that moves
            run.forget_peaks()
            model.trainer.global_step = step
            model.training_step(share, step)
            gc.collect()
        return StepMemory(
            parameters=parameters,
            reference=resident,
            gradients=gradients,
            optimizer=run.held - parameters - resident - gradients,
            peaks=dict(run.peaks),
        )


class _DryModel(MegatronGPTKTOModel):
    """The model, without Lightning's trainer and without weights."""

    def __init__(
        self,
        run: DryRun,
        config: KTOConfig,
        hf_config: PretrainedConfig,
        *,
        layout: Layout,
        lora: LoRASettings | None,
        reference: ReferenceSettings,
    ) -> None:
        super().__init__(
            config,
            hf_config,
            layout=layout,
            params_dtype=params_dtype_of(config),
            recompute=recompute_of(config),
            lora=lora,
            vision=vision_to_plan(config, hf_config),
            reference=reference,
            steps_per_epoch=1,
            val_batches=0,
        )
        self._run = run
        self._weights: _NoWeights = _NoWeights(self._weights, run)
        self._trainer = SimpleNamespace(  # type: ignore[assignment]
            strategy=SimpleNamespace(root_device=torch.device("cpu"), complete_parameters=lambda: None),
            global_step=0,
            is_global_zero=False,  # which would look at the metrics, that say nothing here
        )

    def make_optimizer(self) -> None:
        """As the strategy does."""
        self._optimizer = make_optimizer(
            list(self.chunks),
            self.config.model.optim,
            params_dtype=self.params_dtype,
            gradient_clip=self.config.trainer.kto.gradient_clip_val or 0.0,
        )
        for adam in frugal_adams(self._optimizer):
            adam.host = self._run.on_host

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return _Optimizer(self._optimizer, self._run)

    def lr_schedulers(self) -> Any:
        return SimpleNamespace(step=lambda increment: None)

    def _make_cached_reference(self) -> Any:
        return _LookedUp()

    def _scorer(self) -> RowScorer:
        scorer = super()._scorer()
        return _Scorer(
            run=self._run,
            chunks=scorer.chunks,
            place=scorer.place,
            layout=scorer.layout,
            average=scorer.average,
        )

    def _log(self, stage: str, metrics: dict[str, float]) -> None:
        """Nobody looks."""


class _NoWeights(Weights):
    """Leaves the models' parameters without contents.

    Attributes:
        of_reference: Bytes of the reference's copy on the device.
    """

    def __init__(self, weights: Weights, run: DryRun) -> None:
        super().__init__(**vars(weights))
        self._run = run
        self.of_reference = 0

    def load_policy(self, models: Sequence[KTOGPTModel]) -> None: ...

    def load_reference(self, models: Sequence[KTOGPTModel]) -> None: ...

    def live_reference(self, models: Sequence[KTOGPTModel]) -> LiveReference:
        before = self._run.held
        with self._run.on_host() if self.reference.mode == "cpu_swap" else nullcontext():
            reference = super().live_reference(models)
        self.of_reference = self._run.held - before
        return reference


class _LookedUp:
    """A reference whose log-probs are in a cache."""

    def log_probs(self, batch: KTOBatch, split: str, *, score: Callable[[], Scores]) -> Scores:
        return torch.zeros(len(batch.kl_samples)) if batch.kl_samples else None, torch.zeros(len(batch.samples))


@dataclass(kw_only=True)
class _Scorer(RowScorer):
    """Says which of a step's passes it is that takes memory."""

    run: DryRun

    def _run(self, *args: Any, forward_only: bool, **kwargs: Any) -> list[Any] | None:
        with self.run.phase("scoring" if forward_only else "training"):
            return super()._run(*args, forward_only=forward_only, **kwargs)


class _Optimizer:
    """Megatron's, with what Lightning's wrapper and the strategy add to it."""

    def __init__(self, optimizer: MegatronOptimizer, run: DryRun) -> None:
        self._optimizer = optimizer
        self._run = run

    def step(self, *, usable: bool) -> tuple[bool, float | None]:
        with self._run.phase("update"):
            return step_if_finite(self._optimizer, usable=usable)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)
