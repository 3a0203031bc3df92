"""Decoder layers for one token in float64, written with torch alone: what the kernels and their twins must give."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.kernel_bench.decode_layer import EPS, Shape, Stack, new_stack
from tests.support_weight_only import made_weight
from trtllm_cli.ops.cuda.weight_only_packing import unpack_weight

#: for a CPU
TINY = Shape(hidden=256, heads=4, kv_heads=2, head_size=64, wide=384)
SMALL = Shape(hidden=512, heads=8, kv_heads=2, head_size=64, wide=1408)
#: head size 128, as most models have
OTHER = Shape(hidden=768, heads=6, kv_heads=6, head_size=128, wide=1920)


def made_stack(
    kind: str,
    shape: Shape,
    context: int,
    dtype: torch.dtype,
    layers: int = 1,
    seed: int = 0,
    device: str = "cuda",
    page_size: int = 64,
    bias: bool = False,
    block_keys: int = 0,
) -> Stack:
    """Random weights of ``kind`` and random caches."""
    torch.manual_seed(seed)
    weights = [
        tuple(
            made_weight(kind, n, k, dtype, 4 * (seed + i) + j, device=device) for j, (n, k) in enumerate(shape.products)
        )
        for i in range(layers)
    ]
    return new_stack(weights, shape, context, dtype, page_size, bias, block_keys)


def reference(x: Tensor, stack: Stack) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The layers' output for x [1, hidden], and each one's new key and value [kv_heads, D]; float64, nothing rounded.

    Reads the caches' older keys and values and leaves them as they are.
    """
    shape, length = stack.shape, int(stack.lengths)
    cos, sin = (table[length - 1].double() for table in (stack.cos, stack.sin))
    pages = stack.page_table[0].long()
    half, group = shape.head_size // 2, shape.heads // shape.kv_heads
    x = x.double()
    written = []
    for layer in stack.layers:
        qkv, o, up, down = (unpack_weight(w, torch.float64) for w in layer.weights)
        norms = [w.double() for w in (layer.attention_norm, layer.mlp_norm)]
        rows = F.linear(F.rms_norm(x, (shape.hidden,), norms[0], EPS), qkv)
        if layer.qkv_bias is not None:
            rows = rows + layer.qkv_bias
        rows = rows.view(-1, shape.head_size)
        real, imaginary = rows[:, :half], rows[:, half:]
        turned = torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=1)
        q = turned[: shape.heads].view(shape.kv_heads, group, -1)
        k, v = turned[shape.heads : shape.heads + shape.kv_heads], rows[shape.heads + shape.kv_heads :]
        keys, values = (
            torch.cat([pool[pages].transpose(0, 1).flatten(1, 2)[:, : length - 1].double(), new[:, None]], 1)
            for pool, new in ((layer.k_cache, k), (layer.v_cache, v))
        )
        scores = torch.einsum("hgd,hjd->hgj", q, keys) * shape.head_size**-0.5
        attended = torch.einsum("hgj,hjd->hgd", scores.softmax(-1), values).reshape(1, -1)
        x = x + attended @ o.T
        pairs = (F.rms_norm(x, (shape.hidden,), norms[1], EPS) @ up.T).view(-1, 2, 8)
        gated = F.silu(pairs[:, 0]) * pairs[:, 1]
        x = x + gated.reshape(1, -1) @ down.T
        written.append((k, v))
    return x, written


def cached(stack: Stack) -> list[tuple[Tensor, Tensor]]:
    """Each layer's newest key and value in its cache, [kv_heads, D]."""
    at, page_size = int(stack.lengths) - 1, stack.layers[0].k_cache.shape[2]
    page = int(stack.page_table[0, at // page_size])
    return [(one.k_cache[page, :, at % page_size], one.v_cache[page, :, at % page_size]) for one in stack.layers]
