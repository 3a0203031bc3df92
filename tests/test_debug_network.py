"""`debug network`: the page holds every layer once, is one file, and its boxes and arrows are where they should be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_cli.debug.layout import Cyclic, layered

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_artifacts import REPOSITORY, quantize_to, raises
from tests.support_debug import engine_of
from tests.support_tensorrt import FAMILIES, small_spec, write_checkpoint
from trtllm_cli.cli.main import invoke
from trtllm_cli.debug.drawing import ZOOMS
from trtllm_cli.debug.graph import alike, graph_of
from trtllm_cli.debug.network import kernels_of, page

_VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Reads a page: balanced elements, layers by their part, ports, arrows, and everything it could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.part = ""
        self.layers: list[tuple[str, str]] = []
        self.kinds: Counter[str] = Counter()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in _VOID:
            self.open.append(tag)
        self.kinds[f"{tag}.{found.get('class', '').partition(' ')[0]}"] += 1
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [found[name] for name in ("src", "href", "xlink:href", "data", "action") if name in found]
        if tag == "section" and "id" in found:
            self.part = found["id"]
        if "data-layer" in found:
            self.layers.append((self.part, found["data-layer"]))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_page(text: str) -> Page:
    """The page, which refers to nothing but itself."""
    found = Page(text)
    assert found.loads == [] and len(set(found.ids)) == len(found.ids)
    assert "script" not in text and "http" not in text and "@import" not in text
    assert all(match[1:] in found.ids for match in re.findall(r"url\(([^)]*)\)", text))
    assert "prefers-color-scheme: dark" in text
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_stands_once_in_its_part(tmp_path, family):
    artifact = write_checkpoint(tmp_path / family, FAMILIES[family])
    graph = graph_of(artifact)
    found = read_page(page(artifact, graph))
    assert sorted(name for _, name in found.layers) == sorted(layer.name for layer in graph.layers)
    for part, name in found.layers:
        if name.startswith("layers."):
            assert name.startswith(part)
        else:
            assert part in ("inputs", "head")
    assert {part for part, _ in found.layers} == {"inputs", "layers.0", "layers.1", "head"}
    assert found.kinds["input.zoom"] == len(ZOOMS)


def test_arrows_lead_from_what_is_read_to_its_reader(tmp_path):
    artifact = write_checkpoint(tmp_path / "llama", FAMILIES["llama"])
    text = page(artifact, graph_of(artifact))
    layer = text[text.index('id="layers.1"') : text.index('id="head"')]
    tips = re.findall(r'<path class="edge"[^>]*><title>([^<]*)</title>', layer)
    names = [tip.split(" ")[0] for tip in tips]
    # what of a cache is read, and under which name, is not the point here
    assert Counter(re.sub(r"(_cache)[./].*", r"\1", name) for name in names) == {
        "layers.0.mlp.down/residual": 2,  # the norm, and the sum after attention
        "layers.1.attn_norm": 3,
        "layers.1.attn.q": 1,  # these three are split and turned as one
        "layers.1.attn.k": 1,
        "layers.1.attn.v": 1,
        "layers.1.attn.qkv/scaled": 1,
        "layers.1.attn.qkv/k": 1,
        "layers.1.attn.qkv/v": 1,
        "layers.1.k_cache": 3,  # as it was; updated to attention and to the output
        "layers.1.v_cache": 3,
        "layers.1.attn/merge_heads": 1,
        "layers.1.attn.o/residual": 2,
        "layers.1.mlp_norm": 2,
        "layers.1.mlp.gate/silu": 1,
        "layers.1.mlp.up/product": 1,
        "layers.1.mlp.down/residual": 1,
    }
    assert "layers.1.mlp.gate [n, 128] float16" not in tips[0]
    assert "matrix_multiply  [n, 128] float16" in layer
    # what all layers share is named in the line that reads it
    assert "&lt;- cos, sin, positions" in layer and "&lt;- mask/seen" in layer


def test_thirty_layers_that_are_alike(tmp_path):
    spec = small_spec(num_layers=30, windows=(None,) * 30, tie_embeddings=True)
    artifact = write_checkpoint(tmp_path / "deep", spec)
    graph = graph_of(artifact)
    assert [len(run) for run in alike(graph.parts)] == [1, 30, 1]
    text = page(artifact, graph)
    assert "layers.0 to layers.29" in text and "30 times" in text
    # the first of thirty is open
    assert text.count('<details class="part" open>') == 3 and text.count('<details class="part">') == 29
    assert len(read_page(text).layers) == len(graph.layers)


BIG = """
import json, pathlib, time
started = time.monotonic()
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import define, new_definition
from trtllm_cli.debug.graph import blank_weights, read
from trtllm_cli.models.spec import DecoderSpec, NormSpec, RotarySpec
spec = DecoderSpec(
    family="llama", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, max_positions=8192, norm=NormSpec(eps=1e-5), activation="silu",
    rotary=RotarySpec(theta=5e5, dim=128), windows=(None,) * 32,
)
layers = new_definition(load()).layers
define(layers, spec, blank_weights(spec, "bfloat16"), "bfloat16", 4096)
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"layers": len(read(layers).layers), "peak_mib": int(status["VmHWM"].split()[0]) / 1024}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_a_large_model_is_drawn_without_its_weights():
    """An 8B model's network, whose weights would take 15 GiB."""
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["layers"] > 1500 and figures["peak_mib"] < 1024


