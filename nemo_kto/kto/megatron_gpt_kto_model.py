"""MegatronGPTKTOModel: Kahneman-Tversky Optimization of a Megatron GPT model from binary feedback.

One Lightning step is one global batch (KTO, arXiv 2402.01306, section 4.1):

1. the policy scores the KL set (each prompt with another sample's response), forward only;
2. the reference scores the KL set and the samples, forward only, in the live model, or its scores are looked up
   (`reference.py`);
3. the baseline z is formed from all data-parallel ranks;
4. Megatron's 1F1B schedule scores the samples again, with gradients, and the optimizer steps.

Tensor legend: `n` samples of this rank in the global batch, `b` samples of one micro-batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from transformers import PretrainedConfig

from nemo_kto.algorithms.diagnosis import Diagnosis, GradientSpikes
from nemo_kto.algorithms.metrics import MetricSums
from nemo_kto.config.objective_checks import kl_group_size
from nemo_kto.config.schema import KTOConfig
from nemo_kto.data.batches.packed_rows import KTOBatch, PackedRow
from nemo_kto.data.batches.upload import upload
from nemo_kto.kto.baseline import Baseline, Comparison, form_baseline
from nemo_kto.kto.divergence import RecordsFile, UnusableSteps, check_parameters, find_cause
from nemo_kto.kto.fill_cache import count_batches, fill, open_cache
from nemo_kto.kto.objective import Objective
from nemo_kto.kto.reference import CachedReference, ExchangedReference, ReferencePolicy, ReferenceSettings
from nemo_kto.kto.scoring import Dropout, RowScorer, unwrapped
from nemo_kto.kto.starting_weights import Weights
from nemo_kto.kto.utilisation import Utilisation
from nemo_kto.network.families import dimensions_of
from nemo_kto.network.flops import StepFlops
from nemo_kto.network.gpt import KTOGPTModel, build_gpt
from nemo_kto.network.lora import add_adapters
from nemo_kto.network.megatron_config import Recompute
from nemo_kto.network.projections import LoRASettings
from nemo_kto.network.vision import VisionSettings
from nemo_kto.runtime import parallel, router_loss
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.loop import graceful_stop
from nemo_kto.runtime.step_clock import GRADIENTS, KL, OPTIMIZER, REFERENCE, StepClock
from nemo_kto.runtime.steps import unreduced_gradients

logger = logging.getLogger(__name__)

_OWN_TIMES = ("train/step_time", "train/tokens_per_second", "train/mfu")
"""Metrics that every rank measures for itself."""


class MegatronGPTKTOModel(LightningModule):
    """KTO on Megatron-Core; manual optimization, one global batch a step.

    Args:
        config: The whole configuration of the run.
        hf_config: Hugging Face configuration of the model to build.
        layout: Division of the processes.
        params_dtype: Dtype of parameters and activations; log-probs and losses are float32 whatever it is.
        recompute: What the backward pass computes again.
        lora: The adapters to train; None to train the whole model.
        vision: What sees images; None where the data has none.
        reference: The reference policy.
        steps_per_epoch: Steps of one pass over the training data.
        val_batches: Batches of one validation.

    Attributes:
        chunks: This rank's part of the model: one chunk, or several when pipeline stages are interleaved; each is
            wrapped for data parallelism once training has begun.
        last_metrics: Name with its stage -> value, of the last step and of the last validation.
        visit_reference: Called with this model while it is a reference that is not kept, but whose log-probs are
            cached; None for nothing.
        records_file: Takes the records of steps that are not finite; None for nothing.
        unusable: Counts those steps.
        clock: Knows what a training step spends its time with.
    """

    def __init__(
        self,
        config: KTOConfig,
        hf_config: PretrainedConfig,
        *,
        layout: Layout,
        params_dtype: torch.dtype,
        recompute: Recompute | None,
        lora: LoRASettings | None,
        vision: VisionSettings | None,
        reference: ReferenceSettings,
        steps_per_epoch: int,
        val_batches: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.objective = Objective(config.model.kto)
        self.hf_config = hf_config
        self.steps_per_epoch = steps_per_epoch
        self.val_batches = val_batches
        self.layout = layout
        self.params_dtype = params_dtype
        self.recompute = recompute
        self.lora = lora
        self.vision = vision
        self.reference_settings = reference
        self.chunks = torch.nn.ModuleList()
        self.last_metrics: dict[str, float] = {}
        self.visit_reference: Callable[[MegatronGPTKTOModel], None] | None = None
        self.reference: ReferencePolicy | None = None
        self.records_file: RecordsFile | None = None
        limits = config.trainer.kto
        self.clock = StepClock()
        self._utilisation = Utilisation()
        self.unusable = UnusableSteps(skip=limits.on_nan == "skip_step", most=limits.max_skipped_steps)
        self._validation_sums = MetricSums()
        follows = self.objective.interval is not None and reference.sync_every is not None
        self._diagnosis = Diagnosis(has_kl=self.objective.kl_set, near_reference=follows)
        self._spikes = GradientSpikes()
        folders = config.pretrained_checkpoint.restore_from_path, config.model.peft.lora_tuning.restore_from_path
        model_folder, adapter_folder = (None if folder is None else Path(folder) for folder in folders)
        self._weights = Weights(
            model_folder=model_folder,
            adapter_folder=adapter_folder,
            seed=config.model.seed,
            init_std=config.model.init_method_std,
            has_adapters=lora is not None,
            reference=reference,
        )

    # model

    def configure_model(self) -> None:
        """Build this rank's part of the model, load its weights and have the reference; collective."""
        if self.chunks:
            return
        model = self.config.model
        self.chunks = torch.nn.ModuleList(
            build_gpt(
                self.hf_config,
                self.layout,
                chunk=chunk,
                transformer_impl=model.transformer_impl,
                vocab_pad_multiple=model.make_vocab_size_divisible_by,
                params_dtype=self.params_dtype,
                recompute=self.recompute,
                moe_aux_loss_coeff=model.moe_aux_loss_coeff,
                unfused=self.lora is not None,
                quantised=None if self.lora is None else self.lora.base,
                vision=self.vision,
            )
            for chunk in range(self.layout.virtual)
        )
        if self.lora is not None:
            for chunk in self.chunks:
                add_adapters(chunk, self.lora)
        self.chunks.to(self.trainer.strategy.root_device)
        parallel.run_everywhere(partial(self._weights.load_policy, self.models))
        if self.reference_settings.mode == "cached":
            self.reference = self._make_cached_reference()
        else:
            self.reference = parallel.run_everywhere(partial(self._weights.live_reference, self.models))

    @property
    def models(self) -> list[KTOGPTModel]:
        """This rank's chunks without what they are wrapped in."""
        return [unwrapped(chunk) for chunk in self.chunks]

    def _make_cached_reference(self) -> CachedReference:
        """Return the log-probs of the reference; those that are not in the cache yet are computed."""
        settings, data = self.reference_settings, self.trainer.datamodule  # type: ignore[attr-defined]
        assert settings.cache is not None
        cache, work = open_cache(settings.cache.folder, settings.cache.key, data, val_batches=self.val_batches)
        if count_batches(work) or self.visit_reference is not None:
            parallel.run_everywhere(partial(self._weights.load_reference, self.models))
            stop = graceful_stop(self.trainer)
            assert stop is not None, "nemo_kto.train gives every trainer one"
            with stop.listening():
                fill(
                    cache,
                    work,
                    data,
                    self._scorer(),
                    stop=stop.agreed,
                )
            if self.visit_reference is not None:
                self.visit_reference(self)
            self._weights.restore_policy(self.models)
        return CachedReference(cache.tables)

    def reference_state(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state dict of a reference that moves, which a resumed run needs; else nothing."""
        if not isinstance(self.reference, ExchangedReference) or not self.reference_settings.sync_every:
            return {}
        return {
            f"reference{i}": self.reference.sharded_state_dict(model, metadata) for i, model in enumerate(self.models)
        }

    def load_reference_state(self, state: dict[str, Any]) -> None:
        """Take over what was loaded by way of `reference_state`."""
        for i, model in enumerate(self.models):
            if f"reference{i}" in state:
                assert isinstance(self.reference, ExchangedReference)
                self.reference.load_state_dict(model, state[f"reference{i}"])

    def setup(self, stage: str) -> None:
        """Tell the data which share of each batch this process trains on, and where a resumed run stands."""
        place = parallel.position()
        self.trainer.datamodule.set_position(  # type: ignore[attr-defined]
            dp_rank=place.dp_rank,
            dp_size=place.dp_size,
            multiple=self.layout.micro_batch_multiple,
            num_steps=self.trainer.max_steps,
            steps_per_epoch=self.steps_per_epoch,
            start_step=lambda: self.trainer.global_step,
            pixels=place.is_first_stage,
        )

    def configure_optimizers(self) -> None:
        """Present because Lightning insists on it; MegatronStrategy makes the optimizer."""

    @property
    def _strategy(self) -> Any:
        """The trainer's MegatronStrategy."""
        return self.trainer.strategy

    def _scorer(self) -> RowScorer:
        return RowScorer(
            chunks=self.chunks,
            place=parallel.position(),
            layout=self.layout,
            average=self.config.model.kto.preference_average_log_probs,
        )

    # training

    def on_train_start(self) -> None:
        """Find out which devices these are."""
        settings: dict[str, Any] = {"dtype": self.params_dtype, "devices": self.layout.world_size}
        work = StepFlops(self.hf_config, lora=self.lora, reference_mode=self.reference_settings.mode)
        self._utilisation = Utilisation.on(self.device, work, **settings)

    def training_step(self, batch: KTOBatch, batch_idx: int) -> None:
        """Take one optimizer step on this rank's share of a global batch."""
        self.clock.has_data()
        started, step = time.perf_counter(), self.trainer.global_step + 1
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()

        scorer = self._scorer()
        rows = batch.sample_rows()
        baseline = self._baseline(scorer, batch, rows, split="train")
        train = partial(
            scorer.train,
            rows,
            # the loss is only asked for on the last stage, which has a baseline
            partial(self.objective.micro_batch_loss, batch, baseline),  # type: ignore[arg-type]
            dropout=Dropout(step - 1, upload([batch.places], self.device)[0]) if self._drops_out else None,
        )
        with self.clock.part(GRADIENTS), self.clock.sync_within(self.chunks):
            observed = train()
        scorer.forget_images()
        if self.objective.interval is not None:
            # As HALOs does: a step behind, for else all log-ratios were zero with a reference that moves every step,
            # and none ever outside of the interval. The gradient pass has completed the parameters; to do so again
            # here would let Megatron believe that those of the step to come are gathered already.
            self._move_reference(step)
        sums = MetricSums(self.device)
        self._add_metrics(sums, batch, baseline, observed)
        if observed is not None and parallel.position().reports:
            self._utilisation.add(sums, batch)
        sums.reduce_()
        metrics = sums.means()
        flops = metrics.pop("flops", None)
        self.objective.finish_metrics(metrics, learn=True)
        if self.config.model.moe_aux_loss_coeff:
            mixture = dimensions_of(self.hf_config).mixture
            assert mixture is not None, "a dense model has no such loss"
            metrics["moe_aux_loss"] = router_loss.take_mean(
                num_layers=len(mixture.sparse_layers), num_micro_batches=len(rows), place=scorer.place
            )
        learning_rate = optimizer.param_groups[0]["lr"]
        loss_scale = float(optimizer.get_loss_scale())  # of this step: stepping changes it
        with self.clock.part(OPTIMIZER):
            updated, grad_norm = optimizer.step(usable=math.isfinite(metrics["loss"]))
        left_out = not updated and not (self._scales_loss and loss_scale > 1.0)  # else a smaller scale can still help
        if left_out:
            self._leave_out(step, batch, baseline, observed, loss=metrics["loss"], passed=train)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if updated:
            self.unusable.finite()
        if updated or left_out:  # what is left out counts as taken: data and learning rate follow the step's number
            scheduler.step(increment=1)
        if self.objective.interval is None and self._moves_reference(step):
            self._strategy.complete_parameters()
            self._move_reference(step)

        self.clock.finish()
        seconds = time.perf_counter() - started
        metrics |= {
            **({"grad_norm": grad_norm} if updated and grad_norm is not None else {}),
            **({"loss_scale": loss_scale} if self._scales_loss else {}),
            **({"skipped_steps": float(self.unusable.total)} if self.unusable.skip else {}),
            "lr": learning_rate,
            "consumed_samples": float(step * self.config.model.global_batch_size),
            "tokens_per_second": metrics.pop("tokens") / seconds,
            "step_time": seconds,
            **self._utilisation.metrics(flops, seconds=seconds),
        }
        self._log("train", metrics)
        if self.trainer.is_global_zero:
            for warning in self._diagnosis.update(metrics):
                logger.warning(warning)
            spike = self._spikes.update(metrics["grad_norm"], step=step) if "grad_norm" in metrics else None
            if spike is not None:
                logger.warning(spike)

    def _move_reference(self, step: int) -> None:
        """Move the reference towards the policy, whose parameters are complete, when it is due in this step."""
        if self._moves_reference(step):
            assert isinstance(self.reference, ExchangedReference)
            with self.clock.part(REFERENCE):
                self.reference.move(self.reference_settings.sync_alpha)

    def _moves_reference(self, step: int) -> bool:
        """Whether the reference moves in this step, counted from 1."""
        every = self.reference_settings.sync_every
        return every is not None and step % every == 0

    @property
    def _drops_out(self) -> bool:
        return self.lora is not None and bool(self.lora.dropout)

    @property
    def _scales_loss(self) -> bool:
        return self.params_dtype == torch.float16

    def _leave_out(
        self,
        step: int,
        batch: KTOBatch,
        baseline: Baseline | None,
        observed: torch.Tensor | None,
        *,
        loss: float,
        passed: Callable[[], Any],
    ) -> None:
        """Find out why a step is not finite, and note its records; raise unless it may be left out; collective.

        Args:
            step: Number of the step, from 1.
            batch: This rank's share of the global batch.
            baseline: Its baseline.
            observed: What the gradient pass found.
            loss: The step's loss.
            passed: That pass.
        """

        def again() -> None:
            with unreduced_gradients(self.chunks):
                passed()
            router_loss.forget()

        cause = find_cause(self.models, baseline, observed, loss=loss, compute_again=again)
        if self.records_file is not None:
            self.records_file.add(cause, batch, observed, step=step)
        self.unusable.leave_out(cause, step=step, records=self.records_file and self.records_file.file)

    def check_parameters(self) -> None:
        """Raise a DivergenceError if what was trained is not finite and must not be kept; collective."""
        check_parameters(self.models, step=self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the objective has learned so far, the steps left out, and the last metrics."""
        self.check_parameters()
        checkpoint["unusable_steps"] = self.unusable.state_dict()
        checkpoint["objective"] = self.objective.state_dict()
        # times differ between the ranks, and what all of them save in common must not
        same = {name: value for name, value in self.last_metrics.items() if name not in _OWN_TIMES}
        checkpoint["metrics"] = same

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        self.unusable.load_state_dict(checkpoint.get("unusable_steps", self.unusable.state_dict()))
        self.objective.load_state_dict(checkpoint["objective"])
        self.last_metrics = checkpoint["metrics"]

    # validation

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the validation before."""
        self._validation_sums = MetricSums(self.device)
        self._strategy.complete_parameters()  # once, see _baseline

    @torch.no_grad()
    def validation_step(self, batch: KTOBatch, batch_idx: int) -> dict[str, Any] | None:
        """Score this rank's share of one validation batch; samples of weight zero leave no trace.

        Returns:
            On one rank of each replica, the share's `baseline` and what `Objective.observe` returns, as `observed`.
        """
        scorer = self._scorer()
        rows = batch.sample_rows()
        baseline = self._baseline(scorer, batch, rows, split="validation")
        scores = scorer.score_rows(rows)
        scorer.forget_images()
        if scores is None or baseline is None:
            return None
        observed = torch.cat(
            [self.objective.observe(row, baseline, index) for index, row in enumerate(scores)], dim=-1
        )
        self._add_metrics(self._validation_sums, batch, baseline, observed)
        return {"baseline": baseline, "observed": observed} if scorer.place.reports else None

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation samples."""
        self._validation_sums.reduce_()
        metrics = self._validation_sums.means()
        metrics.pop("tokens")
        self.objective.finish_metrics(metrics, learn=False)
        self._log("val", metrics)
        for name, value in metrics.items():  # the checkpoint callback puts these names into file names
            self.log(f"val_{name}".replace("/", "_"), value, logger=False, batch_size=1)

    # scores, baseline, metrics

    @torch.no_grad()
    def _baseline(
        self, scorer: RowScorer, batch: KTOBatch, sample_rows: list[PackedRow], *, split: str
    ) -> Baseline | None:
        """Score the KL set with both policies and the samples with the reference; None except on the last stage.

        The reference scores the very rows of the gradient pass, so that the log-ratio of an untrained policy is zero
        to the last bit, whatever the micro-batch of the KL set.
        """
        assert self.reference is not None
        kl_rows = batch.kl_rows()
        policy_kl = None
        if kl_rows:
            with self.clock.part(KL):
                policy_kl = scorer.score_rows(kl_rows)
        if split == "train" and not kl_rows and isinstance(self.reference, ExchangedReference):
            self._strategy.complete_parameters()  # no pass of the policy has done so
        score = scorer.score if self.objective.interval is None else scorer.score_rows
        with self.clock.part(REFERENCE):
            ref_kl, ref_samples = self.reference.log_probs(
                batch, split, score=lambda: (score(kl_rows) if kl_rows else None, score(sample_rows))
            )
        if not scorer.place.is_last_stage:
            return None
        kl_log_ratios = None
        if policy_kl is not None:
            comparison = self._comparison(ref_kl)
            kl_log_ratios = torch.cat([comparison.log_ratios(row, index) for index, row in enumerate(policy_kl)])
        return form_baseline(
            batch,
            self._comparison(ref_samples),
            kl_log_ratios=kl_log_ratios,
            fixed=self.objective.fixed_baseline,
            kl_group_size=kl_group_size(self.config.model),
            loss_reduction=self.config.model.kto.loss_reduction,
            dp_group=scorer.place.dp_group,
        )

    def _comparison(self, reference: Any) -> Comparison:
        interval = self.objective.interval
        name = "ref_logps" if interval is None else "ref_rows"
        return Comparison(**{name: reference}, interval=interval)

    def _add_metrics(
        self, sums: MetricSums, batch: KTOBatch, baseline: Baseline | None, observed: torch.Tensor | None
    ) -> None:
        """Add this replica's samples to `sums`, on one rank of the replica."""
        if baseline is None or observed is None or not parallel.position().reports:
            return
        self.objective.add_metrics(sums, batch, baseline, observed)
        lengths = [prompt.numel() + response.numel() for prompt, response in batch.samples]
        sums.add("tokens", torch.tensor(lengths, device=self.device), batch.weights)

    def _log(self, stage: str, metrics: dict[str, float]) -> None:
        named = {f"{stage}/{name}": value for name, value in metrics.items()}
        others = {name: value for name, value in self.last_metrics.items() if not name.startswith(f"{stage}/")}
        self.last_metrics = others | named  # none of an earlier step: a class may be absent from this one
        # Lightning would log an epoch of its own, always 0 as the run is one stream of batches
        self.log_dict({**named, "epoch": self.trainer.global_step / self.steps_per_epoch}, batch_size=1)
        for name in ("loss", "kl", "rewards/margins"):
            if stage == "train" and name in metrics:
                self.log(name.removeprefix("rewards/"), metrics[name], prog_bar=True, logger=False, batch_size=1)
