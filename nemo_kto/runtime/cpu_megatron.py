"""Named patches that let Megatron-Core run on CPU with gloo process groups.

Megatron-Core assumes CUDA in a few dozen places: `device="cuda"` literals, `torch.cuda.current_device()`, generator
states kept per CUDA device. None of them matters to what is computed. `enable_cpu` redirects exactly those that dense
models and mixtures of experts, every kind of parallelism, the optimizers and sharded checkpoints reach; nothing
happens on import. The files named below are those of Megatron-Core 0.16.
"""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from nemo_kto.errors import ConfigError

_CPU = torch.device("cpu")
_DONE_MARK = "_nemo_kto_cpu"

_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",  # token counters of every schedule
    "megatron.core.optimizer.clip_grads",  # norm and zero counts
    "megatron.core.optimizer.optimizer",  # loss scale and overflow flag
    "megatron.core.optimizer.grad_scaler",  # the loss scale of float16
)
_TENSOR_FACTORIES = ("zeros", "tensor")


def enable_cpu() -> None:
    """Let Megatron-Core run on CPU in this process; calling it again changes nothing.

    Call it before the first process group is made.

    Raises:
        ConfigError: This process sees a CUDA device, which the patches would hide from Megatron-Core.
    """
    if torch.cuda.is_available():
        raise ConfigError(
            "A run on CPU was asked for, but this process sees a CUDA device. Set trainer.accelerator=gpu, "
            "or hide the devices with CUDA_VISIBLE_DEVICES=''."
        )
    if getattr(torch.cuda, _DONE_MARK, False):
        return
    patch_current_device()
    patch_generators()
    patch_cuda_literals()
    patch_gradient_clipping()
    patch_tensor_types()
    patch_token_dispatcher()
    patch_router_compilation()
    patch_uneven_exchanges()
    setattr(torch.cuda, _DONE_MARK, True)


def patch_current_device() -> None:
    """Make "the current CUDA device" the CPU.

    Reason: every communication buffer is allocated on `torch.cuda.current_device()` (tensor_parallel/mappings.py,
    pipeline_parallel/p2p_communication.py, distributed/param_and_grad_buffer.py, dist_checkpointing/strategies);
    `torch.cuda.synchronize()` follows each exchange between stages and precedes each save; a tied embedding is moved
    with `.cuda()` before it is copied to the last stage (models/common/language_module/language_module.py). From
    Megatron-Core 0.19 on, the exchange of gradients asks for the current stream, to let it wait for CUDA graphs, which
    are not there (distributed/param_and_grad_buffer.py). All of them raise on a machine without CUDA.
    """
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = _nothing
    torch.cuda.current_stream = _nothing  # type: ignore[assignment]
    torch.Tensor.cuda = _same_tensor  # type: ignore[assignment,method-assign]


def patch_generators() -> None:
    """Make the CPU generator the one that Megatron's tracker forks and seeds.

    Reason: tensor_parallel/random.py reads and sets the state of a CUDA generator; without CUDA reading raises and
    setting is queued for an initialisation that never comes.
    """
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = _get_generator_state
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _get_generator_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_generator_state  # type: ignore[attr-defined]


def patch_cuda_literals() -> None:
    """Send `torch.zeros(..., device="cuda")` and `torch.tensor(..., device="cuda")` of a few modules to the CPU.

    Reason: the modules listed above allocate small counters on a literal device. Each sees a namespace that stands in
    front of `torch`; all other modules see `torch` itself.
    """
    namespace = _TorchOnCpu("torch")
    for name in _MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).torch = namespace  # type: ignore[attr-defined]


def patch_gradient_clipping() -> None:
    """Replace `clip_grad_by_total_norm_fp32` by the same arithmetic for CPU tensors.

    Reason: optimizer/clip_grads.py asserts that each gradient's type is named "torch.cuda.FloatTensor".
    """
    for name in ("megatron.core.optimizer.clip_grads", "megatron.core.optimizer.optimizer"):
        importlib.import_module(name).clip_grad_by_total_norm_fp32 = _clip_gradients  # type: ignore[attr-defined]


