"""Which precision each part of a model deserves: what quantizing it alone costs, and the best mixture for a size.

The parts are input groups (q, k, v; o; gate, up; down; the head): modules that share their input also share a product
at run time. For each part and each candidate precision the cost is KL(source || source with this part quantized) over
some calibration tokens. Only the coarsest candidate of a part is measured through the rest of the model
(:mod:`trtllm_cli.models.replay`). The others follow from it: near the source the divergence is a quadratic form of the
disturbance, as its gradient vanishes there, so the cost of a disturbance of the same kind grows with its squared
size, which is measured for every candidate at the part's own output, ||X (W' - W)^T||^2.

The choice minimises the sum of costs under a bound on the stored bytes: a multiple-choice knapsack (Kellerer, Pferschy
and Pisinger, Knapsack Problems, 2004, chapter 11). Costs of separate parts add up to first order, which the sum takes
for granted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from trtllm_cli.errors import UsageError
from trtllm_cli.models.replay import Change, Replay
from trtllm_cli.models.spec import DecoderSpec
from trtllm_cli.progress import Reporter

#: (module, weight float32 [N, K]) -> what the quantized weight stands for, float32 [N, K]
Quantizer = Callable[[str, torch.Tensor], torch.Tensor]

#: the finest grid of stored sizes that the search works on
_GRID = 1 << 17


@dataclass(frozen=True)
class Size:
    """``elements`` of weight, and the ``stored`` bytes of each candidate, scales and zero points included."""

    elements: int
    stored: Mapping[str, int]


@dataclass(frozen=True)
class Chosen:
    """part -> candidate, the bits a weight it comes to on average, and the sum of the measured costs in nats."""

    candidates: Mapping[str, str]
    bits: float
    cost: float


def parts(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """Part -> its modules, in execution order; the embedding is not among them, the head only where it is its own."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in range(spec.num_layers):
        p = f"layers.{layer}"
        found[f"{p}.attn.qkv"] = (f"{p}.attn.q", f"{p}.attn.k", f"{p}.attn.v")
        found[f"{p}.attn.o"] = (f"{p}.attn.o",)
        found[f"{p}.mlp.gate_up"] = (f"{p}.mlp.gate", f"{p}.mlp.up")
        found[f"{p}.mlp.down"] = (f"{p}.mlp.down",)
    if not spec.tie_embeddings:
        found["lm_head"] = ("lm_head",)
    return found


def measure(
    replay: Replay,
    weight: Callable[[str], torch.Tensor],
    candidates: Mapping[str, Mapping[str, Mapping[str, Quantizer]]],
    report: Reporter,
) -> dict[str, dict[str, float]]:
    """part -> candidate -> its cost in nats.

    ``candidates`` is part -> candidate -> module -> quantizer; a module left out stays as it is, so an empty mapping
    costs nothing. ``weight`` gives a module's weight float32 [N, K] where the replay computes. Parts of one layer share
    its recorded inputs, so memory is one layer's activations and its weights in two versions. Raises BadInputError when
    a quantized part makes the logits NaN or infinite.
    """
    costs: dict[str, dict[str, float]] = {}
    inputs: dict[str, torch.Tensor] = {}
    layer: int | None = None
    for done, (part, choices) in enumerate(candidates.items()):
        report.advance("measuring sensitivity", done, len(candidates), "parts")
        modules = {module for quantizers in choices.values() for module in quantizers}
        needed = {_layer(replay.spec, module) for module in modules}
        if needed and needed != {layer}:
            assert len(needed) == 1, "a part lies within one layer"
            inputs.clear()  # before the next layer's are made
            layer = needed.pop()
            inputs = replay.inputs(layer)
        costs[part] = _costs(replay, weight, choices, inputs)
    report.advance("measuring sensitivity", len(candidates), len(candidates), "parts")
    return costs


