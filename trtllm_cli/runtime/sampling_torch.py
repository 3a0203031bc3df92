"""The choice of :mod:`trtllm_cli.runtime.sampling` for a batch, in torch where the logits are.

Each request's random numbers come from its own :class:`~trtllm_cli.runtime.sampling.Sampler`, one a token, and the
token is found by the same inverse cumulative distribution over ids in their order. Greedy choices are identical;
sampled ones too, unless a number falls within rounding of a boundary between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trtllm_cli.runtime.sampling import Sampler, Sampling


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each row of float32 ``logits`` [B, vocab], None where the row holds NaN or infinity.

    Records the tokens with their samplers.
    """
    settings = [sampler.sampling for sampler in samplers]
    finite = torch.isfinite(logits.amax(dim=1))  # a NaN anywhere is the maximum
    if any(one.repetition_penalty != 1 for one in settings):
        logits = _penalised(logits, samplers)
    tokens = logits.argmax(dim=1)
    drawn = [row for row, one in enumerate(settings) if one.temperature > 0]
    if drawn:
        where = torch.tensor(drawn, device=logits.device)
        weights = filtered(logits[where], [settings[row] for row in drawn])
        uniform = [samplers[row].uniform() for row in drawn]
        tokens[where] = draw(weights, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
    found: list[int] = torch.where(finite, tokens, -1).tolist()
    for sampler, token in zip(samplers, found, strict=True):
        if token >= 0:
            sampler.take(token)
    return [token if token >= 0 else None for token in found]


def filtered(logits: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """float64 weights [B, vocab] after temperature, top-k, top-p and min-p; 0 for tokens that do not survive.

    Rows do not sum to 1. Every setting has a temperature above 0.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    vocab = logits.shape[1]
    scaled = logits.double()
    # at most 0, so that a tiny temperature ends in -inf, not NaN
    scaled = (scaled - scaled.amax(dim=1, keepdim=True)) / column([one.temperature for one in settings])
    ranks = [one.top_k if 0 < one.top_k < vocab else vocab for one in settings]
    most = max((rank for rank in ranks if rank < vocab), default=0)
    if most:
        best = scaled.topk(most, dim=1).values
        limited = torch.tensor([rank < vocab for rank in ranks], device=logits.device)[:, None]
        place = torch.tensor([min(rank, most) - 1 for rank in ranks], device=logits.device)[:, None]
        # a threshold keeps ties of the last place, as transformers does
        scaled = scaled.masked_fill(limited & (scaled < best.gather(1, place)), -torch.inf)
    weights = scaled.exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    if any(one.top_p < 1 for one in settings):
        nucleus = column([one.top_p if one.top_p < 1 else torch.inf for one in settings])
        ordered, ids = weights.sort(dim=1, descending=True, stable=True)
        outside = ordered.cumsum(dim=1) - ordered >= nucleus
        weights = weights.masked_fill(torch.zeros_like(outside).scatter(1, ids, outside), 0)
    if any(one.min_p > 0 for one in settings):
        floor = column([one.min_p for one in settings]) * weights.amax(dim=1, keepdim=True)
        weights = weights.masked_fill(weights < floor, 0)
    return weights


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The id at which the cumulative weight passes ``uniform`` [B] (in [0, 1)) of the whole; int64 [B]."""
    edge = weights.cumsum(dim=1)
    place = torch.searchsorted(edge, (uniform * edge[:, -1])[:, None], right=True)[:, 0]
    # rounding may lead beyond the last token that has any weight
    last = weights.shape[1] - 1 - (weights > 0).flip(1).to(torch.uint8).argmax(dim=1)
    return torch.minimum(place, last)


def _penalised(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """A copy with the repetition penalty of each row applied to the tokens it has seen."""
    seen = [sampler.seen if sampler.sampling.repetition_penalty != 1 else frozenset() for sampler in samplers]
    ids = np.array([token for row in seen for token in row], np.int64)
    rows = np.repeat(np.arange(len(seen)), [len(row) for row in seen])
    factors = np.repeat(np.array([one.sampling.repetition_penalty for one in samplers]), [len(row) for row in seen])
    where = tuple(torch.from_numpy(index).to(logits.device) for index in (rows, ids))
    # float32, as numpy computes it
    factor = torch.from_numpy(factors.astype(np.float32)).to(logits.device)
    picked = logits[where]
    return logits.index_put(where, torch.where(picked > 0, picked / factor, picked * factor))