def patch_tensor_types() -> None:
    """Let floating-point CPU tensors give the type names of CUDA tensors.

    Reason: optimizer/optimizer.py and optimizer/distrib_optimizer.py tell parameters apart by
    `param.type() == "torch.cuda.FloatTensor"`. Converting with `type(dtype)` is left alone.
    """
    torch.Tensor.type = _cuda_type  # type: ignore[assignment,method-assign]


def patch_token_dispatcher() -> None:
    """Leave out the CUDA stream on which the expert dispatcher brings token counts to the CPU.

    Reason: `MoEAlltoAllTokenDispatcher` (transformer/moe/token_dispatcher.py) makes a stream for those copies when it
    is built. Here the counts are on the CPU already; only the arrays that the exchange expects are made of them.
    """
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher = module.MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = _CPU  # whatever is not None: a stream is made only then
    dispatcher._maybe_dtoh_and_synchronize = _counts_as_arrays


def patch_router_compilation() -> None:
    """Run the router's method for biases, which nothing here uses, without compiling it first.

    Reason: `TopKRouter._apply_expert_bias` (transformer/moe/router.py) is a `torch.compile`d function, called for
    every micro-batch and layer; torch's compiler starts for it, which takes seconds and a C++ compiler.
    """
    router = importlib.import_module("megatron.core.transformer.moe.router").TopKRouter
    compiled = router._apply_expert_bias
    router._apply_expert_bias = getattr(compiled, "_torchdynamo_orig_callable", compiled)


def patch_uneven_exchanges() -> None:
    """Gather and scatter parts of different lengths by summing whole tensors.

    Reason: processes that share experts and differ in the tokens sent to them exchange them by `all_gather` and
    `reduce_scatter` with a length for each rank (tensor_parallel/mappings.py); gloo takes equal lengths only.
    """
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    for name, uneven in (
        ("_gather_along_first_dim", _gather_uneven),
        ("_reduce_scatter_along_first_dim", _reduce_scatter_uneven),
    ):
        setattr(mappings, name, functools.partial(_even_or, uneven, getattr(mappings, name)))


class _TorchOnCpu(types.ModuleType):
    """`torch`, except that the tensor factories read the device "cuda" as "cpu"."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _redirect(value) if name in _TENSOR_FACTORIES else value


def _redirect(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_cpu


def _clip_gradients(
    parameters: Iterable[torch.Tensor], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale the gradients in place by `max_norm / (total_norm + 1e-6)` when that is below one, as Megatron does."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0:
        for parameter in parameters:
            gradient = getattr(parameter, "decoupled_grad", None) if use_decoupled_grad else parameter.grad
            if gradient is not None:
                gradient.detach().mul_(coefficient)


_original_type = torch.Tensor.type


def _cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs:
        return _original_type(self, *args, **kwargs)
    name: str = _original_type(self)
    return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)


def _counts_as_arrays(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
    for name in ("input_splits", "output_splits", "output_splits_tp"):
        counts = getattr(self, name)
        if torch.is_tensor(counts):
            setattr(self, name, counts.numpy())
    return tokens_per_expert


def _even_or(
    uneven: Callable[..., torch.Tensor],
    even: Callable[..., torch.Tensor],
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    if split_sizes is None or group.size() == 1:
        return even(input_, group, None, use_global_buffer)
    return uneven(input_, group, split_sizes)


def _gather_uneven(input_: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Return all ranks' parts, of `sizes` along the first dimension: one all-reduce."""
    output = input_.new_zeros(sum(sizes), *input_.shape[1:])
    output.split(sizes)[group.rank()].copy_(input_)
    dist.all_reduce(output, group=group)
    return output


def _reduce_scatter_uneven(input_: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """Return this rank's part, of `sizes` along the first dimension, of the sum: one all-reduce."""
    total = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].contiguous()


def _current_device() -> torch.device:
    return _CPU


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _same_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


def _get_generator_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_generator_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)
