"""Static scales of a quantized key-value cache, keys and values apart, from what calibration tokens put into it.

scale = largest magnitude seen / 127 (int8) or / 448 (FP8 E4M3), per key-value head or for the layer. An FP8 grid is the
same at every power of two, so there a scale up to twice that only shifts the grid within its octave: the one of the
smallest squared error on a sample of the tokens is taken, and nothing seen is cut off. Cutting int8's range has the
smaller squared error too, and measured worse: +0.5 to 0.6 % perplexity on SmolLM2 where the whole range costs 0.25 to
0.4 %, because the few large elements matter most.

A head's few large key channels would set the step of an int8 cache for all of them. :func:`key_smoothing` gives what
keys are divided and queries multiplied by (SmoothAttention: Lin et al., QServe, 2024), so that scores stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trtllm_cli.errors import BadInputError
from trtllm_cli.ops.quantized import TOP, Type8, kv_round_trip

#: factors on max|x| / 448 that the search of FP8 scales tries, 1 first
FACTORS = tuple(2 ** (phase / 8) for phase in range(8))
#: tokens the sample may hold; a third of them are kept when it is full
SAMPLE_TOKENS = 3072


@dataclass
class _Seen:
    """One of keys and values: ``largest`` [kv_heads, D] magnitudes, ``rows`` of [tokens, kv_heads, D]."""

    largest: Tensor | None
    rows: list[Tensor]


class KvStatistics:
    """Accumulates keys after rotary and values of one layer, for ``kv_heads`` heads on ``device``."""

    def __init__(self, kv_heads: int, device: torch.device) -> None:
        self._heads = kv_heads
        self._device = device
        self._seen = 0
        self._stride = 1
        self._at: list[Tensor] = []
        self._keys = _Seen(None, [])
        self._values = _Seen(None, [])

    def add(self, k: Tensor, v: Tensor) -> None:
        """k and v [B, kv_heads, S, D]."""
        at = torch.arange(self._seen, self._seen + k.shape[0] * k.shape[2], device=self._device)
        chosen = at % self._stride == 0
        self._at.append(at[chosen])
        for seen, x in ((self._keys, k), (self._values, v)):
            largest = x.abs().amax(dim=(0, 2)).float()
            seen.largest = largest if seen.largest is None else torch.maximum(seen.largest, largest)
            seen.rows.append(x.transpose(1, 2).flatten(0, 1)[chosen])
        self._seen += at.shape[0]
        while sum(part.shape[0] for part in self._at) > SAMPLE_TOKENS:
            # odd strides do not fall on the same positions of windows whose length is a power of two
            self._stride *= 3
            kept = torch.cat(self._at) % self._stride == 0
            self._at = [torch.cat(self._at)[kept]]
            for seen in (self._keys, self._values):
                seen.rows = [torch.cat(seen.rows)[kept]]

    def divide_values(self, s: Tensor) -> None:
        """Account for rows of the value projection divided by ``s`` [kv_heads * D] since the values were seen."""
        s = s.view(self._heads, -1).to(self._device)
        if self._values.largest is not None:
            self._values.largest = self._values.largest / s
            self._values.rows = [(torch.cat(self._values.rows) / s)]

    def divide_keys(self, s: Tensor) -> None:
        """Account for keys divided by ``s`` [kv_heads, D] since they were seen."""
        s = s.to(self._device)
        if self._keys.largest is not None:
            self._keys.largest = self._keys.largest / s
            self._keys.rows = [torch.cat(self._keys.rows) / s.to(self._keys.rows[0].dtype)]

    def largest(self) -> tuple[Tensor, Tensor]:
        """Largest magnitudes of keys and of values, float32 [kv_heads, D] each. Raises BadInputError before any add."""
        if self._keys.largest is None or self._values.largest is None:
            raise BadInputError(
                "CALIBRATION_EMPTY", "no calibration tokens reached the key-value cache", "give text with --calib"
            )
        return self._keys.largest, self._values.largest

    def scales(
        self, type: Type8, granularity: Literal["head", "tensor"], *, search: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Scales of keys and of values, float32 [kv_heads] each; per tensor all are the same.

        A head that was never anything but zero has scale 0, one that was not finite NaN: :func:`check` refuses both.
        """
        k, v = self.largest()
        return (
            _scales(k, torch.cat(self._keys.rows), type, granularity, search),
            _scales(v, torch.cat(self._values.rows), type, granularity, search),
        )


