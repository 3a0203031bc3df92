"""A whole published checkpoint, seen through its layout: what is quantized, what every tensor becomes, the record.

Nothing large is read here; :meth:`ImportPlan.read` makes the tensors of one module when its turn comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifacts.schema import LayerQuantization, QuantizationRecord
from trtllm_cli.artifacts.tensors import DTYPES
from trtllm_cli.errors import BadInputError
from trtllm_cli.models.families.base import Family
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.quantize.interchange.base import (
    SCALE_TYPES,
    Layout,
    Linear,
    Needed,
    Planned,
    Shape,
    Tensors,
    positive,
    unsupported,
)

if TYPE_CHECKING:
    import torch

#: files beside config.json in which older tools keep what config.json's quantization_config says today
_BESIDE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}


def open_layout(directory: Path, config: Mapping[str, Any], tensors: Tensors) -> Layout | None:
    """The layout of a published folder; None where it is not quantized. Raises UnsupportedError naming the method."""
    where, found = f"{directory / 'config.json'}: quantization_config", config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if not found:
        file = next((file for file in _BESIDE if (directory / file).is_file()), None)
        if file is None:
            return None
        where, found, method = str(directory / file), _read(directory / file), _BESIDE[file]
    if not isinstance(found, Mapping):
        raise BadInputError("QUANTIZATION_CONFIG_INVALID", f"{where} is not an object", "download it again")
    return _layout(str(method), found, tensors, where)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError("CONFIG_INVALID", f"{path} is not JSON ({error})", "download it again") from error


def _layout(method: str, config: Mapping[str, Any], tensors: Tensors, where: str) -> Layout:
    if method == "gptq":
        from trtllm_cli.quantize.interchange.gptq import GptqLayout

        return GptqLayout(config, tensors, where)
    if method == "awq":
        from trtllm_cli.quantize.interchange.awq import AwqLayout

        return AwqLayout(config, tensors, where)
    if method == "compressed-tensors":
        from trtllm_cli.quantize.interchange.compressed import CompressedTensorsLayout

        return CompressedTensorsLayout(config, tensors, where)
    if method == "modelopt":
        from trtllm_cli.quantize.interchange.modelopt import ModelOptLayout

        return ModelOptLayout(config, tensors, where)
    raise unsupported(where, f"quantized with {method}; gptq, awq, compressed-tensors and modelopt are read")


@dataclass(frozen=True)
class Scales:
    """The two cache scales of one layer: canonical -> published name."""

    names: dict[str, str]
    kv_heads: int


class ImportPlan:
    """The quantized part of a published checkpoint. ``linears`` are its quantized modules in execution order."""

    def __init__(self, layout: Layout, tensors: Tensors, family: Family, spec: DecoderSpec) -> None:
        self._layout = layout
        self._tensors = tensors
        self._names = frozenset(tensors.names())
        published = family.published_names(spec)
        sizes = {"embed": (spec.vocab_size, spec.hidden_size, False), **spec.linears()}
        every = {
            module: Linear(module, published[f"{module}.weight"].removesuffix(".weight"), *size)
            for module, size in sizes.items()
        }
        self.linears = {module: linear for module, linear in every.items() if layout.quantized(linear)}
        self.scales = [self._layer_scales(published, spec, layer) for layer in range(spec.num_layers)]
        if not self.linears and layout.kv is None:
            raise BadInputError(
                "QUANTIZATION_EMPTY",
                f"no tensor is stored as the {layout.description.layout} config describes",
                "download the model again; or remove its quantization config if it is not quantized",
            )
        self._planned: dict[str, Planned] = {}

    def _layer_scales(self, published: Mapping[str, str], spec: DecoderSpec, layer: int) -> Scales:
        source = self._layout.kv
        if source is None:
            return Scales({}, spec.num_kv_heads)
        attention = published[f"layers.{layer}.attn.k.weight"].rsplit(".", 2)[0]
        names = {"k_scale": source.k, "v_scale": source.v}
        return Scales(
            {f"layers.{layer}.attn.{ours}": f"{attention}.{theirs}" for ours, theirs in names.items()},
            spec.num_kv_heads,
        )

    def needed(self) -> dict[str, Needed]:
        """Every published tensor the quantized part is made of."""
        found: dict[str, Needed] = {}
        for linear in self.linears.values():
            found.update(self._layout.needed(linear))
        source = self._layout.kv
        if source is not None:
            heads = source.scheme.granularity == "head"
            for scales in self.scales:
                n = scales.kv_heads
                shapes: tuple[Shape, ...] = ((n, 1, 1), (n,)) if heads else ((), (1,), (1, 1))
                for name in scales.names.values():
                    found[name] = Needed(shapes, SCALE_TYPES)
                    prefix = name.removesuffix(source.k).removesuffix(source.v)
                    for unused in source.unused:
                        found[prefix + unused] = Needed(shapes, ("I8", "F8_E4M3"), optional=True, zero=True)
        return found

    def check_zeros(self, needed: Mapping[str, Needed]) -> list[str]:
        """A sentence for each tensor that may be there with zeros only and holds something else."""
        return [
            f"{name} is not zero and the model has no place for it"
            for name, want in needed.items()
            if want.zero and name in self._names and bool((self._tensors.tensor(name).float() != 0).any())
        ]

    def tensors(self, module: str) -> dict[str, tuple[str, Shape]]:
        """Canonical name -> (type code, shape) of what a quantized module becomes."""
        return {f"{module}.{suffix}": made for suffix, made in self._plan(module).tensors.items()}

    def read(self, module: str) -> dict[str, torch.Tensor]:
        """The tensors of a quantized module, by canonical name."""
        made = self._layout.read(self.linears[module], self._plan(module))
        return {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}

    def read_scale(self, layer: int, name: str) -> torch.Tensor:
        """One cache scale as float32 [kv_heads]."""
        scales = self.scales[layer]
        published = scales.names[name]
        scale = positive(self._tensors.tensor(published), published).reshape(-1)
        return scale.expand(scales.kv_heads).contiguous()

    def _plan(self, module: str) -> Planned:
        if module not in self._planned:
            self._planned[module] = self._layout.plan(self.linears[module])
        return self._planned[module]

    def record(self) -> QuantizationRecord:
        """What the checkpoint's manifest says. Errors of modules are unknown: the unquantized weights are elsewhere."""
        description, source = self._layout.description, self._layout.kv
        layers = []
        size = elements = 0
        for module, linear in self.linears.items():
            planned = self._plan(module)
            size += sum(DTYPES[code][0] * math.prod(shape) for code, shape in planned.tensors.values())
            elements += linear.out_features * linear.in_features
            layers.append(
                LayerQuantization(
                    module=module, scheme=planned.scheme, activation=planned.activation, note=planned.note
                )
            )
        return QuantizationRecord(
            method=description.method,
            parameters=description.parameters,
            layers=tuple(layers),
            bits_per_weight=round(size * 8 / elements, 4) if elements else 0.0,
            kv_cache=source.scheme if source else None,
            provider=f"imported:{description.layout}",
        )
