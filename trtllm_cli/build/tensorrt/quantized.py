"""Quantized modules of a checkpoint as TensorRT takes them, and the refusal of those it does not take.

A network holds a quantized weight as a constant of its own type followed by a dequantization, which the builder melts
into the product. Measured on TensorRT-RTX 1.6.1: int8 with a scale a row, int4 in consecutive groups of 16 or more
(whole rows too, scales of either sign) and fp8 are taken as they are; a dequantization with zero points other than 0
is refused by TensorRT itself; the accumulator of a product of quantized operands is written in the compute type before
the scales of the rows multiply it, which overflows float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import ActivationScheme, Dtype, LayerQuantization, QuantizationRecord, WeightScheme
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.build.tensorrt.weights import from_float32, to_float32
from trtllm_cli.errors import BadInputError, UnsupportedError

#: what each type of weight is stored as: (safetensors codes, inputs a stored element holds)
_STORED: Mapping[str, tuple[str, int]] = {"int8": ("I8", 1), "fp8": ("F8_E4M3", 1), "int4": ("U8", 2)}
_AGAIN = "quantize the checkpoint again"


@dataclass(frozen=True)
class QuantizedModule:
    """One module's weight in TensorRT's layout.

    ``values`` are the bits of the constant: int8 [N, K]; E4M3 as uint8 [N, K]; int4 as uint8 [N, K/2], two's
    complement, element 0 in the low nibble. ``scale`` float32: [] for one of the tensor, [N] of rows, [N, G] of groups
    of K/G consecutive inputs (equal ones where the checkpoint has one a row). ``order`` int32 [K] names the input that
    each column multiplies (None: its own). ``input_scale`` is the static scale of the input, None where each token has
    its own or nothing is quantized.
    """

    module: str
    scheme: WeightScheme
    activation: ActivationScheme | None
    values: NDArray[Any]
    scale: NDArray[np.float32]
    order: NDArray[np.int32] | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.values.shape[0], self.values.shape[1] * _STORED[self.scheme.type][1]


#: canonical module -> its quantized weight, None for a module that is not quantized
QuantizedSource = Callable[[str], "QuantizedModule | None"]


def nothing(module: str) -> QuantizedModule | None:
    """The source of a checkpoint that is not quantized."""
    return None


class Quantized(NamedTuple):
    """What a checkpoint records of its quantization, and the tensors."""

    record: QuantizationRecord
    source: QuantizedSource


def check(record: QuantizationRecord, dtype: Dtype, path: Path) -> None:
    """Refuse, before any work, what TensorRT does not take or gets wrong. Raises UnsupportedError with the reason."""
    if record.kv_cache is not None:
        raise UnsupportedError(
            "TENSORRT_KV_QUANTIZED",
            f"{path} has an {record.kv_cache.type} cache, and TensorRT's cache layer keeps only float32, float16 and"
            " bfloat16",
            "repeat `trtllm-cli quantize` without --kv-cache, or use --backend cpu",
        )
    asymmetric = [layer.module for layer in record.layers if not layer.scheme.symmetric]
    if asymmetric:
        raise UnsupportedError(
            "TENSORRT_ASYMMETRIC",
            f"{_named(asymmetric)} of {path} have zero points, and TensorRT refuses a dequantization whose zero points"
            " are not all 0",
            "repeat `trtllm-cli quantize` with --symmetric, or use --backend cpu",
        )
    alone = [layer.module for layer in record.layers if layer.scheme.type == "fp8" and layer.activation is None]
    if alone:
        raise UnsupportedError(
            "TENSORRT_FP8_WEIGHTS",
            f"{_named(alone)} of {path} have fp8 weights and unquantized inputs, and TensorRT turns such weights into"
            f" {dtype} while it builds: nothing would be gained",
            "repeat `trtllm-cli quantize` with --activations token, or build the checkpoint it was quantized from",
        )
    overflowing = [layer for layer in record.layers if dtype == "float16" and _overflows(layer)]
    if overflowing:
        kind = overflowing[0].scheme.type
        raise UnsupportedError(
            "TENSORRT_FLOAT16_OVERFLOW",
            f"{_named([layer.module for layer in overflowing])} of {path} multiply {kind} by {kind}, whose sums"
            " TensorRT writes as float16 before it applies the scales: they overflow to infinity (measured on a GPU)",
            "add --dtype bfloat16",
        )


def _overflows(layer: LayerQuantization) -> bool:
    """Whether a product's sums are written before all of its scales are applied.

    The single scales of an fp8 weight and its input go into the product itself.
    """
    if layer.activation is None:
        return False
    single = layer.scheme.granularity == "tensor" and layer.activation.granularity == "tensor"
    return not (layer.scheme.type == "fp8" and single)


def _named(modules: list[str]) -> str:
    rest = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
    return modules[0] + rest


def stored(store: TensorStore, layers: Iterable[LayerQuantization]) -> QuantizedSource:
    """The quantized modules of a checkpoint's tensor files: 8-bit weights as memory maps, int4 rewritten in memory.

    The source raises BadInputError for tensors that are missing or do not fit the module's scheme.
    """
    known = {layer.module: layer for layer in layers}

    # a module is asked for several times in a row; whoever uses it keeps it
    @functools.lru_cache(maxsize=8)
    def quantized(module: str) -> QuantizedModule | None:
        return _read(store, known[module]) if module in known else None

    return quantized


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def merged(parts: Sequence[QuantizedModule]) -> QuantizedModule | None:
    """One module whose outputs are those of all, in turn; None where they are not stored alike.

    Only of weights: products of quantized inputs are merged by the builder itself.
    """
    first = parts[0]
    alike = all(
        part.activation is None
        and part.scheme.type == first.scheme.type
        and part.scale.ndim == first.scale.ndim > 0
        and part.scale.shape[1:] == first.scale.shape[1:]
        and part.shape[1] == first.shape[1]
        and _same(part.order, first.order)
        for part in parts
    )
    if not alike or len(parts) == 1:
        return None
    return replace(
        first,
        module="+".join(part.module for part in parts),
        values=np.concatenate([part.values for part in parts]),
        scale=np.concatenate([part.scale for part in parts]),
    )


def _read(store: TensorStore, layer: LayerQuantization) -> QuantizedModule:
    module, scheme = layer.module, layer.scheme
    code, packed = _STORED[scheme.type]
    values = _tensor(store, f"{module}.weight", (code,))
    if values.ndim != 2:
        raise _wrong(f"{module}.weight", values, "a matrix")
    outputs, inputs = values.shape[0], values.shape[1] * packed
    scale = _tensor(store, f"{module}.weight_scale", ("F32", "F16")).astype(np.float32)
    order = None
    if scheme.type == "int4":
        if scale.ndim != 2 or scale.shape[0] != outputs or not scale.shape[1] or inputs % scale.shape[1]:
            raise _wrong(f"{module}.weight_scale", scale, f"scales of groups of {outputs} rows of {inputs} inputs")
        if scheme.group_index:
            order = _order(_tensor(store, f"{module}.weight_group", ("I32",)), inputs, scale.shape[1], module)
            values = _permuted(values, order)
        if scale.shape[1] == 1:
            scale = split_rows(scale, inputs)
        # codes 0..15 around 8 -> two's complement: the upper bit of each nibble flips
        values = np.bitwise_xor(values, np.uint8(0x88))
    elif scheme.granularity == "tensor":
        if scale.shape != (1,):
            raise _wrong(f"{module}.weight_scale", scale, "one scale")
        scale = scale.reshape(())
    elif scale.shape != (outputs,):
        raise _wrong(f"{module}.weight_scale", scale, f"one scale for each of {outputs} rows")
    input_scale = None
    if layer.activation is not None and layer.activation.granularity == "tensor":
        single = _tensor(store, f"{module}.input_scale", ("F32",))
        if single.shape != (1,) or not 0 < float(single[0]) < np.inf:
            raise _wrong(f"{module}.input_scale", single, "one positive scale")
        input_scale = float(single[0])
    return QuantizedModule(module, scheme, layer.activation, values, scale, order, input_scale)


def _tensor(store: TensorStore, name: str, codes: tuple[str, ...]) -> NDArray[Any]:
    if name not in store:
        raise BadInputError(
            "TENSOR_MISSING",
            f"{store.directory} has no tensor {name}, which its quantization record promises",
            f"trtllm-cli verify the checkpoint, then {_AGAIN}",
        )
    if store.entry(name).dtype not in codes:
        raise BadInputError(
            "TENSOR_TYPE",
            f"tensor {name} of {store.directory} has type {store.entry(name).dtype}, its quantization record says"
            f" {' or '.join(codes)}",
            _AGAIN,
        )
    return store.array(name)


def _wrong(name: str, found: NDArray[Any], expected: str) -> BadInputError:
    return BadInputError("TENSOR_SHAPE", f"tensor {name} has shape {found.shape}, expected {expected}", _AGAIN)


def _order(group: NDArray[Any], inputs: int, groups: int, module: str) -> NDArray[np.int32]:
    """The inputs of group 0 in their order, then those of group 1, and so on; int32 [K]."""
    counts = np.bincount(group, minlength=groups) if group.shape == (inputs,) and group.min() >= 0 else np.zeros(1)
    if len(counts) != groups or counts.sum() != inputs:
        raise BadInputError("TENSOR_SHAPE", f"{module}: weight_group does not name a group for each input", _AGAIN)
    if (counts != inputs // groups).any():
        raise UnsupportedError(
            "TENSORRT_GROUPS_UNEVEN",
            f"{module} has groups of {counts.min()} to {counts.max()} inputs, and TensorRT takes groups of one size",
            "repeat `trtllm-cli quantize` with --act-order static, or use --backend cpu",
        )
    return np.argsort(group, kind="stable").astype(np.int32)


def split_rows(scale: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    """The one scale of a row for each of several groups: kernels that read int4 take no single group."""
    size = next((size for size in (128, 64, 32, 16) if inputs % size == 0 and inputs > size), inputs)
    return np.repeat(scale, inputs // size, axis=1)


def _permuted(packed: NDArray[Any], order: NDArray[np.int32]) -> NDArray[Any]:
    """uint8 [N, K/2] with its K columns in another order."""
    values = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    values[:, 0::2], values[:, 1::2] = packed & 0xF, packed >> 4
    values = values[:, order]
    repacked: NDArray[Any] = values[:, 0::2] | values[:, 1::2] << 4
    return repacked


#: rows that are turned at once: few enough for a processor's cache
_BLOCK = 64


def turned(packed: NDArray[Any]) -> NDArray[Any]:
    """int4 numbers [N, K], two a byte, as [K, N]. N must be even."""
    outputs = packed.shape[0] // 2
    found = np.empty((packed.shape[1] * 2, outputs), np.uint8)
    for begin in range(0, outputs, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        above, below = packed[0::2][block], packed[1::2][block]
        found[0::2, block] = ((above & 0xF) | (below << 4)).T
        found[1::2, block] = ((above >> 4) | (below & 0xF0)).T
    return found


def scale_bits(scale: NDArray[np.float32], dtype: Dtype, module: str) -> NDArray[Any]:
    """Scales in the compute type, which TensorRT demands. Raises BadInputError where one does not fit it."""
    bits = from_float32(scale, dtype).reshape(scale.shape)
    back = to_float32(bits, dtype)
    lost = (back == 0) & (scale != 0) | ~np.isfinite(back)
    if lost.any():
        raise BadInputError(
            "SCALE_RANGE",
            f"{module} has a scale of {float(scale[lost].flat[0]):.3g}, which does not fit {dtype}",
            "add --dtype bfloat16, or --dtype float32",
        )
    return bits