def _scales(largest: Tensor, rows: Tensor, type: Type8, granularity: str, search: bool) -> Tensor:
    heads = largest.shape[0]
    base = largest.amax(dim=1) / TOP[type]
    if granularity == "tensor":
        base = base.amax().expand(heads).clone()
    if type == "int8" or not search or not bool(((base > 0) & torch.isfinite(base)).all()):
        return base
    x = rows.float().transpose(0, 1)[None]
    errors = torch.stack([(kv_round_trip(x, type, base * f) - x).square().sum(dim=(0, 2, 3)) for f in FACTORS])
    if granularity == "tensor":
        errors = errors.sum(dim=1, keepdim=True).expand(-1, heads)
    return base * torch.tensor(FACTORS, device=base.device)[errors.argmin(dim=0)]


def key_smoothing(largest: Tensor, rotary_dim: int, *, shared: bool) -> Tensor:
    """s [kv_heads, D] that keys are to be divided and queries multiplied by, from the keys' largest magnitudes.

    s = sqrt(max|K|), relative to the head's geometric mean, as a power of two: then weights keep their codes and
    mantissas, and nothing but the cache changes by a bit. Elements i and i + rotary_dim / 2 turn into each other and
    share theirs; with ``shared`` all heads do (a norm over heads has one weight for them). 1 for a channel that was
    always zero or not finite.
    """
    found = largest.double()
    if shared:
        found = found.amax(dim=0, keepdim=True).expand(found.shape)
    half = rotary_dim // 2
    pair = torch.maximum(found[:, :half], found[:, half:rotary_dim])
    found = torch.cat([pair, pair, found[:, rotary_dim:]], dim=1)
    usable = (found > 0) & torch.isfinite(found)
    log = torch.where(usable, found, 1.0).log2() / 2
    mean = (log * usable).sum(dim=1, keepdim=True) / usable.sum(dim=1, keepdim=True).clamp(min=1)
    exponent = torch.where(usable, (log - mean).round().clamp(-8, 8), 0.0)
    return torch.exp2(exponent).float()


def check(k: Tensor, v: Tensor, layer: int, statistics: KvStatistics | None = None) -> None:
    """Raises BadInputError for scales of keys or values, [kv_heads] each, that no calibration would give.

    NaN, infinite or not positive; all of both exactly 1.0 (nobody calibrated them); and, with ``statistics``, a channel
    of a head that was zero for every token.
    """
    p = f"layers.{layer}.attn"
    for name, scales in (("k_scale", k), ("v_scale", v)):
        bad = ~torch.isfinite(scales) | (scales <= 0)
        if bool(bad.any()):
            head = int(bad.nonzero()[0])
            raise BadInputError(
                "KV_SCALE",
                f"{p}.{name} of head {head} is {float(scales[head]):g}",
                "check the checkpoint with trtllm-cli eval, or quantize without --kv-cache",
            )
    if bool((k == 1).all()) and bool((v == 1).all()):
        raise BadInputError(
            "KV_SCALE_ONES",
            f"every key and value scale of {p} is exactly 1.0, so nothing calibrated them",
            "calibrate with --calib, or quantize without --kv-cache",
        )
    if statistics is not None:
        for name, largest in zip(("keys", "values"), statistics.largest(), strict=True):
            dead = (largest == 0).nonzero()
            if len(dead):
                head, channel = (int(i) for i in dead[0])
                raise BadInputError(
                    "KV_CHANNEL_DEAD",
                    f"channel {channel} of head {head} of the {name} of {p} is zero for every calibration token",
                    "give other calibration text with --calib, or quantize without --kv-cache",
                )
