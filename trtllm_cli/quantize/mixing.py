"""``--target-bits``: the method and group size of every module, by what rounding it alone costs.

The candidates are the asked-for int4 method in groups of the asked-for size and every finer one, and int8 with a scale
a channel. Modules that an override fixes, the embedding and the head keep what they have; their bytes count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from trtllm_cli.artifacts.memory import parse_bytes
from trtllm_cli.artifacts.store import Artifact
from trtllm_cli.artifacts.tensors import DTYPES, TensorStore
from trtllm_cli.errors import UsageError
from trtllm_cli.models.replay import Replay, StoredWeights
from trtllm_cli.progress import Reporter
from trtllm_cli.quantize.options import GROUPED, QuantizeOptions
from trtllm_cli.quantize.selection import Choice, select
from trtllm_cli.quantize.sensitivity import Quantizer, Size, choose, measure, parts
from trtllm_cli.quantize.streaming import choose_device

#: windows and tokens of each that the sensitivity is measured on: the standard error of a part's cost was 3 to 10 %
#: with 512 tokens on SmolLM2, where the costs of parts differ by factors of a hundred
WINDOWS, LENGTH = 4, 128
EIGHT = "int8-weight-only"


def choose_precisions(
    parent: Artifact, options: QuantizeOptions, tokens: NDArray[np.int32], report: Reporter
) -> dict[str, tuple[str, int]]:
    """module -> (method, group size) for ``options.target_bits``, of the layers' modules and the head.

    ``tokens`` [rows, length] are the calibration data. Raises UsageError for a method that makes no int4 weights and
    for a target outside what can be mixed.
    """
    target = options.target_bits
    assert target is not None
    spec, store = parent.checkpoint.spec, TensorStore(parent.path)
    offered = {_name(*candidate): candidate for candidate in _candidates(options)}
    selected = {
        name: select(spec, options, {module: candidate for modules in parts(spec).values() for module in modules})
        for name, candidate in offered.items()
    }
    shapes = {module: store.entry(f"{module}.weight").shape for chosen in selected.values() for module in chosen}
    costs_of: dict[str, dict[str, dict[str, Quantizer]]] = {}
    sizes: dict[str, Size] = {}
    groups = {**parts(spec), "embed": ("embed",)}
    for part, modules in groups.items():
        choices = {
            name: {module: chosen[module] for module in modules if module in chosen}
            for name, chosen in selected.items()
        }
        choices = _distinct(choices)
        counted = {module for choice in choices.values() for module in choice}
        if not counted:
            continue
        sizes[part] = Size(
            sum(math.prod(shapes[module]) for module in counted),
            {name: _stored(choice, shapes) for name, choice in choices.items()},
        )
        # a single choice is none: what it costs changes nothing
        costs_of[part] = {
            name: {module: _rounding(c, options) for module, c in choice.items()} if len(choices) > 1 else {}
            for name, choice in choices.items()
        }
    # an impossible target must not cost a measurement
    choose({part: dict.fromkeys(choices, 0.0) for part, choices in costs_of.items()}, sizes, target)

    device = str(choose_device(options.device))
    weights = StoredWeights(store, torch.float32, device, keep_bytes=parse_bytes(options.max_ram) * 3 // 4)
    replay = Replay(spec, weights, _windows(tokens), device=device)
    measured = measure(replay, lambda module: weights.dense(f"{module}.weight"), costs_of, report)
    chosen = choose(measured, sizes, target)
    _explain(chosen.candidates, chosen.bits, report)
    return {
        module: offered[name]
        for part, name in chosen.candidates.items()
        for module in groups[part]
        if len(costs_of[part]) > 1
    }


def _candidates(options: QuantizeOptions) -> list[tuple[str, int]]:
    """(method, group size), the smallest first. Raises UsageError where there is nothing to mix."""
    method = "int4-weight-only" if options.method == EIGHT else str(options.method)
    if method not in GROUPED or options.bits != 4:
        raise UsageError(
            "OPTION_UNUSED",
            f"target-bits mixes int4 and int8 weights, method {method} with {options.bits} bits makes no int4 ones",
            "use --method gptq, awq, awq-gptq or int4-weight-only, or leave out --target-bits",
        )
    coarse = int(options.group_size)
    finer = [size for size in (128, 64, 32) if coarse == -1 or size < coarse]
    return [(method, size) for size in (coarse, *finer)] + [(EIGHT, coarse)]


def _name(method: str, group_size: int) -> str:
    return method if method == EIGHT else f"{method}:{group_size}"


def _distinct(choices: Mapping[str, dict[str, Choice]]) -> dict[str, dict[str, Choice]]:
    """Without the names that come to the same as an earlier one (a group size that does not divide a width)."""
    found: dict[str, dict[str, Choice]] = {}
    seen: list[object] = []
    for name, choice in choices.items():
        facts = {module: (c.method, c.scheme) for module, c in choice.items()}
        if facts not in seen:
            seen.append(facts)
            found[name] = choice
    return found


def _stored(choice: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the modules' weights, scales and zero points included."""
    return sum(
        DTYPES[code][0] * math.prod(shape)
        for module, c in choice.items()
        for suffix, (code, shape) in c.tensors(*shapes[module]).items()
        if suffix.startswith("weight")
    )


def _rounding(choice: Choice, options: QuantizeOptions) -> Quantizer:
    def quantize(module: str, weight: torch.Tensor) -> torch.Tensor:
        return choice.rounder.quantize(weight, choice.scheme, options.searches(choice.method)).dequantized

    return quantize


def _windows(tokens: NDArray[np.int32]) -> torch.Tensor:
    """A few windows from all over the calibration data, int64 [W, S]."""
    rows = np.unique(np.linspace(0, len(tokens) - 1, WINDOWS).round().astype(int))
    return torch.from_numpy(tokens[rows, :LENGTH].astype(np.int64))


def _explain(chosen: Mapping[str, str], bits: float, report: Reporter) -> None:
    counts = {name: list(chosen.values()).count(name) for name in dict.fromkeys(chosen.values())}
    words = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    report.say(f"{bits:.2f} bits a weight by measured sensitivity: {words} (groups of modules with one input)")
