"""MegatronStrategy: lets the Lightning Trainer drive Megatron-Core.

Lightning keeps the loop, the launching of processes, callbacks and loggers; this strategy owns process groups,
Megatron's data-parallel wrapper, its optimizer and learning-rate schedule, and sharded checkpoints.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from nemo.utils import AppState

from nemo_kto import stopping
from nemo_kto.config.schema import OptimConfig
from nemo_kto.errors import CheckpointError, DamagedCheckpointError
from nemo_kto.runtime import checkpoint as ckpt
from nemo_kto.runtime import meeting, parallel
from nemo_kto.runtime.checkpoint_folders import newest_whole, set_aside
from nemo_kto.runtime.disk import reason_of
from nemo_kto.runtime.launch import launch
from nemo_kto.runtime.launcher import HelperContext, RankLauncher, SlurmTasks
from nemo_kto.runtime.layout import Layout
from nemo_kto.runtime.loop import OwnSignals
from nemo_kto.runtime.mishaps import understood
from nemo_kto.runtime.optimizer import make_optimizer, wrap_for_training
from nemo_kto.runtime.steps import step_if_finite
from nemo_kto.runtime.watchdog import Watchdog, watch_over

logger = logging.getLogger(__name__)

_DECAY_STYLES = {"CosineAnnealing": "cosine", "LinearAnnealing": "linear", "Constant": "constant"}


class MegatronStrategy(DDPStrategy):
    """Runs a LightningModule whose attribute `chunks` holds this rank's chunks of a Megatron model.

    It derives from DDPStrategy because NeMo's exp_manager and Lightning's launchers recognise that class.

    Args:
        layout: Division of the processes.
        optim: Optimizer and schedule.
        params_dtype: Dtype of the model's parameters. Below float32 the optimizer keeps float32 copies of them,
            gradients are summed in float32 and, for float16, the loss is scaled.
        seed: Seed of every rank's generators.
        gradient_clip: Global gradient norm above which gradients are scaled down; 0 switches it off.
        async_save: Whether checkpoints are written while training goes on.
        source_folder: What `write_source_folder` wrote, on global rank 0; copied into each checkpoint.
        verify_checkpoints: See `ShardedCheckpointIO`.
        rules: What the ranks hold each other to.

    Attributes:
        watchdog: What watches over this rank and the others, once they have met.
    """

    restore_checkpoint_after_setup = True  # a sharded load needs the optimizer to exist

    def __init__(
        self,
        layout: Layout,
        optim: OptimConfig,
        *,
        params_dtype: torch.dtype,
        seed: int,
        gradient_clip: float,
        rules: meeting.RankRules,
        async_save: bool = False,
        source_folder: Path | None = None,
        verify_checkpoints: bool = True,
    ) -> None:
        stopping.end_with_parent()  # the ranks of a program that is no command of this package
        super().__init__(
            checkpoint_io=(ckpt.BackgroundCheckpointIO if async_save else ckpt.ShardedCheckpointIO)(
                source_folder=source_folder, verify=verify_checkpoints
            ),
            cluster_environment=cluster_environment(),
        )
        self.layout = layout
        self.optim = optim
        self.params_dtype = params_dtype
        self.seed = seed
        self.gradient_clip = gradient_clip
        self.rules = rules
        self.watchdog: Watchdog | None = None

    # processes and groups

    def _configure_launcher(self) -> None:
        self._launcher = RankLauncher(self.rules.start, self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_distributed(self) -> None:
        """Meet the other ranks, create torch's default group and Megatron's, and tell NeMo's callbacks about them."""
        environment = self.cluster_environment
        assert environment is not None
        self.set_world_ranks()
        store = meeting.join(
            self._get_process_group_backend(),
            address=environment.main_address,
            port=environment.main_port,
            rank=environment.global_rank(),
            world_size=environment.world_size(),
            rules=self.rules,
        )
        self.watchdog = watch_over(
            store,
            step=lambda: self._module.trainer.global_step,
            exit_codes=self._launcher.exit_codes,  # type: ignore[union-attr]
            rules=self.rules,
        )
        meeting.check_alike(self.rules.facts)
        super().setup_distributed()
        parallel.initialize(self.layout, seed=self.seed, timeout=self.rules.patience)
        place = parallel.position()
        state = AppState()  # NeMo's checkpoint callback looks here; resuming with TP or PP fails without it
        state.model_parallel_size = self.layout.model_parallel
        state.tensor_model_parallel_size, state.tensor_model_parallel_rank = self.layout.tensor, place.tp_rank
        state.pipeline_model_parallel_size, state.pipeline_model_parallel_rank = self.layout.pipeline, place.pp_rank
        state.data_parallel_rank = place.dp_rank

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks, before this one's end breaks their exchanges."""
        if self.watchdog is not None:
            self.watchdog.ranks.note(understood(exception))

    def teardown(self) -> None:
        """Release Lightning's resources and all process groups."""
        if self.watchdog is not None:
            self.watchdog.run_is_over = True
        super().teardown()
        parallel.destroy()
        if self.watchdog is not None:
            self.watchdog.end()

    def process_dataloader(self, dataloader: Any) -> Any:
        """Have the processes that load batches be helpers of this rank."""
        if getattr(dataloader, "num_workers", 0):
            dataloader.multiprocessing_context = HelperContext()
        return super().process_dataloader(dataloader)

    # model and optimizer

    def tensor_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """Return a context that changes nothing: Megatron puts its tensors where they belong.

        Lightning would make the GPU the default device while the model is built, also for what is read from files.
        """
        return nullcontext()

    def setup(self, trainer: Trainer) -> None:
        """Wrap chunks that are trained for data parallelism, and make their optimizer; after `configure_model`."""
        assert self.accelerator is not None
        trainer._signal_connector = OwnSignals(trainer)
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn != TrainerFn.FITTING:
            return  # nothing is trained: the model needs neither gradients nor an optimizer
        module = self._module
        module.chunks = wrap_for_training(module.chunks, self.optim)
        self.setup_optimizers(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create Megatron's optimizer and schedule and connect them to the pipeline schedule's hooks."""
        optim, sched = self.optim, self.optim.sched
        if optim.offload_fraction and self.root_device.type == "cpu" and self.is_global_zero:
            logger.warning(
                "model.optim.offload_fraction=%s saves nothing without a GPU: all is in the host's memory already.",
                optim.offload_fraction,
            )
        optimizer = make_optimizer(
            list(self._module.chunks), optim, params_dtype=self.params_dtype, gradient_clip=self.gradient_clip
        )
        scheduler = OptimizerParamScheduler(
            optimizer,
            # NeMo's warm-up: the first step is one already, and step `warmup_steps` has the full rate
            init_lr=optim.lr / (sched.warmup_steps + 1),
            max_lr=optim.lr,
            min_lr=sched.min_lr,
            lr_warmup_steps=sched.warmup_steps,
            lr_decay_steps=max(trainer.max_steps - sched.constant_steps, sched.warmup_steps + 1),
            lr_decay_style=_DECAY_STYLES[sched.name],
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,  # a resumed run follows its own configuration, e.g. more steps
        )
        self.optimizers = [optimizer]  # Lightning wraps it: the wrapper's step() is what counts global steps
        self.lr_scheduler_configs = [LRSchedulerConfig(scheduler)]  # listed for checkpointing; the module steps it

    def _group_settings(self) -> dict[str, Any]:
        """Return what Megatron keeps in every parameter group and prefers to its optimizer's and schedule's own."""
        optim = self.optim
        return {
            "max_lr": optim.lr,
            "min_lr": optim.sched.min_lr,
            "betas": tuple(optim.betas),
            "eps": optim.eps,
        }

    def optimizer_step(
        self, optimizer: Any, closure: Any, model: Any = None, *, usable: bool = True, **kwargs: Any
    ) -> Any:
        """Step Megatron's optimizer, which takes no closure; see `step_if_finite`."""
        return step_if_finite(optimizer, usable=usable)

    @property
    def _module(self) -> Any:
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        return module

    def complete_parameters(self) -> None:
        """Wait until every parameter has its value of the last optimizer step, on every rank; collective.

        With `overlap_param_sync` the ranks' parts are gathered while the next forward pass runs; whoever reads weights
        without such a pass calls this first.
        """
        if self.optim.overlap_param_sync and self.optimizers:
            for chunk in self._module.chunks:
                chunk.start_param_sync(force_sync=True)

    # checkpoints: folders without Lightning's suffix; every rank takes part

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the sharded state dict of every chunk; in the checkpoint the tensors' names know of no chunks."""
        self.complete_parameters()
        return self._sharded_module()

    def _sharded_module(self) -> dict[str, Any]:
        """Return the sharded state of the chunks and of a moving reference."""
        metadata = ckpt.sharding_metadata()
        return {**self._sharded_chunks(metadata), **self._module.reference_state(metadata)}

    def _sharded_chunks(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {f"chunk{i}": ckpt.sharded_trained(model, metadata) for i, model in enumerate(self._module.models)}

    def optimizer_state(self, optimizer: Any, is_loading: bool = False) -> dict[str, Any]:
        """Return the optimizer's sharded state dict."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        # for loading, and for a run under float16 that has skipped all its steps so far
        ckpt.allocate_optimizer_state(optimizer)
        metadata = ckpt.sharding_metadata()
        state: dict[str, Any] = optimizer.sharded_state_dict(
            self._sharded_chunks(metadata), is_loading=is_loading, metadata=metadata
        )
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write everything a run needs to continue, and what `nemo-kto export-hf` needs besides the weights."""
        folder = _folder(filepath)
        for key in ("hparams_name", "hparams_type", "hyper_parameters"):
            checkpoint.pop(key, None)  # Megatron reads the common part with weights_only: plain types only
        with stopping.held_back():  # from the processes that write
            self.checkpoint_io.save_checkpoint(checkpoint, folder, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Read a checkpoint written under any layout into this one's shards.

        A run that is resumed from one that turns out to be damaged goes on from the newest before it that is whole.

        Raises:
            CheckpointError: It cannot be read, nor can any before it.
        """
        folder = _folder(checkpoint_path)
        while True:
            sharded: dict[str, Any] = {"state_dict": self._sharded_module()}
            if load_optimizer_states and self.optimizers:
                sharded["optimizer_states"] = [self.optimizer_state(o, is_loading=True) for o in self.optimizers]
            try:
                return self.checkpoint_io.load_checkpoint(folder, sharded_state_dict=sharded)  # type: ignore[call-arg]
            except DamagedCheckpointError as error:
                if not self.optimizers:  # it is scored, and a reader expects the one that was named
                    raise
                folder = self._before(error)

    def _before(self, damaged: DamagedCheckpointError) -> Path:
        """Put a damaged checkpoint aside and return the newest whole one that is left; collective."""
        left: list[Path | None] = [None]

        def clear() -> None:
            place = set_aside(damaged.folder)
            left[0], _ = newest_whole(damaged.folder.parent)
            logger.warning("%s It was moved to %s; the run goes on from %s.", damaged, place, left[0])

        parallel.run_on_rank_zero(clear, f"{damaged.folder} cannot be put aside")
        dist.broadcast_object_list(left, src=0)
        if left[0] is None:
            raise CheckpointError(f"{damaged} No other checkpoint is left to go on from.") from damaged
        return left[0]

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Copy loaded weights into the model."""
        for i, model in enumerate(self._module.models):
            # Megatron leaves out what is empty: chunks of which nothing is trained
            state = checkpoint.get("state_dict", {}).get(f"chunk{i}", {})
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            found = model.load_state_dict(state, strict=False)  # frozen weights are not there
            assert not trained & set(found.missing_keys) and not found.unexpected_keys, found
        self._module.load_reference_state(checkpoint.get("state_dict", {}))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Restore Megatron's optimizer."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group in _saved_groups(state):  # Megatron-Core 0.19 finds a group by its learning rates
                group.update(self._group_settings())
            optimizer.load_state_dict(state)
            ckpt.separate_step_counters(getattr(optimizer, "_optimizer", optimizer))
            for group in optimizer.param_groups:  # the checkpoint's; a resumed run follows its own configuration
                group.update(self._group_settings())
            ckpt.fuse_torch_adam(getattr(optimizer, "_optimizer", optimizer))

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint folder; one that cannot be removed is no reason to end a run."""
        folder = _folder(filepath)
        if self.is_global_zero:
            try:
                self.checkpoint_io.remove_checkpoint(folder)
            except OSError as error:
                reason = reason_of(error, folder)
                logger.warning("%s is not needed any more, but cannot be removed: %s.", folder, reason)


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups of an optimizer's state, in which those of several may be."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from value if key == "param_groups" else _saved_groups(value)
    elif isinstance(state, list):
        for value in state:
            yield from _saved_groups(value)


def _folder(filepath: str | Path) -> Path:
    path = Path(filepath)
    return path.with_suffix("") if path.suffix == ".ckpt" else path


def cluster_environment() -> Any:
    """Return how the ranks of this run find each other: torchrun, Slurm, or Lightning's own launcher."""
    found = launch()
    if found.starter == "torchrun":
        return TorchElasticEnvironment()
    if found.starter == "Slurm":
        return SlurmTasks(found)
    # of the one task that Slurm has started: NeMo would take every process started from here for rank 0
    os.environ.pop("SLURM_PROCID", None)
    return LightningEnvironment()
