"""The sampling kernel in plain torch, to the bit: the same token for the same logits, parameters, seed and step.

What trtllm_sampling_params in the C header defines, read there first. Weights are whole numbers made by float32
operations only, and sums of whole numbers are exact in any order, so this needs no tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: the largest logit weighs 2**40
WEIGHT_BITS = 40
#: exp2 on half a unit around 0 (Taylor), highest power first
_POLYNOMIAL = (
    1.5403530393381609e-4,
    1.3333558146428443e-3,
    9.6181291076284772e-3,
    5.5504108664821580e-2,
    2.4022650695910071e-1,
    6.9314718055994531e-1,
    1.0,
)
_MASK = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """The parameters of one row; the defaults are neutral (and greedy)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = 0
    step: int = 0


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of a 64-bit key (Salmon et al., 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & _MASK, first >> 32 ^ c3 ^ k1, first & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def random_word(seed: int, step: int, draw: int = 0) -> int:
    """The 64 random bits of a request's step, anew for each draw."""
    low, high, _, _ = philox(seed & (2**64 - 1), (step & _MASK, draw, 0, 0))
    return high << 32 | low


def penalized(logits: Tensor, counts: Tensor | None, request: Request) -> Tensor:
    """float32 logits [vocab] after the penalties, zeros positive. ``counts`` int16 [vocab], as in the C header."""
    x = logits.float() + 0.0
    neutral = request.repetition == 1 and request.frequency == 0 and request.presence == 0
    if counts is None or neutral:
        return x
    repetition, frequency, presence = (
        torch.tensor(value, dtype=torch.float32) for value in (request.repetition, request.frequency, request.presence)
    )
    generated = (counts & 0x7FFF).float()
    y = torch.where(x > 0, x / repetition, x * repetition) - frequency * generated
    y = torch.where(generated > 0, y - presence, y)
    return torch.where(counts != 0, y, x) + 0.0


def weights(x: Tensor, temperature: float) -> Tensor:
    """int64 [vocab]: floor(2^40 * exp((x - max) / temperature)) with the kernel's roundings."""
    steep = torch.tensor(1.4426950408889634, dtype=torch.float32) / torch.tensor(temperature, dtype=torch.float32)
    y = (x - x.max()) * steep.clamp(max=3e38)
    likely = y > -(WEIGHT_BITS + 1)
    y = torch.where(likely, y, torch.zeros_like(y))
    whole = y.round()
    fraction = y - whole
    power = torch.full_like(y, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        # a fused multiply-add: the product is exact in float64, the sum is rounded once more, which differs from the
        # fused one only where it falls on a tie of float32 by chance, once in 2^29 times
        rounded = torch.tensor(coefficient, dtype=torch.float32).double()
        power = (power.double() * fraction.double() + rounded).float()
    bits = power.view(torch.int32)
    digits = ((bits & 0x7FFFFF) | 0x800000).long()
    shift = (bits >> 23).long() + whole.long() - 127 - 23 + WEIGHT_BITS
    value = torch.where(shift >= 0, digits << shift.clamp(min=0), digits >> (-shift).clamp(min=0))
    return torch.where(likely, value, torch.zeros_like(value))


def filtered(x: Tensor, request: Request) -> Tensor:
    """The weights that top-k, top-p and min-p leave, int64 [vocab]; x as :func:`penalized` gives it."""
    weight, nucleus = _candidates(x, request)
    return torch.where(nucleus, weight, 0)


def _candidates(x: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """The weights that top-k and min-p leave, and which tokens top-p keeps."""
    weight = weights(x, request.temperature)
    if 0 < request.top_k < len(x):
        weight = torch.where(x >= x.topk(request.top_k).values[-1], weight, 0)
    nucleus = torch.ones_like(weight, dtype=torch.bool)
    top_p = float(torch.tensor(request.top_p, dtype=torch.float32))
    if top_p < 1:
        fraction = int(max(top_p, 0.0) * 2**32)
        target = max(1, -(-int(weight.sum()) * fraction >> 32))
        order = torch.sort(x, descending=True, stable=True).indices
        sorted_weights = weight[order]
        nucleus = torch.zeros_like(nucleus)
        nucleus[order[sorted_weights.cumsum(0) - sorted_weights < target]] = True
    min_p = float(torch.tensor(request.min_p, dtype=torch.float32))
    return torch.where(weight >= int(min(max(min_p, 0.0), 1.0) * 2**WEIGHT_BITS), weight, 0), nucleus


def choose(logits: Tensor, counts: Tensor | None, request: Request) -> int:
    """The next token of one row, -1 where the logits hold NaN or positive infinity, or only negative infinity."""
    x = penalized(logits, counts, request)
    if not bool(torch.isfinite(x.max())):  # NaN is the maximum
        return -1
    if not request.temperature > 0:
        return int((x == x.max()).nonzero()[0])
    weight, nucleus = _candidates(x, request)
    ids = torch.arange(len(x))
    draw = 0
    while True:
        edges = weight.cumsum(0)
        target = random_word(request.seed, request.step, draw) * int(edges[-1]) >> 64
        token = int(torch.searchsorted(edges, target, right=True))
        if nucleus[token]:
            return token
        # top-p keeps neither this one nor what comes after it; the likeliest token it always keeps
        weight = torch.where((x > x[token]) | ((x == x[token]) & (ids < token)), weight, 0)
        draw += 1
