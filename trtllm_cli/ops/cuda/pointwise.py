"""Operators between the products: the gate of an MLP and the embedding. Norms and rotary lie in modules of their own.

``pdl`` 1 lets a kernel start while the one before it in the stream still ends: weights and scales must be older.
"""

from __future__ import annotations

import ctypes
from typing import Literal, cast

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library, pointwise_twin
from trtllm_cli.ops.cuda.pointwise_twin import TORCH_TYPES, Result
from trtllm_cli.ops.quantized import Type8

Activation = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class GatedParams(ctypes.Structure):
    """trtllm_gated_params."""

    _fields_ = [
        *((name, _ptr) for name in ("gate", "up", "out", "static_scale", "token_scales")),
        *((name, _i64) for name in ("tokens", "width", "gate_stride", "up_stride", "out_stride")),
        *((name, _i32) for name in ("dtype", "out_dtype", "activation", "pdl")),
    ]


class EmbeddingParams(ctypes.Structure):
    """trtllm_embedding_params."""

    _fields_ = [
        *((name, _ptr) for name in ("table", "row_scales", "ids", "out")),
        *((name, _i64) for name in ("tokens", "width", "vocab", "table_stride", "out_stride")),
        ("scale", _f32),
        *((name, _i32) for name in ("wide_ids", "dtype", "table_dtype", "pdl")),
    ]


# ---- gate -----------------------------------------------------------------------------------------------------------


def gated(
    gate: Tensor,
    up: Tensor,
    activation: Activation,
    quantize: Type8 | None = None,
    scale: Tensor | None = None,
    pdl: int = 0,
) -> Result:
    """``activation(gate) * up`` for gate, up [tokens, width] of one float dtype; rows may be strided.

    ``quantize`` gives int8 or float8_e4m3fn: divided by ``scale`` float32 [1], or by a scale for each token, returned.
    Raises UnsupportedError KERNEL_REFUSED for an unknown activation, unequal shapes or types, or a strided last axis.
    """
    return result(_gated(gate, up, activation, quantize or "", scale, pdl), quantize, scale)


@torch.library.custom_op("trtllm_cli::gated", mutates_args=(), device_types="cuda")
def _gated(gate: Tensor, up: Tensor, activation: str, quantize: str, scale: Tensor | None, pdl: int) -> list[Tensor]:
    _check_gated(gate, up, activation, quantize, scale)
    outputs = new_outputs(gate, quantize, scale)
    params = GatedParams(
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        out=outputs[0].data_ptr(),
        tokens=gate.shape[0],
        width=gate.shape[1],
        gate_stride=gate.stride(0),
        up_stride=up.stride(0),
        out_stride=outputs[0].stride(0),
        dtype=library.dtype_code(gate.dtype),
        out_dtype=library.dtype_code(outputs[0].dtype),
        activation=_ACTIVATIONS[activation],
        pdl=pdl,
    )
    set_scales(params, outputs, quantize, scale)
    library.load().launch("gated", params)
    return outputs


@_gated.register_kernel("cpu")
def _(gate: Tensor, up: Tensor, activation: str, quantize: str, scale: Tensor | None, pdl: int) -> list[Tensor]:
    _check_gated(gate, up, activation, quantize, scale)
    return listed(pointwise_twin.gated(gate, up, activation, type_of(quantize), scale))


@_gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str, quantize: str, scale: Tensor | None, pdl: int) -> list[Tensor]:
    return new_outputs(gate, quantize, scale)


def _check_gated(gate: Tensor, up: Tensor, activation: str, quantize: str, scale: Tensor | None) -> None:
    if activation not in _ACTIVATIONS:
        raise refused(f"gated does not know activation {activation!r}", "silu, gelu, gelu_tanh")
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise refused(
            f"gated needs gate and up of one shape [tokens, width], type and device, not {gate.dtype} "
            f"{tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}",
            "split the projections into equal halves",
        )
    check_rows("gated", gate=gate, up=up)
    check_quantize("gated", gate, quantize, scale)


# ---- embedding ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("trtllm_cli::embedding", mutates_args=(), device_types="cuda")
def embedding(
    ids: Tensor,
    table: Tensor,
    row_scales: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    pdl: int = 0,
) -> Tensor:
    """``table[ids] * scale``: [tokens, width] for ids int32 or int64 [tokens] and table [vocab, width].

    The result has the table's float dtype; an int8 table has ``row_scales`` float32 [vocab] and needs ``dtype``. A
    negative id is padding and gives zeros, an id beyond the table gives NaN.
    Raises UnsupportedError KERNEL_REFUSED for other shapes and types.
    """
    made = _check_embedding(ids, table, row_scales, dtype)
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=made, device=table.device)
    params = EmbeddingParams(
        table=table.data_ptr(),
        row_scales=None if row_scales is None else row_scales.data_ptr(),
        ids=ids.data_ptr(),
        out=out.data_ptr(),
        tokens=ids.shape[0],
        width=table.shape[1],
        vocab=table.shape[0],
        table_stride=table.stride(0),
        out_stride=out.stride(0),
        scale=scale,
        wide_ids=int(ids.dtype == torch.int64),
        dtype=library.dtype_code(made),
        table_dtype=library.dtype_code(table.dtype),
        pdl=pdl,
    )
    library.load().launch("embedding", params)
    return out


