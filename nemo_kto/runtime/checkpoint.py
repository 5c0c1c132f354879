"""Sharded checkpoints: written once per run by all ranks, read back under any layout.

A checkpoint is a folder in Megatron-Core's `torch_dist` format. Megatron writes `metadata.json` when all ranks have
written their parts, then comes a manifest with the checksum of every file, and NeMo's checkpoint callback keeps a
`<name>-unfinished` marker beside the folder while it is written. A folder counts as finished only when `metadata.json`
is there and the marker is not, so a run killed while saving resumes from the one before.

Nothing in a checkpoint is executed when it is read, see `no_code.py`.

No generator states are kept: the order of the data is a function of seed and step, and nothing else in training draws
random numbers.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import queue
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from nemo.utils.callbacks.dist_ckpt_io import (
    AsyncCompatibleCheckpointIO,
    AsyncFinalizableCheckpointIO,
    AsyncFinalizerCallback,
)
from packaging.version import Version
from torch.distributed.checkpoint import CheckpointException

from nemo_kto.errors import CheckpointError, DamagedCheckpointError, DivergenceError, SaveError
from nemo_kto.quiet import is_global_rank_zero
from nemo_kto.runtime import megatron_fixes, parallel
from nemo_kto.runtime.checkpoint_folders import is_finished, keeps_common_among_tensors
from nemo_kto.runtime.checkpoint_manifest import (
    MANIFEST_FILE,
    Entry,
    entry_of,
    first_fault,
    read_manifest,
    write_manifest,
)
from nemo_kto.runtime.disk import reason_of
from nemo_kto.runtime.frugal_adam import FrugalAdam
from nemo_kto.runtime.no_code import index_fault, nothing_executed
from nemo_kto.runtime.write_results import WriteResults, become_helper

logger = logging.getLogger(__name__)

SOURCE_FOLDER = "hf"
"""Folder inside a checkpoint with the Hugging Face config and tokenizer files needed to export it."""

IDENTITY_FILE = "identity.json"
"""File in that folder that says which run the checkpoint is of: key -> value or digest."""

_NO_PARAMETER = "no parameter"

_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.PickleError)
"""What torch and Megatron raise for files that are not what they were."""


class ShardedCheckpointIO(AsyncCompatibleCheckpointIO):  # type: ignore[misc]
    """Lightning's file access for sharded checkpoints; every call is collective over all ranks.

    Args:
        background: Whether saving only copies the shards and leaves writing them to the caller.
        source_folder: What every checkpoint gets a copy of, on global rank 0; None for nothing.
        verify: Whether the checksums of a checkpoint's files are compared when it is read.
    """

    def __init__(self, *, background: bool = False, source_folder: Path | None = None, verify: bool = True) -> None:
        super().__init__()
        self.background = background
        self.verify = verify
        self._source: dict[
            Path, bytes
        ] = {}  # the folder may be gone when a checkpoint is written, with the log folder
        if source_folder is not None and is_global_rank_zero():
            files = (path for path in source_folder.rglob("*") if path.is_file())
            self._source = {path.relative_to(source_folder): path.read_bytes() for path in files}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> AsyncRequest | None:
        """Write `checkpoint`, a state dict whose large leaves are sharded tensors, to the folder `path`.

        What is there already is replaced: a run that was killed and resumed takes the same steps again.

        Returns:
            None, or with `background` what is left to do.

        Raises:
            SaveError: It could not be written; nothing is left of it.
        """
        folder = Path(path)
        megatron_fixes.take_failed_write()  # of a save that was cut off
        with _writing(folder):
            _raise_together(folder, self._make_room(folder) if dist.get_rank() == 0 else None)
            options = own_writer(dist_checkpointing.save)
            request = dist_checkpointing.save(_on_cpu(checkpoint), str(folder), async_sharded_save=True, **options)
            _raise_together(folder, megatron_fixes.take_failed_write())
        written = WriteResults()
        # a rank without anything to write takes part in the rest
        if request.async_fn is not None:
            write = partial(_write, request.async_fn, folder, dist.get_rank(), os.getpid(), written)
            request = request._replace(async_fn=write)
        request.add_finalize_fn(partial(_finish, folder, written))
        if self.background:
            return request
        with _writing(folder):
            request.execute_sync()
        return None

    def _make_room(self, folder: Path) -> Exception | None:
        """Make the folder, and put into it what every checkpoint gets; return what went wrong."""
        try:
            self.remove_checkpoint(folder)
            folder.mkdir(parents=True)
            for name, content in self._source.items():
                file = folder / SOURCE_FOLDER / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        except OSError as error:
            return error
        return None

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, sharded_state_dict: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Read the folder `path` into the shards described by `sharded_state_dict`.

        Raises:
            CheckpointError: `path` is no finished checkpoint, or of another model.
            DamagedCheckpointError: A file of it is not what was written; on all ranks.
        """
        folder = Path(path)
        if not is_finished(folder):
            raise CheckpointError(f"{folder} is not a finished checkpoint. Remove it, or name another one.")
        self._verify(folder)
        with _reading(folder):
            loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict or {}, str(folder))
        return loaded

    def _verify(self, folder: Path) -> None:
        """Compare each file with the manifest, a share of them on every rank; one exchange of a text."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if rank == 0 and not (folder / MANIFEST_FILE).exists():
            logger.warning("%s has no %s, so nothing tells whether its files are as they were.", folder, MANIFEST_FILE)
        fault = first_fault(folder, checksums=False)
        if rank == 0 and fault is None:
            fault = index_fault(folder)
        if fault is None and self.verify:
            names = sorted(read_manifest(folder) or ())
            fault = first_fault(folder, names=names[rank::world_size])
        faults: list[str | None] = [None] * world_size
        dist.all_gather_object(faults, fault)
        found = next((fault for fault in faults if fault is not None), None)
        if found is not None:
            raise DamagedCheckpointError(folder, found)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the folder `path` if it is there."""
        folder = Path(path)
        # metadata.json goes first: a removal that is cut off must not leave something that looks finished
        (folder / "metadata.json").unlink(missing_ok=True)
        for child in sorted(folder.rglob("*"), reverse=True):
            child.rmdir() if child.is_dir() else child.unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


