"""Context attention in plain torch: one sequence and head group at a time, scores in full.

Computed in float32 (float64 inputs in float64), returned in the input's type.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def fmha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences: out like q, and the log-sum-exp of the scores, [heads, tokens].

    ``q`` [tokens, heads, D]; ``k``, ``v`` [kv_tokens, kv_heads, D]; ``q_starts``, ``kv_starts`` int [batch + 1]. The
    queries of a sequence are its last positions: query i stands at ``p = i + kv_length - q_length``. It sees the keys
    j with ``j <= p`` where ``causal``, and ``j > p - window`` where a window is given. A score is
    ``cap(scale * q.k) + slope * (j - p)``. Queries that see nothing give zeros, and minus infinity.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide, device=q.device)
    q_pairs, kv_pairs = pairwise(q_starts.tolist()), pairwise(kv_starts.tolist())
    for (begin, end), (kv_begin, kv_end) in zip(q_pairs, kv_pairs, strict=True):
        if end == begin or kv_end == kv_begin:
            continue
        out[begin:end], lse[:, begin:end] = _sequence(
            q[begin:end].to(wide),
            k[kv_begin:kv_end].to(wide),
            v[kv_begin:kv_end].to(wide),
            scale,
            causal,
            window,
            soft_cap,
            None if alibi_slopes is None else alibi_slopes.to(wide),
        )
    return out.to(q.dtype), lse if wide == torch.float64 else lse.float()


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int,
    soft_cap: float,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [S, heads, D], k, v [T, kv_heads, D] -> [S, heads, D], [heads, S]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("shd,thd->hst", q, k) * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    key = torch.arange(k.shape[0], device=q.device)[None, :]
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (key - position)
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if causal:
        seen &= key <= position
    if window > 0:
        seen &= key > position - window
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, torch.exp(scores - torch.where(lse.isfinite(), lse, 0.0)[..., None]), 0.0)
    return torch.einsum("hst,thd->shd", weights, v), lse


def gather_pages(cache: Tensor, page_table: Tensor, kv_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The paged keys (or values) of all sequences, packed: [sum of lengths, kv_heads, D], and their starts [batch + 1].

    ``cache`` [num_pages, kv_heads, page_size, D]; ``page_table`` int [batch, max_pages]; ``kv_lengths`` int [batch].
    """
    size = cache.shape[2]
    rows = []
    for table, length in zip(page_table, kv_lengths.tolist(), strict=True):
        pages = cache[table[: -(-length // size)].long()]
        rows.append(pages.transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:length])
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=cache.device)
    starts[1:] = kv_lengths.cumsum(0)
    return torch.cat(rows), starts
