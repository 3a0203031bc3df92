"""Every quantized scheme through the native library: kernels against exact arithmetic, models against torch."""

from __future__ import annotations

import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support_artifacts import build_to
from tests.support_models import tiny_model
from tests.support_quantized import Choice, tiny_checkpoint, write_quantized
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.models.weights import CheckpointWeights
from trtllm_cli.ops import quantized
from trtllm_cli.ops.native import library
from trtllm_cli.ops.native.packing import pack_module, packed_layout
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.load import _native
from trtllm_cli.runtime.torch_executor import TorchExecutor

pytestmark = pytest.mark.skipif(library.find_problem() is not None, reason=str(library.find_problem()))

Array = NDArray[Any]
INT8_ROWS, FP8_FORMAT, INT8_DOT_FORMAT = 4, 5, 6


def arches() -> list[str]:
    import platform

    return ["native", "x86-64-v4", "x86-64-v3", "x86-64-v2"] if platform.machine() == "x86_64" else ["native"]


def library_for(arch: str) -> library.NativeLibrary:
    if arch == "x86-64-v4" and not library.load().isa.startswith("avx512"):
        pytest.skip("no AVX-512 here")
    return library.load(None if arch == "native" else arch)


def run(native: library.NativeLibrary, mode: int, format: int, meta: Any, tensors: dict[str, Array], x: Array) -> Array:
    bias = tensors.get("m.bias")
    out = np.full((x.shape[0], meta.n), np.nan, np.float32)
    pointers = (tensors["m.packed"].ctypes.data, tensors["m.scale"].ctypes.data, None)
    bias_at = None if bias is None else bias.ctypes.data
    x = np.ascontiguousarray(x, np.float32)
    status = native.handle.tn_test_linear(
        mode, format, meta.n, meta.k, 0, 0, *pointers, bias_at, x.ctypes.data, x.shape[0], out.ctypes.data
    )
    assert status == 0, native.handle.tn_message()
    return out


@pytest.mark.parametrize("arch", arches())
def test_integer_products_are_exact(arch: str) -> None:
    """Rows whose largest magnitude is 127 have the scale 1: what comes out is the integer sum, rounded once."""
    native = library_for(arch)
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (17, 3), (33, 66), (80, 257), (70, 4096), (100, 9001)):
        weight = rng.integers(-128, 128, (n, k), dtype=np.int8)
        meta, tensors = pack_module("m", "int8_dot", weight, scale=np.ones(1, np.float32), activation="int8")
        assert {name: (t.dtype, t.size) for name, t in tensors.items()} == packed_layout("m", meta)
        for rows in (1, 2, 3, 5, 6, 13):
            x = rng.integers(-127, 128, (rows, k))
            x[:, 0] = np.where(np.arange(rows) % 2, 127, -127)
            got = run(native, INT8_ROWS, INT8_DOT_FORMAT, meta, tensors, x)
            assert np.array_equal(got, (x @ weight.T.astype(np.int64)).astype(np.float32)), (n, k, rows)


def test_scales_and_bias_of_integer_products() -> None:
    rng = np.random.default_rng(1)
    weight = rng.integers(-128, 128, (50, 123), dtype=np.int8)
    scale, bias = rng.uniform(0.5, 2, 50).astype(np.float32), rng.standard_normal(50).astype(np.float32)
    meta, tensors = pack_module("m", "int8_dot", weight, scale=scale, bias=bias, activation="int8")
    x = rng.standard_normal((9, 123)).astype(np.float32)
    values, scales = quantized.quantize_activation(torch.from_numpy(x), "int8", None)
    exact = values.double() @ torch.from_numpy(weight).double().T * scales.double() * torch.from_numpy(scale).double()
    got = run(library.load(), INT8_ROWS, INT8_DOT_FORMAT, meta, tensors, x)
    # two roundings of the product and one of the sum
    bound = (exact.abs() + torch.from_numpy(np.abs(bias))) * 3 * 2**-24
    assert torch.all((torch.from_numpy(got).double() - exact - torch.from_numpy(bias).double()).abs() <= bound)


@pytest.mark.parametrize("arch", arches())
def test_fp8_products_match_float64(arch: str) -> None:
    native = library_for(arch)
    rng = np.random.default_rng(2)
    for n, k in ((1, 1), (17, 3), (33, 66), (80, 257), (20, 4100)):
        bits = rng.integers(0, 256, (n, k)).astype(np.uint8)
        bits[(bits & 0x7F) == 0x7F] = 1
        scale = rng.uniform(0.5, 2, n).astype(np.float32)
        exact = torch.from_numpy(bits).view(torch.float8_e4m3fn).double().numpy() * scale.astype(np.float64)[:, None]
        meta, tensors = pack_module("m", "fp8", bits, scale=scale, bias=scale)
        assert {name: (t.dtype, t.size) for name, t in tensors.items()} == packed_layout("m", meta)
        modes = (0, 1, 2) if native.isa == "avx512bf16" else (0, 1)
        for mode, rows in itertools.product(modes, (1, 3, 7, 8)):
            # E4M3 activations: each product is exact in every mode
            x = quantized.round_8bit(torch.from_numpy(rng.standard_normal((rows, k)) * 9).float(), "fp8").numpy()
            bound = np.abs(x.astype(np.float64)) @ np.abs(exact).T
            got = run(native, mode, FP8_FORMAT, meta, tensors, x)
            assert np.all(np.abs(got - (x.astype(np.float64) @ exact.T + scale)) <= 2e-6 * bound + 1e-6), (n, k, mode)


