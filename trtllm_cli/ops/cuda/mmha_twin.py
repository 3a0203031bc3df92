"""Generation attention in plain torch: one sequence at a time, scores in full.

Computed in float32 (float64 queries in float64), returned in the query's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.ops.cuda.fmha_twin import gather_pages
from trtllm_cli.ops.quantized import TOP


def mmha(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of the last ``T`` tokens of each sequence over a paged cache that holds them already; out like ``q``.

    ``q`` [batch, T, heads, D]; caches [num_pages, kv_heads, page_size, D], 8-bit ones times ``k_scale``, ``v_scale``
    [kv_heads]; ``page_table`` int [batch, max_pages]; ``lengths`` int [batch]. Token t stands at ``p = length - T + t``
    and sees the keys ``j <= p`` and, with a window, ``j > p - window``. A score is
    ``cap(scale * q.k) + slope * (j - p)``. A token that sees nothing gives zeros.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    tokens, heads, kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    capacity = page_table.shape[1] * k_cache.shape[2]
    for b, length in enumerate(lengths.clamp(0, capacity).tolist()):
        if length == 0:
            continue
        one = torch.tensor([length], dtype=torch.int32, device=q.device)
        k, v = (
            _floats(gather_pages(cache, page_table[b : b + 1], one)[0], factors, wide).repeat_interleave(
                heads // kv_heads, 1
            )
            for cache, factors in ((k_cache, k_scale), (v_cache, v_scale))
        )
        scores = torch.einsum("thd,jhd->htj", q[b].to(wide), k) * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        behind = (length - tokens + torch.arange(tokens, device=q.device))[:, None] - torch.arange(
            length, device=q.device
        )
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(wide)[:, None, None] * behind
        seen = behind >= 0
        if window > 0:
            seen &= behind < window
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = torch.where(seen.any(-1)[:, None], scores.softmax(-1), 0.0)
        out[b] = torch.einsum("htj,jhd->thd", weights, v)
    return out.to(q.dtype)


def append(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Writes the newest key and value at ``lengths - 1``; the query [batch, 1, heads, D], normalised and rotated.

    ``qkv`` [batch, (heads + 2 kv_heads) * D]; ``cos``, ``sin`` float32 [positions, rotary_dim / 2], of the rows
    ``positions`` (``lengths - 1``); norms [D]. Sequences of length 0 write nothing.
    """
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    _, kv_heads, page_size, size = k_cache.shape
    rows = qkv.view(qkv.shape[0], -1, size).to(wide)
    heads = rows.shape[1] - 2 * kv_heads
    q, k, v = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
    lengths = lengths.clamp(0, page_table.shape[1] * page_size)
    at = (lengths - 1 if positions is None else positions).long()
    q = rotate(normalise(q, q_norm, norm_eps, norm_offset), at, cos, sin, interleaved)
    k = rotate(normalise(k, k_norm, norm_eps, norm_offset), at, cos, sin, interleaved)
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        page, within = int(page_table[b, (length - 1) // page_size]), (length - 1) % page_size
        k_cache[page, :, within] = _rounded(k[b], k_scale, k_cache.dtype)
        v_cache[page, :, within] = _rounded(v[b], v_scale, v_cache.dtype)
    return q.to(qkv.dtype)[:, None]


def normalise(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """RMS norm over the last axis of x [batch, heads, D], or x where there is no weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight.to(x.dtype) + offset)


def rotate(x: Tensor, at: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """The first ``2 * cos.shape[1]`` elements of x [batch, heads, D] rotated by rows ``at`` of the tables, in pairs
    (i, i + half) or (2i, 2i + 1)."""
    if cos is None or sin is None:
        return x
    half = cos.shape[1]
    at = at.clamp(0, cos.shape[0] - 1)
    c, s = (table[at].to(x.dtype)[:, None] for table in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = a * c - b * s, b * c + a * s
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest], -1)


def _floats(values: Tensor, factors: Tensor | None, wide: torch.dtype) -> Tensor:
    """Packed rows [tokens, kv_heads, D] of a cache."""
    return values.to(wide) if factors is None else values.to(wide) * factors.to(wide)[:, None]


def _rounded(values: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[kv_heads, D] as a cache of ``dtype`` holds them."""
    if factors is None:
        return values.to(dtype)
    scaled = values / factors.to(values.dtype)[:, None]
    if dtype == torch.int8:
        return scaled.round().clamp(-TOP["int8"], TOP["int8"]).to(dtype)
    return scaled.clamp(-TOP["fp8"], TOP["fp8"]).to(dtype)
