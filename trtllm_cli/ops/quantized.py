"""Integer weights back to floats, in torch: the definition that every kernel must agree with.

Layouts are those of :class:`trtllm_cli.artifacts.schema.WeightScheme`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(values: Tensor) -> Tensor:
    """uint8 [N, K] with values 0..15 -> uint8 [N, K/2], element 0 in the low nibble. K must be even."""
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] -> uint8 [N, K] with values 0..15."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).reshape(packed.shape[0], -1)


def dequantize_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [N, K], scale [N] -> float32 [N, K]."""
    return weight.float() * scale.float()[:, None]


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """uint8 [N, K/2], scale [N, K/g], zero uint8 [N, K/g] (None: 8) -> float32 [N, K]: (value - zero) * scale."""
    values = unpack_int4(packed).float()
    rows, groups = scale.shape
    grouped = values.view(rows, groups, -1)
    offset = 8.0 if zero is None else zero.float()[:, :, None]
    return ((grouped - offset) * scale.float()[:, :, None]).view(rows, -1)
