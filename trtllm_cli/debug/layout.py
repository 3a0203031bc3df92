"""Where the boxes of a directed graph go: ranks from top to bottom, few crossings, short and straight edges.

The usual four steps (Sugiyama, Tagawa and Toda, 1981): ranks by longest path; a stand-in on every rank that a long edge
passes; the order within ranks by medians of neighbours, over some sweeps; then positions that keep the order and the
gaps and are as close to the neighbours' as that allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

_GAP_X, _GAP_Y = 24.0, 34.0
_SWEEPS = 8

Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Top left corner of each box, the points each edge runs through, and the size of the whole."""

    corners: Mapping[str, Point]
    routes: Mapping[tuple[str, str], tuple[Point, ...]]
    width: float
    height: float


class Cyclic(ValueError):
    """The graph has a cycle, which has no ranks."""


def layered(sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]) -> Layout:
    """Place boxes of ``sizes`` (width, height). Edges lead downwards; each counts once. Raises :class:`Cyclic`."""
    edges = list(dict.fromkeys((a, b) for a, b in edges if a != b))
    ranks = _ranks(list(sizes), edges)
    boxes = dict(sizes)
    chains: dict[tuple[str, str], list[str]] = {}
    for a, b in edges:
        chain = [a]
        for rank in range(ranks[a] + 1, ranks[b]):
            stand_in = f"{a} > {b} @ {rank}"
            ranks[stand_in], boxes[stand_in] = rank, (2.0, 0.0)
            chain.append(stand_in)
        chains[a, b] = [*chain, b]
    links = [pair for chain in chains.values() for pair in pairwise(chain)]
    above: dict[str, list[str]] = {name: [] for name in boxes}
    below: dict[str, list[str]] = {name: [] for name in boxes}
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    rows = _rows(boxes, ranks, above, below)
    centers = _centers(rows, boxes, above, below)
    tops, heights = _tops(rows, boxes)
    left = min((centers[name] - boxes[name][0] / 2 for name in boxes), default=0.0)
    corners = {name: (centers[name] - boxes[name][0] / 2 - left, tops[ranks[name]]) for name in boxes}
    width = max((corners[name][0] + boxes[name][0] for name in boxes), default=0.0)
    bottoms = {name: tops[ranks[name]] + heights[ranks[name]] for name in boxes}
    routes = _routes(chains, corners, boxes, bottoms)
    return Layout({name: corners[name] for name in sizes}, routes, width, max(bottoms.values(), default=0.0))


def _ranks(names: list[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from a source; a source then moves down to just above what it leads to."""
    after: dict[str, list[str]] = {name: [] for name in names}
    waiting = dict.fromkeys(names, 0)
    for a, b in edges:
        after[a].append(b)
        waiting[b] += 1
    sources = {name for name in names if not waiting[name]}
    ranks = dict.fromkeys(sources, 0)
    ready = [name for name in names if name in sources]
    for name in ready:
        for other in after[name]:
            ranks[other] = max(ranks.get(other, 0), ranks[name] + 1)
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    if len(ready) < len(names):
        raise Cyclic(f"{len(names) - len(ready)} boxes lie on or behind a cycle")
    for name in sources:
        ranks[name] = min((ranks[other] - 1 for other in after[name]), default=0)
    return ranks


def _rows(
    boxes: Mapping[str, tuple[float, float]],
    ranks: Mapping[str, int],
    above: Mapping[str, list[str]],
    below: Mapping[str, list[str]],
) -> list[list[str]]:
    """Names rank by rank, ordered so that few edges cross."""
    rows: list[list[str]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for name in boxes:
        rows[ranks[name]].append(name)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            place = {name: index for other in rows for index, name in enumerate(other)}
            neighbours = above if down else below
            # without neighbours a box keeps its place
            row.sort(key=lambda name: median([place[other] for other in neighbours[name]] or [place[name]]))
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: Sequence[Sequence[str]], below: Mapping[str, list[str]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {name: index for index, name in enumerate(lower)}
        ends = [(index, place[other]) for index, name in enumerate(upper) for other in below[name]]
        total += sum(a < c and b > d for a, b in ends for c, d in ends)
    return total


def _centers(
    rows: Sequence[Sequence[str]],
    boxes: Mapping[str, tuple[float, float]],
    above: Mapping[str, list[str]],
    below: Mapping[str, list[str]],
) -> dict[str, float]:
    """Horizontal centers: in order, with gaps, near the mean of the neighbours'."""
    centers: dict[str, float] = {}
    for row in rows:
        _place(row, boxes, dict.fromkeys(row, 0.0), centers)
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = {}
            for name in row:
                near = [centers[other] for other in (*above[name], *below[name])]
                wanted[name] = sum(near) / len(near) if near else centers[name]
            _place(row, boxes, wanted, centers)
    return centers


def _place(
    row: Sequence[str],
    boxes: Mapping[str, tuple[float, float]],
    wanted: Mapping[str, float],
    centers: dict[str, float],
) -> None:
    """Least squares under the order: with the gaps taken out it is isotonic regression, by pooling violators."""
    offsets, position = [], 0.0
    for index, name in enumerate(row):
        if index:
            position += (boxes[row[index - 1]][0] + boxes[name][0]) / 2 + _GAP_X
        offsets.append(position)
    pools: list[tuple[float, int]] = []  # mean and number of boxes that stand shoulder to shoulder
    for name, offset in zip(row, offsets, strict=True):
        mean, count = wanted[name] - offset, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean, count = (mean * count + before * members) / (count + members), count + members
        pools.append((mean, count))
    placed = [mean for mean, count in pools for _ in range(count)]
    for name, offset, mean in zip(row, offsets, placed, strict=True):
        centers[name] = mean + offset


def _tops(rows: Sequence[Sequence[str]], boxes: Mapping[str, tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Upper edge and height of each rank."""
    heights = [max(boxes[name][1] for name in row) for row in rows]
    tops, y = [], 0.0
    for height in heights:
        tops.append(y)
        y += height + _GAP_Y
    return tops, heights


def _routes(
    chains: Mapping[tuple[str, str], list[str]],
    corners: Mapping[str, Point],
    boxes: Mapping[str, tuple[float, float]],
    bottoms: Mapping[str, float],
) -> dict[tuple[str, str], tuple[Point, ...]]:
    """From the lower side of one box to the upper side of another; several ends at a side share its width.

    Within a rank, down to its ``bottoms``, a route is vertical, so that it passes no box that stands there.
    """
    middle = {name: corners[name][0] + boxes[name][0] / 2 for name in boxes}
    leaving: dict[str, list[tuple[str, str]]] = {}
    arriving: dict[str, list[tuple[str, str]]] = {}
    for edge in chains:
        leaving.setdefault(edge[0], []).append(edge)
        arriving.setdefault(edge[1], []).append(edge)
    ends: dict[tuple[tuple[str, str], bool], float] = {}
    for sides, first in ((leaving, True), (arriving, False)):
        for name, found in sides.items():
            found.sort(key=lambda edge: middle[chains[edge][1 if first else -2]])
            for index, edge in enumerate(found):
                ends[edge, first] = corners[name][0] + boxes[name][0] * (index + 1) / (len(found) + 1)
    routes = {}
    for edge, chain in chains.items():
        x = ends[edge, True]
        points = [(x, corners[edge[0]][1] + boxes[edge[0]][1]), (x, bottoms[edge[0]])]
        for name in chain[1:-1]:
            points += [(middle[name], corners[name][1]), (middle[name], bottoms[name])]
        points.append((ends[edge, False], corners[edge[1]][1]))
        routes[edge] = tuple(dict.fromkeys(points))
    return routes