@embedding.register_kernel("cpu")
def _(
    ids: Tensor,
    table: Tensor,
    row_scales: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    pdl: int = 0,
) -> Tensor:
    made = _check_embedding(ids, table, row_scales, dtype)
    return pointwise_twin.embedding(ids, table, row_scales, scale, made)


@embedding.register_fake
def _(
    ids: Tensor,
    table: Tensor,
    row_scales: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    pdl: int = 0,
) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype or table.dtype)


def _check_embedding(ids: Tensor, table: Tensor, row_scales: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    made = dtype or table.dtype
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise refused(
            f"embedding needs ids int32 or int64 [tokens], contiguous, not {ids.dtype} {tuple(ids.shape)}",
            "ids.reshape(-1).int()",
        )
    if table.dim() != 2 or not table.shape[0] or table.dtype not in (made, torch.int8) or not made.is_floating_point:
        raise refused(
            f"embedding to {made} needs a table [vocab, width] of that type or int8, not {table.dtype} "
            f"{tuple(table.shape)}",
            "convert the table, or pass dtype for an int8 one",
        )
    if (row_scales is not None) != (table.dtype == torch.int8):
        raise refused("embedding needs row_scales for an int8 table, and takes none for another", "float32 [vocab]")
    if row_scales is not None and (row_scales.shape != table.shape[:1] or not plain(row_scales, torch.float32)):
        raise refused(
            f"embedding needs row_scales float32 [{table.shape[0]}], not {row_scales.dtype} {tuple(row_scales.shape)}",
            "one scale a row of the table",
        )
    check_rows("embedding", table=table)
    check_device("embedding", table, ids=ids, row_scales=row_scales)
    return made


# ---- what the modules of this family share --------------------------------------------------------------------------


def refused(sentence: str, remedy: str) -> UnsupportedError:
    """The error of arguments that no kernel takes."""
    return UnsupportedError("KERNEL_REFUSED", sentence, remedy)


def plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Contiguous and of that type."""
    return tensor.dtype == dtype and tensor.is_contiguous()


def check_rows(kernel: str, **tensors: Tensor | None) -> None:
    """The last axis must be contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise refused(
                f"{kernel} needs {name} with a contiguous last axis, its stride is {tensor.stride(-1)}", ".contiguous()"
            )


def check_device(kernel: str, beside: Tensor, **tensors: Tensor | None) -> None:
    """All on one device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != beside.device:
            raise refused(f"{kernel} has {name} on {tensor.device} and the others on {beside.device}", ".to(device)")


def check_quantize(kernel: str, x: Tensor, quantize: str, scale: Tensor | None) -> None:
    """A known 8-bit type or none; a static scale only with one."""
    if quantize not in ("", *TORCH_TYPES):
        raise refused(f"{kernel} cannot quantize to {quantize!r}", "int8 or fp8")
    if not x.dtype.is_floating_point or x.element_size() == 1:
        raise refused(f"{kernel} takes float16, bfloat16 or float32, not {x.dtype}", "convert it")
    if scale is not None and (not quantize or scale.numel() != 1 or scale.dtype != torch.float32):
        raise refused(
            f"{kernel} takes a static scale float32 [1] together with quantize, not {scale.dtype} {tuple(scale.shape)} "
            f"with {quantize!r}",
            "leave scale out for a scale a token",
        )
    check_device(kernel, x, scale=scale)


def type_of(quantize: str) -> Type8 | None:
    """An operator's string as the twin's argument."""
    return cast(Type8, quantize) if quantize else None


def new_outputs(x: Tensor, quantize: str, scale: Tensor | None, residual: bool = False) -> list[Tensor]:
    """Unwritten results of an operator on x [tokens, width]: out, a token's scales if any, the residual if any."""
    outputs = [torch.empty(x.shape, dtype=TORCH_TYPES.get(quantize, x.dtype), device=x.device)]
    if quantize and scale is None:
        outputs.append(torch.empty(x.shape[:1], dtype=torch.float32, device=x.device))
    if residual:
        outputs.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return outputs


def listed(found: Result) -> list[Tensor]:
    """What there is of a result, in the order of ``new_outputs``."""
    return [one for one in found if one is not None]


def result(outputs: list[Tensor], quantize: str | None, scale: Tensor | None, residual: bool = False) -> Result:
    """The outputs of an operator by name."""
    scales = outputs[1] if quantize and scale is None else None
    return Result(outputs[0], scales, outputs[-1] if residual else None)


def set_scales(params: ctypes.Structure, outputs: list[Tensor], quantize: str, scale: Tensor | None) -> None:
    """``static_scale`` or ``token_scales`` of a parameter struct."""
    if quantize and scale is None:
        params.token_scales = outputs[1].data_ptr()
    elif scale is not None:
        params.static_scale = scale.data_ptr()
