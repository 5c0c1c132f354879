"""What Transformer Engine's C extension would compute, in torch: as much of it as its Python calls for our models.

In float32 inside, rounded where the extension rounds. FP8, dropout and whatever else is not needed raises where it is
called. Names and arguments are those of Transformer Engine 2.16.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class DType(enum.IntEnum):
    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


_DTYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def _dtype(dtype: Any) -> Any:
    return _DTYPES[dtype] if isinstance(dtype, DType) else dtype


# matrix products; the extension thinks in columns, so its A is torch's second matrix


def _product(a: Tensor, transa: bool, b: Tensor, transb: bool) -> Tensor:
    first, second = b.reshape(-1, b.shape[-1]).float(), a.reshape(-1, a.shape[-1]).float()
    return (first.T if transb else first) @ (second.T if transa else second)


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *_: Any,
    **__: Any,
) -> tuple[Any, ...]:
    assert quantizer is None and not gelu and a.device == b.device and a.is_cuda
    result, bias_grad = _product(a, transa, b, transb), None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
        else:
            result = result + bias.float()
    if out is None:
        shape = result.shape if transb else (*b.shape[:-1], result.shape[1])
        out = result.to(a.dtype if out_dtype is None else _dtype(out_dtype)).reshape(shape)
    elif accumulate:
        out.add_(result.reshape(out.shape))
    else:
        out.copy_(result.reshape(out.shape))
    return out, bias_grad, gelu_in, None


def te_general_grouped_gemm(
    a: list[Tensor],
    transa: bool,
    b: list[Tensor],
    transb: bool,
    out: list[Tensor],
    out_dtype: Any,
    m_splits: list[int],
    bias: Any,
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *_: Any,
) -> Any:
    outs = list(torch.split(out[0], m_splits)) if single_output and not transb else out
    for number, (first, second, each) in enumerate(zip(a, b, outs, strict=False)):
        of_bias = bias[number] if bias else None
        if of_bias is not None and of_bias.numel() and grad:
            of_bias.copy_(second.float().sum(0))
        if first.numel() and second.numel():
            result = _product(first, transa, second, transb).reshape(each.shape)
            if of_bias is not None and of_bias.numel() and not grad:
                result = result + of_bias.float()
            each.add_(result) if accumulate else each.copy_(result)
        elif each.numel() and not accumulate:
            each.zero_()
    return bias


# norms, of rows


def _normed(x: Tensor, eps: float, *, centred: bool) -> tuple[Tensor | None, Tensor]:
    values = x.float()
    mean = values.mean(-1) if centred else None
    values = values - mean[:, None] if mean is not None else values
    return mean, (values.square().mean(-1) + eps).rsqrt()


def _scaled(weight: Tensor, zero_centred: bool) -> Tensor:
    return weight.float() + (1 if zero_centred else 0)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, zero_centred: bool
) -> tuple[Any, ...]:
    assert quantizer is None
    _, rsigma = _normed(x, eps, centred=False)
    return _written(x.float() * rsigma[:, None] * _scaled(weight, zero_centred), out, dtype), None, rsigma


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    zero_centred: bool,
) -> tuple[Any, ...]:
    assert quantizer is None
    mean, rsigma = _normed(x, eps, centred=True)
    assert mean is not None
    values = (x.float() - mean[:, None]) * rsigma[:, None]
    return _written(values * _scaled(weight, zero_centred) + bias.float(), out, dtype), mean, rsigma


def _written(values: Tensor, out: Tensor | None, dtype: Any) -> Tensor:
    values = values.to(_dtype(dtype))
    return values if out is None else out.copy_(values)


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    normed, gradient = x.float() * rsigma[:, None], grad.float()
    of_normed = gradient * _scaled(weight, zero_centred)
    of_x = rsigma[:, None] * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (gradient * normed).sum(0).to(weight.dtype)


def layernorm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, margin: int, zero_centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    centred = x.float() - mean[:, None]
    of_x, of_weight = rmsnorm_bwd(grad.float(), centred, rsigma, weight, margin, zero_centred)
    of_x = of_x - (rsigma[:, None] * grad.float() * _scaled(weight, zero_centred)).mean(-1, keepdim=True)
    return of_x.to(x.dtype), of_weight, grad.float().sum(0).to(weight.dtype)


# attention within the documents of a packed row, and its rotary embedding

NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": -1, "NVTE_F16_max512_seqlen": 0, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
)


def get_fused_attn_backend(is_training: bool, q_type: Any, *_: Any) -> Any:
    takes = _dtype(q_type) in (torch.bfloat16, torch.float16)  # and no kernel takes packed rows in float32
    return NVTE_Fused_Attn_Backend["NVTE_F16_arbitrary_seqlen" if takes else "NVTE_No_Backend"]


def _attend(q: Tensor, k: Tensor, v: Tensor, boundaries: list[int], scale: float, window: Any) -> Tensor:
    """Return `[T, a, d]` from `[T, a, d]` and twice `[T, g, d]`; tokens behind the last boundary get zeros."""
    repeats, outputs = q.shape[1] // k.shape[1], []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        keys, values = (part[start:end].float().repeat_interleave(repeats, 1) for part in (k, v))
        places = torch.arange(end - start, device=q.device)
        distance = places[:, None] - places
        seen = (distance >= 0) if window[0] < 0 else (distance >= 0) & (distance <= window[0])
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
    return torch.cat([*outputs, torch.zeros_like(q[boundaries[-1] :])])


def _boundaries(cu_seqlens: Tensor) -> list[int]:
    with _disable_current_modes():  # the kernel would read them on the device: nobody waits for them
        return [int(number) for number in cu_seqlens.tolist()]


def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, *others: Any
) -> list[Tensor]:
    window, cu_seqlens, (q, k, v) = others[7], others[9], others[11:14]
    assert dropout == 0.0 and "THD" in str(others[1]).upper(), others[1]
    output = _attend(q, k, v, _boundaries(cu_seqlens), scale, window)
    return [output, torch.zeros(1, device=q.device), torch.zeros(2, dtype=torch.int64, device=q.device)]


def fused_attn_bwd(max_q: int, max_kv: int, scale: float, dropout: float, *others: Any) -> list[Tensor]:
    window, cu_seqlens, (q, k, v), grad = others[10], others[13], others[15:18], others[19]
    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    with torch.enable_grad():
        output = _attend(leaves[0], leaves[1], leaves[2], _boundaries(cu_seqlens), scale, window)
        grads = torch.autograd.grad(output, leaves, grad.reshape(q.shape))
    return [*grads, torch.empty(0, device=q.device), torch.empty(0, device=q.device)]


def _rotated(x: Tensor, frequencies: Tensor, cu_seqlens: Tensor, sign: int) -> Tensor:
    channels, places = frequencies.shape[-1], torch.arange(x.shape[0], device=x.device)
    starts = cu_seqlens[torch.bucketize(places, cu_seqlens[1:].long(), right=True)]
    angles = frequencies[(places - starts).long(), 0]
    turned, rest = x[..., :channels].float(), x[..., channels:]
    swapped = torch.cat([-turned[..., channels // 2 :], turned[..., : channels // 2]], -1)
    return torch.cat([(turned * angles.cos() + sign * swapped * angles.sin()).to(x.dtype), rest], -1)


def fused_rope_forward(
    x: Tensor, frequencies: Tensor, start: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Tensor, *_: Any
) -> Tensor:
    assert "THD" in str(qkv_format) and not interleaved and start is None
    return _rotated(x, frequencies, cu_seqlens, 1)


def fused_rope_backward(
    grad: Tensor, frequencies: Tensor, start: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Tensor, *_: Any
) -> Tensor:
    return _rotated(grad, frequencies, cu_seqlens, -1)


# the optimizer's


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, first, second, *master in zip(*lists, strict=True):
        weight = master[0] if master else parameter
        gradient = grad.float() if mode else grad.float() + weight_decay * weight.float()
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (first / corrections[0]) / ((second / corrections[1]).sqrt() + eps)
        if mode:
            update = update + weight_decay * weight.float()
        weight.copy_(weight.float() - lr * update)
        if master:
            parameter.copy_(weight)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False, *_: Any
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([each.float().norm() for each in lists[0]]) if lists[0] else torch.zeros(1, device="cuda")
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], scale: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale

# names that are read when Transformer Engine is imported

_ENUMS = {
    "CommOverlapType": ("RS", "AG"),
    "CommOverlapAlgo": (),
    "NVTE_Bias_Type": ("NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"),
    "NVTE_Mask_Type": (
        "NVTE_NO_MASK",
        "NVTE_PADDING_MASK",
        "NVTE_CAUSAL_MASK",
        "NVTE_PADDING_CAUSAL_MASK",
        "NVTE_CAUSAL_BOTTOM_RIGHT_MASK",
        "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    ),
    "NVTE_Softmax_Type": ("NVTE_VANILLA_SOFTMAX", "NVTE_OFF_BY_ONE_SOFTMAX", "NVTE_LEARNABLE_SOFTMAX"),
    "Float8BlockScaleTensorFormat": ("GEMM_READY", "COMPACT"),
    "FP8FwdTensors": tuple(f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")),
    "FP8BwdTensors": tuple(f"{kind}{n}" for n in (1, 2, 3) for kind in ("GRAD_OUTPUT", "GRAD_INPUT")),
}
_CLASSES = ("CommOverlap", "CommOverlapP2P", "CommOverlapHelper", "CommOverlapBase", "CommOverlapP2PBase")
_CLASSES += ("CommOverlapCore", "FP8TensorMeta", "FusedAttnHelper")
_FACTS = {
    "get_cudnn_version": 91300,
    "get_cublasLt_version": 130000,
    "get_num_cublas_streams": 4,
    "ubuf_built_with_mpi": False,
    "device_supports_multicast": False,
}
_OF_PYTHON = ("general_gemm", "general_grouped_gemm", "general_grouped_gemm_for_grouped_tensor")
"""Names that look like the extension's, but are Transformer Engine's own."""


class _Named(type):
    """An enumeration of whatever is asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def extension(package: Path) -> ModuleType:
    """Return the module that Transformer Engine, whose Python is in the folder `package`, takes for its extension."""
    module = ModuleType("transformer_engine_torch")
    own = {name: value for name, value in globals().items() if callable(value) and not name.startswith("_")}
    for name in ("Tensor", "Path", "ModuleType", "Callable", "Any", "extension"):
        own.pop(name, None)
    enums = {name: enum.IntEnum(name, {m: i for i, m in enumerate(members)}) for name, members in _ENUMS.items()}
    classes = {name: type(name, (), {}) for name in _CLASSES}
    named = {name: _Named(name, (), {}) for name in ("NVTE_QKV_Layout", "NVTE_QKV_Format")}
    facts = {name: functools.partial(_fact, value) for name, value in _FACTS.items()}
    vars(module).update({**own, **enums, **classes, **named, **facts})
    known = set(vars(module))
    called = {name for file in package.rglob("*.py") for name in re.findall(r"\btex\.([a-z]\w+)", file.read_text())}
    module.__getattr__ = _absent  # type: ignore[method-assign]
    module.__all__ = sorted({name for name in known if not name.startswith("_")} | called - {*_OF_PYTHON})  # type: ignore[attr-defined]
    return module


def _fact(value: Any, *_: Any) -> Any:
    return value


def _absent(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in here")

    call.__name__ = name
    return call
