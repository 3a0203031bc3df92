"""A decoder layer for one token in float64, written with torch alone: what the chains of kernels must give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.kernel_bench.decode_layer import EPS, Layer, Shape, new_layer
from tests.support_weight_only import made_weight
from trtllm_cli.ops.cuda.weight_only_packing import unpack_weight

SMALL = Shape(hidden=512, heads=8, kv_heads=2, head_size=64, wide=1408)


def made_layer(kind: str, shape: Shape, context: int, dtype: torch.dtype, seed: int = 0, device: str = "cuda") -> Layer:
    """Random weights of ``kind`` and a random cache."""
    torch.manual_seed(seed)
    weights = tuple(
        made_weight(kind, n, k, dtype, 4 * seed + i, device=device) for i, (n, k) in enumerate(shape.products)
    )
    return new_layer(weights, shape, context, dtype)


def reference(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output for x [1, hidden], and the new key and value [kv_heads, D]; all float64, nothing rounded.

    Reads the cache's older keys and values and leaves it as it is.
    """
    shape, length = layer.shape, int(layer.lengths)
    qkv, o, up, down = (unpack_weight(w, torch.float64) for w in (layer.qkv, layer.o, layer.up, layer.down))
    norms = [w.double() for w in layer.norms]
    x = x.double()
    rows = F.linear(F.rms_norm(x, (shape.hidden,), norms[0], EPS), qkv).view(-1, shape.head_size)
    half = shape.head_size // 2
    cos, sin = (table[length - 1].double() for table in (layer.cos, layer.sin))
    real, imaginary = rows[:, :half], rows[:, half:]
    turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=1)
    q = turned[: shape.heads]
    k, v = turned[shape.heads : shape.heads + shape.kv_heads], rows[shape.heads + shape.kv_heads :]
    keys, values = (
        torch.cat([pool[layer.page_table[0].long()].transpose(0, 1).flatten(1, 2)[:, : length - 1].double(), new], 1)
        for pool, new in ((layer.k_cache, k[:, None]), (layer.v_cache, v[:, None]))
    )
    group = shape.heads // shape.kv_heads
    scores = torch.einsum("hgd,hjd->hgj", q.view(shape.kv_heads, group, -1), keys) * layer.scale
    attended = torch.einsum("hgj,hjd->hgd", scores.softmax(-1), values).reshape(1, -1)
    x = x + attended @ o.T
    pairs = (F.rms_norm(x, (shape.hidden,), norms[1], EPS) @ up.T).view(-1, 2, 8)
    gated = F.silu(pairs[:, 0]) * pairs[:, 1]
    return x + gated.reshape(1, -1) @ down.T, k, v


def cached(layer: Layer) -> tuple[Tensor, Tensor]:
    """The newest key and value in the cache, [kv_heads, D]."""
    at = int(layer.lengths) - 1
    page_size = layer.k_cache.shape[2]
    page = int(layer.page_table[0, at // page_size])
    return layer.k_cache[page, :, at % page_size], layer.v_cache[page, :, at % page_size]
