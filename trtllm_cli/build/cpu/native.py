"""What the native CPU library reads: the plan, a description of every packed module, and one file of packed tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_cli.artifacts.publish import Workspace
from trtllm_cli.artifacts.schema import CpuTactics, LayerQuantization
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore, TensorWriter
from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.native.groups import input_order, reorder
from trtllm_cli.ops.native.packing import (
    PackedFormat,
    PackedModule,
    kv_scale_names,
    pack_kv_scales,
    pack_module,
    pack_order,
    pack_vector,
    packed_layout,
)
from trtllm_cli.ops.native.plan import Plan, record
from trtllm_cli.progress import Reporter

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAN = "plan.json"
MODULES = "modules.json"
_FORMATS: dict[str, PackedFormat] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {
    "float32": "F32", "float16": "F16", "uint16": "U16", "int8": "I8", "uint8": "U8", "uint32": "U32", "int32": "I32",
}  # fmt: skip
_SIZES = {"F32": 4, "F16": 2, "U16": 2, "I8": 1, "U8": 1, "U32": 4, "I32": 4}


@dataclass
class _Orders:
    """Orders of inputs found so far: modules with the same one share its tensor."""

    names: dict[bytes, str] = field(default_factory=dict)
    found: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    def name(self, module: str, order: NDArray[np.int32] | None) -> str | None:
        if order is None:
            return None
        name = self.names.setdefault(order.tobytes(), f"{module}.order")
        self.found[name] = order
        return name


def write_native(parent: Artifact, work: Workspace, tactics: CpuTactics, report: Reporter) -> int:
    """Record the plan and stream the packed weights into one file; returns its bytes of weights.

    Raises BadInputError for tensors that are not what the checkpoint's record says.
    """
    body = parent.checkpoint
    store = TensorStore(parent.path)
    layers = {layer.module: layer for layer in body.quantization.layers} if body.quantization else {}
    plan = record(body.spec)
    orders = _Orders()
    modules = {name: _described(store, name, layers.get(name), use.bias, orders) for name, use in plan.matrices.items()}
    small = _small_tensors(store, plan, tactics)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, described in modules.items():
        for tensor, (dtype, elements) in packed_layout(name, described).items():
            if tensor != described.order:
                shapes[tensor] = (_CODES[dtype.name], (elements,))
    for name, order in orders.found.items():
        small[name] = pack_order(order)
    for name, array in small.items():
        shapes[name] = (_CODES[array.dtype.name], array.shape)
    with TensorWriter(work.file("model.safetensors"), shapes) as writer:
        for done, (name, described) in enumerate(modules.items(), 1):
            _write_all(writer, _packed(store, name, described, orders, name in layers))
            report.advance("packing", done, len(modules), "modules")
        _write_all(writer, small)
    work.file(PLAN).write_text(plan.model_dump_json(indent=1) + "\n")
    dumped = {name: described.model_dump(mode="json") for name, described in modules.items()}
    work.file(MODULES).write_text(json.dumps(dumped, indent=1) + "\n")
    return sum(_SIZES[code] * math.prod(shape) for code, shape in shapes.values())


def _small_tensors(store: TensorStore, plan: Plan, tactics: CpuTactics) -> dict[str, NDArray[Any]]:
    """Norms, and the scales of a quantized cache."""
    small: dict[str, NDArray[Any]] = {}
    for name in plan.vectors:
        small.update(pack_vector(name, _float32(store, f"{name}.weight")))
    if tactics.cache in ("int8", "fp8"):
        for layer in range(plan.num_layers):
            for name in kv_scale_names(layer):
                scales = _float32(store, name).reshape(-1)
                if scales.shape != (plan.num_kv_heads,) or not bool(np.all(np.isfinite(scales) & (scales > 0))):
                    raise _bad(name, f"is not one positive number for each of {plan.num_kv_heads} heads")
                small[name] = pack_kv_scales(scales)
    return small


def _described(
    store: TensorStore, module: str, layer: LayerQuantization | None, bias: bool, orders: _Orders
) -> PackedModule:
    entry = store.entry(f"{module}.weight")
    n, k = entry.shape
    if layer is None:
        if entry.dtype not in _FORMATS:
            raise _bad(f"{module}.weight", f"has type {entry.dtype}, which the checkpoint's record does not explain")
        return PackedModule(format=_FORMATS[entry.dtype], n=n, k=k, has_bias=bias)
    scheme = layer.scheme
    if scheme.type == "int4":
        groups = store.entry(f"{module}.weight_scale").shape[1]
        order = None
        if scheme.group_index:
            order = input_order(module, np.asarray(_array(store, f"{module}.weight_group")), 2 * k, groups)
        if 2 * k % groups:
            raise _bad(f"{module}.weight_scale", f"has {groups} groups, which do not divide {2 * k} inputs")
        return PackedModule(
            format="int4",
            n=n,
            k=2 * k,
            group_size=2 * k // groups,
            scale_dtype=scheme.scale_dtype,
            has_zero=not scheme.symmetric,
            has_bias=bias,
            order=orders.name(module, order),
        )
    activation = layer.activation
    format: PackedFormat = "fp8" if scheme.type == "fp8" else "int8_dot" if activation else "int8"
    if activation is not None and activation.type != scheme.type:
        raise _bad(f"{module}.weight", f"is {scheme.type} and its input {activation.type}: the two must be alike")
    return PackedModule(
        format=format,
        n=n,
        k=k,
        scale_dtype="float32",
        has_bias=bias,
        activation=activation.type if activation else None,
        input_scale=_input_scale(store, module) if activation and activation.granularity == "tensor" else None,
    )


def _input_scale(store: TensorStore, module: str) -> float:
    name = f"{module}.input_scale"
    scale = _float32(store, name).reshape(-1)
    if scale.size != 1 or not np.isfinite(scale[0]) or scale[0] <= 0:
        raise _bad(name, "is not one positive number")
    return float(scale[0])


def _packed(
    store: TensorStore, name: str, described: PackedModule, orders: _Orders, quantized: bool
) -> dict[str, NDArray[Any]]:
    weight = _array(store, f"{name}.weight")
    if described.order is not None:
        weight = reorder(weight, orders.found[described.order])
    _, packed = pack_module(
        name,
        described.format,
        weight,
        scale=_array(store, f"{name}.weight_scale") if quantized else None,
        zero=_array(store, f"{name}.weight_zero") if described.has_zero else None,
        bias=_float32(store, f"{name}.bias") if described.has_bias else None,
        activation=described.activation,
        input_scale=described.input_scale,
        order=described.order,
    )
    return packed


def _array(store: TensorStore, name: str) -> NDArray[Any]:
    if name not in store:
        raise _bad(name, "is missing")
    return store.array(name)


def _float32(store: TensorStore, name: str) -> NDArray[np.float32]:
    """A small float tensor as float32, bfloat16 widened by its bits."""
    array = _array(store, name)
    if store.entry(name).dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _bad(name: str, what: str) -> BadInputError:
    return BadInputError("CHECKPOINT_TENSOR", f"tensor {name} {what}", "convert or quantize the checkpoint again")


def _write_all(writer: TensorWriter, tensors: Mapping[str, NDArray[Any]]) -> None:
    for name, array in tensors.items():
        writer.write(name, array)
