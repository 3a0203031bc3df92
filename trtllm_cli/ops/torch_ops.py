"""The functional API in plain torch: the readable reference, on the CPU (or any device torch has).

Activations are [B, S, H]. Norms, rotary and softmax work in float32 whatever the compute dtype, as the published models
do. Caches are updated in place: the handles returned are the ones given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtllm_cli.artifacts.schema import KvCacheScheme
from trtllm_cli.models.rotary import tables
from trtllm_cli.models.spec import NormSpec, RotarySpec
from trtllm_cli.models.weights import InputQuantizer
from trtllm_cli.ops.api import AttentionSpec, KvCache, Ops
from trtllm_cli.ops.quantized import kv_round_trip, quantize_activation

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Weights(Protocol):
    """Where the executor finds weights: dense tensors in the compute dtype by canonical name.

    ``kv_cache`` says how keys and values are kept (None: as they are), with ``kv_scales`` float32 [kv_heads] each.
    """

    kv_cache: KvCacheScheme | None

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]: ...

    def dense(self, name: str) -> Tensor:
        """The tensor ``name``, dequantized where it is stored quantized."""
        ...

    def has(self, name: str) -> bool: ...

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        """How the input of a linear is quantized, None where it is not."""
        ...


@dataclass(frozen=True)
class QuantizedKvCache(KvCache[Tensor]):
    """A cache that holds what quantized keys and values stand for: rounded when written, floats in memory.

    ``k_scale`` and ``v_scale`` are float32 [kv_heads].
    """

    scheme: KvCacheScheme
    k_scale: Tensor
    v_scale: Tensor


class TorchOps(Ops[Tensor]):
    """Executor over dense torch weights. ``positions`` bounds the rotary tables (cache positions that can occur)."""

    def __init__(self, weights: Weights, positions: int) -> None:
        self._weights = weights
        self._limit = positions
        self._rotary: dict[RotarySpec, tuple[Tensor, Tensor]] = {}

    def positions(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        return starts[:, None] + torch.arange(token_ids.shape[1], device=token_ids.device)[None, :]

    def embedding(self, token_ids: Tensor, module: str) -> Tensor:
        return F.embedding(token_ids, self._weights.dense(f"{module}.weight"))

    def linear(self, x: Tensor, module: str) -> Tensor:
        bias = self._weights.dense(f"{module}.bias") if self._weights.has(f"{module}.bias") else None
        quantizer = self._weights.input_quantizer(module)
        if quantizer is None:
            return F.linear(x, self._weights.dense(f"{module}.weight"), bias)
        # the weight carries its scales, so that this is (sum of products) * both scales up to float32 rounding
        values, scales = quantize_activation(x, quantizer.scheme.type, quantizer.scale)
        product = F.linear(values, self._weights.dense(f"{module}.weight").float()) * scales
        return (product if bias is None else product + bias.float()).to(x.dtype)

    def norm(self, x: Tensor, module: str, spec: NormSpec) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
        return normed.to(x.dtype) * self._weights.dense(f"{module}.weight")

    def add(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a * b

    def parameter(self, name: str) -> Tensor:
        return self._weights.dense(name)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return a / b

    def sqrt(self, x: Tensor) -> Tensor:
        return x.sqrt()

    def mean(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def float32(self, x: Tensor) -> Tensor:
        return x.float()

    def type_as(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)

    def activation(self, x: Tensor, kind: str) -> Tensor:
        return _ACTIVATIONS[kind](x)

    def split_heads(self, x: Tensor, heads: int, head_dim: int) -> Tensor:
        return x.view(*x.shape[:-1], heads, head_dim).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def rotary(self, x: Tensor, positions: Tensor, spec: RotarySpec) -> Tensor:
        if spec not in self._rotary:
            cos_table, sin_table = tables(spec, self._limit)
            self._rotary[spec] = (torch.from_numpy(cos_table).to(x.device), torch.from_numpy(sin_table).to(x.device))
        cos, sin = (table[positions.clamp(max=self._limit - 1)][:, None] for table in self._rotary[spec])
        half = spec.dim // 2
        a, b, rest = x[..., :half].float(), x[..., half : spec.dim].float(), x[..., spec.dim :]
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)

    def cache_update(self, cache: KvCache[Tensor], k: Tensor, v: Tensor, starts: Tensor) -> KvCache[Tensor]:
        if isinstance(cache, QuantizedKvCache):
            k = kv_round_trip(k, cache.scheme.type, cache.k_scale)
            v = kv_round_trip(v, cache.scheme.type, cache.v_scale)
        batch, _, new, _ = k.shape
        capacity = cache.k.shape[2]
        for b in range(batch):
            start = int(starts[b])
            kept = min(new, capacity - start)  # what lies beyond is padding: callers check real lengths
            cache.k[b, :, start : start + kept] = k[b, :, :kept]
            cache.v[b, :, start : start + kept] = v[b, :, :kept]
        return cache

    def attend(self, q: Tensor, cache: KvCache[Tensor], positions: Tensor, spec: AttentionSpec) -> Tensor:
        # attend over the used part of the cache only: the largest position of any sequence
        used = min(int(positions.max()) + 1, cache.k.shape[2])
        keys, values = cache.k[: q.shape[0], :, :used], cache.v[: q.shape[0], :, :used]
        j = torch.arange(used, device=q.device)
        mask = j[None, None, :] <= positions[:, :, None]
        if spec.window is not None:
            mask = mask & (j[None, None, :] > positions[:, :, None] - spec.window)
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask[:, None], scale=spec.scale, enable_gqa=spec.num_heads != spec.num_kv_heads
        )

    def gather_last(self, x: Tensor, last: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device), last]