def own_writer(save: Callable[..., Any]) -> dict[str, str]:
    """Return the arguments of Megatron's `save` that ask for its own writer, which `write_results.py` looks after.

    It had no other one before Megatron-Core 0.17. From then on the default is that of nvidia-resiliency-ext, a package
    that need not be there.
    """
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def _on_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return it with what all ranks save in common on the CPU, as the scores that a callback keeps.

    Megatron sends rank 0's to the others, to compare; a tensor arrives on the device it was on, and each rank would
    open a context on the GPU of rank 0 for it.
    """
    moved: dict[str, Any] = dict_list_map_outplace(
        lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, checkpoint
    )
    return moved


def load_common(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides tensors.

    Raises:
        DamagedCheckpointError: It cannot be read.
    """
    with _reading(folder):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
        return common


def load_tensors(folder: Path, chosen: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Return whole tensors of a checkpoint by name, in this one process, which has a process group of its own.

    Args:
        folder: The checkpoint.
        chosen: Whether the tensor of a name is wanted.

    Raises:
        DamagedCheckpointError: It cannot be read.
    """
    with _reading(folder):
        return {key: value for key, value in dist_checkpointing.load_plain_tensors(str(folder)).items() if chosen(key)}


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Execute nothing of a checkpoint, and name it in what goes wrong.

    Raises:
        CheckpointError: It is of another model, or of a Megatron-Core whose checkpoints the installed one cannot read.
        DamagedCheckpointError: It cannot be read.
    """
    if Version(megatron_version).release < (0, 19) and keeps_common_among_tensors(folder):
        raise CheckpointError(
            f"{folder} was written with Megatron-Core 0.19 or newer, whose checkpoints {megatron_version} "
            "cannot read. Go on with the version that wrote it."
        )
    try:
        with nothing_executed():
            yield
    except CheckpointingException as error:
        raise CheckpointError(f"{folder} cannot be loaded into this model: {error}") from error
    except _UNREADABLE as error:
        raise DamagedCheckpointError(folder, f"it cannot be read ({type(error).__name__}: {error})") from error
    except CheckpointException as error:  # torch's, of what went wrong on some ranks
        cause = next((failure for failure, _ in error.failures.values()), error)
        raise DamagedCheckpointError(folder, f"it cannot be read ({type(cause).__name__}: {cause})") from error


def _write(
    write: Callable[..., None],
    folder: Path,
    rank: int,
    pid: int,
    written: WriteResults,
    *arguments: Any,
    **keywords: Any,
) -> None:
    """Write this rank's part of a checkpoint, and tell the checksums of its files, which are still in memory.

    Args:
        write: Megatron's function.
        folder: The checkpoint.
        rank: The rank.
        pid: Its process, which is this one, or has forked it.
        written: Takes file -> entry.
        *arguments: Of `write`.
        **keywords: Of `write`.
    """
    if os.getpid() != pid:
        become_helper(pid)
    write(*arguments, **keywords)
    try:
        written.put({file.name: entry_of(file) for file in folder.glob(f"__{rank}_*.distcp")})
    except OSError:
        written.put({})  # whoever writes the manifest meets the same error, and tells everyone


def _finish(folder: Path, written: WriteResults) -> None:
    """Write the manifest; collective: a gathering of names and checksums, and one of texts."""
    try:
        mine = written.get_nowait()
    except queue.Empty:
        mine = {}
    everyone: list[dict[str, Entry]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    error = megatron_fixes.take_failed_write()
    if error is None and everyone is not None:
        try:
            write_manifest(folder, {name: entry for entries in everyone for name, entry in entries.items()})
        except OSError as failed:
            error = failed
    _raise_together(folder, error)


def _raise_together(folder: Path, error: BaseException | None) -> None:
    """Raise a SaveError on all ranks where one has an error; one gathering of texts."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if error is None else reason_of(error, folder))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        raise SaveError(folder, reason)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell all ranks alike why a checkpoint cannot be written, and leave nothing of it.

    Raises:
        SaveError: It cannot.
    """
    try:
        try:
            yield
        except CheckpointException as error:  # on all ranks; the first one knows why
            cause = next((failure for failure, _ in error.failures.values()), None)
            _raise_together(folder, cause if cause is not None or dist.get_rank() else error)
    except SaveError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(error.folder, ignore_errors=True)
        raise


class BackgroundCheckpointIO(AsyncFinalizableCheckpointIO):  # type: ignore[misc]
    """Saves while training goes on: a process forked from each rank writes a copy of its shards.

    A checkpoint gets its `metadata.json`, and loses NeMo's mark of an unfinished one, when every rank has written its
    part; only then the checkpoints it replaces are removed. `FinishBackgroundSaves` looks after that.
    """

    def __init__(self, *, source_folder: Path | None = None, verify: bool = True) -> None:
        # not NeMo's own: it refuses to work without a module that Megatron-Core 0.16 has no more
        inner = ShardedCheckpointIO(background=True, source_folder=source_folder, verify=verify)
        _WrappingCheckpointIO.__init__(self, inner)
        self.async_calls_queue = AsyncCallsQueue(persistent=False)
        self.on_failure: Callable[[SaveError], None] | None = None
        self._under_way: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Start writing `checkpoint` to the folder `path`, once the one before is finished.

        Two at a time would each take a copy in memory; and Megatron's writers report to one queue, where the success
        of one could be taken for the other's.

        Raises:
            SaveError: Writing cannot be begun.
        """
        self.maybe_finalize_save_checkpoint(blocking=True)
        self._under_way = Path(path)
        super().save_checkpoint(checkpoint, path, storage_options)

    def maybe_finalize_save_checkpoint(self, blocking: bool = False) -> bool:
        """Finish the checkpoints that all ranks have written; with `blocking` wait for all that are under way.

        One all-reduce of one integer over the world, as long as a checkpoint is under way.

        Raises:
            SaveError: A rank could not write its part; on all ranks, and unless there is an `on_failure` to judge it.
        """
        if self._under_way is None:
            return False
        try:
            with _writing(self._under_way):
                return bool(super().maybe_finalize_save_checkpoint(blocking))
        except SaveError as error:
            if self.on_failure is None:
                raise
            self.on_failure(error)
            return False


class FinishBackgroundSaves(AsyncFinalizerCallback):  # type: ignore[misc]
    """Finishes what `BackgroundCheckpointIO` has under way: after each step if it is ready, and at the end."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for it when the run diverges, which all ranks find in the same step: it is the one to go on from."""
        if not isinstance(exception, DivergenceError):
            return
        try:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)  # type: ignore[attr-defined]
        except CheckpointError as error:  # what ends the run is the other
            if is_global_rank_zero():
                logger.warning("%s", error)


def sharding_metadata() -> dict[str, Any]:
    """Return how models and optimizers describe their shards, so that every layout can read every other's.

    The distributed optimizer gathers its flat buffers into tensors of the parameters' shapes; its other formats can
    be read under other data-parallel sizes only.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel.position().dp_cp_group,
    }


def sharded_trained(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dict of what is trained of a Megatron model: frozen weights never change."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(name.startswith("decoder.") and name not in trained for name, _ in model.named_parameters()):
        # with a name for each layer: not every layer need have trained parameters. All stages have to agree, and what
        # sees images, frozen or in part, is on the first alone.
        metadata = {**metadata, "non_homogeneous_layers": True}
    named: dict[str, Any] = model.sharded_state_dict(metadata=metadata)
    # only tensors: what else Megatron's layers would keep (`_extra_state`) is pickled, and says nothing here
    return {name: value for name, value in named.items() if name in trained}


def fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam, which stands in for Apex's and Transformer Engine's, update each parameter in one pass.

    To be called again after a load: what the checkpoint says of the parameter groups replaces it.
    """
    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            group["fused"] = True


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [chained.optimizer for chained in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [one for one in inner if isinstance(one, torch.optim.Adam | torch.optim.AdamW)]


def allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh torch Adam its (zero) moments, so that there is something to load a checkpoint into; collective.

    Apex and Transformer Engine's Adam are initialised by Megatron itself; torch's only on its first step. And Megatron
    asks every rank for the step its parameters are at. A rank none of whose layers has adapters is told that of the
    others: one all-reduce of one number over the world.
    """
    optimizers = [chained.optimizer for chained in getattr(optimizer, "chained_optimizers", [optimizer])]
    adams = _torch_adams(optimizer)
    for inner in adams:
        if isinstance(inner, FrugalAdam):
            inner.allocate()
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter].update(
                        step=torch.zeros((), dtype=torch.float32),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
    steps = [float(state["step"]) for inner in adams for state in inner.state.values()]
    # of Apex and Transformer Engine, which leave out groups without parameters
    steps += [float(group["step"]) for inner in optimizers if inner for group in inner.param_groups if "step" in group]
    latest = torch.tensor(max(steps, default=0.0), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(latest, op=dist.ReduceOp.MAX)
    for inner in optimizers:
        if inner is None or any(group["params"] for group in inner.param_groups):
            continue
        if inner in adams:
            inner.state[_NO_PARAMETER] = {"step": latest.cpu()}  # type: ignore[index]
        if inner not in adams or isinstance(inner, FrugalAdam):
            for group in inner.param_groups:
                group["step"] = int(latest)


def separate_step_counters(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own Adam `step` tensor after a load.

    Megatron-Core 0.16 restores one tensor shared by all parameters; torch Adam increments it in place once per
    parameter, which silently ruins the bias correction.
    """
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = chained.optimizer
        for state in inner.state.values() if inner is not None else ():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
