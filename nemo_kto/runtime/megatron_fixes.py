"""Named changes to Megatron-Core, for this process and on every device; each says what goes wrong without it."""

from __future__ import annotations

import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from typing import Any

import torch
from megatron.core import utils
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, common, filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import experts, moe_utils, shared_experts

from nemo_kto.algorithms import pointwise
from nemo_kto.runtime.write_results import WriteResults


def route_without_transformer_engine() -> None:
    """Let a router multiply with torch where Transformer Engine cannot be imported; idempotent.

    `RouterGatingLinearFunction` (transformer/moe/moe_utils.py, Megatron-Core 0.16) asks whether Transformer Engine's
    kernel is None. Where its import has failed there is no such name at all, and the router ends in a NameError.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def keep_less_for_backward() -> None:
    """Let what Megatron's configuration calls fused activations and rotary embeddings be `pointwise`'s; idempotent.

    `bias_activation_fusion` would run functions of `fusions/` that torch.compile translates at their first call, for
    which a machine needs a compiler; `apply_rope_fusion` needs Transformer Engine (Megatron-Core
    0.16). Without them a feed-forward part keeps five tensors of its inner width, with them three.
    """
    for module in (mlp, shared_experts):
        module.bias_swiglu_impl = _swiglu
        module.bias_geglu_impl = _geglu
    for module in (mlp, experts):
        module.weighted_bias_swiglu_impl = _weighted_swiglu
        module.weighted_bias_quick_geglu_impl = _weighted_quick_geglu
    rope_utils.fused_apply_rotary_pos_emb = _rotate


def has_rotary_kernel_for_rows() -> bool:
    """Return whether Megatron has found a kernel that rotates packed rows: Transformer Engine's.

    Without it each layer asks for the documents' lengths four times a pass (`_apply_rotary_pos_emb_thd`,
    models/common/embeddings/rope_utils.py, Megatron-Core 0.16).
    """
    return getattr(rope_utils, "fused_apply_rotary_pos_emb_thd", None) is not None


def measure_norms_on_the_device() -> None:
    """Let the norm of the gradients be formed where they are; idempotent.

    Megatron's `local_multi_tensor_l2_norm` (utils.py, Megatron-Core 0.16), which stands in for Apex's and Transformer
    Engine's kernel, asks the device for the norm of each gradient.
    """
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def load_without_torch_adams_step() -> None:
    """Leave Adam's step out of what the distributed optimizer copies from a checkpoint's buckets; idempotent.

    `_set_main_param_and_optimizer_states` (optimizer/distrib_optimizer.py, Megatron-Core 0.16) copies every entry of
    the optimizer's state. torch's Adam, which stands in for Apex's and Transformer Engine's where neither is there,
    keeps its step among them, where the checkpoint has none: a KeyError. `load_state_dict` has restored it before.
    """
    optimizer = distrib_optimizer.DistributedOptimizer
    if not hasattr(optimizer._set_main_param_and_optimizer_states, "leaves_step"):
        optimizer._set_main_param_and_optimizer_states = _leaving_step(optimizer._set_main_param_and_optimizer_states)


def write_without_manager() -> None:
    """Let what writes checkpoints report without a process of its own, and say so if it was killed; idempotent.

    See `write_results.py`. One queue for all saves, as Megatron has it: there is one at a time.

    Megatron-Core 0.16 forks a process for each file, also where the rank waits for it, and waits for its report for
    ever. But a process forked from one with threads can hang at once, in a lock that another thread held: nothing is
    forked for files any more. A process that writes in the background is, and nobody asks whether it was killed.
    """
    forks = hasattr(filesystem_async, "_get_write_results_queue")  # 0.16; from 0.17 on a file is a thread's
    name = "_get_write_results_queue" if forks else "get_write_results_queue"
    if getattr(filesystem_async, name) is _write_results:
        return
    setattr(filesystem_async, name, _write_results)
    if forks:
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_parts)
    if not hasattr(async_utils.TemporalAsyncCaller.close, "tells_of_its_end"):
        async_utils.TemporalAsyncCaller.close = _telling_of_its_end(async_utils.TemporalAsyncCaller.close)


def outlive_failed_writes() -> None:
    """Let rank 0 go on when it cannot write what it alone writes between exchanges with the others; idempotent.

    Megatron-Core 0.16 writes common.pt (strategies/common.py), .metadata (strategies/state_dict_saver.py) and
    metadata.json (serialization.py) there. On a full disk that raises on rank 0 only, and the others wait for it until
    their exchange times out. Here the error is kept for `take_failed_write`, and nothing more is written.
    """
    for owner, name in (
        (getattr(common, "TorchCommonSaveStrategy", None), "save_common"),  # 0.16
        (serialization, "save_common"),  # 0.17 and 0.18; from 0.19 on it is written as tensors are
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ):
        original = getattr(owner, name, None)
        if original is not None and not hasattr(original, "outlives"):
            setattr(owner, name, _outliving(original))


_failed_writes: list[Exception] = []


def take_failed_write() -> Exception | None:
    """Return why this rank could not write since the last call; None if it could."""
    failed = _failed_writes[0] if _failed_writes else None
    _failed_writes.clear()
    return failed


def _outliving(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def write(*arguments: Any, **keywords: Any) -> None:
        if _failed_writes:
            return
        try:
            original(*arguments, **keywords)
        except (OSError, RuntimeError) as error:  # RuntimeError: of torch's zip writer
            _failed_writes.append(error)

    write.outlives = True  # type: ignore[attr-defined]
    return write


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm `[1]` of all tensors together."""
    return torch.nn.utils.get_total_norm(*tensor_lists).reshape(1), None


