"""Coordinate descent on a layer's output error from codes that are good already (Behdin et al., "QuantEase", 2023).

The error of a row is (w' - w) H (w' - w)^T. One code at a time takes the value that is best while all others stay; we
let the scale of each group do the same before its codes (least squares, then rounded to what is stored), and keep a
change only where it lowers the error. So no pass raises it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.quantize.methods.grid import storable
from trtllm_cli.quantize.methods.levels import Levels, chunks

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.artifacts.schema import WeightScheme


@dataclass(frozen=True)
class _Part:
    """Some consecutive inputs: their codes [k, N], ``slope`` = H (w' - w) [k, N], the Hessian among them [k, k]; and
    how far their values ``moved`` [k, N] since the slopes of all other inputs were right."""

    codes: Tensor
    slope: Tensor
    hessian: Tensor
    moved: Tensor


def descend(
    codes: Tensor, levels: Levels, weight: Tensor, hessian: Tensor, scheme: WeightScheme, *, passes: int, block: int
) -> None:
    """Improve ``codes`` [K, N] and the scales of ``levels`` in place for ``weight`` [K, N] and ``hessian`` [K, K].

    Groups are of consecutive inputs in the order given; the diagonal of the Hessian is positive.
    """
    import torch

    inputs = len(codes)
    width = inputs // len(levels.scale)
    if passes:
        slope = hessian @ (codes * levels.scale.repeat_interleave(width, dim=0) - weight)
    for _ in range(passes):
        for begin, end in chunks(inputs, width, block):
            if width > end - begin and begin % width == 0:
                # a group wider than a chunk: its scale moves all of it, and every slope follows at once
                own = slice(begin, begin + width)
                moved = _rescale(codes[own], levels, begin // width, slope[own], hessian[own, own], scheme)
                slope.addmm_(hessian[:, own], moved)
            near = slope[begin:end].clone()
            part = _Part(codes[begin:end], near, hessian[begin:end, begin:end], torch.zeros_like(near))
            for start in range(0, end - begin, width):
                inside = slice(start, min(start + width, end - begin))
                group = (begin + start) // width
                if width <= end - begin:
                    own_hessian = part.hessian[inside, inside]
                    moved = _rescale(part.codes[inside], levels, group, near[inside], own_hessian, scheme)
                    part.moved[inside] = moved
                    near.addmm_(part.hessian[:, inside], moved)
                _recode(part, levels, group, inside)
            slope.addmm_(hessian[:, begin:end], part.moved)


def _rescale(codes: Tensor, levels: Levels, group: int, slope: Tensor, hessian: Tensor, scheme: WeightScheme) -> Tensor:
    """Move a group's scale [N] to its best, codes unchanged, where that helps; returns how far its values moved.

    The error changes by d (2 q.slope + d q H q^T) when the scale moves by d.
    """
    import torch

    first = (codes * slope).sum(dim=0)
    second = (hessian @ codes).mul_(codes).sum(dim=0)
    scale = levels.scale[group]
    best = scale - first / second
    # a group without codes has no best scale; one far off belongs to codes that hardly count, and stays
    ratio = best / scale
    best = torch.where((ratio > 0.5) & (ratio < 2), best, scale)
    move = storable(best, scheme) - scale
    move = torch.where(move * (2 * first + move * second) < 0, move, torch.zeros_like(move))
    scale.add_(move)
    return codes * move


def _recode(part: _Part, levels: Levels, group: int, inside: slice) -> None:
    """Give each of the inputs ``inside`` a part, all of one group, its best code: round(q - slope / (H_kk scale))."""
    import torch

    scale = levels.scale[group]
    if scale.is_cuda:
        from trtllm_cli.quantize.methods import sweeps_cuda

        low, high = levels.limits(torch.tensor(group, device=scale.device))
        sweeps_cuda.recode(
            part.slope, part.hessian, scale, low, high, part.codes, part.moved, inside.start, inside.stop
        )
        return
    steps = (1 / (part.hessian.diagonal()[inside, None] * scale)).unbind(0)
    best, move = torch.empty_like(scale), torch.empty_like(scale)
    codes, slopes, moved = part.codes.unbind(0), part.slope.unbind(0), part.moved.unbind(0)
    for at, step in enumerate(steps, inside.start):
        torch.addcmul(codes[at], slopes[at], step, value=-1, out=best)
        levels.round_(best, group)
        torch.sub(best, codes[at], out=move).mul_(scale)
        codes[at].copy_(best)
        moved[at].add_(move)
        if at + 1 < len(part.slope):
            part.slope[at + 1 :].addr_(part.hessian[at, at + 1 :], move)
