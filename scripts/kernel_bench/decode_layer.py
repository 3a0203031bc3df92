"""Decoder layers of Llama-3.1-8B's shape for one new token: one launch for all of them, beside five launches a layer
and the layer of torch's operators.

Bytes are those of the packed weights and of the keys and values seen. Torch's layers multiply by the same weights as
bfloat16, whatever ours are: its operators for int4 and int8 are no faster for one token than cuBLAS with bfloat16 is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from scripts.kernel_bench.weight_only import weight
from trtllm_cli.ops.cuda import decode_layer_twin, mmha, weight_only
from trtllm_cli.ops.cuda.decode_layer import DecodeLayers
from trtllm_cli.ops.cuda.decode_layer_params import DecodeLayer
from trtllm_cli.ops.cuda.weight_only_packing import PackedWeight, unpack_weight

KINDS = ("dense", "int8", "int4 g128")
CONTEXTS = (512, 4096)
EPS = 1e-5
_LAYERS = 4
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
class Stack:
    """Layers with their caches, and where the token stands.

    Page table int32 [1, pages], lengths int32 [1] with the new token, tables float32 [positions, head_size / 2].
    """

    shape: Shape
    layers: tuple[DecodeLayer, ...]
    page_table: Tensor
    lengths: Tensor
    cos: Tensor
    sin: Tensor
    workspace: Tensor
    ready: DecodeLayers


def new_stack(
    weights: Sequence[tuple[PackedWeight, ...]],
    shape: Shape,
    context: int,
    dtype: torch.dtype,
    page_size: int = _PAGE,
    bias: bool = False,
    block_keys: int = 0,
) -> Stack:
    """A layer around each of ``weights`` (qkv, o, gate and up, down) whose cache holds random keys and values and has
    room for ``context`` tokens, the new one included; on the weights' device."""
    device = weights[0][0].data.device
    pages = -(-context // page_size)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    def layer(qkv: PackedWeight, o: PackedWeight, up: PackedWeight, down: PackedWeight) -> DecodeLayer:
        k_cache, v_cache = (random(pages, shape.kv_heads, page_size, shape.head_size).to(dtype) for _ in range(2))
        norm, mlp_norm = ((1 + 0.1 * random(shape.hidden)).to(dtype) for _ in range(2))
        added = random(shape.projected).to(dtype) if bias else None
        return DecodeLayer(qkv, o, up, down, norm, mlp_norm, k_cache, v_cache, added)

    layers = tuple(layer(*four) for four in weights)
    half = shape.head_size // 2
    angles = torch.arange(pages * page_size, device=device)[:, None] * 5e5 ** (
        -torch.arange(half, device=device) / half
    )
    return Stack(
        shape,
        layers,
        page_table=torch.randperm(pages, device=device).view(1, pages).int(),
        lengths=torch.tensor([context], dtype=torch.int32, device=device),
        cos=angles.cos().float(),
        sin=angles.sin().float(),
        workspace=mmha.new_workspace(device, shape.heads, shape.kv_heads, shape.head_size),
        ready=DecodeLayers(layers, norm_eps=EPS, block_keys=block_keys),
    )


def one_launch(x: Tensor, stack: Stack, pdl: bool = False) -> Tensor:
    """The layers' output for one token's row x [1, hidden]; writes the token's keys and values into the caches."""
    return stack.ready.step(x, stack.page_table[0], stack.lengths, stack.cos, stack.sin, pdl=pdl)


def five_launches(x: Tensor, stack: Stack, pdl: bool = True) -> Tensor:
    """The same, each layer as
    norm + qkv | rotary, cache write and attention | o + residual | norm + gate and up + SiLU | down + residual."""
    # nothing here writes the lengths, the table or old keys: attention need not wait before it reads them
    how = {"pdl": 2 if pdl else 0, "scale": stack.shape.head_size**-0.5, "cos": stack.cos, "sin": stack.sin}
    for one in stack.layers:
        qkv = weight_only.linear(x, one.qkv, one.qkv_bias, norm_weight=one.attention_norm, norm_eps=EPS, pdl=pdl)
        attended = mmha.mmha_append(
            qkv, one.k_cache, one.v_cache, stack.page_table, stack.lengths, stack.workspace, **how
        )
        x = weight_only.linear(attended.view(1, -1), one.o, residual=x, pdl=pdl)
        gated = weight_only.linear(x, one.up, norm_weight=one.mlp_norm, norm_eps=EPS, gate="silu", pdl=pdl)
        x = weight_only.linear(gated, one.down, residual=x, pdl=pdl)
    return x


def twin(x: Tensor, stack: Stack) -> Tensor:
    """The same of the operators' twin, in x's type."""
    step = (stack.page_table[0], stack.lengths, stack.cos, stack.sin)
    return decode_layer_twin.decode_layers(x, stack.layers, *step, EPS)


@dataclass(frozen=True)
class TorchLayer:
    """A layer as torch's operators take it: weights [N, K] in x's type, caches [1, kv_heads, context, D]."""

    shape: Shape
    weights: tuple[Tensor, ...]
    norms: tuple[Tensor, Tensor]
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor
    sin: Tensor


def torch_layers(stack: Stack, dtype: torch.dtype) -> list[TorchLayer]:
    """From ours: weights unpacked, gate and up apart, pages in the order of the sequence."""
    shape, context = stack.shape, int(stack.lengths)
    at = slice(context - 1, context)
    cos, sin = (torch.cat([table[at]] * 2, dim=-1).to(dtype) for table in (stack.cos, stack.sin))
    pages = stack.page_table[0].long()
    found = []
    for layer in stack.layers:
        qkv, o, up, down = (unpack_weight(w).to(dtype) for w in layer.weights)
        up = up.view(shape.wide // 8, 2, 8, shape.hidden).transpose(0, 1).reshape(2 * shape.wide, shape.hidden)
        k_cache, v_cache = (
            cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :context].contiguous()
            for cache in (layer.k_cache, layer.v_cache)
        )
        norms = (layer.attention_norm, layer.mlp_norm)
        found.append(TorchLayer(shape, (qkv, o, up.contiguous(), down), norms, k_cache, v_cache, cos, sin))
    return found


def torch_step(x: Tensor, layer: TorchLayer) -> Tensor:
    """One layer by torch's operators."""
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


def torch_steps(x: Tensor, layers: Sequence[TorchLayer], step: Any = torch_step) -> Tensor:
    """`one_launch` by torch's operators."""
    for layer in layers:
        x = step(x, layer)
    return x


def cases(ceilings: Ceilings) -> list[Case]:
    """Every format of weights at a short and a long context."""
    return [_case(kind, context) for kind in KINDS for context in CONTEXTS]


def _case(kind: str, context: int) -> Case:
    shape = LLAMA_8B

    def make(i: int) -> Any:
        torch.manual_seed(i)
        x = torch.randn(1, shape.hidden, device="cuda").bfloat16()
        weights = [tuple(weight(kind, n, k) for n, k in shape.products) for _ in range(_LAYERS)]
        stack = new_stack(weights, shape, context, torch.bfloat16)
        return x, stack, torch_layers(stack, torch.bfloat16)

    def check(s: Any) -> float:
        x, stack, peers = s
        wanted = twin(x.double(), stack)
        calls = (one_launch(x, stack), five_launches(x, stack), torch_steps(x, peers))
        stack.ready.check()
        # of what the layers add: x itself would hide errors; and the others compute the same, or compare nothing
        return max(relative_error(y.double() - x, wanted - x) for y in calls)

    size = _LAYERS * layer_bytes(kind, shape, context)
    return Case(
        f"{_LAYERS} layers {kind} context {context}",
        make,
        {
            "ours": lambda s: one_launch(s[0], s[1]),
            "five launches": lambda s: five_launches(s[0], s[1]),
            "five without PDL": lambda s: five_launches(s[0], s[1], pdl=False),
            "torch bf16": lambda s: torch_steps(s[0], s[2]),
            "torch bf16 compiled": lambda s: torch_steps(s[0], s[2], _compiled()),
        },
        set_bytes=size,
        bytes=size,
        check=check,
        tolerance=2e-2,
        bounds=[("over:five launches", 1.0)],
        ceiling="read",
    )


def layer_bytes(kind: str, shape: Shape, context: int) -> int:
    """What a layer must read: packed weights, old keys and values."""
    bits = {"dense": 16.0, "int8": 8.0, "int4 g128": 4 + 16 / 128}[kind]
    products = sum(int(n * k * bits / 8) + (4 * n if kind == "int8" else 0) for n, k in shape.products)
    return products + 2 * context * shape.kv_heads * shape.head_size * 2
