"""A part of a network as an SVG: one box a module with its layers as lines, arrows for what flows between them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from trtllm_cli.debug.graph import LayerInfo, NetworkGraph, Part, TensorInfo
from trtllm_cli.debug.layout import Cyclic, layered

_CHARACTER, _LINE, _TITLE, _PAD, _PORT = 7.0, 16.0, 22.0, 10.0, 22.0
_MARGIN = 8.0
#: colours: what a reader looks for first
_KINDS = {
    "MATRIX_MULTIPLY": "product",
    "ATTENTION_INPUT": "attention",
    "ATTENTION_OUTPUT": "attention",
    "KV_CACHE_UPDATE": "cache",
    "GATHER": "table",
    "QUANTIZE": "quantized",
    "DEQUANTIZE": "quantized",
}
_WEIGHTS = (".weight", ".bias")
_ATTENTION = re.compile(r"_Attention(?:Input|Output)$")

STYLE = """
main { max-width: 1500px; }
.graph { overflow: auto; max-height: 85vh; border: 1px solid var(--rule); border-radius: 6px; margin: 12px 0; }
.graph svg { width: calc(var(--width) * var(--zoom, 1)); min-width: 0; max-width: none; margin: 0 auto; }
.graph text { font: 11px ui-monospace, monospace; } .graph .module { font-weight: 600; fill: var(--ink); }
.graph .box { fill: var(--card); stroke: var(--mark); } .graph .port { fill: var(--page); stroke: var(--rule); }
.graph .box.product { stroke: var(--one); stroke-width: 2; }
.graph .box.attention { stroke: var(--two); stroke-width: 2; }
.graph .box.cache { stroke: var(--two); stroke-dasharray: 5 3; } .graph .box.quantized { stroke: var(--one); }
.graph .constant { fill: var(--mark); }
.graph .edge { fill: none; stroke: var(--mark); } .graph marker path { fill: var(--mark); }
.graph .edge:hover { stroke: var(--one); stroke-width: 2.5; }
.zoom { position: absolute; opacity: 0; } .zooms { position: sticky; top: 0; z-index: 1; padding: 8px 0;
  background: var(--page); font-size: 14px; color: var(--soft); }
