"""Weights of a checkpoint, or of an engine for the torch executor: dense, in one dtype, dequantized once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.artifacts.schema import CheckpointBody, EngineBody, LayerQuantization
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorStore
from trtllm_cli.errors import BadInputError

if TYPE_CHECKING:
    import torch


class CheckpointWeights:
    """Dense tensors by canonical name, kept after the first use. ``dtype`` is the compute dtype."""

    def __init__(self, model: Artifact, dtype: torch.dtype) -> None:
        self._store = TensorStore(model.path)
        self._dtype = dtype
        self._kept: dict[str, torch.Tensor] = {}
        body = model.manifest.body
        assert isinstance(body, (CheckpointBody, EngineBody))
        record = body.quantization
        self._quantized = {layer.module: layer for layer in record.layers} if record else {}

    def has(self, name: str) -> bool:
        return name in self._store

    def dense(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            module, _, kind = name.rpartition(".")
            layer = self._quantized.get(module) if kind == "weight" else None
            tensor = self._store.tensor(name) if layer is None else dequantized(self._store, layer)
            self._kept[name] = tensor.to(self._dtype)
        return self._kept[name]


def dequantized(store: TensorStore, layer: LayerQuantization) -> torch.Tensor:
    """The float32 weight [N, K] of one quantized module."""
    from trtllm_cli.ops import quantized

    name = layer.module
    weight, scale = store.tensor(f"{name}.weight"), store.tensor(f"{name}.weight_scale")
    if layer.scheme.type == "int8":
        return quantized.dequantize_int8(weight, scale)
    zero = None if layer.scheme.symmetric else store.tensor(f"{name}.weight_zero")
    if weight.shape[1] * 2 % scale.shape[1]:
        raise BadInputError(
            "TENSOR_SHAPE",
            f"{name}: {scale.shape[1]} groups do not divide {weight.shape[1] * 2} inputs",
            "quantize the checkpoint again",
        )
    return quantized.dequantize_int4(weight, scale, zero)
