"""Paged caches for tests of generation attention: shuffled pages, poison wherever no sequence has a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trtllm_cli.ops.cuda import mmha, mmha_twin

FP8 = torch.float8_e4m3fn


@dataclass
class Problem:
    """A query or a fused row, and the cache it reads."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    lengths: Tensor
    options: dict[str, Any]
    scales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k_cache, self.v_cache, self.page_table, self.lengths

    def workspace(self, heads: int) -> Tensor:
        _, kv_heads, _, size = self.k_cache.shape
        return mmha.new_workspace(self.q.device, heads, kv_heads, size, self.q.shape[1] if self.q.dim() == 4 else 1)

    def found(self, **extra: Any) -> Tensor:
        return mmha.mmha(self.q, *self.cache, self.workspace(self.q.shape[2]), **self.options, **self.scales, **extra)

    def wanted(self) -> Tensor:
        return mmha_twin.mmha(self.q.double(), *self.cache, **self.options, **self.scales)


def problem(
    lengths: Sequence[int],
    *,
    heads: int = 8,
    kv_heads: int = 2,
    size: int = 128,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    tokens: int = 1,
    alibi: bool = False,
    spread: float = 1.0,
    spare: int = 0,
    device: str = "cuda",
    seed: int = 0,
    fused: bool = False,
    **options: Any,
) -> Problem:
    """``spare`` more columns of the page table name no page at all (a read of them would fault or show)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    pages_of = [-(-length // page_size) for length in lengths]
    count = sum(pages_of)
    cache_dtype = cache_dtype or dtype
    order = (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    table = torch.full((len(lengths), max(pages_of, default=0) + spare), 2**30, dtype=torch.int32)
    k_cache, v_cache = (_poison((count + 2, kv_heads, page_size, size), cache_dtype, device) for _ in range(2))
    for b, length in enumerate(lengths):
        for i in range(pages_of[b]):
            page = order.pop()
            table[b, i] = page
            kept = min(page_size, length - i * page_size)
            for cache in (k_cache, v_cache):
                cache[page, :, :kept] = _values(normal(kv_heads, kept, size), cache_dtype)
    width = heads + 2 * kv_heads
    q = normal(len(lengths), width * size) if fused else normal(len(lengths), tokens, heads, size)
    if alibi:
        options["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, heads, device=device)
    scales = {}
    if cache_dtype != dtype:
        top = 40.0 if cache_dtype == torch.int8 else 2.0
        scales = {
            name: (torch.rand(kv_heads, generator=generator, device=device) + 0.5) / top
            for name in ("k_scale", "v_scale")
        }
    return Problem(
        (q * spread).to(dtype),
        k_cache,
        v_cache,
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        {"scale": size**-0.5, **options},
        scales,
    )


def tables(positions: int, dim: int, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """cos and sin of the usual rotary embedding."""
    angles = torch.arange(positions)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _values(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return (x * 40).round().clamp(-127, 127).to(dtype)
    return (x * 2).to(dtype) if dtype == FP8 else x.to(dtype)


def _poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.int8:
        return torch.full(shape, -128, dtype=dtype, device=device)
    return torch.full(shape, torch.nan, device=device).to(dtype)
