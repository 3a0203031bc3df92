"""Where a plan's weights come from: bits and their type, one tensor at a time.

The builder does not copy weights, so arrays handed to it must live until the build ends. Memory-mapped checkpoint
tensors of the right type therefore cost no memory of their own; other types are converted here, in bounded pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import Dtype
from trtllm_cli.artifacts.tensors import CODES, TensorStore, TensorWriter
from trtllm_cli.errors import BadInputError, UnsupportedError

_CODES: Mapping[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PIECE = 1 << 22

#: numpy type that holds the bits of each compute type
BITS: Mapping[Dtype, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class Weight(NamedTuple):
    """``bits``: the tensor as float32, float16, or bfloat16 held as uint16; ``dtype`` says which."""

    bits: NDArray[Any]
    dtype: Dtype


#: canonical tensor name -> its weight; raises BadInputError when there is no such tensor
WeightSource = Callable[[str], Weight]


def stored(store: TensorStore) -> WeightSource:
    """The weights of a checkpoint's tensor files, memory-mapped."""

    def weight(name: str) -> Weight:
        if name not in store:
            raise BadInputError(
                "TENSOR_MISSING",
                f"{store.directory} has no tensor {name}, which its model spec requires",
                "trtllm-cli verify the checkpoint, then repeat `trtllm-cli convert`",
            )
        code = store.entry(name).dtype
        if code not in _CODES:
            raise UnsupportedError(
                "DTYPE_UNSUPPORTED",
                f"tensor {name} of {store.directory} has type {code}; TensorRT builds take F32, F16 and BF16",
                "repeat `trtllm-cli convert` with --dtype bfloat16",
            )
        return Weight(store.array(name), _CODES[code])

    return weight


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], weights: WeightSource, dtype: Dtype) -> int:
    """Write the tensors ``shapes`` names as ``dtype``, one at a time, to a safetensors file; the bytes of all.

    Raises BadInputError for a missing or misshapen tensor, and as :func:`cast`.
    """
    with TensorWriter(path, {name: (CODES[dtype], shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            writer.write(name, cast(checked(weights(name), name, shape), dtype, name))
    return sum(math.prod(shape) for shape in shapes.values()) * int(np.dtype(BITS[dtype]).itemsize)


def checked(weight: Weight, name: str, shape: tuple[int, ...]) -> Weight:
    """The weight itself. Raises BadInputError where it has not the shape of the model's tensor."""
    if weight.bits.shape != shape:
        raise BadInputError(
            "TENSOR_SHAPE",
            f"tensor {name} has shape {tuple(weight.bits.shape)}, the model spec says {shape}",
            "repeat `trtllm-cli convert`",
        )
    return weight


def cast(weight: Weight, dtype: Dtype, name: str) -> NDArray[Any]:
    """The weight's bits as ``dtype``, contiguous and aligned; unchanged (still a map) when it has that type already.

    Raises BadInputError when a finite value does not fit ``dtype``.
    """
    if weight.dtype == dtype:
        return np.require(weight.bits, requirements=["C", "A"])
    source = np.ascontiguousarray(weight.bits).reshape(-1)
    result = np.empty(source.shape, BITS[dtype])
    for begin in range(0, source.size, _PIECE):
        piece = to_float32(source[begin : begin + _PIECE], weight.dtype)
        with np.errstate(over="ignore"):
            converted = _from_float32(piece, dtype)
            overflow = np.isinf(to_float32(converted, dtype)) & np.isfinite(piece)
        if overflow.any():
            largest = float(np.abs(piece[overflow]).max())
            raise BadInputError(
                "WEIGHT_OVERFLOW",
                f"tensor {name} holds {largest:.6g}, which does not fit {dtype}",
                "add --dtype bfloat16, or --dtype float32",
            )
        result[begin : begin + _PIECE] = converted
    return result.reshape(weight.bits.shape)


def from_float32(values: NDArray[np.float32], dtype: Dtype) -> NDArray[Any]:
    """Small constants (rotary tables, epsilons) as bits of ``dtype``."""
    return np.ascontiguousarray(_from_float32(np.asarray(values, np.float32), dtype))


def to_float32(bits: NDArray[Any], dtype: Dtype) -> NDArray[np.float32]:
    """What bits of ``dtype`` (see :data:`BITS`) stand for."""
    if dtype == "bfloat16":
        wide: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    return bits.astype(np.float32)


def _from_float32(values: NDArray[np.float32], dtype: Dtype) -> NDArray[Any]:
    if dtype != "bfloat16":
        narrow: NDArray[Any] = values.astype(BITS[dtype])
        return narrow
    raw = np.ascontiguousarray(values).view(np.uint32)
    # round to nearest, ties to even, on the upper half; a NaN must stay one, so its quiet bit is set instead
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (raw >> np.uint32(16)) | np.uint32(0x40)
    bits: NDArray[Any] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return bits