def hard_rows(type: str) -> list[Array]:
    rng = np.random.default_rng(3)
    ties = np.arange(-130, 130.5, 0.5, dtype=np.float32) if type == "int8" else np.arange(-470, 470, 0.5)
    subnormal = np.arange(-40, 41) * np.float32(2.0**-11)
    return [
        np.zeros(33, np.float32),
        np.full(5, np.finfo(np.float32).tiny, np.float32),
        np.array([1e38, -1e38, 1, 0], np.float32),
        *(rng.standard_normal((40, 77)) * rng.lognormal(0, 3, (40, 1))).astype(np.float32),
        ties.astype(np.float32),
        subnormal.astype(np.float32),
    ]


@pytest.mark.parametrize("arch", arches())
@pytest.mark.parametrize("type", ["int8", "fp8"])
@pytest.mark.parametrize("fixed", [None, 1.0, 0.013])
def test_rows_are_quantized_as_defined(arch: str, type: Any, fixed: float | None) -> None:
    handle = library_for(arch).handle
    for row in hard_rows(type):
        static = None if fixed is None else torch.tensor([fixed])
        values, scale = quantized.quantize_activation(torch.from_numpy(row)[None], type, static)
        got, got_scale = np.full(row.size, np.nan, np.float32), np.zeros(1, np.float32)
        handle.tn_test_quantize(
            {"int8": 1, "fp8": 2}[type],
            row.ctypes.data,
            row.size,
            float(scale) if fixed else 0.0,
            got.ctypes.data,
            got_scale.ctypes.data,
        )
        assert float(scale) == float(got_scale[0])
        assert np.array_equal(got, values[0].numpy())


@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_a_row_that_is_not_a_number_stays_none(type: str) -> None:
    """Quantized to whole numbers a NaN would be lost: the row's scale carries it on."""
    for bad, fixed in ((np.nan, 0.0), (np.inf, 0.0), (np.nan, 1.0)):
        row, values, scale = np.array([1, bad, 2], np.float32), np.zeros(3, np.float32), np.zeros(1, np.float32)
        arguments = ({"int8": 1, "fp8": 2}[type], row.ctypes.data, 3, fixed, values.ctypes.data, scale.ctypes.data)
        library.load().handle.tn_test_quantize(*arguments)
        assert np.isnan(scale[0])


@pytest.mark.parametrize("arch", arches())
@pytest.mark.parametrize("type", ["int8", "fp8"])
def test_the_cache_keeps_what_the_definition_says(arch: str, type: Any) -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate([*hard_rows(type), rng.uniform(-500, 500, 900).astype(np.float32)])
    x = np.concatenate([x, np.zeros(-x.size % 16, np.float32)])
    out = np.full_like(x, np.nan)
    library_for(arch).handle.tn_test_cached({"int8": 2, "fp8": 3}[type], x.ctypes.data, x.size, out.ctypes.data)
    kept = quantized.kv_round_trip(torch.from_numpy(x)[None, None, None], type, torch.ones(1))
    assert np.array_equal(out, kept.flatten().numpy())


# ---- whole models ----------------------------------------------------------------------------------------------------

FAMILIES = ["llama-odd-heads", "mistral-window", "qwen2-window", "qwen3-gqa"]


def everywhere(choice: Choice) -> Any:
    return lambda module: None if module == "embed" else choice


def mixture(module: str) -> Choice | None:
    """Each projection of a layer in a scheme of its own: no two share a quantized input."""
    choices: dict[str, Choice | None] = {
        "q": Choice("int8", activation="token"),
        "k": Choice("fp8", "tensor", activation="tensor", input_scale=0.01),
        "v": Choice("int8", activation="tensor", input_scale=0.05),
        "o": Choice("int4", shuffle=3, symmetric=False),
        "gate": Choice("int4", shuffle=5),
        "up": Choice("int4", shuffle=6),
        "down": Choice("fp8"),
        "embed": Choice("int8", activation="token"),
        "lm_head": None,
    }
    return choices[module.rsplit(".", 1)[-1]]


