"""Packed weights of every kind, random, for tests of the weight-only products on either device."""

from __future__ import annotations

import torch

from trtllm_cli.ops.cuda.weight_only_packing import (
    PackedWeight,
    dense_weight,
    pack_8bit_weight,
    pack_int4_weight,
)
from trtllm_cli.ops.quantized import pack_int4

KINDS = [
    "int4 g128",
    "int4 g64",
    "int4 g32",
    "int4 g128 zero",
    "int4 g64 zero",
    "int4 g32 zero",
    "int8",
    "fp8",
    "dense",
]


def made_weight(
    kind: str,
    n: int,
    k: int,
    dtype: torch.dtype,
    seed: int = 0,
    order: bool = False,
    factor: float = 1.0,
    device: str = "cuda",
) -> PackedWeight:
    """Weights [n, k] of about unit norm a row times ``factor``; k is rounded up to what ``kind`` takes."""
    made = torch.Generator(device).manual_seed(seed)

    def floats(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=made, device=device)

    if kind == "dense":
        k = (k + 7) // 8 * 8
        return dense_weight(((floats(n, k) - 0.5) * (3.5 / k**0.5)).to(dtype))
    if kind in ("int8", "fp8"):
        scale = (0.5 + floats(n)) * (factor / 74 / k**0.5)
        if kind == "int8":
            codes = torch.randint(-128, 128, (n, k), generator=made, device=device, dtype=torch.int8)
            return pack_8bit_weight(codes, scale)
        return pack_8bit_weight((torch.randn(n, k, generator=made, device=device) * 74).to(torch.float8_e4m3fn), scale)
    group = int(kind.split()[1][1:])
    k = (k + group - 1) // group * group
    codes = torch.randint(0, 16, (n, k), generator=made, device=device, dtype=torch.uint8)
    scale = (0.5 + floats(n, k // group)) * (factor / 4.6 / k**0.5)
    zero = None
    if "zero" in kind:
        zero = torch.randint(0, 16, (n, k // group), generator=made, device=device, dtype=torch.uint8)
    index = None
    if order:
        index = (torch.randperm(k, generator=made, device=device) // group).int()
    return pack_int4_weight(pack_int4(codes), scale if factor != 1.0 else scale.half(), zero, index)
