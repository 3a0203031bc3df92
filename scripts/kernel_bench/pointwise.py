"""Gates, norms, quantization, rotary with cache write, embedding: one token, and enough for the bandwidth to count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.kernel_bench.harness import Case, Ceilings, relative_error
from trtllm_cli.ops.cuda import norms, pointwise, pointwise_twin, rotary

ONE = [("us", 3.0)]
MANY = [("copy", 0.85)]


def cases(ceilings: Ceilings) -> list[Case]:
    """Llama-3.1-8B's widths, in bf16. One token runs as in a decode step, overlapping with the kernel before."""
    found = []
    for tokens, bounds in ((1, ONE), (8192, MANY)):
        found += [
            _gated(tokens, 14336, bounds),
            _gated(tokens, 14336, bounds, "fp8"),
            _norm(tokens, 4096, bounds),
            _norm(tokens, 4096, bounds, add=True),
            _norm(tokens, 4096, bounds, add=True, quantize="int8"),
            _norm(tokens, 4096, bounds, kind="layer"),
            _quantize(tokens, 4096, bounds, "fp8"),
            _quantize(tokens, 14336, bounds, "int8"),
            _rotary(tokens, bounds, None),
            _rotary(tokens, bounds, torch.int8),
            _embedding(tokens, 4096, bounds),
        ]
    return [*found, _gated(64, 14336, []), _norm(64, 4096, [], add=True), _norm(8192, 577, []), _norm(8192, 576, [])]


def _case(name: str, tokens: int, make: Any, ours: Any, torchs: Any, size: int, check: Any, bounds: Any) -> Case:
    variants: dict[str, Callable[[Any], Any]] = {"ours": lambda x: ours(x, int(tokens == 1))}
    if tokens == 1:
        variants["ours without overlap"] = lambda x: ours(x, 0)
    if torchs is not None:
        variants["torch"] = torchs
    return Case(name, make, variants, set_bytes=size, bytes=size, check=check, bounds=bounds)


def _random(i: int, *shape: int) -> Tensor:
    torch.manual_seed(i)
    return torch.randn(*shape, device="cuda").bfloat16()


def _gated(tokens: int, width: int, bounds: Any, quantize: Any = None) -> Case:
    def ours(x: Tensor, pdl: int) -> Any:
        return pointwise.gated(x[:, :width], x[:, width:], "silu", quantize, pdl=pdl)

    def check(x: Tensor) -> float:
        wide = x.double()
        wanted = pointwise_twin.gated(wide[:, :width], wide[:, width:], "silu").out
        return _error(ours(x, 0), wanted)

    size = tokens * width * (5 if quantize else 6)
    name = f"gated silu bf16{' -> ' + quantize if quantize else ''} {tokens}x{width}"
    torchs = None if quantize else lambda x: F.silu(x[:, :width]) * x[:, width:]
    return _case(name, tokens, lambda i: _random(i, tokens, 2 * width), ours, torchs, size, check, bounds)


def _norm(tokens: int, width: int, bounds: Any, kind: Any = "rms", add: bool = False, quantize: Any = None) -> Case:
    gamma, beta = _random(0, 2, width)
    shift = beta if kind == "layer" else None

    def make(i: int) -> Any:
        return _random(i, tokens, width), _random(i + 100, tokens, width) if add else None

    def ours(x: Any, pdl: int) -> Any:
        return norms.norm(x[0], gamma, shift, x[1], kind=kind, eps=1e-5, quantize=quantize, pdl=pdl)

    def torchs(x: Any) -> Any:
        h = x[0] if x[1] is None else x[0] + x[1]
        if kind == "layer":
            return F.layer_norm(h, (width,), gamma, beta, 1e-5)
        return F.rms_norm(h, (width,), gamma, 1e-5)

    def check(x: Any) -> float:
        h = x[0] if x[1] is None else x[0] + x[1]
        weights = (gamma.double(), None if shift is None else shift.double())
        return _error(ours(x, 0), pointwise_twin.norm(h.double(), *weights, kind=kind, eps=1e-5).out)

    size = tokens * width * (2 + (4 if add else 0) + (1 if quantize else 2))
    name = f"{kind} norm{' + residual' if add else ''} bf16{' -> ' + quantize if quantize else ''} {tokens}x{width}"
    return _case(name, tokens, make, ours, None if quantize else torchs, size, check, bounds)


