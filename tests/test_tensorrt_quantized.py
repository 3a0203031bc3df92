"""Quantized checkpoints as TensorRT networks: the evaluator's logits beside those of the CPU engine, scheme by scheme.

Bounds are relative to the norm of the logits. In float32 both compute the same numbers but for the order of sums; with
8-bit activations such a difference can move an input across a rounding boundary, by one step of 127 (or of E4M3). In
16 bits scales are rounded to the compute type too, as TensorRT demands.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from tests.support_tensorrt import Network
from tests.support_tensorrt_quantized import SCHEMES, Checkpoints
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.evaluator import Evaluator
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import new_definition
from trtllm_cli.build.tensorrt.quantized import stored as quantized_source
from trtllm_cli.build.tensorrt.weights import stored
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.load import load_checkpoint

CONTEXT = 32
LENGTHS = [13, 9]

#: bounds in float32 and in bfloat16 where only weights are quantized, inputs are int8, inputs are fp8
WEIGHTS, INT8_INPUTS, FP8_INPUTS = (1e-5, 4e-2), (1e-2, 0.1), (6e-2, 0.25)

#: scheme -> its bounds
BOUNDS = {
    "int8": WEIGHTS,
    "int4-g64": WEIGHTS,
    "int4-g128": WEIGHTS,
    "int4-g32": WEIGHTS,
    "int4-rows": WEIGHTS,
    "int4-everywhere": WEIGHTS,
    "gptq-by-activation": WEIGHTS,
    "awq": WEIGHTS,
    "fp8-static": FP8_INPUTS,
    "fp8-static-rows": FP8_INPUTS,
    "fp8-token": FP8_INPUTS,
    "w8a8-static": INT8_INPUTS,
    "w8a8-token": INT8_INPUTS,
    "mixed": FP8_INPUTS,
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return Checkpoints(tmp_path_factory)


def network(checkpoint: Artifact, dtype: str, batch: int = 2) -> Network:
    body, store = checkpoint.checkpoint, TensorStore(checkpoint.path)
    source = quantized_source(store, body.quantization.layers)
    return Network(body.spec, stored(store), dtype, CONTEXT, batch, source)


def texts(vocabulary: int = 320) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, vocabulary, length + 3) for seed, length in enumerate(LENGTHS)]


def both(checkpoint: Artifact, dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(network, CPU engine) logits of a ragged batch of prompts, then of three single tokens each from the caches."""
    engine = load_checkpoint(checkpoint.path, CONTEXT, slots=2).executor
    made = network(checkpoint, dtype)
    prompt = np.zeros((2, max(LENGTHS)), np.int32)
    for row, (text, length) in enumerate(zip(texts(), LENGTHS)):
        prompt[row, :length] = text[:length]
    found = made.step(prompt, [0, 0], [length - 1 for length in LENGTHS])
    expected = engine.forward(
        [Segment(row, 0, text[:length]) for row, (text, length) in enumerate(zip(texts(), LENGTHS))]
    )
    pairs = [(found, expected)]
    for step in range(3):
        starts = [length + step for length in LENGTHS]
        tokens = [[text[start]] for text, start in zip(texts(), starts)]
        found = made.step(np.array(tokens), starts, [0, 0])
        expected = engine.forward([Segment(row, starts[row], tokens[row]) for row in range(2)])
        pairs.append((found, expected))
    return pairs


def differences(checkpoint: Artifact, dtype: str) -> list[float]:
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in both(checkpoint, dtype)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_network_agrees_with_the_cpu_engine(quantized, scheme, dtype):
    """Prompts of 13 and 9 tokens in one batch, then three single tokens each from the caches."""
    bound = BOUNDS[scheme][0 if dtype == "float32" else 1]
    assert max(found := differences(quantized(scheme), dtype)) < bound, found


@pytest.mark.parametrize("scheme", ["int8", "int4-g64", "w8a8-static"])
def test_a_tied_quantized_table_is_both_embedding_and_head(quantized, scheme):
    checkpoint = quantized(scheme, tied=True)
    assert "embed" in {layer.module for layer in checkpoint.checkpoint.quantization.layers}
    assert max(differences(checkpoint, "float32")) < BOUNDS[scheme][0]


def test_scales_of_both_signs_are_among_them(quantized):
    """The search gives int4 groups negative scales: TensorRT multiplies by them like by any other."""
    checkpoint = quantized("int4-g64")
    scale = TensorStore(checkpoint.path).array("layers.0.mlp.up.weight_scale")
    assert (scale < 0).any()
    assert (scale > 0).any()