def test_windows_that_differ_are_not_alike(tmp_path):
    graph = graph_of(write_checkpoint(tmp_path / "qwen2", FAMILIES["qwen2"]))
    names = {layer.name for layer in graph.layers}
    assert {"mask/seen", "mask/window16/seen_recent"} <= names
    assert {part.name for part in graph.parts} == {"inputs", "layers.0", "layers.1", "head"}


def test_an_engine_shows_its_kernels_and_a_quantized_one_its_types(tmp_path, text_checkpoint):
    checkpoint = quantize_to(text_checkpoint.path, tmp_path / "int4", method="int4-weight-only", group_size=64)
    engine = engine_of(checkpoint, tmp_path / "engine")
    graph = graph_of(engine)
    # the placeholders have the shapes and types of the weights in the plan
    assert len(graph.layers) == engine.engine.tactics["network_layers"]
    weight = next(layer for layer in graph.layers if layer.name == "layers.0.mlp.down.weight")
    assert (weight.output.shape, weight.output.dtype) == ((256, 128), "int4")
    scale = next(layer for layer in graph.layers if layer.name == "layers.0.mlp.down.weight_scale")
    assert scale.output.shape == (4, 128)
    kernels = kernels_of(engine)
    assert [name for name, _ in kernels] == [profile["name"] for profile in engine.engine.tactics["profiles"]]
    text = page(engine, graph, kernels)
    read_page(text)
    cells = re.findall(r"<tr><td>([^<]*)</td><td>(?:gemm|kgen|[a-z_]+)</td>", text)
    made = [kernel.name for _, found in kernels for kernel in found]
    assert sorted(cells) == sorted(made) and len(made) > 20
    second = text[text.index('id="layers.1"') : text.index('id="head"')]
    assert second.count("_gemv_mha_v1") == 1 and "layers.0.attn" not in second.partition("kernels of profile")[2]


def test_weights_that_are_inputs_are_named_by_their_readers(tmp_path, text_checkpoint):
    engine = engine_of(text_checkpoint, tmp_path / "engine", weights_as_inputs=True)
    graph = graph_of(engine)
    assert "layers.1.mlp.up.weight" in {tensor.name for tensor in graph.inputs}
    assert not [layer for layer in graph.layers if layer.name == "layers.1.mlp.up.weight"]
    text = page(engine, graph, kernels_of(engine))
    assert len(read_page(text).layers) == len(graph.layers)
    assert "mlp.up  matrix_multiply  [n, 256] float32 &lt;- mlp.up.weight<" in text


def test_the_command(tmp_path, text_checkpoint, native_engine, text_source, capsys):
    out = tmp_path / "graph.html"
    assert invoke(["debug", "network", str(text_checkpoint.path), "-o", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["path"] == str(out) and sum(result["parts"].values()) == result["layers"] > 100
    assert len(read_page(out.read_text()).layers) == result["layers"]
    assert invoke(["debug", "network", str(text_checkpoint.path), "-o", str(tmp_path / "graph.png")]) == 2
    with raises("DEBUG_BACKEND", 4, "cpu engine"):
        graph_of(native_engine)
    with raises("WRONG_KIND", 2, "is a source"):
        graph_of(text_source)


# ---- layout ----------------------------------------------------------------------------------------------------------


@st.composite
def acyclic(draw):
    count = draw(st.integers(1, 12))
    names = [f"b{index}" for index in range(count)]
    sizes = {name: (draw(st.integers(4, 300)) * 1.0, draw(st.integers(4, 90)) * 1.0) for name in names}
    pairs = list(combinations(names, 2))
    return sizes, draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []


@given(acyclic())
def test_boxes_do_not_overlap_and_arrows_lead_down(graph):
    sizes, edges = graph
    layout = layered(sizes, edges)
    boxes = {name: (*layout.corners[name], *sizes[name]) for name in sizes}
    for (x, y, w, h), (u, v, a, b) in combinations(boxes.values(), 2):
        assert x + w <= u or u + a <= x or y + h <= v or v + b <= y
    for x, y, w, h in boxes.values():
        assert x >= -1e-6 and x + w <= layout.width + 1e-6 and y >= 0 and y + h <= layout.height + 1e-6
    assert set(layout.routes) == set(edges)
    for (a, b), points in layout.routes.items():
        heights = [y for _, y in points]
        assert heights == sorted(heights) and len(points) >= 2
        for (x, y), box, side in ((points[0], boxes[a], 1), (points[-1], boxes[b], 0)):
            assert box[0] < x < box[0] + box[2] and y == box[1] + side * box[3]


@given(acyclic())
def test_arrows_pass_between_boxes(graph):
    sizes, edges = graph
    layout = layered(sizes, edges)
    for (a, b), points in layout.routes.items():
        for (x, y), (u, v) in zip(points, points[1:]):
            if x != u:
                continue  # between two ranks, where no box is
            for name in set(sizes) - {a, b}:
                left, top = layout.corners[name]
                width, height = sizes[name]
                assert not (left < x < left + width and y < top + height and v > top), (a, b, name)


def test_a_chain_stands_in_one_column_and_a_cycle_is_refused():
    chain = layered({"a": (10, 10), "b": (90, 20), "c": (40, 10)}, [("a", "b"), ("b", "c")])
    middles = [chain.corners[name][0] + width / 2 for name, width in (("a", 10), ("b", 90), ("c", 40))]
    assert middles == pytest.approx([45.0] * 3)
    with pytest.raises(Cyclic):
        layered({"a": (1, 1), "b": (1, 1)}, [("a", "b"), ("b", "a")])