def _quantize(tokens: int, width: int, bounds: Any, quantize: Any) -> Case:
    def ours(x: Tensor, pdl: int) -> Any:
        return norms.quantize(x, quantize, pdl=pdl)

    def check(x: Tensor) -> float:
        return _error(ours(x, 0), x.double())

    name = f"quantize bf16 -> {quantize} {tokens}x{width}"
    size = tokens * width * 3
    return _case(name, tokens, lambda i: _random(i, tokens, width), ours, None, size, check, bounds)


def _rotary(tokens: int, bounds: Any, cache: torch.dtype | None) -> Case:
    heads, kv, dim, page_size = 32, 8, 128, 64
    stored = cache or torch.bfloat16
    pages = -(-tokens // page_size)
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    sequences = torch.zeros_like(positions)
    table = torch.randperm(pages, device="cuda").int()[None]
    angles = positions[:, None].float() * 500000.0 ** (-torch.arange(0, dim, 2, device="cuda") / dim)
    cos, sin = angles.cos(), angles.sin()
    scales = {} if cache is None else {n: torch.full((kv,), 0.03, device="cuda") for n in ("k_scale", "v_scale")}

    def make(i: int) -> Any:
        pool = torch.zeros(2, pages, kv, page_size, dim, dtype=stored, device="cuda")
        return _random(i, tokens, (heads + 2 * kv) * dim), pool

    def ours(x: Any, pdl: int) -> Tensor:
        qkv, (k, v) = x
        return rotary.rotary(qkv, positions, sequences, table, k, v, heads, cos, sin, **scales, pdl=pdl)[0]

    def check(x: Any) -> float:
        qkv, pool = x
        wide, wanted = qkv.double(), pool.double() if cache is None else pool.clone()
        q, _ = pointwise_twin.rotary(wide, positions, sequences, table, *wanted, heads, cos, sin, **scales)
        return max(relative_error(ours(x, 0), q), relative_error(pool, wanted))

    def torchs(x: Any) -> Any:
        qkv, (k_pool, v_pool) = x
        q, k, v = qkv.view(tokens, -1, dim).split([heads, kv, kv], 1)
        turn, lift = torch.cat([cos, cos], -1)[:, None].bfloat16(), torch.cat([sin, sin], -1)[:, None].bfloat16()
        q, k = (y * turn + torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], -1) * lift for y in (q, k))
        page = table[0, (positions // page_size).long()].long()
        k_pool[page, :, (positions % page_size).long()] = k
        v_pool[page, :, (positions % page_size).long()] = v
        return q

    size = tokens * dim * (2 * (2 * heads + 2 * kv) + 2 * kv * stored.itemsize)
    name = f"rotary + cache write bf16{' -> int8' if cache else ''} {tokens}x({heads}+2*{kv})x{dim}"
    return _case(name, tokens, make, ours, None if cache else torchs, size, check, bounds)


def _embedding(tokens: int, width: int, bounds: Any) -> Case:
    table = _random(0, 128256, width)

    def make(i: int) -> Tensor:
        torch.manual_seed(i)
        return torch.randint(0, 128256, (tokens,), device="cuda")

    def ours(ids: Tensor, pdl: int) -> Tensor:
        return pointwise.embedding(ids, table, pdl=pdl)

    def check(ids: Tensor) -> float:
        return relative_error(ours(ids, 0), table[ids])

    size = 4 * tokens * width
    return _case(
        f"embedding bf16 {tokens}x{width}", tokens, make, ours, lambda i: F.embedding(i, table), size, check, bounds
    )


def _error(found: pointwise_twin.Result, wanted: Tensor) -> float:
    """Of what the result stands for; rounding to 8 bits is left out, as far as it explains the difference."""
    if found.scales is None:
        return relative_error(found.out, wanted)
    values = found.out.double() * found.scales.double()[:, None]
    step = found.scales.double()[:, None]
    if found.out.dtype != torch.int8:  # three bits after the leading one, down to 2^-9
        step = (values.abs() / 8).maximum(step / 512)
    excess = ((values - wanted).abs() - step * 0.51).clamp(min=0)
    return float(excess.norm() / wanted.norm())
