"""The packed formats and single kernels of the native library against float64 numpy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.native import library
from trtllm_cli.ops.native.packing import PackedModule, pack_module, pack_vector, packed_layout

pytestmark = pytest.mark.skipif(library.find_problem() is not None, reason=str(library.find_problem()))

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int4": 4, "fp8": 5, "int8_dot": 6}
GEMV, GEMM_FLOAT, GEMM_BF16, GEMV_SPLIT = 0, 1, 2, 3
Array = NDArray[Any]


def to_bf16(x: Array) -> Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Case:
    """A random packed module and its exact weights [N, K] in float64."""

    def __init__(
        self,
        rng: np.random.Generator,
        format: str,
        n: int,
        k: int,
        group: int = 0,
        asymmetric: bool = False,
        scale_dtype: Any = np.float32,
        bias: bool = False,
    ) -> None:
        kw: dict[str, Any] = {}
        if format == "int8":
            weight: Array = rng.integers(-128, 128, (n, k), dtype=np.int8)
            kw["scale"] = rng.uniform(0.5, 2, n).astype(np.float32) / 100
            exact = weight.astype(np.float64) * kw["scale"][:, None]
        elif format == "int4":
            q = rng.integers(0, 16, (n, k), dtype=np.uint8)
            weight = q[:, 0::2] | (q[:, 1::2] << 4)
            kw["scale"] = (rng.uniform(0.5, 2, (n, k // group)) / 8).astype(scale_dtype)
            zero = rng.integers(0, 16, (n, k // group), dtype=np.uint8) if asymmetric else None
            kw["zero"] = zero
            z = 8.0 if zero is None else np.repeat(zero.astype(np.float64), group, axis=1)
            exact = (q - z) * np.repeat(kw["scale"].astype(np.float64), group, axis=1)
        else:
            values = rng.standard_normal((n, k)).astype(np.float32)
            weight = {
                "float32": lambda: values,
                "bfloat16": lambda: to_bf16(values),
                "float16": lambda: values.astype(np.float16),
            }[format]()
            exact = (from_bf16(weight) if format == "bfloat16" else weight).astype(np.float64)
        self.bias = rng.standard_normal(n).astype(np.float32) if bias else None
        self.exact = exact
        self.meta, self.tensors = pack_module("m", format, weight, bias=self.bias, **kw)  # type: ignore[arg-type]

    def arguments(self) -> tuple[Any, ...]:
        m = self.meta
        at = [
            self.tensors[f"m.{p}"].ctypes.data if f"m.{p}" in self.tensors else None
            for p in ("packed", "scale", "zero")
        ]
        return (FORMATS[m.format], m.n, m.k, m.group_size or 0, int(m.scale_dtype == "float16"), *at)

    def run(self, mode: int, x: Array, native: library.NativeLibrary | None = None) -> Array:
        y = np.full((x.shape[0], self.meta.n + 3), np.nan, dtype=np.float32)
        out = np.full((x.shape[0], self.meta.n), np.nan, dtype=np.float32)
        bias = self.tensors["m.bias"].ctypes.data if self.bias is not None else None
        handle = (native or library.load()).handle
        status = handle.tn_test_linear(mode, *self.arguments(), bias, x.ctypes.data, x.shape[0], out.ctypes.data)
        assert status == 0, handle.tn_message()
        assert np.isnan(y).all()
        return out

    def expected(self, x: Array) -> tuple[Array, Array]:
        """(x @ w.T + bias in float64, the sum of magnitudes that bounds its rounding)."""
        y = x.astype(np.float64) @ self.exact.T
        bound = np.abs(x.astype(np.float64)) @ np.abs(self.exact).T
        return (y if self.bias is None else y + self.bias), bound


def cases() -> list[tuple[Any, ...]]:
    plain = [
        (f, n, k, 0, False, np.float32)
        for f in ("float32", "bfloat16", "float16", "int8")
        for n, k in ((1, 1), (16, 8), (37, 67), (130, 96), (80, 2061))
    ]
    int4 = [
        ("int4", 33, 128, 32, False, np.float32),
        ("int4", 64, 128, 64, True, np.float16),
        ("int4", 48, 256, 128, False, np.float16),
        ("int4", 17, 54, 54, True, np.float32),
        ("int4", 16, 60, 20, True, np.float32),
        ("int4", 20, 60, 15, False, np.float16),
        ("int4", 5, 2, 1, True, np.float32),
        ("int4", 40, 4224, 64, True, np.float32),
        ("int4", 24, 4224, 4224, False, np.float32),
    ]
    return plain + int4


@pytest.mark.parametrize("case", cases(), ids=lambda c: "-".join(str(p) for p in c[:5]))
def test_products_match_float64(case: tuple[Any, ...]) -> None:
    rng = np.random.default_rng(7)
    format, n, k, group, asymmetric, scale_dtype = case
    c = Case(rng, format, n, k, group, asymmetric, scale_dtype, bias=n % 2 == 1)
    assert {name: (t.dtype, t.size) for name, t in c.tensors.items()} == packed_layout("m", c.meta)
    assert all(t.ndim == 1 and t.nbytes % 64 == 0 for t in c.tensors.values())
    for rows in (1, 2, 3, 4, 5, 6, 7, 8):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        y, bound = c.expected(x)
        # a zero point is subtracted after the sum over its group, hence the margin
        assert np.all(np.abs(c.run(GEMV, x) - y) <= 1e-6 * bound * 2 + 1e-6), rows
        assert np.all(np.abs(c.run(GEMV_SPLIT, x) - y) <= 2**-18 * bound + 1e-6), rows
    for rows in (1, 6, 13):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        y, bound = c.expected(x)
        assert np.all(np.abs(c.run(GEMM_FLOAT, x) - y) <= 2e-6 * bound + 1e-6), rows
        if library.load().isa == "avx512bf16":
            assert np.all(np.abs(c.run(GEMM_BF16, x) - y) <= 2**-7 * bound + 1e-6), rows


def test_bf16_product_of_int8_is_exact_in_the_weights() -> None:
    """With activations that are bfloat16 already, int8 weights lose nothing in the bfloat16 mode."""
    if library.load().isa != "avx512bf16":
        pytest.skip("no bfloat16 products here")
    rng = np.random.default_rng(1)
    c = Case(rng, "int8", 40, 300)
    x = from_bf16(to_bf16(rng.standard_normal((9, 300)).astype(np.float32)))
    y, bound = c.expected(x)
    assert np.all(np.abs(c.run(GEMM_BF16, x) - y) <= 1e-6 * bound)


@pytest.mark.parametrize("format,group", [("float32", 0), ("int8", 0), ("int4", 32)])
def test_a_row_does_not_depend_on_the_others(format: str, group: int) -> None:
    rng = np.random.default_rng(3)
    c = Case(rng, format, 100, 96, group, asymmetric=group > 0)
    x = rng.standard_normal((8, 96)).astype(np.float32)
    for mode in (GEMV, GEMV_SPLIT):
        together = c.run(mode, x)
        for rows in range(1, 8):
            assert np.array_equal(c.run(mode, x[:rows].copy()), together[:rows])


@pytest.mark.parametrize("case", cases(), ids=lambda c: "-".join(str(p) for p in c[:5]))
def test_embedding_rows(case: tuple[Any, ...]) -> None:
    format, n, k, group, asymmetric, scale_dtype = case
    c = Case(np.random.default_rng(5), format, n, k, group, asymmetric, scale_dtype)
    for index in {0, n // 2, n - 1}:
        out = np.full(k, np.nan, dtype=np.float32)
        assert library.load().handle.tn_test_embedding(*c.arguments(), index, out.ctypes.data) == 0
        np.testing.assert_allclose(out, c.exact[index], rtol=1e-6)


def function(which: int, x: Array, native: library.NativeLibrary | None = None) -> Array:
    out = np.zeros_like(x)
    (native or library.load()).handle.tn_test_function(which, x.ctypes.data, x.size, out.ctypes.data)
    return out


def check_functions(native: library.NativeLibrary) -> None:
    import math

    x = np.linspace(-87, 88, 16 * 4000).astype(np.float32)
    np.testing.assert_allclose(function(0, x, native), np.exp(x.astype(np.float64)), rtol=3e-7)
    assert np.all(function(0, np.full(16, -1e30, np.float32), native) == 0)
    x = np.concatenate([np.linspace(-6, 6, 16 * 2000), np.geomspace(1e-8, 1, 160)]).astype(np.float32)
    erf = np.array([math.erf(v) for v in x.astype(np.float64)])
    np.testing.assert_allclose(function(1, x, native), erf, rtol=1e-6)
    x = np.linspace(-20, 20, 16 * 2000).astype(np.float32)
    d = x.astype(np.float64)
    silu = d / (1 + np.exp(-d))
    np.testing.assert_allclose(function(2, x, native), silu, rtol=2e-6)
    gelu = 0.5 * d * (1 + np.array([math.erf(v / math.sqrt(2)) for v in d]))
    np.testing.assert_allclose(function(3, x, native), gelu, rtol=1e-6, atol=1e-6)
    tanh = 0.5 * d * (1 + np.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3)))
    np.testing.assert_allclose(function(4, x, native), tanh, rtol=1e-5, atol=1e-6)


def test_functions() -> None:
    check_functions(library.load())


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_other_processors(arch: str) -> None:
    """The same sources without AVX-512 give the same results."""
    import platform

    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    native = library.load(arch)
    assert native.isa == {"x86-64-v2": "portable", "x86-64-v3": "avx2"}[arch]
    check_functions(native)
    rng = np.random.default_rng(11)
    for case in cases()[1::2]:
        format, n, k, group, asymmetric, scale_dtype = case
        c = Case(rng, format, n, k, group, asymmetric, scale_dtype)
        for mode, rows in ((GEMV, 1), (GEMV, 5), (GEMM_FLOAT, 7)):
            x = rng.standard_normal((rows, k)).astype(np.float32)
            y, bound = c.expected(x)
            assert np.all(np.abs(c.run(mode, x, native) - y) <= 2e-6 * bound + 1e-6), (case, mode)


def test_bad_arguments_are_refused() -> None:
    weight = np.zeros((4, 6), np.int8)
    with pytest.raises(BadInputError, match="one scale for each"):
        pack_module("m", "int8", weight, scale=np.ones(3, np.float32))
    with pytest.raises(BadInputError, match="not how float32 is stored"):
        pack_module("m", "float32", weight)
    with pytest.raises(BadInputError, match="groups divide"):
        pack_module("m", "int4", weight.view(np.uint8), scale=np.ones((4, 5), np.float32))
    with pytest.raises(BadInputError, match="biases"):
        pack_module("m", "float32", weight.astype(np.float32), bias=np.ones(3, np.float32))


def test_a_norm_is_padded() -> None:
    packed = pack_vector("norm", np.arange(1, 21))["norm.weight"]
    assert packed.dtype == np.float32 and packed.size == 32 and packed[:20].tolist() == list(range(1, 21))
    assert not packed[20:].any()


def test_meta_is_closed() -> None:
    with pytest.raises(ValueError, match="extra"):
        PackedModule.model_validate({"format": "int8", "n": 1, "k": 1, "colour": "red"})


def test_library_info(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    found = library.load()
    assert found.path.is_file() and found.build_key
    assert isinstance(found.handle, ctypes.CDLL)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in (library.find_problem() or "")
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: it is broken' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TRTLLM_CLI_CACHE", str(tmp_path / "cache"))
    assert "it is broken" in (library.find_problem() or "")
    assert not list((tmp_path / "cache").rglob("*.so"))
