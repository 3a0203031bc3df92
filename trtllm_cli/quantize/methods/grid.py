"""The values a weight may take: one scale (and zero point) a group of inputs of a row, fitted, applied and packed.

A group's values are ``(code - zero) * scale`` with the codes of :class:`~trtllm_cli.artifacts.schema.WeightScheme`:
0..15 for int4 (``zero`` 8 where symmetric); int8 is written here as 1..255 around 128, so that both are uint8.

Without search (round to nearest): symmetric scale = max|w| / 7 (int8: / 127); asymmetric scale = (max - min) / 15 with
the range widened to hold zero, zero = round(-min / scale).

With search: the scale of least sum(importance * (w - value)^2) among that one and shrunken ranges, each followed by the
least-squares scale of the codes it gives, sum(importance * w * q) / sum(importance * q * q), q = code - zero. A
symmetric int4 group tries scales of both signs: its codes reach from -8 to 7, and the sign decides which side has the
eighth (so scales can be negative). Where no importance is known it is w^2: large weights meet large inputs more often
than chance would have it. (SmolLM2, int4 symmetric, groups of 64, perplexity: without search 41.0; least squares with
all weights alike and nothing clipped 39.2; w^2 36.8.) By its own measure the result is never worse than without search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.quantize.methods.base import QuantizedRows

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.artifacts.schema import WeightScheme

# elements of a block of rows while searching: its half dozen temporaries stay in a CPU's cache, or keep a GPU busy
_CPU_BLOCK = 64 * 1024
_GPU_BLOCK = 32 * 1024 * 1024
# The largest magnitude of a symmetric group over the scales to try. A positive divisor maps it to the side of -8, a
# negative one to the side of 7: where both clip it, either can be the better.
_INT4_DIVISORS = (8.0, 7.0, 7.5, 8.5, -8.5, 9.0, -9.0, 9.5, -9.5, 10.0, -10.0, 11.0, -11.0, 12.0, -12.0, 14.0, -14.0)
_INT8_DIVISORS = (127.0, 128.5, 130.0, 132.0, 135.0, 139.0, 144.0, 150.0, 158.0, 168.0)
# the same for asymmetric groups: fractions of their range, and moves of the zero point
_FRACTIONS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.62, 0.52, 0.4)
_ZERO_SHIFTS = (0, -1, 1)
_REFITS = 2


@dataclass(frozen=True)
class Grid:
    """``scale`` float32 [N, G], not zero and exactly representable in the scheme's scale dtype; ``zero`` float32
    [N, G] with whole numbers 0..15, or None (8 for int4, 128 for int8)."""

    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def offset(self) -> Tensor | float:
        """What is added to a whole number q to make its code."""
        return self.zero if self.zero is not None else float(2 ** (self.bits - 1))

    @property
    def lowest(self) -> Tensor | float:
        """The smallest whole number q that has a code; int8 leaves -128 unused so that negation is exact."""
        if self.zero is not None:
            return -self.zero
        return -8.0 if self.bits == 4 else -127.0

    @property
    def highest(self) -> Tensor | float:
        """The largest whole number q that has a code."""
        if self.zero is not None:
            return 15 - self.zero
        return 7.0 if self.bits == 4 else 127.0


def group_width(scheme: WeightScheme, in_features: int) -> int:
    """Inputs that share a scale; the whole row for int8 per channel and for group size -1."""
    if scheme.type == "fp8" or scheme.granularity == "tensor":
        raise ValueError(f"{scheme.type} per {scheme.granularity} is not a grid of whole numbers by row")
    size = scheme.group_size if scheme.granularity == "group" else None
    width = in_features if size in (None, -1) else int(size or 0)
    if in_features % width:
        raise ValueError(f"groups of {width} do not divide {in_features} inputs")
    return width


def fit(weight: Tensor, scheme: WeightScheme, importance: Tensor | None, search: bool) -> Grid:
    """The grid of each group of consecutive inputs of ``weight`` float32 [N, K].

    ``importance`` [K] >= 0 weighs the squared errors of the search; None: each weight by its own square. Works in
    blocks of rows. Raises UnsupportedError where a group's scale does not fit the scheme's scale dtype.
    """
    import torch

    count, inputs = weight.shape
    width = group_width(scheme, inputs)
    rows = max(1, (_CPU_BLOCK if weight.device.type == "cpu" else _GPU_BLOCK) // inputs)
    weights = None if importance is None else importance.to(weight).view(-1, width)
    scales, zeros = [], []
    for begin in range(0, count, rows):
        grouped = weight[begin : begin + rows].reshape(-1, inputs // width, width)
        scale, zero = _from_range(grouped, scheme)
        if search:
            scale, zero = _searched(grouped, scheme, weights, scale, zero)
        scales.append(scale)
        zeros.append(zero)
    held = None if scheme.symmetric else torch.cat([zero for zero in zeros if zero is not None])
    return Grid(torch.cat(scales), held, scheme.bits)


def largest_scale(scheme: WeightScheme) -> float:
    """The largest number of the scale dtype."""
    import torch

    return torch.finfo(torch.float16 if scheme.scale_dtype == "float16" else torch.float32).max


def storable(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """The nearest scale that is stored exactly: of at least the smallest normal magnitude, at most the largest."""
    import torch

    dtype = torch.float16 if scheme.scale_dtype == "float16" else torch.float32
    info = torch.finfo(dtype)
    rounded = scale.clamp(-info.max, info.max).to(dtype).float()
    smallest = torch.full_like(rounded, info.smallest_normal)
    return torch.where(rounded.abs() < info.smallest_normal, smallest, rounded)


def _from_range(grouped: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) [n, G] that hold every value of ``grouped`` [n, G, width]; scale 1 for a group of zeros."""
    import torch

    if scheme.symmetric:
        span = grouped.abs().amax(dim=2)
        exact = span / (7 if scheme.bits == 4 else 127)
    else:
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
        span = high - low
        exact = span / 15
    if bool((exact > largest_scale(scheme)).any()):
        raise UnsupportedError(
            "SCALE_RANGE",
            f"a group spans {float(span.max()):.3g}, its scale does not fit {scheme.scale_dtype}",
            "use int8-weight-only",
        )
    # dividing a float32 by a scale below the smallest normal would overflow: such a group is zero for every purpose
    empty = span <= (0.0 if scheme.scale_dtype == "float16" else torch.finfo(torch.float32).tiny * 127)
    scale = torch.where(empty, torch.ones_like(span), storable(exact, scheme))
    if scheme.symmetric:
        return scale, None
    return scale, (-low / scale).round().clamp(0, 15)


