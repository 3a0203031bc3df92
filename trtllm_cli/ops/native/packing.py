"""Weights packed for the native CPU kernels.

Sixteen output rows are interleaved so that one vector register holds the same input element of sixteen outputs and no
kernel ever reduces across lanes. With ``P = ceil(N / 16)`` panels (missing rows are zero), every packed tensor is a
FLAT array whose bytes are a multiple of 64, read as

========  ==============================================  ====================================================
format    ``packed``                                      ``scale`` / ``zero``
========  ==============================================  ====================================================
float32   float32 [P, K, 16]
bfloat16  uint16 bit patterns [P, ceil(K/2), 16, 2]
float16   uint16 bit patterns [P, K, 16]
int8      int8 [P, K, 16]                                 float32 [P * 16]
int8_dot  uint8 [P, ceil(K/4), 16, 4], 128 higher than    float32 [P * 16]
          the weight (so that missing ones are 128)
fp8       E4M3 bytes [P, ceil(K/2), 16, 2]                float32 [P * 16]
int4      uint32 [P, G, ceil(g/8), 16], eight nibbles of  float32 or float16 [P, G, 16]; zero uint8 [P, G, 16];
          eight consecutive k, the first lowest           w = (q - zero) * scale, zero 8 when absent
========  ==============================================  ====================================================

``int8_dot`` is what products with int8 activations read, four inputs a step. ``bias`` is float32 [P * 16]. ``order``
int32 [K], of an int4 module whose groups were not consecutive: packed input i is input order[i] of the model.

The build stage calls :func:`pack_module` for every linear and embedding module and :func:`pack_vector` for every norm,
one at a time, and writes the tensors into one file; :func:`packed_layout` tells their names, dtypes and sizes ahead of
time. With the file's data section 64-byte aligned the tensors are memory-mapped and used in place.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from trtllm_cli.errors import BadInputError

PackedFormat = Literal["float32", "bfloat16", "float16", "int8", "int4", "int8_dot", "fp8"]
Array = NDArray[Any]

LANES = 16
_ALIGN = 64
#: panels handled at a time where packing needs temporaries, which bounds memory for huge vocabularies
_BLOCK = 256


class PackedModule(BaseModel):
    """What one packed module is: enough to size, check and run it. ``group_size`` counts input elements (int4).

    ``activation``: its input is quantized to that type, with the static ``input_scale`` or, where that is None, each
    row with its own. ``order`` names the tensor with the order of its inputs, which modules may share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: PackedFormat
    n: int = Field(gt=0)
    k: int = Field(gt=0)
    group_size: int | None = None
    scale_dtype: Literal["float32", "float16"] | None = None
    has_zero: bool = False
    has_bias: bool = False
    activation: Literal["int8", "fp8"] | None = None
    input_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    order: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PackedModule:
        if (self.activation == "int8") != (self.format == "int8_dot"):
            raise ValueError(f"{self.format} weights do not take {self.activation or 'plain'} activations")
        if self.activation == "fp8" and self.format != "fp8":
            raise ValueError(f"{self.format} weights do not take fp8 activations")
        if self.input_scale is not None and self.activation is None:
            raise ValueError("a static scale without quantized activations")
        if self.format == "int4" and (not self.group_size or self.k % self.group_size):
            raise ValueError(f"groups of {self.group_size} do not divide {self.k} inputs")
        if self.order is not None and self.format != "int4":
            raise ValueError(f"{self.format} weights have no order of inputs")
        return self

    @property
    def panels(self) -> int:
        return -(-self.n // LANES)

    @property
    def groups(self) -> int:
        return self.k // self.group_size if self.group_size else 1


def padded(count: int, itemsize: int) -> int:
    """``count`` elements rounded up so that their bytes are a multiple of 64: the size of every packed tensor."""
    per = _ALIGN // itemsize
    return -(-count // per) * per


def packed_layout(name: str, module: PackedModule) -> dict[str, tuple[np.dtype[Any], int]]:
    """Tensor name -> (dtype, elements) of everything :func:`pack_module` returns for such a module."""
    p, k = module.panels, module.k
    if module.format == "int4":
        assert module.group_size is not None
        words = p * module.groups * -(-module.group_size // 8) * LANES
        packed: tuple[np.dtype[Any], int] = (np.dtype(np.uint32), words)
    elif module.format == "bfloat16":
        packed = (np.dtype(np.uint16), p * -(-k // 2) * 2 * LANES)
    elif module.format == "int8_dot":
        packed = (np.dtype(np.uint8), p * -(-k // 4) * 4 * LANES)
    elif module.format == "fp8":
        packed = (np.dtype(np.uint8), p * -(-k // 2) * 2 * LANES)
    else:
        kinds: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.uint16, "int8": np.int8}
        packed = (np.dtype(kinds[module.format]), p * k * LANES)
    found: dict[str, tuple[np.dtype[Any], int]] = {f"{name}.packed": packed}
    if module.scale_dtype is not None:
        found[f"{name}.scale"] = (np.dtype(module.scale_dtype), p * module.groups * LANES)
    if module.has_zero:
        found[f"{name}.zero"] = (np.dtype(np.uint8), p * module.groups * LANES)
    if module.has_bias:
        found[f"{name}.bias"] = (np.dtype(np.float32), p * LANES)
    if module.order is not None:
        found[module.order] = (np.dtype(np.int32), k)
    return {key: (dtype, padded(count, dtype.itemsize)) for key, (dtype, count) in found.items()}


def pack_vector(name: str, values: Array) -> dict[str, Array]:
    """A norm's weight [length] -> ``{name}.weight`` float32, zero-padded to a multiple of 16."""
    return {f"{name}.weight": _flat(np.ascontiguousarray(values, dtype=np.float32))}


def pack_order(order: Array) -> Array:
    """Where each packed input comes from, [K] -> flat int32."""
    return _flat(np.ascontiguousarray(order, dtype=np.int32))


def kv_scale_names(layer: int) -> tuple[str, str]:
    """The tensors with the scales of a layer's keys and values in an eight-bit cache, in checkpoints and engines."""
    return f"layers.{layer}.attn.k_scale", f"layers.{layer}.attn.v_scale"


def pack_kv_scales(scales: Array) -> Array:
    """Scales of keys or values [kv_heads] -> flat float32."""
    return _flat(np.ascontiguousarray(scales, dtype=np.float32))


def pack_module(
    name: str,
    format: PackedFormat,
    weight: Array,
    *,
    scale: Array | None = None,
    zero: Array | None = None,
    bias: Array | None = None,
    activation: Literal["int8", "fp8"] | None = None,
    input_scale: float | None = None,
    order: str | None = None,
) -> tuple[PackedModule, dict[str, Array]]:
    """Pack one linear or embedding module.

    ``weight``: float32 [N, K]; uint16 bit patterns [N, K] for bfloat16 and float16 (a numpy float16 array also does);
    int8 [N, K] (also for int8_dot) or E4M3 bytes uint8 [N, K] with ``scale`` [N] or [1]; for int4 uint8 [N, K/2], two
    values a byte, the even element in the low nibble, with ``scale`` float16 or float32 [N, K/g] and optionally
    ``zero`` uint8 [N, K/g]. ``bias`` is [N]. The rest is described, see :class:`PackedModule`.

    Returns the description and the flat tensors by name (without that of the order). Raises BadInputError where shapes
    or dtypes do not fit.
    """
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise _bad(name, f"has weight shape {list(weight.shape)}, not [outputs, inputs]")
    n, k = int(weight.shape[0]), int(weight.shape[1]) * (2 if format == "int4" else 1)
    group: int | None = None
    if format == "int4":
        if scale is None or scale.ndim != 2 or scale.shape[0] != n or scale.shape[1] == 0 or k % scale.shape[1]:
            got = None if scale is None else list(scale.shape)
            raise _bad(name, f"needs a scale [{n}, groups] whose groups divide {k} inputs, not {got}")
        group = k // int(scale.shape[1])
        if zero is not None and (zero.shape != scale.shape or zero.dtype != np.uint8):
            raise _bad(name, f"has a zero point {zero.dtype} {list(zero.shape)}, not uint8 {list(scale.shape)}")
    elif format in ("int8", "int8_dot", "fp8"):
        if scale is None or scale.size not in (1, n):
            raise _bad(name, f"needs one scale for each of its {n} outputs, or one for all")
        scale = np.broadcast_to(np.asarray(scale, dtype=np.float32).reshape(-1), (n,))
    elif scale is not None or zero is not None:
        raise _bad(name, f"is {format} and takes neither scale nor zero point")
    if bias is not None and bias.size != n:
        raise _bad(name, f"has {bias.size} biases for {n} outputs")
    if scale is not None and scale.dtype != np.float16:
        scale = scale.astype(np.float32)
    tensors = {f"{name}.packed": _pack_weight(name, format, weight, group)}
    if scale is not None:
        tensors[f"{name}.scale"] = _lanes(scale.reshape(n, -1))
    if zero is not None:
        tensors[f"{name}.zero"] = _lanes(zero)
    if bias is not None:
        tensors[f"{name}.bias"] = _lanes(np.asarray(bias, dtype=np.float32).reshape(n, 1))
    described = PackedModule(
        format=format,
        n=n,
        k=k,
        group_size=group,
        scale_dtype=None if scale is None else ("float16" if scale.dtype == np.float16 else "float32"),
        has_zero=zero is not None,
        has_bias=bias is not None,
        activation=activation,
        input_scale=input_scale,
        order=order,
    )
    return described, tensors


def _bad(name: str, what: str) -> BadInputError:
    return BadInputError("PACKING_SHAPE", f"module {name} {what}", "convert or quantize the checkpoint again")


def _flat(values: Array) -> Array:
    """One dimension, zero-padded to a multiple of 64 bytes; no copy where nothing is missing."""
    flat = values.reshape(-1)
    missing = padded(flat.size, flat.itemsize) - flat.size
    return np.concatenate([flat, np.zeros(missing, dtype=flat.dtype)]) if missing else flat


def _lanes(values: Array) -> Array:
    """[N, G] -> flat [P, G, 16]."""
    n, groups = values.shape
    panels = -(-n // LANES)
    out = np.zeros((panels, groups, LANES), dtype=values.dtype)
    for lane in range(LANES):
        rows = values[lane::LANES]
        out[: rows.shape[0], :, lane] = rows
    return _flat(out)


def _pack_weight(name: str, format: PackedFormat, weight: Array, group: int | None) -> Array:
    expected: dict[str, tuple[type[np.generic], ...]] = {
        "float32": (np.float32,),
        "bfloat16": (np.uint16,),
        "float16": (np.uint16, np.float16),
        "int8": (np.int8,),
        "int4": (np.uint8,),
        "int8_dot": (np.int8,),
        "fp8": (np.uint8,),
    }
    if weight.dtype not in [np.dtype(d) for d in expected[format]]:
        raise _bad(name, f"has a {weight.dtype} weight, which is not how {format} is stored")
    if format == "float16":
        weight = weight.view(np.uint16)
    n = weight.shape[0]
    panels = -(-n // LANES)
    if format == "int4":
        assert group is not None
        return _pack_nibbles(weight, panels, group)
    if format in ("int8_dot", "fp8"):
        return _pack_bytes(name, format, weight, panels)
    inputs = weight.shape[1]
    if format == "bfloat16":
        pairs = -(-inputs // 2)
        out = np.zeros((panels, pairs, LANES, 2), dtype=np.uint16)
        for lane in range(LANES):
            rows = weight[lane::LANES]
            out[: rows.shape[0], :, lane, 0] = rows[:, 0::2]
            out[: rows.shape[0], : inputs // 2, lane, 1] = rows[:, 1::2]
        return _flat(out)
    plain = np.zeros((panels, inputs, LANES), dtype=weight.dtype)
    full = n // LANES
    # by block: numpy's transposing copy stays inside the caches
    for first in range(0, full, _BLOCK):
        last = min(full, first + _BLOCK)
        block = weight[first * LANES : last * LANES].reshape(last - first, LANES, inputs)
        plain[first:last] = block.transpose(0, 2, 1)
    if n % LANES:
        plain[full, :, : n % LANES] = weight[full * LANES :].T
    return _flat(plain)


def _pack_bytes(name: str, format: PackedFormat, weight: Array, panels: int) -> Array:
    """int8 or E4M3 [N, K] -> flat uint8 [P, ceil(K/w), 16, w], w bytes of consecutive inputs a word."""
    wide = 4 if format == "int8_dot" else 2
    # int8 is moved up by 128, which in two's complement turns the highest bit over
    flip = 0x80 if format == "int8_dot" else 0
    k = weight.shape[1]
    steps = -(-k // wide)
    out = np.empty((panels, steps, LANES), dtype=np.dtype(f"<u{wide}"))
    for first in range(0, panels, _BLOCK):
        rows = weight[first * LANES : (first + _BLOCK) * LANES].view(np.uint8)
        if format == "fp8" and bool(((rows & 0x7F) == 0x7F).any()):
            raise _bad(name, "has a weight that is not a number")
        count = -(-rows.shape[0] // LANES)
        block = np.full((count * LANES, steps * wide), flip, dtype=np.uint8)
        block[: rows.shape[0], :k] = rows ^ np.uint8(flip)
        words = block.view(out.dtype).reshape(count, LANES, steps)
        out[first : first + count] = words.transpose(0, 2, 1)
    return _flat(out.view(np.uint8))


def _pack_nibbles(weight: Array, panels: int, group: int) -> Array:
    """uint8 [N, K/2] -> flat uint32 [P, G, ceil(g/8), 16]."""
    k = weight.shape[1] * 2
    words = -(-group // 8)
    groups = k // group
    out = np.zeros((panels, groups * words, LANES), dtype=np.uint32)
    for first in range(0, panels, _BLOCK):
        rows = np.ascontiguousarray(weight[first * LANES : (first + _BLOCK) * LANES])
        if group % 8 == 0:
            # eight nibbles of consecutive inputs are already one little-endian word
            dwords = rows.view(np.dtype("<u4"))
        else:
            nibbles = np.zeros((rows.shape[0], groups, words * 8), dtype=np.uint8)
            values = np.stack([rows & 15, rows >> 4], axis=2).reshape(rows.shape[0], groups, group)
            nibbles[:, :, :group] = values
            two = nibbles[:, :, 0::2] | (nibbles[:, :, 1::2] << 4)
            dwords = np.ascontiguousarray(two).view(np.dtype("<u4")).reshape(rows.shape[0], groups * words)
        for lane in range(LANES):
            part = dwords[lane::LANES]
            out[first : first + part.shape[0], :, lane] = part
    return _flat(out)
