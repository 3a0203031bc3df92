"""Gram matrices x^T x of calibration activations, the Hessians of GPTQ and AWQ (up to their factor), on the CPU.

About twice as fast as a bfloat16 matrix product of torch: only one triangle is computed, and sums stay in float32
where torch rounds the product to bfloat16.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.errors import BadInputError, UnsupportedError
from trtllm_cli.ops.native import library


def available() -> bool:
    """Whether the native library can be had (compiled if need be) and this processor has bfloat16 products."""
    return library.find_problem() is None and library.load().isa == "avx512bf16"


def accumulate(hessian: NDArray[np.float32], x: NDArray[np.uint16], threads: int | None = None) -> None:
    """``hessian`` [K, K] += x^T x for ``x`` [M, K], bfloat16 bit patterns; both C-contiguous.

    Sums are float32; ``hessian`` must be symmetric (zeros, or what earlier calls left) and stays exactly so. The bits
    do not depend on ``threads`` (default: the processors this process may use). Raises BadInputError for other shapes
    or types, UnsupportedError where :func:`available` is false.
    """
    native = library.load()
    if native.isa != "avx512bf16":
        raise UnsupportedError(
            "NO_BF16_PRODUCTS", f"this processor has no bfloat16 products ({native.isa})", "compute x^T x with torch"
        )
    k = hessian.shape[0]
    if hessian.shape != (k, k) or hessian.dtype != np.float32 or not hessian.flags.c_contiguous:
        raise BadInputError(
            "GRAM_SHAPE", f"the sum is {hessian.dtype} {hessian.shape}, not contiguous float32 [K, K]", ""
        )
    if x.ndim != 2 or x.shape[1] != k or x.dtype != np.uint16 or not x.flags.c_contiguous:
        raise BadInputError(
            "GRAM_SHAPE", f"the activations are {x.dtype} {x.shape}, not contiguous bfloat16 bits [M, {k}]", ""
        )
    status = native.handle.tn_gram(
        hessian.ctypes.data, k, x.ctypes.data, x.shape[0], threads or len(os.sched_getaffinity(0))
    )
    if status:
        raise RuntimeError(f"native library: {native.handle.tn_message().decode()}")
