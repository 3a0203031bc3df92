"""Attention of the context phase: packed sequences, or new tokens over a paged cache."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import fmha_twin, library

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
HEAD_SIZES = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)


class FmhaParams(ctypes.Structure):
    """trtllm_fmha_params."""

    _fields_ = [
        *((name, _ptr) for name in ("q", "k", "v", "out", "lse")),
        *((name, _ptr) for name in ("q_starts", "kv_starts", "page_table", "kv_lengths", "alibi_slopes")),
        ("workspace", _ptr),
        *((name, _i64) for name in ("q_tokens", "kv_tokens", "num_pages")),
        *((name, _i64) for name in ("q_token_stride", "q_head_stride")),
        *((name, _i64) for name in ("k_token_stride", "k_head_stride", "k_page_stride")),
        *((name, _i64) for name in ("v_token_stride", "v_head_stride", "v_page_stride")),
        *((name, _i64) for name in ("out_token_stride", "out_head_stride", "page_table_stride")),
        *((name, _i32) for name in ("batch", "max_q_length", "heads", "kv_heads", "head_size", "page_size")),
        *((name, _i32) for name in ("causal", "window")),
        *((name, _f32) for name in ("scale", "soft_cap")),
        *((name, _i32) for name in ("dtype", "half_sums", "kernel", "pdl")),
    ]


@torch.library.custom_op("trtllm_cli::fmha", mutates_args=(), device_types="cuda")
def fmha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences: out [tokens, heads, D], and float32 [heads, tokens] (or [0]) log-sum-exp.

    ``q`` [tokens, heads, D]; ``k``, ``v`` [kv_tokens, kv_heads, D], float16 or bfloat16, D contiguous (slices of one
    fused projection will do); ``q_starts``, ``kv_starts`` int32 [batch + 1]; no sequence has more than ``max_q_length``
    queries. What a query sees is said in ``fmha_twin.fmha``; ``half_sums`` lets float16 products be summed in float16
    within a tile (float32 between tiles, relative error below 3e-3): kernel 1 always does so, kernel 0 where that is
    faster, which it is not on GPUs of 8.0, 9.0 and 10.0, kernel 2 refuses; ``kernel`` 0 chooses, 1 is the portable one,
    2 Hopper's.
    Raises UnsupportedError KERNEL_REFUSED for anything the kernels cannot do.
    """
    _check(q, k, v, q_starts, kv_starts, alibi_slopes, 3)
    out, lse = _outputs(q, return_lse)
    params = _params(q, k, v, out, lse, q_starts, max_q_length, scale, causal, window, soft_cap, alibi_slopes)
    params.kv_starts = kv_starts.data_ptr()
    params.kv_tokens = k.shape[0]
    params.kv_heads = k.shape[1]
    params.k_token_stride, params.k_head_stride = _strides(k, 0, 1)
    params.v_token_stride, params.v_head_stride = _strides(v, 0, 1)
    params.half_sums, params.kernel = half_sums, kernel
    _launch(params, q)
    return out, lse


@fmha.register_kernel("cpu")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, q_starts, kv_starts, alibi_slopes, 3)
    _check_sums(q, half_sums)
    return _twin(q, k, v, q_starts, kv_starts, scale, causal, window, soft_cap, alibi_slopes, return_lse)


@fmha.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, return_lse)


@torch.library.custom_op("trtllm_cli::fmha_paged", mutates_args=(), device_types="cuda")
def fmha_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    q_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    """As ``fmha``, over a paged cache that holds the new tokens already.

    ``k_cache``, ``v_cache`` [num_pages, kv_heads, page_size, D]; ``page_table`` int32 [batch, max_pages]: the pages of
    each sequence in order, of which only those that ``kv_lengths`` int32 [batch] reaches are read.
    """
    _check(q, k_cache, v_cache, q_starts, kv_lengths, alibi_slopes, 4)
    _check_pages(k_cache, page_table, kv_lengths)
    out, lse = _outputs(q, return_lse)
    params = _params(
        q, k_cache, v_cache, out, lse, q_starts, max_q_length, scale, causal, window, soft_cap, alibi_slopes
    )
    params.page_table, params.kv_lengths = page_table.data_ptr(), kv_lengths.data_ptr()
    params.num_pages, params.kv_heads, params.page_size = k_cache.shape[:3]
    params.page_table_stride = page_table.stride(0)
    params.k_page_stride, params.k_head_stride, params.k_token_stride = _strides(k_cache, 0, 1, 2)
    params.v_page_stride, params.v_head_stride, params.v_token_stride = _strides(v_cache, 0, 1, 2)
    params.half_sums, params.kernel = half_sums, kernel
    _launch(params, q)
    return out, lse


@fmha_paged.register_kernel("cpu")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    q_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(q, k_cache, v_cache, q_starts, kv_lengths, alibi_slopes, 4)
    _check_pages(k_cache, page_table, kv_lengths)
    _check_sums(q, half_sums)
    k, kv_starts = fmha_twin.gather_pages(k_cache, page_table, kv_lengths)
    v, _ = fmha_twin.gather_pages(v_cache, page_table, kv_lengths)
    return _twin(q, k, v, q_starts, kv_starts, scale, causal, window, soft_cap, alibi_slopes, return_lse)


