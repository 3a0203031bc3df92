"""The parameters of generation attention as the kernels' C interface has them, and the checks both operators share.

What the launcher checks itself (alignment, strides, the GPU, the workspace) it refuses with a sentence of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
PAGE_SIZES = (16, 32, 64, 128)
_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class MmhaParams(ctypes.Structure):
    """trtllm_mmha_params."""

    _fields_ = [
        *((name, _ptr) for name in ("q", "k_cache", "v_cache", "out", "page_table", "lengths")),
        *((name, _ptr) for name in ("k_scale", "v_scale", "alibi_slopes", "cos", "sin", "positions")),
        *((name, _ptr) for name in ("q_norm", "k_norm", "workspace")),
        *((name, _i64) for name in ("workspace_bytes", "q_batch_stride", "q_token_stride", "q_head_stride")),
        *((name, _i64) for name in ("k_page_stride", "k_head_stride", "k_token_stride")),
        *((name, _i64) for name in ("v_page_stride", "v_head_stride", "v_token_stride")),
        *((name, _i64) for name in ("out_batch_stride", "out_token_stride", "out_head_stride")),
        *((name, _i64) for name in ("page_table_stride", "rotary_positions")),
        *((name, _i32) for name in ("batch", "q_length", "heads", "kv_heads", "head_size", "page_size", "max_length")),
        *((name, _i32) for name in ("window", "rotary_dim", "interleaved", "append", "dtype", "cache_dtype")),
        *((name, _f32) for name in ("scale", "soft_cap", "norm_eps", "norm_offset")),
        *((name, _i32) for name in ("pdl", "blocks", "stages")),
    ]


def common(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, page_table: Tensor, lengths: Tensor, workspace: Tensor
) -> MmhaParams:
    """What both operators set in the same way; ``out`` is [batch, T, heads, D]."""
    params = MmhaParams(q=q.data_ptr(), out=out.data_ptr(), lengths=lengths.data_ptr())
    params.k_cache, params.v_cache, params.page_table = k_cache.data_ptr(), v_cache.data_ptr(), page_table.data_ptr()
    params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.nbytes
    _, params.kv_heads, params.page_size, params.head_size = k_cache.shape
    params.k_page_stride, params.k_head_stride, params.k_token_stride = strides(k_cache, 0, 1, 2)
    params.v_page_stride, params.v_head_stride, params.v_token_stride = strides(v_cache, 0, 1, 2)
    params.out_batch_stride, params.out_token_stride, params.out_head_stride = strides(out, 0, 1, 2)
    params.page_table_stride = page_table.stride(0)
    params.batch, params.max_length = q.shape[0], page_table.shape[1] * k_cache.shape[2]
    params.dtype, params.cache_dtype = library.dtype_code(q.dtype), library.dtype_code(k_cache.dtype)
    return params


def set_pointers(params: MmhaParams, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        setattr(params, name, None if tensor is None else tensor.data_ptr())


def strides(x: Tensor, *axes: int) -> tuple[int, ...]:
    """Strides of the axes; that of an axis with one element is free, and 0 is always a good one."""
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in axes)


def check_q(q: Tensor) -> None:
    if q.dim() != 4:
        raise _refused(f"q {tuple(q.shape)}", "q [batch, tokens, heads, D]")


def check_qkv(qkv: Tensor, k_cache: Tensor) -> int:
    """Checks the fused row's width against the cache; the number of query heads."""
    if qkv.dim() != 2 or k_cache.dim() != 4:
        raise _refused(
            f"qkv {tuple(qkv.shape)} and a cache {tuple(k_cache.shape)}",
            "qkv [batch, (heads + 2 kv_heads) * D] and caches [num_pages, kv_heads, page_size, D]",
        )
    heads = qkv.shape[1] // k_cache.shape[3] - 2 * k_cache.shape[1]
    if qkv.shape[1] % k_cache.shape[3] or heads < 1:
        raise _refused(
            f"a row of {qkv.shape[1]} elements for {k_cache.shape[1]} kv heads of {k_cache.shape[3]}",
            "rows of (heads + 2 kv_heads) * D elements",
        )
    return heads


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    alibi_slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    heads: int,
) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise _refused(
            f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}", "both [num_pages, kv_heads, page_size, D]"
        )
    _, kv_heads, page_size, size = k_cache.shape
    if q.dim() == 4 and q.shape[3] != size:
        raise _refused(f"q with heads of {q.shape[3]} and a cache of {size}", "one head size")
    if kv_heads == 0 or heads % kv_heads:
        raise _refused(f"{heads} query heads over {kv_heads} kv heads", "a multiple")
    if page_size not in PAGE_SIZES:
        raise _refused(f"pages of {page_size} positions", "16, 32, 64 or 128")
    eight = k_cache.dtype in _EIGHT_BITS
    if k_cache.dtype != v_cache.dtype or (k_cache.dtype != q.dtype and not eight):
        raise _refused(
            f"caches of {k_cache.dtype} and {v_cache.dtype} with q of {q.dtype}",
            "q's type, int8 or float8_e4m3fn for both",
        )
    batch = q.shape[0]
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
        raise _refused(f"page_table {page_table.dtype} {tuple(page_table.shape)}", f"int32 [{batch}, max_pages]")
    if k_cache.shape[0] == 0 and page_table.numel():
        raise _refused(
            f"a page table of {page_table.shape[1]} columns and a cache without pages", "columns for pages only"
        )
    _check_vector("lengths", lengths, torch.int32, batch)
    for name, factors in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (factors is None) == eight:
            raise _refused(
                f"{name} {'missing' if eight else 'given'} with a cache of {k_cache.dtype}", "it for 8-bit caches"
            )
        if factors is not None:
            _check_vector(name, factors, torch.float32, kv_heads)
    if alibi_slopes is not None:
        _check_vector("alibi_slopes", alibi_slopes, torch.float32, heads)
    rows: Sequence[Tensor] = (q, k_cache, v_cache, page_table)
    if any(x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1 for x in rows):
        raise _refused("a strided last axis", ".contiguous()")
    others = (k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale)
    if any(x is not None and x.device != q.device for x in others):
        raise _refused("tensors on several devices", "one device for all")