def _candidates(
    grouped: Tensor, scheme: WeightScheme, scale: Tensor, zero: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zero points [n, G] to try."""
    if zero is None:
        largest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True))[:, :, 0]
        divisors = _INT4_DIVISORS if scheme.bits == 4 else _INT8_DIVISORS
        for divisor in divisors:
            yield largest / -divisor, None
        return
    for shift in _ZERO_SHIFTS:
        moved = (zero + shift).clamp(0, 15)
        for fraction in _FRACTIONS:
            yield scale * fraction, moved


def _searched(
    grouped: Tensor, scheme: WeightScheme, importance: Tensor | None, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The best (scale, zero) for ``grouped`` [n, G, width] given the first; ``importance`` [G, width]."""
    import torch

    if importance is None:
        largest = grouped.abs().amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        importance = (grouped / largest).square_()
    weighted = grouped * importance

    def whole(scale: Tensor, zero: Tensor | None) -> Tensor:
        grid = Grid(scale, zero, scheme.bits)
        low, high = grid.lowest, grid.highest
        if not isinstance(low, float) and not isinstance(high, float):
            low, high = low[:, :, None], high[:, :, None]
        return nearest(grouped, scale[:, :, None], low, high)

    def products(values: Tensor) -> tuple[Tensor, Tensor]:
        """sum(importance w q) and sum(importance q q), [n, G]."""
        top = (weighted * values).sum(dim=2)
        return top, values.square_().mul_(importance).sum(dim=2)

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        return whole(scale, zero).mul_(scale[:, :, None]).sub_(grouped).square_().mul_(importance).sum(dim=2)

    # for given q the best scale is top / bottom and takes top^2 / bottom off the error
    best_scale, best_zero, best = scale, zero, torch.zeros_like(scale)
    empty = grouped.abs().amax(dim=2) == 0
    for tried, moved in _candidates(grouped, scheme, scale, zero):
        top, bottom = products(whole(tried, moved))
        gain = top * top / bottom
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, top / bottom, best_scale)
        if best_zero is not None and moved is not None:
            best_zero = torch.where(better, moved, best_zero)
    for _ in range(_REFITS):
        top, bottom = products(whole(storable(best_scale, scheme), best_zero))
        best_scale = torch.where(bottom > 0, top / bottom, best_scale)
    best_scale = storable(best_scale, scheme)
    better = (error(best_scale, best_zero) < error(scale, zero)) & ~empty
    if zero is not None and best_zero is not None:
        zero = torch.where(better, best_zero, zero)
    return torch.where(better, best_scale, scale), zero


