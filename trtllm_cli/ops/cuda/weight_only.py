"""Products with int4, int8, FP8 or 16-bit weights and 16-bit activations, with what comes before and after fused.

:func:`linear` is the entry; it takes a :class:`PackedWeight` apart for the operator ``trtllm_cli::weight_only_linear``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library, weight_only_twin
from trtllm_cli.ops.cuda.weight_only_packing import DEPTH, ROW_PADDING, STRIPE, WEIGHT_BYTES, PackedWeight, WeightType

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
GATES = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
#: the most tokens for which dense weights are taken
FEW_TOKENS = 8


class WeightOnlyGemmParams(ctypes.Structure):
    """trtllm_weight_only_gemm_params."""

    _fields_ = [
        ("x", _ptr),
        ("weight", _ptr),
        ("scale", _ptr),
        ("bias", _ptr),
        ("residual", _ptr),
        ("out", _ptr),
        ("norm_weight", _ptr),
        ("order", _ptr),
        ("workspace", _ptr),
        ("workspace_bytes", _i64),
        ("m", _i64),
        ("n", _i64),
        ("k", _i64),
        ("x_stride", _i64),
        ("residual_stride", _i64),
        ("out_stride", _i64),
        ("weight_stride", _i64),
        ("weight_multiplier", _f32),
        ("norm_eps", _f32),
        ("norm_offset", _f32),
        ("group", _i32),
        ("has_zero", _i32),
        ("weight_dtype", _i32),
        ("dtype", _i32),
        ("gate", _i32),
        ("pdl", _i32),
        ("tactic", _i32),
    ]


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    gate: str = "none",
    pdl: bool = False,
    tactic: int = 0,
) -> Tensor:
    """``act(norm(x) @ W.T + bias) + residual``: [M, N], for a gate [M, N / 2], of x's type.

    x [M, K] float16 or bfloat16, rows may be strided; bias [N], residual like the result, norm_weight [K], all of x's
    type. With ``norm_weight`` x is RMS-normalised first and multiplied by ``norm_offset + norm_weight``. ``gate``
    (silu, gelu, gelu_tanh): W's rows and the bias are interleaved by ``interleave_gate_up``, the result is
    act(gate) * up. Dense weights are taken for up to 8 tokens. ``pdl``: the launch may overlap the end of the kernel
    before it, which must not write the weights. ``tactic`` forces a kernel: 1 to 99 for few tokens, from 100 on those
    on tensor cores.

    Raises UnsupportedError KERNEL_REFUSED for types, shapes, strides or a GPU that no kernel serves.
    """
    result: Tensor = weight_only_linear(
        x,
        weight.data,
        weight.scale,
        weight.order,
        weight.type,
        weight.n,
        weight.k,
        weight.group,
        weight.has_zero,
        weight.multiplier,
        bias,
        residual,
        norm_weight,
        norm_eps,
        norm_offset,
        gate,
        pdl,
        tactic,
    )
    return result


@torch.library.custom_op("trtllm_cli::weight_only_linear", mutates_args=(), device_types="cuda")
def weight_only_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    order: Tensor | None,
    type: str,
    n: int,
    k: int,
    group: int,
    has_zero: bool,
    multiplier: float,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    gate: str,
    pdl: bool,
    tactic: int,
) -> Tensor:
    """:func:`linear` with the weight's parts."""
    weight = _weight(data, scale, order, type, n, k, group, has_zero, multiplier)
    _check(x, weight, bias, residual, norm_weight, gate)
    out = torch.empty(x.shape[0], _width(n, gate), dtype=x.dtype, device=x.device)
    params = parameters(x, weight, out, bias, residual, norm_weight, norm_eps, norm_offset, gate, pdl, tactic)
    bound = library.load()
    size = bound.workspace_bytes("weight_only_gemm", params)
    if size > 0:
        # held until the launch is queued; the allocator orders its reuse on this stream
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    bound.launch("weight_only_gemm", params)
    return out


@weight_only_linear.register_kernel("cpu")
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    order: Tensor | None,
    type: str,
    n: int,
    k: int,
    group: int,
    has_zero: bool,
    multiplier: float,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    gate: str,
    pdl: bool,
    tactic: int,
) -> Tensor:
    weight = _weight(data, scale, order, type, n, k, group, has_zero, multiplier)
    _check(x, weight, bias, residual, norm_weight, gate)
    return weight_only_twin.weight_only_linear(x, weight, bias, residual, norm_weight, norm_eps, norm_offset, gate)


@weight_only_linear.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    order: Tensor | None,
    type: str,
    n: int,
    k: int,
    group: int,
    has_zero: bool,
    multiplier: float,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    gate: str,
    pdl: bool,
    tactic: int,
) -> Tensor:
    return x.new_empty((x.shape[0], _width(n, gate)))