@pytest.mark.parametrize("wrong", ["nibbles", "scale", "offset"])
def test_the_comparison_notices_a_wrong_layout(quantized, wrong, monkeypatch):
    checkpoint = quantized("int4-g64")
    body, store = checkpoint.checkpoint, TensorStore(checkpoint.path)
    right = quantized_source(store, body.quantization.layers)

    def changed(module):
        found = right(module)
        if module != "layers.1.mlp.up":
            return found
        swapped = found.values << 4 | found.values >> 4
        return {
            "nibbles": replace(found, values=swapped),
            "scale": replace(found, scale=found.scale[:, ::-1].copy()),
            "offset": replace(found, values=found.values ^ np.uint8(0x88)),
        }[wrong]

    text = texts()[0][None]
    a, b = (
        Network(body.spec, stored(store), "float32", CONTEXT, 1, source).step(text, [0], [text.shape[1] - 1])
        for source in (right, changed)
    )
    assert np.linalg.norm(a - b) / np.linalg.norm(a) > 1e-2


# ---- the evaluator's arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantization_rounds_half_to_even_and_saturates(kind):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1000.0, -1000.0, 17.0, 19.0, 0.0]])
    made = Chain(x.shape, "float32")
    step = made.layers.constant("step", np.array(1, np.float32))
    quantized = made.layers.add("quantize", "q", made.x, step, getattr(made.api, kind))
    out = made.run(x, made.layers.add("dequantize", "dq", quantized, step, made.api.float32))
    expected = {
        "int8": [0, 2, 2, 0, -2, 126, 127, 127, -128, 17, 19, 0],
        "fp8": [0.5, 1.5, 2.5, -0.5, -1.5, 128, 128, 448, -448, 16, 20, 0],
    }[kind]
    assert out.tolist() == [expected]


def test_products_of_whole_numbers_are_exact_in_a_narrow_compute_type():
    """Every operand is a whole number and so is every sum: only the result is rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 64), generator=generator)
    weight = torch.randint(-127, 128, (8, 64), generator=generator)
    made = Chain((3, 64), "bfloat16")
    one = made.layers.constant("one", np.array(0x3F80, np.uint16), "bfloat16")
    q = made.layers.add("quantize", "q", made.x, one, made.api.int8)
    a = made.layers.add("dequantize", "dq", q, one, made.api.bfloat16)
    values = made.layers.packed("w", weight.to(torch.int8).numpy(), "int8", (8, 64))
    b = made.layers.add("dequantize", "wdq", values, one, made.api.bfloat16)
    none, transpose = made.api.MatrixOperation.NONE, made.api.MatrixOperation.TRANSPOSE
    out = made.run(x.bfloat16(), made.layers.add("matrix_multiply", "y", a, none, b, transpose))
    assert torch.equal(out, (x @ weight.T).to(torch.bfloat16))
    assert not torch.equal(out, (x.bfloat16() @ weight.bfloat16().T * 1.004).to(torch.bfloat16))


def test_int4_constants_are_unpacked_low_nibble_first():
    made = Chain((1, 4), "float32")
    bits = np.array([[0x10, 0x8F], [0x72, 0xE9]], np.uint8)
    values = made.layers.packed("w", bits, "int4", (2, 4))
    scale = made.layers.constant("s", np.array([[1, 10], [-1, 0.5]], np.float32))
    weight = made.layers.add("dequantize", "dq", values, scale, made.api.float32)
    none, transpose = made.api.MatrixOperation.NONE, made.api.MatrixOperation.TRANSPOSE
    y = made.layers.add("matrix_multiply", "y", made.x, none, weight, transpose)
    rows = [made.run(torch.eye(4)[k : k + 1], y if k == 0 else None)[0].tolist() for k in range(4)]
    assert np.array(rows).T.tolist() == [[0, 1, -10, -80], [-2, -7, -3.5, -1]]


class Chain:
    """A network of a few layers from one input ``x``."""

    def __init__(self, shape, dtype) -> None:
        self.layers = new_definition(load()).layers
        self.api = self.layers.trt.api
        self.x = self.layers.input("x", self.layers.dtype(dtype), tuple(shape))

    def run(self, x: torch.Tensor, output=None) -> torch.Tensor:
        if output is not None:
            self.layers.output(output, "y")
        return Evaluator(self.layers).run({"x": x})["y"]
