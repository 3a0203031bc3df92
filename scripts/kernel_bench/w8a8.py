"""The 8-bit product, int8 and FP8, from one token to thousands.

Rows marked "pdl" run as those of a decode step do, by programmatic dependent launch: the next product's weights are
fetched while the last blocks of the one before finish.
"""

from __future__ import annotations

from typing import Any

import torch

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from trtllm_cli.ops.cuda import w8a8, w8a8_twin

_LAYERS = ((28672, 4096), (4096, 14336), (4096, 4096), (6144, 4096))


def cases(ceilings: Ceilings) -> list[Case]:
    """Large squares against the libraries, small batches against read bandwidth, what lies between."""
    large = (8192, 8192, 8192)
    found = [
        _case(torch.int8, *large, [("over:torch._int_mm, no epilogue", 1.25)]),
        _case(torch.float8_e4m3fn, *large, [("over:torch._scaled_mm", 1.0)]),
        _case(torch.float8_e4m3fn, *large, [("over:torch._scaled_mm fast", 1.0)], fast=True),
    ]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        found += [_case(dtype, m, n, k, [("read", 0.6)], pdl=True) for n, k in _LAYERS for m in (1, 4, 8, 16, 32, 64)]
        found += [_case(dtype, m, n, k, []) for n, k in _LAYERS for m in (1, 16, 64)]
        found += [_case(dtype, m, n, k, []) for n, k in _LAYERS for m in (128, 256, 512, 1024, 4096)]
        found += [_case(dtype, m, n, k, []) for n, k in ((576, 576), (1536, 576), (49152, 576)) for m in (1, 128)]
    return found


def _case(
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    bounds: list[tuple[str, float]],
    fast: bool = False,
    tactic: int = 0,
    pdl: bool = False,
) -> Case:
    fp8 = dtype == torch.float8_e4m3fn

    def make(i: int) -> Any:
        torch.manual_seed(i)
        if fp8:
            a, w = (torch.randn(rows, k, device="cuda").to(dtype) for rows in (m, n))
        else:
            a, w = ((torch.randn(rows, k, device="cuda") * 32).round().clamp(-127, 127).to(dtype) for rows in (m, n))
        return a, w, torch.rand(m, device="cuda") + 0.5, torch.rand(n, device="cuda") + 0.5

    def ours(x: Any) -> Any:
        return w8a8.w8a8_linear(*x, fast_accumulation=fast, pdl=pdl, tactic=tactic)

    def check(x: Any) -> float:
        a, w, a_scale, w_scale = x
        rows = slice(0, 512)  # as many as the float64 product is patient for
        wanted = w8a8_twin.w8a8_linear(a[rows], w, a_scale[rows], w_scale, out_dtype=torch.float64)
        return relative_error(ours(x)[rows], wanted)

    def scaled(x: Any, fast: bool) -> Any:
        a, w, a_scale, w_scale = x
        return torch._scaled_mm(
            a, w.T, a_scale[:, None], w_scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    peers: dict[str, Any] = {"torch._int_mm, no epilogue": lambda x: torch._int_mm(x[0], x[1].T)}
    if fp8:
        peers = {"torch._scaled_mm": lambda x: scaled(x, False), "torch._scaled_mm fast": lambda x: scaled(x, True)}
    return Case(
        f"w8a8 {'fp8 fast' if fast else 'fp8' if fp8 else 'int8'} {m}x{n}x{k}"
        + (" pdl" if pdl else "")
        + (f" tactic {tactic}" if tactic else ""),
        make,
        {"ours": ours, **peers},
        set_bytes=m * k + n * k + 2 * m * n,
        bytes=m * k + n * k + 2 * m * n,
        flops=2 * m * n * k,
        check=check,
        tolerance=5e-3,
        bounds=bounds,
    )
