"""Weights of a checkpoint, or of an engine for the torch executor: dense, in one dtype, dequantized once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.artifacts.schema import (
    ActivationScheme,
    CheckpointBody,
    EngineBody,
    KvCacheScheme,
    LayerQuantization,
)
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import TensorFile, TensorStore
from trtllm_cli.errors import BadInputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InputQuantizer:
    """How a linear's input is quantized; ``scale`` float32 [1] where it is static."""

    scheme: ActivationScheme
    scale: torch.Tensor | None


class CheckpointWeights:
    """Dense tensors by canonical name, kept after the first use. ``dtype`` is the compute dtype."""

    def __init__(self, model: Artifact, dtype: torch.dtype) -> None:
        self._store = TensorStore(model.path)
        self._dtype = dtype
        self._kept: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, InputQuantizer | None] = {}
        body = model.manifest.body
        assert isinstance(body, (CheckpointBody, EngineBody))
        record = body.quantization
        self._quantized = {layer.module: layer for layer in record.layers} if record else {}
        #: how keys and values are kept, None where they are not quantized
        self.kv_cache: KvCacheScheme | None = record.kv_cache if record else None

    def has(self, name: str) -> bool:
        return name in self._store

    def dense(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            module, _, kind = name.rpartition(".")
            layer = self._quantized.get(module) if kind == "weight" else None
            tensor = self._store.tensor(name) if layer is None else dequantized(self._store, layer)
            self._kept[name] = tensor.to(self._dtype)
        return self._kept[name]

    def input_quantizer(self, module: str) -> InputQuantizer | None:
        if module not in self._inputs:
            layer = self._quantized.get(module)
            scheme = layer.activation if layer is not None else None
            scale = self._store.tensor(f"{module}.input_scale") if scheme and scheme.granularity == "tensor" else None
            self._inputs[module] = InputQuantizer(scheme, scale) if scheme else None
        return self._inputs[module]

    def kv_scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales of keys and values, float32 [kv_heads] each. Only with :attr:`kv_cache`."""
        p = f"layers.{layer}.attn"
        return self._store.tensor(f"{p}.k_scale"), self._store.tensor(f"{p}.v_scale")


def dequantized(store: TensorStore | TensorFile, layer: LayerQuantization) -> torch.Tensor:
    """The float32 weight [N, K] of one quantized module."""
    from trtllm_cli.ops import quantized

    name, scheme = layer.module, layer.scheme
    weight, scale = store.tensor(f"{name}.weight"), store.tensor(f"{name}.weight_scale")
    if scheme.type != "int4":
        return quantized.dequantize_8bit(weight, scale)
    zero = None if scheme.symmetric else store.tensor(f"{name}.weight_zero")
    if scheme.group_index:
        group = store.tensor(f"{name}.weight_group")
        if group.shape != (weight.shape[1] * 2,) or not 0 <= int(group.min()) <= int(group.max()) < scale.shape[1]:
            raise BadInputError(
                "TENSOR_SHAPE", f"{name}: weight_group does not name a group for each input", "quantize it again"
            )
        return quantized.dequantize_int4(weight, scale, zero, group)
    if weight.shape[1] * 2 % scale.shape[1]:
        raise BadInputError(
            "TENSOR_SHAPE",
            f"{name}: {scale.shape[1]} groups do not divide {weight.shape[1] * 2} inputs",
            "quantize the checkpoint again",
        )
    return quantized.dequantize_int4(weight, scale, zero)
