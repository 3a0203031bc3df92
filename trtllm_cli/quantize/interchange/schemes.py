"""The quantization_config of compressed-tensors: groups of modules, how their weights and inputs are quantized.

Only what a checkpoint of this tool can hold is accepted; everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trtllm_cli.artifacts.schema import ActivationScheme, KvCacheScheme
from trtllm_cli.errors import BadInputError
from trtllm_cli.quantize.interchange.base import Linear, flag, integer, invalid, section, text, texts, unsupported

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_CLASSES = {"linear": "Linear", "embedding": "Embedding"}


@dataclass(frozen=True)
class WeightArguments:
    """How a group's weights are stored; ``granularity`` ``group`` goes with int4 only (-1: the whole row)."""

    type: Literal["int8", "int4", "fp8"]
    granularity: Literal["tensor", "channel", "group"]
    group_size: int
    symmetric: bool
    ordered: bool
    packed: bool


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``."""

    name: str
    targets: tuple[str, ...]
    weights: WeightArguments
    activation: ActivationScheme | None


@dataclass(frozen=True)
class Scheme:
    """The whole config: groups in their order, ignored modules, and the cache."""

    format: str
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv_cache: KvCacheScheme | None

    def group(self, linear: Linear) -> Group | None:
        """The group of a module: exact names and patterns before class names, in the order of sorted targets."""
        if any(_matches(linear, target) for target in self.ignore):
            return None
        by_target = {target: group for group in self.groups for target in group.targets}
        ordered = sorted(by_target, key=lambda target: ("re:" in target, target))
        for names in (True, False):
            for target in ordered:
                if _matches_name(linear, target) if names else _matches_class(linear, target):
                    return by_target[target]
        return None


def _matches(linear: Linear, target: str) -> bool:
    return _matches_name(linear, target) or _matches_class(linear, target)


def _matches_name(linear: Linear, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), linear.published) is not None
    return target == linear.published


def _matches_class(linear: Linear, target: str) -> bool:
    return target == ("Embedding" if linear.module == "embed" else "Linear")


def read_scheme(config: Mapping[str, Any], where: str) -> Scheme:
    """Parse the config. Raises UnsupportedError naming what has no place here, BadInputError for nonsense."""
    _refuse_extras(config, where)
    form = text(config, "format", where)
    found = section(config, "config_groups", where)
    groups = tuple(
        group for name in found if (group := _group(name, section(found, name, where), form, where)) is not None
    )
    ignore = texts(config, "ignore", where)
    for target in (*ignore, *(target for group in groups for target in group.targets)):
        _check_pattern(target, where)
    kv = config.get("kv_cache_scheme")
    return Scheme(
        form, groups, ignore, None if kv is None else _kv_cache(section(config, "kv_cache_scheme", where), where)
    )


def _refuse_extras(config: Mapping[str, Any], where: str) -> None:
    sparsity = section(config, "sparsity_config", where)
    if sparsity.get("format") not in (None, "dense"):
        raise unsupported(where, f"sparse weights ({sparsity['format']})")
    if section(section(config, "transform_config", where), "config_groups", where):
        raise unsupported(where, "transforms applied at run time (transform_config)")
    status = text(config, "quantization_status", where, "compressed")
    if status != "compressed":
        raise unsupported(
            where, f"quantization_status {status!r}: the weights are not stored quantized", "save it compressed"
        )


def _check_pattern(target: str, where: str) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise BadInputError(
                "QUANTIZATION_CONFIG_INVALID", f"{where}: target {target!r} ({error})", "correct the pattern"
            ) from error


def _group(name: str, data: Mapping[str, Any], form: str, where: str) -> Group | None:
    here = f"{where} ({name})"
    if section(data, "output_activations", here):
        raise unsupported(here, "quantized outputs (output_activations)")
    weights = section(data, "weights", here)
    inputs = section(data, "input_activations", here)
    if not weights:
        if inputs:
            raise unsupported(here, "quantized inputs with unquantized weights")
        return None
    form = text(data, "format", here) or form
    if form not in FORMATS:
        raise unsupported(here, f"format {form!r}; {', '.join(FORMATS)} are read")
    arguments = _weights(weights, form, here)
    return Group(
        name, texts(data, "targets", here), arguments, _activation(inputs, arguments, here) if inputs else None
    )


def _weights(data: Mapping[str, Any], form: str, where: str) -> WeightArguments:
    bits, kind = integer(data, "num_bits", where, 8), text(data, "type", where, "int")
    size = data.get("group_size")
    strategy = text(data, "strategy", where) or ("tensor" if size is None else "channel" if size == -1 else "group")
    symmetric = flag(data, "symmetric", where, True)
    if data.get("dynamic"):
        raise unsupported(where, "weights quantized at run time (dynamic)")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise unsupported(where, f"{bits}-bit {kind} weights; int4, int8 and fp8 are read")
    packed = form == "pack-quantized"
    # older files write true for act-order with groups made in that order; "weight" changes nothing in the layout
    ordered = data.get("actorder") in (True, "group", "dynamic")
    if bits == 4:
        if strategy not in ("group", "channel"):
            raise unsupported(where, f"int4 weights with one scale per {strategy}")
        width = -1 if strategy == "channel" else integer(data, "group_size", where)
        if width != -1 and width <= 0:
            raise invalid(where, "group_size", size, "a positive count")
        return WeightArguments("int4", "group", width, symmetric, ordered, packed)
    name: Literal["int8", "fp8"] = "int8" if kind == "int" else "fp8"
    if strategy not in ("tensor", "channel"):
        raise unsupported(where, f"{name} weights with one scale per {strategy}")
    if not symmetric or ordered:
        raise unsupported(where, f"{name} weights with {'zero points' if not symmetric else 'act-order groups'}")
    if name == "fp8" and packed:
        raise invalid(where, "format", form, "a format of fp8 weights")
    return WeightArguments(name, "tensor" if strategy == "tensor" else "channel", -1, True, False, packed)


def _activation(data: Mapping[str, Any], weights: WeightArguments, where: str) -> ActivationScheme:
    bits, kind = integer(data, "num_bits", where, 8), text(data, "type", where, "int")
    name = {("int", 8): "int8", ("float", 8): "fp8"}.get((kind, bits))
    if name != weights.type:
        raise unsupported(where, f"{bits}-bit {kind} inputs of {weights.type} weights")
    if not flag(data, "symmetric", where, True):
        raise unsupported(where, "inputs quantized asymmetrically")
    strategy, dynamic = text(data, "strategy", where, "tensor"), data.get("dynamic", False)
    if (strategy, dynamic) not in (("token", True), ("tensor", False)):
        how = "at run time" if dynamic else "in advance"
        raise unsupported(where, f"inputs scaled per {strategy} {how}; per token at run time or per tensor in advance")
    return ActivationScheme(
        type="int8" if name == "int8" else "fp8", granularity="token" if strategy == "token" else "tensor"
    )


def _kv_cache(data: Mapping[str, Any], where: str) -> KvCacheScheme:
    here = f"{where} (kv_cache_scheme)"
    bits, kind = integer(data, "num_bits", here, 8), text(data, "type", here, "int")
    if bits != 8 or kind not in ("int", "float"):
        raise unsupported(here, f"a cache of {bits}-bit {kind}; int8 and fp8 are read")
    if data.get("dynamic") or not flag(data, "symmetric", here, True):
        raise unsupported(here, "a cache scaled at run time or asymmetrically")
    strategy = text(data, "strategy", here, "tensor")
    if strategy not in ("tensor", "attn_head"):
        raise unsupported(here, f"a cache with one scale per {strategy}")
    return KvCacheScheme(
        type="int8" if kind == "int" else "fp8", granularity="tensor" if strategy == "tensor" else "head"
    )
