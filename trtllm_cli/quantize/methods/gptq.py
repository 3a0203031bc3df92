"""GPTQ: round a weight input by input and let the inputs that follow make up for each error.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022). With H = mean(x x^T) over calibration tokens, the output error of a row w that becomes w' is
(w' - w) H (w' - w)^T. Let R be the upper Cholesky factor of the inverse of the damped Hessian,
R^T R = (H + damping * mean(diag H) * I)^-1. Inputs are visited in order; input i is rounded to w'_i and every later
input j moves by -(w_i - w'_i) R_ij / R_ii. The moves are made at once inside a block of inputs and as one matrix
product for those beyond it.

Two things are ours to choose and were measured on SmolLM2: the scales of groups
(:mod:`trtllm_cli.quantize.methods.grid`) and passes of coordinate descent that follow the sweep
(:mod:`trtllm_cli.quantize.methods.descent`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trtllm_cli.quantize.methods.base import QuantizedRows
from trtllm_cli.quantize.methods.descent import descend
from trtllm_cli.quantize.methods.grid import Grid, encode, fit, group_width, pack, spread
from trtllm_cli.quantize.methods.levels import Levels, chunks

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.artifacts.schema import WeightScheme

ActOrder = Literal["none", "static", "dynamic"]

#: where automatic damping starts, and where it ends: with more, little is left of the correlations between inputs
DAMPING = 0.01
MAX_DAMPING = 1.0
#: passes of coordinate descent after the sweep
PASSES = 3


@dataclass(frozen=True)
class GptqResult:
    """``loss`` float32 [N] is each row's output error (w' - w) H (w' - w)^T: a mean over calibration tokens, NaN where
    the Hessian is not finite.

    ``damping`` is the fraction of mean(diag H) that was added to the diagonal. It is 0 where the Hessian was unusable
    and the rows were rounded to nearest; ``note`` then says why.
    """

    quantized: QuantizedRows
    damping: float
    note: str | None
    loss: Tensor


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: WeightScheme,
    *,
    act_order: ActOrder = "static",
    damping: float | None = None,
    search: bool = True,
    block: int = 128,
    passes: int = PASSES,
) -> GptqResult:
    """Quantize ``weight`` float32 [N, K], finite, to int4 or int8 against ``hessian`` float32 [K, K].

    Rows do not depend on one another: modules that share an input can be stacked along N and the result split.

    ``act_order``: ``static`` and ``dynamic`` visit inputs by decreasing diag(H), ``none`` as they stand. ``static``
    fits groups of consecutive inputs before the sweep. The others fit a group when the sweep reaches it, to weights
    that have moved; ``dynamic`` makes its groups in the order of the visit, for which the scheme must have
    ``group_index``. ``damping`` None starts at 0.01 and rises tenfold until the factorization succeeds. ``search`` is
    that of :func:`~trtllm_cli.quantize.methods.grid.fit`; the importance of input i is 1 / R_ii^2, what a squared
    rounding error of it costs after the inputs that follow have made up for it. ``block`` inputs are updated at once.
    An input that was always zero cannot be seen in the error: it is rounded to nearest.

    Raises ValueError for shapes or a scheme that do not fit together, UnsupportedError for a scale that cannot be
    stored.
    """
    import torch

    inputs = weight.shape[1]
    width = group_width(scheme, inputs)
    if hessian.shape != (inputs, inputs):
        raise ValueError(f"a weight with {inputs} inputs has no use for a Hessian of {tuple(hessian.shape)}")
    if scheme.group_index != (act_order == "dynamic"):
        raise ValueError(f"act-order {act_order} and group_index {scheme.group_index} do not go together")
    reason = _unusable(hessian)
    if reason is not None:
        return _nearest(weight, hessian, scheme, search, reason)
    metric = _pinned(hessian)
    order = None
    if act_order != "none":
        order = torch.argsort(metric.diagonal(), descending=True, stable=True)
    factor, used = _factor(metric if order is None else metric[order][:, order], damping)
    if factor is None:
        return _nearest(weight, hessian, scheme, search, f"the Hessian is not positive definite with damping {used:g}")
    importance = factor.importance

    moving = weight.t()[order] if order is not None else weight.t().clone(memory_format=torch.contiguous_format)
    if act_order == "static":
        assert order is not None
        levels = Levels.of(fit(weight, scheme, torch.empty_like(importance).scatter_(0, order, importance), search))
        original = weight.t().contiguous()
        codes = torch.empty_like(original)
        codes[order] = _sweep(moving, factor.rows, levels, (order // width).tolist(), chunks(inputs, inputs, block))
    else:
        if order is not None:
            metric = metric[order][:, order]
        original = moving.clone()
        levels = Levels.blank(scheme, len(weight), inputs // width, weight.device)
        late = _LateFit(_one_group(scheme), width, importance, search)
        groups = [position // width for position in range(inputs)]
        codes = _sweep(moving, factor.rows, levels, groups, chunks(inputs, width, block), late)
    del moving, factor
    descend(codes, levels, original, metric, scheme, passes=passes, block=block)

    index = None
    if act_order == "dynamic":
        assert order is not None
        visited_at = torch.argsort(order)
        codes, index = codes[visited_at], visited_at // width
    grid = levels.grid()
    made = pack((codes.t() + spread(grid.offset, inputs, index)).to(torch.uint8), grid, scheme, index)
    return GptqResult(made, used, None, output_power(made.dequantized - weight, hessian))


def output_power(rows: Tensor, hessian: Tensor) -> Tensor:
    """r H r^T of each row r of float32 [N, K]: the mean square of its output over calibration tokens, [N]."""
    return (rows @ hessian).mul_(rows).sum(dim=1)


def _unusable(hessian: Tensor) -> str | None:
    """Why no factorization need be tried."""
    import torch

    if not bool(torch.isfinite(hessian).all()):
        return "the Hessian holds NaN or infinite values"
    if not bool((hessian.diagonal() > 0).any()):
        return "every calibration input is zero"
    return None


def _nearest(weight: Tensor, hessian: Tensor, scheme: WeightScheme, search: bool, reason: str) -> GptqResult:
    import torch

    grid = fit(weight, scheme, None, search)
    group = None
    if scheme.group_index:
        inputs = weight.shape[1]
        group = torch.arange(inputs, device=weight.device) // group_width(scheme, inputs)
    made = pack(encode(weight, grid), grid, scheme, group)
    loss = output_power(made.dequantized - weight, hessian)
    return GptqResult(made, 0.0, f"rounded to nearest: {reason}", loss)


def _pinned(hessian: Tensor) -> Tensor:
    """The Hessian with each input that was always zero made independent of the others; a copy only where needed."""
    import torch

    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if not bool(dead.any()):
        return hessian
    pinned = hessian.masked_fill(dead[:, None] | dead[None, :], 0.0)
    # as little as any other input, so that it is visited last and counts for next to nothing in the search
    pinned.diagonal().copy_(torch.where(dead, diagonal[~dead].min(), diagonal))
    return pinned


@dataclass(frozen=True)
class _Factor:
    """``rows`` [K, K]: R of the module's docstring, row i divided by R_ii; ``importance`` [K]: 1 / R_ii^2."""

    rows: Tensor
    importance: Tensor


def _factor(hessian: Tensor, damping: float | None) -> tuple[_Factor | None, float]:
    """(the factor, None where there is none; the damping used).

    One factorization does: with J the reversal of the order and J H J = L L^T, H = U U^T for the upper triangle
    U = J L J, and R = U^-1. Row i of R over R_ii = 1 / U_ii is row i of the inverse of U with each column over U_jj.
    """
    import torch

    mean = float(hessian.diagonal().mean())
    tried = DAMPING if damping is None else damping
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(tried * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            unit = lower.flip(0, 1)
            del lower  # at these sizes one matrix more is what decides whether it fits
            pivots = unit.diagonal().clone()
            unit.div_(pivots)
            identity = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
            rows = torch.linalg.solve_triangular(unit, identity, upper=True, unitriangular=True)
            if bool(torch.isfinite(rows).all()):
                return _Factor(rows, pivots.square_()), tried
        if damping is not None or tried >= MAX_DAMPING:
            return None, tried
        tried = min(tried * 10, MAX_DAMPING)


def _one_group(scheme: WeightScheme) -> WeightScheme:
    """The scheme for the inputs of one group alone."""
    return scheme.model_copy(update={"group_size": -1}) if scheme.granularity == "group" else scheme


@dataclass(frozen=True)
class _LateFit:
    """Fits the group of ``width`` inputs that the sweep has reached."""

    scheme: WeightScheme
    width: int
    importance: Tensor
    search: bool

    def __call__(self, moving: Tensor, begin: int) -> Grid:
        end = begin + self.width
        return fit(moving[begin:end].t().contiguous(), self.scheme, self.importance[begin:end], self.search)


def _sweep(
    moving: Tensor,
    factor: Tensor,
    levels: Levels,
    groups: Sequence[int],
    ranges: Sequence[tuple[int, int]],
    late: _LateFit | None = None,
) -> Tensor:
    """The whole numbers, float32 [K, N], of weights ``moving`` [K, N] in the order of the visit; these are overwritten.

    ``groups`` names each visited input's group in ``levels``, which ``late`` fills as the sweep goes.
    """
    import torch

    codes = torch.empty_like(moving)
    scales = levels.scale.unbind(0)
    for begin, end in ranges:
        errors = torch.empty_like(moving[begin:end])
        if moving.is_cuda:
            _sweep_chunk(moving, factor, levels, groups, (begin, end), codes, errors, late)
            if end < len(moving):
                moving[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
            continue
        weights, wholes, lost = moving[begin:end].unbind(0), codes[begin:end].unbind(0), errors.unbind(0)
        triangle = factor[begin:end, begin:end]
        for at, group in enumerate(groups[begin:end]):
            if late is not None and (begin + at) % late.width == 0:
                levels.set(group, late(moving, begin + at))
            torch.div(weights[at], scales[group], out=wholes[at])
            levels.round_(wholes[at], group)
            torch.addcmul(weights[at], wholes[at], scales[group], value=-1, out=lost[at])
            if begin + at + 1 < end:
                moving[begin + at + 1 : end].addr_(triangle[at, at + 1 :], lost[at], alpha=-1)
        if end < len(moving):
            moving[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return codes


def _sweep_chunk(
    moving: Tensor,
    factor: Tensor,
    levels: Levels,
    groups: Sequence[int],
    where: tuple[int, int],
    codes: Tensor,
    errors: Tensor,
    late: _LateFit | None,
) -> None:
    """The inner loop of :func:`_sweep` on a GPU: one launch for each stretch whose levels are known."""
    import torch

    from trtllm_cli.quantize.methods import sweeps_cuda

    begin, end = where
    starts = [begin]
    if late is not None:
        starts = [at for at in range(begin, end) if at == begin or at % late.width == 0]
    chunk = moving[begin:end]
    for start, stop in zip(starts, [*starts[1:], end], strict=True):
        if late is not None and start % late.width == 0:
            levels.set(groups[start], late(moving, start))
        index = torch.tensor(groups[begin:end], device=moving.device)
        low, high = levels.limits(index)
        sweeps_cuda.sweep(
            chunk,
            factor[begin:end, begin:end],
            levels.scale[index],
            low,
            high,
            codes[begin:end],
            errors,
            start - begin,
            stop - begin,
        )
