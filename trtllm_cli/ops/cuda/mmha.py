"""Attention of the generation phase: the newest tokens of each sequence over a paged cache.

``mmha`` reads a cache that holds the new tokens already; ``mmha_append`` takes the fused projection's row, rotates it,
writes the cache and attends, in one launch. Both split the keys of the whole batch evenly over the GPU, whatever the
lengths are, and want a ``workspace`` for that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library, mmha_twin

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


def new_workspace(
    device: torch.device | str, heads: int, kv_heads: int, head_size: int, tokens: int = 1, blocks: int = 0
) -> Tensor:
    """Scratch memory, uint8, for every call with these heads on ``device``, whatever the batch and the lengths.

    Calls that may run at the same time need one each. Each call leaves it fit for the next.
    """
    if torch.device(device).type != "cuda":
        return torch.zeros(0, dtype=torch.uint8, device=device)
    params = MmhaParams(heads=heads, kv_heads=kv_heads, head_size=head_size, q_length=tokens, blocks=blocks)
    return torch.zeros(library.load().workspace_bytes("mmha", params), dtype=torch.uint8, device=device)


@torch.library.custom_op("trtllm_cli::mmha", mutates_args=("workspace",), device_types="cuda")
def mmha(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    """Attention of the last T tokens of each sequence, as ``mmha_twin.mmha`` says: out [batch, T, heads, D].

    ``q`` [batch, T, heads, D] float16 or bfloat16, T at most 8; caches [num_pages, kv_heads, page_size, D] of q's type,
    int8 or float8_e4m3fn (then with float32 ``k_scale``, ``v_scale`` [kv_heads]); ``page_table`` int32
    [batch, max_pages]; ``lengths`` int32 [batch], the new tokens included; ``workspace`` from ``new_workspace``.
    ``pdl``, ``blocks`` and ``stages`` are those of ``trtllm_mmha_params``.
    Raises UnsupportedError KERNEL_REFUSED for anything the kernels cannot do.
    """
    _check_q(q)
    _check(q, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, q.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = _params(q, k_cache, v_cache, out, page_table, lengths, workspace)
    params.q_length, params.heads = q.shape[1:3]
    params.q_batch_stride, params.q_token_stride, params.q_head_stride = _strides(q, 0, 1, 2)
    params.scale, params.window, params.soft_cap = scale, window, soft_cap
    _set_pointers(params, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale)
    params.pdl, params.blocks, params.stages = pdl, blocks, stages
    library.load().launch("mmha", params)
    return out


@mmha.register_kernel("cpu")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    _check_q(q)
    _check(q, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, q.shape[2])
    _check_numbers(q.shape[1], scale, window, soft_cap)
    return mmha_twin.mmha(
        q,
        k_cache,
        v_cache,
        page_table,
        lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )


@mmha.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "trtllm_cli::mmha_append", mutates_args=("k_cache", "v_cache", "workspace"), device_types="cuda"
)
def mmha_append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    """The newest token of each sequence from its fused projection to attention's output [batch, heads, D], one launch.

    ``qkv`` [batch, (heads + 2 kv_heads) * D]. Per-head RMS norms (weights ``q_norm``, ``k_norm`` [D] of qkv's type,
    plus ``norm_offset``), rotation of the first ``2 * cos.shape[1]`` elements by row ``positions`` (``lengths - 1``) of
    float32 ``cos``, ``sin``, then k and v are rounded into the cache at ``lengths - 1``: ``mmha_twin.append``. The rest
    as in ``mmha``. No two sequences may share the page they write.
    """
    heads = _check_qkv(qkv, k_cache)
    _check(qkv, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, heads)
    _check_append(qkv, k_cache, cos, sin, positions, q_norm, k_norm)
    size = k_cache.shape[3]
    out = torch.empty((qkv.shape[0], heads, size), dtype=qkv.dtype, device=qkv.device)
    params = _params(qkv, k_cache, v_cache, out[:, None], page_table, lengths, workspace)
    params.q_length, params.heads, params.append = 1, heads, 1
    params.q_batch_stride, params.q_token_stride, params.q_head_stride = *_strides(qkv, 0), 0, size
    params.scale, params.window, params.soft_cap = scale, window, soft_cap
    params.norm_eps, params.norm_offset, params.interleaved = norm_eps, norm_offset, interleaved
    if cos is not None:
        params.rotary_positions, params.rotary_dim = cos.shape[0], 2 * cos.shape[1]
    _set_pointers(params, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, cos=cos, sin=sin)
    _set_pointers(params, positions=positions, q_norm=q_norm, k_norm=k_norm)
    params.pdl, params.blocks, params.stages = pdl, blocks, stages
    library.load().launch("mmha", params)
    return out


@mmha_append.register_kernel("cpu")
def _(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    heads = _check_qkv(qkv, k_cache)
    _check(qkv, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, heads)
    _check_append(qkv, k_cache, cos, sin, positions, q_norm, k_norm)
    _check_numbers(1, scale, window, soft_cap)
    q = mmha_twin.append(
        qkv,
        k_cache,
        v_cache,
        page_table,
        lengths,
        cos,
        sin,
        positions,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
        interleaved=interleaved,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return mmha_twin.mmha(
        q,
        k_cache,
        v_cache,
        page_table,
        lengths,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )[:, 0]


@mmha_append.register_fake
def _(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    workspace: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    pdl: int = 0,
    blocks: int = 0,
    stages: int = 0,
) -> Tensor:
    size = k_cache.shape[3]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // size - 2 * k_cache.shape[1], size))


def _params(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, page_table: Tensor, lengths: Tensor, workspace: Tensor
) -> MmhaParams:
    """What both operators set in the same way; ``out`` is [batch, T, heads, D]."""
    params = MmhaParams(q=q.data_ptr(), out=out.data_ptr(), lengths=lengths.data_ptr())
    params.k_cache, params.v_cache, params.page_table = k_cache.data_ptr(), v_cache.data_ptr(), page_table.data_ptr()
    params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.nbytes
    _, params.kv_heads, params.page_size, params.head_size = k_cache.shape
    params.k_page_stride, params.k_head_stride, params.k_token_stride = _strides(k_cache, 0, 1, 2)
    params.v_page_stride, params.v_head_stride, params.v_token_stride = _strides(v_cache, 0, 1, 2)
    params.out_batch_stride, params.out_token_stride, params.out_head_stride = _strides(out, 0, 1, 2)
    params.page_table_stride = page_table.stride(0)
    params.batch, params.max_length = q.shape[0], page_table.shape[1] * k_cache.shape[2]
    params.dtype, params.cache_dtype = library.dtype_code(q.dtype), library.dtype_code(k_cache.dtype)
    return params


def _set_pointers(params: MmhaParams, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        setattr(params, name, None if tensor is None else tensor.data_ptr())


def _strides(x: Tensor, *axes: int) -> tuple[int, ...]:
    """Strides of the axes; that of an axis with one element is free, and 0 is always a good one."""
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in axes)


def _check_q(q: Tensor) -> None:
    if q.dim() != 4:
        raise _refused(f"q {tuple(q.shape)}", "q [batch, tokens, heads, D]")


def _check_qkv(qkv: Tensor, k_cache: Tensor) -> int:
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


def _check(
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


def _check_append(
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


def _check_numbers(tokens: int, scale: float, window: int, soft_cap: float) -> None:
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
