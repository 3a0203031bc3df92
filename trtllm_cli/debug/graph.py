"""A TensorRT network as data: its layers, what they read and write, and the parts they fall into.

The network of an engine or a checkpoint is defined anew from its spec with weights that are all zero: only types and
shapes are of interest, and weights that nobody reads take no memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtllm_cli.artifacts.schema import CheckpointBody, Dtype, EngineBody, QuantizationRecord
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensorrt import tensorrt_tactics
from trtllm_cli.build.tensorrt.layers import Layers
from trtllm_cli.build.tensorrt.module import load
from trtllm_cli.build.tensorrt.network import define, new_definition
from trtllm_cli.build.tensorrt.ops import NO_CHOICES, Choices
from trtllm_cli.build.tensorrt.quantized import QuantizedModule, QuantizedSource, check, nothing, split_rows
from trtllm_cli.build.tensorrt.weights import BITS, Weight, WeightSource
from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.models.spec import DecoderSpec

_USUAL_CONTEXT = 4096
_LAYER = re.compile(r"^(layers\.\d+)\.")
#: layer types that do one of several things: the class that says which, and its attribute
_WHICH = {
    "ACTIVATION": ("IActivationLayer", "type"),
    "ELEMENTWISE": ("IElementWiseLayer", "op"),
    "REDUCE": ("IReduceLayer", "op"),
    "UNARY": ("IUnaryLayer", "op"),
}
_TYPES = {
    "HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "INT8": "int8", "INT4": "int4", "FP8": "fp8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, dimensions (-1: known at run time) and type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"[{', '.join('n' if size < 0 else str(size) for size in self.shape)}] {self.dtype}"


@dataclass(frozen=True)
class LayerInfo:
    """A layer: its name, type (with the operation where the type has several), inputs by name, and output."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: TensorInfo


@dataclass(frozen=True)
class Part:
    """Neighbouring layers that are shown together: ``inputs``, one decoder layer (``layers.3``), or ``head``."""

    name: str
    layers: tuple[LayerInfo, ...]

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """What is the same in decoder layers that are alike."""
        prefix = f"{self.name}."
        return tuple(
            (layer.name.removeprefix(prefix), layer.kind, layer.output.shape, layer.output.dtype)
            for layer in self.layers
        )


@dataclass(frozen=True)
class NetworkGraph:
    """A whole network, its layers in execution order."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: tuple[LayerInfo, ...]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The layers before the decoder layers and what all of them share, each decoder layer, and what follows."""
        homes: dict[str, str] = {}
        for layer in self.layers:
            match = _LAYER.match(layer.name)
            after = any(homes.get(name, "inputs") != "inputs" for name in layer.inputs)
            homes[layer.output.name] = match[1] if match else "head" if after else "inputs"
        # a constant has no inputs to tell: one that only the head reads belongs there
        readers: dict[str, set[str]] = {}
        for layer in self.layers:
            for name in layer.inputs:
                readers.setdefault(name, set()).add(homes[layer.output.name])
        found: dict[str, list[LayerInfo]] = {}
        for layer in self.layers:
            name = layer.output.name
            home = "head" if homes[name] == "inputs" and readers.get(name) == {"head"} else homes[name]
            found.setdefault(home, []).append(layer)
        order = sorted(found, key=lambda name: (name == "head") - (name == "inputs"))
        return tuple(Part(name, tuple(found[name])) for name in order)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name."""
        return {tensor.name: tensor for tensor in (*self.inputs, *(layer.output for layer in self.layers))}

    @cached_property
    def home(self) -> dict[str, str]:
        """The part that each layer's output comes from."""
        return {layer.output.name: part.name for part in self.parts for layer in part.layers}

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """The parts that read each tensor, in order."""
        found: dict[str, dict[str, None]] = {}
        for part in self.parts:
            for layer in part.layers:
                for name in layer.inputs:
                    found.setdefault(name, {})[part.name] = None
        return {name: tuple(parts) for name, parts in found.items()}

    def shared(self, tensor: str, part: str) -> bool:
        """Whether ``part`` reads a tensor of the inputs, or of the network's, that other parts read as well."""
        others = [name for name in self.readers[tensor] if name not in ("inputs", part)]
        return part != "inputs" and self.home.get(tensor, "inputs") == "inputs" and bool(others)


