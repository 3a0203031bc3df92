"""One decoder layer of Llama-3.1-8B's shape for one new token: five launches, beside the layer of torch's operators.

Bytes are those of the packed weights and of the keys and values seen; the layers of a graph are cycled like any case's
input sets. Torch's layers multiply by the same weights as bfloat16, whatever ours are: its operators for int4 and int8
are no faster for one token than cuBLAS with bfloat16 is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from scripts.kernel_bench.weight_only import weight
from trtllm_cli.ops.cuda import mmha, mmha_twin, weight_only, weight_only_twin
from trtllm_cli.ops.cuda.weight_only_packing import PackedWeight, unpack_weight

KINDS = ("dense", "int8", "int4 g128")
CONTEXTS = (512, 4096)
EPS = 1e-5
_PAGE = 64


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; ``wide`` is the MLP's width."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    wide: int = 14336

    @property
    def projected(self) -> int:
        """Rows of the fused projection of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """N, K of the products in their order: qkv, o, gate and up (interleaved), down."""
        attended = self.heads * self.head_size
        return (
            (self.projected, self.hidden),
            (self.hidden, attended),
            (2 * self.wide, self.hidden),
            (self.hidden, self.wide),
        )


LLAMA_8B = Shape()


@dataclass(frozen=True)
class Layer:
    """A layer's weights, norms [hidden] (before attention, before the MLP), its cache, and where the token stands.

    Pools [pages, kv_heads, 64, head_size], page table int32 [1, pages], lengths int32 [1] with the new token, tables
    float32 [positions, head_size / 2].
    """

    shape: Shape
    qkv: PackedWeight
    o: PackedWeight
    up: PackedWeight
    down: PackedWeight
    norms: tuple[Tensor, Tensor]
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    lengths: Tensor
    cos: Tensor
    sin: Tensor
    workspace: Tensor

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.shape.head_size**-0.5)


