"""The parameters of whole decoder layers as the kernel's C interface has them, and the checks of the operator.

What the launcher checks itself (sizes, strides, the GPU) it refuses with a sentence of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.ops.cuda import library
from trtllm_cli.ops.cuda.weight_only_packing import DEPTH, ROW_PADDING, STRIPE, WEIGHT_BYTES, PackedWeight

_i64, _i32, _f32, _ptr = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
_TYPES = {"int4": library.INT4, "int8": library.INT8, "fp8": library.FLOAT8_E4M3}


class DecodeLayerRow(ctypes.Structure):
    """trtllm_decode_layer_row: one layer in the table that lies in device memory."""

    _fields_ = [
        ("weight", _ptr * 4),
        ("scale", _ptr * 4),
        ("qkv_bias", _ptr),
        ("norm", _ptr * 2),
        ("k_cache", _ptr),
        ("v_cache", _ptr),
        ("multiplier", _f32 * 4),
    ]


class DecodeLayerParams(ctypes.Structure):
    """trtllm_decode_layer_params."""

    _fields_ = [
        *((name, _ptr) for name in ("x", "out", "table", "page_table", "lengths", "cos", "sin", "failed", "workspace")),
        *((name, _i64) for name in ("workspace_bytes", "page_stride", "head_stride")),
        *((name, _i32) for name in ("layers", "hidden", "heads", "kv_heads", "head_size", "wide", "page_size")),
        *((name, _i32) for name in ("max_length", "rotary_positions", "group", "has_zero", "weight_dtype", "dtype")),
        *((name, _f32) for name in ("scale", "norm_eps", "norm_offset")),
        *((name, _i32) for name in ("block_keys", "pdl")),
    ]


@dataclass(frozen=True)
class DecodeLayer:
    """One layer: weights as :mod:`weight_only_packing` makes them (``up``: gate and up, ``interleave_gate_up``), norm
    weights [hidden], caches [pages, kv_heads, page_size, D], ``qkv_bias`` [(heads + 2 kv_heads) * D] or None."""

    qkv: PackedWeight
    o: PackedWeight
    up: PackedWeight
    down: PackedWeight
    attention_norm: Tensor
    mlp_norm: Tensor
    k_cache: Tensor
    v_cache: Tensor
    qkv_bias: Tensor | None = None

    @property
    def weights(self) -> tuple[PackedWeight, ...]:
        """In the order of the table."""
        return self.qkv, self.o, self.up, self.down


def table(layers: Sequence[DecodeLayer]) -> Tensor:
    """The rows of ``layers`` in their device's memory, uint8. They hold addresses: the tensors must stay alive."""
    rows = (DecodeLayerRow * len(layers))()
    for row, layer in zip(rows, layers, strict=True):
        for i, weight in enumerate(layer.weights):
            row.weight[i] = weight.data.data_ptr()
            row.scale[i] = 0 if weight.scale is None else weight.scale.data_ptr()
            row.multiplier[i] = weight.multiplier
        row.norm[0], row.norm[1] = layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()
        row.k_cache, row.v_cache = layer.k_cache.data_ptr(), layer.v_cache.data_ptr()
        row.qkv_bias = 0 if layer.qkv_bias is None else layer.qkv_bias.data_ptr()
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).to(layers[0].k_cache.device)


def heads_of(layer: DecodeLayer) -> int:
    """Query heads."""
    _, kv_heads, _, size = layer.k_cache.shape
    return layer.qkv.n // size - 2 * kv_heads


def sizes(layer: DecodeLayer, cos: Tensor, max_pages: int) -> DecodeLayerParams:
    """The C parameters that layers of this shape have in common, without pointers."""
    _, kv_heads, page_size, size = layer.k_cache.shape
    dtype = library.dtype_code(layer.k_cache.dtype)
    return DecodeLayerParams(
        page_stride=layer.k_cache.stride(0),
        head_stride=layer.k_cache.stride(1),
        hidden=layer.qkv.k,
        heads=heads_of(layer),
        kv_heads=kv_heads,
        head_size=size,
        wide=layer.down.k,
        page_size=page_size,
        max_length=max_pages * page_size,
        rotary_positions=cos.shape[0],
        group=layer.qkv.group,
        has_zero=int(layer.qkv.has_zero),
        weight_dtype=_TYPES.get(layer.qkv.type, dtype),
        dtype=dtype,
        scale=size**-0.5,
    )