def read(layers: Layers) -> NetworkGraph:
    """The network as TensorRT holds it."""
    network, api = layers.network, layers.trt.api

    def info(tensor: Any) -> TensorInfo:
        return TensorInfo(str(tensor.name), tuple(tensor.shape), _TYPES.get(tensor.dtype.name, tensor.dtype.name))

    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(api.ILayer.type.__get__(layer).name)
        if kind in _WHICH:
            name, attribute = _WHICH[kind]
            layer.__class__ = getattr(api, name)
            kind = f"{kind} {getattr(layer, attribute).name}"
        inputs = (layer.get_input(number) for number in range(layer.num_inputs))
        names = tuple(str(tensor.name) for tensor in inputs if tensor is not None)
        found.append(LayerInfo(str(layer.name), kind, names, info(layer.get_output(0))))
    return NetworkGraph(
        tuple(info(network.get_input(index)) for index in range(network.num_inputs)),
        tuple(info(network.get_output(index)) for index in range(network.num_outputs)),
        tuple(found),
    )


def graph_of(artifact: Artifact) -> NetworkGraph:
    """The network that an engine was built from, or that a checkpoint would be.

    Raises UsageError for another artifact, UnsupportedError for an engine of another backend or a quantization that
    TensorRT does not take.
    """
    body = artifact.manifest.body
    if isinstance(body, EngineBody):
        if body.backend != "tensorrt":
            raise UnsupportedError(
                "DEBUG_BACKEND",
                f"{artifact.path} is a {body.backend} engine; only TensorRT engines have a network to draw",
                "name the checkpoint it was built from",
            )
        context, tactics = body.limits.context, tensorrt_tactics(body)
        choices = Choices(weights_as_inputs=bool(tactics.weight_inputs), fp8_attention=tactics.fp8_attention)
    elif isinstance(body, CheckpointBody):
        context, choices = min(_USUAL_CONTEXT, body.spec.max_positions), NO_CHOICES
    else:
        raise UsageError(
            "WRONG_KIND",
            f"{artifact.path} is a {artifact.kind}, which has no network",
            "name an engine or a checkpoint",
        )
    quantized: QuantizedSource = nothing
    if body.quantization is not None:
        check(body.quantization, body.dtype, artifact.path)
        quantized = blank_quantized(body.spec, body.quantization)
    layers = new_definition(load()).layers
    define(layers, body.spec, blank_weights(body.spec, body.dtype), body.dtype, context, quantized, choices=choices)
    return read(layers)


def blank_weights(spec: DecoderSpec, dtype: Dtype) -> WeightSource:
    """Weights of zeros: pages that nobody touches, and one array for all tensors of a shape."""
    shapes = spec.tensor_shapes()
    return lambda name: Weight(_zeros(shapes[name], BITS[dtype]), dtype)


def blank_quantized(spec: DecoderSpec, record: QuantizationRecord) -> QuantizedSource:
    """The same of quantized modules, as their schemes say."""
    shapes, schemes = spec.tensor_shapes(), {layer.module: layer for layer in record.layers}

    def module(name: str) -> QuantizedModule | None:
        layer = schemes.get(name)
        if layer is None:
            return None
        scheme, activation = layer.scheme, layer.activation
        n, k = shapes[f"{name}.weight"]
        if scheme.type == "int4":
            values = _zeros((n, k // 2), np.uint8)
            size = scheme.group_size or -1
            scale = np.ones((n, k // size), np.float32) if size > 0 else split_rows(np.ones((n, 1), np.float32), k)
        else:
            values = _zeros((n, k), np.int8 if scheme.type == "int8" else np.uint8)
            scale = np.ones((n,) if scheme.granularity == "channel" else (), np.float32)
        order = np.arange(k, dtype=np.int32) if scheme.group_index else None
        static = activation is not None and activation.granularity == "tensor"
        return QuantizedModule(name, scheme, activation, values, scale, order, 1.0 if static else None)

    return module


def alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Runs of consecutive parts with equal signatures."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and runs[-1][0].signature == part.signature:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


@lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    return np.zeros(shape, dtype)