def check_append(
    qkv: Tensor,
    k_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> None:
    size = k_cache.shape[3]
    if (cos is None) != (sin is None):
        raise _refused("one of cos and sin", "both or none")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if (
            table.dtype != torch.float32
            or table.dim() != 2
            or not table.is_contiguous()
            or (cos is not None and table.shape != cos.shape)
            or not 0 < 2 * table.shape[1] <= size
            or table.shape[1] % 2
            or table.shape[0] == 0
        ):
            raise _refused(
                f"{name} {table.dtype} {tuple(table.shape)}",
                f"contiguous float32 [positions, rotary_dim / 2], rotary_dim a multiple of 4 up to {size}",
            )
    if positions is not None:
        _check_vector("positions", positions, torch.int32, qkv.shape[0])
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check_vector(name, weight, qkv.dtype, size)
    if any(x is not None and x.device != qkv.device for x in (cos, sin, positions, q_norm, k_norm)):
        raise _refused("tensors on several devices", "one device for all")


def _check_vector(name: str, x: Tensor, dtype: torch.dtype, size: int) -> None:
    if x.dtype != dtype or x.shape != (size,) or not x.is_contiguous():
        raise _refused(f"{name} {x.dtype} {tuple(x.shape)}", f"contiguous {dtype} [{size}]")


def check_numbers(tokens: int, scale: float, window: int, soft_cap: float) -> None:
    """What the launcher checks for the GPU."""
    if not 1 <= tokens <= 8:
        raise _refused(f"{tokens} new tokens a sequence", "1 to 8, or fmha")
    if not scale > 0 or window < 0 or not soft_cap >= 0:
        raise _refused(
            f"a scale of {scale}, a window of {window} and a soft cap of {soft_cap}",
            "a scale above 0, the others at least 0",
        )


def _refused(what: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", f"mmha does not take {what}", remedy)
