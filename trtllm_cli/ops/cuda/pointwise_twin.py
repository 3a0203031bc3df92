"""The pointwise kernels in plain torch: computed in float32 (float64 inputs in float64), given in the input's type."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trtllm_cli.ops.quantized import TOP, Type8, token_scales

TORCH_TYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Result(NamedTuple):
    """``out`` [tokens, width]; ``scales`` float32 [tokens] where each token has its own; ``residual`` the sum that was
    normalised, where there was something to add."""

    out: Tensor
    scales: Tensor | None
    residual: Tensor | None


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu (erf) or gelu_tanh."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated(
    gate: Tensor, up: Tensor, activation: str, quantize: Type8 | None = None, scale: Tensor | None = None
) -> Result:
    """``activation(gate) * up``, shapes [tokens, width]; quantized as :func:`store` says."""
    return store(activate(_wide(gate), activation) * _wide(up), gate.dtype, quantize, scale, None)


def norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    gamma_offset: float = 0.0,
    quantize: Type8 | None = None,
    scale: Tensor | None = None,
) -> Result:
    """h = x + residual, rounded to x's type, then normalised over the last axis.

    ``kind`` rms: h / sqrt(mean(h^2) + eps) * (gamma + gamma_offset) (Zhang and Sennrich, 2019); layer: (h - mean) /
    sqrt(variance + eps) * (gamma + gamma_offset) + beta (Ba et al., 2016); none: h. No gamma stands for ones (and no
    offset), no beta for zeros.
    """
    h = x if residual is None else (_wide(x) + _wide(residual)).to(x.dtype)
    y = _wide(h)
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    if kind != "none":
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
        if gamma is not None:
            y = y * (_wide(gamma) + gamma_offset)
        if beta is not None:
            y = y + _wide(beta)
    return store(y, x.dtype, quantize, scale, None if residual is None else h)


def store(
    y: Tensor, dtype: torch.dtype, quantize: Type8 | None, scale: Tensor | None, residual: Tensor | None
) -> Result:
    """``y`` in ``dtype``; or as 8 bits, divided by the static ``scale`` [1], or else by each token's own."""
    if quantize is None:
        return Result(y.to(dtype), None, residual)
    scales = token_scales(y, quantize) if scale is None else scale
    values = eight_bits(y / scales.to(y.dtype), quantize)
    return Result(values, scales[..., 0] if scale is None else None, residual)


def eight_bits(scaled: Tensor, type: Type8, low: int = -128) -> Tensor:
    """Scaled values as int8 (at least ``low``) or float8_e4m3fn: to the nearest, ties to even, saturating."""
    if type == "int8":
        return scaled.round().clamp(low, 127).to(torch.int8)
    return scaled.clamp(-TOP[type], TOP[type]).to(torch.float8_e4m3fn)


def embedding(ids: Tensor, table: Tensor, row_scales: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """``table[ids] * scale`` (``* row_scales[ids]``) in ``dtype``: zeros for negative ids, NaN for those too large."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    known = (ids >= 0) & (ids < table.shape[0])
    at = torch.where(known, ids, 0).long()
    factor = torch.full((len(ids), 1), scale, dtype=wide, device=table.device)
    if row_scales is not None:
        factor = factor * row_scales.to(wide)[at][:, None]
    rows = table[at].to(wide) * factor
    rows = torch.where(known[:, None], rows, torch.where(ids < 0, 0.0, torch.nan).to(wide)[:, None])
    return rows.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first ``2 * cos.shape[-1]`` elements of x [tokens, heads, D] turned by cos, sin [tokens, rotary_dim / 2]
    (Su et al., 2021): element i pairs with i + rotary_dim / 2, interleaved: 2i with 2i + 1."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


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
) -> tuple[Tensor, Tensor]:
    """Rotated q [tokens, heads, D] and k [tokens, kv_heads, D]; k and v are written to the pools
    [num_pages, kv_heads, page_size, D]. See trtllm_rotary_params for what each argument means and which tokens are
    padding."""
    pages, kv_heads, page_size, size = k_pool.shape
    tokens = qkv.shape[0]
    q, k, v = torch.split(_wide(qkv).view(tokens, -1, size), [heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q = norm(q, q_norm, kind="rms", eps=eps, gamma_offset=norm_offset).out
    if k_norm is not None:
        k = norm(k, k_norm, kind="rms", eps=eps, gamma_offset=norm_offset).out
    placed = (positions >= 0) & (positions < cos.shape[0])
    at = torch.where(placed, positions, 0).long()
    turn, lift = cos[at].to(q.dtype), sin[at].to(q.dtype)
    q, k = rotate(q, turn, lift, interleaved), rotate(k, turn, lift, interleaved)

    slot = at // page_size
    placed = placed & (sequences >= 0) & (sequences < page_table.shape[0]) & (slot < page_table.shape[1])
    row = torch.where(placed, sequences, 0).long()
    page = page_table[row, torch.where(placed, slot, 0)].long()
    placed = placed & (page >= 0) & (page < pages)
    kept = placed.nonzero()[:, 0]
    for pool, values, scale in ((k_pool, k, k_scale), (v_pool, v, v_scale)):
        if scale is not None:
            type: Type8 = "int8" if pool.dtype == torch.int8 else "fp8"
            stored = eight_bits(values / scale.to(values.dtype)[None, :, None], type, low=-127)
        else:
            stored = values.to(pool.dtype)
        # indexing with a list of positions is not made for 8-bit floats
        raw = torch.int8 if pool.element_size() == 1 else pool.dtype
        pool.view(raw)[page[kept], :, at[kept] % page_size] = stored.view(raw)[kept]
    return q.to(qkv.dtype), k.to(qkv.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