#: name -> (schemes, type of the cache)
CASES: dict[str, tuple[Any, Any]] = {
    "int8-token": (everywhere(Choice("int8", activation="token")), None),
    "int8-tensor": (everywhere(Choice("int8", "tensor", activation="tensor")), None),
    "fp8-token": (everywhere(Choice("fp8", activation="token")), None),
    "fp8-tensor": (everywhere(Choice("fp8", "tensor", activation="tensor", input_scale=0.01)), None),
    "fp8-weight-only": (everywhere(Choice("fp8")), None),
    "int8-weight-per-tensor": (everywhere(Choice("int8", "tensor")), None),
    "group-index": (everywhere(Choice("int4", shuffle=9)), None),
    "group-index-asymmetric": (everywhere(Choice("int4", shuffle=9, symmetric=False)), None),
    "int8-cache": (lambda module: None, "int8"),
    "fp8-cache": (lambda module: None, "fp8"),
    "mixture": (mixture, "int8"),
}
#: cases that round neither activations nor the cache
UNROUNDED = ("fp8-weight-only", "int8-weight-per-tensor", "group-index", "group-index-asymmetric")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return {case: tiny_checkpoint(tiny_model(case), tmp_path_factory.mktemp(case)) for case in FAMILIES}


def reference(checkpoint: Artifact, tokens: Array) -> Array:
    weights = CheckpointWeights(checkpoint, torch.float32)
    executor = TorchExecutor(checkpoint.checkpoint.spec, weights, 64, 1, torch.float32, None)
    return executor.forward([Segment(0, 0, tokens, "all")])


def distance(got: Array, expected: Array) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_models_agree_with_torch(parents: dict[str, Artifact], family: str, case: str, tmp_path: Path) -> None:
    choose, kv = CASES[case]
    if case.startswith("group-index") and family == "llama-odd-heads":
        choose = everywhere(Choice("int4", shuffle=9, groups=4))
    quantized_ = write_quantized(parents[family], tmp_path / "quantized", choose, kv=kv)
    vocab = quantized_.checkpoint.spec.vocab_size
    tokens = np.random.default_rng(zlib.crc32(case.encode())).integers(0, vocab, 44).astype(np.int32)
    expected = reference(quantized_, tokens)
    options: dict[str, Any] = {"executor": "native", "context": 64, "products": "float32"}
    if kv is None:
        options["cache"] = "float32"
    engine = build_to(quantized_.path, tmp_path / "engine", **options)
    assert engine.engine.tactics["cache"] == (kv or "float32")
    executor = _native(engine, threads=2)
    # Both executors round the same numbers to eight bits. Where those differ in the last place of a float32, a few in
    # ten thousand fall to the other side of a tie and move by a step, 1/127 of the largest (1/16 of their own in E4M3),
    # which later tokens see; most tokens see none. Weights alone leave float32 rounding.
    usual, most = (2e-5, 2e-5) if case in UNROUNDED else (1e-4, 1e-2)
    try:
        got = executor.forward([Segment(0, 0, tokens[:40], "all")])
        rows = [distance(got[i], expected[i]) for i in range(40)]
        assert np.median(rows) < usual and max(rows) < most
        several = [Segment(1, 0, tokens[:3], "all"), Segment(2, 0, tokens[:1]), Segment(3, 0, tokens[:2])]
        got = executor.forward(several)
        assert max(distance(got[i], expected[j]) for i, j in enumerate((0, 1, 2, 0, 1))) < most
        for i in range(40, 44):
            assert distance(executor.forward([Segment(0, i, tokens[i : i + 1])]), expected[i : i + 1]) < most, i
    finally:
        executor.close()


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_quantized_models_give_the_same_bits_for_any_number_of_threads(
    parents: dict[str, Artifact], products: str, tmp_path: Path
) -> None:
    checkpoint = write_quantized(parents["qwen3-gqa"], tmp_path / "quantized", mixture, kv="fp8")
    engine = build_to(checkpoint.path, tmp_path / "engine", executor="native", context=64, products=products)
    tokens = np.arange(1, 40, dtype=np.int32)
    found = []
    for threads in (1, 3):
        executor = _native(engine, threads)
        executor._model.poison()  # type: ignore[attr-defined]
        parts = [
            executor.forward([Segment(0, 0, tokens[:33], "all"), Segment(1, 0, tokens[:4], "last")]),
            executor.forward([Segment(0, 33, tokens[33:34])]),
            executor.forward([Segment(0, 34, tokens[34:36], "all"), Segment(1, 4, tokens[4:6], "all")]),
        ]
        found.append(np.concatenate(parts))
        executor.close()
    assert np.isfinite(found[0]).all() and np.array_equal(found[0], found[1])


def test_bfloat16_products_change_integer_products_little(parents: dict[str, Artifact], tmp_path: Path) -> None:
    """In the bfloat16 mode integer products stay exact; attention alone is rounded to 8 bits of mantissa, and what
    follows falls into other steps here and there: of the size of int8 rounding itself, 1/127 of a row's largest."""
    checkpoint = write_quantized(
        parents["llama-odd-heads"], tmp_path / "quantized", everywhere(Choice("int8", activation="token"))
    )
    engine = build_to(checkpoint.path, tmp_path / "engine", executor="native", context=64, products="bfloat16")
    tokens = np.arange(1, 41, dtype=np.int32)
    executor = _native(engine, 2)
    got = executor.forward([Segment(0, 0, tokens, "all")])
    executor.close()
    assert distance(got, reference(checkpoint, tokens)) < 0.06
