"""The Hessian product of the native library against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.native import gram, library

pytestmark = pytest.mark.skipif(
    library.find_problem() is not None or not gram.available(), reason="no bfloat16 products on this processor"
)


def activations(seed: int, m: int, k: int) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """bfloat16 bits [m, k] and their values."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((m, k)) * rng.lognormal(0, 1, k)).astype(np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(
    "m,k", [(1, 1), (2, 16), (3, 17), (64, 47), (1023, 48), (1024, 100), (1025, 96), (2500, 150), (7, 300)]
)
def test_sums_match_float64_for_any_number_of_threads(m: int, k: int) -> None:
    bits, x = activations(m + k, m, k)
    first = np.zeros((k, k), np.float32)
    gram.accumulate(first, bits, 1)
    bound = np.abs(x).T @ np.abs(x)
    assert np.all(np.abs(first - x.T @ x) <= 1e-6 * np.sqrt(m) * bound)
    assert np.array_equal(first, first.T)
    for threads in (2, 3, 5):
        other = np.zeros((k, k), np.float32)
        gram.accumulate(other, bits, threads)
        assert np.array_equal(first, other), threads


def test_calls_add_up() -> None:
    bits, x = activations(0, 600, 80)
    total = np.zeros((80, 80), np.float32)
    for part in (bits[:200], bits[200:201], bits[201:]):
        gram.accumulate(total, part, 2)
    np.testing.assert_allclose(total, x.T @ x, rtol=1e-4, atol=1e-4 * np.abs(x.T @ x).max())
    gram.accumulate(total, bits[:0], 2)
    assert np.array_equal(total, total.T)


@pytest.mark.parametrize(
    "hessian,x",
    [
        (np.zeros((4, 4), np.float64), np.zeros((2, 4), np.uint16)),
        (np.zeros((4, 5), np.float32), np.zeros((2, 4), np.uint16)),
        (np.zeros((4, 4), np.float32), np.zeros((2, 5), np.uint16)),
        (np.zeros((4, 4), np.float32), np.zeros((2, 4), np.float32)),
        (np.zeros((4, 4), np.float32), np.zeros((4, 2), np.uint16).T),
    ],
)
def test_other_shapes_and_types_are_refused(hessian: Any, x: Any) -> None:
    with pytest.raises(BadInputError) as caught:
        gram.accumulate(hessian, x, 1)
    assert caught.value.code == "GRAM_SHAPE"