def choose(measured: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Size], target_bits: float) -> Chosen:
    """The candidates with the smallest sum of costs whose average is at most ``target_bits`` a weight.

    Exact where the sizes are multiples of a unit that fits the budget 131,072 times (layers have few different sizes,
    so they are), else within one unit a part. Raises UsageError when no mixture is that small, or the largest one is
    smaller than the target, naming the range.
    """
    names = list(measured)
    elements = sum(sizes[part].elements for part in names)
    lowest = {part: min(sizes[part].stored[name] for name in measured[part]) for part in names}
    highest = sum(max(sizes[part].stored[name] for name in measured[part]) for part in names)
    base = sum(lowest.values())
    budget = math.floor(target_bits * elements / 8 * (1 + 1e-12))
    if not base <= budget <= highest:
        low, high = _up(8 * base / elements), math.floor(800 * highest / elements) / 100
        raise UsageError(
            "TARGET_BITS",
            f"an average of {target_bits:g} bits a weight cannot be mixed: these precisions give {low:g} to {high:g}",
            f"--target-bits between {low:g} and {high:g}, or another --group-size",
        )
    extra = {part: {name: sizes[part].stored[name] - lowest[part] for name in measured[part]} for part in names}
    steps = [step for choices in extra.values() for step in choices.values() if step]
    unit = reduce(math.gcd, steps, 0) or 1
    unit *= max(1, math.ceil((budget - base) / unit / _GRID))
    picked = _knapsack(
        [measured[part] for part in names], [extra[part] for part in names], (budget - base) // unit, unit
    )
    chosen = dict(zip(names, picked, strict=True))
    stored = sum(sizes[part].stored[name] for part, name in chosen.items())
    return Chosen(chosen, 8 * stored / elements, sum(measured[part][name] for part, name in chosen.items()))


def _costs(
    replay: Replay,
    weight: Callable[[str], torch.Tensor],
    choices: Mapping[str, Mapping[str, Quantizer]],
    inputs: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    disturbance: dict[str, float] = {}
    coarsest: tuple[float, str, dict[str, torch.Tensor]] | None = None
    for name, quantizers in choices.items():
        total = 0.0
        tensors: dict[str, torch.Tensor] = {}
        for module, quantizer in quantizers.items():
            original = weight(module)
            made = quantizer(module, original)
            moved = torch.nn.functional.linear(inputs[module].float(), made - original)
            total += float(torch.linalg.vector_norm(moved, dtype=torch.float64)) ** 2
            tensors[f"{module}.weight"] = made
        disturbance[name] = total
        if total > 0 and (coarsest is None or total > coarsest[0]):
            coarsest = (total, name, tensors)
    if coarsest is None:
        return dict.fromkeys(choices, 0.0)
    largest, _, tensors = coarsest
    cost = replay.run(Change(tensors)).mean
    return {name: cost * size / largest for name, size in disturbance.items()}


def _layer(spec: DecoderSpec, module: str) -> int:
    pieces = module.split(".")
    return int(pieces[1]) if pieces[0] == "layers" else spec.num_layers


def _knapsack(costs: list[Mapping[str, float]], extra: list[Mapping[str, int]], capacity: int, unit: int) -> list[str]:
    """One name an item, minimising the sum of costs within ``capacity`` units; every item has a choice of size 0."""
    best = np.zeros(capacity + 1)
    taken: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    names = [list(choices) for choices in costs]
    for item, choices in enumerate(names):
        following = np.full(capacity + 1, np.inf)
        choice = np.zeros(capacity + 1, np.uint8)
        for number, name in enumerate(choices):
            size = -(-extra[item][name] // unit)
            if size > capacity:
                continue
            total = best[: capacity + 1 - size] + costs[item][name]
            better = total < following[size:]
            following[size:][better] = total[better]
            choice[size:][better] = number
        best = following
        taken.append(choice)
    room, picked = capacity, []
    for item in range(len(names) - 1, -1, -1):
        name = names[item][int(taken[item][room])]
        picked.append(name)
        room -= -(-extra[item][name] // unit)
    return picked[::-1]


def _up(bits: float) -> float:
    """Rounded up to a hundredth, so that what the message names is possible."""
    return math.ceil(bits * 100 - 1e-9) / 100
