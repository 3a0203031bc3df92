"""The inner loops of GPTQ's sweep and of coordinate descent on a GPU, a chunk of inputs in one launch.

A chunk's inputs must be visited one after another, but the rows of the weight do not depend on one another: each
program takes some of them (columns here, as everything is [inputs, rows]), keeps the chunk's tile in registers and
walks through it. As single torch operations the same walk is bound by launches, five to nine for each input.

Rounding is to nearest, ties to even, as torch's; adding and subtracting 1.5 * 2^23 does it, exact for the clamped
values at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _round(x):  # type: ignore[no-untyped-def]
    magic = 12582912.0
    return (x + magic) - magic


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    moving, factor, scale, low, high, codes, errors, count, rows, start, stop, factor_row, factor_column,
    CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, CHUNK)
    inside = row < rows
    mask = (at[:, None] < count) & inside[None, :]
    where = at[:, None] * rows + row[None, :]
    tile = tl.load(moving + where, mask=mask, other=0.0)
    for i in range(start, stop):
        weight = tl.sum(tl.where(at[:, None] == i, tile, 0.0), axis=0)
        line = i * rows + row
        s = tl.load(scale + line, mask=inside, other=1.0)
        bottom = tl.load(low + line, mask=inside, other=0.0)
        top = tl.load(high + line, mask=inside, other=0.0)
        whole = _round(tl.minimum(tl.maximum(weight / s, bottom), top))
        error = weight - whole * s
        tl.store(codes + line, whole, mask=inside)
        tl.store(errors + line, error, mask=inside)
        factors = tl.load(factor + i * factor_row + at * factor_column, mask=(at > i) & (at < count), other=0.0)
        tile -= factors[:, None] * error[None, :]
    tl.store(moving + where, tile, mask=mask & (at[:, None] >= stop))


@triton.jit  # type: ignore[untyped-decorator]
def _recode(  # type: ignore[no-untyped-def]
    slope, hessian, scale, low, high, codes, moved, count, rows, start, stop, hessian_stride, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, CHUNK)
    inside = row < rows
    mask = (at[:, None] < count) & inside[None, :]
    where = at[:, None] * rows + row[None, :]
    tile = tl.load(slope + where, mask=mask, other=0.0)
    s = tl.load(scale + row, mask=inside, other=1.0)
    bottom = tl.load(low + row, mask=inside, other=0.0)
    top = tl.load(high + row, mask=inside, other=0.0)
    for i in range(start, stop):
        line = i * rows + row
        near = tl.sum(tl.where(at[:, None] == i, tile, 0.0), axis=0)
        code = tl.load(codes + line, mask=inside, other=0.0)
        own = tl.load(hessian + i * hessian_stride + i)
        best = _round(tl.minimum(tl.maximum(code - near / (own * s), bottom), top))
        move = (best - code) * s
        tl.store(codes + line, best, mask=inside)
        tl.store(moved + line, tl.load(moved + line, mask=inside, other=0.0) + move, mask=inside)
        factors = tl.load(hessian + i * hessian_stride + at, mask=(at > i) & (at < count), other=0.0)
        tile += factors[:, None] * move[None, :]
    tl.store(slope + where, tile, mask=mask & (at[:, None] > start))


def sweep(
    moving: Tensor, factor: Tensor, scale: Tensor, low: Tensor, high: Tensor, codes: Tensor, errors: Tensor,
    start: int, stop: int,
) -> None:  # fmt: skip
    """Round inputs ``start`` to ``stop`` of a chunk one after another, each moving the chunk's later ones.

    ``moving``, ``scale``, ``low``, ``high``, ``codes`` and ``errors`` are contiguous float32 [C, N], C at most 128;
    ``factor`` is [C, C]. Only rows from ``stop`` on of ``moving`` are written.
    """
    count, rows = moving.shape
    grid = (triton.cdiv(rows, _ROWS),)
    _sweep[grid](
        moving, factor, scale, low, high, codes, errors, count, rows, start, stop, factor.stride(0),
        factor.stride(1), CHUNK=triton.next_power_of_2(count), ROWS=_ROWS,
    )  # fmt: skip


def recode(
    slope: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor, codes: Tensor, moved: Tensor,
    start: int, stop: int,
) -> None:  # fmt: skip
    """Give inputs ``start`` to ``stop`` of a chunk their best code, each in turn, all of one group.

    ``slope``, ``codes`` and ``moved`` are contiguous float32 [C, N], C at most 128, ``hessian`` [C, C] with contiguous
    rows; ``scale``, ``low`` and ``high`` [N] are the group's. The slopes of the chunk's later inputs follow.
    """
    count, rows = slope.shape
    grid = (triton.cdiv(rows, _ROWS),)
    _recode[grid](
        slope, hessian, scale, low, high, codes, moved, count, rows, start, stop, hessian.stride(0),
        CHUNK=triton.next_power_of_2(count), ROWS=_ROWS,
    )  # fmt: skip