def encode(weight: Tensor, grid: Grid, group: Tensor | None = None) -> Tensor:
    """Nearest codes, uint8 [N, K], of ``weight`` float32 [N, K]; ``group`` [K] names each input's group, without it
    groups are consecutive."""
    import torch

    inputs = weight.shape[1]
    low, high = spread(grid.lowest, inputs, group), spread(grid.highest, inputs, group)
    whole = nearest(weight, spread(grid.scale, inputs, group), low, high)
    return (whole + spread(grid.offset, inputs, group)).to(torch.uint8)


def nearest(weight: Tensor, scale: Tensor | float, low: Tensor | float, high: Tensor | float) -> Tensor:
    """weight / scale rounded to whole numbers from ``low`` to ``high``, half to even."""
    quotient = (weight / scale).round_()
    if isinstance(low, float) or isinstance(high, float):
        assert isinstance(low, float)
        assert isinstance(high, float)
        return quotient.clamp_(low, high)
    return quotient.clamp_(low, high)


def decode(codes: Tensor, grid: Grid, group: Tensor | None = None) -> Tensor:
    """What uint8 ``codes`` [N, K] stand for, float32 [N, K]."""
    width = codes.shape[1]
    values: Tensor = (codes.float() - spread(grid.offset, width, group)) * spread(grid.scale, width, group)
    return values


def spread(per_group: Tensor | float, inputs: int, group: Tensor | None) -> Tensor | float:
    if isinstance(per_group, float):
        return per_group
    if group is not None:
        return per_group[:, group.long()]
    return per_group.repeat_interleave(inputs // per_group.shape[1], dim=1)


def pack(codes: Tensor, grid: Grid, scheme: WeightScheme, group: Tensor | None = None) -> QuantizedRows:
    """The tensors that a checkpoint stores for ``codes`` [N, K] of ``grid``, and what they stand for."""
    import torch

    from trtllm_cli.ops.quantized import dequantize_8bit, dequantize_int4, pack_int4

    if scheme.type == "int8":
        values = (codes.short() - 128).to(torch.int8)
        scale = grid.scale[:, 0].clone()
        return QuantizedRows({"weight": values, "weight_scale": scale}, dequantize_8bit(values, scale))
    packed = pack_int4(codes)
    stored = grid.scale.to(torch.float16 if scheme.scale_dtype == "float16" else torch.float32)
    tensors = {"weight": packed, "weight_scale": stored}
    zero = None if grid.zero is None else grid.zero.to(torch.uint8)
    if zero is not None:
        tensors["weight_zero"] = zero
    index = None if group is None else group.to(torch.int32)
    if index is not None:
        tensors["weight_group"] = index
    return QuantizedRows(tensors, dequantize_int4(packed, stored, zero, index))
