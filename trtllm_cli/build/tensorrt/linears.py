"""What became of each product: the kernel it compiled to, beside the one its quantization is meant for.

A product counts by the element types its kernel reads: ``int4 weights`` is a kernel that reads the low-bit weight
itself, ``int8 products`` one whose operands are both 8-bit. A quantized module whose kernel reads a 16-bit weight fell
back: the weight is dequantized in memory first, which costs more time than an unquantized one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from trtllm_cli.artifacts.schema import LayerQuantization
from trtllm_cli.build.tensorrt.log import Kernel, ProfileFacts
from trtllm_cli.models.decoder import head
from trtllm_cli.models.spec import DecoderSpec

_NAMES = {
    "Int8": "int8",
    "Int4": "int4",
    "FP8": "fp8",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
}
_LOW = ("Int8", "Int4", "FP8")


@dataclass(frozen=True)
class Census:
    """One profile: how many products became what, and the quantized modules that did not become what they should."""

    kinds: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


def intended(layer: LayerQuantization) -> str:
    """The kind of kernel a quantized module is meant for."""
    return f"{layer.scheme.type} {'products' if layer.activation is not None else 'weights'}"


def census(profile: ProfileFacts, spec: DecoderSpec, quantized: Mapping[str, LayerQuantization]) -> Census:
    """Every product of the model in one profile."""
    kernels: dict[str, list[Kernel]] = {}
    for kernel in profile.kernels:
        for source in kernel.sources:
            kernels.setdefault(source.partition("#")[0], []).append(kernel)
    kinds: Counter[str] = Counter()
    fallbacks = {}
    for module in dict.fromkeys([*spec.linears(), head(spec)]):
        found = _kind(kernels.get(module, ()))
        kinds[found] += 1
        if module in quantized and found != intended(quantized[module]):
            fallbacks[module] = f"{found} instead of {intended(quantized[module])}"
    return Census(dict(sorted(kinds.items())), fallbacks)


def told(fallbacks: Mapping[str, str]) -> list[str]:
    """A sentence for each kind of fallback, naming the first few modules."""
    modules: dict[str, list[str]] = {}
    for module, what in fallbacks.items():
        modules.setdefault(what, []).append(module)
    lines = []
    for what, names in modules.items():
        rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{len(names)} products fell back to {what}: {', '.join(names[:4])}{rest}")
    return lines


def _kind(kernels: list[Kernel] | tuple[Kernel, ...]) -> str:
    # a tied embedding is also gathered from, by a kernel of type kgen
    products = [kernel for kernel in kernels if kernel.type != "kgen"]
    if not products or not products[0].inputs:
        return "kernels unknown to this version"
    kernel = products[0]
    low = next((kind for kind in kernel.constants if kind in _LOW), None)
    if low is not None:
        return f"{_NAMES[low]} {'products' if low in kernel.inputs else 'weights'}"
    # a weight dequantized beforehand is an input like the other operand, an unquantized one a constant
    return _NAMES.get(kernel.inputs[0], kernel.inputs[0])
