"""Weight-only products for few tokens, their fused forms, and the chain of a decoder layer's products.

Bytes are those of the packed weights with scales and zeros, and of activations; peers read their own formats.
Launches are programmatic (PDL) as in a decode step, where one product follows another: each still waits for the one
before it before it reads its activations. The variant without shows what that gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from trtllm_cli.ops.cuda import weight_only, weight_only_twin
from trtllm_cli.ops.cuda.weight_only_packing import PackedWeight, dense_weight, pack_8bit_weight, pack_int4_weight

#: N, K of an 8B decoder layer and the share of read bandwidth each must reach
LAYER = {(28672, 4096): 0.8, (4096, 14336): 0.8, (4096, 4096): 0.65, (6144, 4096): 0.65}
KINDS = ("int4 g128", "int4 g64", "int4 g32", "int4 g128 zero", "int4 g64 zero", "int4 g32 zero", "int8")


def cases(ceilings: Ceilings) -> list[Case]:
    """Every format on the layer's shapes for 1 to 8 tokens; odd shapes; dense weights; fused forms; the chain."""
    found = [
        _product(kind, m, n, k, share)
        for kind in KINDS
        for (n, k), share in LAYER.items()
        for m in ((1, 2, 4, 8) if kind in ("int4 g128", "int8") else (1, 8))
    ]
    found += [
        _product("int8", m, n, k, 0.0) for n, k in ((576, 576), (1536, 576), (576, 1536), (49152, 576)) for m in (1, 8)
    ]
    found += [
        _product("int4 g64", m, n, k, 0.0)
        for n, k in ((576, 576), (1536, 576), (576, 1536), (49152, 576))
        for m in (1, 8)
    ]
    found += [_product("fp8", 1, n, k, share) for (n, k), share in LAYER.items()]
    found += [_product("dense", m, n, k, share) for (n, k), share in LAYER.items() for m in (1, 2, 4, 8)]
    found += [_product("dense", 1, 128256, 4096, 0.8), _product("int8", 1, 128256, 4096, 0.8)]
    for kind in ("int4 g128", "int8", "dense"):
        found += [_chain(kind, m) for m in (1, 4)]
    return found


def weight(kind: str, n: int, k: int) -> PackedWeight:
    """Random weights of about unit norm a row; drawn in the packed form, which is as random."""
    group = int(kind.split()[1][1:]) if kind.startswith("int4") else 128
    if kind == "dense":
        return dense_weight(torch.randn(n, k, device="cuda").mul_(k**-0.5).bfloat16())
    if kind in ("int8", "fp8"):
        scale = (torch.rand(n, device="cuda") + 0.5) / 74 / k**0.5
        if kind == "int8":
            return pack_8bit_weight(torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8), scale)
        return pack_8bit_weight((torch.randn(n, k, device="cuda") * 74).to(torch.float8_e4m3fn), scale)
    codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    scales = ((torch.rand(n, k // group, device="cuda") + 0.5) / 4.6 / k**0.5).half()
    zero = torch.randint(0, 16, (n, k // group), device="cuda", dtype=torch.uint8) if "zero" in kind else None
    return pack_int4_weight(codes, scales, zero)


def _product(kind: str, m: int, n: int, k: int, share: float, tactic: int = 0) -> Case:
    def make(i: int) -> Any:
        torch.manual_seed(i)
        return torch.randn(m, k, device="cuda").bfloat16(), weight(kind, n, k)

    def ours(s: Any, pdl: bool = True) -> Any:
        return weight_only.linear(s[0], s[1], pdl=pdl, tactic=tactic)

    def check(s: Any) -> float:
        return relative_error(ours(s), weight_only_twin.weight_only_linear(s[0].double(), s[1]))

    size = _bytes(kind, n, k) + 2 * m * (n + k)
    variants: dict[str, Any] = {"ours": ours, "without PDL": lambda s: ours(s, False)}
    if kind == "dense":
        variants["torch bf16"] = lambda s: F.linear(s[0], s[1].data)
    return Case(
        f"weight_only {kind} {m}x{n}x{k}" + (f" tactic {tactic}" if tactic else ""),
        make,
        variants,
        set_bytes=size,
        bytes=size,
        flops=2 * m * n * k,
        check=check,
        tolerance=5e-3,
        bounds=[("read", share)] if share else [],
    )


def _chain(kind: str, m: int) -> Case:
    """norm + qkv | o + residual | norm + gate/up + SiLU | down + residual, with and without programmatic launch."""
    hidden, wide = 4096, 14336
    shapes = ((6144, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide))

    def make(i: int) -> Any:
        torch.manual_seed(i)
        norms = [1 + 0.1 * torch.randn(hidden, device="cuda").bfloat16() for _ in range(2)]
        return torch.randn(m, hidden, device="cuda").bfloat16(), [weight(kind, n, k) for n, k in shapes], norms

    def layer(s: Any, pdl: bool) -> Any:
        x, (qkv, o, up, down), norms = s
        attended = weight_only.linear(x, qkv, norm_weight=norms[0], pdl=pdl)[:, :hidden]
        x = weight_only.linear(attended, o, residual=x, pdl=pdl)
        gated = weight_only.linear(x, up, norm_weight=norms[1], gate="silu", pdl=pdl)
        return weight_only.linear(gated, down, residual=x, pdl=pdl)

    def check(s: Any) -> float:
        x, (qkv, o, up, down), norms = s
        twin = weight_only_twin.weight_only_linear
        attended = twin(x.double(), qkv, norm_weight=norms[0])[:, :hidden]
        y = twin(attended, o, residual=x)
        return relative_error(layer(s, True), twin(twin(y, up, norm_weight=norms[1], gate="silu"), down, residual=y))

    size = sum(_bytes(kind, n, k) for n, k in shapes)
    return Case(
        f"weight_only chain of a layer {kind} {m} tokens",
        make,
        {"ours": lambda s: layer(s, True), "without PDL": lambda s: layer(s, False)},
        set_bytes=size,
        bytes=size,
        check=check,
        tolerance=1e-2,
        bounds=[("read", 0.8)],
    )


def _bytes(kind: str, n: int, k: int) -> int:
    if kind == "dense":
        return 2 * n * k
    if not kind.startswith("int4"):
        return n * k + 4 * n
    groups = n * k // int(kind.split()[1][1:])
    return n * k // 2 + groups * (3 if "zero" in kind else 2)
