"""Inline SVG plots for report pages: lines, columns, a heat map, bars. Colours come from the page's style variables.

Every function returns one ``<svg>`` element as text; labels are escaped here. Numbers are rounded to a tenth of a unit
so that equal reports give equal pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 760.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 14.0, 44.0


@dataclass(frozen=True)
class Line:
    """One series of a line plot; ``style`` is a class of the page's style sheet (``one`` or ``two``)."""

    label: str
    values: Sequence[float]
    style: str


@dataclass(frozen=True)
class Bar:
    """One bar: its value, the range of its repetitions where there is one, and what to write behind it."""

    label: str
    value: float
    note: str
    low: float | None = None
    high: float | None = None
    style: str = "one"


def number(value: float, digits: int = 4) -> str:
    """A figure with ``digits`` significant digits, as people write it."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10000:
        return f"{value:,.0f}"
    if size < 0.0001:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{digits}g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that span ``low`` .. ``high``."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(series: Sequence[Line], x_label: str, y_label: str, description: str, height: float = 240.0) -> str:
    """Values over their index. Every point has a tooltip."""
    values = [value for line in series for value in line.values]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 0.01)
    frame = _Frame(0, max(max(len(line.values) for line in series) - 1, 1), low - margin, high + margin, height)
    parts = [frame.y_axis(y_label), frame.index_axis(x_label)]
    for line in series:
        points = [(frame.x(index), frame.y(value)) for index, value in enumerate(line.values)]
        if len(points) > 1:
            path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<path class="line {line.style}" d="{path}"/>')
        radius = 3.0 if len(points) <= 64 else 1.5
        for index, (x, y) in enumerate(points):
            tip = escape(f"{line.label}, window {index}: {number(line.values[index])}")
            parts.append(
                f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{tip}</title></circle>'
            )
    legend = _legend([(line.label, line.style) for line in series]) if len(series) > 1 else ""
    return legend + _svg(height, description, parts)


def differences(
    values: Sequence[float], x_label: str, y_label: str, description: str, height: float = 180.0, noun: str = "window"
) -> str:
    """Columns above and below zero; ``noun`` and the index name each in its tooltip."""
    margin = 0.08 * (max(abs(value) for value in values) or 1e-6)
    frame = _Frame(-0.5, len(values) - 0.5, min(0.0, *values) - margin, max(0.0, *values) + margin, height)
    parts = [frame.y_axis(y_label), frame.index_axis(x_label)]
    width = min(28.0, max(1.0, (frame.x(1) - frame.x(0)) * 0.7))
    for index, value in enumerate(values):
        top, bottom = sorted((frame.y(value), frame.y(0)))
        tip = f"{noun} {index}: {number(value)}"
        parts.append(_rect(frame.x(index) - width / 2, top, width, max(bottom - top, 0.5), tip=tip))
    parts.append(_line("axis", _LEFT, frame.y(0), _WIDTH - _RIGHT, frame.y(0)))
    return _svg(height, description, parts)


def histogram(
    log10_edges: Sequence[float],
    counts: Sequence[int],
    marks: Sequence[tuple[str, float]],
    x_label: str,
    y_label: str,
    description: str,
    height: float = 260.0,
) -> str:
    """Counts over logarithmic bins, with labelled vertical ``marks`` (label, value)."""
    used = [index for index, count in enumerate(counts) if count] or [0, len(counts) - 1]
    first, last = max(used[0] - 1, 0), min(used[-1] + 1, len(counts) - 1)
    low, high = log10_edges[first], log10_edges[last + 1]
    # the labels of the marks stand in rows of their own above the columns
    frame = _Frame(low, high, 0, max(*counts, 1), height, top=_TOP + 15.0 * len(marks))
    parts = [frame.y_axis(y_label), frame.x_name(x_label)]
    for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        parts.append(frame.x_tick(power, number(10.0**power) if -3 <= power <= 3 else f"1e{power}"))
    for index in range(first, last + 1):
        left, right = frame.x(log10_edges[index]), frame.x(log10_edges[index + 1])
        top = frame.y(counts[index])
        span = f"{number(10 ** log10_edges[index])} to {number(10 ** log10_edges[index + 1])}"
        tip = f"{span}: {counts[index]:,} positions"
        parts.append(_rect(left + 1, top, right - left - 2, frame.y(0) - top, tip=tip))
    for row, (label, value) in enumerate(sorted(marks, key=lambda mark: mark[1])):
        x = frame.x(min(max(math.log10(max(value, 1e-300)), low), high))
        anchor, shift = ("end", -5) if x > _WIDTH * 0.82 else ("start", 5)
        y = _TOP + 15.0 * row
        parts.append(_line("mark", x, y - 6, x, frame.y(0)))
        parts.append(_text("note", x + shift, y + 4, f"{label}: {number(value)}", anchor))
    return _svg(height, description, parts)


def heat_map(
    rows: Sequence[str], columns: int, cells: Sequence[tuple[int, int, float, str]], x_label: str, description: str
) -> str:
    """A cell for each (row, column, value, tooltip), stronger for larger values; rows are named."""
    top = max(value for _, _, value, _ in cells) or 1.0
    left, head, row_height = max(96.0, _label_width(rows)), 34.0, 22.0
    size = min(26.0, (_WIDTH - left - _RIGHT) / max(columns, 1))
    height = head + row_height * len(rows) + 38.0
    parts = [_rect(left + 26 * index, 2, 24, 10, opacity=0.1 + 0.9 * index / 4) for index in range(5)]
    parts.append(_text("tick", left + 138, 11, f"0 to {number(top)}"))
    parts += [_text("tick", left - 8, head + row_height * row + 14, name, "end") for row, name in enumerate(rows)]
    for row, column, value, tip in cells:
        x, y = left + size * column, head + row_height * row
        parts.append(_rect(x, y, max(size - 2, 1), row_height - 2, opacity=0.1 + 0.9 * value / top, tip=tip))
    base = head + row_height * len(rows) + 12
    for column in range(0, columns, max(1, math.ceil(columns / 16))):
        parts.append(_text("tick", left + size * (column + 0.5) - 1, base, str(column), "middle"))
    parts.append(_text("name", left + size * columns / 2, base + 19, x_label, "middle"))
    return _svg(height, description, parts)


def orders_of_magnitude(
    values: Sequence[float],
    tips: Sequence[str],
    limit: tuple[str, float],
    marked: tuple[str, int] | None,
    x_label: str,
    y_label: str,
    description: str,
    height: float = 280.0,
) -> str:
    """Values over their index on a logarithmic scale, as dots with tooltips; those above ``limit`` in another colour.

    ``marked`` labels one of them. What is below the smallest positive value, such as zero, stands at the bottom; what
    is infinite at the top.
    """
    positive = [value for value in [*values, limit[1]] if 0 < value < math.inf]
    low = math.floor(math.log10(min(positive)) - 0.01)
    high = max(math.ceil(math.log10(max(positive)) + 0.01), low + 1)

    def place(value: float) -> float:
        return low if value <= 0 else min(max(math.log10(value), low), high) if value < math.inf else high

    frame = _Frame(-0.5, len(values) - 0.5, low, high, height, top=_TOP + 15.0)
    parts = []
    for power in range(low, high + 1):
        parts.append(_line("grid", _LEFT, frame.y(power), _WIDTH - _RIGHT, frame.y(power)))
        parts.append(_text("tick", _LEFT - 8, frame.y(power) + 4, f"1e{power}", "end"))
    parts += [frame.y_name(y_label), frame.index_axis(x_label)]
    y = frame.y(place(limit[1]))
    parts.append(_line("mark", _LEFT, y, _WIDTH - _RIGHT, y))
    parts.append(_text("note", _WIDTH - _RIGHT, y - 5, f"{limit[0]}: {number(limit[1])}", "end"))
    if marked is not None:
        label, index = marked
        x = frame.x(index)
        parts.append(_line("mark", x, _TOP + 6, x, frame.y(low)))
        anchor, shift = ("end", -5) if x > _WIDTH * 0.6 else ("start", 5)
        parts.append(_text("note", x + shift, _TOP + 6, label, anchor))
    radius = 3.0 if len(values) <= 128 else 1.8
    for index, value in enumerate(values):
        style = "two" if value > limit[1] else "one"
        x, y = frame.x(index), frame.y(place(value))
        tip = escape(tips[index])
        parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{tip}</title></circle>')
    return _svg(height, description, parts)


def bars(items: Sequence[Bar], ceiling: tuple[str, float] | None, description: str) -> str:
    """Horizontal bars from zero, each with its note; ``ceiling`` is a labelled vertical line."""
    left, row_height, head = max(150.0, _label_width([item.label for item in items])), 32.0, 22.0 if ceiling else 2.0
    top = max([item.high or item.value for item in items] + ([ceiling[1]] if ceiling else [])) or 1.0
    scale = (_WIDTH - left - 150.0) / top
    height = head + row_height * len(items) + 4
    parts: list[str] = []
    for index, item in enumerate(items):
        y = head + row_height * index
        middle = y + 16
        parts.append(_text("tick", left - 10, middle + 4, item.label, "end"))
        parts.append(_rect(left, y + 5, item.value * scale, 22, style=item.style))
        end = left + item.value * scale
        if item.low is not None and item.high is not None:
            low, high = left + item.low * scale, left + item.high * scale
            end = max(end, high)
            caps = f"M{low:.1f},{middle - 5:.1f} v10 M{high:.1f},{middle - 5:.1f} v10"
            parts.append(f'<path class="whisker" d="M{low:.1f},{middle:.1f} H{high:.1f} {caps}"/>')
        parts.append(_text("note", end + 8, middle + 4, item.note))
    if ceiling:
        x = left + ceiling[1] * scale
        parts.append(_line("mark", x, 18, x, height))
        parts.append(_text("note", x, 12, ceiling[0], "end" if x > _WIDTH / 2 else "start"))
    return _svg(height, description, parts)


def _label_width(labels: Sequence[str]) -> float:
    """Room for the longest label at 12 pixels, as wide as system fonts come; half of the plot at most."""
    return min(7.0 * max(map(len, labels), default=0) + 16, _WIDTH / 2)


class _Frame:
    """Axes of a plot: data ranges to pixels."""

    def __init__(
        self, x_low: float, x_high: float, y_low: float, y_high: float, height: float, top: float = _TOP
    ) -> None:
        self._range = (x_low, x_high, y_low, y_high)
        self._x_scale = (_WIDTH - _LEFT - _RIGHT) / ((x_high - x_low) or 1.0)
        self._y_scale = (height - top - _BOTTOM) / ((y_high - y_low) or 1.0)
        self._bottom = height - _BOTTOM
        self._top = top

    def x(self, value: float) -> float:
        return _LEFT + (value - self._range[0]) * self._x_scale

    def y(self, value: float) -> float:
        return self._bottom - (value - self._range[2]) * self._y_scale

    def y_axis(self, name: str) -> str:
        parts = []
        for tick in ticks(self._range[2], self._range[3], 4):
            parts.append(_line("grid", _LEFT, self.y(tick), _WIDTH - _RIGHT, self.y(tick)))
            parts.append(_text("tick", _LEFT - 8, self.y(tick) + 4, number(tick), "end"))
        return "".join(parts) + self.y_name(name)

    def y_name(self, name: str) -> str:
        middle = (self._bottom + self._top) / 2
        turned = f'transform="translate(14 {middle:.1f}) rotate(-90)"'
        return f'<text class="name" {turned} text-anchor="middle">{escape(name)}</text>'

    def index_axis(self, name: str) -> str:
        """Whole numbers only."""
        marks = [tick for tick in ticks(self._range[0], self._range[1], 8) if tick == int(tick)]
        return "".join(self.x_tick(tick, number(tick)) for tick in marks) + self.x_name(name)

    def x_tick(self, value: float, label: str) -> str:
        return _text("tick", self.x(value), self._bottom + 18, label, "middle")

    def x_name(self, name: str) -> str:
        return _text("name", (_LEFT + _WIDTH - _RIGHT) / 2, self._bottom + 38, name, "middle")


def _text(style: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(
    x: float, y: float, width: float, height: float, *, style: str = "one", opacity: float = 1.0, tip: str = ""
) -> str:
    shape = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<rect class="{style}" fill-opacity="{opacity:.3g}" {shape}>{title}</rect>'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<span><i class="key {style}"></i>{escape(label)}</span>' for label, style in entries)
    return f'<p class="legend">{items}</p>'


def _svg(height: float, description: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {_WIDTH:.0f} {height:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
