"""Weight-only products of 16 tokens to thousands, on tensor cores, beside cuBLAS on the dequantized weights.

Bytes are those of the packed weights with scales and zeros, of activations and of results. Up to 64 tokens (decoding)
ours is launched as a decoder layer launches it, with programmatic dependent launch; the figure without is beside it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from scripts.kernel_bench.weight_only import LAYER, _bytes, weight
from trtllm_cli.ops.cuda import weight_only, weight_only_twin
from trtllm_cli.ops.cuda.weight_only_packing import unpack_weight

CUBLAS = "cuBLAS bf16"


def cases(ceilings: Ceilings) -> list[Case]:
    """Few tokens against read bandwidth, many against cuBLAS, those between without a goal; odd shapes."""
    found = [
        _product(kind, m, n, k, [("read", 0.6)])
        for kind in ("int4 g128", "int4 g64", "int4 g32 zero", "int8")
        for n, k in LAYER
        for m in (16, 32, 64)
    ]
    found += [_product(kind, m, n, k, []) for kind in ("int4 g128", "int8") for n, k in LAYER for m in (128, 256)]
    found += [
        _product(kind, m, n, k, [("over:" + CUBLAS, 0.85)])
        for kind in ("int4 g128", "int4 g32 zero", "int8")
        for n, k in (*LAYER, (8192, 8192))
        for m in (512, 2048, 4096, 8192)
    ]
    odd = ((576, 576), (1536, 576), (576, 1536), (49152, 576))
    found += [_product(kind, m, n, k, []) for kind in ("int4 g64", "int8") for n, k in odd for m in (33, 1000)]
    return found


def _product(kind: str, m: int, n: int, k: int, bounds: list[tuple[str, float]]) -> Case:
    def make(i: int) -> Any:
        torch.manual_seed(i)
        packed = weight(kind, n, k)
        dense = unpack_weight(packed).bfloat16()
        return torch.randn(m, k, device="cuda").bfloat16(), packed, dense

    few = m <= 64

    def ours(s: Any) -> Any:
        return weight_only.linear(s[0], s[1], pdl=few)

    def check(s: Any) -> float:
        # some rows of the tokens: a product in float64 is slow
        rows = torch.randperm(m, device="cuda")[:64]
        return relative_error(ours(s)[rows], weight_only_twin.weight_only_linear(s[0][rows].double(), s[1]))

    size = _bytes(kind, n, k) + 2 * m * (n + k)
    plain = {"without PDL": lambda s: weight_only.linear(s[0], s[1])} if few else {}
    return Case(
        f"weight_only {kind} {m}x{n}x{k}",
        make,
        {"ours": ours, **plain, CUBLAS: lambda s: F.linear(s[0], s[2])},
        set_bytes=size,
        bytes=size,
        flops=2 * m * n * k,
        check=check,
        tolerance=5e-3,
        bounds=bounds,
    )
