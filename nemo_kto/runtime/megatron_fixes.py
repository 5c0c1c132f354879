"""Named changes to Megatron-Core, for this process and on every device; each says what goes wrong without it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import experts, moe_utils

from nemo_kto.algorithms import pointwise
from nemo_kto.runtime.write_results import WriteResults, become_helper


def exchange_shapes_in_order() -> None:
    """Exchange the shapes of activations the way the activations themselves are exchanged; idempotent.

    With rows of different lengths, each stage tells its neighbours the shape of what follows
    (`P2PCommunicator._communicate_shapes`, Megatron-Core 0.16). Under an interleaved schedule, where activations and
    gradients are in flight at once, its way fails twice:

    * It sends to the previous stage first and receives from the previous stage first. With two stages those are one
      and the same process, and the shape of a gradient is taken for that of an activation and the other way round.
      `_p2p_ops`, which carries the tensors, orders even and odd stages so that they meet.
    * It waits until the shapes it sends have been received. Where one stage exchanges both directions at once and its
      neighbour one after the other, each then waits for the other for ever. Only what is received has to be there.
    """
    p2p_communication.P2PCommunicator._communicate_shapes = _communicate_shapes


def route_without_transformer_engine() -> None:
    """Let a router multiply with torch where Transformer Engine cannot be imported; idempotent.

    `RouterGatingLinearFunction` (transformer/moe/moe_utils.py, Megatron-Core 0.16) asks whether Transformer Engine's
    kernel is None. Where its import has failed there is no such name at all, and the router ends in a NameError.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def keep_less_for_backward() -> None:
    """Let what Megatron's configuration calls fused activations and rotary embeddings be `pointwise`'s; idempotent.

    `bias_activation_fusion` would run functions of `fusions/fused_bias_swiglu.py` that torch.compile translates at
    their first call, for which a machine needs a compiler; `apply_rope_fusion` needs Transformer Engine (Megatron-Core
    0.16). Without them a feed-forward part keeps five tensors of its inner width, with them three.
    """
    mlp.bias_swiglu_impl = _swiglu
    for module in (mlp, experts):
        module.weighted_bias_swiglu_impl = _weighted_swiglu
    rope_utils.fused_apply_rotary_pos_emb = _rotate


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
    """Let the processes that write checkpoints be helpers of their rank, and report without a process of their own.

    See `write_results.py`; idempotent. One queue for all saves, as Megatron has it: there is one at a time.
    """
    if getattr(filesystem_async, "_get_write_results_queue", None) is not _write_results:
        filesystem_async._get_write_results_queue = _write_results
        filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_write_as_helper)


def outlive_failed_writes() -> None:
    """Let rank 0 go on when it cannot write what it alone writes between exchanges with the others; idempotent.

    Megatron-Core 0.16 writes common.pt (strategies/common.py), .metadata (strategies/state_dict_saver.py) and
    metadata.json (serialization.py) there. On a full disk that raises on rank 0 only, and the others wait for it until
    their exchange times out. Here the error is kept for `take_failed_write`, and nothing more is written.
    """
    for owner, name in (
        (common.TorchCommonSaveStrategy, "save_common"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ):
        original = getattr(owner, name)
        if not hasattr(original, "outlives"):
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


def _write_as_helper(*arguments: Any, **keywords: Any) -> None:
    """Write one file of a checkpoint, in a process forked for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    become_helper(parent.pid)
    _write_preloaded_data(*arguments, **keywords)


def _swiglu(
    projected: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False
) -> torch.Tensor:
    return _weighted_swiglu(projected, bias, None, fp8_input_store or cpu_offload_input)


def _weighted_swiglu(
    projected: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor | None, fp8_input_store: bool = False
) -> torch.Tensor:
    assert bias is None and not fp8_input_store, "no option of this package leads here"
    return pointwise.swiglu(projected, weights)


def _rotate(values: torch.Tensor, table: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    assert not interleaved, "no model of this package has its channels in that order"
    return pointwise.rotate(values, table)


def _communicate_shapes(
    self: Any,
    tensor_send_next: torch.Tensor | None,
    tensor_send_prev: torch.Tensor | None,
    recv_prev: bool,
    recv_next: bool,
) -> tuple[list[int], list[int]]:
    """Return the shapes of what comes from the previous and from the next stage; zeros where nothing comes."""
    device = torch.cuda.current_device()

    def shape_of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=device)

    for request, _ in getattr(self, "_shapes_on_their_way", ()):
        request.wait()
    to_prev, to_next = shape_of(tensor_send_prev), shape_of(tensor_send_next)
    from_prev, from_next = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    requests = p2p_communication._p2p_ops(
        tensor_send_prev=to_prev,
        tensor_recv_prev=from_prev if recv_prev else None,
        tensor_send_next=to_next,
        tensor_recv_next=from_next if recv_next else None,
        group=self.pp_group,
        prev_pipeline_rank=self.prev_rank,
        next_pipeline_rank=self.next_rank,
    )
    for name, request in requests.items():
        if name.startswith("recv"):
            request.wait()
    # A tensor must not be freed while it is sent. Nobody waits for the shapes of a pass's last exchange; they have
    # arrived with the tensors that followed them, which the schedule does wait for.
    self._shapes_on_their_way = [
        (requests[name], tensor)
        for name, tensor in (("send_prev", to_prev), ("send_next", to_next))
        if name in requests
    ]
    return from_prev.tolist(), from_next.tolist()
