"""Rotary frequencies and tables, shared by every executor.

Frequencies follow Su et al., 2021 (RoFormer) with the scalings of :class:`~trtllm_cli.models.spec.RotaryScaling`. They
are computed in float32 in the order published implementations use, because models were trained with those roundings.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.models.spec import RotaryScaling, RotarySpec

Floats = NDArray[np.float32]


def inverse_frequencies(spec: RotarySpec) -> tuple[Floats, float]:
    """(inverse frequencies [dim/2], factor on cos and sin)."""
    exponents = np.arange(0, spec.dim, 2, dtype=np.float32) / np.float32(spec.dim)
    plain = (np.float32(1.0) / np.power(np.float32(spec.theta), exponents, dtype=np.float32)).astype(np.float32)
    scaling = spec.scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, spec, scaling)


def _llama3(plain: Floats, s: RotaryScaling) -> Floats:
    assert s.low_freq_factor is not None
    assert s.high_freq_factor is not None
    assert s.original_max_positions is not None
    wavelength = 2 * math.pi / plain
    low, high = s.original_max_positions / s.low_freq_factor, s.original_max_positions / s.high_freq_factor
    blend = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = (1 - blend) * plain / s.factor + blend * plain
    scaled = np.where(wavelength > low, plain / s.factor, np.where(wavelength < high, plain, smooth))
    return scaled.astype(np.float32)


def _yarn(plain: Floats, spec: RotarySpec, s: RotaryScaling) -> tuple[Floats, float]:
    assert s.original_max_positions is not None

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    factor = s.attention_factor
    if factor is None:
        if s.mscale and s.mscale_all_dim:
            factor = mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
        else:
            factor = mscale(s.factor)

    def dimension(rotations: float) -> float:
        # the dimension whose wavelength makes `rotations` turns inside the original context
        return (
            spec.dim
            * math.log(s.original_max_positions / (rotations * 2 * math.pi))  # type: ignore[operator]
            / (2 * math.log(spec.theta))
        )

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(spec.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    scaled = plain / np.float32(s.factor) * (1 - keep) + plain * keep
    return scaled.astype(np.float32), float(factor)


def tables(spec: RotarySpec, positions: int) -> tuple[Floats, Floats]:
    """(cos, sin), each [positions, dim/2] float32, the attention factor included."""
    inv_freq, factor = inverse_frequencies(spec)
    # the angle is rounded to float32 before cos and sin, as the published implementations do
    angles = (np.arange(positions, dtype=np.float32)[:, None] * inv_freq[None, :]).astype(np.float64)
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)