def parameters(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
    gate: str = "none",
    pdl: bool = False,
    tactic: int = 0,
) -> WeightOnlyGemmParams:
    """The C parameters of a call on checked tensors, without a workspace."""
    types = {"int4": library.INT4, "int8": library.INT8, "fp8": library.FLOAT8_E4M3}
    dtype = library.dtype_code(x.dtype)
    return WeightOnlyGemmParams(
        x=x.data_ptr(),
        weight=weight.data.data_ptr(),
        scale=_pointer(weight.scale),
        bias=_pointer(bias),
        residual=_pointer(residual),
        out=out.data_ptr(),
        norm_weight=_pointer(norm_weight),
        order=_pointer(weight.order),
        m=x.shape[0],
        n=weight.n,
        k=weight.k,
        x_stride=_row_stride(x),
        residual_stride=0 if residual is None else _row_stride(residual),
        out_stride=_row_stride(out),
        weight_stride=weight.k if weight.type == "dense" else 0,
        weight_multiplier=weight.multiplier,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        group=weight.group,
        has_zero=int(weight.has_zero),
        weight_dtype=types.get(weight.type, dtype),
        dtype=dtype,
        gate=GATES[gate],
        pdl=int(pdl),
        tactic=tactic,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _row_stride(tensor: Tensor) -> int:
    """A single row may have any stride: give the one the checks expect."""
    return max(tensor.stride(0), tensor.shape[1]) if tensor.shape[0] <= 1 else tensor.stride(0)


def _width(n: int, gate: str) -> int:
    return n if gate == "none" else n // 2


def _weight(
    data: Tensor,
    scale: Tensor | None,
    order: Tensor | None,
    type: str,
    n: int,
    k: int,
    group: int,
    has_zero: bool,
    multiplier: float,
) -> PackedWeight:
    if type not in ("dense", *DEPTH):
        raise _refused(f"does not know weights of type {type!r}", "use int4, int8, fp8 or dense")
    kind: WeightType = type  # type: ignore[assignment]
    return PackedWeight(kind, n, k, data, scale, group, has_zero, order, multiplier)


def _check(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    gate: str,
) -> None:
    if gate not in GATES:
        raise _refused(f"does not know the gate {gate!r}", "use none, silu, gelu or gelu_tanh")
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise _refused(
            f"needs x of shape [M, {weight.k}] for weights [{weight.n}, {weight.k}], not {tuple(x.shape)}",
            "flatten x to its rows",
        )
    if x.is_cuda and x.dtype not in (torch.float16, torch.bfloat16):
        raise _refused(f"takes float16 or bfloat16 activations, not {x.dtype}", "convert x")
    if gate != "none" and weight.n % 16:
        raise _refused(f"takes gated weights of rows in pairs of 8, not {weight.n} rows", "pad gate and up")
    wanted = {
        "bias": (bias, (weight.n,)),
        "residual": (residual, (x.shape[0], _width(weight.n, gate))),
        "norm_weight": (norm_weight, (weight.k,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device):
            raise _refused(
                f"needs {name} {x.dtype} {shape} on {x.device}, not {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}",
                "match the shape and type of the product",
            )
        if tensor is not None and tensor.numel() and tensor.stride(-1) != 1:
            raise _refused(f"needs {name} with a contiguous last axis", ".contiguous()")
    if x.numel() and x.stride(-1) != 1:
        raise _refused("needs x with a contiguous last axis", ".contiguous()")
    if x.shape[0] > 1 and (
        x.stride(0) < x.shape[1] or (residual is not None and residual.stride(0) < residual.shape[1])
    ):
        raise _refused("needs rows of x and residual that do not overlap", ".contiguous()")
    _check_weight(x, weight)


def _check_weight(x: Tensor, weight: PackedWeight) -> None:
    """The packed buffers have the sizes n and k ask for: nothing is read beyond them."""
    if weight.type == "dense":
        shape: tuple[int, ...] = (weight.n, weight.k)
        dtype = x.dtype
    else:
        depth = DEPTH[weight.type]
        size = WEIGHT_BYTES
        if weight.type == "int4":
            if weight.group not in (32, 64, 128) or weight.k % weight.group:
                raise _refused(
                    f"takes int4 groups of 32, 64 or 128 that divide K, not {weight.group} over {weight.k}",
                    "quantize with such a group size",
                )
            size += 128 // weight.group * (48 if weight.has_zero else 32)
        shape = (-(-weight.n // ROW_PADDING) * (ROW_PADDING // STRIPE), -(-weight.k // depth), size)
        dtype = torch.uint8
    parts: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [("data", weight.data, shape, dtype)]
    if weight.type in ("int8", "fp8"):
        parts.append(("scale", weight.scale, (-(-weight.n // ROW_PADDING) * ROW_PADDING,), torch.float32))
    if weight.order is not None:
        parts.append(("order", weight.order, (weight.k,), torch.int32))
    for name, tensor, wanted, kind in parts:
        if tensor is None or tensor.shape != wanted or tensor.dtype != kind or tensor.device != x.device:
            found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            if x.dtype not in (torch.float16, torch.bfloat16) and weight.type == "dense":
                continue  # the twin in float64 takes 16-bit weights
            raise _refused(
                f"needs the {name} of {weight.type} weights [{weight.n}, {weight.k}] as {kind} {wanted} on {x.device}, "
                f"not {found}",
                "pack them with weight_only_packing",
            )
        if not tensor.is_contiguous():
            raise _refused(f"needs contiguous {name}", ".contiguous()")


def _refused(sentence: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", f"weight_only_linear {sentence}", remedy)
