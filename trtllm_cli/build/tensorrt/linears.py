"""What became of each product and each attention: the kernel it compiled to, beside the one it is meant for.

A product counts by the element types its kernel reads: ``int4 weights`` is a kernel that reads the low-bit weight
itself, ``int8 products`` one whose operands are both 8-bit. A quantized module whose kernel reads a 16-bit weight fell
back: the weight is dequantized in memory first, which costs more time than an unquantized one. An attention that is
no fused kernel, or not one of the type asked for, fell back too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from trtllm_cli.artifacts.schema import Dtype, LayerQuantization
from trtllm_cli.artifacts.tensorrt import intended
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
_LOW_OF = {"int8": "Int8", "int4": "Int4", "fp8": "FP8"}
_LOW = tuple(_LOW_OF.values())


@dataclass(frozen=True)
class Census:
    """One profile: how many products became what, and the modules that did not become what they should."""

    kinds: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)


def census(
    profile: ProfileFacts,
    spec: DecoderSpec,
    quantized: Mapping[str, LayerQuantization],
    dtype: Dtype,
    fp8_attention: bool = False,
) -> Census:
    """Every product and every attention of the model in one profile."""
    modules = dict.fromkeys([*spec.linears(), head(spec)])
    kernels: dict[str, list[tuple[Kernel, set[str]]]] = {}
    for kernel in profile.kernels:
        # a layer whose name was taken carries a number; a merged product bears the names of all its modules
        named = (part for source in kernel.sources for part in source.partition("#")[0].split("+"))
        inside = set(named) & set(modules)
        for module in inside:
            kernels.setdefault(module, []).append((kernel, inside))
    kinds: Counter[str] = Counter()
    fallbacks = {}
    for module in modules:
        found = _kind(module, kernels.get(module, []), quantized)
        kinds[found] += 1
        meant = intended(quantized.get(module), dtype)
        if found != meant:
            fallbacks[module] = f"{found} instead of {meant}"
    return Census(dict(sorted(kinds.items())), {**fallbacks, **_attention(profile, spec, fp8_attention)})


def _attention(profile: ProfileFacts, spec: DecoderSpec, fp8: bool) -> dict[str, str]:
    fused = {source: kernel.attention for kernel in profile.kernels if kernel.attention for source in kernel.sources}
    found = {}
    for module in (f"layers.{layer}.attn" for layer in range(spec.num_layers)):
        if module not in fused:
            found[module] = "several kernels instead of a fused one"
        elif fp8 and not str(fused[module]).endswith(" fp8"):
            found[module] = "attention in the compute type instead of fp8"
    return found


def told(fallbacks: Mapping[str, str]) -> list[str]:
    """A sentence for each kind of fallback, naming the first few modules."""
    modules: dict[str, list[str]] = {}
    for module, what in fallbacks.items():
        modules.setdefault(what, []).append(module)
    lines = []
    for what, names in modules.items():
        rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{len(names)} modules fell back to {what}: {', '.join(names[:4])}{rest}")
    return lines


def _kind(module: str, candidates: list[tuple[Kernel, set[str]]], quantized: Mapping[str, LayerQuantization]) -> str:
    """``candidates`` are the kernels that hold the module's product or what follows it, and the modules they hold."""
    # kernels of the library come first: beside one, a generated kernel (kgen) only scales its result. For a single
    # token there may be none: the product is then part of a generated kernel
    found = sorted(candidates, key=lambda candidate: candidate[0].type == "kgen")
    if not found or not found[0][0].inputs:
        return "kernels unknown to this version"
    kernel, inside = found[0]
    lows = [kind for kind in kernel.constants if kind in _LOW]
    own = quantized.get(module)
    if own is None or _LOW_OF[own.scheme.type] not in lows:
        # a weight that a kernel reads for another module says nothing about this one
        others = {_LOW_OF[quantized[other].scheme.type] for other in inside - {module} if other in quantized}
        lows = [kind for kind in lows if kind not in others]
    low = _LOW_OF[own.scheme.type] if own is not None and _LOW_OF[own.scheme.type] in lows else next(iter(lows), None)
    if low is not None:
        return f"{_NAMES[low]} {'products' if low in kernel.inputs else 'weights'}"
    # a weight dequantized beforehand is an input like the other operand, an unquantized one a constant; a generated
    # kernel also reads numbers of other types (sums of a norm, row indices)
    read = [kind for kind in (*kernel.inputs, *kernel.constants) if kind in ("Half", "BFloat16")]
    plain = read[0] if kernel.type == "kgen" and read else kernel.inputs[0]
    return _NAMES.get(plain, plain)
