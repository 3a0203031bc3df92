"""INT8 weight-only, symmetric, one scale per output channel, round to nearest.

scale = max|w| / 127, q = round(w / scale) in -127..127 (round half to even). The code -128 stays unused so that
negation is exact. An all-zero row gets scale 1.
With ``search`` each scale is the one of least squared error among shrunken ranges, large weights counting more
(:mod:`trtllm_cli.quantize.methods.grid`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.quantize.methods.base import QuantizedRows

if TYPE_CHECKING:
    import torch


class Int8WeightOnly:
    """See the module. Group size and symmetry do not apply."""

    def scheme(self, in_features: int, group_size: int, symmetric: bool) -> tuple[WeightScheme, str | None]:
        return WeightScheme(type="int8", granularity="channel"), None

    def tensors(
        self, scheme: WeightScheme, out_features: int, in_features: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("I8", (out_features, in_features)), "weight_scale": ("F32", (out_features,))}

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme, search: bool = False) -> QuantizedRows:
        from trtllm_cli.quantize.methods.grid import encode, fit, pack

        grid = fit(rows, scheme, None, search)
        return pack(encode(rows, grid), grid, scheme)


METHOD = Int8WeightOnly()
