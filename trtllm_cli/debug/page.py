"""A comparison as one self-contained page (or one SVG): errors along the forward pass, by layer, and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from trtllm_cli.debug.results import DebugResult, PointResult
from trtllm_cli.errors import UsageError
from trtllm_cli.evaluate import plots
from trtllm_cli.evaluate.html import document, figure, table, tile
from trtllm_cli.evaluate.plots import number
from trtllm_cli.evaluate.style import STYLE

HEAD = ("point", "shape", "relative error", "cosine", "largest difference", "largest value")


def write(result: DebugResult, name: str, path: Path) -> None:
    """Write the page, or for a name that ends in ``.svg`` only its plot. Raises UsageError for another ending."""
    check(path)
    text = svg(result) if path.suffix == ".svg" else page(result, name)
    path.write_text(text, "utf-8")


def check(path: Path) -> None:
    """Raises UsageError for a file that is neither a page nor a picture."""
    if path.suffix not in (".html", ".svg"):
        raise UsageError("PLOT_KIND", f"{path} is neither .html nor .svg", f"--plot {path.with_suffix('.html')}")


def page(result: DebugResult, name: str) -> str:
    """The page of the engine called ``name``."""
    head = (
        f'<header><p class="kind">Debug</p><h1>{escape(name)}</h1><p class="facts">'
        f"{escape(f'{result.dtype} · {result.phase} step of {len(result.tokens)} tokens · {ran(result)}')}</p></header>"
    )
    words = f'<section class="summary"><p>{escape(sentence(result))}</p></section>'
    tiles = "".join(tile(*parts) for parts in _tiles(result))
    return document(
        f"{name}: debug",
        [
            head,
            words,
            f'<div class="tiles">{tiles}</div>',
            "<section><h2>Along the forward pass</h2>"
            + figure("Relative error of each point in execution order, on a logarithmic scale.", _plot(result))
            + "</section>",
            _by_layer(result),
            _points(result),
        ],
    )


def svg(result: DebugResult) -> str:
    """The plot alone, with its style."""
    drawing = _plot(result)
    begin = drawing.index(">") + 1
    opening = drawing[:begin].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opening}<style>{STYLE}</style>{drawing[begin:]}\n"


def ran(result: DebugResult) -> str:
    """What ran the network."""
    return "the plan rebuilt and run by TensorRT" if result.executor == "tensorrt" else "the network evaluated in torch"


def sentence(result: DebugResult) -> str:
    """The outcome in words."""
    if result.departure is None:
        worst = max(result.points, key=_error)
        return (
            f"None of {len(result.points)} points departs from the source: the largest relative error is "
            f"{number(_error(worst))}, at {worst.name}; up to {number(result.tolerance)} is tolerated."
        )
    first = result.point(result.departure)
    before = [result.point(name) for name in first.inputs]
    inputs = ", ".join(f"{point.name} {figure_of(point)}" for point in before) or "no compared point"
    said = f"The first departure is {first.name}: relative error {figure_of(first)}, computed from {inputs}."
    if result.rise is not None and result.rise != first.name:
        said += f" The error rises most at {result.rise}."
    return said


def figure_of(point: PointResult) -> str:
    """A point's relative error in words."""
    return "NaN or infinite" if point.relative_error is None else number(point.relative_error)


def row(point: PointResult) -> list[str]:
    """A point under :data:`HEAD`."""
    cosine, most = (
        "" if value is None else text(value)
        for value, text in ((point.cosine, lambda x: f"{x:.6f}"), (point.max_error, number))
    )
    shape = " x ".join(map(str, point.shape))
    return [point.name, shape, figure_of(point), cosine, most, number(point.largest)]


def _tiles(result: DebugResult) -> list[tuple[str, str, str]]:
    logits = result.points[-1]
    above = sum(_error(point) > result.tolerance for point in result.points)
    return [
        ("first departure", result.departure or "none", f"beyond {number(result.tolerance)}"),
        ("largest rise", result.rise or "none", "over the error of its inputs"),
        ("logits", figure_of(logits), "relative error"),
        ("points beyond", f"{above}", f"of {len(result.points)}"),
    ]


def _plot(result: DebugResult) -> str:
    errors = [_error(point) for point in result.points]
    tips = [f"{index}: {point.name}, {figure_of(point)}" for index, point in enumerate(result.points)]
    names = [point.name for point in result.points]
    marked = (f"first departure: {result.departure}", names.index(result.departure)) if result.departure else None
    return plots.orders_of_magnitude(
        errors,
        tips,
        ("tolerated", result.tolerance),
        marked,
        "point, in execution order",
        "relative error",
        "relative error of each point of the forward pass",
    )


def _by_layer(result: DebugResult) -> str:
    """Kinds of points by layer, stronger for larger errors; nothing where there is only one layer."""
    inside = [point for point in result.points if point.layer is not None]
    layers = max((point.layer or 0 for point in inside), default=-1) + 1
    kinds = list(dict.fromkeys(_kind(point) for point in inside))
    finite = [point.relative_error for point in inside if point.relative_error is not None]
    if layers < 2 or not kinds or not any(finite):
        return ""
    top = max(finite)
    cells = [
        (
            kinds.index(_kind(point)),
            point.layer or 0,
            top if point.relative_error is None else point.relative_error,
            f"{point.name}: {figure_of(point)}",
        )
        for point in inside
    ]
    drawing = figure(
        "The stronger the colour, the larger the relative error.",
        plots.heat_map(kinds, layers, cells, "layer", "relative error of each point by layer"),
    )
    return f"<section><h2>By layer</h2>{drawing}</section>"


def _points(result: DebugResult) -> str:
    around = table(HEAD, [row(point) for point in near(result.points, result.departure)])
    every = table(HEAD, [row(point) for point in result.points])
    what = "Around the first departure" if result.departure else "Largest errors"
    return (
        f"<section><h2>{what}</h2>{around}"
        f"<details><summary>All {len(result.points)} points</summary>{every}</details></section>"
    )


def near(points: Sequence[PointResult], name: str | None, before: int = 6, after: int = 6) -> list[PointResult]:
    """The points around ``name``; without a name those of the largest errors, in execution order."""
    if name is None:
        worst = sorted(points, key=_error, reverse=True)[: before + after]
        return [point for point in points if point in worst]
    index = [point.name for point in points].index(name)
    return list(points[max(0, index - before) : index + after + 1])


def _kind(point: PointResult) -> str:
    return point.name.split(".", 2)[2]


def _error(point: PointResult) -> float:
    return math.inf if point.relative_error is None else point.relative_error
