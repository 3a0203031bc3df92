"""Attention of the context phase beside torch's FlashAttention-2 and cuDNN's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from trtllm_cli.ops.cuda import fmha, fmha_twin


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``length`` new tokens each, after ``earlier`` ones in a paged cache (None: packed)."""

    size: int
    length: int
    batch: int
    heads: int
    kv_heads: int
    causal: bool = True
    earlier: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def keys(self) -> int:
        return self.length + (self.earlier or 0)

    @property
    def flops(self) -> int:
        """Of both products; a causal query at position p meets p + 1 keys, counted as p + 1/2."""
        seen = self.length * (self.keys - self.length / 2 if self.causal else self.keys)
        return int(4 * self.batch * self.heads * self.size * seen)

    @property
    def set_bytes(self) -> int:
        return 4 * self.batch * self.size * (self.length * self.heads + self.keys * self.kv_heads)

    def __str__(self) -> str:
        after = "" if self.earlier is None else f" after {self.earlier} in pages of 64"
        mask = "causal" if self.causal else "full"
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp16"
        return f"{kind} {mask} D={self.size} {self.batch}x{self.length}{after} heads {self.heads}/{self.kv_heads}"


def cases(ceilings: Ceilings) -> list[Case]:
    """Long prompts of the head sizes in use, short ones, and chunks over a paged cache."""
    goal = [("over:torch flash", 1.3)]
    return [
        _case(Shape(128, 4096, 4, 16, 16), goal),
        _case(Shape(128, 4096, 4, 32, 8), goal),
        _case(Shape(128, 16384, 1, 16, 16), goal),
        _case(Shape(128, 4096, 4, 16, 16, causal=False), goal),
        _case(Shape(128, 1024, 16, 16, 16), []),
        _case(Shape(64, 4096, 4, 32, 32), []),
        _case(Shape(64, 2048, 8, 32, 32), []),
        _case(Shape(80, 4096, 4, 16, 16), []),
        _case(Shape(96, 4096, 4, 16, 16), []),
        _case(Shape(256, 4096, 4, 8, 8), []),
        _case(Shape(128, 512, 8, 32, 8, earlier=3584), []),
        _case(Shape(128, 16, 8, 32, 8, earlier=4080), []),
        _case(Shape(128, 4096, 4, 16, 16, dtype=torch.float16), []),
    ]


def _case(shape: Shape, bounds: list[tuple[str, float]]) -> Case:
    def make(i: int) -> dict[str, Tensor]:
        torch.manual_seed(i)
        fused = torch.randn(shape.batch * shape.length, shape.heads, shape.size, device="cuda").to(shape.dtype)
        k, v = torch.randn(2, shape.batch * shape.keys, shape.kv_heads, shape.size, device="cuda").to(shape.dtype)
        index = torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32)
        made = {"q": fused, "k": k, "v": v, "q_starts": index * shape.length, "kv_starts": index * shape.keys}
        if shape.earlier is not None:
            pages = shape.batch * shape.keys // 64
            order = torch.randperm(pages, device="cuda")
            for name in ("k", "v"):
                cache = made[name].view(pages, 64, shape.kv_heads, shape.size).transpose(1, 2)
                made[f"{name}_cache"] = torch.empty_like(cache, memory_format=torch.contiguous_format)
                made[f"{name}_cache"][order] = cache
            made["table"] = order.int().view(shape.batch, -1)
            made["lengths"] = torch.full((shape.batch,), shape.keys, device="cuda", dtype=torch.int32)
        return made

    def ours(x: dict[str, Tensor], kernel: int = 0, half_sums: bool = False) -> Tensor:
        scale = shape.size**-0.5
        how = {"kernel": kernel, "half_sums": half_sums}
        if shape.earlier is None:
            return fmha.fmha(
                x["q"], x["k"], x["v"], x["q_starts"], x["kv_starts"], shape.length, scale, shape.causal, **how
            )[0]
        return fmha.fmha_paged(
            x["q"],
            x["k_cache"],
            x["v_cache"],
            x["table"],
            x["lengths"],
            x["q_starts"],
            shape.length,
            scale,
            shape.causal,
            **how,
        )[0]

    def check(x: dict[str, Tensor]) -> float:
        """The last 128 queries of the first sequence, of two heads, in float64."""
        rows = min(128, shape.length)
        picked = [0, shape.heads - 1]
        kv_picked = [h * shape.kv_heads // shape.heads for h in picked]
        queries = x["q"][shape.length - rows : shape.length, picked].double()
        k, v = (x[name][: shape.keys, kv_picked].double() for name in ("k", "v"))
        at = torch.tensor([0, rows]), torch.tensor([0, shape.keys])
        wanted, _ = fmha_twin.fmha(queries, k, v, *at, scale=shape.size**-0.5, causal=shape.causal)
        return relative_error(ours(x)[shape.length - rows : shape.length, picked], wanted)

    variants: dict[str, Callable[[Any], Any]] = {"ours": ours, "ours, portable": lambda x: ours(x, 1)}
    if shape.dtype == torch.float16:  # for GPUs whose float32 sums run at half rate: here it shows what they cost
        variants["ours, portable, float16 sums"] = lambda x: ours(x, 1, half_sums=True)
    if shape.earlier is None:
        variants["torch flash"] = _torch(shape, SDPBackend.FLASH_ATTENTION)
        variants["cudnn"] = _torch(shape, SDPBackend.CUDNN_ATTENTION)
    return Case(
        f"fmha {shape}",
        make,
        variants,
        set_bytes=shape.set_bytes,
        flops=shape.flops,
        check=check,
        bounds=bounds,
    )


def _torch(shape: Shape, backend: SDPBackend) -> Callable[[Any], Any]:
    def call(x: dict[str, Tensor]) -> Tensor:
        q, k, v = (x[name].view(shape.batch, shape.length, -1, shape.size).transpose(1, 2) for name in ("q", "k", "v"))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads
            )

    return call
