"""The product of 8-bit activations and weights, int8 or FP8 E4M3; scales, bias and residual are applied to sums."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library, w8a8_twin

_i64, _i32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
_OPERANDS = (torch.int8, torch.float8_e4m3fn)
_OUTPUTS = (torch.float16, torch.bfloat16)


class W8A8Params(ctypes.Structure):
    """trtllm_w8a8_params."""

    _fields_ = [
        ("a", _ptr),
        ("w", _ptr),
        ("a_scale", _ptr),
        ("w_scale", _ptr),
        ("bias", _ptr),
        ("residual", _ptr),
        ("out", _ptr),
        ("m", _i64),
        ("n", _i64),
        ("k", _i64),
        ("a_stride", _i64),
        ("w_stride", _i64),
        ("residual_stride", _i64),
        ("out_stride", _i64),
        ("dtype", _i32),
        ("out_dtype", _i32),
        ("a_scale_per_token", _i32),
        ("w_scale_per_channel", _i32),
        ("fast_accumulation", _i32),
        ("pdl", _i32),
        ("tactic", _i32),
    ]


@torch.library.custom_op("trtllm_cli::w8a8_linear", mutates_args=(), device_types="cuda")
def w8a8_linear(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
    pdl: bool = False,
    tactic: int = 0,
) -> Tensor:
    """``(a @ w.T) * a_scale * w_scale (+ bias) (+ residual)``: [M, N] of ``out_dtype``.

    a [M, K] and w [N, K] both int8 or float8_e4m3fn, rows may be strided; a_scale float32 [1] or [M], w_scale
    float32 [1] or [N]; bias [N] and residual [M, N] of ``out_dtype`` (float16 or bfloat16). int8 is summed in int32.
    float8 is summed by the matrix unit over 128 products and in float32 beyond them, with ``fast_accumulation`` by the
    matrix unit alone where that is faster. ``pdl``: the launch may overlap the end of the kernel before it, which must
    not write w. ``tactic`` forces one of :func:`tactics`.

    Raises UnsupportedError KERNEL_REFUSED for types, shapes, strides or a GPU that no kernel serves.
    """
    _check(a, w, a_scale, w_scale, bias, residual, out_dtype)
    out = torch.empty(a.shape[0], w.shape[0], dtype=out_dtype, device=a.device)
    params = parameters(a, w, a_scale, w_scale, bias, residual, out, fast_accumulation, pdl, tactic)
    library.load().launch("w8a8", params)
    return out


@w8a8_linear.register_kernel("cpu")
def _(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
    pdl: bool = False,
    tactic: int = 0,
) -> Tensor:
    _check(a, w, a_scale, w_scale, bias, residual, out_dtype)
    return w8a8_twin.w8a8_linear(a, w, a_scale, w_scale, bias, residual, out_dtype)


@w8a8_linear.register_fake
def _(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accumulation: bool = False,
    pdl: bool = False,
    tactic: int = 0,
) -> Tensor:
    return a.new_empty((a.shape[0], w.shape[0]), dtype=out_dtype)


def parameters(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    fast_accumulation: bool = False,
    pdl: bool = False,
    tactic: int = 0,
) -> W8A8Params:
    """The C parameters of a call on checked tensors."""
    return W8A8Params(
        a.data_ptr(),
        w.data_ptr(),
        a_scale.data_ptr(),
        w_scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        a.shape[0],
        w.shape[0],
        a.shape[1],
        _row_stride(a),
        _row_stride(w),
        0 if residual is None else _row_stride(residual),
        _row_stride(out),
        library.dtype_code(a.dtype),
        library.dtype_code(out.dtype),
        int(a_scale.numel() > 1),
        int(w_scale.numel() > 1),
        int(fast_accumulation),
        int(pdl),
        tactic,
    )


def tactics() -> list[int]:
    """Every number that ``tactic`` takes; which of them serve a call, the launch says."""
    handle = library.load().handle
    found: list[int] = []
    while number := int(handle.trtllm_w8a8_tactic(len(found) + 1)):
        found.append(number)
    return found


def _row_stride(x: Tensor) -> int:
    # torch gives the only row of a view any stride it likes
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _check(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    if a.dtype not in _OPERANDS or a.dtype != w.dtype:
        raise _refused(f"a and w both int8 or both float8_e4m3fn, not {a.dtype} and {w.dtype}", "quantize both alike")
    if out_dtype not in _OUTPUTS:
        raise _refused(f"out_dtype float16 or bfloat16, not {out_dtype}", "convert the result")
    if a.dim() != 2 or w.dim() != 2 or a.shape[1] != w.shape[1]:
        raise _refused(f"a [M, K] and w [N, K], not {tuple(a.shape)} and {tuple(w.shape)}", "reshape to two axes")
    rows, columns = a.shape[0], w.shape[0]
    if a.shape[1] % 16 or not a.shape[1]:
        raise _refused(f"K to be a multiple of 16, not {a.shape[1]}", "pad a and w with zeros")
    if (a.numel() and a.stride(1) != 1) or (w.numel() and w.stride(1) != 1):
        raise _refused("a contiguous last axis of a and w", ".contiguous()")
    for name, scale, count in (("a_scale", a_scale, rows), ("w_scale", w_scale, columns)):
        if scale.dtype != torch.float32 or scale.numel() not in (1, count) or not scale.is_contiguous():
            raise _refused(
                f"{name} contiguous float32 of 1 or {count} elements, not {scale.dtype} {tuple(scale.shape)}",
                "one scale, or one a token and a channel",
            )
    if bias is not None and (bias.shape != (columns,) or bias.dtype != out_dtype or not bias.is_contiguous()):
        raise _refused(f"bias contiguous {out_dtype} [{columns}], not {bias.dtype} {tuple(bias.shape)}", "convert it")
    if residual is not None and (
        residual.shape != (rows, columns)
        or residual.dtype != out_dtype
        or (residual.numel() and residual.stride(1) != 1)
    ):
        raise _refused(
            f"residual {out_dtype} [{rows}, {columns}] with a contiguous last axis, not {residual.dtype} "
            f"{tuple(residual.shape)}",
            "convert it",
        )
    for other in (w, a_scale, w_scale, bias, residual):
        if other is not None and other.device != a.device:
            raise _refused(f"everything on one device, not {a.device} and {other.device}", "move it")


def _refused(needs: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", f"w8a8_linear needs {needs}", remedy)
