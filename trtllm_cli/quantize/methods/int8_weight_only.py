"""INT8 weight-only, symmetric, one scale per output channel, round to nearest.

scale = max|w| / 127, q = round(w / scale) in -127..127 (round half to even). The code -128 stays unused so that
negation is exact. An all-zero row gets scale 1.
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

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme) -> QuantizedRows:
        import torch

        largest = rows.abs().amax(dim=1)
        # below the smallest normal float a division would overflow: such a row is zero for every purpose
        scale = torch.where(largest > torch.finfo(torch.float32).tiny * 127, largest / 127, torch.ones_like(largest))
        values = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        return QuantizedRows({"weight": values, "weight_scale": scale}, values.float() * scale[:, None])


METHOD = Int8WeightOnly()
