"""Two captures of one forward pass, point by point: how far apart, where first, where most."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trtllm_cli.debug.results import PointResult

_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class Captured:
    """What one side gave at a point, and the points it was computed from."""

    value: torch.Tensor
    inputs: tuple[str, ...]


def compare(network: Mapping[str, Captured], source: Mapping[str, Captured]) -> tuple[PointResult, ...]:
    """Every point of ``network`` beside the same one of ``source``, in the order of ``network``.

    Shapes may differ by how tokens are laid out (``[tokens, width]``, ``[batch, tokens, width]``), not in the order of
    elements. Raises ValueError where they differ otherwise: the two sides did not run the same forward pass.
    """
    return tuple(_point(name, mine, source[name]) for name, mine in network.items())


def departure(points: Sequence[PointResult], tolerance: float) -> str | None:
    """The first point whose relative error is above ``tolerance`` or that is not finite."""
    for point in points:
        if point.relative_error is None or point.relative_error > tolerance:
            return point.name
    return None


def rise(points: Sequence[PointResult]) -> str | None:
    """The point whose relative error exceeds the largest of its inputs' by most; one that stops being finite first."""
    errors = {point.name: _error(point) for point in points}
    found, most = None, 0.0
    for point in points:
        before = max((errors[name] for name in point.inputs), default=0.0)
        gained = errors[point.name] - before if before != float("inf") else 0.0
        if gained > most:
            found, most = point.name, gained
    return found


def worst_by_layer(points: Iterable[PointResult]) -> dict[int, PointResult]:
    """The point of the largest error in each decoder layer."""
    found: dict[int, PointResult] = {}
    for point in points:
        if point.layer is not None and (point.layer not in found or _error(point) > _error(found[point.layer])):
            found[point.layer] = point
    return found


def layer_of(name: str) -> int | None:
    """The decoder layer that a name belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _error(point: PointResult) -> float:
    return float("inf") if point.relative_error is None else point.relative_error


def _point(name: str, network: Captured, source: Captured) -> PointResult:
    if network.value.numel() != source.value.numel():
        raise ValueError(
            f"{name} has shape {tuple(network.value.shape)} in the network, {tuple(source.value.shape)} in the source"
        )
    mine, theirs = network.value.double().reshape(-1), source.value.double().reshape(-1)
    finite = bool(torch.isfinite(mine).all())
    relative = cosine = most = None
    if finite:
        size, own = float(theirs.norm()), float(mine.norm())
        apart = float((mine - theirs).norm())
        # two zeros agree; something beside zero is as far away as can be said
        relative = apart / size if size else float(apart > 0)
        cosine = float(mine @ theirs) / (size * own) if size and own else float(size == own)
        most = float((mine - theirs).abs().max())
    return PointResult(
        name=name,
        layer=layer_of(name),
        shape=tuple(network.value.shape),
        relative_error=relative,
        cosine=cosine,
        max_error=most,
        largest=float(theirs.abs().max()),
        finite=finite,
        inputs=network.inputs,
    )
