"""What quantized tensors stand for, in torch: the definition that every kernel must agree with.

Layouts are those of WeightScheme, ActivationScheme and KvCacheScheme in :mod:`trtllm_cli.artifacts.schema`. FP8 is E4M3
without infinities (Micikevicius et al., 2022), largest value 448.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Type8 = Literal["int8", "fp8"]
#: largest magnitude a scale maps to
TOP: dict[str, float] = {"int8": 127.0, "fp8": 448.0}


def pack_int4(values: Tensor) -> Tensor:
    """uint8 [N, K] with values 0..15 -> uint8 [N, K/2], element 0 in the low nibble. K must be even."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> uint8 [N, K] with values 0..15."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(packed.shape[0], -1)


def dequantize_8bit(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 or float8_e4m3fn [N, K], scale [N] or [1] -> float32 [N, K]."""
    return weight.float() * scale.float()[:, None]


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor | None = None) -> Tensor:
    """uint8 [N, K/2], scale [N, G], zero uint8 [N, G] (None: 8) -> float32 [N, K]: (value - zero) * scale.

    ``group`` int32 [K] names each input's group; without it groups are consecutive.
    """
    values = unpack_int4(packed).float()
    rows, groups = scale.shape
    if group is not None:
        at = group.long()
        offsets = 8.0 if zero is None else zero.float()[:, at]
        return (values - offsets) * scale.float()[:, at]
    grouped = values.view(rows, groups, -1)
    offset = 8.0 if zero is None else zero.float()[:, :, None]
    return ((grouped - offset) * scale.float()[:, :, None]).view(rows, -1)


def round_8bit(x: Tensor, type: Type8) -> Tensor:
    """Scaled values to the nearest representable ones, ties to even, saturating; float32 in and out.

    int8 gives whole numbers in -128..127, fp8 E4M3 values in -448..448.
    """
    if type == "int8":
        return x.round().clamp(-128, 127)
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def token_scales(x: Tensor, type: Type8) -> Tensor:
    """Scale of each token of x [..., K], float32 [..., 1]: max|x| / top; 1 for a token of zeros."""
    largest = x.abs().amax(dim=-1, keepdim=True).float()
    return torch.where(largest > torch.finfo(torch.float32).tiny * TOP[type], largest / TOP[type], 1.0)


def quantize_activation(x: Tensor, type: Type8, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(quantized values as float32, scales): ``x`` [..., K] is about values * scales.

    ``scale`` [1] is the static scale; None takes each token's own.
    """
    wide = x.float()
    scales = token_scales(wide, type) if scale is None else scale.float()
    return round_8bit(wide / scales, type), scales


def kv_round_trip(x: Tensor, type: Type8, scale: Tensor) -> Tensor:
    """Keys or values [B, kv_heads, S, D] as a cache with ``scale`` [kv_heads] gives them back, in x's dtype."""
    wide = scale.float()[None, :, None, None]
    values = x.float() / wide
    if type == "int8":
        values = values.round().clamp(-127, 127)
    else:
        values = round_8bit(values, type)
    return (values * wide).to(x.dtype)