def new_layer(weights: tuple[PackedWeight, ...], shape: Shape, context: int, dtype: torch.dtype) -> Layer:
    """A layer around ``weights`` (qkv, o, gate and up, down) whose cache holds random keys and values and has room for
    ``context`` tokens, the new one included; on the weights' device."""
    device = weights[0].data.device
    pages = -(-context // _PAGE)
    pools = (pages, shape.kv_heads, _PAGE, shape.head_size)
    k_cache, v_cache = (torch.randn(pools, device=device).to(dtype) for _ in range(2))
    norms = [(1 + 0.1 * torch.randn(shape.hidden, device=device)).to(dtype) for _ in range(2)]
    positions = torch.arange(pages * _PAGE, device=device)[:, None]
    half = shape.head_size // 2
    angles = positions * 5e5 ** (-torch.arange(half, device=device) / half)
    qkv, o, up, down = weights
    return Layer(
        shape,
        qkv,
        o,
        up,
        down,
        norms=(norms[0], norms[1]),
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=torch.randperm(pages, device=device).view(1, pages).int(),
        lengths=torch.tensor([context], dtype=torch.int32, device=device),
        cos=angles.cos().float(),
        sin=angles.sin().float(),
        workspace=mmha.new_workspace(device, shape.heads, shape.kv_heads, shape.head_size),
    )


def five_launches(x: Tensor, layer: Layer, pdl: bool = True) -> Tensor:
    """The layer's output for one token's row x [1, hidden]; writes the token's key and value into the cache.

    Norm + qkv | rotary, cache write and attention | o + residual | norm + gate and up + SiLU | down + residual.
    """
    qkv = weight_only.linear(x, layer.qkv, norm_weight=layer.norms[0], norm_eps=EPS, pdl=pdl)
    attended = mmha.mmha_append(
        qkv,
        layer.k_cache,
        layer.v_cache,
        layer.page_table,
        layer.lengths,
        layer.workspace,
        layer.scale,
        layer.cos,
        layer.sin,
        pdl=2 if pdl else 0,  # nothing in the layer writes the lengths, the table or old keys
    )
    x = weight_only.linear(attended.view(1, -1), layer.o, residual=x, pdl=pdl)
    gated = weight_only.linear(x, layer.up, norm_weight=layer.norms[1], norm_eps=EPS, gate="silu", pdl=pdl)
    return weight_only.linear(gated, layer.down, residual=x, pdl=pdl)


def twin(x: Tensor, layer: Layer) -> Tensor:
    """The same of the operators' twins, in x's type; the cache's own values are what it attends to."""
    linear = weight_only_twin.weight_only_linear
    qkv = linear(x, layer.qkv, norm_weight=layer.norms[0], norm_eps=EPS)
    held = (layer.k_cache.clone(), layer.v_cache.clone(), layer.page_table, layer.lengths)
    q = mmha_twin.append(qkv, *held, layer.cos, layer.sin)
    attended = mmha_twin.mmha(q, *held, scale=layer.scale)
    x = linear(attended.view(1, -1), layer.o, residual=x)
    gated = linear(x, layer.up, norm_weight=layer.norms[1], norm_eps=EPS, gate="silu")
    return linear(gated, layer.down, residual=x)


@dataclass(frozen=True)
class TorchLayer:
    """The same layer as torch's operators take it: weights [N, K] in x's type, a cache [1, kv_heads, context, D]."""

    shape: Shape
    weights: tuple[Tensor, ...]
    norms: tuple[Tensor, Tensor]
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor


def torch_layer(layer: Layer, dtype: torch.dtype) -> TorchLayer:
    """From ours: weights unpacked, gate and up apart, pages in the order of the sequence."""
    shape, context = layer.shape, int(layer.lengths)
    qkv, o, up, down = (unpack_weight(w).to(dtype) for w in (layer.qkv, layer.o, layer.up, layer.down))
    up = up.view(shape.wide // 8, 2, 8, shape.hidden).transpose(0, 1).reshape(2 * shape.wide, shape.hidden)
    pages = layer.page_table[0].long()
    k_cache, v_cache = (
        cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :context].contiguous()
        for cache in (layer.k_cache, layer.v_cache)
    )
    cos, sin = (torch.cat([table[context - 1 : context]] * 2, dim=-1).to(dtype) for table in (layer.cos, layer.sin))
    return TorchLayer(shape, (qkv, o, up.contiguous(), down), layer.norms, k_cache, v_cache, cos, sin)


def torch_step(x: Tensor, layer: TorchLayer) -> Tensor:
    """`five_launches` by torch's operators."""
    shape = layer.shape
    qkv, o, up, down = layer.weights
    rows = F.linear(F.rms_norm(x, (shape.hidden,), layer.norms[0], EPS), qkv).view(-1, shape.head_size)
    turned = rows[: shape.heads + shape.kv_heads]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * layer.cos + torch.cat([-b, a], dim=-1) * layer.sin
    layer.k_cache[0, :, -1] = turned[shape.heads :]
    layer.v_cache[0, :, -1] = rows[shape.heads + shape.kv_heads :]
    # a group's heads as rows of one kv head: each key is then read once
    q = turned[: shape.heads].view(1, shape.kv_heads, -1, shape.head_size)
    attended = F.scaled_dot_product_attention(q, layer.k_cache, layer.v_cache, scale=shape.head_size**-0.5)
    x = x + F.linear(attended.reshape(1, -1), o)
    gate, value = F.linear(F.rms_norm(x, (shape.hidden,), layer.norms[1], EPS), up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * value, down)


@lru_cache
def _compiled() -> Any:
    return torch.compile(torch_step, dynamic=False)


def cases(ceilings: Ceilings) -> list[Case]:
    """Every format of weights at a short and a long context."""
    return [_case(kind, context) for kind in KINDS for context in CONTEXTS]


def _case(kind: str, context: int) -> Case:
    shape = LLAMA_8B

    def make(i: int) -> Any:
        torch.manual_seed(i)
        x = torch.randn(1, shape.hidden, device="cuda").bfloat16()
        weights = tuple(weight(kind, n, k) for n, k in shape.products)
        layer = new_layer(weights, shape, context, torch.bfloat16)
        return x, layer, torch_layer(layer, torch.bfloat16)

    def check(s: Any) -> float:
        x, layer, peer = s
        wanted = twin(x.double(), layer)
        # of what the layer adds: x itself would hide errors; and torch's layer computes the same, or compares nothing
        found = [relative_error(y.double() - x, wanted - x) for y in (five_launches(x, layer), torch_step(x, peer))]
        return max(found)

    size = _layer_bytes(kind, shape, context)
    return Case(
        f"layer {kind} context {context}",
        make,
        {
            "ours": lambda s: five_launches(s[0], s[1]),
            "without PDL": lambda s: five_launches(s[0], s[1], pdl=False),
            "torch bf16": lambda s: torch_step(s[0], s[2]),
            "torch bf16 compiled": lambda s: _compiled()(s[0], s[2]),
        },
        set_bytes=size,
        bytes=size,
        check=check,
        tolerance=1.5e-2,
        ceiling="read",
    )


def _layer_bytes(kind: str, shape: Shape, context: int) -> int:
    bits = {"dense": 16.0, "int8": 8.0, "int4 g128": 4 + 16 / 128}[kind]
    products = sum(int(n * k * bits / 8) + (4 * n if kind == "int8" else 0) for n, k in shape.products)
    return products + 2 * context * shape.kv_heads * shape.head_size * 2
