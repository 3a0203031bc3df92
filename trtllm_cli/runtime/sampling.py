"""Choosing the next token from logits: greedy, or sampled with the usual filters, reproducible by seed.

Order of the filters, as in Hugging Face transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trtllm_cli.errors import BadInputError
from trtllm_cli.models.spec import Frozen


class Sampling(Frozen):
    """How to choose. ``temperature`` 0 is greedy; the filters then have no effect but the penalty.

    ``top_k`` keeps the k most likely tokens (0: all). ``top_p`` keeps the smallest set of most likely tokens whose
    probabilities sum to at least p (Holtzman et al., 2019). ``min_p`` drops tokens less likely than p times the most
    likely one (Nguyen et al., 2024). ``repetition_penalty`` divides positive and multiplies negative logits of tokens
    already seen (Keskar et al., 2019).
    """

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)


class Sampler:
    """The state of one request: its random stream and the tokens it has seen.

    The stream depends on (seed, ``repeat``) alone, so a request gets the same text in any batch; ``repeat`` counts the
    equal requests before it, which are to get other texts.
    """

    def __init__(self, sampling: Sampling, repeat: int, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        #: whether it takes the likeliest token, whatever came before
        self.greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence([sampling.seed, repeat])))
        self._seen = set(prompt)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token id for float32 logits [vocab]. Raises BadInputError when the model made NaN or infinity."""
        s = self._sampling
        if not np.isfinite(logits.max()):  # a NaN anywhere is the maximum
            raise not_finite("build it with --cache float32 --products float32")
        if s.repetition_penalty != 1.0:
            logits = logits.copy()
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            picked = logits[ids]
            logits[ids] = np.where(picked > 0, picked / s.repetition_penalty, picked * s.repetition_penalty)
        token = int(np.argmax(logits)) if s.temperature == 0 else self._draw(logits)
        self.take(token)
        return token

    @property
    def sampling(self) -> Sampling:
        return self._sampling

    @property
    def seen(self) -> frozenset[int]:
        """Ids of the tokens of prompt and answer so far."""
        return frozenset(self._seen)

    def uniform(self) -> float:
        """The next number of the stream, in [0, 1). For a choice made elsewhere: one a token, none for a greedy one."""
        return float(self._random.random())

    def take(self, token: int) -> None:
        """Record a chosen token."""
        self._seen.add(token)

    def _draw(self, logits: NDArray[np.float32]) -> int:
        ids, probabilities = filtered(logits, self._sampling)
        edge = np.cumsum(probabilities)
        place = int(np.searchsorted(edge, self.uniform() * edge[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])


def not_finite(remedy: str) -> BadInputError:
    """The error of logits that nothing can be chosen from."""
    return BadInputError(
        "LOGITS_NOT_FINITE", "the model's logits hold NaN or infinity", f"trtllm-cli verify the engine; {remedy}"
    )


def filtered(logits: NDArray[np.float32], s: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(token ids that survive temperature, top-k, top-p and min-p; their probabilities, summing to 1)."""
    scaled = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        scaled = (scaled - scaled.max()) / s.temperature  # at most 0, so that a tiny temperature ends in -inf, not NaN
    ids = np.arange(len(scaled))
    if 0 < s.top_k < len(scaled):
        # a threshold instead of a partition keeps ties of the last place, as transformers does
        ids = np.flatnonzero(scaled >= np.partition(scaled, -s.top_k)[-s.top_k])
    weights = np.exp(scaled[ids])
    weights /= weights.sum()
    if s.top_p < 1:
        # all tokens below (1-p)/n together weigh less than 1-p, so none of them is in the nucleus: sort the others only
        likely = np.flatnonzero(weights >= (1 - s.top_p) / len(weights))
        order = likely[np.argsort(-weights[likely], kind="stable")]
        before = np.cumsum(weights[order]) - weights[order]
        kept = np.sort(order[before < s.top_p])
        ids, weights = ids[kept], weights[kept]
    if s.min_p > 0:
        kept = weights >= s.min_p * weights.max()
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()
