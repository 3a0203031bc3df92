"""Whole decoder layers for one token in plain torch: the twins of the products and of attention, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trtllm_cli.ops.cuda import mmha_twin
from trtllm_cli.ops.cuda.decode_layer_params import DecodeLayer
from trtllm_cli.ops.cuda.weight_only_twin import weight_only_linear


def decode_layers(
    x: Tensor,
    layers: Sequence[DecodeLayer],
    page_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float = 1e-5,
    norm_offset: float = 0.0,
) -> Tensor:
    """x [1, hidden] through ``layers``, keys and values written at ``lengths - 1`` (clamped to the cache); of x's type.

    Every intermediate between two products is rounded to x's type, float64 not at all.
    """
    pages = page_table[None]
    for layer in layers:
        size = layer.k_cache.shape[3]
        at = lengths.clamp(1, page_table.shape[0] * layer.k_cache.shape[2])
        qkv = weight_only_linear(
            x,
            layer.qkv,
            layer.qkv_bias,
            norm_weight=layer.attention_norm,
            norm_eps=norm_eps,
            norm_offset=norm_offset,
        )
        q = mmha_twin.append(qkv, layer.k_cache, layer.v_cache, pages, at, cos, sin)
        attended = mmha_twin.mmha(q, layer.k_cache, layer.v_cache, pages, at, scale=size**-0.5)
        x = weight_only_linear(attended.reshape(1, -1), layer.o, residual=x)
        gated = weight_only_linear(
            x, layer.up, norm_weight=layer.mlp_norm, norm_eps=norm_eps, norm_offset=norm_offset, gate="silu"
        )
        x = weight_only_linear(gated, layer.down, residual=x)
    return x
