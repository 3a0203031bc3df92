"""RMS and layer norm, with the residual added before and quantization after; quantization of activations alone."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor

from trtllm_cli.ops.cuda import library, pointwise_twin
from trtllm_cli.ops.cuda.pointwise import (
    check_device,
    check_quantize,
    check_rows,
    listed,
    new_outputs,
    plain,
    refused,
    result,
    set_scales,
    type_of,
)
from trtllm_cli.ops.cuda.pointwise_twin import Result
from trtllm_cli.ops.quantized import Type8

_KINDS = {"rms": 0, "layer": 1, "none": 2}
_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class NormParams(ctypes.Structure):
    """trtllm_norm_params."""

    _fields_ = [
        *((name, _ptr) for name in ("x", "residual", "gamma", "beta", "residual_out", "out")),
        *((name, _ptr) for name in ("static_scale", "token_scales")),
        *((name, _i64) for name in ("tokens", "width", "x_stride", "residual_stride")),
        *((name, _i64) for name in ("residual_out_stride", "out_stride")),
        *((name, _f32) for name in ("eps", "gamma_offset")),
        *((name, _i32) for name in ("kind", "dtype", "out_dtype", "pdl")),
    ]


def norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float,
    gamma_offset: float = 0.0,
    quantize: Type8 | None = None,
    scale: Tensor | None = None,
    pdl: int = 0,
) -> Result:
    """The normalised x + residual, and that sum: see ``pointwise_twin.norm``.

    ``x``, ``residual`` [tokens, width] of one float dtype, rows may be strided; ``gamma``, ``beta`` [width] of it.
    ``quantize`` gives int8 or float8_e4m3fn, divided by ``scale`` float32 [1] or by a scale for each token, returned.
    Raises UnsupportedError KERNEL_REFUSED for other shapes and types.
    """
    outputs = _norm(x, gamma, beta, residual, kind, eps, gamma_offset, quantize or "", scale, pdl)
    return result(outputs, quantize, scale, residual is not None)


def quantize(x: Tensor, type: Type8, scale: Tensor | None = None, pdl: int = 0) -> Result:
    """x [tokens, width] as int8 or float8_e4m3fn, divided by ``scale`` float32 [1] or by a scale for each token, which
    is returned: the values of ``quantize_activation`` of :mod:`trtllm_cli.ops.quantized`."""
    return result(_norm(x, None, None, None, "none", 0.0, 0.0, type, scale, pdl), type, scale)


@torch.library.custom_op("trtllm_cli::norm", mutates_args=(), device_types="cuda")
def _norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    kind: str,
    eps: float,
    gamma_offset: float,
    quantize: str,
    scale: Tensor | None,
    pdl: int,
) -> list[Tensor]:
    _check(x, gamma, beta, residual, kind, quantize, scale)
    outputs = new_outputs(x, quantize, scale, residual is not None)
    params = NormParams(
        x=x.data_ptr(),
        out=outputs[0].data_ptr(),
        tokens=x.shape[0],
        width=x.shape[1],
        x_stride=x.stride(0),
        out_stride=outputs[0].stride(0),
        eps=eps,
        gamma_offset=gamma_offset,
        kind=_KINDS[kind],
        dtype=library.dtype_code(x.dtype),
        out_dtype=library.dtype_code(outputs[0].dtype),
        pdl=pdl,
    )
    if gamma is not None:
        params.gamma = gamma.data_ptr()
    if beta is not None:
        params.beta = beta.data_ptr()
    if residual is not None:
        params.residual, params.residual_stride = residual.data_ptr(), residual.stride(0)
        params.residual_out, params.residual_out_stride = outputs[-1].data_ptr(), outputs[-1].stride(0)
    set_scales(params, outputs, quantize, scale)
    library.load().launch("norm", params)
    return outputs


@_norm.register_kernel("cpu")
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    kind: str,
    eps: float,
    gamma_offset: float,
    quantize: str,
    scale: Tensor | None,
    pdl: int,
) -> list[Tensor]:
    _check(x, gamma, beta, residual, kind, quantize, scale)
    found = pointwise_twin.norm(
        x,
        gamma,
        beta,
        residual,
        kind=kind,
        eps=eps,
        gamma_offset=gamma_offset,
        quantize=type_of(quantize),
        scale=scale,
    )
    return listed(found)


@_norm.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    kind: str,
    eps: float,
    gamma_offset: float,
    quantize: str,
    scale: Tensor | None,
    pdl: int,
) -> list[Tensor]:
    return new_outputs(x, quantize, scale, residual is not None)


def _check(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    kind: str,
    quantize: str,
    scale: Tensor | None,
) -> None:
    if kind not in _KINDS:
        raise refused(f"norm does not know kind {kind!r}", "rms or layer")
    if x.dim() != 2:
        raise refused(f"norm needs x [tokens, width], not {tuple(x.shape)}", "x.flatten(0, -2)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise refused(
            f"norm needs a residual of x's shape and type {x.dtype} {tuple(x.shape)}, not {residual.dtype} "
            f"{tuple(residual.shape)}",
            "convert it",
        )
    for name, weight in (("gamma", gamma), ("beta", beta)):
        if weight is not None and (weight.shape != x.shape[1:] or not plain(weight, x.dtype)):
            raise refused(
                f"norm needs {name} [{x.shape[1]}] of x's type {x.dtype}, contiguous, not {weight.dtype} "
                f"{tuple(weight.shape)}",
                "convert it",
            )
    check_rows("norm", x=x, residual=residual)
    check_quantize("norm", x, quantize, scale)
    check_device("norm", x, gamma=gamma, beta=beta, residual=residual)
