"""Attention of the generation phase, from one short sequence to many long ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from trtllm_cli.ops.cuda import mmha, mmha_twin

_PAGE = 64
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_EIGHT = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Setting:
    """One batch: ``lengths`` of its sequences, heads and types, and how the kernel is called."""

    name: str
    lengths: tuple[int, ...]
    cache: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    append: bool = False
    window: int = 0
    pdl: int = 0
    blocks: int = 0
    stages: int = 0


def cases(ceilings: Ceilings) -> list[Case]:
    """The shapes with a bound, each in every cache type, then others without.

    One sequence has its bounds where it is launched as in a decode step, overlapping the kernel before it (pdl 2); the
    same without, each launch after the end of the one before, is a line without a bound.
    """
    found = []
    for cache in (torch.bfloat16, *_EIGHT):
        share = 0.7 if cache in _EIGHT else 0.8
        found += [_case(Setting(f"64x{n}", (n,) * 64, cache), [("read", share)]) for n in (2048, 4096, 8192)]
        found.append(_case(Setting("64x2048 fused", (2048,) * 64, cache, append=True), [("read", share)]))
        for n in (8192, 16384, 32768):
            found.append(_case(Setting(f"1x{n} pdl", (n,), cache, pdl=2), [("read", 0.6)]))
            found.append(_case(Setting(f"1x{n}", (n,), cache), []))
        for append in (False, True):
            name = "1x512 fused" if append else "1x512"
            found.append(_case(Setting(f"{name} pdl", (512,), cache, append=append, pdl=2), [("us", 6.0)]))
            found.append(_case(Setting(name, (512,), cache, append=append), []))
    ragged = tuple(128 + 97 * i % 7919 for i in range(64))
    found += [
        _case(Setting("64 ragged", ragged), []),
        _case(Setting("64x8192 window 1024", (8192,) * 64, window=1024), []),
        _case(Setting("8x4096", (4096,) * 8), []),
        _case(Setting("256x512", (512,) * 256), []),
        _case(Setting("64x2048 MHA", (2048,) * 64, heads=32, kv_heads=32), []),
        _case(Setting("64x2048 MQA", (2048,) * 64, heads=32, kv_heads=1), []),
        _case(Setting("64x4096 group 8", (4096,) * 64, heads=64, kv_heads=8), []),
        _case(Setting("64x2048 D=64", (2048,) * 64, heads=32, kv_heads=8, size=64), []),
        _case(Setting("64x2048 D=256", (2048,) * 64, heads=16, kv_heads=8, size=256), []),
        _case(Setting("64x2048 D=64", (2048,) * 64, torch.int8, heads=32, kv_heads=8, size=64), []),
    ]
    return found


def case(s: Setting, bounds: list[tuple[str, float]], peers: bool = True) -> Case:
    """A line for ``s``; without ``peers`` alone."""
    return _case(s, bounds, peers)


@lru_cache
def _workspace(s: Setting) -> Tensor:
    return mmha.new_workspace("cuda", s.heads, s.kv_heads, s.size, blocks=s.blocks)


def _random(shape: tuple[int, ...], cache: torch.dtype) -> Tensor:
    if cache == torch.int8:
        return torch.randint(-127, 128, shape, device="cuda", dtype=cache)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache)


def _case(s: Setting, bounds: list[tuple[str, float]], peers: bool = True) -> Case:
    eight = s.cache in _EIGHT
    batch, longest, scale = len(s.lengths), max(s.lengths), s.size**-0.5
    pages = -(-longest // _PAGE)
    uniform = min(s.lengths) == longest and not eight and s.window == 0 and peers

    def make(i: int) -> Any:
        torch.manual_seed(i)
        shape = (batch * pages, s.kv_heads, _PAGE, s.size)
        found: dict[str, Any] = {"cache": (_random(shape, s.cache), _random(shape, s.cache))}
        found["table"] = torch.randperm(batch * pages, device="cuda").view(batch, pages).int()
        found["lengths"] = torch.tensor(s.lengths, dtype=torch.int32, device="cuda")
        width = s.heads + 2 * s.kv_heads if s.append else s.heads
        found["q"] = torch.randn(batch, width * s.size, device="cuda").bfloat16()
        angles = torch.randn(longest, s.size // 2, device="cuda")
        found["turn"] = (angles.cos(), angles.sin())
        found["scales"] = {}
        if eight:
            found["scales"] = {n: torch.rand(s.kv_heads, device="cuda") / 30 + 0.01 for n in ("k_scale", "v_scale")}
        if uniform:  # the same bytes as one run a head, for the libraries
            found["plain"] = [x.view(batch, s.kv_heads, -1, s.size) for x in found["cache"]]
        return found

    def ours(x: Any) -> Any:
        rest = (x["table"], x["lengths"], _workspace(s), scale)
        how = {"window": s.window, "pdl": s.pdl, "blocks": s.blocks, "stages": s.stages, **x["scales"]}
        if s.append:
            return mmha.mmha_append(x["q"], *x["cache"], *rest, *x["turn"], **how)
        return mmha.mmha(x["q"].view(batch, 1, s.heads, s.size), *x["cache"], *rest, **how)

    def check(x: Any) -> float:
        few = slice(0, 3)
        rest = (x["table"][few], x["lengths"][few])
        found = ours(x)[few].view(-1, 1, s.heads, s.size)
        q = x["q"][few].double()
        if s.append:  # what it writes is what the kernel wrote
            q = mmha_twin.append(q, *x["cache"], *rest, *x["turn"], **x["scales"])
        q = q.view(-1, 1, s.heads, s.size)
        return relative_error(found, mmha_twin.mmha(q, *x["cache"], *rest, scale=scale, window=s.window, **x["scales"]))

    def library_call(backend: SDPBackend) -> Any:
        def call(x: Any) -> Any:
            # the group's heads as rows of one kv head: the library then reads each key once, too
            q = x["q"][:, : s.heads * s.size].view(batch, s.kv_heads, -1, s.size)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, *x["plain"], scale=scale)

        return call

    variants: dict[str, Any] = {"ours": ours}
    if uniform:
        variants["torch flash, contiguous"] = library_call(SDPBackend.FLASH_ATTENTION)
        if batch > 1:
            variants["torch cuDNN, contiguous"] = library_call(SDPBackend.CUDNN_ATTENTION)
    seen = sum(min(n, s.window or n) for n in s.lengths)
    bytes_ = seen * s.kv_heads * s.size * 2 * s.cache.itemsize + 2 * batch * s.heads * s.size * 2
    return Case(
        f"mmha {s.name} {_NAMES[s.cache]} {s.heads}/{s.kv_heads}x{s.size}"
        + (f" b{s.blocks}s{s.stages}" if s.blocks or s.stages else ""),
        make,
        variants,
        set_bytes=bytes_,
        bytes=bytes_,
        check=check,
        tolerance=6e-3,
        bounds=bounds,
    )
