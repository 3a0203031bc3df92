"""A :class:`~trtllm_cli.quantize.methods.grid.Grid` laid out group first, for sweeps that visit one input at a time.

Inputs are rows here: codes and weights are [K, N], so that what a step reads and writes is contiguous. Codes are kept
as whole numbers q in float32 (code minus zero); a value is q * scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.quantize.methods.grid import Grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trtllm_cli.artifacts.schema import WeightScheme


@dataclass(frozen=True)
class Levels:
    """``scale`` [G, N], and where asymmetric ``zero`` [G, N] and the least and largest whole number of each group.

    ``bounds`` are those of all groups where symmetric. A sweep changes the tensors in place.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None
    low: Tensor | None
    high: Tensor | None
    bounds: tuple[float, float] | None

    @classmethod
    def of(cls, grid: Grid) -> Levels:
        scale, low, high = grid.scale.t().contiguous(), grid.lowest, grid.highest
        if isinstance(low, float) or isinstance(high, float) or grid.zero is None:
            assert isinstance(low, float)
            assert isinstance(high, float)
            return cls(grid.bits, scale, None, None, None, (low, high))
        zero = grid.zero.t().contiguous()
        return cls(grid.bits, scale, zero, low.t().contiguous(), high.t().contiguous(), None)

    @classmethod
    def blank(cls, scheme: WeightScheme, rows: int, groups: int, device: torch.device) -> Levels:
        """Levels to be :meth:`set` group by group."""
        import torch

        zero = None if scheme.symmetric else torch.zeros(rows, groups, device=device)
        return cls.of(Grid(torch.ones(rows, groups, device=device), zero, scheme.bits))

    def set(self, group: int, grid: Grid) -> None:
        """Take over a grid with one group as group number ``group``."""
        for mine, theirs in ((self.scale, grid.scale), (self.zero, grid.zero)):
            if mine is not None and theirs is not None:
                mine[group] = theirs[:, 0]
        for bound, value in ((self.low, grid.lowest), (self.high, grid.highest)):
            if bound is not None and not isinstance(value, float):
                bound[group] = value[:, 0]

    def round_(self, quotients: Tensor, group: int) -> None:
        """Quotients weight / scale [N] of a group become the nearest whole numbers that have a code, in place."""
        quotients.round_()
        if self.bounds is not None:
            quotients.clamp_(*self.bounds)
        elif self.low is not None and self.high is not None:
            quotients.clamp_(self.low[group], self.high[group])

    def limits(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The least and largest whole numbers, [..., N], of groups by number [...]."""
        import torch

        if self.bounds is not None:
            shape = self.scale[groups].shape
            low, high = (torch.full(shape, bound, device=self.scale.device) for bound in self.bounds)
            return low, high
        assert self.low is not None
        assert self.high is not None
        return self.low[groups], self.high[groups]

    def grid(self) -> Grid:
        zero = None if self.zero is None else self.zero.t().contiguous()
        return Grid(self.scale.t().contiguous(), zero, self.bits)


def chunks(inputs: int, width: int, block: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most ``block`` inputs, or one group of ``width``; each group is a whole number of
    chunks or inside one."""
    step = max(block // width, 1) * width
    found = []
    for begin in range(0, inputs, step):
        end = min(begin + step, inputs)
        found += [(at, min(at + block, end)) for at in range(begin, end, block)]
    return found
