"""Attention of the generation phase: the newest tokens of each sequence over a paged cache.

``mmha`` reads a cache that holds the new tokens already; ``mmha_append`` takes the fused projection's row, rotates it,
writes the cache and attends, in one launch. Both split the keys of the whole batch evenly over the GPU, whatever the
lengths are, and want a ``workspace`` for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.ops.cuda import library, mmha_params, mmha_twin
from trtllm_cli.ops.cuda.mmha_params import MmhaParams


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
    mmha_params.check_q(q)
    mmha_params.check(q, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, q.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = mmha_params.common(q, k_cache, v_cache, out, page_table, lengths, workspace)
    params.q_length, params.heads = q.shape[1:3]
    params.q_batch_stride, params.q_token_stride, params.q_head_stride = mmha_params.strides(q, 0, 1, 2)
    params.scale, params.window, params.soft_cap = scale, window, soft_cap
    mmha_params.set_pointers(params, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale)
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
    mmha_params.check_q(q)
    mmha_params.check(q, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, q.shape[2])
    mmha_params.check_numbers(q.shape[1], scale, window, soft_cap)
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
    heads = mmha_params.check_qkv(qkv, k_cache)
    mmha_params.check(qkv, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, heads)
    mmha_params.check_append(qkv, k_cache, cos, sin, positions, q_norm, k_norm)
    size = k_cache.shape[3]
    out = torch.empty((qkv.shape[0], heads, size), dtype=qkv.dtype, device=qkv.device)
    params = mmha_params.common(qkv, k_cache, v_cache, out[:, None], page_table, lengths, workspace)
    params.q_length, params.heads, params.append = 1, heads, 1
    params.q_batch_stride, params.q_token_stride, params.q_head_stride = *mmha_params.strides(qkv, 0), 0, size
    params.scale, params.window, params.soft_cap = scale, window, soft_cap
    params.norm_eps, params.norm_offset, params.interleaved = norm_eps, norm_offset, interleaved
    if cos is not None:
        params.rotary_positions, params.rotary_dim = cos.shape[0], 2 * cos.shape[1]
    mmha_params.set_pointers(params, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, cos=cos, sin=sin)
    mmha_params.set_pointers(params, positions=positions, q_norm=q_norm, k_norm=k_norm)
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
    heads = mmha_params.check_qkv(qkv, k_cache)
    mmha_params.check(qkv, k_cache, v_cache, page_table, lengths, alibi_slopes, k_scale, v_scale, heads)
    mmha_params.check_append(qkv, k_cache, cos, sin, positions, q_norm, k_norm)
    mmha_params.check_numbers(1, scale, window, soft_cap)
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