def check_layers(layers: Sequence[DecodeLayer]) -> None:
    """All layers have the shapes and types of the first, and its tensors fit each other."""
    if not layers:
        raise _refused("no layers", "at least one")
    first = layers[0]
    if first.k_cache.dim() != 4:
        raise _refused(f"a cache {tuple(first.k_cache.shape)}", "[pages, kv_heads, page_size, D]")
    _, kv_heads, _, size = first.k_cache.shape
    dtype, heads, hidden, wide = first.k_cache.dtype, heads_of(first), first.qkv.k, first.down.k
    if dtype not in (torch.float16, torch.bfloat16):
        raise _refused(f"a cache of {dtype}", "float16 or bfloat16, or mmha with an 8-bit cache")
    if first.qkv.n % size or heads < 1 or heads % kv_heads:
        raise _refused(
            f"a fused projection of {first.qkv.n} rows for {kv_heads} kv heads of {size}",
            "(heads + 2 kv_heads) * D rows, heads a multiple of kv_heads",
        )
    shapes = ((first.qkv.n, hidden), (hidden, heads * size), (2 * wide, hidden), (hidden, wide))
    kind = (first.qkv.type, first.qkv.group, first.qkv.has_zero)
    for i, layer in enumerate(layers):
        for name, weight, shape in zip(("qkv", "o", "up", "down"), layer.weights, shapes, strict=True):
            if (weight.n, weight.k) != shape:
                raise _refused(f"{name} [{weight.n}, {weight.k}] in layer {i}", f"{list(shape)}, by its other weights")
            if (weight.type, weight.group, weight.has_zero) != kind or weight.order is not None:
                raise _refused(
                    f"{name} of {weight.type} in layer {i} beside qkv of {kind[0]} in layer 0",
                    "one type, group and use of zeros for all products, without act-order, or weight_only.linear",
                )
            _check_packed(f"{name} of layer {i}", weight, dtype)
        for name, norm in (("attention_norm", layer.attention_norm), ("mlp_norm", layer.mlp_norm)):
            _check_tensor(f"{name} of layer {i}", norm, dtype, (hidden,))
        if (layer.qkv_bias is None) != (first.qkv_bias is None):
            raise _refused(f"a qkv_bias in some layers and none in layer {i}", "one in every layer or in none")
        if layer.qkv_bias is not None:
            _check_tensor(f"qkv_bias of layer {i}", layer.qkv_bias, dtype, (first.qkv.n,))
        for name, cache in (("k_cache", layer.k_cache), ("v_cache", layer.v_cache)):
            if (
                cache.shape != first.k_cache.shape
                or cache.dtype != dtype
                or cache.stride() != first.k_cache.stride()
                or cache.stride()[2:] != (size, 1)
            ):
                raise _refused(
                    f"{name} {cache.dtype} {tuple(cache.shape)} with strides {cache.stride()} in layer {i}",
                    "caches alike in all layers, a page's tokens one behind the other",
                )
    held = [t for layer in layers for t in (layer.k_cache, layer.v_cache, layer.attention_norm, layer.mlp_norm)]
    held += [t for layer in layers for w in layer.weights for t in (w.data, w.scale) if t is not None]
    if len({t.device for t in held}) > 1:
        raise _refused("layers on several devices", "one device for all")


def check_step(
    x: Tensor, first: DecodeLayer, page_table: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, norm_eps: float
) -> None:
    """What a step is given fits the layers, of which ``first`` is checked already."""
    hidden, size = first.qkv.k, first.k_cache.shape[3]
    dtype = first.k_cache.dtype
    if x.shape != (1, hidden) or not (x.dtype == dtype or (x.dtype == torch.float64 and not x.is_cuda)):
        raise _refused(f"x {x.dtype} {tuple(x.shape)}", f"{dtype} (1, {hidden}): one token")
    if page_table.dtype != torch.int32 or page_table.dim() != 1 or page_table.numel() == 0:
        raise _refused(f"page_table {page_table.dtype} {tuple(page_table.shape)}", "int32 [max_pages] of one sequence")
    _check_tensor("lengths", lengths, torch.int32, (1,))
    for name, one in (("cos", cos), ("sin", sin)):
        if one.dim() != 2 or one.shape[0] == 0:
            raise _refused(f"{name} {tuple(one.shape)}", f"[positions, {size // 2}]")
        _check_tensor(name, one, torch.float32, (cos.shape[0], size // 2))
    if not norm_eps >= 0:
        raise _refused(f"norm_eps of {norm_eps}", "0 or more")
    if any(t.device != x.device for t in (page_table, lengths, cos, sin, first.k_cache)):
        raise _refused("tensors on several devices", "one device for all")
    if any(not t.is_contiguous() for t in (x, page_table)):
        raise _refused("a strided x or page_table", ".contiguous()")


def _check_packed(name: str, weight: PackedWeight, dtype: torch.dtype) -> None:
    """The buffers have the sizes n and k ask for: nothing is read beyond them."""
    if weight.type == "dense":
        _check_tensor(name, weight.data, dtype, (weight.n, weight.k))
        return
    size = WEIGHT_BYTES
    if weight.type == "int4":
        if weight.group not in (32, 64, 128) or weight.k % weight.group:
            raise _refused(
                f"{name} in groups of {weight.group} over {weight.k}", "32, 64 or 128 that divide the inputs"
            )
        size += 128 // weight.group * (48 if weight.has_zero else 32)
    elif weight.scale is None:
        raise _refused(f"{name} without scales", "what pack_8bit_weight makes")
    rows = -(-weight.n // ROW_PADDING) * ROW_PADDING
    _check_tensor(name, weight.data, torch.uint8, (rows // STRIPE, -(-weight.k // DEPTH[weight.type]), size))
    if weight.scale is not None:
        _check_tensor(f"scale of {name}", weight.scale, torch.float32, (rows,))


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise _refused(f"{name} {x.dtype} {tuple(x.shape)}", f"contiguous {dtype} {list(shape)}")


def _refused(what: str, remedy: str) -> UnsupportedError:
    return UnsupportedError("KERNEL_REFUSED", f"decode_layer does not take {what}", remedy)