@fmha_paged.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    kv_lengths: Tensor,
    q_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    half_sums: bool = False,
    kernel: int = 0,
) -> tuple[Tensor, Tensor]:
    return _outputs(q, return_lse)


def _outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if window < 0 or (window > 0 and not causal):
        raise _refused(
            f"a window of {window} {'with' if causal else 'without'} the causal mask", "0, or causal with one"
        )
    out, lse = fmha_twin.fmha(
        q,
        k,
        v,
        q_starts,
        kv_starts,
        scale=scale,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
    )
    return out, lse.float() if return_lse else lse.new_empty(0, dtype=torch.float32)


def _params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    max_q_length: int,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    alibi_slopes: Tensor | None,
) -> FmhaParams:
    """The fields that packed and paged keys share."""
    params = FmhaParams(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(), q_starts=q_starts.data_ptr()
    )
    params.lse = lse.data_ptr() if lse.numel() else None
    params.alibi_slopes = None if alibi_slopes is None else alibi_slopes.data_ptr()
    params.q_tokens, params.heads, params.head_size = q.shape
    params.q_token_stride, params.q_head_stride = _strides(q, 0, 1)
    params.out_token_stride, params.out_head_stride = out.stride()[:2]
    params.batch = q_starts.shape[0] - 1
    params.max_q_length = min(max_q_length, q.shape[0])
    params.causal, params.window = causal, window
    params.scale, params.soft_cap = scale, soft_cap
    params.dtype = library.dtype_code(q.dtype)
    return params


def _launch(params: FmhaParams, like: Tensor) -> None:
    loaded = library.load()
    workspace = like.new_empty(loaded.workspace_bytes("fmha", params), dtype=torch.uint8)
    params.workspace = workspace.data_ptr()
    loaded.launch("fmha", params)


def _strides(x: Tensor, *axes: int) -> tuple[int, ...]:
    """Strides of the axes; that of an axis with one element is free, and 0 is always a good one."""
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in axes)


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, kv_numbers: Tensor, alibi_slopes: Tensor | None, kv_dim: int
) -> None:
    if q.dim() != 3 or k.dim() != kv_dim or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        wanted = "[kv_tokens, kv_heads, D]" if kv_dim == 3 else "[num_pages, kv_heads, page_size, D]"
        raise _refused(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}", f"q [tokens, heads, D] and k, v {wanted}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise _refused(f"q of {q.dtype} with k of {k.dtype} and v of {v.dtype}", "one type for the three")
    if q.numel() and k.numel() and not (q.stride(-1) == k.stride(-1) == v.stride(-1) == 1):
        raise _refused("a strided last axis", ".contiguous()")
    if q.shape[1] % max(1, k.shape[1]):
        raise _refused(f"{q.shape[1]} query heads over {k.shape[1]} kv heads", "a multiple")
    batch = q_starts.shape[0] - 1
    kv_wanted = batch + 1 if kv_dim == 3 else batch
    for name, tensor, size in (("q_starts", q_starts, batch + 1), ("kv_starts or kv_lengths", kv_numbers, kv_wanted)):
        if tensor.dtype != torch.int32 or tensor.shape != (size,) or not tensor.is_contiguous() or batch < 0:
            raise _refused(f"{name} {tensor.dtype} {tuple(tensor.shape)}", f"contiguous int32 [{size}]")
    if alibi_slopes is not None and (alibi_slopes.dtype != torch.float32 or alibi_slopes.shape != q.shape[1:2]):
        raise _refused(
            f"ALiBi slopes {alibi_slopes.dtype} {tuple(alibi_slopes.shape)}",
            f"float32 [{q.shape[1]}], one a query head",
        )
    others = [x for x in (k, v, q_starts, kv_numbers, alibi_slopes) if x is not None]
    if any(x.device != q.device for x in others):
        raise _refused("tensors on several devices", "one device for all")


def _check_pages(cache: Tensor, page_table: Tensor, kv_lengths: Tensor) -> None:
    rows = kv_lengths.shape[0]
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != rows:
        raise _refused(f"page_table {page_table.dtype} {tuple(page_table.shape)}", f"int32 [{rows}, max_pages]")
    if page_table.numel() and page_table.stride(1) != 1:
        raise _refused("a page_table with strided rows", ".contiguous()")
    if page_table.device != cache.device:
        raise _refused("a page_table on another device", "one device for all")
    if cache.shape[2] not in PAGE_SIZES:
        raise _refused(f"pages of {cache.shape[2]} positions", "16, 32, 64 or 128")


def _check_sums(q: Tensor, half_sums: bool) -> None:
    """As the library refuses it; the twin itself sums in float32, as a permission lets it."""
    if half_sums and q.dtype == torch.bfloat16:
        raise _refused("float16 sums of bfloat16", "half_sums left off")


def _refused(what: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", f"fmha does not take {what}", remedy)
