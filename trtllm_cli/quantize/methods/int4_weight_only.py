"""INT4 weight-only in groups of consecutive inputs, round to nearest.

Symmetric: scale = max|w| / 7 over the group, value = clamp(round(w / scale), -8, 7) + 8.
Asymmetric: scale = (max - min) / 15 with the range widened to hold zero, zero = round(-min / scale),
value = clamp(round(w / scale) + zero, 0, 15).
Scales are rounded to float16 first and the values computed against the rounded scale. An all-zero group gets scale 1.
With ``search`` each scale is the one of least squared error among shrunken ranges, large weights counting more
(:mod:`trtllm_cli.quantize.methods.grid`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.artifacts.schema import WeightScheme
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.quantize.methods.base import QuantizedRows

if TYPE_CHECKING:
    import torch

GROUP_SIZES = (128, 64, 32)


class Int4WeightOnly:
    """See the module. ``group_size`` -1 is one group for the whole row."""

    def scheme(self, in_features: int, group_size: int, symmetric: bool) -> tuple[WeightScheme, str | None]:
        size, note = group_size, None
        if in_features % 2:
            raise UnsupportedError(
                "WIDTH_ODD",
                f"a layer with {in_features} inputs cannot hold two int4 values a byte",
                "--method int8-weight-only",
            )
        if size != -1 and in_features % size:
            smaller = [candidate for candidate in GROUP_SIZES if candidate < size and in_features % candidate == 0]
            if not smaller:
                raise UnsupportedError(
                    "GROUP_SIZE",
                    f"no group size of {', '.join(map(str, GROUP_SIZES))} up to {size} divides {in_features} inputs",
                    "--group-size -1, or --override 'PATTERN=int8-weight-only' for such layers",
                )
            size = smaller[0]
            note = f"group size {size}: {group_size} does not divide {in_features} inputs"
        return (
            WeightScheme(type="int4", granularity="group", group_size=size, symmetric=symmetric, scale_dtype="float16"),
            note,
        )

    def tensors(
        self, scheme: WeightScheme, out_features: int, in_features: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = 1 if scheme.group_size == -1 else in_features // (scheme.group_size or in_features)
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("U8", (out_features, in_features // 2)),
            "weight_scale": ("F16", (out_features, groups)),
        }
        if not scheme.symmetric:
            shapes["weight_zero"] = ("U8", (out_features, groups))
        return shapes

    def quantize(self, rows: torch.Tensor, scheme: WeightScheme, search: bool = False) -> QuantizedRows:
        from trtllm_cli.quantize.methods.grid import encode, fit, pack

        grid = fit(rows, scheme, None, search)
        return pack(encode(rows, grid), grid, scheme)


METHOD = Int4WeightOnly()
