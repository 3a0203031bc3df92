"""From the fused projection to attention's inputs in one launch: per-head norm, rotary embedding, cache write."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from trtllm_cli.ops.cuda import library, pointwise_twin
from trtllm_cli.ops.cuda.pointwise import check_device, check_rows, plain, refused

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
_EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class RotaryParams(ctypes.Structure):
    """trtllm_rotary_params."""

    _fields_ = [
        *((name, _ptr) for name in ("qkv", "q_norm", "k_norm", "cos", "sin", "positions", "sequences", "page_table")),
        *((name, _ptr) for name in ("k_scale", "v_scale", "q_out", "k_out", "k_pool", "v_pool")),
        *((name, _i64) for name in ("tokens", "qkv_stride", "q_out_stride", "k_out_stride")),
        *((name, _i64) for name in ("page_table_stride", "page_stride")),
        *((name, _i32) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "max_positions", "batch")),
        *((name, _i32) for name in ("max_pages", "num_pages", "page_size")),
        *((name, _f32) for name in ("eps", "norm_offset")),
        *((name, _i32) for name in ("interleaved", "dtype", "cache_dtype", "pdl")),
    ]


def rotary(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    page_table: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    with_k: bool = False,
    pdl: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """q [tokens, heads, D] normalised and rotated (``with_k``: and k [tokens, kv_heads, D]); k and v go to the cache.

    ``qkv`` [tokens, (heads + 2 kv_heads) * D] float16 or bfloat16, rows may be strided; ``positions``, ``sequences``
    int32 [tokens]; ``page_table`` int32 [batch, max_pages]; pools [num_pages, kv_heads, page_size, D] of qkv's type,
    int8 or float8_e4m3fn (then with float32 ``k_scale``, ``v_scale`` [kv_heads]), of equal page strides; ``cos``,
    ``sin`` float32 [max_positions, rotary_dim / 2]; ``q_norm``, ``k_norm`` [D] of qkv's type. Which tokens are
    padding (nothing of these is cached) trtllm_rotary_params says.
    Raises UnsupportedError KERNEL_REFUSED for other shapes and types.
    """
    found = _rotary(
        qkv,
        positions,
        sequences,
        page_table,
        k_pool,
        v_pool,
        heads,
        cos,
        sin,
        interleaved,
        q_norm,
        k_norm,
        eps,
        norm_offset,
        k_scale,
        v_scale,
        with_k,
        pdl,
    )
    return found[0], found[1] if with_k else None


@torch.library.custom_op("trtllm_cli::rotary", mutates_args=("k_pool", "v_pool"), device_types="cuda")
def _rotary(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    page_table: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_offset: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    with_k: bool,
    pdl: int,
) -> list[Tensor]:
    _check(qkv, positions, sequences, page_table, k_pool, v_pool, heads, cos, sin, q_norm, k_norm, k_scale, v_scale)
    outputs = _outputs(qkv, k_pool, heads, with_k)
    params = RotaryParams(
        q_out_stride=outputs[0].stride(0),
        tokens=qkv.shape[0],
        qkv_stride=qkv.stride(0),
        page_table_stride=page_table.stride(0),
        page_stride=k_pool.stride(0),
        heads=heads,
        kv_heads=k_pool.shape[1],
        head_dim=k_pool.shape[3],
        rotary_dim=2 * cos.shape[1],
        max_positions=cos.shape[0],
        batch=page_table.shape[0],
        max_pages=page_table.shape[1],
        num_pages=k_pool.shape[0],
        page_size=k_pool.shape[2],
        eps=eps,
        norm_offset=norm_offset,
        interleaved=int(interleaved),
        dtype=library.dtype_code(qkv.dtype),
        cache_dtype=library.dtype_code(k_pool.dtype),
        pdl=pdl,
    )
    pointers: dict[str, Tensor | None] = {"qkv": qkv, "positions": positions, "sequences": sequences}
    pointers |= {"page_table": page_table, "k_pool": k_pool, "v_pool": v_pool, "cos": cos, "sin": sin}
    pointers |= {"q_norm": q_norm, "k_norm": k_norm, "k_scale": k_scale, "v_scale": v_scale, "q_out": outputs[0]}
    if with_k:
        pointers["k_out"] = outputs[1]
        params.k_out_stride = outputs[1].stride(0)
    for name, tensor in pointers.items():
        if tensor is not None:
            setattr(params, name, tensor.data_ptr())
    library.load().launch("rotary", params)
    return outputs


@_rotary.register_kernel("cpu")
def _(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    page_table: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_offset: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    with_k: bool,
    pdl: int,
) -> list[Tensor]:
    _check(qkv, positions, sequences, page_table, k_pool, v_pool, heads, cos, sin, q_norm, k_norm, k_scale, v_scale)
    q, k = pointwise_twin.rotary(
        qkv,
        positions,
        sequences,
        page_table,
        k_pool,
        v_pool,
        heads,
        cos,
        sin,
        interleaved=interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        norm_offset=norm_offset,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return [q.contiguous(), k.contiguous()] if with_k else [q.contiguous()]


@_rotary.register_fake
def _(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    page_table: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    norm_offset: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    with_k: bool,
    pdl: int,
) -> list[Tensor]:
    return _outputs(qkv, k_pool, heads, with_k)


def _outputs(qkv: Tensor, k_pool: Tensor, heads: int, with_k: bool) -> list[Tensor]:
    counts = (heads, k_pool.shape[1]) if with_k else (heads,)
    return [torch.empty((qkv.shape[0], n, k_pool.shape[3]), dtype=qkv.dtype, device=qkv.device) for n in counts]


def _check(
    qkv: Tensor,
    positions: Tensor,
    sequences: Tensor,
    page_table: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if k_pool.dim() != 4 or k_pool.shape != v_pool.shape or k_pool.dtype != v_pool.dtype:
        raise refused(
            f"rotary needs k_pool and v_pool [num_pages, kv_heads, page_size, D] of one shape and type, not "
            f"{k_pool.dtype} {tuple(k_pool.shape)} and {v_pool.dtype} {tuple(v_pool.shape)}",
            "allocate them alike",
        )
    _, kv_heads, page_size, size = k_pool.shape
    inner = (page_size * size, size, 1)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.stride()[1:] != inner or pool.stride(0) != k_pool.stride(0):
            raise refused(
                f"rotary needs pages that are contiguous and equally far apart in both pools, {name} has strides "
                f"{pool.stride()}",
                "stride over the first axis only",
            )
    if k_pool.dtype not in (qkv.dtype, *_EIGHT_BITS):
        raise refused(
            f"rotary of {qkv.dtype} writes a cache of that type, int8 or float8_e4m3fn, not {k_pool.dtype}",
            "convert it",
        )
    width = (heads + 2 * kv_heads) * size
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise refused(
            f"rotary needs qkv [tokens, {width}] for {heads} heads and {kv_heads} kv heads of {size}, not "
            f"{tuple(qkv.shape)}",
            "give the number of query heads",
        )
    tokens = (qkv.shape[0],)
    for name, index in (("positions", positions), ("sequences", sequences)):
        if index.shape != tokens or not plain(index, torch.int32):
            raise refused(f"rotary needs {name} int32 {tokens}, not {index.dtype} {tuple(index.shape)}", ".int()")
    if page_table.dim() != 2 or page_table.dtype != torch.int32:
        raise refused(
            f"rotary needs page_table int32 [batch, max_pages], not {page_table.dtype} {tuple(page_table.shape)}",
            ".int()",
        )
    if cos.dim() != 2 or cos.shape != sin.shape or not plain(cos, torch.float32) or not plain(sin, torch.float32):
        raise refused(
            f"rotary needs cos and sin float32 [positions, rotary_dim / 2], contiguous, not {cos.dtype} "
            f"{tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}",
            "convert them",
        )
    if not cos.shape[0] or 2 * cos.shape[1] > size:
        raise refused(
            f"rotary turns at most the head size {size}, not {2 * cos.shape[1]}, and needs a position", "cut the tables"
        )
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None and (weight.shape != (size,) or not plain(weight, qkv.dtype)):
            raise refused(
                f"rotary needs {name} {qkv.dtype} [{size}], not {weight.dtype} {tuple(weight.shape)}", "convert it"
            )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (k_pool.dtype in _EIGHT_BITS):
            raise refused(
                f"rotary needs {name} for a cache of 8 bits and takes none for {qkv.dtype}", "float32 [kv_heads]"
            )
        if scale is not None and (scale.shape != (kv_heads,) or not plain(scale, torch.float32)):
            raise refused(
                f"rotary needs {name} float32 [{kv_heads}], not {scale.dtype} {tuple(scale.shape)}", "convert it"
            )
    check_rows("rotary", qkv=qkv, page_table=page_table)
    check_device("rotary", qkv, positions=positions, sequences=sequences, page_table=page_table, k_pool=k_pool)
    check_device("rotary", qkv, v_pool=v_pool, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, k_scale=k_scale)
    check_device("rotary", qkv, v_scale=v_scale)