.zooms label { cursor: pointer; padding: 2px 8px; border: 1px solid var(--rule); border-radius: 4px; margin-left: 6px; }
details.part > summary { font-size: 16px; color: var(--ink); padding: 4px 0; }
"""
ZOOMS = (50, 75, 100, 150, 200)


def zoom_controls() -> tuple[str, str]:
    """(Controls, rules): plain radio buttons whose choice the style sheet reads, so that no script is needed."""
    inputs = "".join(
        f'<input class="zoom" type="radio" name="zoom" id="zoom{size}"{" checked" if size == 100 else ""}/>'
        for size in ZOOMS
    )
    labels = "".join(f'<label for="zoom{size}">{size} %</label>' for size in ZOOMS)
    rules = "".join(
        f"#zoom{size}:checked ~ * {{ --zoom: {size / 100:g}; }}\n"
        f"#zoom{size}:checked ~ .zooms label[for=zoom{size}] {{ color: var(--ink); border-color: var(--one); }}\n"
        f"#zoom{size}:focus-visible ~ .zooms label[for=zoom{size}] {{ outline: 2px solid var(--one); }}\n"
        for size in ZOOMS
    )
    return f'{inputs}<div class="zooms">zoom {labels}</div>', rules


@dataclass
class _Box:
    """Layers of one module, and what they read from other parts without an arrow."""

    title: str
    layers: list[LayerInfo] = field(default_factory=list)

    @property
    def style(self) -> str:
        kinds = [_KINDS.get(layer.kind, "") for layer in self.layers]
        return next((kind for kind in ("attention", "cache", "product", "table", "quantized") if kind in kinds), "")


def draw(part: Part, graph: NetworkGraph) -> str:
    """The part as ``<svg>``. Every layer is an element with its name in ``data-layer``."""
    try:
        return _drawn(part, graph, _boxes(part))
    except Cyclic:  # two modules that feed each other: every layer is a box of its own then
        return _drawn(part, graph, {layer.name: _Box(layer.name, [layer]) for layer in part.layers})


def _boxes(part: Part) -> dict[str, _Box]:
    """By module; a constant, or a reshaped weight, stands with its reader where it has one reader only."""
    modules = {layer.name: _module(layer.name) for layer in part.layers}
    readers: dict[str, set[str]] = {}
    for layer in part.layers:
        for name in layer.inputs:
            readers.setdefault(name, set()).add(modules[layer.name])
    for layer in part.layers:
        weight = layer.kind == "CONSTANT" or modules[layer.name].endswith(_WEIGHTS)
        if weight and len(readers.get(layer.output.name, ())) == 1:
            (modules[layer.name],) = readers[layer.output.name]
    boxes: dict[str, _Box] = {}
    for layer in part.layers:
        boxes.setdefault(modules[layer.name], _Box(modules[layer.name])).layers.append(layer)
    return boxes


def _module(name: str) -> str:
    return _ATTENTION.sub("", name.partition("/")[0]).partition("#")[0]


def _drawn(part: Part, graph: NetworkGraph, boxes: Mapping[str, _Box]) -> str:
    inside = {layer.output.name: name for name, box in boxes.items() for layer in box.layers}
    outputs = {tensor.name for tensor in graph.outputs}
    ports: dict[str, str] = {}
    edges: dict[tuple[str, str], list[str]] = {}
    lines: dict[str, list[tuple[LayerInfo, str]]] = {name: [] for name in boxes}
    for name, box in boxes.items():
        for layer in box.layers:
            beside = []
            for tensor in dict.fromkeys(layer.inputs):
                # weights that are inputs of the network, one a module, would be as many arrows
                if tensor not in inside and (graph.shared(tensor, part.name) or tensor.endswith(_WEIGHTS)):
                    beside.append(tensor)
                    continue
                source = inside.get(tensor, f"from {tensor}")
                if tensor not in inside:
                    ports[source] = (
                        f"{tensor} from {graph.home[tensor]}" if tensor in graph.home else f"{tensor}: input"
                    )
                if source != name:
                    edges.setdefault((source, name), []).append(tensor)
            lines[name].append((layer, _line(layer, part, beside)))
            output = layer.output.name
            away = [other for other in graph.readers.get(output, ()) if other != part.name]
            # what the inputs part hands on is drawn where it is read
            if output in outputs or (away and part.name != "inputs"):
                ports[f"to {output}"] = f"{output}: output" if output in outputs else f"{output} to {', '.join(away)}"
                edges.setdefault((name, f"to {output}"), []).append(output)
    sizes = {name: _size(_title(box, part), [text for _, text in lines[name]]) for name, box in boxes.items()}
    sizes |= {port: (len(text) * _CHARACTER + 2 * _PAD, _PORT) for port, text in ports.items()}
    layout = layered(sizes, list(edges))
    arrow = f"arrow-{part.name.replace('.', '-')}"
    drawn = [
        _edge(layout.routes[pair], [graph.tensors[name] for name in names], arrow) for pair, names in edges.items()
    ]
    drawn += [_port(layout.corners[port], sizes[port], text) for port, text in ports.items()]
    drawn += [
        _box(layout.corners[name], sizes[name], _title(box, part), box.style, lines[name])
        for name, box in boxes.items()
    ]
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    marker = (
        f'<defs><marker id="{arrow}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    return (
        f'<svg style="--width: {width:.0f}px" viewBox="{-_MARGIN:g} {-_MARGIN:g} {width:.1f} {height:.1f}" role="img" '
        f'aria-label="{escape(f"layers of {part.name}")}">{marker}{"".join(drawn)}</svg>'
    )


def _line(layer: LayerInfo, part: Part, beside: Sequence[str]) -> str:
    name = layer.name.removeprefix(f"{part.name}.")
    prefixes = ("rotary/", "constant/", f"{part.name}.")
    short = (next((tensor[len(one) :] for one in prefixes if tensor.startswith(one)), tensor) for tensor in beside)
    with_ = f" <- {', '.join(short)}" if beside else ""
    return f"{name}  {layer.kind.lower()}  {layer.output}{with_}"


def _title(box: _Box, part: Part) -> str:
    return box.title.removeprefix(f"{part.name}.")


def _size(title: str, lines: Sequence[str]) -> tuple[float, float]:
    return max(map(len, [title, *lines])) * _CHARACTER + 2 * _PAD, _TITLE + _LINE * len(lines) + _PAD


def _box(
    corner: tuple[float, float],
    size: tuple[float, float],
    title: str,
    style: str,
    lines: Sequence[tuple[LayerInfo, str]],
) -> str:
    x, y = corner
    texts = [f'<text class="module" x="{x + _PAD:.1f}" y="{y + 17:.1f}">{escape(title)}</text>']
    for index, (layer, text) in enumerate(lines):
        tip = f"{layer.name}: {layer.kind}, {layer.output}, reads {', '.join(layer.inputs) or 'nothing'}"
        kind = ' class="constant"' if layer.kind == "CONSTANT" else ""
        texts.append(
            f'<text{kind} data-layer="{escape(layer.name)}" x="{x + _PAD:.1f}" '
            f'y="{y + _TITLE + 13 + _LINE * index:.1f}">{escape(text)}<title>{escape(tip)}</title></text>'
        )
    return f'<rect class="box {style}" {_at(corner, size)} rx="5"/>' + "".join(texts)


def _port(corner: tuple[float, float], size: tuple[float, float], text: str) -> str:
    x, y = corner
    return (
        f'<rect class="port" {_at(corner, size)} rx="11"/>'
        f'<text x="{x + size[0] / 2:.1f}" y="{y + 15:.1f}" text-anchor="middle">{escape(text)}</text>'
    )


def _edge(points: Sequence[tuple[float, float]], tensors: Sequence[TensorInfo], arrow: str) -> str:
    (x, y), *rest = points
    path = f"M{x:.1f},{y:.1f}"
    for u, v in rest:
        middle = (y + v) / 2
        path += f" C{x:.1f},{middle:.1f} {u:.1f},{middle:.1f} {u:.1f},{v:.1f}"
        x, y = u, v
    tip = "; ".join(f"{tensor.name} {tensor}" for tensor in tensors)
    return f'<path class="edge" d="{path}" marker-end="url(#{arrow})"><title>{escape(tip)}</title></path>'


def _at(corner: tuple[float, float], size: tuple[float, float]) -> str:
    return f'x="{corner[0]:.1f}" y="{corner[1]:.1f}" width="{size[0]:.1f}" height="{size[1]:.1f}"'
