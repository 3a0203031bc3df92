"""AWQ (Lin et al., 2023, "AWQ: Activation-aware Weight Quantization"): protect the channels that matter by scaling.

A weight quantized as Q(W diag(s)) diag(1/s) keeps more precision where s is large. s grows with the mean magnitude of
the channel's activation, s = mean|x|^r / sqrt(max * min of that), and the ratio r is searched. The paper measures the
output error on a few tokens; here it is exact over every calibration token, from their second moment:

    sum_t ||x_t (W' - W)^T||^2 / T = tr((W' - W) H (W' - W)^T),   H = mean of x x^T.

1/s is folded into what precedes the linear (a norm, or the rows of the linear before).

The clip search then shrinks the range of each group of each row. The paper looks at a group alone; here a group is
judged with the error that the groups before it have already made, d_g' H_gg d_g + 2 d_g' sum_h H_gh d_h, which is
coordinate descent on the same exact error and costs one product with H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods import grid as grids
from trtllm_cli.quantize.methods.base import QuantizedRows

Quantize = Callable[[Tensor], Tensor]
#: points of the ratio grid
GRID = 20
#: fractions of a group's range that the clip search tries
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
# float32 elements that a block of the clip search may hold in one temporary
_BLOCK = 16 * 1024 * 1024


@dataclass(frozen=True)
class AwqScales:
    """``scales`` float32 [K] multiply the weights' columns. ``ratio`` None: no scaling was as good.

    ``error`` and ``error_without`` are mean squared output errors per token, summed over the outputs of all weights.
    """

    scales: Tensor
    ratio: float | None
    error: float
    error_without: float


@dataclass(frozen=True)
class Clipped:
    """``weight`` float32 [N, K] with the chosen ranges cut; errors as in :class:`AwqScales`."""

    weight: Tensor
    error: float
    error_without: float


def rounding(scheme: WeightScheme) -> Quantize:
    """Round to nearest for ``scheme`` without packing: what its stored form stands for, to the bit."""

    def quantize(rows: Tensor) -> Tensor:
        found = grids.fit(rows, scheme, None, False)
        scale = found.scale[:, :, None]
        values = (rows.view(*found.scale.shape, -1) / scale).round_()
        low, high = (
            bound[:, :, None] if isinstance(bound, Tensor) else torch.tensor(bound, device=rows.device)
            for bound in (found.lowest, found.highest)
        )
        values.clamp_(low, high)
        return values.mul_(scale).view(rows.shape)

    return quantize


def output_error(difference: Tensor, hessian: Tensor, *, fast: bool = False) -> Tensor:
    """Mean squared output error of each row, [N]: d H d^T for ``difference`` [N, K] and ``hessian`` [K, K], float32.

    ``fast`` multiplies in bfloat16 where the hardware does: good to about one part in a thousand, enough to rank.
    """
    if fast and _fast_bfloat16(difference.device):
        product = (difference.bfloat16() @ hessian.bfloat16()).float()
    else:
        product = difference @ hessian
    return (product * difference).sum(dim=1).clamp(min=0)


def candidate(mean_abs: Tensor, ratio: float, weight_mean: Tensor | None = None) -> Tensor:
    """s [K] = mean_abs^r, over weight_mean^(1 - r) where given, normalised by sqrt(max * min).

    Channels that are dead (no activation, or no weight) keep 1 and do not count.
    """
    live = mean_abs > 0 if weight_mean is None else (mean_abs > 0) & (weight_mean > 0)
    if not bool(live.any()):
        return torch.ones_like(mean_abs)
    log = ratio * mean_abs[live].double().log()
    if weight_mean is not None:
        log = log - (1 - ratio) * weight_mean[live].double().log()
    log = log - (log.max() + log.min()) / 2
    scales = torch.ones_like(mean_abs)
    scales[live] = log.exp().float().clamp(1e-4, 1e4)
    return scales


def search(
    weights: Sequence[Tensor],
    hessian: Tensor,
    mean_abs: Tensor,
    quantize: Quantize,
    grid: int = GRID,
    *,
    realize: Callable[[Tensor], Tensor] | None = None,
    duo: bool = False,
) -> AwqScales:
    """The scales of the smallest output error over all ``weights`` [N_i, K] that share an input.

    ``quantize`` maps float32 rows [n, K] to what their quantized form stands for, each row by itself. ``realize`` maps
    wished scales to those that can be folded exactly (rounded norms, heads that share values); the errors are those of
    the scales so realized. ``duo`` also tries, at each ratio, the scales that fall with the channel's mean weight.
    Every second ratio is tried, then the neighbours of the best: the error has one broad valley over the ratio.
    The error is never above ``error_without``: s = 1 is a candidate, and the winner is compared with it in float32.
    """
    weight = torch.cat([w.float() for w in weights]) if len(weights) > 1 else weights[0].float()
    mean_abs = mean_abs.float()
    products = hessian.bfloat16() if _fast_bfloat16(weight.device) else hessian

    def difference(scales: Tensor | None) -> Tensor:
        if scales is None:
            return quantize(weight) - weight
        return quantize(weight * scales).div_(scales).sub_(weight)

    def rank(scales: Tensor | None) -> float:
        d = difference(scales)
        return float(((d.to(products.dtype) @ products) * d).sum())

    families: list[Tensor | None] = [None]
    if duo:
        families.append(_weight_mean(weight))
    best: tuple[float, float | None, Tensor | None] = (rank(None), None, None)
    for family in families:
        # ratio 0 without the weights' share is no scaling
        first = 1 if family is None else 0
        errors: dict[int, float] = {}
        for step in (2, 1):
            points = range(first + 1 - first % 2, grid + 1, 2)
            if step == 1:
                middle = min(errors, key=errors.__getitem__)
                points = range(max(first, middle - 1), min(grid, middle + 1) + 1)
            for point in points:
                if point in errors:
                    continue
                scales = candidate(mean_abs, point / grid, family)
                scales = realize(scales) if realize is not None else scales
                errors[point] = rank(scales)
                if errors[point] < best[0]:
                    best = (errors[point], point / grid, scales)
    without = float(output_error(difference(None), hessian).sum())
    _, ratio_found, found = best
    if found is not None:
        error = float(output_error(difference(found), hessian).sum())
        if error < without:
            return AwqScales(found, ratio_found, error, without)
    return AwqScales(torch.ones_like(mean_abs), None, without, without)


def clip(
    weight: Tensor,
    hessian: Tensor,
    quantize: Quantize,
    group_size: int,
    shrink: Sequence[float] = SHRINK,
) -> Clipped:
    """Cut the range of each group of ``weight`` [N, K] where that lowers the output error of its row.

    ``quantize`` is as in :func:`search`; it is given slices [n, group_size] too, each one group. ``shrink`` begins with
    1 (nothing cut). No row ends with a larger error than it began with.
    """
    weight = weight.float()
    rows, width = weight.shape
    size = width if group_size == -1 else group_size
    step = max(1, _BLOCK // max(size * len(shrink), width))
    parts, before, after = [], 0.0, 0.0
    for begin in range(0, rows, step):
        block = weight[begin : begin + step]
        clipped, error, error_without = _clip_rows(block, hessian, quantize, size, shrink)
        parts.append(clipped)
        before, after = before + error_without, after + error
    return Clipped(torch.cat(parts), after, before)


def best_rows(weight: Tensor, hessian: Tensor, made: Sequence[QuantizedRows]) -> QuantizedRows:
    """Of several roundings of ``weight`` [N, K] to one scheme, each row from the one with its smallest output error."""
    errors = torch.stack([output_error(m.dequantized - weight, hessian) for m in made])
    chosen = errors.argmin(dim=0)

    def pick(parts: list[Tensor]) -> Tensor:
        result = parts[0].clone()
        for index, part in enumerate(parts[1:], start=1):
            result[chosen == index] = part[chosen == index]
        return result

    tensors = {suffix: pick([m.tensors[suffix] for m in made]) for suffix in made[0].tensors}
    return QuantizedRows(tensors, pick([m.dequantized for m in made]))


def _clip_rows(
    weight: Tensor, hessian: Tensor, quantize: Quantize, size: int, shrink: Sequence[float]
) -> tuple[Tensor, float, float]:
    rows, width = weight.shape
    difference = quantize(weight) - weight
    without = output_error(difference, hessian)
    clipped = weight.clone()
    factors = torch.tensor(shrink, device=weight.device)[:, None, None]
    for begin in range(0, width, size):
        group = slice(begin, begin + size)
        own = hessian[group, group]
        values, now = weight[:, group], difference[:, group]
        others = difference @ hessian[:, group] - now @ own
        low, high = values.amin(dim=1, keepdim=True) * factors, values.amax(dim=1, keepdim=True) * factors
        cut = torch.minimum(torch.maximum(values, low), high)
        change = quantize(cut.view(-1, size)).view(cut.shape) - values
        errors = ((change @ own + 2 * others) * change).sum(dim=2)
        chosen = errors.argmin(dim=0)
        at = torch.arange(rows, device=weight.device)
        difference[:, group] = change[chosen, at]
        clipped[:, group] = cut[chosen, at]
    error = output_error(difference, hessian)
    worse = error > without
    clipped[worse] = weight[worse]
    return clipped, float(torch.where(worse, without, error).sum()), float(without.sum())


def _weight_mean(weight: Tensor) -> Tensor:
    """Mean over rows of |w| relative to its row's largest, [K]."""
    largest = weight.abs().amax(dim=1, keepdim=True)
    return (weight.abs() / torch.where(largest > 0, largest, 1.0)).mean(dim=0)


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