def _leaving_step(original: Callable[..., None]) -> Callable[..., None]:
    @torch.no_grad()
    @wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        own = {"step": state["step"]} if "step" in state else {}  # which is then copied to where it is
        original(self, model_param, {**own, **tensors})

    set_states.leaves_step = True  # type: ignore[attr-defined]
    return set_states


@cache
def _write_results() -> WriteResults:
    return WriteResults()


_write_preloaded_data = filesystem_async.FileSystemWriterAsync.write_preloaded_data


@filesystem_async._disable_gc()  # type: ignore[untyped-decorator]  # as what it replaces
def _write_parts(
    transform_list: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], global_results_queue: Any
) -> None:
    """Write the files of one rank's part of a checkpoint, each in a thread, as Megatron-Core does from 0.17 on."""
    assert not use_msc, "no option of this package leads here"
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    counted: queue.Queue[int] = queue.Queue()  # Megatron's way to tell that they are done
    with ThreadPoolExecutor(max_workers=len(write_buckets)) as threads:
        ended = []
        for number, bucket in enumerate(write_buckets):
            counted.put(number)
            ended.append(threads.submit(_write_preloaded_data, transform_list, number, bucket, answers, counted, True))
        for one in ended:
            one.result()  # raises what it did not catch
    found = dict(answers.get_nowait() for _ in write_buckets)
    failed = next((answer for answer in found.values() if isinstance(answer, Exception)), None)
    global_results_queue.put(found if failed is None else failed)


def _telling_of_its_end(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def close(self: Any, *arguments: Any, **keywords: Any) -> None:
        process = self.process
        original(self, *arguments, **keywords)
        if process is None or not process.exitcode:
            return
        try:
            found = _write_results().get_nowait()  # it had written all
        except queue.Empty:
            found = RuntimeError(f"a process that wrote a part of it was ended {_how_it_ended(process.exitcode)}")
        _write_results().put(found)

    close.tells_of_its_end = True  # type: ignore[attr-defined]
    return close


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    return f"by {name}, as the system does when memory runs out" if name == "SIGKILL" else f"by {name}"


def _swiglu(
    projected: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> torch.Tensor:
    return _weighted_swiglu(projected, bias, None, fp8_input_store or cpu_offload_input)


def _weighted_swiglu(
    projected: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor | None, fp8_input_store: bool = False
) -> torch.Tensor:
    assert not fp8_input_store, "no option of this package leads here"
    return pointwise.swiglu(_biased(projected, bias), weights)


def _geglu(projected: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return pointwise.geglu(_biased(projected, bias))


def _weighted_quick_geglu(
    projected: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    fp8_input_store: bool = False,
    linear_offset: float = 0.0,
    clamp_value: float | None = None,
) -> torch.Tensor:
    assert not fp8_input_store, "no option of this package leads here"
    return pointwise.quick_geglu(_biased(projected, bias), weights, offset=linear_offset, limit=clamp_value)


def _biased(projected: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return projected if bias is None else projected + bias


def _rotate(values: torch.Tensor, table: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    return pointwise.rotate(values, table, interleaved=interleaved)
